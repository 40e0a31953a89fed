"""Reading and writing a run directory: JSON, metrics lines, the partition, the labels.

Everything is replaced atomically, so a kill or a full disk leaves the previous content, and nothing
is ever unpickled. Files of one stage directory: config.json, metrics.jsonl, summary.json,
partition.npz, labels.npz (optional), sources.txt (not in old runs), topology.json.
Legend: N workers, n samples.
"""

from __future__ import annotations

import io
import json
import math
import os
import reprlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.errors import UsageError
from utils.files import PathLike, parse_json, read_bytes, replaced

NUMBER, MAYBE = (int, float), (int, float, type(None))
RESULT = {
    "test_loss": MAYBE,
    "consensus_distance": MAYBE,
    "epochs": NUMBER,
    "rounds": (int,),
    "seconds": NUMBER,
    "stopped_early": (bool,),
}


def write_atomically(path: PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by what ``write(file)`` writes (see :func:`utils.files.replaced`).

    Raises UsageError where the disk refuses (full, read-only, no permission); the old content stays.
    """
    try:
        with replaced(path) as temporary, open(temporary, "wb") as file:
            write(file)
    except OSError as error:
        raise _cannot_write(Path(path), error) from error


def write_json(path: PathLike, obj: Any) -> None:
    """Write ``obj`` as strict JSON, atomically: floats exact to the bit, NaN and infinity as null.

    Besides JSON's own types it takes numpy arrays and scalars, tensors and paths. The top level gets
    a line for each key: readable, and lists of a million weights stay fast and on one line.
    """
    obj = strict_json(obj)
    if isinstance(obj, dict) and obj:
        items = (json.dumps({key: value}, allow_nan=False)[1:-1] for key, value in obj.items())
        text = "{\n  " + ",\n  ".join(items) + "\n}"
    else:
        text = json.dumps(obj, allow_nan=False)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


def read_json(path: PathLike) -> dict[str, Any]:
    """The JSON object in a file. Raises UsageError where it is missing, damaged or something else."""
    data = _read_bytes(path)
    try:
        record = parse_json(data)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(record, dict):
        raise _damaged(path, "it is not a JSON object")
    return record


class MetricsLog:
    """metrics.jsonl: one JSON object a line, in the order of the rounds.

    A line counts once its newline is there: what a kill tore off is neither read nor kept.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)

    def append(self, *lines: dict[str, Any]) -> None:
        """Add lines and flush them. If the disk refuses: UsageError, and what was there before stays."""
        data = "".join(json.dumps(strict_json(line), allow_nan=False) + "\n" for line in lines).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+", buffering=0) as file:
                end = _end_of_last_line(file)
                file.truncate(end)
                try:
                    if file.write(data) != len(data):
                        raise OSError("only a part of the line could be written")
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def read(self) -> list[dict[str, Any]]:
        """All complete lines. Raises UsageError where the file is missing or damaged before its last line."""
        return [line for line, _ in self._lines()]

    def cut_after(self, round: int) -> None:
        """Drop the lines later than ``round`` and a torn last line, atomically; the rest keeps its bytes."""
        if not self.path.exists():
            return
        data = b"".join(raw for line, raw in self._lines() if line["round"] <= round)
        if len(data) != self.path.stat().st_size:
            write_atomically(self.path, lambda file: file.write(data))

    def _lines(self) -> list[tuple[dict[str, Any], bytes]]:
        """Each complete line, parsed and as its bytes."""
        raw_lines = _read_bytes(self.path).splitlines(keepends=True)
        lines = []
        for number, raw in enumerate(raw_lines, start=1):
            try:
                line = parse_json(raw)
                complete = raw.endswith(b"\n") and isinstance(line, dict) and type(line.get("round")) is int
            except ValueError:
                complete = False
            if complete:
                lines.append((line, raw))
            elif number < len(raw_lines):
                raise _damaged(self.path, f"line {number} is not a JSON object with a whole 'round'")
        return lines


def read_metrics(run_dir: PathLike) -> list[dict[str, Any]]:
    """The lines of a stage directory's metrics.jsonl (one a logged round)."""
    return MetricsLog(Path(run_dir, "metrics.jsonl")).read()


def read_summary(run_dir: PathLike) -> dict[str, Any]:
    """The final figures of a stage (summary.json)."""
    return read_json(Path(run_dir, "summary.json"))


def read_result(run_dir: PathLike) -> dict[str, Any]:
    """summary.json of a finished run. Raises UsageError where a figure that others are compared with is missing or
    is none (a loss and a distance may be null: they were not finite)."""
    path = Path(run_dir, "summary.json")
    record = read_record(path, *RESULT)
    metric = metric_of(record)
    if not isinstance(metric, dict) or set(metric) != set(ACCURACY):
        raise _damaged(path, "its 'metric' is none")
    figures = RESULT | {f"test_{metric['name']}": NUMBER}
    absent = figures.keys() - record.keys()
    if absent:
        raise _damaged(path, f"it has no '{min(absent)}'")
    for name, kinds in figures.items():
        if type(record[name]) not in kinds:
            raise _damaged(path, f"'{name}' is {reprlib.repr(record[name])}")
    return record


