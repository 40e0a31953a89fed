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

from training.pruning import Stage1, run_stage2
from utils.errors import UsageError
from utils.influence.statistics import paired_interval
from utils.progress import within
from utils.records import read_predictions, read_result, write_json

Interval = tuple[float, float, float]  # mean, and the ends of its 95 % interval (NaN where it is not known)
KEYS = ("test_accuracy", "test_loss", "consensus_distance", "seconds")


def prune(stage1: Stage1, method: str, ratio: float, reuse: bool = False) -> dict[str, Any]:
    """Stage 2, its random control (``--no-control``: without), and what they say; writes the comparison.

    Returns the record, with ``verdict`` in words.
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
    record = {
        "algorithm": method,
        "ratio": 1.0 if method == "noprune" else ratio,
        "stage1": stage1.summary,
        "stage2": summary,
        "control": summary_random,
        "difference": {k: difference(summary[k], stage1.summary[k]) for k in KEYS},
        "over_stage1": of_one_run(run_dir, stage1.run_dir),
        "over_random": random_dir and of_one_run(run_dir, random_dir),
    }
    record["verdict"] = verdict(method, record["over_stage1"], record["over_random"], "of the test samples")
    write_comparison(stage1.folder, run_dir, record)
    return record


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


def of_one_run(run_dir: Path, other_dir: Path) -> Interval | None:
    """Test accuracy of one run minus that of another, with an interval over the test samples; None where a run did
    not record its predictions (an older version made it), and with a warning where they are damaged."""
    if not all((folder / "predictions.npz").exists() for folder in (run_dir, other_dir)):
        return None
    try:
        (targets_m, a_m), (others_m, b_m) = own_predictions(run_dir), own_predictions(other_dir)
    except UsageError as error:
        warnings.warn(f"no interval: {error}", stacklevel=2)
        return None
    if not np.array_equal(targets_m, others_m):
        return None
    return paired_interval(a_m == targets_m, b_m == targets_m)


def own_predictions(run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The test samples' targets [m] and a run's predictions [m]. Raises :class:`UsageError` where they are not those of
    its summary."""
    targets_m, predicted_m = read_predictions(run_dir)
    if not len(targets_m) or abs(np.mean(targets_m == predicted_m) - read_result(run_dir)["test_accuracy"]) > 1e-6:
        raise UsageError(f"{run_dir / 'predictions.npz'} does not have the accuracy of the run's summary.")
    return targets_m, predicted_m


def verdict(method: str, over_stage1: Interval | None, over_random: Interval | None, scope: str) -> str | None:
    """Both differences in words; ``scope``: what the intervals cover."""
    parts = []
    if over_random is not None:
        parts.append(f"{method} {_word(over_random)} random pruning of the same size ({points(over_random)})")
    if over_stage1 is not None:
        parts.append(f"stage 2 {_word(over_stage1)} stage 1 ({points(over_stage1)})")
    return f"{'; '.join(parts)}; 95 % intervals {scope}" if parts else None


def _word(interval: Interval) -> str:
    _, low, high = interval
    return "is better than" if low > 0 else "is worse than" if high < 0 else "cannot be told from"


def points(interval: Interval) -> str:
    """A difference of accuracies and its interval, in percentage points."""
    mean, low, high = (100 * value for value in interval)
    ends = f" [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else ""
    return f"{mean:+.1f} points{ends}"
