"""The reports of rooms beside training: what institutions' data are worth, and where a walking model goes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from utils.records import read_record, spelled
from visualization.measures import setting_text
from visualization.report.paid import paid
from visualization.report.parts import Cell, Commands, Report, Section, Table, Text, number
from visualization.report.records import json, pictures

FREE = ("equal", "size")  # values that need no model: what others must beat


def report_of_valuation(folder: Path) -> Report:
    """The report of ``python -m valuation`` (one seed). Raises UsageError where a record is damaged."""
    path = folder / "valuation.json"
    record = read_record(path, "institutions", "sizes", "metric", "utility", "empty", "truth", "methods", "rounds")
    names, methods, truth, metric = (record[key] for key in ("institutions", "methods", "truth", "metric"))
    words = spelled(metric)
    said = [
        Text(
            f"The data of {len(names)} institutions together are worth {record['utility'] - record['empty']:.4g} of "
            f"{words}: {record['utility']:.4g} with all, {record['empty']:.4g} with none."
        )
    ]
    if truth is None:
        said.append(Text("No truth: values were not held against training coalitions; add --truth.", "unknown"))
    elif methods:
        off = {name: found["relative_l1"] for name, found in methods.items() if found.get("relative_l1") is not None}
        free = min((off[name] for name in FREE if name in off), default=None)
        best = min((name for name in off if name not in FREE), key=off.get, default=None)
        if best is not None:
            text = f"Nearest to the truth is {best.replace('_', ' ')}, off by {off[best]:.1%} in relative L1 error"
            beats = free is None or off[best] < free
            text += f"; shares that need no model are off by {free:.1%}" if free is not None else ""
            said.append(Text(f"{text}. One seed: --seeds 3 gives intervals.", "good" if beats else "bad"))
        most, least = (names[int(find(truth))] for find in (np.argmax, np.argmin))
        said.append(Text(f"By the truth the data of {most} are worth most, those of {least} least."))
    head = ["institution", "samples", *(["truth"] if truth is not None else []), *methods]
    rows = [
        [
            Cell(name, k), Cell(f"{record['sizes'][k]:,}", record["sizes"][k]),
            *([number(truth[k], "+.4f")] if truth is not None else []),
            *(number(found["values"][k], "+.4f") for found in methods.values()),
        ]
        for k, name in enumerate(names)
    ]  # fmt: skip
    judged = [
        [name, number(found.get("relative_l1"), ".1%"), number(found.get("cosine"), ".3f"),
         number(found.get("seconds"), ".3g", " s")]
        for name, found in methods.items()
    ]  # fmt: skip
    sections = [
        Section("Values", [*pictures(folder / "plots", "values"), Table(f"Values, in {words}", head, rows)]),
        Section("Methods", [Table("How near to the truth, and for how long", METHOD_HEAD, judged),
                            *pictures(folder / "plots", "costs")]),
        Section("Samples", pictures(folder / "plots", "samples")),
        Section("Who is paid", paid(folder)),
        *_about(folder, "valuation"),
    ]  # fmt: skip
    return _report(folder, said, sections, {"valuation": record})


def report_of_valuations(folder: Path) -> Report:
    """The report of ``python -m valuation`` over several seeds. Raises UsageError where a record is damaged."""
    record = read_record(folder / "summary.json", "seeds", "methods")
    methods, seeds = record["methods"], record["seeds"]
    rows = []
    for name, figures in methods.items():
        cells = [_mean(figures.get(key), spec) for key, spec in (("relative_l1", ".1%"), ("cosine", ".3f"))]
        rows.append([name, *cells, _mean(figures.get("kendall_tau"), ".2f")])
    said = [Text(f"Values of institutions' data by {len(methods) or 'several'} methods, over {len(seeds)} seeds.")]
    off = {name: one["relative_l1"] for name, one in methods.items() if one.get("relative_l1")}
    if off:
        best = min(off, key=lambda name: off[name][0])
        said.append(Text(f"Nearest to the truth: {best}, off by {_mean(off[best], '.1%').shown} in relative L1 error."))
    else:
        said.append(Text("No truth: values were not held against training coalitions; add --truth.", "unknown"))
    each = [[Cell(f"seed {seed}", seed, href=f"seed-{seed}/report.html")] for seed in seeds]
    sections = [
        Section("Methods", [Table("How near to the truth, 95 % over seeds", (*METHOD_HEAD[:3], "Kendall's tau"), rows),
                            *pictures(folder / "plots", "values", "costs")]),
        Section("Seeds", [Table("A report each", ["seed"], each)]),
        *_about(folder, "valuation", folder / f"seed-{seeds[0]}"),
    ]  # fmt: skip
    return _report(folder, said, sections, {"summary": record})


def _mean(found: list[float] | None, spec: str) -> Cell:
    """A mean with the ends of its interval."""
    if not found:
        return Cell("–")
    mean, low, high = found
    ends = f" [{low:{spec}}, {high:{spec}}]" if low is not None else ""
    return Cell(f"{mean:{spec}}{ends}".replace("-", "−"), mean)


def report_of_walks(folder: Path) -> Report:
    """The report of ``python -m homogeneous``. Raises UsageError where a record is damaged."""
    record = read_record(folder / "policies.json", "policies", "goal", "max_hops", "metric", "seeds")
    words, policies = spelled(record["metric"]), record["policies"]
    said = [
        Text(
            f"{len(policies)} ways to choose the next node, {len(record['seeds'])} walks each, until {words} on "
            f"validation samples is {record['goal']:g} or after {record['max_hops']} hops."
        )
    ]
    less = record.get("reduction") or {}
    for name in ("agent", "gradient"):
        if name in less:
            share, (low, high) = less[name]["total"], less[name]["total_interval"]
            text = f"{name} needs {_share(share, low, high)} less than a random walk (hops and distance)."
            said.append(Text(text, "good" if low > 0 else "bad" if high < 0 else "unknown"))
    rows = []
    for name, one in policies.items():
        means = [number(float(np.mean(one[key])), ".3g") for key in ("counted", "cost", "total")]
        found = less.get(name)
        saved = Cell(_share(found["total"], *found["total_interval"]), found["total"]) if found else Cell("–")
        rows.append([name, *means, number(float(np.mean(one["reached"])), ".0%"), saved])
    head = ["policy", "hops", "distance", "hops and weighted distance", "arrived", "less than random, 95 %"]
    sections = [
        Section("Policies", [Table("Means over walks that nobody has learned from", head, rows),
                             *pictures(folder / "plots", "policies")]),
        Section("One walk", pictures(folder / "plots", "walk")),
        Section("Learning", pictures(folder / "plots", "learning")),
        *_about(folder, "homogeneous"),
    ]  # fmt: skip
    return _report(folder, said, sections, {"policies": record})


def _share(share: float, low: float, high: float) -> str:
    return f"{share:.0%} [{low:.0%}, {high:.0%}]".replace("-", "−")


METHOD_HEAD = ("method", "relative L1 error", "cosine", "took")


def _about(folder: Path, room: str, run: Path | None = None) -> list[Section]:
    """How to repeat it, and the settings; ``run``: the seed whose config.json has them, where there are several."""
    path = (run or folder) / "config.json"
    config = json(path).get("config") or {}
    flags = [[f"--{name}", setting_text(value)] for name, value in config.items() if value not in (None, [], "")]
    lines = [
        (f"python -m {room} --config {shlex.quote(str(path))}", "does the same again"),
        (f"python -m visualization.report {shlex.quote(str(folder))}", "writes this page again"),
    ]
    return [
        Section("How to repeat it", [Commands(lines)]),
        Section("Settings", [Table("Flags", ["flag", "value"], flags)], closed=True),
    ]


def _report(folder: Path, said: list[Text], sections: list[Section], data: dict[str, Any]) -> Report:
    data["config"] = json(folder / "config.json")
    folder = folder.resolve()
    title = f"{folder.parent.name}: {folder.name}" if folder.name in ("valuation", "homogeneous") else folder.name
    return Report(title, said, [section for section in sections if section.parts], data)
