"""What does a network in two stages on two processes gain over the whole one on one thread?

    python -m benchmarks.split                 a table: samples a second, memory, waiting, for each schedule
    python -m benchmarks.split --quick

Sides take turns, ratios are medians over the turns. The bound is M sum / ((M - 1) max + sum) of the stages'
multiplications, which is S (1 - bubble) where they are equal; 'formula' is bubble = (S - 1) / (S - 1 + M), 'waits' the
share of a step that a stage is in no forward or backward pass, 'memory' what a process holds at most above what it
holds after its imports, the larger one of two.

Legend: S stages, M microbatches.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; the measuring processes inherit it

import torch

from benchmarks.common import Probe, Stopwatch, line, machine, median_ratio, peak_memory, take_turns, together
from data.batches import Batches, Samples
from networks import load_model
from training.split import bubble, speedup
from utils.records import write_json
from workers import distributed
from workers.engine import Engine
from workers.optimizers import SGD
from workers.row_layout import RowLayout
from workers.stages import cut
from workers.worker_vision import Fleet

SHAPE = (3, 32, 32)
STAGES = 2
LR = 0.01
WIDTHS = (12, 6, 4, 11, 7, 7, 7, 9, 11, 9)
HEADS = ("model", "sched.", "M", "samples/s", "ratio", "bound", "waits", "formula", "memory MiB", "share")


def build(
    name: str, batch: int, threads: int, schedule: str, parts: int, rank: int = 0, port: int = 0
) -> Callable[[int], dict[str, float]]:
    """One worker that trains the network, whole on so many threads, or (``schedule``) the stage of a process; a
    function of the steps to make."""
    if schedule:
        from torch.distributed.pipelining import PipelineStage

        from workers.pipeline import PipelineFleet
    before = peak_memory(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * batch, *SHAPE), dtype=torch.uint8, generator=generator)
    half_C = torch.full((3,), 0.5)
    samples = Samples(images, torch.arange(4 * batch) % 10, half_C, half_C, channels_last=True)
    batches, device = Batches([torch.arange(4 * batch)], batch, 0), torch.device("cpu")
    engine = Engine.on(device, load_model(name, 10, SHAPE, seed=0), "threads", threads, True, parts=parts)
    rows = engine.rows([engine.model], torch.float32), samples, batches
    watch = Stopwatch(device)
    if schedule:
        places = {"RANK": rank, "WORLD_SIZE": STAGES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in places.items()}
        distributed.join(device)
        for method in ("forward_one_chunk", "backward_one_chunk"):
            setattr(PipelineStage, method, timed(getattr(PipelineStage, method), watch))
        stages = cut(engine.model, engine.layout, SHAPE, STAGES)
        fleet: Fleet = PipelineFleet(engine, *rows, optimizer=SGD(0.9), stages=stages, schedule=schedule)
    else:
        fleet = Fleet(engine, *rows, optimizer=SGD(0.9))
    done = 0

    def measure(steps: int) -> dict[str, float]:
        nonlocal done
        busy, start = watch.seconds(), time.perf_counter()
        for _ in range(steps):
            fleet.step(torch.tensor([done]), LR)
            done += 1
        elapsed = time.perf_counter() - start
        return {
            "rate": steps * batch / elapsed,
            "waits": 1 - (watch.seconds() - busy) / elapsed,
            "memory": peak_memory(device) - before,
        }

    measure(2)
    return measure


def timed(method: Callable, watch: Stopwatch) -> Callable:
    """A method, its seconds counted."""

    def run(*arguments: Any, **options: Any) -> Any:
        with watch:
            return method(*arguments, **options)

    return run


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rows_of(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for the whole network on one and on two threads, and for each schedule."""
    settings = [("1 thr.", 1), ("2 thr.", 1), *((s, m) for s in ("gpipe", "1f1b") for m in args.microbatches)]
    settings = [(s, m) for s, m in settings if s != "1f1b" or m >= STAGES]
    probes: dict[tuple[str, int], list[Probe]] = {}
    try:
        for schedule, parts in settings:
            if schedule.endswith("thr."):
                threads = int(schedule[0])
                probes[schedule, parts] = [Probe(build, name, args.batch_size, threads, "", threads)]
            else:
                port = free_port()
                probes[schedule, parts] = [
                    Probe(build, name, args.batch_size, 1, schedule, parts, rank, port) for rank in range(STAGES)
                ]
            for probe in probes[schedule, parts]:
                probe.wait()
        sides = {setting: lambda p=several: together(p, args.steps) for setting, several in probes.items()}
        turns = take_turns(sides, args.repeats)
    finally:
        for several in probes.values():
            for probe in several:
                probe.close()
    rates = {setting: [min(p["rate"] for p in turn) for turn in turns[setting]] for setting in settings}
    memory = {setting: max(p["memory"] for turn in turns[setting] for p in turn) for setting in settings}
    whole, model = settings[0], load_model(name, 10, SHAPE, seed=0)
    costs = [stage.products for stage in cut(model, RowLayout(model), SHAPE, STAGES)]
    rows = []
    for setting in settings:
        schedule, parts = setting
        split = not schedule.endswith("thr.")
        rows.append({
            "model": name, "schedule": schedule, "microbatches": parts,
            "rate": statistics.median(rates[setting]),
            "ratio": median_ratio(rates[setting], rates[whole]),
            "bound": speedup(costs, parts) if split else None,
            "waits": statistics.median(p["waits"] for turn in turns[setting] for p in turn) if split else None,
            "bubble": bubble(STAGES, parts) if split else None,
            "memory": memory[setting],
            "memory_share": memory[setting] / memory[whole],
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The table; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cnn", "resnet18", "mlp_deep"])
    parser.add_argument("--microbatches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--quick", action="store_true", help="the CNN, few steps")
    parser.add_argument("--json", help="a file for the figures")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.microbatches, args.steps, args.repeats = ["cnn"], [1, 4], 3, 3
    print(line(HEADS, WIDTHS))
    rows = []
    for name in args.models:
        for row in rows_of(name, args):
            rows.append(row)
            texts = [row["model"], row["schedule"], row["microbatches"], f"{row['rate']:.0f}", f"{row['ratio']:.2f}"]
            texts += [None if row[key] is None else f"{row[key]:.2f}" for key in ("bound", "waits", "bubble")]
            print(line([*texts, f"{row['memory']:.0f}", f"{row['memory_share']:.2f}"], WIDTHS), flush=True)
    if args.json:
        write_json(args.json, {"machine": machine(torch.device("cpu")), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
