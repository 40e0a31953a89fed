"""Walks side by side against one walk: hops a second of ``python -m homogeneous`` while an agent learns.

    python -m benchmarks.homogeneous                     digits, MLP and CNN, 8 walks against 1
    python -m benchmarks.homogeneous --side_by_side 16 --turns 9

Both sides have the machine's threads, take turns, and the median of the ratios of neighbouring turns counts. Every
walk goes round the nodes; a hop is an epoch on a node's samples and the measuring after it. Exit code 1 where a bar
is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

BARS = {"mlp": 4.0, "cnn": 1.7}


def hops_a_second(world, count: int, hops: int):  # noqa: ANN001, ANN201
    """A function that makes so many hops of so many walks, and returns hops a second of them together."""
    walking, N, first = world.walks(count), world.num_nodes, [0]

    def measure() -> float:
        walking.start(range(count), [1000 * first[0] + m for m in range(count)])
        first[0] += 1
        start = time.perf_counter()
        for hop in range(hops):
            walking.go(range(count), [(hop + m) % N for m in range(count)])
        return count * hops / (time.perf_counter() - start)

    return measure


def main(argv: list[str] | None = None) -> int:
    """Parse, take turns, print."""
    from benchmarks.common import median_ratio, spread, take_turns
    from homogeneous.args import WalkConfig
    from homogeneous.world import World

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side_by_side", type=int, default=8, help="walks in one fleet (default: 8)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--hops", type=int, default=12, help="hops of a turn (default: 12)")
    parser.add_argument("--models", nargs="+", default=list(BARS), help="networks (default: mlp cnn)")
    parser.add_argument("--threads", type=int, default=None, help="threads of both sides (default: one a core)")
    asked = parser.parse_args(argv)
    missed = False
    print(f"| network | {asked.side_by_side} walks, hops/s | one walk, hops/s | ratio (median) | bar | spread |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in asked.models:
        world = World.of(WalkConfig(quiet=True, model=model, threads=asked.threads))
        sides = {
            "many": hops_a_second(world, asked.side_by_side, asked.hops), "one": hops_a_second(world, 1, asked.hops)
        }  # fmt: skip
        for measure in sides.values():
            measure()  # not counted
        found = take_turns(sides, asked.turns)
        ratio, bar = median_ratio(found["many"], found["one"]), BARS.get(model)
        missed |= bar is not None and ratio < bar
        print(f"| {model} | {max(found['many']):.1f} | {max(found['one']):.1f} | {ratio:.2f} | {bar or ''} | "
              f"{spread(found['many']):.0%}, {spread(found['one']):.0%} |", flush=True)  # fmt: skip
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
