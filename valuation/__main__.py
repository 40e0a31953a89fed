"""Valuation: what each institution's data are worth to the model that all train together, by methods that take seconds,
beside the truth, which retrains every coalition.

    python -m valuation                                       digits, four institutions
    python -m valuation --partition sizes --sizes 1 1 2 4     by size; --worker_flips 0 0 0.1 0.2: wrong labels
    python -m valuation --num_workers 30 --no-truth --valuations ddval cascade
    python -m valuation --seeds 5                             with intervals

All flags of main.py that say what is trained, where and how work here too. Results: results/NAME/valuation/.
"""

from __future__ import annotations

from utils.command import STOPPED, begin, ready

if __name__ == "__main__":
    begin()

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from training.build import Job
    from valuation.args import ValuationConfig
    from valuation.methods import Study

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: parallel over rows, not inside operators


def main(argv: list[str] | None = None) -> int:
    """Parse, train, value, compare, draw. Returns the exit code."""
    from utils.awaited import AWAITS, ResultsMissing
    from utils.errors import UsageError, refusal
    from utils.parser import parse
    from valuation.args import ValuationConfig

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        config = parse(ValuationConfig, argv, __doc__)
        from training.deal import with_workers
        from training.run import own_folder, run_folder

        ready()
        config = with_workers(config)
        folder = run_folder(config if config.run_name else config.training())
        with own_folder(folder):
            run(config, folder / "valuation")
    except (UsageError, OSError) as error:
        return refusal(error)
    except ResultsMissing as awaited:
        again = "The same command" + (" with --resume instead of --overwrite" if config.overwrite else " with --resume")
        print(awaited.what_to_do("The same command" if config.resume else again))
        return AWAITS
    except KeyboardInterrupt:
        print("interrupted; coalitions that have ended are kept: --resume goes on", file=sys.stderr)
        return STOPPED
    return 0


def run(config: ValuationConfig, folder: Path) -> dict[str, Any]:
    """All seeds; returns what summary.json holds, or valuation.json of the only seed."""
    from utils.awaited import each
    from utils.records import write_json
    from valuation.comparison import over_seeds, table_over_seeds

    if config.seeds == 1:
        return value(config, folder)
    claim_seeds(config, folder)
    seeds = list(range(config.seed, config.seed + config.seeds))
    records = each(lambda seed: value(dataclasses.replace(config, seed=seed, seeds=1), folder / f"seed-{seed}"), seeds)
    summary = over_seeds(records)
    write_json(folder / "summary.json", {"seeds": seeds, "methods": summary})
    if summary:
        print(f"\n{table_over_seeds(summary, config.seeds)}")
    if config.plots:
        from visualization.report import write_report
        from visualization.valuation import plot_seeds

        plot_seeds(folder)
        print(f"report: {write_report(folder)}")
    return summary


def claim_seeds(config: ValuationConfig, folder: Path) -> None:
    """Raises :class:`UsageError` where the folder holds results and no flag says what is to become of them."""
    import shutil

    from utils.errors import UsageError

    if folder.exists() and any(folder.glob("**/config.json")):
        if config.overwrite:
            shutil.rmtree(folder)
        elif not config.resume:
            raise UsageError(f"{folder} exists: --resume goes on with it, --overwrite replaces it.")


def value(config: ValuationConfig, folder: Path) -> dict[str, Any]:
    """One seed; returns what valuation.json holds."""
    import numpy as np

    from training.coalitions import all_coalitions
    from training.privacy import check_accountant, spent
    from training.protocols import local_epoch_steps
    from training.rooms import bind_room, claim_room
    from utils.errors import UsageError
    from utils.flags import where
    from utils.progress import bar
    from utils.records import privacy_said, read_record, write_json
    from utils.registry import VALUATIONS
    from valuation.args import MOST_EXACT
    from valuation.comparison import judged, table
    from valuation.features import check_layer
    from valuation.institutions import empty_utility, institution_tests, worth_metric
    from valuation.methods import why_not
    from valuation.truth import of_orders, prefixes, random_orders, shapley, trained

    claim_room(config, folder)
    check_accountant(config)
    exact = config.truth or (folder / "coalitions.jsonl").exists() and not config.overwrite
    job = built(config, exact)
    N, tests, empty = len(job.shards), institution_tests(job), empty_utility(job)
    for name in config.valuations:  # before anything is trained
        if reason := why_not(name, job, exact and N <= MOST_EXACT):
            raise UsageError(f"--valuations {name}: {reason}.")
    check_layer(job, config.feature_layer)
    bind_room(config, job.identity, folder)
    then = read_record(folder / "valuation.json", "methods") if (folder / "valuation.json").exists() else {}
    study, truth, error, seconds = grand_study(config, job, tests, empty), None, None, None
    if exact:
        orders = random_orders(N, config.orders, config.seed) if N > MOST_EXACT else []
        coalitions = prefixes(orders) if orders else all_coalitions(N)
        elsewhere = where(config.cluster, config.cluster_options)
        with bar(len(coalitions), "coalitions", "coalition", config.quiet) as ticks:
            found = trained(job, coalitions, tests, folder / "coalitions.jsonl", ticks.update, elsewhere)
        seconds = sum(line["seconds"] for line in found.values())
        worth = {(): empty, **{members: line["utility"] for members, line in found.items()}}
        study.total = worth[tuple(range(N))] - empty
        if orders:
            truth, error = of_orders(worth, orders)
        else:
            study.worth, truth = worth, shapley(worth, N)
    owners = job.owners and [job.dataset.owners.names[g] for g in job.owners]
    record = {
        "institutions": owners or [f"{k}" for k in range(N)],
        "sizes": [len(shard) for shard in job.shards],
        "metric": worth_metric(job),
        "utility": study.empty + study.total,
        "empty": empty,
        "rounds": study.grand.rounds[0],
        "truth": truth if truth is None else truth.tolist(),
        "truth_error": error if error is None else error.tolist(),
        "truth_seconds": seconds,
        "methods": {},
    }
    earlier = {name: (np.array(found["values"]), found["seconds"]) for name, found in then.get("methods", {}).items()}
    names = config.valuations or [name for name in VALUATIONS if not why_not(name, job, study.worth is not None)]
    for name, (values_N, took) in (earlier | valued(names, study)).items():
        figures = {} if truth is None else judged(values_N, truth)
        record["methods"][name] = {"values": values_N.tolist(), **figures, "seconds": took}
    if config.dp_noise is not None:
        record["privacy"] = spent(job, study.grand.trained[0] * local_epoch_steps(job))
    write_json(folder / "valuation.json", record)
    keep_samples(study, folder / "values.zarr", list(earlier))
    print(table(record))
    print(f"{record['metric']} {record['utility']:.4f} after {record['rounds']} rounds; none: {empty:.4f}; {folder}")
    if "privacy" in record:
        print(privacy_said(record["privacy"]))
    if config.plots:
        draw(study, folder)
    return record


