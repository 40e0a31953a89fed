"""Sound: WAV files as log-mel spectrograms.

A clip is mixed to one channel, resampled to 8 kHz and cut to ``--sound_seconds``. Each step of the sequence is a window
of 32 ms, 16 ms after the last one: the logarithm of its energy in 40 bands that are equally wide on the mel scale
(O'Shaughnessy 1987).

Legend: n train samples, k = n + m train and test samples, S sound samples, T windows of a clip, F mel bands, Q
frequencies.
"""

from __future__ import annotations

import functools
import io
import math
import os
import wave
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.arrays import Arrays, ReadOptions
from data.classification import Classification
from data.picture_folders import labelled_files, names_of
from data.pictures import displayable, find_files, say_skipped
from utils.errors import UsageError
from utils.files import read_bytes

RATE = 8000  # sound samples a second: the telephone's
WINDOW, HOP, FFT = 256, 128, 512  # sound samples
BANDS, LOWEST_HZ = 40, 50.0
FLOOR = 1e-8  # energy, of which a full sine has 1/4: below it is what 16 bits and telephones add
GRAIN = 256  # steps of 1 in the logarithm that are told apart
RATES = range(1000, 384_001)  # that are read, in Hz
BEYOND = 0.1  # seconds after the cut that the resampling still sees


def audiofolder(path: Path, options: ReadOptions) -> Arrays:
    """WAV files laid out as ``path``/train/<class>/* and ``path``/test/<class>/*, in subfolders too: plain PCM of 8 to
    32 bits, at any rate, with any number of channels."""
    train, test, class_names, others = labelled_files(
        "audiofolder", path, lambda folder: find_files(folder, (".wav", ".wave")), "WAV file"
    )
    clips = [
        spectrogram(read_wav(file, options.seconds), options.seconds)
        for file, _ in tqdm(train + test, "decoding", unit="clip", disable=not options.progress)
    ]
    inputs_kTF, n = torch.from_numpy(_padded(clips)), len(train)
    labels_k = torch.tensor([label for _, label in train + test])
    parts = inputs_kTF[:n], labels_k[:n], inputs_kTF[n:], labels_k[n:]
    return Arrays(*parts, Classification(class_names), say_skipped(others, "WAV file"), names_of(train, path))


def read_wav(file: str, seconds: float) -> np.ndarray:
    """The first ``seconds`` (and a little more) of a WAV file as one channel of 8 kHz: float64 [S], from -1 to 1.
    Raises UsageError for a file that is damaged, empty or no plain PCM."""
    try:
        with wave.open(io.BytesIO(_as_pcm(read_bytes(file, "WAV file")))) as sound:
            channels, width, rate, frames = sound.getparams()[:4]
            content = sound.readframes(frames)
        if rate not in RATES:
            raise ValueError(f"its header says {rate:,} Hz, and {RATES[0]:,} to {RATES[-1]:,} are read")
        if width not in (1, 2, 3, 4):
            raise ValueError(f"it has {8 * width} bits a sample, and 8, 16, 24 or 32 are read")
        if frames == 0:
            raise ValueError("it holds no sound")
        if len(content) != frames * channels * width:
            raise ValueError(f"it ends after {len(content):,} of {frames * channels * width:,} bytes of sound")
    except (wave.Error, EOFError, RuntimeError, ValueError) as error:  # RuntimeError: the end of a chunk is too far
        cause = "it is cut off" if not str(error) else " ".join(str(error).split())
        if cause.startswith("unknown format"):
            cause = f"it is no plain PCM of 8 to 32 bits ({cause}); convert it, or"
        else:
            cause += ";"
        raise UsageError(f"cannot read the WAV file {displayable(file)}: {cause} replace or remove it") from error
    content = content[: math.ceil(min(seconds + BEYOND, frames / rate) * rate) * channels * width]
    return _resampled(_amplitudes(content, width).reshape(-1, channels).mean(1), rate)


def spectrogram(sound_S: np.ndarray, seconds: float = math.inf) -> np.ndarray:
    """Log-mel energies float32 [T, F] of the first ``seconds`` of a sound at 8 kHz; one that is shorter than a window
    is filled up with silence.

    They are rounded to 1/256, so that other machines, whose last bits may differ, decode the same data.
    """
    sound_S = sound_S[: int(min(seconds * RATE, len(sound_S)))]
    sound_S = np.pad(sound_S, (0, max(0, WINDOW - len(sound_S))))
    frames_TS = np.lib.stride_tricks.sliding_window_view(sound_S, WINDOW)[::HOP]
    # Hann's window without its last point, which would be the next period's first
    window_S = np.hanning(WINDOW + 1)[:-1]
    spectrum_TQ = np.fft.rfft(frames_TS * (window_S / window_S.sum()), FFT)
    energy_TF = (spectrum_TQ.real**2 + spectrum_TQ.imag**2) @ mel_bands().T
    return (np.round(np.log(energy_TF + FLOOR) * GRAIN) / GRAIN).astype(np.float32)


@functools.cache
def mel_bands() -> np.ndarray:
    """The weight of each frequency in each band [F, Q]: triangles that begin and end at the peaks of their
    neighbours."""
    highest, lowest = (2595 * math.log10(1 + hz / 700) for hz in (RATE / 2, LOWEST_HZ))
    corners = 700 * (10 ** (np.linspace(lowest, highest, BANDS + 2) / 2595) - 1)
    frequencies_Q = np.fft.rfftfreq(FFT, 1 / RATE)
    low_F1, peak_F1, high_F1 = (corners[i : BANDS + i, None] for i in range(3))
    rising_FQ = (frequencies_Q - low_F1) / (peak_F1 - low_F1)
    falling_FQ = (high_F1 - frequencies_Q) / (high_F1 - peak_F1)
    return np.minimum(rising_FQ, falling_FQ).clip(min=0)


def _as_pcm(content: bytes) -> bytes:
    """The same file with the plain header where an 'extensible' one says PCM: Python 3.11's module does not know it,
    and other programs write it for 24 bits."""
    extensible = content[12:16] == b"fmt " and content[20:22] == b"\xfe\xff" and content[44:46] == b"\x01\x00"
    return content[:20] + b"\x01\x00" + content[22:] if extensible else content


def _amplitudes(content: bytes, width: int) -> np.ndarray:
    """PCM of ``width`` bytes a sample as float64 from -1 to 1: unsigned where it is one byte, else signed."""
    if width == 1:
        return (np.frombuffer(content, np.uint8) - 128.0) / 128
    bytes_S4 = np.zeros((len(content) // width, 4), np.uint8)
    bytes_S4[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
    return bytes_S4.view("<i4")[:, 0] / 2.0**31


def _resampled(sound_S: np.ndarray, rate: int) -> np.ndarray:
    if rate == RATE:
        return sound_S
    from scipy.signal import resample_poly  # takes a while to load

    common = math.gcd(RATE, rate)
    return resample_poly(sound_S, RATE // common, rate // common)


def _padded(clips: list[np.ndarray]) -> np.ndarray:
    """All spectrograms in one array [k, T, F], NaN after each clip's end."""
    longest = max(len(clip) for clip in clips)
    if len(clips) * longest * BANDS * 4 > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UsageError(f"{len(clips):,} clips do not fit into memory; take less of each with --sound_seconds")
    inputs_kTF = np.full((len(clips), longest, BANDS), np.nan, np.float32)
    for i, clip in enumerate(clips):
        inputs_kTF[i, : len(clip)] = clip
    return inputs_kTF
