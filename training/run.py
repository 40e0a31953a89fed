"""Runs and their directories: start one, resume it, or refuse to touch it.

results/<run_name>/stage1/             one seed
results/<run_name>/seed-<s>/stage1/    with --seeds, one folder a seed, and summary.json above them
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.build import Job, build
from training.execution import Execution
from training.identity import check_identity, settings_of
from training.observers import check_logs
from training.privacy import check_accountant
from training.protocols import load_protocol
from training.trainer import train
from utils.args import Config, differences
from utils.digest import digest_json
from utils.effects import asks_graph
from utils.errors import LEDGER, UsageError, check_installed
from utils.lock import locked
from utils.progress import within
from utils.recorded import FILES, file_digests
from utils.records import metric_of, read_json, read_result, write_json
from workers import distributed

# What the processes of one run may have each of their own.
OWN = ("dataset_path", "download", "device", "threads", "quiet", "ledger_keys")
NAMED = ("dataset_name", "model", "protocol", "mode", "num_workers", "dirichlet", "nonIID", "partition", "alpha",
         "shards_per_worker", "seed")  # fmt: skip
LONGEST_NAME = 100
DERIVED = ("audit.*", "retrainings-*.json", "smoothness-*.json", "shares-*.json", "sweep.*", "comparison*",
           "node_view_*", "edges.png", "scores_*.png", "extremes_*.png", "report.html")  # fmt: skip
OVER_SEEDS = ("audit.json", "sweep.*", "comparison*.json", "summary.json", "seeds.png", "report.html")  # above seeds


def run_name(config: Config) -> str:
    """``--run_name``, or a name made of the main settings and of all others that are not at their defaults, so
    that different runs do not share a folder."""
    if config.run_name:
        return config.run_name
    kind = config.partition_kind
    shards = {"dirichlet": f"dirichlet{config.alpha:g}", "shards": f"shards{config.shards_per_worker}"}.get(kind, kind)
    names = [config.protocol] * (config.protocol != "gossip") + [config.mode] * asks_graph(config)
    who = "-".join(names)
    data = [config.dataset_name, Path(config.dataset_path).resolve().name if config.dataset_path else ""]
    main = ["-".join(filter(None, dict.fromkeys(data))), config.model, f"{who}{config.num_workers}", shards]
    others = [f"{name}{_short(value)}" for name, value in settings_of(config).items() if name not in NAMED]
    others += [f"{name}-{digest[:6]}" for name, digest in file_digests(config).items()]
    if len("_".join([*main, *others])) > LONGEST_NAME:
        others = [digest_json(others)[:8]]
    replay = ["replay"] if config.config else []
    return "_".join([*main, *others, f"seed{config.seed}", *replay])


def _short(value: Any) -> str:
    """A setting as a part of a file name."""
    if isinstance(value, list):
        return "-".join(map(_short, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "-", text)


def run_folder(config: Config) -> Path:
    """The folder of a run: what ``--results_dir`` and ``--run_name`` say."""
    return Path(config.results_dir) / run_name(config)


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Nobody else works in the folder of a run until the block ends; of several processes the first one locks it."""
    with contextlib.ExitStack() as held:
        distributed.by_first(lambda: held.enter_context(locked(folder)))
        yield


