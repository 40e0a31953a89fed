"""Which samples helped or harmed most, and where they come from: ``python -m visualization.samples RUN``.

From records alone: scores (influence/*.zarr), labels.npz, partition.npz, sources.txt, and the owners in config.json.
Legend: n training samples, m scored ones.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UsageError, refusal, unknown_name
from utils.records import PathLike, read_json, read_sources, write_atomically
from utils.registry import INFLUENCE
from utils.scores import read_scores
from visualization.checked import Record, damaged, load_labels, load_partition
from visualization.run_folders import no_run, seeds_of, stages_of

SHOWN = 20  # rows, unless asked for others

EXAMPLES = """
columns:
  id        of the training sample: its row in the data set, the same for every seed and machine
  score     positive: the sample lowers the loss on validation samples; negative: it harms
  owner     the worker that holds it, and whose data that is, where the data set knows
  label     its class; of several findings the rarest that is there; of values the range that their mean is in
  source    its file, or where in the original files it is; empty for data sets that do not say

examples:
  python -m visualization.samples results/NAME                          the 20 samples that harmed most
  python -m visualization.samples results/NAME --highest 50             the 50 that helped most
  python -m visualization.samples results/NAME --lowest 200 --method cascade --csv worst.csv
                                                                        files to look at, and perhaps to delete
  python -m visualization.samples results/NAME --all --csv scores.csv   every score, by sample id

Scores come from
  python main_pruned.py --config results/NAME/stage1/config.json --stage1_dir results/NAME/stage1 \\
      --pruning_algorithm cascade
