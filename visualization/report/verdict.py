"""The first sentences of a report: what was trained, how well, which data helped, and whether to believe it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.records import pruned_by
from visualization.measures import Measure
from visualization.report.parts import Text
from visualization.report.records import Records

GOOD_LDS, FAIR_LDS = 0.8, 0.5  # from which on scores foretell retraining well, and in part


def trained(run: Records) -> Text:
    """What was trained, on how many samples of what, by whom."""
    samples = f"{run.size:,} samples of " if run.size else ""
    who = f"{run.workers} worker{'s' * (run.workers != 1)}"
    graph = f"graph: {run.config['mode']}" if run.has_graph and run.config.get("mode") else ""
    how = ", ".join(filter(None, (run.config.get("protocol"), graph)))
    how, length = f" ({how})" if how else "", ""
    if run.summary:
        epochs, rounds = run.summary["epochs"], run.summary["rounds"]
        length = f", {epochs:g} epoch{'s' * (epochs != 1)} in {rounds:,} round{'s' * (rounds != 1)}"
        length += ", when early stopping ended it" if run.summary.get("stopped_early") else ""
    what = f"{run.config.get('model', 'a network')} on {samples}{run.config.get('dataset_name', 'their data')}"
    return Text(f"{who} trained {what}{how}{length}.")


def result_says(
    metric: Measure, summary: dict[str, Any], figures: dict[str, Any], interval: tuple[float, float] | None
) -> Text:
    """How good the run's model is on test samples."""
    value = figures.get(f"test_{metric.name}") if summary else None
    if not summary:
        return Text("The run has not ended: the curves show how far it is.", "unknown")
    if value is None or not np.isfinite(value):
        return Text("The figure of the test set is not finite: the training diverged.", "bad")
    ends = f" [{metric.text(interval[0])}, {metric.text(interval[1])}]" if interval else ""
    said = f"Test {metric.words} of the consensus model: {metric.text(value)}{ends}{metric.units}"
    said += ", 95 % interval over the test samples, of one seed" if interval else ""
    worker_N = figures.get(f"worker_test_{metric.name}")
    own, every = summary.get("worker_test_samples"), summary.get("test_samples")
    if worker_N is not None and np.isfinite(worker_N).any() and len(worker_N) > 1 and own:
        low, high = np.nanmin(worker_N), np.nanmax(worker_N)
        where = f" (on {own:,} of the {every:,} test samples)" if own != every else ""
        said += f"; the workers' own models{where}: {metric.text(low)} to {metric.text(high)}"
    return Text(f"{said}.")


def pruning_says(comparisons: Sequence[dict[str, Any]]) -> list[Text]:
    """What each pruning was worth."""
    said = []
    for record in comparisons:
        if not record["verdict"]:
            continue
        over = record["over_random"] if record["over_random"] is not None else record["over_stage1"]
        better = record["metric"].higher_is_better
        kind = "unknown"
        if over is not None and np.isfinite(over[1]) and (over[1] > 0 or over[2] < 0):
            kind = "good" if (over[1] > 0) == better else "bad"
        text = f"{100 * record['ratio']:.4g} % kept by {pruned_by(record)}: {record['verdict']}."
        said.append(Text(text.replace(" -", " −").replace("[-", "[−").replace("(-", "(−"), kind))
    return said


def data_says(views: dict[str, dict[str, Any]], owners: Sequence[str], bad: Sequence[int]) -> list[Text]:
    """Whose data helped most and least, by each method that was looked at by node. ``bad``: whose were made bad."""
    said = []
    for name, view in views.items():
        influence_N = view["worker_influence"]
        if len(influence_N) != len(owners) or len(owners) < 2 or not np.isfinite(influence_N).all():
            continue
        best, worst = int(influence_N.argmax()), int(influence_N.argmin())
        did, least = ("helped most", "least") if influence_N[best] > 0 else ("harmed least", "most")
        text = f"By {name} the data of worker {owners[best]} {did}, those of worker {owners[worst]} "
        text += "did harm" if influence_N[worst] < 0 < influence_N[best] else least
        if bad:
            lowest = set(np.argsort(influence_N)[: len(bad)].tolist())
            found = len(lowest & set(bad))
            text += f"; of {len(bad)} workers whose data were made bad {found} are the lowest"
        said.append(Text(f"{text}."))
    return said


def audit_says(audit: dict[str, Any] | None, has_scores: bool) -> Text:
    """Whether scores may be believed."""
    if audit is None:
        if not has_scores:
            return Text("No scores were computed: which samples helped is not known.", "note")
        return Text("These scores were not held against retraining: add --audit before you believe them.", "unknown")
    parts, best = [], -1.0  # the best LDS that is no chance
    for name, method in sorted(audit["methods"].items(), key=lambda item: -np.nan_to_num(item[1]["lds"], nan=-2)):
        if name == "random" or not np.isfinite(method["lds"]):
            continue
        low, high = method["interval"] or (np.nan, np.nan)
        ends = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
        parts.append(f"{name} {_foretells(method['lds'], low, high)} (LDS {method['lds']:.2f}{ends})".replace("-", "−"))
        best = max(best, method["lds"] if not low <= 0 else -1.0)
    if not parts:
        return Text("The audit has no rank correlation: nothing changed when samples were left out.", "unknown")
    count, fraction = len(audit["actual"]), 100 * audit["fraction"]
    gone = int((~np.isfinite(audit["actual"])).sum())
    diverged = f" ({gone} of them diverged, and count as the largest rise)" if gone else ""
    said = f"Held against {count} retrainings without {fraction:.3g}% of the samples{diverged}: {'; '.join(parts)}."
    return Text(said, "good" if best >= GOOD_LDS else "unknown" if best >= FAIR_LDS else "bad")


def _foretells(lds: float, low: float, high: float) -> str:
    if high < 0:
        return "foretells the opposite"
    if low <= 0:
        return "cannot be told from chance"
    return f"foretells it {'well' if lds >= GOOD_LDS else 'in part' if lds >= FAIR_LDS else 'badly'}"


def smoothness_says(found: dict[str, Any] | None) -> list[Text]:
    """How straight the way from weights to models is, where it was measured."""
    if not found:
        return []
    if found.get("mean") is None:
        why = "a retraining diverged, or nothing moved"
        return [Text(f"Metasmoothness is not defined: {why}; scores cannot predict such a run.", "bad")]
    low, high = found.get("interval") or (None, None)
    ends = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
    text = f"Metasmoothness {found['mean']:.2f}{ends}".replace("-", "−")
    if found.get("smooth"):
        return [Text(f"{text}: smooth enough for scores to be meaningful.")]
    return [Text(f"{text}: the training is so rough that scores foretell little.", "bad")]
