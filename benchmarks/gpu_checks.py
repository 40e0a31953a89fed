"""The checks of ``benchmarks.gpu``, in the order in which they run.

A check is a function of a :class:`Task` that yields its figures one by one, so that those it has are kept when it
fails. What touches the GPU runs in processes of its own (common.Probe, or main.py itself): an error that poisons
CUDA ends with them.

Legend: N workers, D floats a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch

from benchmarks.bars import CERTIFICATE
from benchmarks.common import MIB, Probe, median_ratio, take_turns
from benchmarks.gpu_probes import (
    DATA,
    agreement,
    bytes_moved,
    cascade_scores,
    command_times,
    gossip_times,
    synchronizations,
)
from benchmarks.influence_probes import Case, scored_run
from benchmarks.training import measure_row
from benchmarks.training_probes import BATCH, Setting, bare_loop, build_model, fleet_rounds
from utils.records import read_metrics
from workers.row_layout import RowLayout
from workers.step_graph import GRAPHED_ROWS

PROJECT = Path(__file__).parent.parent
Figures = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """What a check gets: the device, whether sizes are small, an empty folder, and when it must be done
    (``time.monotonic()``)."""

    device: str
    quick: bool
    folder: Path
    deadline: float

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def speed_claim(self, name: str) -> str | None:
        """The name of a claim on time or memory, which small sizes, or a CPU, need not meet."""
        return name if self.on_gpu and not self.quick else None

    @property
    def turns(self) -> tuple[float, int]:
        """Seconds that each side is measured, and turns that they are split into."""
        return (0.2, 2) if self.quick else (5.0, 5)

    def seconds_left(self) -> float:
        """Until the check must be done."""
        return max(0.1, self.deadline - time.monotonic())


@dataclass(frozen=True)
class Check:
    """``measure(task)`` yields figures. ``seconds``: what it may take before it is ended. ``on_cpu``: whether it has
    something to say without a GPU (then only that the command works)."""

    name: str
    measure: Callable[[Task], Figures]
    seconds: float
    on_cpu: bool = False


def figure(what: str, value: float, claim: str | None = None, **details: Any) -> dict[str, Any]:
    """A figure, held against the claim of that name in ``bars.CERTIFICATE`` (None: it is only reported)."""
    bound, at_most = CERTIFICATE[claim] if claim else (None, True)
    ok = bound is None or (value <= bound if at_most else value >= bound)
    return {"what": what, "value": value, "bound": bound, "at_most": at_most, "ok": bool(ok), **details}


# ---- 1. correctness ------------------------------------------------------------------------------------------


def correctness(task: Task, network: str) -> Figures:
    """Engines against the loop, and the GPU's loop against the CPU's, in float64; again after eight fleets."""
    with Probe(agreement, network, task.device) as probe:
        for moment in ("at first", "after eight fleets"):
            kinds = DATA[:1] if task.quick and moment != "at first" else DATA
            answers = {data: probe(data) for data in kinds}
            for pair in answers["plain"]:
                yield pair_figure(f"{pair}, {moment}", {d: a[pair] for d, a in answers.items() if pair in a})
            if moment == "at first":
                answer = probe("fleets")
                yield figure("MiB that a destroyed fleet leaves", answer["left_mib"], "left" if task.on_gpu else None)
                yield pair_figure("graph that outlived eight fleets = loop", {"plain": answer["living"]})


def pair_figure(what: str, answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The worst distance of a pair over the kinds of data (one that is no number is the worst of all)."""
    worst = torch.tensor([a["distance"] for a in answers.values()], dtype=torch.float64).max().item()
    same = [data for data, answer in answers.items() if answer["same_bits"]]
    return figure(what, worst, "distance", data=list(answers), same_bits=same)


# ---- 2. synchronizations -------------------------------------------------------------------------------------


def waiting(task: Task) -> Figures:
    """How often a step, and a round as the trainer runs it, make the CPU wait for the GPU."""
    for model, engine in (("cnn", "loop"), ("cnn", "graph"), ("mlp", "vmap")):
        with Probe(synchronizations, model, engine, task.device) as probe:
            for what in ("step", "step, all options", "round"):
                where = probe(what)
                lines = "".join(f"; {place} x {count}" for place, count in where.items())
                yield figure(f"waits in a {what} ({model}, {engine}){lines}", sum(where.values()), "waits", where=where)


# ---- 3. speed ------------------------------------------------------------------------------------------------


