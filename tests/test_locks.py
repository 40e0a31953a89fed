"""A folder is one process's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import arguments, metrics, refused, train

import main
import main_pruned
from utils.lock import locked

ROOT = Path(main.__file__).parent
SLOW_RUN = ("--epochs", "400", "--checkpoint_every", "10")


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """main.py in a process of its own, running once it has a checkpoint."""
    words = [sys.executable, str(ROOT / "main.py"), *arguments(folder, *SLOW_RUN, *flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 800
    while not list(folder.glob("run/**/round-*.safetensors")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_folder_is_one_process_own(tmp_path, capsys):
    process = start(tmp_path)
    try:
        os.kill(process.pid, signal.SIGSTOP)  # it must be there for all of the tries
        for flags in ((), ("--resume",), ("--overwrite",), ("--seed", "1"), ("--seeds", "2")):
            line = refused(capsys, main.main(arguments(tmp_path, *SLOW_RUN, *flags)))
            assert f"process {process.pid} " in line and "--run_name" in line
        line = refused(capsys, main_pruned.main(arguments(tmp_path, *SLOW_RUN, "--resume")))
        assert f"process {process.pid} " in line
    finally:
        process.kill()
        process.wait()
    # kill -9 frees the folder at once, although the lock file is still there
    assert (tmp_path / "run" / ".lock").exists()
    flags = ("--epochs", "400", "--checkpoint_every", "10", "--resume")
    run_dir = train(tmp_path, *flags)
    whole = train(tmp_path, *flags, name="whole")
    assert metrics(run_dir) == metrics(whole)
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_is_free_again_after_its_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "run"), pytest.raises(ValueError, match="in use by process"):
            with locked(tmp_path / "run"):
                pass
    assert not (tmp_path / "run").exists()


def test_what_is_refused_leaves_no_folder(tmp_path, capsys):
    refused(capsys, main.main(arguments(tmp_path, "--num_workers", "300")))
    assert list(tmp_path.iterdir()) == []


def test_processes_that_fight_for_a_lock(tmp_path):
    """Never two at a time inside, whoever removes the file of the lock when."""
    script = tmp_path / "fight.py"
    script.write_text(
        "import sys, os\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.lock import locked\n"
        "inside, won = Path(sys.argv[1]) / 'inside', 0\n"
        "while won < 100:\n"
        "    try:\n"
        "        with locked(Path(sys.argv[1]) / 'run'):\n"
        "            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))\n"
        "            won += 1\n"
        "            inside.unlink()\n"
        "    except ValueError:\n"
        "        pass\n"
    )
    words = [sys.executable, str(script), str(tmp_path)]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=800) for process in processes]
    assert answers == [("", "")] * 3
