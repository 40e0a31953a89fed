"""How long k-nearest-neighbour Shapley values take, and how much memory, beside a loop over points.

    python -m benchmarks.knn_shapley                     84,000 training x 600 test samples, 1,024 features, 8 findings
    python -m benchmarks.knn_shapley --quick

The loop does for every test sample and finding what the recursion of Jia et al. says, one training sample after the
other in Python: distances, a sort, the recursion. It is timed on a few test samples with all findings and counted for
all of them. Both sides compute the same values to rounding (a test); each has a process of its own, and they take
turns. The loop's recursion alone, as if distances and order cost it nothing, is given too.

Legend: n training samples, m test samples, F features, L findings.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; the measuring processes inherit it

import numpy as np
import torch

from benchmarks.common import Probe, line, machine, median_ratio, peak_memory, take_turns
from utils.records import write_json
from valuation.knn_shapley import knn_shapley

SECONDS, GIB, RATIO = 60.0, 4.0, 100.0  # the bars, for the sizes that are the defaults
WIDTHS = (34, 12)
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_data(n: int, m: int, F: int, L: int) -> Data:
    """Features of training and test samples that are independent of their findings, each there in a third of them."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (n, m):
        features = torch.randn(count, F, generator=generator)
        parts += [features, (torch.rand(count, L, generator=generator) < 1 / 3).to(torch.uint8)]
    return tuple(parts)


def blocks(sizes: Sequence[int], k: int, threads: int) -> Callable[[], dict[str, float]]:
    """This project's values: seconds, and MiB that the process has held at most, its data included."""
    train_nF, train_nL, test_mF, test_mL = random_data(*sizes)

    def measure() -> dict[str, float]:
        start = time.perf_counter()
        knn_shapley(train_nF, train_nL, test_mF, test_mL, k, threads=threads)
        return {"seconds": time.perf_counter() - start, "mib": peak_memory(torch.device("cpu"))}

    return measure


def loop(sizes: Sequence[int], k: int, points: int) -> Callable[[], dict[str, float]]:
    """The loop over the first ``points`` test samples: seconds for all test samples, and those of its recursions."""
    train_nF, train_nL, test_mF, test_mL = (part.numpy() for part in random_data(*sizes))
    m, L = test_mL.shape
    points = min(points, m)

    def measure() -> dict[str, float]:
        recursion, start = 0.0, time.perf_counter()
        for test in range(points):
            for finding in range(L):
                label = test_mL[test, finding]
                order_n = order(train_nF, test_mF[test])
                before = time.perf_counter()
                recursive_values(order_n, train_nL[:, finding], label, k)
                recursion += time.perf_counter() - before
        return {"seconds": (time.perf_counter() - start) * m / points, "recursion": recursion * m / points}

    return measure


def order(train_nF: np.ndarray, test_F: np.ndarray) -> np.ndarray:
    """The training samples, nearest first."""
    return np.argsort(((train_nF - test_F) ** 2).sum(1), kind="stable")


def recursive_values(order_n: np.ndarray, labels_n: np.ndarray, label: int, k: int) -> np.ndarray:
    """Theorem 1 of Jia et al., sample by sample."""
    n = len(order_n)
    values_n = np.zeros(n)
    farther = order_n[-1]
    values_n[farther] = float(labels_n[farther] == label) / max(k, n)
    for i in range(n - 1, 0, -1):
        nearer = order_n[i - 1]
        change = int(labels_n[nearer] == label) - int(labels_n[farther] == label)
        values_n[nearer] = values_n[farther] + change / max(k, i)
        farther = nearer
    return values_n


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over turns, and the ratios within turns."""
    sizes = args.train, args.test, args.features, args.findings
    with Probe(blocks, sizes, args.k, args.threads) as ours, Probe(loop, sizes, args.k, args.points) as theirs:
        for probe in (ours, theirs):
            probe.wait()
        turns = take_turns({"blocks": ours, "loop": theirs}, args.repeats)
    seconds = {name: [turn["seconds"] for turn in side] for name, side in turns.items()}
    recursion = [turn["recursion"] for turn in turns["loop"]]
    return {
        "seconds": statistics.median(seconds["blocks"]),
        "slowest": max(seconds["blocks"]),
        "gib": max(turn["mib"] for turn in turns["blocks"]) / 1024,
        "loop_seconds": statistics.median(seconds["loop"]),
        "ratio": median_ratio(seconds["loop"], seconds["blocks"]),
        "ratio_recursion": median_ratio(recursion, seconds["blocks"]),
        "turns": turns,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.knn_shapley", description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", type=int, default=84_000, help="training samples (default: 84000)")
    parser.add_argument("--test", type=int, default=600, help="test samples (default: 600)")
    parser.add_argument("--features", type=int, default=1024, help="default: 1024")
    parser.add_argument("--findings", type=int, default=8, help="default: 8")
    parser.add_argument("--k", type=int, default=3, help="neighbours (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--points", type=int, default=1, help="test samples that the loop is timed on (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a few samples, one turn")
    parser.add_argument("--out", default="results/benchmarks/knn_shapley.json", help="JSON file to write")
    args = parser.parse_args(argv)
    if args.quick:
        args.train, args.test, args.features, args.findings, args.repeats = 2000, 20, 16, 2, 1
    for name in ("train", "test", "features", "findings", "k", "threads", "points", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive")
    row = compare(args)
    print(f"{args.train} training x {args.test} test samples x {args.features} features x {args.findings} findings, "
          f"k = {args.k}, {args.threads} threads, {args.repeats} turns")  # fmt: skip
    timed = f"loop, from {min(args.points, args.test)} of {args.test} test samples"
    print(line(["seconds", f"{row['seconds']:.1f}"], WIDTHS))
    print(line(["seconds of the slowest turn", f"{row['slowest']:.1f}"], WIDTHS))
    print(line(["GiB at most, data included", f"{row['gib']:.2f}"], WIDTHS))
    print(line([timed, f"{row['loop_seconds']:.0f} s"], WIDTHS))
    print(line(["loop / ours", f"{row['ratio']:.0f}"], WIDTHS))
    print(line(["the loop's recursion alone / ours", f"{row['ratio_recursion']:.0f}"], WIDTHS))
    if not args.quick:
        judge = {True: "ok", False: "missed"}
        print(f"{judge[row['seconds'] <= SECONDS]}: {row['seconds']:.1f} s <= {SECONDS:g} s")
        print(f"{judge[row['gib'] <= GIB]}: {row['gib']:.2f} GiB <= {GIB:g} GiB")
        print(f"{judge[row['ratio'] >= RATIO]}: {row['ratio']:.0f} x the loop >= {RATIO:g} x")
    write_json(args.out, {"machine": machine(torch.device("cpu")), "sizes": vars(args), **row})
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
