"""Records as the pictures need them, every value checked: a damaged file is one line of text, never a traceback.

``null`` in a record stands for a figure that was not finite and comes back as NaN; where a picture cannot
do without the figure, it counts as damage.
Legend: N workers, n samples, M groups of the audit, R ratios, E edges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UsageError
from utils.records import ACCURACY as UNNAMED
from utils.records import PathLike, Run, read_json, read_labels, read_partition, read_predictions
from visualization.measures import ACCURACY, Measure, Shown, shown_of

LARGEST = 1e200  # figures beyond it are as good as infinite: the margins of a plot would overflow
BEYOND = 2**53  # whole numbers from here on are not exact in float64

CURVES = ("epoch", "train_loss", "val_loss", "consensus_val_loss", "consensus_distance", "virtual_seconds", "bytes")
UNSCORED = ("random", "noprune")  # ways of pruning in which no score has a say
STAGES = ("stage1", "stage2", "control")  # of a pruning


def damaged(path: PathLike, reason: str) -> UsageError:
    """The error for a record that cannot be drawn."""
    return UsageError(f"{path} is damaged ({reason}); restore it, or have it written again with --overwrite")


class Record:
    """A JSON object whose values are asked for by key and kind.

    Every question raises UsageError where the value is missing or of another kind; ``name`` is the
    object's place in the file, for the message.
    """

    def __init__(self, path: PathLike, values: Any, name: str = "") -> None:
        self.path, self.name = path, name
        if not isinstance(values, dict):
            raise damaged(path, f"{name or 'it'} is no JSON object")
        self.values: dict[str, Any] = values

    def has(self, key: str) -> bool:
        """Whether there is a value other than null."""
        return self.values.get(key) is not None

    def text(self, key: str) -> str:
        """A text."""
        return self._expect(isinstance(self._value(key), str), key, "no text")

    def count(self, key: str, least: int = 0) -> int:
        """A whole number, ``least`` or more."""
        value = self._value(key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        return self._expect(whole and least <= value < BEYOND, key, f"no whole number from {least} on")

    def number(self, key: str, known: bool = True) -> float:
        """A number; with ``known=False`` null is one, NaN."""
        number_1 = _numbers([self._value(key)])
        fits = number_1 is not None and not (known and np.isnan(number_1[0]))
        self._expect(fits, key, "no number")
        return float(number_1[0])

    def numbers(self, key: str, length: int | None = None, known: bool = False, least: float = -np.inf) -> np.ndarray:
        """A list of numbers (float64), of this length if one is given; null is NaN unless all must be ``known``."""
        numbers_k = _numbers(self._value(key))
        fits = numbers_k is not None and not (numbers_k < least).any() and not (known and np.isnan(numbers_k).any())
        self._expect(fits, key, "no list of numbers" + f" from {least} on" * (least > -np.inf))
        self._expect(length in (None, len(numbers_k)), key, f"not of length {length}")
        return numbers_k

    def table(self, key: str, size: int) -> np.ndarray:
        """As many lists of numbers as each has numbers (float64 [size, size])."""
        rows = self._value(key)
        rows = [_numbers(row) for row in rows] if isinstance(rows, list) else []
        fits = len(rows) == size and all(row is not None and len(row) == size for row in rows)
        self._expect(fits, key, f"no table of {size} x {size} numbers")
        return np.array(rows)

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        values = self._value(key)
        fits = isinstance(values, list) and all(isinstance(value, str) for value in values)
        return self._expect(fits, key, "no list of texts")

    def indices(self, key: str, below: int = BEYOND) -> np.ndarray:
        """A list of whole numbers from 0 on (int64), all under ``below``."""
        numbers_k = self.numbers(key, known=True)
        fits = ((numbers_k >= 0) & (numbers_k < below) & (numbers_k == np.floor(numbers_k))).all()
        self._expect(bool(fits), key, f"no list of whole numbers from 0 to {below - 1}")
        return numbers_k.astype(np.int64)

    def part(self, key: str) -> Record:
        """A JSON object in this one."""
        return Record(self.path, self._value(key), self._name(key))

    def parts(self, key: str) -> list[Record]:
        """A list of JSON objects."""
        values = self._value(key)
        self._expect(isinstance(values, list), key, "no list")
        return [Record(self.path, value, f"{self._name(key)}[{k}]") for k, value in enumerate(values)]

    def _value(self, key: str) -> Any:
        if key not in self.values:
            raise damaged(self.path, f"{self.name or 'it'} has no '{key}'")
        return self.values[key]

    def _expect(self, fits: bool, key: str, otherwise: str) -> Any:
        if not fits:
            raise damaged(self.path, f"{self._name(key)} is {otherwise}")
        return self.values[key]

    def _name(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def _numbers(values: Any) -> np.ndarray | None:
    """A list of numbers and nulls as float64, what is not finite as NaN; None where it is something else."""
    if not isinstance(values, list):
        return None
    try:
        array = np.array([np.nan if value is None else value for value in values])
    except (ValueError, OverflowError):  # lists in the list
        return None
    if array.ndim != 1 or array.dtype.kind not in "iuf":  # text, truth values, objects, numbers of over 64 bits
        return None
    array = array.astype(np.float64)
    return np.where(np.abs(array) <= LARGEST, array, np.nan)


# ---- a stage directory --------------------------------------------------------------------------


def load_shown(run_dir: PathLike) -> Shown:
    """What pictures of a stage show: as config.json says, or summary.json, or, of older runs, accuracy."""
    path = Path(run_dir, "config.json")
    record = Record(path, read_json(path)) if path.is_file() else None
    if record is not None and record.has("task"):
        task = record.part("task")
        metrics = task.parts("metrics")
        if not metrics:
            raise damaged(path, "task.metrics is empty")
        return shown_of(task.text("kind"), _measure(metrics[0]), tuple(task.texts("names")))
    path = Path(run_dir, "summary.json")
    metric = metric_in(Record(path, read_json(path))) if path.is_file() else ACCURACY
    return Shown() if metric == ACCURACY else shown_of("", metric)


def metric_in(record: Record) -> Measure:
    """The metric that a record names; accuracy, if it names none."""
    return _measure(record.part("metric")) if record.has("metric") else ACCURACY


def _measure(record: Record) -> Measure:
    higher = record.values.get("higher_is_better")
    if set(record.values) != set(UNNAMED) or not isinstance(higher, bool):
        raise damaged(record.path, f"{record.name} is no name, higher_is_better (true or false) and unit")
    return Measure(record.text("name"), higher, record.text("unit"))


def load_lines(run_dir: PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with the curves that pictures show; what is not finite is None or, in the
    lists by worker, NaN."""
    path, workers, name = Path(run_dir, "metrics.jsonl"), None, load_shown(run_dir).metric.name
    curves = (*CURVES, f"val_{name}", f"consensus_val_{name}")
    lines = []
    for k, values in enumerate(Run(run_dir).metrics, start=1):
        record = Record(path, values, f"line {k}")
        line: dict[str, Any] = {"round": record.number("round")}
        for key in filter(record.has, curves):
            value = record.number(key, known=False)
            line[key] = None if np.isnan(value) else value
        for key in filter(record.has, ("worker_val_loss", f"worker_val_{name}")):
            values_N = record.numbers(key, workers)
            workers = len(values_N)
            line[key] = values_N.tolist()
        lines.append(line)
    return lines