def built(config: ValuationConfig, exact: bool = True) -> Job:
    """The federated run of all institutions, by the engine that suits its rows, or, where all coalitions train
    (``exact``), as many rows as they have members."""
    from training.build import build
    from training.execution import autocast_of
    from workers.tuning import rule

    job = build(config.training())
    if config.engine != "auto" or not exact:
        return job
    N, device = len(job.shards), job.initial_ND.device.type
    rows = min(N * 2 ** (N - 1), config.orders * N * N // 2)
    name = rule(job.model, rows, device, autocast_of(config), config.batch_size, config.dp_noise is not None)
    return build(config.training(), dataclasses.replace(job.execution, engine=name))


def grand_study(config: ValuationConfig, job: Job, tests: list, empty: float) -> Study:
    """The model of all institutions, and what it is worth."""
    from training.coalitions import train_coalitions
    from utils.progress import bar
    from valuation.institutions import utilities
    from valuation.methods import Study, Updates

    updates, everybody = Updates(), tuple(range(len(job.shards)))
    with bar(int(config.epochs), "all institutions", "round", config.quiet) as ticks:
        grand = train_coalitions(job, [everybody], ticks.update, updates.watch)
    utility = float(utilities(job, grand.rows_CD, tests).mean())
    return Study(
        job, tests, grand, empty, utility - empty, config.knn, updates, feature_noise=config.feature_noise,
        layer=config.feature_layer,
    )  # fmt: skip


def valued(names: Sequence[str], study: Study) -> dict[str, tuple[np.ndarray, float]]:
    """The values of each method and its seconds; of one that cannot value these data a warning."""
    from utils.errors import UsageError

    found = {}
    for name in names:
        try:
            found[name] = timed(name, study)
        except UsageError as error:
            warnings.warn(f"{name} gives no values: {error}", stacklevel=2)
    return found


def timed(name: str, study: Study) -> tuple[Any, float]:
    """A method's values, and the seconds it took (beside the training of the model of all)."""
    from utils.registry import VALUATIONS, load

    start = time.perf_counter()
    values_N = load(VALUATIONS, name, "method")(study)
    return values_N, time.perf_counter() - start


def keep_samples(study: Study, path: Path, earlier: list[str]) -> None:
    """A value for each training sample and method that values samples, as zarr; those of ``earlier`` stay."""
    from utils.scores import read_scores, write_scores
    from valuation.methods import OF_SAMPLES

    if not study.samples:
        return
    known = [name for name in OF_SAMPLES if name in earlier] if path.exists() else []
    kept = read_scores(path, known) if known else {}
    arrays = {name: kept[name] for name in known}
    arrays |= {name: values_n.numpy() for name, values_n in study.samples.items()}
    owners = {"sample_id": study.job.train_ids.numpy(), "worker": study.owner_n.numpy()}
    settings = {"run": study.job.identity["digest"], "total": study.total, "methods": list(arrays)}
    write_scores(path, {**arrays, **owners}, settings, list(arrays))


def draw(study: Study, folder: Path) -> None:
    """The pictures."""
    from training.scores import sheet_of
    from visualization.influence_plots import plot_contact_sheet
    from visualization.report import write_report
    from visualization.valuation import plot_valuation

    plot_valuation(folder)
    if "ddval" in study.samples:
        what = sheet_of(study.job, study.samples["ddval"].numpy())
        flipped = set(study.job.corruption.get("flipped", [])) or None
        plot_contact_sheet(*what, folder / "plots" / "samples.png", flipped, "ddval", study.job.dataset.sources)
    print(f"report: {write_report(folder)}")


if __name__ == "__main__":
    sys.exit(main())