def against_one_model(task: Task, amp: bool) -> Figures:
    """16 ResNet18 against one at 16 times the batch; channels_last, as runs have it."""
    N = 2 if task.quick else 16
    setting = Setting("resnet18", task.device, "graph", channels_last=True, amp=amp)
    with Probe(bare_loop, setting.bare(), 1, BATCH * N) as joint:
        row = measure_row(setting, N, 1, {"limit": [joint]}, *task.turns)
    what = f"{N} ResNet18 over one at batch {BATCH * N}, {setting.layout}"
    yield figure(what, row["ratio_limit"], task.speed_claim("one_model"), row=row)


def graph_over_loop(task: Task) -> Figures:
    """What recording the steps gains for the CNN."""
    N = 4 if task.quick else 16
    graph = Setting("cnn", task.device, "graph", channels_last=True)
    with Probe(fleet_rounds, dataclasses.replace(graph, engine="loop"), N, 1) as loop:
        row = measure_row(graph, N, 1, {"loop": [loop]}, *task.turns)
    yield figure(f"graph over loop, {N} CNN workers", row["ratio_loop"], task.speed_claim("graph"), row=row)


def thousand(task: Task) -> Figures:
    """The largest fleet of one graph, and one of two: rate and memory. A worker's memory is what so many more take:
    the workspaces of the streams are there once."""
    sizes, peaks = (8, 16) if task.quick else (GRAPHED_ROWS, 1024), []
    for N in sizes:
        setting = Setting("cnn", task.device, "graph", channels_last=True)
        with Probe(fleet_rounds, setting, N, 1) as fleet:
            answer = fleet(task.turns[0])
        yield figure(f"node-steps a second of {N} CNN workers", answer["rate"], peak_mib=answer["peak_memory"])
        peaks.append(answer["peak_memory"] * MIB / 4 / RowLayout(build_model("cnn")).D)
    rows = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    yield figure(f"rows of memory a CNN worker, {sizes[0]} to {sizes[1]}", rows, task.speed_claim("rows"))


def gossip_bandwidth(task: Task) -> Figures:
    """A gossip's time in plain copies of the matrix, by graph; and the bytes that it must move, by second."""
    modes = ("copy", "ring", "exponential", "all")
    seconds, repeats = task.turns
    for model, N in (("mlp", 8),) if task.quick else (("cnn", 256), ("resnet18", 16)):
        row_bytes = 4 * RowLayout(build_model(model)).D
        with Probe(gossip_times, Setting(model, task.device, "loop"), N) as probe:
            sides = {mode: partial(probe, mode, seconds / repeats / len(modes)) for mode in modes}
            turns = take_turns(sides, repeats, enough=seconds)
        moved = {mode: bytes_moved(mode, N, row_bytes) for mode in modes}
        for mode in modes[1:]:
            yield figure(
                f"copies that a gossip takes, {mode} of {N} {model}, {moved[mode] / moved['copy']:.1f} by its bytes",
                median_ratio(turns[mode], turns["copy"]),
                microseconds=1e6 * median(turns[mode]),
                gb_per_second=1e-9 * moved[mode] / median(turns[mode]),
                copy_gb_per_second=1e-9 * moved["copy"] / median(turns["copy"]),
            )


# ---- 4. the command ------------------------------------------------------------------------------------------


def busy_share(task: Task) -> Figures:
    """The share of main.py's time in which the GPU is at work: kernels' time from a profiled run, over the time of
    runs without the profiler, which slows the CPU's part."""
    flags = ["--model", "cnn", "--num_workers", "16", "--batch_size", "16", "--min_shard", "5", "--no-plots", "--quiet"]
    flags += ["--epochs", "2" if task.quick else "10", "--device", task.device, "--results_dir", str(task.folder)]
    with Probe(command_times, flags) as probe:
        probe("first", False)  # pays for libraries and their choice of kernels
        plain = [probe(f"plain-{i}", False) for i in range(3)]
        profiled = probe("profiled", True)
    for part in ("training", "command"):
        share = profiled["busy"] / median(answer[part] for answer in plain)
        yield figure(f"share of main.py's {part} in which the GPU works", share, plain=plain, profiled=profiled)


# ---- 5. scores -----------------------------------------------------------------------------------------------


def scoring(task: Task) -> Figures:
    """The scores of ``cascade`` against the CPU's, then what they cost."""
    yield from scores_agree(task)
    images, samples = ("digits", 96) if task.quick else ("3x32x32", 768)
    case = Case("cnn", images, 4 if task.quick else 8, 32, samples, 2 if task.quick else 10, 0.1, "threads", True)
    parts = ("training", "pass", "cascade")
    with Probe(scored_run, case, 1, 0.1, task.device, parts) as probe:
        sizes = probe()
        sides = {part: partial(probe, part) for part in parts}
        turns = take_turns(sides, task.turns[1], enough=task.seconds_left() / 2, at_least=2)
    seconds = {part: [answer["seconds"] for answer in answers] for part, answers in turns.items()}
    ratio = median_ratio(seconds["cascade"], seconds["training"])
    yield figure("scoring over training", ratio, task.speed_claim("scoring"), sizes=sizes, seconds=seconds)
    steps = [case.epochs * one for one in seconds["pass"]]
    yield figure("scoring over training's steps, once recorded", median_ratio(seconds["cascade"], steps))


