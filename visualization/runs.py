"""All runs in a folder as a table: ``python -m visualization.runs results/``.

A row a run; its seeds are one row, with mean and standard deviation. From records alone.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UsageError, refusal
from utils.records import PathLike, metric_of, read_json, spelled, write_atomically
from visualization.checked import Record, damaged
from visualization.measures import bytes_text, setting_text
from visualization.run_folders import seeds_of, stages_of

DEEPEST = 6  # folders below the one that is named
MOST_DIFFERENT = 8  # settings with a column of their own in a terminal
ASIDE = (  # settings that say nothing of how a run was trained: 'pruning' and 'kept' say what a stage 2 was
    "run_name", "results_dir", "seed", "seeds", "overwrite", "resume", "quiet", "plots", "config", "download", "stage",
    "keep_samples", "pruning_algorithm", "train_ratio", "sweep", "methods", "edges", "audit", "smoothness", "control",
    "audit_groups", "audit_fraction", "audit_seed", "cluster", "stage1_dir",
)  # fmt: skip

EXAMPLES = """
examples:
  python -m visualization.runs results                          every run, by name
  python -m visualization.runs results --sort accuracy          the best last; --reverse: first
  python -m visualization.runs results --where mode=ring lr=0.1 those with these settings
  python -m visualization.runs results --csv runs.csv           every setting and figure, in all digits
  python -m visualization.runs results --html results/index.html   a page that sorts, with links to the reports
"""


@dataclass
class Row:
    """A run, or its seeds together. ``values``: a figure a seed, in the unit of ``metric``."""

    name: str
    folder: Path
    config: dict[str, Any]
    metric: dict[str, Any]
    values: list[float]
    rounds: float
    bytes: float
    seconds: float
    lds: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Of the metric over seeds; NaN where no seed has ended."""
        return statistics.mean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Its sample standard deviation; NaN of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def best(self) -> tuple[str, float]:
        """The method whose scores foretell retraining best, and its LDS."""
        known = {name: value for name, value in self.lds.items() if name != "random" and math.isfinite(value)}
        name = max(known, key=known.get, default="")
        return name, known.get(name, math.nan)


def find_runs(root: PathLike) -> list[Row]:
    """The runs in ``root`` and the folders below it, by name. Raises UsageError where there are none or one is
    damaged."""
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}; name the one that holds runs, such as results")
    rows = [row for folder in _folders(root, DEEPEST) for row in rows_of(folder, root)]
    if not rows:
        raise UsageError(f"there is no run in {root}: python main.py makes one")
    return rows


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """The run folders in a folder, itself included, by name."""
    if (folder / "metrics.jsonl").is_file():
        yield folder.parent
        return
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    own = [path for path in inner if re.fullmatch(r"seed-\d+|stage\d.*", path.name)]
    others = [path for path in inner if path not in own and path.name not in ("influence", "plots", "jobs")]
    found = [run for path in others for run in (_folders(path, depth - 1) if depth else ())]
    if stages_of(folder) or (seeds_of(folder) and not found):
        yield folder
    else:  # a run may be called seed-5, beside others
        found += [run for path in own for run in (_folders(path, depth - 1) if depth else ())]
    yield from sorted(found)


def rows_of(folder: Path, root: Path) -> list[Row]:
    """The row of a run, and of each of its prunings."""
    runs = seeds_of(folder) or [folder]
    names = sorted({stage.name for run in runs for stage in stages_of(run)})
    lds = _lds(folder)
    rows = []
    for name in names:
        stages = [run / name for run in runs if (run / name / "metrics.jsonl").is_file()]
        label = folder.resolve().name if folder in (root, root.parent) else os.path.relpath(folder, root)
        row = _row(label if name == "stage1" else f"{label} {name}", folder, stages)
        row.lds = lds if name == "stage1" else {}
        rows.append(row)
    return rows


def _row(label: str, folder: Path, stages: Sequence[Path]) -> Row:
    """What the seeds of a stage have in common."""
    path = stages[0] / "config.json"
    record = read_json(path) if path.is_file() else {}
    config = record.get("config") or {}
    if not isinstance(config, dict):
        raise damaged(path, "its 'config' is no JSON object")
    pruning = record.get("pruning") or {}
    config = {**config, "pruning": pruning.get("algorithm"), "kept": pruning.get("ratio"), "seeds": len(stages)}
    summaries = [Record(stage / "summary.json", read_json(stage / "summary.json"))
                 for stage in stages if (stage / "summary.json").is_file()]  # fmt: skip
    metric = metric_of(summaries[0].values) if summaries else {"name": "", "unit": "", "higher_is_better": True}
    key = f"test_{metric['name']}"

    def mean(name: str) -> float:
        known = [summary.number(name) for summary in summaries if summary.has(name)]
        return statistics.mean(known) if known else math.nan

    values = [summary.number(key) for summary in summaries if summary.has(key)]
    return Row(label, folder, config, metric, values, mean("rounds"), mean("bytes"), mean("seconds"))


