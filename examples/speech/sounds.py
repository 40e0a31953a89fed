"""Telephone prompts in five languages, from Debian's packages: fetched, unpacked, and split by prompt.

    python examples/speech/sounds.py FOLDER
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

LANGUAGES = {"en": "english", "es": "spanish", "fr": "french", "it": "italian", "ru": "russian"}
NO_SPEECH = {
    "ascending-2tone", "descending-2tone", "beep", "beeperr", "confbridge-join", "confbridge-leave", "tt-monkeys",
}
SMALLEST = 2000  # bytes, an eighth of a second: one of the files is empty
TEST = 4  # one prompt in so many


def main() -> int:
    """Fetch and unpack into a folder that does not exist yet. Returns the exit code."""
    if len(sys.argv) != 2:
        print(f"error: one argument is needed, the folder for the sounds: python {sys.argv[0]} FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    if (folder / "train").is_dir():
        print(f"the sounds are in {folder}")
        return 0
    if missing := [program for program in ("apt-get", "dpkg") if shutil.which(program) is None]:
        print(
            f"error: {' and '.join(missing)} not found: the sounds come from Debian's packages "
            f"asterisk-core-sounds-{{{','.join(LANGUAGES)}}}-wav, so run this on Debian or Ubuntu, or bring {folder} "
            "along from there",
            file=sys.stderr,
        )
        return 2
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        try:
            fetch(Path(temporary))
        except subprocess.CalledProcessError as error:
            cause = " ".join(error.stderr.split())[-200:]
            print(f"error: {' '.join(error.cmd)}: {cause}; check the network, or apt-get update", file=sys.stderr)
            return 2
        counts = split(Path(temporary), Path(temporary) / "sounds")
        os.rename(Path(temporary) / "sounds", folder)
    print(f"{counts['train']:,} clips to train on and {counts['test']:,} to test on, in {folder}")
    return 0


def fetch(folder: Path) -> None:
    """Download and unpack the packages; nothing is installed."""
    packages = [f"asterisk-core-sounds-{code}-wav" for code in LANGUAGES]
    # apt has a user of its own for downloads, who may not write into a temporary folder: it would warn
    user = ["-o", "APT::Sandbox::User=root"]
    subprocess.run(["apt-get", *user, "download", *packages], cwd=folder, check=True, capture_output=True, text=True)
    for file in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", file.name, "."], cwd=folder, check=True, capture_output=True, text=True)


def split(unpacked: Path, folder: Path) -> dict[str, int]:
    """Move clips to ``folder``/train/<language> and ``folder``/test/<language>; returns how many there are in each.

    A prompt is in the same part in all languages, and so are those of one name in several folders ('dollars').
    """
    counts = {"train": 0, "test": 0}
    for voice in sorted((unpacked / "usr/share/asterisk/sounds").iterdir()):
        for file in sorted(voice.rglob("*.wav")):
            inside = file.relative_to(voice)
            if inside.parts[0] == "silence" or file.stem in NO_SPEECH or file.stat().st_size < SMALLEST:
                continue
            part = "test" if zlib.crc32(file.stem.encode()) % TEST == 0 else "train"
            target = folder / part / LANGUAGES[voice.name[:2]] / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
            counts[part] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
