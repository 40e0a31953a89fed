"""Work elsewhere, in other processes here, on a Dask cluster or wherever the user runs files: recipes
(:mod:`training.recipe`) go out as JSON, results come back as JSON, and each is handed over as soon as it is there.

Whoever can reach a Dask scheduler can run code on its workers, and its greeting negotiates pickle: connect to
schedulers that you started, on networks that you trust, or over TLS (README, 'Bad workers and crashes').
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.recipe import Recipe, collected, done, hand_out
from utils.errors import UsageError

if TYPE_CHECKING:
    from dask.distributed import Client
    from dask_jobqueue import SLURMCluster

RETRIES = 3  # of a task whose worker died under it
SECONDS_FOR_WORKERS = 30


def completed(cluster: str | None, recipes: Sequence[Recipe], folder: Path) -> Iterator[tuple[int, Any]]:
    """(i, value of ``recipes[i]``): first of those whose results lie in the folder, then of the others, in the order in
    which they end. ``cluster`` None: there are no others. ``recipes``: the others are written to the folder, for the
    user to run, and :class:`ResultsMissing` says so.

    Raises :class:`UsageError` where a result is damaged or another's, no scheduler or worker is there, the scheduler
    goes away, or a task has lost too many workers.
    """
    there = set()
    for i, value in collected(recipes, folder):
        there.add(i)
        yield i, value
    others = [i for i in range(len(recipes)) if i not in there]
    if cluster is None or not others:
        return
    if cluster == "recipes":
        hand_out([recipes[i] for i in others], folder)
    for k, text in texts(cluster, [json.dumps(recipes[i].to_json()) for i in others]):
        yield others[k], recipes[others[k]].value_of(text, f"what came from --cluster {cluster}")


def texts(cluster: str, tasks: list[str], work: Callable[[str], str] = done) -> Iterator[tuple[int, str]]:
    """(k, ``work(tasks[k])``) as they end. A task whose worker is killed starts again on another one."""
    from dask.distributed import CancelledError, KilledWorker, as_completed
    from distributed.comm import CommClosedError

    problem = None
    with connected(cluster) as client:
        index = {client.submit(work, task, retries=RETRIES, pure=False): k for k, task in enumerate(tasks)}
        for future in as_completed(list(index)):
            try:
                result = future.result()
            except KilledWorker:
                problem = "several workers died at the same task (out of memory?): give them more, or lower --memory_gb"
            except (CancelledError, CommClosedError, OSError, TimeoutError):
                problem = "the scheduler has gone away: start it again"
            except RuntimeError as error:
                if "deserialization" not in str(error):
                    raise
                problem = "the scheduler does not find this project's code: start it in the project's folder"
            if problem:
                break
            yield index[future], result
            future.release()
    if problem:
        raise UsageError(f"--cluster {cluster}: {problem}. What had ended is kept; the same command goes on.")


@contextlib.contextmanager
def connected(cluster: str) -> Iterator[Client]:
    """``local:K`` starts K single-threaded processes here, which only this machine can reach; ``slurm:K`` keeps K jobs
    in SLURM's queue (``slurm:K?FILE``: with the options of a YAML file); ``tcp://host:port`` and ``tls://host:port``
    use a scheduler that is there."""
    from dask.distributed import Client, LocalCluster

    for name in logging.root.manager.loggerDict:
        if name.startswith(("distributed", "tornado")):  # they tell every lost connection with a traceback
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if cluster.startswith("local:"):
        with (
            LocalCluster(
                n_workers=local_processes(cluster),
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=None,
                silence_logs=50,
            ) as local,
            Client(local) as client,
        ):
            yield client
        return
    if cluster.startswith("slurm:"):
        with slurm_cluster(cluster) as jobs, Client(jobs) as client:
            yield client
        return
    try:
        client = Client(cluster, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(
            f"--cluster {cluster}: no Dask scheduler answers there ({error}). In this project's folder, start one with "
            "'python -m dask scheduler --host 127.0.0.1' and workers with 'python -m dask worker ADDRESS --nthreads 1'."
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=SECONDS_FOR_WORKERS)
        except TimeoutError as error:
            raise UsageError(
                f"--cluster {cluster}: the scheduler has no workers: start some, in this project's folder, with "
                f"'python -m dask worker {cluster} --nthreads 1'."
            ) from error
        yield client


def local_processes(cluster: str) -> int:
    """K of 'local:K'."""
    count = cluster.removeprefix("local:")
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(f"--cluster {cluster}: give local:K with K processes, as in local:2.")
    return int(count)


def slurm_cluster(cluster: str) -> SLURMCluster:
    """K jobs of one thread each; one that ends or is killed is queued again. Options of the YAML file are those of
    dask-jobqueue's ``SLURMCluster``: queue, account, walltime, memory, job_extra_directives, job_script_prologue."""
    import yaml

    from utils.files import read_bytes

    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise UsageError("--cluster slurm:K needs dask-jobqueue: pip install -r requirements-slurm.txt.") from error
    count, _, file = cluster.removeprefix("slurm:").partition("?")
    options = {}
    if file:
        try:
            options = yaml.safe_load(read_bytes(file, "--cluster_options")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"--cluster_options {file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UsageError(f"--cluster_options {file}: give lines of NAME: VALUE, such as 'queue: gpu'.")
    project = Path(__file__).resolve().parent.parent
    prologue = [f"cd {shlex.quote(str(project))}", "export OMP_NUM_THREADS=1", *options.pop("job_script_prologue", [])]
    if "log_directory" not in options:  # sbatch would leave a file a job in the folder where the command runs
        options["job_extra_directives"] = ["--output=/dev/null", *options.get("job_extra_directives", [])]
    settings = {"cores": 1, "processes": 1, "memory": "2GB", "walltime": "24:00:00", "python": sys.executable} | options
    try:
        jobs = SLURMCluster(**settings, job_script_prologue=prologue)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--cluster_options {file}: {error}") from error
    jobs.adapt(minimum_jobs=int(count), maximum_jobs=int(count))
    return jobs
