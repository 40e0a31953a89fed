"""Do the scores find bad data, and does pruning by them help? All methods over several seeds.

    python -m benchmarks.mislabel                      10 % flipped labels: AUROC, flips found, stage 2 - stage 1
    python -m benchmarks.mislabel --bad_workers        2 bad workers of 16: where they come out in the node view
    python -m benchmarks.mislabel --lds                LDS of all methods at 1 and 5 % masked
    python -m benchmarks.mislabel --steps 1 4 8        pruning by cascade at once, and in 4 and 8 steps
    python -m benchmarks.mislabel --folds 1 5 --clean  and by folds of the validation set, on labels as they are
    python -m benchmarks.mislabel --choose             pruning by cascade to a share that held-out samples choose

Further flags are those of main_pruned.py and change the setting (``--dataset_name``, ``--model``, ...).
Tables are markdown; figures are means over seeds with 95 % t intervals, differences are paired by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = ("cascade", "dice", "delete", "if", "random")
RATIOS = (0.85, 0.6)
CHOICES = (0.95, 0.9, 0.85, 0.75, 0.6)
FIXED = (0.95, 0.85)


def main() -> int:
    """Parse, run, print."""
    from utils.errors import UsageError
    from utils.parser import parse
    from utils.pruning_args import PruningConfig
    from utils.records import write_json

    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--bad_workers", action="store_true", help="bad workers instead of flipped labels")
    own.add_argument("--lds", action="store_true", help="LDS instead of flipped labels")
    own.add_argument("--steps", type=int, nargs="+", metavar="K", help="pruning in K steps instead of all methods")
    own.add_argument("--folds", type=int, nargs="+", metavar="F", help="pruning by F folds instead of all methods")
    own.add_argument("--choose", action="store_true", help="a share chosen by --choose_ratio instead of all methods")
    own.add_argument("--clean", action="store_true", help="--steps, --folds and --choose: flip no labels")
    own.add_argument("--runs", type=int, default=5, help="seeds [5]")
    own.add_argument("--out", default="results/benchmarks/mislabel.json")
    options, rest = own.parse_known_args()
    try:
        defaults = ["--model", "mlp", "--epochs", "20", "--lr", "0.05", "--val_fraction", "0.4"]
        config = parse(PruningConfig, [*defaults, *rest], __doc__, varied=True)
        study = bad_workers if options.bad_workers else lds_table if options.lds else flipped_labels
        if options.steps or options.folds:
            ways = [(K, F) for K in options.steps or [1] for F in options.folds or [1]]
            study = functools.partial(in_ways, ways=ways, clean=options.clean)
        if options.choose:
            study = functools.partial(chosen_shares, clean=options.clean)
        with tempfile.TemporaryDirectory() as folder:
            record = study(dataclasses.replace(config, results_dir=folder, quiet=True, plots=False), options.runs)
        write_json(options.out, {"settings": config.changing_results(), "runs": options.runs, **record})
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def stages(config, runs: int):
    """A stage 1 for each seed, with progress on standard error."""
    from training.pruning import open_stage1

    for seed in range(runs):
        print(f"seed {seed}", file=sys.stderr)
        yield open_stage1(dataclasses.replace(config, seed=seed, run_name=f"seed{seed}"))


def flipped_labels(config, runs: int) -> dict:
    """AUROC, flips among the lowest-scored 10 and 20 %, stage 2 minus stage 1 accuracy at two ratios."""
    from benchmarks.common import cell, table
    from training.audit import mislabel
    from training.pruning import run_stage2

    config = dataclasses.replace(config, flip_labels=config.flip_labels or 0.1)
    results = {method: {key: [] for key in ("auroc", "found_10", "found_20", *RATIOS)} for method in METHODS}
    for stage1 in stages(config, runs):
        scores = {method: stage1.scores(method)[0] for method in METHODS}
        for method, values in mislabel(stage1, scores).items():
            for key, value in values.items():
                results[method][key].append(value)
            for ratio in RATIOS:
                summary, _ = run_stage2(stage1, method, ratio)
                results[method][ratio].append(summary["test_accuracy"] - stage1.summary["test_accuracy"])
    head = ["method", "AUROC", "found in lowest 10 %", "20 %"]
    head += [
        f"{what} at {ratio}" for ratio in RATIOS for what in ("stage 2 - stage 1, points,", "minus random, points,")
    ]
    rows = []
    for method, entry in results.items():
        row = [
            method,
            cell(entry["auroc"], share=True),
            cell(entry["found_10"], 100, 0, share=True) + " %",
            cell(entry["found_20"], 100, 0, share=True) + " %",
        ]
        for ratio in RATIOS:
            paired = [a - b for a, b in zip(entry[ratio], results["random"][ratio], strict=True)]
            row += [cell(entry[ratio], 100, 1), "" if method == "random" else cell(paired, 100, 1)]
        rows.append(row)
    table(head, rows)
    return {"flipped": {m: {str(k): v for k, v in e.items()} for m, e in results.items()}}


def in_ways(config, runs: int, ways: list[tuple[int, int]], clean: bool) -> dict:
    """Pruning by ``cascade`` in (steps, folds): stage 2 minus stage 1, minus random, and minus the first way, in
    accuracy and in test loss."""
    from benchmarks.common import cell, table
    from training.pruning import run_stage2

    config = dataclasses.replace(config, flip_labels=0.0 if clean else config.flip_labels or 0.1)
    named = {f"{K} steps, {F} folds": (K, F) for K, F in ways}
    figures: dict[str, list[dict]] = {}
    for stage1 in stages(config, runs):
        figures.setdefault("stage 1", []).append(stage1.summary)
        for ratio in RATIOS:
            for name, (K, F) in {"random": (1, 1), **named}.items():
                stage1.config = dataclasses.replace(stage1.config, prune_steps=K, val_folds=F)
                method = "random" if name == "random" else "cascade"
                figures.setdefault(f"{ratio}, {name}", []).append(run_stage2(stage1, method, ratio)[0])
    rows, first = [], next(iter(named))
    for ratio in RATIOS:
        for name in ("random", *named):
            of, row = figures[f"{ratio}, {name}"], [f"{ratio}, {name}"]
            for other in ("stage 1", f"{ratio}, random", f"{ratio}, {first}"):
                for key, scale, digits in (("test_accuracy", 100, 1), ("test_loss", 1, 3)):
                    paired = [a[key] - b[key] for a, b in zip(of, figures[other], strict=True)]
                    row.append("" if other == row[0] else cell(paired, scale, digits))
            rows.append(row)
    others = ("stage 1", "random", first)
    table(["kept", *(f"minus {o}, {w}" for o in others for w in ("points", "test loss"))], rows)
    return {"ways": {n: [{k: s[k] for k in ("test_accuracy", "test_loss")} for s in of] for n, of in figures.items()}}


def chosen_shares(config, runs: int, clean: bool) -> dict:
    """Pruning by ``cascade`` to a share of ``--choose_ratio``, and to fixed ones: stage 2 minus stage 1, and minus a
    random pruning to the same share, in accuracy and in test loss."""
    from benchmarks.common import cell, table
    from training.pruning import run_stage2
    from training.shares import share_to_keep

    config = dataclasses.replace(
        config, flip_labels=0.0 if clean else config.flip_labels or 0.1, choose_ratio=config.choose_ratio or CHOICES
    )
    figures: dict[str, list[dict]] = {}
    for stage1 in stages(config, runs):
        chosen, _ = share_to_keep(stage1, "cascade")
        for name, share in {"chosen": chosen, **{f"{share:g}": share for share in FIXED}}.items():
            found = {"cascade": stage1.summary, "random": stage1.summary}
            if share < 1:  # else stage 2 would be stage 1 again
                found = {method: run_stage2(stage1, method, share, reuse=True)[0] for method in found}
            figures.setdefault(name, []).append({"share": share, "stage 1": stage1.summary, **found})
    rows = []
    for name, of in figures.items():
        shares = ", ".join(f"{one['share']:g}" for one in of)
        row = [f"chosen: {shares}" if name == "chosen" else name]
        for other in ("stage 1", "random"):
            for key, scale, digits in (("test_accuracy", 100, 1), ("test_loss", 1, 3)):
                row.append(cell([one["cascade"][key] - one[other][key] for one in of], scale, digits))
        rows.append(row)
    table(["kept", *(f"minus {o}, {w}" for o in ("stage 1", "random") for w in ("points", "test loss"))], rows)
    return {"shares": config.choose_ratio, "choices": figures}


def bad_workers(config, runs: int) -> dict:
    """Where the workers with bad data come out when influence is summed by worker."""
    import numpy as np

    from benchmarks.common import cell, table
    from training.pruning import node_view
    from utils.influence.statistics import auroc
    from utils.records import read_json

    config = dataclasses.replace(
        config, bad_data=config.bad_data or "2:label_flip", num_workers=16, batch_size=16, min_shard=5
    )
    results = {method: {"auroc": [], "at the bottom": []} for method in METHODS}
    for stage1 in stages(config, runs):
        for method in METHODS:
            view = read_json(node_view(stage1, method))
            scores, bad = np.array(view["worker_influence"]), np.zeros(config.num_workers, dtype=bool)
            bad[view["bad_workers"]] = True
            results[method]["auroc"].append(auroc(scores, bad))
            lowest = set(np.argsort(scores)[: bad.sum()].tolist())
            results[method]["at the bottom"].append(len(lowest & set(view["bad_workers"])) / bad.sum())
    table(
        [
            "method",
            f"AUROC of the workers ({config.bad_data}, {config.num_workers} workers)",
            "bad workers that are the lowest",
        ],
        [
            [m, cell(e["auroc"], share=True), cell(e["at the bottom"], 100, 0, share=True) + " %"]
            for m, e in results.items()
        ],
    )
    return {"bad_workers": results}


def lds_table(config, runs: int) -> dict:
    """LDS at 1 and 5 % masked, of one run (``--seed``), with bootstrap intervals over the groups."""
    from benchmarks.common import table
    from training.audit import audit
    from training.pruning import open_stage1

    results = {}
    for fraction in (0.01, 0.05):
        stage1 = open_stage1(dataclasses.replace(config, audit_fraction=fraction, methods=METHODS, run_name="lds"))
        results[fraction] = audit(stage1)["methods"]
    rows = []
    for method in METHODS:
        entries = [results[f][method] for f in results]
        rows.append([method, *(f"{e['lds']:.3f} [{e['interval'][0]:.3f}, {e['interval'][1]:.3f}]" for e in entries)])
    table(["method", "LDS, 1 % masked", "5 % masked"], rows)
    print(f"stage 1 test accuracy {stage1.summary['test_accuracy']:.4f}")
    return {"lds": {str(f): results[f] for f in results}}


if __name__ == "__main__":
    sys.exit(main())
