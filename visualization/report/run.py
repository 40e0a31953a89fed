"""The report of a run: what main.py and main_pruned.py left in results/NAME, from records alone."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from utils.records import privacy_said, read_json
from visualization.comparison_plots import comparisons_of
from visualization.finals import load_final
from visualization.report import influence, training
from visualization.report.paid import paid
from visualization.report.parts import Commands, Report, Section, Text
from visualization.report.records import Records, pictures
from visualization.report.verdict import audit_says, data_says, pruning_says, result_says, smoothness_says, trained

UNSCORED = ("fedasync", "choco")  # protocols without a written derivative
MOST_NUMBERS = 40_000  # of metrics.jsonl in the embedded data


def report_of(folder: Path, stage: Path) -> Report:
    """The report of the run in ``folder``, whose stage 1 is ``stage``. Raises UsageError where a record is damaged."""
    run = Records(folder, stage)
    there = [section for section in sections(run) if section.parts]
    return Report(folder.resolve().name, verdict(run), there, data(run))


def verdict(run: Records) -> list[Text]:
    """What was trained, how well, which data helped, and whether to believe it."""
    final = load_final([run.stage], run.metric) if run.summary else None
    interval = final and (final.interval or _interval(run))
    said = [trained(run)]
    said.append(result_says(run.metric, run.summary, run.figures, interval))
    said += [*training.faults(run), *training.on_purpose(run)]
    if privacy := run.summary.get("privacy"):
        said.append(Text(f"{privacy_said(privacy).capitalize()}; docs/privacy.md says for whom this holds."))
    said += pruning_says(run.comparisons)
    said += data_says(run.node_views, run.owners, run.bad["bad_workers"])
    said.append(audit_says(run.audit, has_scores=bool(run.scored)))
    said += smoothness_says(run.audit_file.get("metasmoothness"))
    return said


def _interval(run: Records) -> tuple[float, float] | None:
    found = run.summary.get(f"test_{run.metric.name}_interval")
    return tuple(found) if found and None not in found else None


def sections(run: Records) -> list[Section]:
    """All of them; those that there are no records for have no parts."""
    return [
        Section("How to repeat it", [commands(run)]),
        Section("Training", [*training.curves(run), training.costs(run)]),
        Section("Data and owners", [*pictures(run.stage / "plots", "class_mix"), training.workers(run)]),
        Section("Graph", training.graph(run)),
        Section("Right and wrong", training.right_and_wrong(run)),
        Section("Scores", influence.scores(run)),
        Section("Can the scores be believed?", influence.belief(run)),
        Section("Pruned and retrained", influence.pruned(run.folder, run.comparisons, run.metric)),
        Section("Who is paid", paid(run.folder)),
        Section("Faults", [*training.faults(run), *training.on_purpose(run)]),
        Section("Settings and versions", training.settings(run), closed=True),
    ]


def commands(run: Records) -> Commands:
    """What repeats the run, proves its scores, and writes the page again."""
    config = _quoted(run.stage / "config.json")
    lines = [(f"python main.py --config {config}", "trains the same again, to the bit on the same machine")]
    for path in sorted(run.folder.glob("stage2_*/config.json")):
        if any(path.parent in (record["runs"]["stage2"] or []) for record in run.comparisons):
            lines.append((f"python main.py --config {_quoted(path)}", f"the pruned run {path.parent.name}"))
    where = f"--config {config} --stage1_dir {_quoted(run.stage)}"
    scorable = run.config.get("dp_noise") is None and run.config.get("protocol") not in UNSCORED
    if run.audit is None and scorable and run.config.get("aggregation", "mean") == "mean":
        lines.append((f"python main_pruned.py {where} --audit", "holds scores against real retraining"))
    lines.append((f"python -m visualization.report {_quoted(run.folder)}", "writes this page again"))
    return Commands(lines)


def data(run: Records) -> dict[str, Any]:
    """The records themselves, as they are in their files; of metrics.jsonl evenly chosen lines, if there are many."""
    each = max((sum(len(v) if isinstance(v, list) else 1 for v in line.values()) for line in run.lines), default=1)
    lines = np.linspace(0, len(run.lines) - 1, min(len(run.lines), max(2, MOST_NUMBERS // each))).round().astype(int)
    found = {"config": run.config_file, "summary": run.summary, "metrics": [run.lines[k] for k in lines]}
    found |= {"audit": run.audit_file, "comparisons": [read_json(path) for path in comparisons_of(run.folder)]}
    return found


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
