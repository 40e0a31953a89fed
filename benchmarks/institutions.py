"""What values cost against the number of institutions: seconds of the truth, and of each method that comes near it.

    python -m benchmarks.institutions                    digits, 2 .. 12 institutions
    python -m benchmarks.institutions --most 18 --enough 60 --valuations ddval knn_game

The truth trains 2^N - 1 coalitions. What took more than ``--enough`` seconds is not measured for more institutions: a
method ends there, the truth goes on with as many seconds a coalition. (All institutions together have the same samples
whatever N is, so coalitions cost about the same.) Methods start from the model of all, whose training is given beside
them. Further flags are those of python -m valuation. The table is markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads

from benchmarks.common import table
from training.build import Job
from training.coalitions import all_coalitions
from utils.errors import UsageError, refusal
from utils.parser import parse
from utils.progress import ignored
from utils.records import write_json
from utils.registry import VALUATIONS
from valuation.__main__ import built, grand_study, timed
from valuation.args import MOST_EXACT, ValuationConfig
from valuation.institutions import empty_utility, institution_tests
from valuation.methods import Study, why_not
from valuation.truth import trained
from visualization.valuation_benchmarks import plot_institutions

DEFAULTS = ("--partition", "iid")
FREE = ("equal", "size", "leave_one_out")  # they cost nothing, or what the truth does


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print, draw."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--most", type=int, default=12, help="institutions: from 2 to so many [12]")
    own.add_argument("--enough", type=float, default=20.0, help="seconds; what took more is measured no further [20]")
    own.add_argument("--out", default="results/benchmarks/institutions.json", help="record; a picture goes beside it")
    asked, rest = own.parse_known_args(argv)
    if asked.most < 2:
        own.error("--most must be 2 or more")
    try:
        config = parse(ValuationConfig, [*DEFAULTS, *rest], __doc__, varied=True)
        record = {"settings": config.changing_results(), **measured(config, asked.most, asked.enough)}
        print_table(record)
        write_json(asked.out, record)
        if config.plots:
            plot_institutions(asked.out, Path(asked.out).with_suffix(".png"))
    except UsageError as error:
        return refusal(error)
    return 0


def measured(config: ValuationConfig, most: int, enough: float) -> dict[str, Any]:
    """Seconds for 2 .. ``most`` institutions: of the model of all, of the truth, and of each method; None where they
    were not measured. ``by_count``: those of the truth, where it was not, by the number of coalitions."""
    counts = list(range(2, most + 1))
    names = config.valuations or [name for name in VALUATIONS if name not in FREE]
    all_of_them, truth, by_count = [], [], []
    methods: dict[str, list[float | None]] = {name: [] for name in names}
    first, _ = studied(config, 2)
    for name in names:
        if not why_not(name, first.job, False):
            timed(name, first)  # what is loaded once is not counted
    for N in counts:
        study, training = studied(config, N)
        job = study.job
        all_of_them.append(training)
        affordable = N <= MOST_EXACT and (not truth or truth[-1] is not None and truth[-1] <= enough)
        truth.append(seconds_of_truth(job, study.tests) if affordable else None)
        last = max(i for i, took in enumerate(truth) if took is not None)
        by_count.append(truth[last] * (2**N - 1) / (2 ** counts[last] - 1))
        for name, seconds in methods.items():
            able = not why_not(name, job, False) and (not seconds or seconds[-1] is not None and seconds[-1] <= enough)
            fresh = dataclasses.replace(study, samples={})  # what methods share, as features, each pays for
            seconds.append(timed(name, fresh)[1] if able else None)
        print(f"{N} institutions: {truth[-1] or by_count[-1]:.3g} s the truth", file=sys.stderr)
    return {"institutions": counts, "all": all_of_them, "truth": truth, "by_count": by_count, "methods": methods}


def studied(config: ValuationConfig, N: int) -> tuple[Study, float]:
    """The model of all of N institutions, and the seconds of its training."""
    config = dataclasses.replace(config, num_workers=N, seeds=1)
    job, start = built(config), time.perf_counter()
    study = grand_study(config, job, institution_tests(job), empty_utility(job))
    return study, time.perf_counter() - start


def seconds_of_truth(job: Job, tests: list) -> float:
    """All coalitions, trained."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "coalitions.jsonl")
        found = trained(job, all_coalitions(len(job.shards)), tests, path, ignored)
    return sum(line["seconds"] for line in found.values())


def print_table(record: dict[str, Any]) -> None:
    """A row a number of institutions; the truth in brackets where it was not measured."""
    names = list(record["methods"])
    rows = []
    for i, N in enumerate(record["institutions"]):
        truth, by_count = record["truth"][i], record["by_count"][i]
        shown = f"({by_count:,.0f})" if truth is None else f"{truth:.1f}"
        row = [str(N), f"{2**N - 1:,}", f"{record['all'][i]:.2f}", shown]
        rows.append(row + ["" if (s := record["methods"][name][i]) is None else f"{s:.2f}" for name in names])
    table(["institutions", "coalitions", "the model of all, s", "the truth, s", *names], rows)


if __name__ == "__main__":
    sys.exit(main())