def load_summary(run_dir: PathLike) -> dict[str, Any]:
    """Of summary.json the figures that pictures show: ``test_<metric>``, ``test_loss``, ``worker_test_<metric>`` [N],
    ``finetune`` and ``auroc`` (by finding; NaN: not known), each None where the stage has none."""
    path = Path(run_dir, "summary.json")
    record = Record(path, read_json(path))
    of_model, of_workers = (f"{who}_{load_shown(run_dir).metric.name}" for who in ("test", "worker_test"))
    areas = record.part("test_auroc_by_class") if record.has("test_auroc_by_class") else None
    return {
        of_model: record.number(of_model) if record.has(of_model) else None,
        "test_loss": record.number("test_loss") if record.has("test_loss") else None,
        of_workers: record.numbers(of_workers) if record.has(of_workers) else None,
        "finetune": _finetune(record.part("finetune")) if record.has("finetune") else None,
        "auroc": None if areas is None else {name: areas.number(name, known=False) for name in areas.values},
    }


def _finetune(record: Record) -> dict[str, Any]:
    before_N = record.numbers("before")
    return {
        "before": before_N,
        "after": record.numbers("after", len(before_N)),
        "epochs": record.count("epochs"),
        "head_only": bool(record.values.get("head_only")),
    }


def load_right(run_dir: PathLike) -> tuple[int, int] | None:
    """How many test samples the run's model is right on, and of how many; None where predictions.npz is not there."""
    path = Path(run_dir, "predictions.npz")
    if not path.is_file():
        return None
    targets_m, predicted_m = read_predictions(run_dir)
    if targets_m.ndim != 1 or not len(targets_m) or predicted_m.ndim != 1:
        raise damaged(path, "'targets' and 'predicted' must be lists, and not empty")
    return int((targets_m == predicted_m).sum()), len(targets_m)