SPELLED = {"rmse": "RMSE", "mae": "MAE", "macro_auroc": "macro AUROC"}  # others are their words
ACCURACY = {"name": "accuracy", "higher_is_better": True, "unit": ""}  # of runs that do not name their metric


def metric_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The metric that a summary shows first: its name, whether higher is better, its unit."""
    return summary.get("metric") or ACCURACY


def figure_of(summary: dict[str, Any]) -> float | None:
    """That metric of the run's model on the test set."""
    return summary[f"test_{metric_of(summary)['name']}"]


def pruned_by(pruning: dict[str, Any]) -> str:
    """What pruned, in words, from the record of a pruning: a method, and how where that is not at once."""
    steps, folds = pruning.get("steps", 1), pruning.get("folds", 1)
    how = (f" in {steps} steps" if steps > 1 else "") + (f" by {folds} folds" if folds > 1 else "")
    return pruning["algorithm"] + how


def privacy_said(found: dict[str, Any]) -> str:
    """A line on what a private run came to, from the ``privacy`` of its summary."""
    if found["epsilon"] is None:
        return f"privacy: none, gradients were only clipped to {found['clip']:g}"
    return (
        f"privacy: epsilon {found['epsilon']:.3g} at delta {found['delta']:.2g} for the samples of worker "
        f"{found['worker']}, the least protected (noise {found['noise']:g}, clip {found['clip']:g})"
    )


def spelled(name: str) -> str:
    """What texts call a metric."""
    return SPELLED.get(name) or name.replace("_", " ")


def shown(value: float, metric: dict[str, Any]) -> str:
    """A figure with its unit."""
    return f"{value:.4f} {metric['unit']}".rstrip()


def read_topology(run_dir: PathLike) -> dict[str, Any]:
    """The graph and its mixing matrices (topology.json; row = receiver)."""
    return read_record(Path(run_dir, "topology.json"), "mode", "num_workers", "matrices")


def write_partition(run_dir: PathLike, shards: Sequence[np.ndarray]) -> None:
    """Write the sample ids of each worker (N integer arrays) as partition.npz."""
    arrays = {f"worker_{k:04d}": np.asarray(ids, dtype=np.int64) for k, ids in enumerate(shards)}
    _write_npz(Path(run_dir, "partition.npz"), arrays)


def read_partition(run_dir: PathLike) -> list[np.ndarray]:
    """The sample ids of each worker: N int64 arrays, worker 0 first."""
    path = Path(run_dir, "partition.npz")
    arrays = _read_npz(path)
    return [_list_of(np.int64, path, arrays, f"worker_{k:04d}") for k in range(len(arrays))]


def write_labels(run_dir: PathLike, labels_n: np.ndarray, class_names: Sequence[str]) -> None:
    """Write the train labels by sample id, and the names of the classes, as labels.npz."""
    labels_n, names = np.asarray(labels_n, dtype=np.int64), np.array(list(class_names), dtype=str)
    _write_npz(Path(run_dir, "labels.npz"), {"labels": labels_n, "class_names": names})


def read_labels(run_dir: PathLike) -> tuple[np.ndarray, list[str]]:
    """The label of each train sample id (int64 [n]) and the names of the classes."""
    path = Path(run_dir, "labels.npz")
    arrays = _read_npz(path)
    names = _list_of(np.str_, path, arrays, "class_names")
    return _list_of(np.int64, path, arrays, "labels"), names.tolist()


def write_sources(run_dir: PathLike, sources: Sequence[str]) -> None:
    """Write where each train sample lies (its file, say) as sources.txt: a line a sample, in the order of their ids."""
    text = "".join(f"{source}\n" for source in sources)
    write_atomically(Path(run_dir, "sources.txt"), lambda file: file.write(text.encode()))


def read_sources(run_dir: PathLike) -> list[str] | None:
    """Where each train sample lies, by sample id [n]; None for a run that does not record it."""
    path = Path(run_dir, "sources.txt")
    if not path.is_file():
        return None
    try:
        return _read_bytes(path).decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is no UTF-8 text") from error


def write_confusion(run_dir: PathLike, counts_CC: np.ndarray, class_names: Sequence[str]) -> None:
    """Write how often each true class (row) was taken for each class (column), and their names, as confusion.npz."""
    counts_CC, names = np.asarray(counts_CC, dtype=np.int64), np.array(list(class_names), dtype=str)
    _write_npz(Path(run_dir, "confusion.npz"), {"counts": counts_CC, "class_names": names})


