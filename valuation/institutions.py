"""Institutions' test sets, and what models are worth on them.

Legend: N institutions, C models, D floats a row, m test samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.build import Job
from training.deal import load
from utils.errors import UsageError
from utils.random import hash64
from workers.evaluation import evaluate_rows

EMPTY = {"auroc": 0.5}  # of metrics that know what no model is worth


def institution_tests(job: Job) -> list[Tensor]:
    """Ids of each institution's test samples: its own where the data say whose they are (``--partition natural``), and
    else a part of all, of every class (or stratum) in proportion to what the institution has of it in training, before
    any label is flipped. Disjoint and complete; a function of the seed. Raises :class:`UsageError` where one gets none.
    """
    data, N = job.dataset, len(job.shards)
    if job.owners is not None and data.owners.test_owner_m is not None:
        tests = [(data.owners.test_owner_m == g).nonzero()[:, 0] for g in job.owners]
    else:
        clean_n = load(job.config).targets_n if job.corruption else data.targets_n
        strata_n, strata_m = data.task.strata(clean_n), data.task.strata(data.test_targets_m)
        rank_m = hash64("institution tests", job.config.seed, torch.arange(len(strata_m)))
        parts: list[list[Tensor]] = [[] for _ in range(N)]
        for stratum in strata_m.unique():
            ids = (strata_m == stratum).nonzero()[:, 0]
            ids = ids[rank_m[ids].argsort(stable=True)]
            having_N = np.array([int((strata_n[shard] == stratum).sum()) for shard in job.shards], float)
            share_N = having_N / having_N.sum() if having_N.any() else np.full(N, 1 / N)
            ends = np.round(share_N.cumsum() * len(ids)).astype(int)
            for part, piece in zip(parts, np.split(np.arange(len(ids)), ends[:-1]), strict=True):
                part.append(ids[piece])
        tests = [torch.cat(part).sort().values for part in parts]
    empty = [k for k, ids in enumerate(tests) if len(ids) == 0]
    if empty:
        name = data.owners.names[job.owners[empty[0]]] if job.owners is not None else empty[0]
        raise UsageError(f"institution {name} has no test samples: take fewer institutions or more test data.")
    return tests


def utilities(job: Job, rows_CD: Tensor, tests: list[Tensor]) -> Tensor:
    """What each model is worth on each institution's test set [C, N], float64, by :func:`worth_metric`. Raises
    :class:`UsageError` where that is not defined, as AUROC is not without both a case and a control."""
    name = worth_metric(job)
    found_CN = torch.stack(
        [evaluate_rows(job.engine, rows_CD, job.test_samples, ids_m)[name].double().cpu() for ids_m in tests], 1
    )
    undefined = (~found_CN.isfinite()).nonzero()
    if len(undefined):
        c, k = undefined[0].tolist()
        raise UsageError(
            f"the {name} on the test set of institution {k} is not defined: it lacks a class (model {c})."
        )
    return found_CN


def worth_metric(job: Job) -> str:
    """The first of the task's metrics of which more is better: accuracy, AUROC, or the skill of a regression."""
    return next(metric.name for metric in job.dataset.task.metrics if metric.higher_is_better)


def empty_utility(job: Job) -> float:
    """What no model is worth: 0.5 for AUROC, chance for accuracy, 0 for other metrics (skill)."""
    name = worth_metric(job)
    if name == "accuracy":
        return 1 / job.dataset.task.num_outputs
    return next((value for part, value in EMPTY.items() if part in name), 0.0)
