"""The whole command against bare loops: that it is stopped while they run, and one small run."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.training import main
from benchmarks.whole import timed


def test_a_command_is_stopped_while_the_bare_loops_run(tmp_path):
    pid_file, states = tmp_path / "pid", []

    def bare_rate() -> float:
        if pid_file.exists() and pid_file.read_text():
            stat = Path(f"/proc/{pid_file.read_text().strip()}/stat")
            deadline = time.monotonic() + 800
            while True:  # a signal takes a moment
                states.append(stat.read_text().split()[2] if stat.exists() else "ended")
                if states[-1] in ("T", "Z", "ended") or time.monotonic() > deadline:
                    break
        return 1.0

    script = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(2)"
    stretches, rates = timed([sys.executable, "-c", script], dict(os.environ), bare_rate, 0.3)
    assert len(rates) == len(stretches) + 1 > 2
    assert "T" in states and all(seconds > 0 for seconds in stretches)


def test_a_command_that_fails_says_why():
    with pytest.raises(RuntimeError, match="code 3:\nwrong$"):
        timed([sys.executable, "-c", "import sys; sys.stderr.write('wrong'); sys.exit(3)"], {}, lambda: 1.0, 60.0)


@pytest.mark.slow
def test_the_whole_command_is_measured(tmp_path, capsys):
    out = tmp_path / "whole.json"
    assert main(["--whole", "--quick", "--threads", "1", "--out", str(out)]) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert row["node_steps"] > 0 and row["evaluations"] >= 2
    assert row["ratio"] > 0 and row["processor_ratio"] > 0
    assert "of bare loops in the same layout" in capsys.readouterr().out


def test_the_whole_command_is_of_networks_for_pictures(capsys):
    assert main(["--whole", "--models", "mlp"]) == 2 and "--whole" in capsys.readouterr().err