def scores_agree(task: Task) -> Figures:
    """The same scores from the CPU, in float64, with plain steps and recorded ones ('threads', on a CPU)."""
    cases = {e: Case("cnn", "digits", 4, 16, 192, 2, 0.05, e, False, "float64") for e in ("loop", "threads")}
    with Probe(cascade_scores, cases["loop"], "cpu") as probe:
        reference = torch.tensor(probe(), dtype=torch.float64)
    for engine, case in cases.items():
        with Probe(cascade_scores, case, task.device) as probe:
            scores = torch.tensor(probe(), dtype=torch.float64)
        worst = ((scores - reference).abs().max() / reference.abs().max()).item()
        name = "graph" if engine == "threads" and task.on_gpu else engine
        yield figure(f"cascade on {task.device} ({name}) = on the CPU", worst, "scores")


# ---- 6. kill and resume --------------------------------------------------------------------------------------


def kill_and_resume(task: Task) -> Figures:
    """A deterministic run killed by SIGKILL after a checkpoint and resumed, against an undisturbed one."""
    epochs = "12" if task.quick else "40"
    flags = ["--model", "cnn", "--num_workers", "4", "--max_train", "300", "--epochs", epochs, "--checkpoint_every"]
    flags += ["4", "--deterministic", "--device", task.device, "--no-plots", "--quiet", "--results_dir"]
    command = [sys.executable, "main.py", *flags, str(task.folder), "--run_name"]
    whole, killed = (task.folder / name / "stage1" for name in ("whole", "killed"))
    finish(task, [*command, "whole"])
    with started([*command, "killed"]) as process:
        while not list(killed.glob("checkpoints/*.safetensors")) and process.poll() is None:
            if time.monotonic() > task.deadline:
                raise RuntimeError("no checkpoint in time")
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if process.returncode != -signal.SIGKILL or (killed / "summary.json").exists():
        raise RuntimeError(f"the run ended before it could be killed (code {process.returncode})")
    finish(task, [*command, "killed", "--resume"])
    last = max(whole.glob("checkpoints/*.safetensors")).relative_to(whole)
    compared = (str(last), "model.safetensors")
    different = [name for name in compared if not same_tensors(whole / name, killed / name)]
    if timeless(whole) != timeless(killed):
        different.append("metrics.jsonl")
    yield figure("files that differ after kill -9 and --resume", len(different), "resume", different=different)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """The command as a process, which ends with the block."""
    process = subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(task: Task, command: list[str]) -> None:
    """Run to the end. Raises RuntimeError with the last line of what it says where it fails."""
    with started(command) as process:
        errors = process.communicate(timeout=task.seconds_left())[1]
    if process.returncode != 0:
        raise RuntimeError(f"main.py ended with code {process.returncode}: {reason(errors)}")


def reason(text: str) -> str:
    """What went wrong, as one line: the first after a traceback (CUDA's errors go on with advice), else the last."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    indented = [i for i, line in enumerate(lines) if line.startswith("  ")]
    after = lines[indented[-1] + 1 :] if indented else lines[-1:]
    return after[0] if after else "it said nothing"


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two files hold the same tensors, to the bit; one that is missing does not."""
    if not (a.exists() and b.exists()):
        return False
    one, other = safetensors.torch.load_file(a), safetensors.torch.load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without the wall clock."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run_dir)]


CHECKS = [
    Check("correctness-mlp", partial(correctness, network="mlp"), 120, on_cpu=True),
    Check("correctness-cnn", partial(correctness, network="cnn"), 120, on_cpu=True),
    Check("correctness-batchnorm", partial(correctness, network="batchnorm"), 120, on_cpu=True),
    Check("synchronizations", waiting, 60),
    Check("speed-resnet18", partial(against_one_model, amp=False), 75),
    Check("speed-resnet18-bf16", partial(against_one_model, amp=True), 75),
    Check("speed-cnn", graph_over_loop, 60, on_cpu=True),
    Check("speed-thousand", thousand, 120, on_cpu=True),
    Check("speed-gossip", gossip_bandwidth, 60, on_cpu=True),
    Check("busy", busy_share, 75),
    Check("cascade", scoring, 120, on_cpu=True),
    Check("resume", kill_and_resume, 120, on_cpu=True),
]