def train_run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Train in ``run_dir`` as the configuration says, and return the summary; a finished run is not
    trained again. Raises :class:`UsageError` where the directory holds another run, or this one and
    neither ``--resume`` nor ``--overwrite`` is given."""
    job = prepare(config, run_dir)
    return distributed.by_first(lambda: read_result(run_dir)) if job is None else train(job, run_dir)


def prepare(config: Config, run_dir: Path, first: Execution | None = None) -> Job | None:
    """The job that may now be trained in ``run_dir``; None where it is finished. What ``--overwrite`` replaces is
    deleted here, once it is sure that the new run can begin. ``first``: how a run that begins is executed.
    Raises :class:`UsageError` as :func:`claim` and :func:`build` do, where the recorded run is of other data, and
    where a package is missing that the run will need."""
    check_packages(config)
    execution = claim_together(config, run_dir)
    job = build(config, execution or first)
    load_protocol(config.protocol).check(job)
    if execution is None:
        clear(run_dir)
        return job
    distributed.by_first(lambda: check_identity(run_dir, job.identity))
    finished = distributed.by_first(lambda: (run_dir / "summary.json").exists())
    return None if finished else job


def check_packages(config: Config) -> None:
    """Raises :class:`UsageError` where a package that the run will need at its end is missing."""
    check_logs(config)
    if config.ledger:
        check_installed(LEDGER, "requirements-ledger.txt", "--ledger")
    check_accountant(config)


def check_same_command(config: Config) -> None:
    """Raises :class:`UsageError` on all processes unless they were started with the same settings."""
    distributed.agree({f"--{k}": v for k, v in config.to_json().items() if k not in OWN}, "settings")


def claim_together(config: Config, run_dir: Path) -> Execution | None:
    """:func:`claim`, done by process 0 for all. Processes that torchrun restarts after a fault resume."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        config = dataclasses.replace(config, resume=True, overwrite=False)

    def claimed() -> dict[str, Any] | None:
        execution = claim(config, run_dir)
        return None if execution is None else vars(execution)

    execution = distributed.by_first(claimed)
    return None if execution is None else Execution(**execution)


