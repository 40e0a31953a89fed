"""Both sides of a federated round, without the network between them.

The server keeps the fleet of the in-process ``fedavg`` and follows its plan; only the local steps
happen elsewhere. A client is one worker of the same fleet: it builds the same job from the same flags,
gets the global model, makes its own steps of the round and sends its row back. Because momentum is
reset on receipt and batches are a function of (seed, worker, step), a client keeps nothing between
rounds: it may be restarted at any time.

A model travels as named arrays in canonical layout, so machines may lay out memory as they like.

Legend: N workers, R rows of the fleet (N), D floats a row.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.build import Job
from training.deal import with_workers
from training.execution import Execution, find_device
from training.protocols import Round, RoundPlan, finished, train_round
from training.protocols.fedavg import FedAvg
from utils.args import Config, differences
from utils.digest import digest_tensors
from utils.errors import UsageError
from utils.parser import parse
from workers.row_layout import RowLayout
from workers.worker_vision import Fleet

Arrays = dict[str, np.ndarray]

IN_PROCESS_ONLY = {
    "keep_momentum": "clients keep nothing between rounds",
    "server_momentum": "the server only averages",
    "finetune": "the server has no right to the clients' data",
    "dp_noise": "its noise follows from --seed, which all nodes know and could take off again",
}


@dataclass(frozen=True)
class Reply:
    """What a client sends back: its row as named arrays, and its training loss summed over the
    round's steps."""

    arrays: Arrays
    loss: float


def configuration(flags: str, own_flags: str = "") -> Config:
    """The run that the shared ``flags`` (of main.py) describe. ``own_flags``: what one machine adds,
    such as ``--dataset_path`` or ``--device``: nothing that changes the numbers of the run.

    Raises :class:`UsageError` for another protocol than fedavg, and for what needs one process.
    """
    shared = _parse(flags)
    config = _parse(f"{flags} {own_flags}") if own_flags else shared
    changed = differences(config.changing_results(), shared.changing_results())
    if changed:
        raise UsageError(f"a node's own flags may not change the run: take --{changed[0]} out of its --node-config.")
    if config.protocol != "fedavg":
        raise UsageError(f"--protocol {config.protocol} runs in one process (main.py); a deployment is fedavg.")
    for name, reason in IN_PROCESS_ONLY.items():
        if getattr(config, name):
            raise UsageError(f"--{name} works in one process only (main.py): {reason}.")
    if config.init != "common":
        raise UsageError("--init per_worker works in one process only (main.py): the server sends its own model.")
    if config.seeds > 1:
        raise UsageError("--seeds: a deployment trains one seed a run; start one run a --seed.")
    return with_workers(config)


def _parse(flags: str) -> Config:
    return parse(Config, ["--protocol", "fedavg", *shlex.split(flags)], "flags of a federated run")


def execution(config: Config) -> Execution:
    """One row at a time on this machine, nothing measured: a client's process lives for one message."""
    return Execution(str(find_device(config.device)), "loop", 1, bool(config.channels_last))


def fingerprint(job: Job, worker: int) -> str:
    """The digest of a worker's shard: sample ids, labels and pixels. Equal on two machines, they would
    train on the same data."""
    ids_n = job.shards[worker]
    data = job.dataset
    return digest_tensors({"ids": ids_n, "labels": data.targets_n[ids_n], "images": data.inputs_n[ids_n]})


def write_row(layout: RowLayout, row_D: Tensor) -> Arrays:
    """A row as named arrays."""
    return {name: tensor.cpu().numpy() for name, tensor in layout.state_dict(row_D).items()}


def read_row(layout: RowLayout, arrays: Mapping[str, np.ndarray], row_D: Tensor, sender: str) -> None:
    """Named arrays into a row. Raises :class:`UsageError` unless names, shapes and types are the
    network's and all values are finite."""
    names = [entry.name for entry in layout.entries]
    if set(names) != set(arrays):
        odd = sorted(set(names) ^ set(arrays))[0]
        raise UsageError(f"{sender} sent the tensors of another network ('{odd}'): use the same code everywhere.")
    for entry in layout.entries:
        tensor = torch.from_numpy(arrays[entry.name])
        if tensor.shape != entry.shape or tensor.dtype != row_D.dtype:
            raise UsageError(
                f"{sender} sent '{entry.name}' as {tuple(tensor.shape)} {tensor.dtype}, not "
                f"{tuple(entry.shape)} {row_D.dtype}: use the same code everywhere."
            )
        if not tensor.isfinite().all():
            raise UsageError(f"{sender} sent a '{entry.name}' that is not finite: lower --lr, or look at that machine.")
        entry.view(row_D).copy_(tensor)


def client_round(job: Job, worker: int, r: int, arrays: Mapping[str, np.ndarray]) -> Reply:
    """Round ``r`` of one worker, from the global model in ``arrays``: its steps of the plan, no others'."""
    plan = FedAvg().plan(job, r)
    steps_N = torch.zeros_like(plan.steps_N)
    steps_N[worker] = plan.steps_N[worker]
    fleet = job.make_fleet()
    read_row(fleet.layout, arrays, fleet.rows_RD[worker], "the server")
    loss_R = train_round(fleet, dataclasses.replace(plan, steps_N=steps_N))
    return Reply(write_row(fleet.layout, fleet.rows_RD[worker]), loss_R[worker].item())


class DeployedFedAvg(FedAvg):
    """The protocol ``fedavg`` with its local steps made elsewhere.

    ``exchange(r, workers, arrays)`` sends the global model to these workers and returns their replies
    in the same order.
    """

    def __init__(self, exchange: Callable[[int, list[int], Arrays], list[Reply]]):
        self.exchange = exchange

    def run(self, fleet: Fleet, job: Job, first: int = 0) -> Iterator[Round]:
        """Rounds ``first`` .. end: the plan of fedavg, weighted by shard size in ascending order."""
        for r in range(first, self.rounds(job)):
            plan = self.plan(job, r)
            loss_R = self.train(fleet, plan, r)
            fleet.mix(plan.mixing)
            yield finished(fleet, plan, r + 1, loss_R)

    def train(self, fleet: Fleet, plan: RoundPlan, r: int) -> Tensor:
        """The local steps of round ``r``, elsewhere; the summed training loss [R]."""
        workers = plan.steps_N.nonzero()[:, 0].tolist()
        replies = self.exchange(r, workers, write_row(fleet.layout, fleet.rows_RD[0]))
        loss_R = torch.zeros(fleet.num_rows, device=fleet.device)
        for worker, reply in zip(workers, replies, strict=True):
            read_row(fleet.layout, reply.arrays, fleet.rows_RD[worker], f"the node of worker {worker}")
            loss_R[worker] = reply.loss
        return loss_R


def check_worker(config: Config, node: Mapping[str, Any]) -> int:
    """The worker that a node's ``--node-config`` makes it. Raises :class:`UsageError` where it does not fit."""
    worker, count = node.get("partition-id"), node.get("num-partitions", config.num_workers)
    if type(worker) is not int or not 0 <= worker < config.num_workers:
        raise UsageError(
            f"the node's partition-id is {worker!r}: start it with --node-config 'partition-id=K', "
            f"K from 0 to {config.num_workers - 1}."
        )
    if count != config.num_workers:
        raise UsageError(f"the node expects num-partitions={count}, the run has --num_workers {config.num_workers}.")
    return worker
