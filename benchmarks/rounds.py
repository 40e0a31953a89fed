"""What a round of each algorithm costs, against a round of gossip.

    python -m benchmarks.rounds                                     16 workers, CNN on the digits
    python -m benchmarks.rounds --image_size 32 --turns 7           the same on 32 x 32 pixels
    python -m benchmarks.rounds --model mlp --num_workers 256       many short rows

Every algorithm and gossip take turns, a few rounds each, in one process; the median over turns of the ratio within a
turn counts. Averaging by servers and over local epochs is compared a local step: a round has others' number of them.
Further flags are those of main.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from utils.args import Config

os.environ.setdefault("OMP_NUM_THREADS", "1")

LEFT_OUT = ("DiLoCo, 10 steps", "alone", "gossip")
MORE = {
    "DiLoCo, 1 step": {"protocol": "diloco"},
    "CHOCO, a bit each": {"protocol": "choco", "compression": "sign"},
    "CHOCO, random 5 %": {"protocol": "choco", "compression": "random_k"},
}


def rounds_of(base: Config, changes: dict[str, Any], rounds: int) -> Callable[[], float]:
    """A function that makes so many rounds, and returns the seconds of a local step of all workers."""
    from training.build import build
    from training.protocols import load_protocol

    config = dataclasses.replace(base, **changes)
    job = build(config)
    protocol, fleet = load_protocol(config.protocol), job.make_fleet()
    protocol.check(job)
    events = protocol.run(fleet, job)

    def turn() -> float:
        samples, start = 0, time.perf_counter()
        for _ in range(rounds):
            samples += next(events).samples
        return (time.perf_counter() - start) / samples

    return turn


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print."""
    from benchmarks.common import median_ratio, spread, take_turns
    from utils.args import Config
    from utils.errors import UsageError, refusal
    from utils.parser import parse

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rounds", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--turns", type=int, default=9, help="turns of each side")
    parser.add_argument("--rounds", type=int, default=6, help="rounds a turn")
    asked, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    warnings.simplefilter("ignore")
    try:
        flags = ["--num_workers", "16", "--epochs", "4000", "--partition", "iid", "--quiet", *rest]
        base = parse(Config, flags, __doc__, varied=True)
        gossip = rounds_of(base, ALGORITHMS["gossip"], asked.rounds)
        print("| algorithm | a round, over gossip's | spread of gossip's |")
        print("| --- | --- | --- |")
        for name, changes in {**ALGORITHMS, **MORE}.items():
            if name in LEFT_OUT:
                continue
            sides = {"gossip": gossip, name: rounds_of(base, changes, asked.rounds)}
            times = take_turns(sides, asked.turns + 1)
            own, other = (times[side][1:] for side in (name, "gossip"))  # the first turn warms up
            print(f"| {name} | {median_ratio(own, other):.3f} | {spread(other):.0%} |", flush=True)
    except UsageError as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