def read_confusion(run_dir: PathLike) -> tuple[np.ndarray, list[str]]:
    """The confusion matrix on the test set (int64 [C, C], row = true class) and the names of the classes."""
    path = Path(run_dir, "confusion.npz")
    arrays = _read_npz(path)
    if not {"counts", "class_names"} <= arrays.keys():
        raise _damaged(path, "it must hold 'counts' and 'class_names'")
    counts_CC, names = arrays["counts"], arrays["class_names"]
    if names.ndim != 1 or not len(names) or counts_CC.shape != (len(names), len(names)):
        raise _damaged(path, "'counts' must have a row and a column for each of 'class_names'")
    if counts_CC.dtype != np.int64 or (counts_CC < 0).any():
        raise _damaged(path, "'counts' must be whole numbers, none below 0")
    return counts_CC, [str(name) for name in names]


def write_predictions(run_dir: PathLike, targets_m: np.ndarray, predicted_m: np.ndarray) -> None:
    """Write what each test sample is and what the run's model takes it for, as predictions.npz."""
    arrays = {"targets": np.asarray(targets_m), "predicted": np.asarray(predicted_m)}
    _write_npz(Path(run_dir, "predictions.npz"), arrays)


def read_predictions(run_dir: PathLike) -> tuple[np.ndarray, np.ndarray]:
    """The test samples' targets [m] and what the run's model makes of them [m]."""
    path = Path(run_dir, "predictions.npz")
    arrays = _read_npz(path)
    targets_m, predicted_m = (arrays.get(name, np.array("")) for name in ("targets", "predicted"))
    numbers = all(array.ndim > 0 and array.dtype.kind in "iufb" for array in (targets_m, predicted_m))
    if not numbers or len(targets_m) != len(predicted_m):
        raise _damaged(path, "it must hold the numbers 'targets' and 'predicted', of the same length")
    return targets_m, predicted_m


def read_record(path: PathLike, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys. Raises UsageError where it is missing, damaged or has not."""
    record = read_json(path)
    absent = [key for key in keys if key not in record]
    if absent:
        raise _damaged(path, f"it has no '{absent[0]}'")
    return record


class Run:
    """Read-only view of one stage directory; each file is read when first asked for.

    Raises UsageError for a directory that holds no metrics.jsonl, and for a file that is asked for
    and is missing or damaged. ``labels`` is None where the optional labels.npz is not there.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        if not self.has("metrics.jsonl"):
            raise UsageError(f"no metrics.jsonl in {path}; give a stage directory such as results/NAME/stage1")

    def has(self, name: str) -> bool:
        """Whether the directory holds the file ``name``."""
        return (self.path / name).is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    @cached_property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.path)

    @cached_property
    def partition(self) -> list[np.ndarray]:
        return read_partition(self.path)

    @cached_property
    def topology(self) -> dict[str, Any]:
        return read_topology(self.path)

    @cached_property
    def labels(self) -> tuple[np.ndarray, list[str]] | None:
        return read_labels(self.path) if self.has("labels.npz") else None


def strict_json(obj: Any) -> Any:
    """``obj`` in strict JSON's types; what is not finite is null."""
    if isinstance(obj, dict):
        return {key: strict_json(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [strict_json(value) for value in obj]
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if hasattr(obj, "tolist"):  # arrays, numpy scalars, tensors
        return strict_json(obj.tolist())
    return os.fspath(obj) if isinstance(obj, os.PathLike) else obj


def _read_bytes(path: PathLike) -> bytes:
    return read_bytes(path, limit=math.inf)  # a run writes as much as it needs


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()  # a zip archive that fails halfway on a full disk complains again at its end
    np.savez(buffer, **arrays)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    data = _read_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if sum(member.file_size for member in arrays.zip.infolist()) > len(data):
                raise ValueError("it is compressed, and may unpack to any size")
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # damaged zip archives raise half a dozen kinds
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _list_of(kind: type, path: Path, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The one-dimensional array of that kind; damaged where it is missing or another."""
    array = arrays.get(name)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or not np.issubdtype(array.dtype, kind):
        raise _damaged(path, f"'{name}' is missing or is no list of {kind.__name__}")
    return array


def _end_of_last_line(file: BinaryIO) -> int:
    """Position after the last newline; reads backwards, and just one byte of an intact file."""
    end = file.seek(0, os.SEEK_END)
    step = 1
    while end > 0:
        start = max(0, end - step)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end, step = start, 1 << 16
    return 0


def _cannot_write(path: Path, error: OSError) -> UsageError:
    reason = error.strerror or str(error)
    return UsageError(f"cannot write {path}: {reason}; free some space or choose --results_dir")


def _damaged(path: PathLike, reason: str) -> UsageError:
    return UsageError(f"{path} is damaged ({reason}); restore it, or start the run again with --overwrite")