def load_values(run_dir: PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Of a regression the test targets (float [m, 2, C]: values, and the forecast to beat) and what the run's model
    predicts (float [m, C])."""
    targets_m2C, predicted_mC = (values.astype(np.float64) for values in read_predictions(run_dir))
    if targets_m2C.ndim != 3 or targets_m2C.shape[1] != 2 or targets_m2C[:, 0].shape != predicted_mC.shape:
        raise damaged(Path(run_dir, "predictions.npz"), "'targets' must be [m, 2, C] and 'predicted' [m, C]")
    return targets_m2C, predicted_mC


def was_pruned(run_dir: PathLike) -> bool:
    """Whether scores, and so the validation samples, decided what the run trains on."""
    path = Path(run_dir, "config.json")
    if not path.is_file():
        return False
    record = Record(path, read_json(path))
    return record.has("pruning") and record.part("pruning").values.get("algorithm") not in UNSCORED


def load_topology(run_dir: PathLike) -> dict[str, Any]:
    """The graph of topology.json: its matrices by receiver, sender and weight [E]."""
    path = Path(run_dir, "topology.json")
    record = Record(path, read_json(path))
    workers, matrices = record.count("num_workers", least=1), []
    for matrix in record.parts("matrices"):
        receiver_E = matrix.indices("receiver", below=workers)
        if len(np.unique(receiver_E)) < workers:
            raise damaged(path, f"{matrix.name} has no row for some of the {workers} workers")
        sender_E = matrix.indices("sender", below=workers)
        weight_E = matrix.numbers("weight", known=True)
        if not len(receiver_E) == len(sender_E) == len(weight_E):
            raise damaged(path, f"the lists of {matrix.name} differ in length")
        matrices.append({"receiver": receiver_E, "sender": sender_E, "weight": weight_E})
    if not matrices:
        raise damaged(path, "it has no matrix")
    gap = record.number("spectral_gap") if record.has("spectral_gap") else None
    return {"mode": record.text("mode"), "num_workers": workers, "matrices": matrices, "spectral_gap": gap}


def load_partition(run_dir: PathLike, samples: int) -> list[np.ndarray]:
    """The sample ids of each worker, all of them among the data set's ``samples``."""
    path, shards = Path(run_dir, "partition.npz"), read_partition(run_dir)
    if not shards:
        raise damaged(path, "it holds no worker")
    if any(ids.ndim != 1 or ids.dtype.kind != "i" or ids.min(initial=0) < 0 for ids in shards):
        raise damaged(path, "sample ids must be whole numbers from 0 on")
    largest = max(int(ids.max(initial=-1)) for ids in shards)
    if largest >= samples:
        raise UsageError(
            f"partition.npz names sample {largest}, labels.npz ends at {samples - 1}: "
            "they are of different runs; restore one of them"
        )
    return shards


def load_labels(run_dir: PathLike) -> tuple[np.ndarray, list[str]]:
    """The label of each sample id (int64 [n]) and a name for each class that occurs."""
    path, (labels_n, names) = Path(run_dir, "labels.npz"), read_labels(run_dir)
    if labels_n.ndim != 1 or labels_n.dtype.kind != "i" or labels_n.min(initial=0) < 0:
        raise damaged(path, "labels must be whole numbers from 0 on")
    if labels_n.max(initial=0) >= len(names):
        raise damaged(path, f"label {labels_n.max(initial=0)} has no class name")
    return labels_n, names


# ---- influence ----------------------------------------------------------------------------------


def load_corruption(run_dir: PathLike) -> dict[str, Any]:
    """What was made bad on purpose: ``flipped`` sample ids and ``bad_workers``; empty if nothing was."""
    path = Path(run_dir, "corruption.json")
    if not path.exists():
        return {"flipped": [], "bad_workers": []}
    record = Record(path, read_json(path))
    return {key: record.indices(key).tolist() for key in ("flipped", "bad_workers")}


def load_node_view(path: PathLike) -> dict[str, Any]:
    """``node_view_<algorithm>.json``; ``table`` is float64 [N, N] or None."""
    record = Record(path, read_json(path))
    influence_N = record.numbers("worker_influence")
    workers = len(influence_N)
    return {
        "algorithm": record.text("algorithm"),
        "worker_influence": influence_N,
        "bad_workers": record.indices("bad_workers", below=workers).tolist() if record.has("bad_workers") else [],
        "hops": record.count("hops") if record.has("hops") else 1,
        "table": record.table("table", workers) if record.has("table") else None,
    }


def load_audit(folder: PathLike) -> dict[str, Any]:
    """audit.json: ``actual`` [M], and ``predicted`` [M], ``lds`` and ``interval`` of each method (NaN: undefined)."""
    path = Path(folder, "audit.json")
    record = Record(path, read_json(path))
    parts, actual_M, methods = record.part("methods"), record.numbers("actual"), {}
    for name in parts.values:
        method = parts.part(name)
        methods[name] = {
            "predicted": method.numbers("predicted", len(actual_M)),
            "lds": method.number("lds", known=False),
            "interval": method.numbers("interval", 2).tolist() if method.has("interval") else None,
        }
    target, fraction = record.text("target"), record.number("fraction")
    return {"target": target, "fraction": fraction, "actual": actual_M, "methods": methods}


def load_comparison(path: PathLike) -> dict[str, Any]:
    """comparison_<method>_<ratio>.json, of one run or over seeds.

    ``runs`` and ``figures``: for ``stage1``, ``stage2`` and ``control`` (None: there is none) the stage directories
    and their figures of the ``metric`` on the test set, a list with an entry a seed. ``over_stage1``, ``over_random``:
    mean and ends of the interval (NaN: not known), or None.
    """
    record, folder = Record(path, read_json(path)), Path(path).parent
    several = record.has("seeds")
    seeds = record.count("seeds", least=1) if several else 1
    runs, figures = record.part("runs"), {}
    metric = metric_in(record if several or not record.has("stage1") else record.part("stage1"))
    dirs = {name: [folder / run for run in runs.texts(name)] if runs.has(name) else None for name in STAGES}
    for name, there in dirs.items():
        if there is not None and len(there) != seeds:
            raise damaged(path, f"runs.{name} is not of length {seeds}")
        key = f"{name}_test_{metric.name}" if several else name
        part = record.part(key) if there is not None and record.has(key) else None
        if part is None:
            figures[name] = None
        elif several:
            figures[name] = part.numbers("values", seeds)
        else:
            figures[name] = np.array([part.number(f"test_{metric.name}", known=False)])
    if figures["stage1"] is None or figures["stage2"] is None:
        raise damaged(path, f"it has no test {metric.words} of stage 1 or stage 2")
    over = {key: record.numbers(key, 3) if record.has(key) else None for key in ("over_stage1", "over_random")}
    return {
        "algorithm": record.text("algorithm"),
        "ratio": record.number("ratio"),
        **{key: record.count(key, least=1) if record.has(key) else 1 for key in ("steps", "folds")},
        "seeds": seeds,
        "runs": dirs,
        "metric": metric,
        "figures": figures,
        "verdict": record.text("verdict") if record.has("verdict") else None,
        **over,
    }


def load_sweep(folder: PathLike) -> dict[str, Any]:
    """sweep.json: ``ratios`` [R], the test figures [R] (of the ``metric``) of each method and that of stage 1, their
    standard deviations over ``seeds`` seeds (None: not known)."""
    path = Path(folder, "sweep.json")
    record = Record(path, read_json(path))
    ratio_R, parts, stage1 = record.numbers("ratios", known=True), record.part("methods"), record.part("stage1")
    metric = metric_in(record)
    key, methods = f"test_{metric.name}", {}
    for name in parts.values:
        method = parts.part(name)
        known = method.has(f"{key}_std")
        methods[name] = {
            key: method.numbers(key, len(ratio_R)),
            f"{key}_std": method.numbers(f"{key}_std", len(ratio_R), least=0) if known else None,
        }
    known = stage1.has(f"{key}_std")
    full = {
        key: stage1.number(key),
        f"{key}_std": stage1.number(f"{key}_std") if known else None,
    }
    seeds = record.count("seeds", least=1) if record.has("seeds") else None
    return {"ratios": ratio_R, "methods": methods, "stage1": full, "metric": metric, "seeds": seeds}
