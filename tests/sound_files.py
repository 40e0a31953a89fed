"""WAV files written byte by byte, and small folders of them."""

from __future__ import annotations

import struct

import numpy as np


def wav_bytes(sound, rate=8000, bits=16, tag=1, extensible=False) -> bytes:
    """A WAV file of a sound [S] or [S, channels] from -1 to 1, as the format's description has it."""
    sound = np.asarray(sound, dtype=np.float64)
    channels = 1 if sound.ndim == 1 else sound.shape[1]
    if bits == 8:
        data = np.round(sound * 127 + 128).astype(np.uint8).tobytes()
    else:
        whole = np.round(sound * (2 ** (bits - 1) - 1)).astype(np.int64).ravel()
        data = b"".join(int(v).to_bytes(bits // 8, "little", signed=True) for v in whole)
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else tag, channels, rate, rate * frame, frame, bits)
    if extensible:  # its sub-format is the tag in a GUID
        form += struct.pack("<HHIH", 22, bits, 0, tag) + bytes.fromhex("000000001000800000aa00389b71")
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    chunks += b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def tone(hz: float, seconds: float = 0.5, rate: int = 8000, loud: float = 0.5) -> np.ndarray:
    """A sine [S]."""
    return loud * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def sound_folder(root, per_class=6, seconds=(0.3, 0.5)):
    """train and test with low and high tones in noise, some of them short."""
    rng = np.random.default_rng(0)
    for part, count in (("train", per_class), ("test", 3)):
        for name, hz in (("high", 2000), ("low", 400)):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                sound = tone(hz * rng.uniform(0.9, 1.1), seconds[i % len(seconds)])
                sound += rng.normal(0, 0.02, len(sound))
                (root / part / name / f"{i}.wav").write_bytes(wav_bytes(sound))
    return root