def _lds(folder: Path) -> dict[str, float]:
    """The LDS of each method that the audit of a run, or of its seeds, has."""
    path = folder / "audit.json"
    if not path.is_file():
        return {}
    methods, found = Record(path, read_json(path)).part("methods"), {}
    for name in methods.values:
        method = methods.part(name)
        over_seeds = isinstance(method.values.get("lds"), dict)
        found[name] = method.part("lds").number("mean", False) if over_seeds else method.number("lds", known=False)
    return found


def differing(rows: Sequence[Row]) -> list[str]:
    """The settings in which the runs that have them differ, in the order of the flags."""
    names = dict.fromkeys(name for row in rows for name in row.config if name not in ASIDE)
    return [name for name in names if len({setting_text(row.config[name]) for row in rows if name in row.config}) > 1]


def chosen(rows: Sequence[Row], where: Sequence[str]) -> list[Row]:
    """The runs that have these settings (``name=value``). Raises UsageError of a setting that no run has."""
    known = dict.fromkeys(name for row in rows for name in row.config)
    wanted = []
    for text in where:
        name, equals, value = text.partition("=")
        name = name.strip().lstrip("-")
        if not equals:
            raise UsageError(f"--where {text}: say setting=value, such as mode=ring")
        if name not in known:
            raise _unknown("setting", name, known)
        wanted.append((name, value.strip()))
    found = [row for row in rows if all(_same(setting_text(row.config.get(name)), value) for name, value in wanted)]
    if not found:
        raise UsageError(f"none of the {len(rows)} runs has {' and '.join(where)}")
    return found


def _unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "config.json of a run has them all"
    return UsageError(f"no run has a {what} '{name}'; {hint}")


def _same(a: str, b: str) -> bool:
    """Whether two settings are the same text, or the same number."""
    try:
        return a == b or float(a) == float(b)
    except ValueError:
        return False


def sorted_by(rows: Sequence[Row], name: str | None, reverse: bool) -> list[Row]:
    """By a column (``name``, a metric, ``rounds``, ``bytes``, ``seconds``, ``LDS``) or a setting; what is not known
    stays last."""
    if name is None:
        return list(rows)[:: -1 if reverse else 1]
    keys: dict[str, Callable[[Row], Any]] = {
        "name": lambda row: row.name, "rounds": lambda row: row.rounds, "bytes": lambda row: row.bytes,
        "seconds": lambda row: row.seconds, "lds": lambda row: row.best[1], "metric": lambda row: row.mean,
    }  # fmt: skip
    keys |= {row.metric["name"]: lambda row: row.mean for row in rows}
    settings = dict.fromkeys(key for row in rows for key in row.config)
    wanted = name.lower() if name.lower() in keys else name.lstrip("-")
    if wanted not in keys and wanted not in settings:
        raise _unknown("column", name, {**keys, **settings})
    get = keys.get(wanted, lambda row: row.config.get(wanted))
    number = all(isinstance(get(row), int | float | None) for row in rows)

    def known(row: Row) -> bool:
        return get(row) is not None and not (isinstance(get(row), float) and math.isnan(get(row)))

    there = sorted(filter(known, rows), key=get if number else lambda row: str(get(row)), reverse=reverse)
    return there + [row for row in rows if not known(row)]


# ---- what is shown ------------------------------------------------------------------------------


def _figure(value: float, spec: str = ".4g") -> str:
    return "" if math.isnan(value) else f"{value:{spec}}"


def _result(row: Row) -> str:
    """The metric with its deviation."""
    if not row.values:
        return "not finished"
    spec = ".4f" if row.metric["name"] == "accuracy" else ".4g"
    spread = "" if math.isnan(row.deviation) else f" ± {row.deviation:{spec}}"
    return f"{row.mean:{spec}}{spread}"


def columns_of(rows: Sequence[Row], settings: Sequence[str]) -> list[str]:
    """The names of the columns."""
    metrics = list(dict.fromkeys(spelled(row.metric["name"]) for row in rows if row.metric["name"]))
    seeds = ["seeds"] if any(len(row.values) > 1 for row in rows) else []
    return ["run", *settings, *(metrics[:1] if len(metrics) == 1 else ["metric"]), *seeds, "rounds", "bytes",
            "seconds", *(["LDS"] if any(row.lds for row in rows) else [])]  # fmt: skip


