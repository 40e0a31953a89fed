"""A whole command against bare loops: what start, data, evaluation, checkpoints and plots cost a user.

``python -m benchmarks.training --whole`` trains with ``main.py`` as a user does, on pictures that it writes, and
compares the command's time with what a bare PyTorch process a core would take for the same steps in the same layout.
Every half minute the command is stopped and the bare loops are timed, so that both sides see the same machine.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import Probe, together
from benchmarks.training_probes import BATCH, Setting, bare_loop

ROOT = Path(__file__).parent.parent
BAR = 0.95  # of the bare loops' time
CLASSES, SIDE, VALIDATION = 10, 32, 0.1


@dataclass(frozen=True)
class Size:
    """How large the comparison is: minutes that bare loops would take; workers; pictures to train on and to test on;
    seconds of the command between two turns of the bare loops, and of such a turn."""

    minutes: float = 5.0
    workers: int = 16
    train: int = 20_000
    test: int = 4_000
    between: float = 30.0
    turn: float = 4.0


QUICK = Size(minutes=0.05, workers=2, train=400, test=100, between=5.0, turn=0.3)


def write_pictures(folder: Path, size: Size) -> None:
    """A data set of random pictures: nobody learns from it, but it costs what pictures cost."""
    rng = np.random.default_rng(0)
    for split, count in (("train", size.train), ("test", size.test)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(256, size=(SIDE // 4, SIDE // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(folder / split / f"class{i % CLASSES}" / f"{i}.png")


def measure_whole(model: str, size: Size, threads: int, amp: bool = False) -> dict[str, Any]:
    """Time ``main.py``. ``ratio``: the time of bare loops for its steps over the command's, 1 where the command is as
    fast as they are; each stretch of the command counts with the rate of the loops before and after it.
    ``processor_ratio``: the same in processor time, which tells more where other programs run."""
    setting = Setting(model, "cpu", channels_last=True, amp=amp)
    probes = [Probe(bare_loop, setting) for _ in range(threads)]
    bare_seconds: list[float] = []

    def bare_rate() -> float:
        answers = together(probes, size.turn)
        bare_seconds.extend(answer["processor_seconds"] for answer in answers)
        return sum(answer["rate"] for answer in answers)

    try:
        rate = bare_rate()
        epochs = max(1, round(size.minutes * 60 * rate * BATCH / ((1 - VALIDATION) * size.train)))
        with tempfile.TemporaryDirectory() as scratch:
            write_pictures(Path(scratch, "pictures"), size)
            command = [
                sys.executable, str(ROOT / "main.py"), "--dataset_name", "imagefolder", "--dataset_path",
                f"{scratch}/pictures", "--model", model, "--num_workers", str(size.workers), "--epochs", str(epochs),
                "--val_fraction", str(VALIDATION), "--threads", str(threads), "--results_dir", f"{scratch}/results",
                "--run_name", "whole", *(["--amp"] if amp else []),
            ]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "DECENTRALIZED_CACHE": f"{scratch}/cache"}
            before = processor_seconds()
            stretches, rates = timed(command, environment, bare_rate, size.between)
            own_seconds = processor_seconds() - before
            run = Path(scratch, "results", "whole", "stage1")
            summary = json.loads((run / "summary.json").read_text())
            evaluations = len((run / "metrics.jsonl").read_text().splitlines())
    finally:
        for probe in probes:
            probe.close()
    steps = summary["rounds"] * size.workers
    means = [(before + after) / 2 for before, after in zip(rates[:-1], rates[1:], strict=True)]
    bare_steps = sum(seconds * mean for seconds, mean in zip(stretches, means, strict=True))
    return {
        "model": model,
        "amp": amp,
        "workers": size.workers,
        "epochs": epochs,
        "node_steps": steps,
        "seconds": sum(stretches),
        "ratio": steps / bare_steps,
        "processor_ratio": steps * statistics.median(bare_seconds) / own_seconds,
        "evaluations": evaluations,
        "stretches": stretches,
        "bare_rates": rates,
    }


def processor_seconds() -> float:
    """Of the processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def timed(
    command: list[str], environment: dict[str, str], bare_rate: Callable[[], float], between: float
) -> tuple[list[float], list[float]]:
    """Seconds of each stretch that the command ran, and the bare loops' rate before the first, between them (the
    command is stopped meanwhile), and after the last. RuntimeError where the command fails."""
    stretches, rates = [], [bare_rate()]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            while process.poll() is None:
                start = time.perf_counter()
                try:
                    process.wait(between)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGSTOP)
                stretches.append(time.perf_counter() - start)
                rates.append(bare_rate())
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGCONT)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"main.py ended with code {process.returncode}:\n{errors.read().decode()[-2000:]}")
    return stretches, rates


def describe_whole(row: dict[str, Any]) -> str:
    """A measurement beside its bar, as one line."""
    verdict = "ok" if row["ratio"] >= BAR else "missed"
    return (
        f"{verdict:6}  {row['model']}{' bf16' if row['amp'] else ''}: main.py, {row['epochs']} epochs with "
        f"{row['workers']} workers and {row['evaluations']} evaluations, took {row['seconds']:.0f} s, "
        f"{row['ratio']:.2f} >= {BAR} of bare loops in the same layout ({row['processor_ratio']:.2f} in processor time)"
    )