def claim(config: Config, run_dir: Path) -> Execution | None:
    """Decide whether ``run_dir`` may be written (nothing is touched): the recorded execution where a run is
    resumed, None where one begins; :func:`clear` deletes what it replaces."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return None
    if not (run_dir / "config.json").exists():
        if config.resume or config.overwrite:
            return None
        raise UsageError(
            f"{run_dir} holds files, but no run (or one that was killed before its first round: then --resume "
            "starts it again): choose another --run_name or --results_dir."
        )
    if config.overwrite:
        check_outside(config, run_dir)
        return None
    if not config.resume:
        raise UsageError(
            f"the run {run_dir} exists: --resume goes on with it, --overwrite replaces it, "
            "--run_name NAME starts another."
        )
    return recorded_execution(config, run_dir)


def check_outside(config: Config, run_dir: Path) -> None:
    """Raises :class:`UsageError` where the new run would read what it is about to delete."""
    for name in (*FILES, "config", "dataset_path"):
        path = getattr(config, name)
        if path and Path(path).resolve().is_relative_to(run_dir.resolve()):
            raise UsageError(
                f"--{name} {path} lies inside the run that --overwrite would delete: give another --run_name, or "
                "copy it elsewhere first."
            )


def clear(run_dir: Path) -> None:
    """Delete what a new run in ``run_dir`` replaces: a run, or what is left of one that was killed before its
    first line. (Other files stay.)"""
    if distributed.rank() == 0:
        if (run_dir / "config.json").exists():
            remove_run(run_dir)
        for name in ("checkpoints", "trajectory"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
    distributed.barrier()


def remove_run(run_dir: Path) -> None:
    """Delete a run, and what was computed from it and lies beside it: scores, audits, jobs, comparisons, pictures.
    (A stage 2 is a run of its own; it stays, and is refused by a stage 1 that it does not stand on.)"""
    shutil.rmtree(run_dir)
    if run_dir.name != "stage1":
        return
    folder = run_dir.parent
    for name in ("influence", "jobs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    above = OVER_SEEDS if re.fullmatch(r"seed-\d+", folder.name) else ()
    for file in [f for p in DERIVED for f in folder.glob(p)] + [f for p in above for f in folder.parent.glob(p)]:
        file.unlink()


def recorded_execution(config: Config, run_dir: Path) -> Execution:
    """The execution of a recorded run of the same configuration; :class:`UsageError` of another."""
    record = read_json(run_dir / "config.json")
    try:
        other = other_settings(config, record)
        execution = Execution(**record["execution"])
        recorded_files = recorded_digests(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run_dir / 'config.json'} is not the record of a run: --overwrite replaces it.") from error
    files = file_digests(config)
    if other:
        raise UsageError(
            f"the run {run_dir} was made with another {', '.join('--' + name for name in other)}: give the "
            "same settings, or another --run_name."
        )
    changed = [f"--{name}" for name, digest in files.items() if recorded_files.get(name, digest) != digest]
    if changed:
        raise UsageError(
            f"the file of {', '.join(changed)} is not what it was when the run {run_dir} was made: put the old "
            "contents back, or give another --run_name."
        )
    return execution


def other_settings(config: Config, record: dict[str, Any]) -> list[str]:
    """The settings in which a recorded run differs from a configuration; files count by content. Raises KeyError,
    TypeError or AttributeError where it is no record."""
    now, files, recorded_files = config.changing_results(), file_digests(config), recorded_digests(record)
    names = differences(now, {k: v for k, v in record["config"].items() if k in now})
    return [name for name in names if name not in files or files[name] != recorded_files.get(name)]


def recorded_digests(record: dict[str, Any]) -> dict[str, str]:
    """What config.json says of the files that its settings name."""
    return {str(k): str(v) for k, v in record.get("files", {}).items()}


def check_beside(config: Config) -> None:
    """Raises :class:`UsageError` where the folder of a run holds seeds of other settings, or the folder of seeds
    another run: summaries and sheets of several seeds would take them for one."""
    folder = run_folder(config)
    mine = [f"seed-{s}" for s in range(config.seed, config.seed + config.seeds)] if config.seeds > 1 else [""]
    for path in sorted([folder / "stage1" / "config.json", *folder.glob("seed-*/stage1/config.json")]):
        if path in [folder / name / "stage1" / "config.json" for name in mine] or not path.is_file():
            continue  # whether it may be resumed or replaced is asked later
        try:
            other = [name for name in other_settings(config, read_json(path)) if name != "seed"]
        except (UsageError, KeyError, TypeError, AttributeError):
            continue
        if other:
            raise UsageError(
                f"{path.parent} was made with another {', '.join('--' + name for name in other)}, and runs in one "
                "folder may differ in their seeds only: give another --run_name."
            )


def each_seed(config: Config) -> Iterator[Config]:
    """The configuration of each of ``--seeds``, with a folder of its own where there are several: it belongs to this
    process until the next one is asked for."""
    distributed.by_first(lambda: check_beside(config))
    if config.seeds == 1:
        yield config
        return
    name = run_name(config)
    for seed in range(config.seed, config.seed + config.seeds):
        one = dataclasses.replace(config, seed=seed, seeds=1, run_name=f"{name}/seed-{seed}")
        label = within(f"seed {seed} ({seed - config.seed + 1} of {config.seeds})")
        with own_folder(run_folder(one)), label:
            yield one


def train_seeds(config: Config) -> tuple[dict[str, Any], list[Path]]:
    """``--seeds`` runs; returns the summary (mean and standard deviation for several) and the run
    directories."""
    summaries, run_dirs = [], []
    for one in each_seed(config):
        run_dirs.append(run_folder(one) / "stage1")
        summaries.append(train_run(one, run_dirs[-1]))
    if len(summaries) == 1:
        return summaries[0], run_dirs
    summary = {"seeds": config.seeds}
    name = metric_of(summaries[0])["name"]
    summary["metric"] = metric_of(summaries[0])
    for key in (f"test_{name}", "test_loss", "consensus_distance", "epochs", "rounds", "seconds"):
        values = [s[key] for s in summaries]
        known = all(value is not None and math.isfinite(value) for value in values)
        summary |= {key: statistics.mean(values) if known else None}
        summary |= {f"{key}_std": statistics.stdev(values) if known else None}
    private = [s["privacy"] for s in summaries if "privacy" in s]
    if private:
        summary["privacy"] = max(private, key=lambda found: found["epsilon"] or 0)
    if distributed.rank() == 0:
        write_json(run_folder(config) / "summary.json", summary)
    return summary, run_dirs
