"""Sections on a training: curves, costs, data, graph, right and wrong, faults, settings.

Legend: N workers, C classes, T logged rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from utils.records import spelled
from visualization.checked import load_labels, load_partition
from visualization.class_plots import count_classes
from visualization.measures import bytes_text, setting_text
from visualization.report.curves import Line, Panel
from visualization.report.parts import Cell, Table, Text, number
from visualization.report.records import Records, pictures
from visualization.style import series


def curves(run: Records) -> list[Panel]:
    """Metric and loss of every worker, and how far they are from each other."""
    panels, names = [], [f"worker {name}" for name in run.owners]
    for measure in (run.metric, run.shown.loss):
        what, lines = measure.name, []
        rows = [(line["round"], line[f"worker_val_{what}"]) for line in run.lines if f"worker_val_{what}" in line]
        if rows:
            x_T, y_TN = np.array([x for x, _ in rows], dtype=float), np.array([y for _, y in rows], dtype=float)
            lines += [Line(names[k], x_T, y_TN[:, k]) for k in range(y_TN.shape[1])]
        if measure is run.shown.loss:
            lines.append(Line("training, mean of workers", *series(run.lines, "round", "train_loss"), "training"))
        lines.append(Line("mean of workers", *series(run.lines, "round", f"val_{what}"), "mean"))
        model = series(run.lines, "round", f"consensus_val_{what}")
        lines.append(Line("consensus model", *model, "consensus"))
        words = f"validation {measure.words}{measure.units}"
        panels.append(Panel(f"Validation {measure.words}", "round", words, lines, percent=measure.is_accuracy))
    x_T, y_T = series(run.lines, "round", "consensus_distance")
    if len(x_T) > 1:
        distance = Line("consensus distance", x_T[1:], y_T[1:], "mean")
        title = "How far the workers are from their mean"
        panels.append(Panel(title, "round", "consensus distance (RMS)", [distance], log=bool((y_T[1:] > 0).all())))
    return panels


def costs(run: Records) -> Table:
    """Rounds, seconds, bytes."""
    rows = []
    for name, key, show in COSTS:
        if run.summary.get(key) is not None:
            rows.append([name, show(run.summary[key])])
    return Table("What it took", ["figure", "value"], rows)


def workers(run: Records) -> Table:
    """A row a worker: samples, commonest class, how good it ended, what its data did."""
    head, columns = ["worker"], [[Cell(name, k) for k, name in enumerate(run.owners)]]
    if (run.stage / "labels.npz").is_file() and (run.stage / "partition.npz").is_file():
        labels_n, names = load_labels(run.stage)
        counts_NC = count_classes(load_partition(run.stage, len(labels_n)), labels_n, len(names))
        size_N = counts_NC.sum(1)
        head += ["training samples", f"commonest {run.shown.group}"]
        columns.append([Cell(f"{size:,}", int(size)) for size in size_N])
        most_N = counts_NC.argmax(1)
        share_N = counts_NC.max(1) / np.maximum(size_N, 1)
        columns.append([Cell(f"{names[c]} ({s:.0%})", float(s)) for c, s in zip(most_N, share_N, strict=True)])
    figure_N = run.figures.get(f"worker_test_{run.metric.name}")
    if figure_N is not None and len(figure_N) == len(run.owners):
        own, every = run.summary.get("worker_test_samples"), run.summary.get("test_samples")
        where = f" on {own:,} of {every:,} samples" if own != every else ""
        head.append(f"test {run.metric.words}{run.metric.units}{where}")
        columns.append([Cell(run.metric.text(value), float(value)) for value in figure_N])
    for name, view in run.node_views.items():
        if len(view["worker_influence"]) == len(run.owners):
            head.append(f"influence ({name})")
            columns.append([number(value, "+.3g") for value in view["worker_influence"]])
    if run.bad["bad_workers"]:
        head.append("made bad")
        columns.append([Cell("yes" if k in run.bad["bad_workers"] else "") for k in range(len(run.owners))])
    return Table("Who holds what, and how it ended", head, list(zip(*columns, strict=False)))


def graph(run: Records) -> list[Any]:
    """The graph: how good each worker is, what its data and the edges did."""
    parts = pictures(run.stage / "plots", "topology") if run.has_graph else []
    parts += [p for name in run.node_views for p in pictures(run.folder, f"node_view_{name}")]
    return parts + pictures(run.folder, "edges")


def right_and_wrong(run: Records) -> list[Any]:
    """What the model takes for what, and how good it is by class."""
    parts = pictures(run.stage / "plots", "confusion", "predictions", "auroc", "finetune", "stages")
    for key, values in run.summary.items():
        if key.startswith("test_") and key.endswith("_by_class") and isinstance(values, dict):
            name = key.removeprefix("test_").removesuffix("_by_class")
            spec = ".1%" if name == "accuracy" else ".3f"
            rows = [[group, number(value, spec)] for group, value in values.items()]
            parts.append(Table(f"Test {spelled(name)} by {run.shown.group}", [run.shown.group, "value"], rows))
    return parts


def on_purpose(run: Records) -> list[Text]:
    """What was made bad on purpose."""
    said = []
    if bad := run.summary.get("byzantine"):
        said.append(f"Workers {', '.join(map(str, bad['workers']))} sent something else on purpose ({bad['attack']}).")
    if run.bad["bad_workers"]:
        said.append(f"The data of workers {', '.join(map(str, run.bad['bad_workers']))} were made bad on purpose.")
    if run.bad["flipped"]:
        said.append(f"{len(run.bad['flipped']):,} training labels were flipped on purpose.")
    return [Text(text, "note") for text in said]


def faults(run: Records) -> list[Text]:
    """What went wrong in the run."""
    said = []
    if run.summary.get("isolated"):
        named = ", ".join(map(str, run.summary["isolated"]))
        said.append(f"Workers cut off since their parameters were no longer finite: {named}.")
    measured = any("val_loss" in line for line in run.lines)  # what is null in the file is not in the line
    diverged = [line for line in run.lines if measured and line.get("val_loss") is None]
    if diverged:
        said.append(f"The validation loss was not finite in {len(diverged)} logged rounds, first in round "
                    f"{diverged[0]['round']:.0f}.")  # fmt: skip
    return [Text(text, "bad") for text in said]


def settings(run: Records) -> list[Table]:
    """Every flag, and versions."""
    changed = [[name, setting_text(value)] for name, value in run.config.items() if value not in (None, [], "")]
    parts = [Table("Flags", ["flag", "value"], [[f"--{name}", value] for name, value in changed])]
    about = {**run.config_file.get("versions", {}), **run.config_file.get("execution", {})}
    about |= {key: run.config_file[key] for key in ("git_revision", "machine") if run.config_file.get(key)}
    rows = [[name, setting_text(value)] for name, value in about.items()]
    return [*parts, Table("Versions and execution", ["what", "value"], rows)]


COSTS = (
    ("rounds", "rounds", lambda v: Cell(f"{v:,}", v)),
    ("epochs", "epochs", lambda v: number(v, "g")),
    ("seconds", "seconds", lambda v: number(v, ".3g", " s")),
    ("training samples a second", "samples_per_second", lambda v: number(v, ",.0f")),
    ("simulated time", "virtual_seconds", lambda v: number(v, ".4g", " s")),
    ("messages", "messages", lambda v: Cell(f"{v:,}", v)),
    ("bytes sent", "bytes", lambda v: Cell(bytes_text(v), v)),
    ("bytes between processes", "crossed_bytes", lambda v: Cell(bytes_text(v), v)),
    ("consensus distance at the end", "consensus_distance", lambda v: number(v, ".3g")),
)
