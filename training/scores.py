"""Scores of every training sample: computed once, kept in zarr with their settings, never used under
other settings.

Legend: n samples of the data set, m training samples.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.build import Job
from training.trajectory import RecordedRun
from utils.digest import digest_json
from utils.errors import UsageError
from utils.influence import Options, load_method, score
from utils.progress import bar
from utils.pruning_args import PruningConfig
from utils.random import permutations
from utils.scores import read_scores, write_scores


def options_of(config: PruningConfig) -> Options:
    """The scoring options of a configuration."""
    names = {f.name for f in dataclasses.fields(Options)}
    return Options(**{k: v for k, v in vars(config).items() if k in names})


def settings_of(method: str, run: RecordedRun, options: Options, final_state: str) -> dict[str, Any]:
    """All that a method's scores depend on: the run, its rounds and the digest of its final state, and the options
    that the method reads."""
    return {
        "method": method,
        "options": {name: getattr(options, name) for name in load_method(method).reads},
        "run": run.job.identity["digest"],
        "rounds": run.rounds,
        "final_state": final_state,
    }


def scores_for(
    method: str, run: RecordedRun, config: PruningConfig, folder: Path, final_state: str,
    fold: tuple[int, int] | None = None,
) -> tuple[Tensor, Path]:
    """Scores [n] of a method and where they are kept: read if they were made under these settings,
    else computed (with a progress bar) and written. ``fold`` (f, F): by the f-th of F parts of the validation set."""
    options, of_fold = options_of(config), {} if fold is None else {"fold": list(fold)}
    settings = json.loads(json.dumps(settings_of(method, run, options, final_state) | of_fold))
    worker_n = run.worker_of_n.cpu()
    paths = (folder / f"{method}.zarr", folder / f"{method}-{digest_json(settings)[:12]}.zarr")
    for path in filter(Path.exists, paths):
        kept = sound_scores(path)
        if kept is not None and kept["settings"] == settings:
            scores_n = torch.zeros(len(worker_n), dtype=torch.float64)
            scores_n[torch.from_numpy(kept["sample_id"])] = torch.from_numpy(kept["scores"])
            return scores_n, path
    if config.stages > 1 and not config.quiet:
        print(f"{method}: stages change no number, it replays the network as one", file=sys.stderr)
    what, judges = (method, run.val_ids) if fold is None else (
        f"{method}, fold {fold[0] + 1} of {fold[1]}", folds_of(run, *fold)
    )
    with bar(load_method(method).ticks(run, options), f"scoring: {what}", "tick", config.quiet) as shown:
        with run.judged_by(judges):
            scores_n = score(method, run, options, shown.update)
    ids = (worker_n >= 0).nonzero()[:, 0]
    if not bool(scores_n[ids].isfinite().all()):
        raise UsageError(
            f"{method} gave scores that are not finite: the run's loss is too rough for it. Train with a "
            "smaller --lr, or score with another --pruning_algorithm."
        )
    path = paths[0] if fold is None and not paths[0].exists() else paths[1]
    write_scores(
        path, {"scores": scores_n[ids].numpy(), "sample_id": ids.numpy(), "worker": worker_n[ids].numpy()}, settings
    )
    return scores_n, path


def folds_of(run: RecordedRun, f: int, F: int) -> Tensor:
    """Ids of the f-th of F parts of the validation set, at random but for the run's seed."""
    val_ids = run.job.val_ids
    if F > 1 and len(val_ids) < 2 * F:
        raise UsageError(f"--val_folds {F}: {len(val_ids)} validation samples are too few, take {len(val_ids) // 2}.")
    order = permutations(torch.tensor([len(val_ids)]), run.job.config.seed, "validation folds", torch.tensor([[0]]))
    return val_ids[order[0]].tensor_split(F)[f]


def pruning_scores(method: str, run: RecordedRun, config: PruningConfig, folder: Path, final_state: str) -> Tensor:
    """What a method prunes by [n]: its scores or, with ``--val_folds`` F, in units of their own noise: the mean over
    scores by F parts of the validation set, divided by its standard error (0 where all are equal)."""
    F = config.val_folds
    if F == 1 or method == "random":
        return scores_for(method, run, config, folder, final_state)[0]
    return signal(scores_by_fold(method, run, config, folder, final_state, F))


def choosing_folds(config: PruningConfig) -> int:
    """Parts of the validation set that judge shares for ``--choose_ratio``: ``--val_folds``, or 5 where that is less
    than 3 (what one part judges, two others at least propose by their agreement)."""
    return config.val_folds if config.val_folds > 2 else 5


def scores_by_fold(
    method: str, run: RecordedRun, config: PruningConfig, folder: Path, final_state: str, F: int
) -> Tensor:
    """Scores [F, n] of a method by each of F parts of the validation set."""
    return torch.stack([scores_for(method, run, config, folder, final_state, fold=(f, F))[0] for f in range(F)])


def signal(scores_Fn: Tensor) -> Tensor:
    """The mean of scores over folds in units of its standard error [n]; 0 where all are equal."""
    error_n = scores_Fn.std(0) / len(scores_Fn) ** 0.5
    return torch.where(error_n > 0, scores_Fn.mean(0) / error_n, 0.0)


def sound_scores(path: Path, *names: Sequence[str]) -> dict[str, Any] | None:
    """The scores at ``path``; None, and a warning, where they are damaged: then they are deleted, so that
    new ones take their place."""
    try:
        return read_scores(path, *names)
    except UsageError as error:
        warnings.warn(str(error), stacklevel=2)
        shutil.rmtree(path, ignore_errors=True)
        return None


def sheet_of(job: Job, scores_m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """What a contact sheet of the training samples shows, by their scores in the order of ``job.train_ids``: all inputs
    (pictures with channels last), strata, the scores, the samples' ids and what strata are called."""
    data = job.dataset
    inputs_n = data.inputs_n.movedim(1, -1) if data.pictures else data.inputs_n
    strata_n, names = data.task.strata(data.targets_n).numpy(), data.task.stratum_names(data.targets_n)
    return inputs_n.numpy(), strata_n, scores_m, job.train_ids.numpy(), names


def keep_best(scores_n: Tensor, worker_of_n: Tensor, ratio: float, scope: str = "worker") -> Tensor:
    """Ids of the samples to keep, ascending: the highest-scored ``ratio`` of each worker, or of all
    samples together (then every worker keeps its best one at least).

    Raises :class:`UsageError` where a worker would be left with nothing.
    """
    ids = (worker_of_n >= 0).nonzero()[:, 0]
    workers = worker_of_n[ids]
    # Descending by score, then by id: ties do not depend on the sort.
    order = torch.from_numpy(np.lexsort((ids.numpy(), -scores_n[ids].numpy())))
    kept = torch.zeros(len(ids), dtype=torch.bool)
    for k in workers.unique().tolist():
        mine = order[workers[order] == k]
        count = round(ratio * len(mine)) if scope == "worker" else 1
        if count == 0:
            raise UsageError(
                f"--train_ratio {ratio} would leave worker {k} ({len(mine)} samples) with nothing: keep at "
                f"least {1 / len(mine):.2g}, or use --prune_scope global."
            )
        kept[mine[:count]] = True
    if scope == "global":
        rest = order[~kept[order]]
        kept[rest[: max(0, round(ratio * len(ids)) - int(kept.sum()))]] = True
    return ids[kept]
