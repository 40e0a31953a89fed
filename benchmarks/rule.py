"""Does the rule that picks a run's execution pick well? (``--engine auto``; ``workers/tuning.py``)

    python -m benchmarks.rule            a table: what the rule takes, against the fastest of all candidates
    python -m benchmarks.rule --quick

Every candidate trains the same fleet on a ring, gossip included; they take turns in one run, and ratios are
medians over the turns. The rule reads shapes and never a clock, so on another kind of machine it may be
wrong: this command tells by how much.

Legend: N workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; the measuring processes inherit it

import torch

from benchmarks.common import Probe, line, machine, median_ratio, take_turns
from benchmarks.training_probes import IMAGE_SHAPES, Setting, automatic, build_model, fleet_rounds
from utils.records import write_json
from workers.tuning import splits

WORKERS = (1, 4, 8, 64)
PARTS_GAIN = 1.3  # that cutting batches, where the rule does so, is worth with one worker on two cores
GOOD = 0.8  # of the fastest candidate: what lies above is within what single runs differ by
WIDTHS = (12, 5, 24, 24, 10)


def candidates(model: str, device: str, num_workers: int, threads: int) -> list[Setting]:
    """All executions that a run with this model may have: with fewer workers than threads, batches in parts too."""
    convolutions = any(p.dim() == 4 for p in build_model(model).parameters())
    engines = ["graph", "loop"] if device != "cpu" else ["threads"]
    settings = [Setting(model, device, engine, layout) for engine in engines for layout in ({convolutions, False})]
    parts = threads // num_workers
    if device == "cpu" and parts > 1 and splits(build_model(model)):
        settings += [dataclasses.replace(s, parts=parts) for s in settings]
    return settings if convolutions else [*settings, Setting(model, device, "vmap")]


def measure(model: str, num_workers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Node-steps a second of each candidate, and how the rule's choice compares with the fastest."""
    settings = candidates(model, args.device, num_workers, args.threads)
    with Probe(automatic, Setting(model, args.device), num_workers, args.threads) as probe:
        chosen = name_of(probe())
    probes = {name_of(s): Probe(fleet_rounds, s, num_workers, args.threads) for s in settings}
    try:
        for probe in probes.values():
            probe.wait()
        sides = {name: lambda p=probe: p(args.seconds / args.repeats)["rate"] for name, probe in probes.items()}
        turns = take_turns(sides, args.repeats)
    finally:
        for probe in probes.values():
            probe.close()
    fastest = max(turns, key=lambda name: statistics.median(turns[name]))
    whole = chosen.removesuffix(f" {args.threads // num_workers} parts")
    return {
        "model": model,
        "workers": num_workers,
        "rule": chosen,
        "fastest": fastest,
        "ratio": median_ratio(turns[chosen], turns[fastest]),
        "parts_gain": median_ratio(turns[chosen], turns[whole]) if whole != chosen else None,
        "rates": {name: statistics.median(values) for name, values in turns.items()},
    }


def name_of(setting: Setting) -> str:
    """An execution, for people."""
    return f"{setting.engine} {setting.layout}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rule", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:K (default: cpu)")
    parser.add_argument("--models", nargs="+", default=list(IMAGE_SHAPES), choices=list(IMAGE_SHAPES))
    parser.add_argument("--workers", nargs="+", type=int, default=list(WORKERS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--seconds", type=float, default=2.0, help="that each candidate is timed (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="turns that they are split into (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one small fleet, a fraction of a second each")
    parser.add_argument("--out", default="results/benchmarks/rule.json", help="JSON file to write")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.workers, args.seconds, args.repeats = ["mlp", "cnn"], [4], 0.2, 2
    rows = []
    print(line(["model", "N", "the rule takes", "the fastest is", "ratio"], WIDTHS))
    for model in args.models:
        for num_workers in args.workers:
            row = measure(model, num_workers, args)
            rows.append(row)
            print(
                line([model, num_workers, row["rule"], row["fastest"], f"{row['ratio']:.2f}"], WIDTHS), flush=True
            )
    poor = [row for row in rows if row["ratio"] < GOOD]
    print(f"\n{len(rows) - len(poor)} of {len(rows)} choices reach {GOOD} of the fastest")
    for row in rows:
        if row["parts_gain"] is not None:
            verdict = "ok" if row["parts_gain"] >= PARTS_GAIN else "missed"
            print(f"{verdict}: {row['model']} N={row['workers']}, parts are {row['parts_gain']:.2f} x whole batches")
    write_json(args.out, {"machine": machine(torch.device(args.device)), "rows": rows})
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