def cells_of(row: Row, columns: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The texts of a row."""
    name, lds = row.best
    result = _result(row)
    if "metric" in columns and row.values:
        result = f"{spelled(row.metric['name'])} {result}"
    cells = [row.name, *(setting_text(row.config.get(key)) for key in settings), result]
    cells += [str(len(row.values))] if "seeds" in columns else []
    cells += [_figure(row.rounds, "g"), bytes_text(row.bytes), _figure(row.seconds, ".3g")]
    return cells + ([f"{name} {lds:.2f}" if name else ""] if "LDS" in columns else [])


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, for a terminal."""
    settings = differing(rows)
    left_out, settings = settings[MOST_DIFFERENT:], settings[:MOST_DIFFERENT]
    columns = columns_of(rows, settings)
    cells = [columns, *(cells_of(row, columns, settings) for row in rows)]
    widths = [max(len(line[c]) for line in cells) for c in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    if left_out:
        lines.append(f"They differ in {', '.join(left_out)} as well: --csv and --html have all columns.")
    return "\n".join(lines)


def write_csv(path: PathLike, rows: Sequence[Row]) -> None:
    """Every setting and figure, in all digits."""
    settings = [name for name in dict.fromkeys(name for row in rows for name in row.config) if name != "seeds"]
    methods = sorted({name for row in rows for name in row.lds})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ["run", "metric", "mean", "deviation", "seeds", "rounds", "bytes", "seconds"]
    writer.writerow([*figures, *(f"LDS {name}" for name in methods), *settings])
    for row in rows:
        numbers = [row.mean, row.deviation, row.config["seeds"], row.rounds, row.bytes, row.seconds]
        numbers += [row.lds.get(name, math.nan) for name in methods]
        shown = ["" if isinstance(value, float) and math.isnan(value) else repr(value) for value in numbers]
        own = [setting_text(row.config.get(name)) for name in settings]
        writer.writerow([row.name, row.metric["name"], *shown, *own])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_index(path: PathLike, rows: Sequence[Row], title: str) -> Path:
    """A page with all runs, which sorts, and links to their reports."""
    from visualization.report.parts import Cell, Report, Section, Table, Text, address, write

    settings, lines = differing(rows), []
    columns = columns_of(rows, settings)
    for row in rows:
        report = row.folder / "report.html"
        link = address(report, Path(path)) if report.is_file() else ""
        numbers = {"seeds": len(row.values), "rounds": row.rounds, "bytes": row.bytes, "seconds": row.seconds}
        numbers["LDS"] = row.best[1]
        place = 1 + len(settings)
        cells = []
        for k, (column, text) in enumerate(zip(columns, cells_of(row, columns, settings), strict=True)):
            value = row.mean if k == place else numbers.get(column, math.nan)
            if 0 < k < place and isinstance(row.config.get(column), int | float):
                value = float(row.config[column])
            cells.append(Cell(text, None if math.isnan(value) else value, link if k == 0 else ""))
        lines.append(cells)
    said = [Text(f"{len(rows)} runs in {title}; a click on a heading sorts by it, a name leads to the run's report.")]
    return write(Report(title, said, [Section("Runs", [Table("All runs", columns, lines)])]), path)


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    found = argparse.ArgumentParser(
        prog="python -m visualization.runs", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    found.error = lambda message: found.exit(2, f"error: {message}; --help shows examples\n")  # one line, no usage
    found.add_argument("folder", nargs="?", default="results", help="folder that holds runs [results]")
    found.add_argument("--where", nargs="+", default=[], metavar="NAME=VALUE", help="only runs with these settings")
    found.add_argument("--sort", metavar="COLUMN", help="a setting, the metric, rounds, bytes, seconds or LDS [name]")
    found.add_argument("--reverse", action="store_true", help="the largest first")
    found.add_argument("--csv", metavar="FILE", help="write every setting and figure there, in all digits")
    found.add_argument("--html", metavar="FILE", help="write a page that sorts, with links to the reports")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write; returns the exit code (2 for bad input, told in one line)."""
    arguments = parser().parse_args(argv)
    try:
        rows = sorted_by(chosen(find_runs(arguments.folder), arguments.where), arguments.sort, arguments.reverse)
        if arguments.csv:
            write_csv(arguments.csv, rows)
            print(f"{len(rows)} runs: {arguments.csv}")
        if arguments.html:
            print(f"{len(rows)} runs: {write_index(arguments.html, rows, str(arguments.folder))}")
        if not arguments.csv and not arguments.html:
            print(table(rows))
    except (UsageError, OSError) as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
