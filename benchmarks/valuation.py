"""OpenDataVal's three tasks (Jiang et al., NeurIPS 2023, arXiv 2306.10577) on the values and scores of samples here.

    python -m benchmarks.valuation                            digits, 4 institutions, 20 % wrong labels, 3 seeds
    python -m benchmarks.valuation --bad_data 1:noise         one institution's pictures are noise instead
    python -m benchmarks.valuation --methods ddval self_loss random --dataset_name fashionmnist --max_train 3000

(a) Noisy labels detected: F1 where the lower of two clusters of the values is flagged (2-means in one dimension), and
AUROC. (b) Samples removed in steps of 5 %, and the model trained anew by federated averaging, to its own early stop:
test accuracy, the lowest values removed first (more is better) and the highest first (less is better), as means over
5 .. 95 % removed (areas under curves), and without the lowest of about as many as are bad. (c) Bad samples discovered:
the share of them among the lowest values, against the share inspected, and the area under that curve.

All methods value samples by the same model of all institutions and by the validation samples; test samples do but
measure. ``self_loss``: a sample's own training loss, the higher the less it is worth. Further flags are those of
python -m valuation. Tables are markdown: means over seeds with 95 % t intervals.

Legend: N institutions, n training samples, C refits, S shares removed or inspected.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import cell, table
from training.build import Job
from training.coalitions import train_coalitions
from training.deal import with_workers
from training.protocols import check_differentiable
from utils.errors import UsageError, refusal
from utils.influence import Options, score
from utils.influence.statistics import auroc, f1, found_among_lowest, lower_cluster, mean_interval
from utils.parser import parse
from utils.progress import Progress, bar
from utils.random import uniform
from utils.records import write_json
from valuation.__main__ import built, grand_study
from valuation.args import ValuationConfig
from valuation.features import PIECE, features_of
from valuation.institutions import empty_utility, institution_tests, worth_metric
from valuation.knn_shapley import knn_shapley
from valuation.methods import Study
from visualization.valuation_benchmarks import plot_tasks
from workers.evaluation import evaluate_rows

INFLUENCE = ("cascade", "dice", "delete", "if")
METHODS = ("ddval", *INFLUENCE, "self_loss", "random")
DEFAULTS = ("--val_fraction", "0.2", "--lr", "0.1", "--epochs", "40")
STEPS = 20  # of 5 %
CURVES = ("lowest_removed", "highest_removed", "found")


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print, draw."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--runs", type=int, default=3, help="seeds, from --seed on [3]")
    own.add_argument("--methods", nargs="+", choices=METHODS, help="[all that can score such a run]")
    own.add_argument(
        "--out", default="results/benchmarks/valuation.json", help="the record; the picture lies beside it"
    )
    asked, rest = own.parse_known_args(argv)
    if asked.runs < 1:
        own.error("--runs must be positive")
    try:
        config = with_workers(parse(ValuationConfig, [*DEFAULTS, *rest], __doc__, varied=True))
        if not config.flip_labels and not config.bad_data and not any(config.worker_flips):
            config = dataclasses.replace(config, flip_labels=0.2)
        methods = asked.methods or able(config)
        seeds = [run_tasks(dataclasses.replace(config, seed=config.seed + s, seeds=1), methods)
                 for s in range(asked.runs)]  # fmt: skip
        record = {"settings": config.changing_results(), "runs": asked.runs, **summary(seeds)}
        print_tables(record)
        write_json(asked.out, record)
        if config.plots:
            plot_tasks(asked.out, Path(asked.out).with_suffix(".png"))
    except UsageError as error:
        return refusal(error)
    return 0


def able(config: ValuationConfig) -> list[str]:
    """The methods that can score such a run: without derivatives of its steps there is no influence."""
    try:
        check_differentiable(config.training())
    except UsageError:
        return [name for name in METHODS if name not in INFLUENCE]
    return list(METHODS)


def run_tasks(config: Any, methods: Sequence[str]) -> dict[str, Any]:
    """The figures of one seed: for each method those of :func:`found` and the accuracies of its refits."""
    job = built(config)
    if not job.dataset.task.one_class:
        raise UsageError(f"--dataset_name {config.dataset_name}: these tasks are about samples of one class each.")
    study = grand_study(config, job, institution_tests(job), empty_utility(job))
    bad_n = bad_samples(job)
    values = {name: values_of(name, study) for name in methods}
    kept_Cn = np.concatenate([kept_masks(values_n) for values_n in values.values()])
    with bar(len(kept_Cn), f"seed {config.seed}: refits", "refit", config.quiet) as ticks:
        accuracy_C = np.array(refitted(job, kept_Cn, ticks.update))
    full = float(accuracies(job, study.grand.rows_CD)[0])
    figures = {}
    for (name, values_n), accuracy_2S in zip(values.items(), accuracy_C.reshape(len(values), 2, -1), strict=True):
        low, high = ([full, *accuracies_S] for accuracies_S in accuracy_2S.tolist())
        figures[name] = found(values_n, bad_n) | {"lowest_removed": low, "highest_removed": high}
    return {"seed": config.seed, "bad": float(bad_n.mean()), "metric": worth_metric(job), "methods": figures}


def bad_samples(job: Job) -> np.ndarray:
    """Which of the training samples were corrupted, bool [n]: wrong labels, or pictures of noise."""
    bad = torch.tensor(job.corruption["flipped"], dtype=torch.int64)
    if job.corruption["kind"] == "noise":
        bad = torch.cat([bad, *(job.shards[k] for k in job.corruption["bad_workers"])])
    return torch.isin(job.train_ids, bad).numpy()


def values_of(name: str, study: Study) -> np.ndarray:
    """A method's value of each training sample [n]; the more, the better the sample."""
    job = study.job
    if name == "random":
        return uniform(job.config.seed, "random values", job.train_ids).numpy()
    if name == "self_loss":
        return -own_losses(study).numpy()
    if name == "ddval":
        train_nF, val_mF = (
            features_of(study.model, job.samples, ids, study.layer) for ids in (job.train_ids, job.val_ids)
        )
        targets_n = job.dataset.targets_n
        return knn_shapley(train_nF, targets_n[job.train_ids], val_mF, targets_n[job.val_ids], study.k).numpy()
    scores_n = score(name, study.trajectory, Options(target="consensus"))
    if not bool(torch.isfinite(scores_n).all()):
        raise UsageError(f"{name} gave scores that are not finite: take a smaller --lr.")
    return scores_n[job.train_ids].numpy()


