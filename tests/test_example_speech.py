"""The speech example: how prompts are split, and what it says where it cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parent.parent / "examples" / "speech"


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(f"speech_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_prompt_is_in_one_part_in_all_languages(tmp_path):
    sounds, names = loaded("sounds"), [f"prompt{i}" for i in range(40)]
    voices = tmp_path / "usr" / "share" / "asterisk" / "sounds"
    for voice in ("en_US_f_Allison", "ru_RU_f_IvrvoiceRU"):
        for folder in ("", "digits", "silence"):
            (voices / voice / folder).mkdir(parents=True, exist_ok=True)
            for name in [*names, "beep"]:
                (voices / voice / folder / f"{name}.wav").write_bytes(b"\0" * 3000)
        (voices / voice / "is.wav").write_bytes(b"\0" * 44)  # without sound
    counts = sounds.split(tmp_path, tmp_path / "out")
    parts = {p: {f.stem for f in (tmp_path / "out" / p).rglob("*.wav")} for p in ("train", "test")}
    assert parts["train"] | parts["test"] == set(names) and not parts["train"] & parts["test"]
    assert counts == {p: 4 * len(names_of_part) for p, names_of_part in parts.items()}  # two voices, two folders
    assert 4 <= len(parts["test"]) <= 18
    assert sorted(f.name for f in (tmp_path / "out" / "test").iterdir()) == ["english", "russian"]


def test_without_apt_there_is_a_line(tmp_path):
    command = [sys.executable, str(SCRIPTS / "sounds.py"), str(tmp_path / "sounds")]
    done = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: apt-get and dpkg not found: ")
    assert "asterisk-core-sounds-{en,es,fr,it,ru}-wav" in line


def test_a_program_that_fails_is_a_line_and_leaves_nothing(tmp_path):
    for name in ("apt-get", "dpkg"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'E: no such package' >&2\nexit 100\n")
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, str(SCRIPTS / "sounds.py"), str(tmp_path / "out" / "sounds")]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "E: no such package" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_is_drawn(tmp_path, seeds):
    compare = loaded("compare")
    clips = [np.array([5, 1, 0, 2, 7]) + k for k in range(8)]
    one = {"seed": 0, "influence": np.linspace(-0.1, 0.3, 8), "clips": clips, "languages": list("abcde")}
    accuracy = {name: [0.9 - 0.1 * i] * seeds for i, name in enumerate(compare.METHODS)}
    out = compare.draw(accuracy, [one] * seeds, tmp_path / "x.png")
    assert out.read_bytes().startswith(b"\x89PNG")
