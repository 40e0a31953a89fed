"""The report of a run with several seeds: what they have in common, and a link to the report of each.

Legend: S seeds.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.influence.statistics import mean_interval
from utils.records import read_json
from visualization.checked import Record, load_comparison
from visualization.comparison_plots import comparisons_of
from visualization.measures import Measure
from visualization.report.influence import pruned
from visualization.report.parts import Cell, Commands, Report, Section, Table, Text, number
from visualization.report.records import Records, pictures
from visualization.report.training import faults
from visualization.report.verdict import pruning_says, trained
from visualization.run_folders import first_stage
from visualization.several_runs import common_measures

FEWEST = 3  # seeds with an interval: that of two is too wide to say anything


def report_of_seeds(folder: Path, seeds: Sequence[Path]) -> Report:
    """The report of the run folder above ``seeds``. Raises UsageError where a record is damaged."""
    metric = common_measures([first_stage(seed) for seed in seeds]).metric
    runs = [Records(seed, first_stage(seed)) for seed in seeds]
    comparisons = [load_comparison(path) for path in comparisons_of(folder)]
    lds = _lds(folder, len(seeds))
    values_S = np.array([_figure(run, metric) for run in runs])
    said = [trained(runs[0]), _result(metric, values_S)]
    said += [Text(f"{run.folder.name}: {fault.text}", fault.kind) for run in runs for fault in faults(run)]
    said += pruning_says(comparisons)
    if not lds and (folder / "audit.json").is_file():
        said.append(Text("The audit is of other seeds: run --audit again.", "unknown"))
    for name, one_S in lds.items():
        if name != "random":
            said.append(Text(f"LDS of {name}: {_mean(one_S, '.2f')} over {len(seeds)} seeds."))
    table = Table(
        "The seeds",
        ["seed", f"test {metric.words}", "rounds", "seconds", *(f"LDS of {name}" for name in lds)],
        [
            [
                Cell(run.folder.name, href=f"{run.folder.name}/report.html"),
                Cell(metric.text(value), value) if np.isfinite(value) else Cell("–"),
                number(run.summary.get("rounds"), "g"), number(run.summary.get("seconds"), ".3g"),
                *(number(one_S[s], ".3f") for one_S in lds.values()),
            ]
            for s, (run, value) in enumerate(zip(runs, values_S.tolist(), strict=True))
        ],
    )  # fmt: skip
    sections = [
        Section("Seeds", [table, *pictures(folder, "seeds")]),
        Section("Pruned and retrained", pruned(folder, comparisons, metric)),
        Section("How to repeat it", [Commands(_commands(folder, seeds))]),
    ]
    data = {"seeds": [{"folder": run.folder.name, "summary": run.summary} for run in runs], "lds": lds}
    data["comparisons"] = [read_json(path) for path in comparisons_of(folder)]
    return Report(folder.resolve().name, said, [section for section in sections if section.parts], data)


def _commands(folder: Path, seeds: Sequence[Path]) -> list[tuple[str, str]]:
    config = shlex.quote(str(first_stage(seeds[0]) / "config.json"))
    return [
        (f"python main.py --config {config}", f"trains {seeds[0].name} again, to the bit on the same machine"),
        (f"python -m visualization.report {shlex.quote(str(folder))}", "writes this page again"),
    ]


def _figure(run: Records, metric: Measure) -> float:
    value = run.figures.get(f"test_{metric.name}")
    return float("nan") if value is None else float(value)


def _result(metric: Measure, values_S: np.ndarray) -> Text:
    known_S = values_S[np.isfinite(values_S)]
    if not len(known_S):
        return Text("No seed has ended with a figure.", "unknown")
    said = f"Test {metric.words} of the consensus model: {metric.text(known_S.mean())}"
    if len(known_S) >= FEWEST:
        _, low, high = mean_interval(known_S.tolist())
        ends = f" [{metric.text(low)}, {metric.text(high)}], 95 % interval of the mean"
        said += f"{ends} over {len(known_S)} seeds, which differ by ± {metric.text(known_S.std(ddof=1))}"
    elif len(known_S) > 1:
        said += f" over {len(known_S)} seeds ({' and '.join(metric.text(value) for value in known_S)})"
    missing = len(values_S) - len(known_S)
    if missing:
        said += f"; {missing} of {len(values_S)} seeds have not ended, or diverged"
    return Text(f"{said}{metric.units}.", "unknown" if missing else "")


def _lds(folder: Path, seeds: int) -> dict[str, list[float]]:
    """The LDS of each seed, by method; empty without an audit of these seeds."""
    path = folder / "audit.json"
    if not path.is_file():
        return {}
    methods = Record(path, read_json(path)).part("methods")
    found: dict[str, Any] = {}
    for name in methods.values:
        found[name] = methods.part(name).part("lds").numbers("values").tolist()
    return found if all(len(values) == seeds for values in found.values()) else {}


def _mean(values: Sequence[float], spec: str) -> str:
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "undefined"
    if len(known) < FEWEST:
        return " and ".join(f"{value:{spec}}" for value in known).replace("-", "−")
    mean, low, high = mean_interval(known)
    return f"{mean:{spec}} [{low:{spec}}, {high:{spec}}]".replace("-", "−")