"""


@dataclass(frozen=True)
class Row:
    """A sample, as it is printed and exported; the names are those of the columns."""

    id: int
    score: float
    owner: str
    label: str
    source: str


COLUMNS = tuple(field.name for field in fields(Row))


def load_rows(run: PathLike, method: str | None = None) -> list[Row]:
    """All scored samples of a run, by sample id. ``method``: whose scores; None: of the only one that there is.

    Raises UsageError where something is missing, damaged, or of another run.
    """
    stage = _stage(run)
    for name in ("labels.npz", "partition.npz"):
        if not (stage / name).is_file():
            raise UsageError(f"there is no {stage / name}, which says whose samples are what; start the run again")
    path = find_scores(stage, method)
    record, (labels_n, names) = read_scores(path), load_labels(stage)
    worker_n = np.full(len(labels_n), -1)
    for k, ids in enumerate(load_partition(stage, len(labels_n))):
        worker_n[ids] = k
    ids_m, scores_m = record["sample_id"], record["scores"]
    inside = len(ids_m) == 0 or (ids_m.min() >= 0 and ids_m.max() < len(labels_n))
    if not inside or not np.array_equal(worker_n[ids_m], record["worker"]):
        raise UsageError(f"{path} is of other samples than {stage}; {_how_to_score(stage, method or 'cascade')}")
    sources, owners = read_sources(stage), owners_of(stage, int(record["worker"].max(initial=0)) + 1)
    if sources is not None and len(sources) not in (1, len(labels_n)):  # 1: an empty file, the data set does not say
        raise damaged(stage / "sources.txt", f"it has {len(sources)} lines for {len(labels_n)} samples")
    if sources is None or len(sources) < len(labels_n):
        sources = [""] * len(labels_n)
    return [
        Row(int(i), float(scores_m[at]), owners[record["worker"][at]], names[labels_n[i]], sources[i])
        for at, i in sorted(enumerate(ids_m.tolist()), key=lambda pair: pair[1])
    ]


def find_scores(stage: Path, method: str | None) -> Path:
    """The scores of a method, beside the stage or in it; those under the default options, where there are others."""
    folders = (stage.parent / "influence", stage / "influence")
    files = (path for folder in reversed(folders) for path in sorted(folder.glob("*.zarr")))
    there = {path.stem: path for path in files if path.stem != "edges"}  # which are no samples'
    named = ", ".join(sorted(there))
    if not there:
        raise UsageError(f"{stage} has no scores; {_how_to_score(stage, method or 'cascade')}")
    if method is None:
        if len(there) > 1:
            raise UsageError(f"{stage} has several scores: choose one with --method ({named})")
        return next(iter(there.values()))
    if method not in there:
        if method.partition("-")[0] not in INFLUENCE:
            raise unknown_name("method", method, INFLUENCE)
        raise UsageError(f"{stage} has no scores of {method}, only of {named}; {_how_to_score(stage, method)}")
    return there[method]


def choose(rows: Sequence[Row], lowest: int | None, highest: int | None) -> list[Row]:
    """The ``lowest`` or ``highest`` ones by score, the most extreme first; all, by sample id, where neither is asked
    for. Scores that are not finite stand last."""
    if lowest is None and highest is None:
        return list(rows)
    sign = 1 if highest is None else -1
    ordered = sorted(rows, key=lambda row: sign * row.score if np.isfinite(row.score) else np.inf)
    return ordered[: lowest if highest is None else highest]


def table(rows: Sequence[Row]) -> str:
    """The rows under a line of names, in columns."""
    cells = [COLUMNS, *([str(row.id), f"{row.score:+.4g}", row.owner, row.label, row.source] for row in rows)]
    widths = [max(len(line[c]) for line in cells) for c in range(len(COLUMNS))]
    right = ("id", "score")
    lines = (
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, COLUMNS, strict=True)
        ).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def write_csv(path: PathLike, rows: Sequence[Row]) -> None:
    """The rows with a line of names; scores to the last bit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([repr(value) if isinstance(value, float) else value for value in astuple(row)] for row in rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _stage(run: PathLike) -> Path:
    """The stage that was scored: the directory itself, or stage1 in the folder."""
    stages = stages_of(run)
    if stages:
        return stages[0]
    if seeds := seeds_of(run):
        raise UsageError(f"{run} holds several seeds, each with its own scores: name one, such as {seeds[0]}")
    raise no_run(run)


def owners_of(stage: Path, workers: int) -> list[str]:
    """What each worker is called: its number, and whose data it has where config.json says so."""
    path = stage / "config.json"
    record = Record(path, read_json(path)) if path.is_file() else None
    if record is None or not record.has("owners"):
        return [str(k) for k in range(workers)]
    names = record.texts("owners")
    if len(names) < workers:
        raise damaged(path, f"it names {len(names)} owners of {workers} workers")
    return [f"{k} {name}" for k, name in enumerate(names)]


def _how_to_score(stage: Path, method: str) -> str:
    return (
        f"compute them: python main_pruned.py --config {stage / 'config.json'} --stage1_dir {stage} "
        f"--pruning_algorithm {method.partition('-')[0]}"
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples from 1 on")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or export; returns the exit code (2 for bad input, told in one line)."""
    args = _parse(argv)
    try:
        rows = load_rows(args.run, args.method)
        lowest = SHOWN if args.lowest is None and args.highest is None and not args.all else args.lowest
        rows = choose(rows, lowest, args.highest)
        if args.csv:
            write_csv(args.csv, rows)
            print(f"{len(rows)} samples: {args.csv}")
        else:
            print(table(rows))
    except (UsageError, OSError) as error:
        return refusal(error)
    return 0


def _parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m visualization.samples",
        description="The samples that harmed or helped most, with their scores, owners, labels and sources.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help shows examples\n")  # one line, no usage
    parser.add_argument("run", metavar="RUN", help="folder of a run (results/NAME) or of its stage 1")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--lowest", metavar="N", type=_count, help=f"the N lowest scores (default: {SHOWN})")
    which.add_argument("--highest", metavar="N", type=_count, help="the N highest scores")
    which.add_argument("--all", action="store_true", help="all samples that were scored, by sample id")
    parser.add_argument(
        "--method", help="whose scores: cascade, dice, delete, if (default: the only ones that there are)"
    )
    parser.add_argument(
        "--csv", metavar="FILE", type=Path, help="write them there, in all digits, and print no table; a file that "
        "is there is replaced",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