def own_losses(study: Study) -> Tensor:
    """The loss of each training sample under the model of all institutions [n]."""
    samples, found = study.job.samples, []
    with torch.no_grad():
        for ids in study.job.train_ids.split(PIECE):
            inputs, targets_b = samples.plain(ids)
            found.append(samples.task.losses(study.model(inputs)[None], targets_b[None])[0].cpu())
    return torch.cat(found)


def found(values_n: np.ndarray, bad_n: np.ndarray) -> dict[str, Any]:
    """How well low values find bad samples: tasks (a) and (c)."""
    found_S = [found_among_lowest(values_n, bad_n, s / STEPS) for s in range(STEPS + 1)]
    return {
        "f1": f1(lower_cluster(values_n), bad_n), "auroc": auroc(values_n, bad_n), "found": found_S,
        "found_as_many": found_among_lowest(values_n, bad_n, float(bad_n.mean())),
    }  # fmt: skip


def kept_masks(values_n: np.ndarray) -> np.ndarray:
    """What is left without the lowest 5, 10, .. 95 % of the values, and without the highest: bool [2 (S - 2), n]."""
    n = len(values_n)
    rank_n = np.empty(n, dtype=int)
    rank_n[np.argsort(values_n, kind="stable")] = np.arange(n)
    removed = [round(s / STEPS * n) for s in range(1, STEPS)]
    return np.array([rank_n >= count for count in removed] + [rank_n < n - count for count in removed])


def refitted(job: Job, kept_Cn: np.ndarray, progress: Progress) -> list[float]:
    """Test accuracy of models trained on what each mask keeps, many side by side. An institution that is left with
    nothing takes no part."""

    coalitions, held, found = [], [], []
    for kept_n in torch.from_numpy(kept_Cn):
        shards = [shard[torch.isin(shard, job.train_ids[kept_n])] for shard in job.shards]
        coalitions.append(tuple(k for k, shard in enumerate(shards) if len(shard)))
        held.append([shard for shard in shards if len(shard)])
    step = max(1, job.engine.busy_rows // len(job.shards))
    for first in range(0, len(coalitions), step):
        piece = slice(first, first + step)
        trained = train_coalitions(job, coalitions[piece], held=held[piece])
        found += accuracies(job, trained.rows_CD).tolist()
        progress(len(coalitions[piece]))
    return found


def accuracies(job: Job, rows_CD: Tensor) -> Tensor:
    """Of models on all test samples [C]."""

    ids_m = torch.arange(len(job.dataset.test_targets_m))
    return evaluate_rows(job.engine, rows_CD, job.test_samples, ids_m)[worth_metric(job)].cpu()


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the record holds: all seeds, and of every curve of every method the mean and the ends of its interval."""
    curves = {}
    for name in seeds[0]["methods"]:
        points = {key: zip(*(seed["methods"][name][key] for seed in seeds), strict=True) for key in CURVES}
        curves[name] = {
            key: [list(ends) for ends in zip(*(mean_interval(list(p)) for p in of), strict=True)]
            for key, of in points.items()
        }
    return {
        "metric": seeds[0]["metric"], "bad": float(np.mean([seed["bad"] for seed in seeds])),
        "shares": [s / STEPS for s in range(STEPS + 1)], "curves": curves, "seeds": seeds,
    }  # fmt: skip


def print_tables(record: dict[str, Any]) -> None:
    """Tasks (a) and (c), and task (b): means over seeds with intervals."""
    seeds, shares = record["seeds"], np.array(record["shares"])
    bad = record["bad"]
    near = int(np.abs(shares - bad).argmin())
    full = cell([next(iter(seed["methods"].values()))["lowest_removed"][0] for seed in seeds], share=True)
    print(f"{len(seeds)} seeds; {bad:.0%} of the training samples are bad; {record['metric']} with all: {full}\n")
    found_rows, removed_rows = [], []
    for name in seeds[0]["methods"]:
        figures = [seed["methods"][name] for seed in seeds]
        columns = [[f[key] for f in figures] for key in ("f1", "auroc", "found_as_many")]
        columns.append([area(f["found"]) for f in figures])
        found_rows.append([name, *(cell(column, share=True) for column in columns)])
        columns = [[area(f[key][1:]) for f in figures] for key in ("lowest_removed", "highest_removed")]
        columns.insert(1, [f["lowest_removed"][near] for f in figures])
        removed_rows.append([name, *(cell(column, share=True) for column in columns)])
    table(["method", "F1", "AUROC", f"of the bad, among the lowest {bad:.0%}", "area of discovery"], found_rows)
    print()
    lowest = f"{record['metric']}, lowest removed first"
    table(["method", lowest, f"without the lowest {shares[near]:.0%}", "highest removed first"], removed_rows)


def area(values_S: Sequence[float]) -> float:
    """The area under a curve at even steps, over its width: what it is on average."""
    values_S = np.asarray(values_S)
    return float((values_S[1:] + values_S[:-1]).mean() / 2)


if __name__ == "__main__":
    sys.exit(main())
