"""What a ledger costs: rounds of gossip with one, against the same rounds without.

    python -m benchmarks.ledger                          CNN, 16 workers, 4 local steps and 1
    python -m benchmarks.ledger --model mlp --rounds 50

Both sides run in one process with the machine's threads and take turns, a stretch of rounds each; the median of the
ratios of neighbouring turns counts. Evaluations and checkpoints, which both have alike, are left out; states that
the ledger keeps for replay are in.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main(argv: list[str] | None = None) -> int:
    """Parse, take turns, print."""
    from benchmarks.common import median_ratio, spread, take_turns

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cnn", help="network (default: cnn)")
    parser.add_argument("--workers", type=int, default=16, help="N (default: 16)")
    parser.add_argument("--local_steps", type=int, nargs="+", default=[4, 1], help="steps a round (default: 4 1)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of a turn (default: 10)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--threads", type=int, default=None, help="threads of both sides (default: one a core)")
    asked = parser.parse_args(argv)
    print("| network | workers | local steps | a round, ms | with a ledger, ms | cost (median) | spread |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for steps in asked.local_steps:
            settings = {"model": asked.model, "num_workers": asked.workers, "local_steps": steps}
            settings |= {"threads": asked.threads, "min_shard": 5, "epochs": 1000.0, "quiet": True}
            sides = {"plain": False, "ledger": True}
            turns = {name: stretch(Path(folder, f"{steps} {name}"), on, settings, asked.rounds)
                     for name, on in sides.items()}  # fmt: skip
            found = take_turns(turns, asked.turns)
            ms = {name: 1e3 * sorted(times)[len(times) // 2] / asked.rounds for name, times in found.items()}
            ratio = median_ratio(found["ledger"], found["plain"])
            print(f"| {asked.model} | {asked.workers} | {steps} | {ms['plain']:.1f} | {ms['ledger']:.1f} | "
                  f"{ratio - 1:+.1%} | {spread(found['plain']):.0%} |")  # fmt: skip
    return 0


def stretch(folder: Path, with_ledger: bool, settings: dict, rounds: int) -> Callable[[], float]:
    """A function that trains the next rounds and says how long they took."""
    from ledger.observer import LedgerObserver
    from training.build import build
    from training.trainer import Trainer
    from utils.args import Config

    ledger = {"ledger": str(folder / "ledger")} if with_ledger else {}
    trainer = Trainer(build(Config(**settings, **ledger)), folder / "run")
    trainer.observers = [LedgerObserver(trainer)] if with_ledger else []
    trainer.start()
    for observer in trainer.observers:
        observer.begin(trainer)
    events = trainer.protocol.run(trainer.fleet, trainer.job)

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            event = next(events)
            for observer in trainer.observers:
                observer.round(event)
        return time.perf_counter() - start

    return turn


if __name__ == "__main__":
    sys.exit(main())
