"""Sections on influence: scores, whether they can be believed, what pruning by them was worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.records import read_json
from visualization.checked import Record, load_sweep
from visualization.comparison_plots import comparisons_of, prunings
from visualization.measures import Measure
from visualization.report.parts import Cell, Table, number
from visualization.report.records import Records, pictures
from visualization.samples import load_rows

EXTREMES = 12  # samples of each end in a table


def scores(run: Records) -> list[Any]:
    """How scores are spread, and the samples at both ends, of each method that was looked at."""
    parts: list[Any] = []
    for method in run.scored:
        drawn = pictures(run.folder, f"scores_{method}", f"extremes_{method}")
        if not drawn:
            continue  # scored for an audit or a sweep alone
        if not all((run.stage / name).is_file() for name in ("labels.npz", "partition.npz")):
            parts += drawn  # an old run, which does not say whose samples are what
            continue
        rows = [row for row in load_rows(run.stage, method) if np.isfinite(row.score)]
        rows.sort(key=lambda row: row.score)
        flipped, parts = set(run.bad["flipped"]), parts + drawn
        for title, chosen in (
            (f"{method}: the samples that harmed most", rows[:EXTREMES]),
            (f"{method}: the samples that helped most", rows[: -EXTREMES - 1 : -1]),
        ):
            head = ["sample", "score", "worker", run.shown.group, "where it lies"]
            table = [
                [Cell(str(row.id), row.id), number(row.score, "+.3g"), _owner(row.owner), row.label, row.source]
                + ([("flipped label" if row.id in flipped else "")] if flipped else [])
                for row in chosen
            ]
            parts.append(Table(title, head + ["made bad"] * bool(flipped), table))
    return parts


def _owner(text: str) -> Cell:
    """A worker by its number, which its name begins with."""
    return Cell(text, float(text.split()[0]))


def belief(run: Records) -> list[Any]:
    """The audit: LDS, its picture, and whether wrong labels were found."""
    if run.audit is None:
        return []
    rows = []
    for name, method in run.audit["methods"].items():
        low, high = method["interval"] or (np.nan, np.nan)
        rows.append([name, number(method["lds"], ".3f"), number(low, ".3f"), number(high, ".3f")])
    table = Table(
        f"Rank correlation of predicted and actual change over {len(run.audit['actual'])} retrainings, each "
        f"without {100 * run.audit['fraction']:.3g}% of the samples (LDS)",
        ["method", "LDS", "from", "to (95 %)"], rows,
    )  # fmt: skip
    return [table, *pictures(run.folder, "audit"), *detection(run)]


def detection(run: Records) -> list[Table]:
    """How many of the flipped labels each method has among its lowest scores."""
    found = run.audit_file.get("mislabel") or {}
    rows = [
        [name, number(one["auroc"], ".3f"), *(number(one[key], ".0%") for key in ("found_10", "found_20"))]
        for name, one in found.items()
    ]
    head = ["method", "AUROC", "among the lowest 10 %", "20 %"]
    return [Table("Do they find the flipped labels?", head, rows)] if rows else []


def pruned(folder: Path, comparisons: Sequence[dict[str, Any]], metric: Measure) -> list[Any]:
    """The prunings of a run, or of its seeds, against their random controls, and sweeps."""
    parts: list[Any] = []
    if comparisons:
        for path in comparisons_of(folder):
            parts += shares(path)
        rows = []
        for row in prunings(comparisons):
            ends = row.final.ends or (np.nan, np.nan)
            over = [_difference(values, metric) for values in (row.over_random, row.over_stage1)]
            figure = Cell(metric.text(row.final.mean), row.final.mean)
            rows.append([row.name, figure, _ends(ends, metric), *over])
        head = ["run", f"test {metric.words}", "interval", "minus random of its size", "minus stage 1"]
        parts.append(Table("Pruned, retrained, compared", head, rows))
        parts += pictures(folder, *(["comparison"] if len(comparisons) > 1 else []))
        for path in comparisons_of(folder):
            parts += pictures(folder, path.stem)
    if (folder / "sweep.json").is_file():
        sweep, key = load_sweep(folder), f"test_{metric.name}"
        head = ["method", *(f"{ratio:.0%} kept" for ratio in sweep["ratios"])]
        rows = [
            [name, *(Cell(metric.text(v), float(v)) for v in method[key])]
            for name, method in sweep["methods"].items()
        ]
        parts += [Table(f"Test {metric.words} by the share kept", head, rows)]
        parts += pictures(folder, "sweep")
    return parts


def shares(path: Path) -> list[Table]:
    """How held-out parts of the validation set judged the shares that a comparison could have kept."""
    record = Record(path, read_json(path))
    if not record.has("shares"):
        return []
    record, rows = record.part("shares"), []
    chosen, parts = record.number("chosen"), record.count("folds")
    for row in record.parts("shares"):
        share, (low, high) = row.number("share"), row.numbers("interval", 2)
        figures = [number(value, "+.4f") for value in (row.number("change", known=False), low, high)]
        rows.append([number(share, ".4g"), *figures, "chosen" if share == chosen else ""])
    title = f"Shares to keep by {record.text('algorithm')}, judged by {parts} parts of the validation set, each of "
    title += "which had no say in what it judged" + (": none lowers their loss, all are kept" if chosen == 1 else "")
    return [Table(title, ["kept", "change of their loss", "from", "to (95 %)", ""], rows)]


def _difference(values: np.ndarray | None, metric: Measure) -> Cell:
    """A difference with its interval; accuracies in points."""
    if values is None or not np.isfinite(values[0]):
        return Cell("–")
    factor, digits = (100, 1) if metric.is_accuracy else (1, 3)
    mean, low, high = (factor * float(value) for value in values)
    ends = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if np.isfinite(low) else ""
    return Cell(f"{mean:+.{digits}f}{ends}".replace("-", "−"), mean)


def _ends(ends: tuple[float, float], metric: Measure) -> Cell:
    return Cell(" to ".join(metric.text(end) for end in ends), ends[0]) if np.isfinite(ends[0]) else Cell("–")
