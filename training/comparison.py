"""What a pruning was worth: stage 2 against stage 1, and against a random pruning of the same size.

    results/<run_name>/comparison_<method>_<ratio>.json    each pruning; comparison.json: the last one

Legend: m test samples, S seeds.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from data.task import Task
from training.pruning import Stage1, manner, run_stage2
from utils.errors import UsageError
from utils.influence.statistics import paired_interval
from utils.progress import within
from utils.records import figure_of, metric_of, pruned_by, read_predictions, read_result, shown, spelled, write_json

Interval = tuple[float, float, float]  # mean, and the ends of its 95 % interval (NaN where it is not known)
RESAMPLES = 200  # of the test samples, for metrics that are no means over samples


def prune(
    stage1: Stage1, method: str, ratio: float, reuse: bool = False, shares: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Stage 2, its random control (``--no-control``: without), and what they say; writes the comparison.

    Returns the record, with ``verdict`` in words; ``shares``: how the ratio was chosen, for the record.
    """
    summary_random = random_dir = None
    if stage1.config.control and method not in ("random", "noprune") and ratio < 1:
        try:  # first, so that one which is refused costs nothing
            with within("random control"):
                summary_random, random_dir = run_stage2(stage1, "random", ratio, reuse=True)
        except UsageError as error:
            raise UsageError(f"{error} (That run is the random control: --no-control does without.)") from error
    with within("stage 2"):
        summary, run_dir = run_stage2(stage1, method, ratio, reuse)
    task = stage1.job.dataset.task
    keys = (f"test_{task.metric.name}", "test_loss", "consensus_distance", "seconds")
    record = {
        "algorithm": method,
        "ratio": 1.0 if method == "noprune" else ratio,
        **manner(stage1.config, method),
        "seed": stage1.config.seed,
        "shares": shares,
        "runs": {
            "stage1": [stage1.run_dir.name],
            "stage2": [run_dir.name],
            "control": random_dir and [random_dir.name],
        },
        "stage1": stage1.summary,
        "stage2": summary,
        "control": summary_random,
        "difference": {k: difference(summary[k], stage1.summary[k]) for k in keys},
        "over_stage1": of_one_run(task, run_dir, stage1.run_dir),
        "over_random": random_dir and of_one_run(task, run_dir, random_dir),
    }
    metric = vars(task.metric)
    record["verdict"] = verdict(method, metric, record["over_stage1"], record["over_random"], "of the test samples")
    write_comparison(stage1.folder, run_dir, record)
    return record


def comparison_said(record: dict[str, Any], folder: Path) -> str:
    """The record as a line or two."""
    metric, what = metric_of(record["stage1"]), f"({named(record)})"
    before, after = (shown(figure_of(record[stage]), metric) for stage in ("stage1", "stage2"))
    said = f"test {spelled(metric['name'])} {before} in stage 1, {after} in stage 2 {what}; {folder}"
    return "\n".join(filter(None, (said, record["verdict"])))


def named(record: dict[str, Any]) -> str:
    """The pruning of a record in words."""
    return f"{pruned_by(record)}, {record['ratio']:.4g} kept"


def write_comparison(folder: Path, run_dir: Path, record: dict[str, Any]) -> None:
    """The record of the stage 2 in ``run_dir``, under its name and as the last one."""
    write_json(folder / f"{comparison_name(run_dir)}.json", record)
    write_json(folder / "comparison.json", record)


def comparison_name(run_dir: Path) -> str:
    """How the files of a stage 2's comparison are called, without their endings."""
    return f"comparison_{run_dir.name.removeprefix('stage2_')}"


def difference(a: float | None, b: float | None) -> float | None:
    """a - b; None where a figure is missing (a loss that is not finite)."""
    return None if a is None or b is None else a - b


def of_one_run(task: Task, run_dir: Path, other_dir: Path) -> Interval | None:
    """The first metric of one run minus that of another, with an interval over the test samples; None where a run did
    not record its predictions (an older version made it), and with a warning where they are damaged."""
    if not all((folder / "predictions.npz").exists() for folder in (run_dir, other_dir)):
        return None
    try:
        (targets_m, a_m), (others_m, b_m) = own_predictions(task, run_dir), own_predictions(task, other_dir)
    except UsageError as error:
        warnings.warn(f"no interval: {error}", stacklevel=2)
        return None
    if not np.array_equal(targets_m, others_m, equal_nan=targets_m.dtype.kind == "f"):
        return None
    if (hits_m := task.hits(a_m, targets_m)) is not None:
        return paired_interval(hits_m, task.hits(b_m, targets_m))
    draws = np.random.default_rng(0).integers(len(targets_m), size=(RESAMPLES, len(targets_m)))
    changes = [task.score(a_m[i], targets_m[i]) - task.score(b_m[i], targets_m[i]) for i in draws]
    mean, half = task.score(a_m, targets_m) - task.score(b_m, targets_m), 1.96 * float(np.std(changes, ddof=1))
    return mean, mean - half, mean + half


def own_predictions(task: Task, run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The test samples' targets [m, ...] and a run's predictions [m, ...]. Raises :class:`UsageError` where they are
    not those of its summary."""
    targets_m, predicted_m = read_predictions(run_dir)
    said = figure_of(read_result(run_dir))
    try:
        fits = len(targets_m) > 0 and np.isclose(task.score(predicted_m, targets_m), said, rtol=1e-4, atol=1e-6)
    except (ValueError, IndexError, TypeError):  # of another shape
        fits = False
    if not fits:
        raise UsageError(f"{run_dir / 'predictions.npz'} does not have the {task.metric.name} of the run's summary.")
    return targets_m, predicted_m


def verdict(
    method: str, metric: dict[str, Any], over_stage1: Interval | None, over_random: Interval | None, scope: str
) -> str | None:
    """Both differences in words; ``scope``: what the intervals cover."""
    parts = []
    if over_random is not None:
        said = f"{method} {_word(over_random, metric)} random pruning of the same size"
        parts.append(f"{said} ({points(over_random, metric)})")
    if over_stage1 is not None:
        parts.append(f"stage 2 {_word(over_stage1, metric)} stage 1 ({points(over_stage1, metric)})")
    return f"{'; '.join(parts)}; 95 % intervals {scope}" if parts else None


def _word(interval: Interval, metric: dict[str, Any]) -> str:
    _, low, high = interval
    if not low > 0 and not high < 0:
        return "cannot be told from"
    return "is better than" if (low > 0) == metric["higher_is_better"] else "is worse than"


def points(interval: Interval, metric: dict[str, Any]) -> str:
    """A difference and its interval: of accuracies in percentage points."""
    factor, digits, unit = (100, 1, "points") if metric["name"] == "accuracy" else (1, 3, metric["unit"])
    mean, low, high = (factor * value for value in interval)
    unit = unit or spelled(metric["name"])
    ends = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if math.isfinite(low) else ""
    return f"{mean:+.{digits}f} {unit}{ends}"
