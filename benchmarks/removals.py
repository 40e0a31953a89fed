"""How far do scores reach? Groups of up to 40 % of the samples, random and lowest-scored: predicted and actual.

    python -m benchmarks.removals                     digits, MLP, 40 groups, two seeds; a quarter of an hour
    python -m benchmarks.removals --model cnn_smooth --lr 0.1

First table: the LDS of each method where so large a share of the samples is masked. Second table: by how much the
validation loss F falls when the lowest-scored samples of a method are masked, as its scores say and as retraining says
(only the sums of ``cascade`` are in units of F); the lower the actual change, the better the method prunes. Further
flags are those of main_pruned.py. Means over seeds with 95 % t intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = ("cascade", "dice", "delete", "if", "random")
SHARES = (0.05, 0.1, 0.2, 0.4)
COMMON = ("--model", "mlp", "--epochs", "20", "--lr", "0.05", "--val_fraction", "0.4")


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print."""
    from utils.errors import UsageError, refusal
    from utils.parser import parse
    from utils.pruning_args import PruningConfig
    from utils.records import write_json

    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--runs", type=int, default=2, help="seeds [2]")
    own.add_argument("--out", default="results/benchmarks/removals.json")
    asked, rest = own.parse_known_args(argv)
    try:
        config = parse(PruningConfig, [*COMMON, *rest], __doc__, varied=True)
        with tempfile.TemporaryDirectory() as folder:
            config = dataclasses.replace(config, results_dir=folder, quiet=True, plots=False, methods=METHODS)
            record = [measured(config, config.seed + k) for k in range(asked.runs)]
        print_tables(record)
        write_json(asked.out, {"settings": config.changing_results(), "runs": record})
    except UsageError as error:
        return refusal(error)
    return 0


def measured(config: Any, seed: int) -> dict[str, Any]:
    """One seed: by share the LDS of each method, and the change of F without its lowest-scored samples."""
    import torch

    from training.audit import actual_changes
    from training.groups import audit_groups
    from training.pruning import open_stage1
    from utils.influence.statistics import lds

    print(f"seed {seed}", file=sys.stderr)
    stage1 = open_stage1(dataclasses.replace(config, seed=seed, run_name=f"seed{seed}"))
    ids = stage1.job.train_ids
    scores = {method: stage1.scores(method)[0] for method in METHODS}
    found: dict[str, Any] = {"seed": seed, "lds": {}, "lowest": {}}
    for share in SHARES:
        stage1.config = dataclasses.replace(stage1.config, audit_fraction=share)
        groups_Mg = audit_groups(stage1)
        actual_M, _ = actual_changes(stage1, groups_Mg)
        found["lds"][str(share)] = {
            method: lds(scores_n[groups_Mg].sum(1).numpy(), actual_M)[0] for method, scores_n in scores.items()
        }
        count = groups_Mg.shape[1]
        lowest_Mg = torch.stack([ids[scores_n[ids].argsort(stable=True)[:count]] for scores_n in scores.values()])
        changes_M, full = actual_changes(stage1, lowest_Mg)
        found["lowest"][str(share)] = {
            method: {"predicted": float(scores[method][lowest_g].sum()), "actual": float(change)}
            for method, lowest_g, change in zip(METHODS, lowest_Mg, changes_M, strict=True)
        }
        found["full"] = full
    return found


def print_tables(record: list[dict[str, Any]]) -> None:
    """Both tables."""
    from benchmarks.common import cell, table

    rows = [
        [f"{share:.0%}", *(cell([run["lds"][str(share)][m] for run in record], digits=2) for m in METHODS)]
        for share in SHARES
    ]
    table(["masked at random", *(f"LDS of {m}" for m in METHODS)], rows)
    print()
    rows = []
    for share in SHARES:
        lowest = [run["lowest"][str(share)] for run in record]
        actual = [cell([of[m]["actual"] for of in lowest]) for m in METHODS]
        rows.append([f"{share:.0%}", cell([of["cascade"]["predicted"] for of in lowest]), *actual])
    print(f"F of the whole run: {cell([run['full'] for run in record])}\n")
    table(["lowest-scored masked", "cascade predicts", *(f"change of F, by {m}" for m in METHODS)], rows)


if __name__ == "__main__":
    sys.exit(main())
