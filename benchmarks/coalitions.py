"""All coalitions of institutions as rows of one fleet, against the same coalitions one after the other.

    python -m benchmarks.coalitions                        digits, 6 institutions (63 coalitions), MLP and CNN
    python -m benchmarks.coalitions --institutions 5 --rounds 4

Both sides run in one process with the machine's threads, take turns, and the median of the ratios of neighbouring turns
counts. Prints how far their models are apart too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main(argv: list[str] | None = None) -> int:
    """Parse, take turns, print."""
    import torch

    from benchmarks.common import median_ratio, spread, take_turns
    from training.coalitions import all_coalitions, train_coalitions
    from valuation.__main__ import built
    from valuation.args import ValuationConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--institutions", type=int, default=6, help="N (default: 6)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of federated averaging (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], help="networks (default: mlp cnn)")
    parser.add_argument("--threads", type=int, default=None, help="threads of both sides (default: one a core)")
    asked = parser.parse_args(argv)
    coalitions = all_coalitions(asked.institutions)
    print("| network | coalitions | together, s | one by one, s | ratio (median) | spread | largest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in asked.models:
        config = ValuationConfig(
            quiet=True, model=model, num_workers=asked.institutions, epochs=asked.rounds, patience=0, min_shard=5,
            threads=asked.threads,
        )  # fmt: skip
        job, ends = built(config), {}

        def together() -> float:
            start = time.perf_counter()
            ends["together"] = train_coalitions(job, coalitions).rows_CD  # noqa: B023, called in this turn of the loop
            return time.perf_counter() - start

        def alone() -> float:
            start = time.perf_counter()
            rows = [train_coalitions(job, [members]).rows_CD for members in coalitions]  # noqa: B023
            ends["alone"] = torch.cat(rows)  # noqa: B023
            return time.perf_counter() - start

        found = take_turns({"together": together, "alone": alone}, asked.turns)
        apart = float((ends["together"] - ends["alone"]).abs().max())
        ratio = median_ratio(found["alone"], found["together"])
        print(
            f"| {model} | {len(coalitions)} | {min(found['together']):.1f} | {min(found['alone']):.1f} | {ratio:.2f} | "
            f"{spread(found['together']):.0%}, {spread(found['alone']):.0%} | {apart:.1e} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
