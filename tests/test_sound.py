"""Sound: WAV files against independent computations, odd files, the cache, and training on spectrograms."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from command import arguments, refused, summary, train
from sound_files import sound_folder, tone, wav_bytes

import main
from data import sound
from data.arrays import ReadOptions
from data.batches import SequenceSamples, augmentation_keys
from data.dataset_loader import load_dataset
from data.sound import BANDS, mel_bands, read_wav, spectrogram
from data.transforms import MASKED_FEATURES, MASKED_STEPS, NOISE, augment_sequences
from networks import load_model
from utils.errors import UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return sound_folder(tmp_path / "clips")


def write(tmp_path, *args, **options) -> str:
    file = tmp_path / "clip.wav"
    file.write_bytes(wav_bytes(*args, **options))
    return str(file)


def heard(tmp_path, *args, seconds=3.0, **options) -> np.ndarray:
    """The spectrogram of a file with this sound."""
    return spectrogram(read_wav(write(tmp_path, *args, **options), seconds), seconds)


# ---- from a file to mel energies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
@pytest.mark.parametrize("extensible", [False, True])
def test_amplitudes_are_those_that_were_written(tmp_path, bits, extensible):
    written = np.random.default_rng(0).uniform(-1, 1, 300)
    read = read_wav(write(tmp_path, written, bits=bits, extensible=extensible), 3.0)
    assert len(read) == 300
    np.testing.assert_allclose(read, written, atol=1.6 * 2.0 ** (1 - bits))


def test_the_energies_of_a_tone_are_those_of_sums_by_hand(tmp_path):
    """The discrete Fourier transform and the triangles written out with loops, from the formulas."""
    written = tone(1000, 0.1)
    found = heard(tmp_path, written, bits=32)
    assert found.shape == (1 + (800 - 256) // 128, BANDS) and found.dtype == np.float32
    mel = lambda hz: 1127.01048 * math.log(1 + hz / 700)  # noqa: E731
    edges = [700 * (math.exp(m / 1127.01048) - 1) for m in np.linspace(mel(50), mel(4000), 42)]
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * s / 256) for s in range(256)]
    for t in (0, 3):
        cut = [w * x / sum(hann) for w, x in zip(hann, written[128 * t : 128 * t + 256], strict=True)]
        powers = []
        for q in range(257):
            turn = [2 * math.pi * q * s / 512 for s in range(256)]
            parts = (sum(c * f(a) for c, a in zip(cut, turn, strict=True)) for f in (math.cos, math.sin))
            powers.append(sum(p * p for p in parts))
        for band, (low, peak, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
            energy = 0.0
            for q, power in enumerate(powers):
                hz = q * 8000 / 512
                weight = (hz - low) / (peak - low) if hz <= peak else (high - hz) / (high - peak)
                energy += max(0.0, weight) * power
            # half a grain, and what the two values of 2595 / ln(10) differ by
            assert found[t, band] == pytest.approx(math.log(energy + 1e-8), abs=0.5 / 256 + 1e-3), (t, band)


def test_the_loudest_band_is_that_of_the_tone(tmp_path):
    peaks = (mel_bands() @ np.fft.rfftfreq(512, 1 / 8000)) / mel_bands().sum(1)
    for hz in (200, 440, 1000, 3000):
        loudest = heard(tmp_path, tone(hz)).mean(0).argmax()
        assert loudest == np.abs(peaks - hz).argmin()
    assert (mel_bands().max(1) > 0.4).all()  # no band falls between two frequencies


@pytest.mark.parametrize("rate", [11025, 16000, 22050, 44100, 48000])
def test_rate_and_channels_change_little(tmp_path, rate):
    plain = heard(tmp_path, tone(700) + tone(1900, loud=0.2))
    other = tone(700, rate=rate) + tone(1900, rate=rate, loud=0.2)
    stereo = np.stack([1.5 * other, 0.5 * other], 1)
    for found in (heard(tmp_path, other, rate=rate), heard(tmp_path, stereo * 0.9, rate=rate) - 2 * np.log(0.9)):
        assert found.shape == plain.shape
        loud = plain > -12  # the rest is noise of rounding
        assert loud.sum() > 100
        # the first and the last windows lie where the resampling begins and ends
        assert np.abs(found - plain)[1:-1][loud[1:-1]].max() < 0.1


def test_clips_are_cut_or_end_in_nan(tmp_path):
    for name, seconds in (("a", 0.02), ("b", 2.0)):
        for part in ("train", "test"):
            (tmp_path / "x" / part / name).mkdir(parents=True)
            (tmp_path / "x" / part / name / "clip.WAV").write_bytes(wav_bytes(tone(500, seconds)))
    arrays = sound.audiofolder(tmp_path / "x", ReadOptions(seconds=0.5, progress=False))
    assert arrays.inputs_n.shape == (2, 1 + (4000 - 256) // 128, BANDS) and arrays.inputs_n.dtype == torch.float32
    known = arrays.inputs_n.isfinite()
    assert known[0, 0].all() and not known[0, 1:].any()  # shorter than a window: one step
    assert known[1].all()
    first = spectrogram(read_wav(write(tmp_path, tone(500, 2.0)), 2.0))[: known.shape[1]]
    assert np.array_equal(arrays.inputs_n[1].numpy(), first)


# ---- folders, and files that are not as they should be --------------------------------------------------------------


def test_a_folder_becomes_a_data_set(folder):
    (folder / "train" / "low" / "deeper").mkdir()
    (folder / "train" / "low" / "0.wav").rename(folder / "train" / "low" / "deeper" / "0.wav")
    (folder / "train" / "low" / "notes.txt").write_text("x")
    data = load_dataset("audiofolder", folder, progress=False)
    assert data.task.names == ("high", "low") and data.targets_n.tolist() == [0] * 6 + [1] * 6
    assert data.sources[:2] == ("train/high/0.wav", "train/high/1.wav")
    assert data.sources[-1] == "train/low/deeper/0.wav"
    assert data.skipped == ("1 file that is no readable WAV file of a class (notes.txt)",)
    assert data.mean_C.shape == (BANDS,) and (data.std_C > 0).all()


def test_the_cache_keeps_lengths_apart(folder, monkeypatch):
    first = load_dataset("audiofolder", folder, progress=False)
    monkeypatch.setattr(sound, "read_wav", None)
    again = load_dataset("audiofolder", folder, progress=False)
    assert again.fingerprint == first.fingerprint and again.sources == first.sources
    assert torch.equal(again.inputs_n.nan_to_num(9.0), first.inputs_n.nan_to_num(9.0))
    with pytest.raises(TypeError):
        load_dataset("audiofolder", folder, progress=False, seconds=0.2)


def header(change: dict[int, bytes], sound=None) -> bytes:
    content = bytearray(wav_bytes(tone(500, 0.1) if sound is None else sound))
    for place, new in change.items():
        content[place : place + len(new)] = new
    return bytes(content)


ODD = {
    "empty": (b"", "cut off"),
    "no wav": (b"ID3" + b"\0" * 400, "does not start with RIFF"),
    "cut in the sound": (wav_bytes(tone(500))[:-1000], "ends after 7,000 of 8,000 bytes"),
    "cut in the header": (wav_bytes(tone(500))[:30], "cut off"),
    "no sound": (wav_bytes([]), "holds no sound"),
    "mu-law": (wav_bytes(tone(500), bits=8, tag=7), "no plain PCM of 8 to 32 bits"),
    "floating point": (wav_bytes(tone(500), bits=32, tag=3), "no plain PCM of 8 to 32 bits"),
    "extensible mu-law": (wav_bytes(tone(500), bits=8, tag=7, extensible=True), "no plain PCM|unknown"),
    "0 Hz": (header({24: struct.pack("<I", 0)}), "says 0 Hz"),
    "4 GHz": (header({24: struct.pack("<I", 2**32 - 1)}), "says 4,294,967,295 Hz"),
    "no channels": (header({22: struct.pack("<H", 0)}), "channels"),
    "65,535 channels": (header({22: struct.pack("<H", 65535)}), "no sound|ends after"),
    "0 bits": (header({34: struct.pack("<H", 0)}), "sample width"),
    "64 bits": (header({34: struct.pack("<H", 64)}), "64 bits a sample"),
    "promises 4 GB": (header({40: struct.pack("<I", 2**32 - 2)}), "ends after 1,600 of 4,294,967,294 bytes"),
    "sound before the format": (header({12: b"junk"}), "data chunk before fmt|fmt chunk"),
}


@pytest.mark.parametrize("content,reason", ODD.values(), ids=ODD.keys())
def test_odd_files_are_one_line(folder, content, reason):
    (folder / "train" / "low" / "odd.wav").write_bytes(content)
    with pytest.raises(UsageError, match=f"odd.wav: .*({reason}).*replace or remove it") as caught:
        load_dataset("audiofolder", folder, progress=False)
    assert "\n" not in str(caught.value)


def test_no_damage_is_more_than_a_line(tmp_path):
    """Every byte of a header changed in turn: read, or refused."""
    whole, file = wav_bytes(tone(500, 0.05), extensible=True), tmp_path / "x.wav"
    refusals = 0
    for place in range(68):
        for new in (0, 1, 127, 255):
            file.write_bytes(whole[:place] + bytes([new]) + whole[place + 1 :])
            try:
                assert np.isfinite(spectrogram(read_wav(str(file), 3.0), 3.0)).all()
            except UsageError:
                refusals += 1
    assert refusals > 50


def test_the_layout_is_asked_for(folder, tmp_path):
    with pytest.raises(UsageError, match=r"audiofolder: no folder .*nowhere/train; expected are WAV files in"):
        load_dataset("audiofolder", tmp_path / "nowhere")
    (folder / "train" / "humming").mkdir()
    with pytest.raises(UsageError, match="not in both train and test of .*: humming"):
        load_dataset("audiofolder", folder)
    (folder / "test" / "humming").mkdir()
    with pytest.raises(UsageError, match="no WAV files of class 'humming' in its train folder"):
        load_dataset("audiofolder", folder)


# ---- augmentation --------------------------------------------------------------------------------------------------


def batch(count=64, steps=20, features=10):
    inputs = torch.randn(count, steps, features + 1, generator=torch.Generator().manual_seed(0)) + 3
    inputs[..., -1] = 1
    inputs[::2, 15:] = 0  # padding
    return inputs, augmentation_keys(5, torch.arange(1), torch.zeros(1, dtype=torch.int64), count)[0]


@pytest.mark.parametrize("kind", ["mask", "noise"])
def test_augmentation_of_a_sample_is_a_function_of_its_key(kind):
    inputs, keys = batch()
    out = augment_sequences(inputs, keys, kind)
    assert torch.equal(augment_sequences(inputs[7:9], keys[7:9], kind), out[7:9])
    assert torch.equal(augment_sequences(inputs.view(8, 8, 20, 11), keys.view(8, 8), kind).flatten(0, 1), out)
    assert not torch.equal(augment_sequences(inputs, keys.flip(0), kind), out)
    assert torch.equal(out[..., -1], inputs[..., -1])
    assert (out[::2, 15:] == 0).all()  # padding stays padding


def test_a_mask_is_a_stretch_and_a_band_and_nothing_else_moves():
    inputs, keys = batch()
    out = augment_sequences(inputs, keys, "mask")
    longest_steps, longest_band = 0, 0
    for before, after in zip(inputs[1::2], out[1::2], strict=True):  # without padding
        gone = (after[:, :-1] == 0) & (before[:, :-1] != 0)
        assert torch.equal(after[:, :-1][~gone], before[:, :-1][~gone])
        steps, band = gone.all(1).nonzero()[:, 0], gone.all(0).nonzero()[:, 0]
        expected = torch.zeros_like(gone)
        expected[steps], expected[:, band] = True, True
        assert torch.equal(gone, expected)
        for places in (steps, band):
            assert len(places) == 0 or int(places[-1] - places[0]) == len(places) - 1
        longest_steps, longest_band = max(longest_steps, len(steps)), max(longest_band, len(band))
    assert (longest_steps, longest_band) == (MASKED_STEPS * 20, MASKED_FEATURES * 10)


def test_noise_is_normal_and_of_a_tenth():
    inputs, keys = batch(count=200)
    added = (augment_sequences(inputs, keys, "noise") - inputs)[inputs[..., -1] == 1][:, :-1] / NOISE
    assert added.mean().abs() < 0.02 and (added.std() - 1).abs() < 0.02
    assert ((added.abs() < 1).double().mean() - 0.6827).abs() < 0.01


# ---- networks and whole runs ----------------------------------------------------------------------------------------


def test_a_picture_network_sees_the_spectrogram(folder):
    data = load_dataset("audiofolder", folder, progress=False)
    samples = SequenceSamples(data.inputs_n, data.targets_n, data.mean_C, data.std_C)
    x, _ = samples.plain(torch.arange(4))
    assert x.shape == (4, *samples.shape)
    network = load_model("cnn", 2, samples.shape, seed=0)
    pictures = load_model("cnn", 2, (1, x.shape[1], BANDS), seed=0)
    assert torch.equal(network(x), pictures(x[:, None, :, :-1]))


@pytest.mark.parametrize("settings", ["--model cnn --augment mask", "--model lstm_mean --augment noise --lr 0.3"])
def test_tones_are_learned(folder, tmp_path, settings):
    few = "--num_workers 2 --min_shard 2 --batch_size 4 --epochs 20 --partition iid --val_fraction 0.2 --engine threads"
    run = train(tmp_path, "--dataset_name", "audiofolder", "--dataset_path", folder, *few.split(), *settings.split())
    assert summary(run)["test_accuracy"] == 1.0
    assert (run / "sources.txt").read_text().splitlines()[0] == "train/high/0.wav"


def test_what_is_for_pictures_is_refused(folder, tmp_path, capsys):
    for flags, reason in (("--image_size 32", "is for pictures"), ("--augment crop", "none, noise, mask")):
        data = ("--dataset_name", "audiofolder", "--dataset_path", folder, "--min_shard", "1")
        argv = arguments(tmp_path, *data, *flags.split())
        assert reason in refused(capsys, main.main(argv))
