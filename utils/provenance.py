"""What a run was made with: versions, git revision, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "torchvision", "numpy", "pydvl", "scikit-learn", "zarr")


def provenance() -> dict[str, object]:
    """Versions of Python and the packages that shape the numbers, and this checkout's revision."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"versions": versions, "git_revision": git_revision(), "machine": platform.machine()}


def git_revision() -> str | None:
    """The commit of the code that runs, with '+' where files differ from it; None without git, and where the code is
    installed, though that may be inside somebody's repository."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
