"""The fleet over several processes: each owns a block of rows (``torchrun``).

Only rows move: a sparse graph sends each row once to every process with a receiver of it, while the
receivers that need no foreign row are mixed; equal rows are one all-reduce, nearly full graphs one
all-gather. What a rank computes for a receiver is the same as in one process, so sparse graphs give
the same bits. Everything that is sent is a tensor: no object of a peer is unpickled.

Legend: N workers, p processes, n rows here, h foreign rows, D floats a row.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy import sparse
from torch import Tensor

from utils.devices import send
from utils.digest import digest_json
from utils.errors import UsageError
from workers.mixing import is_average, is_dense, mix_rows
from workers.worker_vision import Fleet

JOIN, WAIT = timedelta(seconds=60), timedelta(minutes=30)  # for the connection, and for what others compute
STEP = timedelta(minutes=5)  # for what another stage of the same step computes


def started() -> bool:
    """Whether this process is one of several that torchrun started and joined."""
    return dist.is_available() and dist.is_initialized()


def join(device: torch.device) -> None:
    """Join the other processes, if torchrun started this one. Rows travel by nccl between GPUs; what is on the CPU,
    settings and signals, always by gloo, so that it waits for no GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not started():
        store, rank, world = next(dist.rendezvous("env://", timeout=JOIN))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store for all restarts, in which restarted processes would find each other's old
            # addresses. (Over several machines the count may differ: there a failed connection ends in a restart.)
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else every process would work, and nccl look for it, on GPU 0
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=JOIN)
        dist.distributed_c10d._set_pg_timeout(WAIT)


def leave() -> None:
    """Leave the group, in an orderly way."""
    if started():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 where there is one."""
    return dist.get_rank() if started() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if started() else 1


def barrier() -> None:
    """Wait for all processes."""
    if started():
        dist.all_reduce(torch.zeros(1))  # on the CPU, whatever the rows are on


def block(num_workers: int, rank: int, world: int) -> range:
    """The rows of a process: consecutive, sizes differ by one at most."""
    return range(num_workers * rank // world, num_workers * (rank + 1) // world)


def share_json(value: Any) -> Any:
    """Process 0's JSON-able value, on all processes."""
    if not started():
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0)
    if rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def by_first(compute: Callable[[], Any]) -> Any:
    """What ``compute`` returns (JSON-able), called by process 0 alone, on all processes. What the user has to change
    there is a :class:`UsageError` on all of them, so that none waits for one that has given up."""
    if not started():
        return compute()
    answer: dict[str, Any] = {}
    if rank() == 0:
        try:
            answer = {"value": compute()}
        except (UsageError, OSError) as error:
            answer = {"error": str(error)}
    answer = share_json(answer)
    if "error" in answer:
        raise UsageError(answer["error"])
    return answer["value"]


def agree(parts: dict[str, Any], what: str) -> None:
    """Raises :class:`UsageError` on every process unless all have the same ``parts``, naming those that differ.

    Processes with other settings or data would train on, plausibly, or wait for each other for ever.
    """
    if not started():
        return
    names = sorted(parts)
    own = torch.tensor([list(bytes.fromhex(digest_json(parts[name]))) for name in names])
    everyone = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(everyone, own)
    for p, theirs in enumerate(everyone):
        odd = [name for name, same in zip(names, (theirs == everyone[0]).all(1).tolist(), strict=True) if not same]
        if odd:
            raise UsageError(
                f"process {p} has {what} of its own ({', '.join(odd)}): start all processes with the same command, "
                "code and data."
            )


@contextlib.contextmanager
def needing(others: str) -> Iterator[None]:
    """Where a peer is gone or silent for too long while the block waits for it: a :class:`UsageError` that names it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        line = f"{others} no longer answers ({reason}): --resume goes on from the last checkpoint."
        raise UsageError(line) from error


@dataclass(frozen=True)
class Group:
    """Some processes that meet: this one's number among them, how many they are, and what torch knows them by (None:
    all there are)."""

    rank: int
    world: int
    handle: dist.ProcessGroup | None = None


class ShardedFleet(Fleet):
    """The rows of one process. ``among``: the processes that share out the rows (default: all). ``crossed_bytes``: what
    this process has sent to others so far."""

    def __init__(self, *arguments: Any, among: Group | None = None, **options: Any):
        self.among = Group(rank(), world()) if among is None else among
        batches = arguments[3]
        super().__init__(*arguments, **options, owned=block(len(batches.lengths_N), self.among.rank, self.among.world))
        if self.replicas != 1:
            raise ValueError("several replicas of a fleet run in one process")
        self._blocks = [block(self.num_workers, p, self.among.world) for p in range(self.among.world)]
        self._divided = {self.num_workers: self._blocks}
        self._plans: dict[int, tuple] = {}
        self.crossed_bytes = 0

    @property
    def others(self) -> str:
        """See :class:`Fleet`."""
        peers = [str(p) for p in range(self.among.world) if p != self.among.rank]
        return f"process {' or '.join(peers)} of {self.among.world}"

    @property
    def part(self) -> tuple[int, int] | None:
        """Each process writes its rows."""
        return self.among.rank, self.among.world

    # ---- meeting --------------------------------------------------------------------------------

    def divide(self, owner_A: np.ndarray) -> None:
        """A protocol's A rows, in ascending order of the workers [A] that have them: each lives where its worker is."""
        ends = [int(np.searchsorted(owner_A, b.stop)) for b in self._blocks]
        blocks = [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
        if self._divided.setdefault(len(owner_A), blocks) != blocks:
            raise ValueError(f"{len(owner_A)} rows are divided in two ways")

    def block_of(self, rows: int) -> range:
        """Which of a protocol's ``rows`` live here."""
        return self._divided[rows][self.among.rank]

    def mix_into(self, matrix: sparse.csr_array, source: Tensor, target: Tensor) -> None:
        """See :class:`Fleet`."""
        square = matrix.shape[0] == matrix.shape[1] == self.num_workers
        if square and is_average(matrix):
            self._average(matrix, source, target)
        elif square and is_dense(matrix):
            receivers = np.arange(self.owned.start, self.owned.stop)
            mix_rows(self.engine, matrix, self._gather_rows(source), target, receivers)
        else:
            self._exchange(matrix, source, target)

    def _average(self, matrix: sparse.csr_array, source: Tensor, target: Tensor) -> None:
        """All receivers get one row: each process adds up its part, one all-reduce adds the parts."""
        indices, data = matrix.indices[: matrix.indptr[1]], matrix.data[: matrix.indptr[1]]
        total_D = torch.zeros_like(source[0])
        for index, weight in zip(indices.tolist(), data.tolist(), strict=True):
            if index in self.owned:
                total_D.add_(source[index - self.owned.start], alpha=weight)
        dist.all_reduce(total_D, group=self.among.handle)
        # A ring all-reduce sends 2 (p - 1) / p rows from every process.
        self.crossed_bytes += 2 * (self.among.world - 1) * total_D.nbytes // self.among.world
        target[:] = total_D

    def _gather_rows(self, source: Tensor) -> Tensor:
        """All rows [N, D] on every process."""
        parts = [torch.empty(len(b), source.shape[1], dtype=source.dtype, device=source.device) for b in self._blocks]
        self._all(parts, source)
        self.crossed_bytes += (self.among.world - 1) * source.nbytes
        return torch.cat(parts)

    def all_rows(self) -> Tensor:
        """Those of all processes."""
        return self._gather_rows(self.rows_RD)

    def _all(self, parts: list[Tensor], source: Tensor) -> None:
        """All-gather into ``parts``; of blocks of different sizes, by a broadcast each."""
        if len({len(part) for part in parts}) == 1:
            dist.all_gather(parts, source.contiguous(), group=self.among.handle)
            return
        parts[self.among.rank].copy_(source)
        for p, part in enumerate(parts):
            dist.broadcast(part, group=self.among.handle, group_src=p)

    def _exchange(self, matrix: sparse.csr_array, source: Tensor, target: Tensor) -> None:
        """Neighbours only: send boundary rows, mix the interior meanwhile, then the boundary."""
        sends, receives, interior, boundary, position_N, places = self._plan(matrix)
        foreign = {
            p: torch.empty(count, source.shape[1], dtype=source.dtype, device=source.device)
            for p, count in receives.items()
        }
        outgoing = {p: source.index_select(0, rows) for p, rows in sends.items()}
        group = self.among.handle
        operations = [dist.P2POp(dist.isend, rows, group=group, group_peer=p) for p, rows in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, rows, group=group, group_peer=p) for p, rows in foreign.items()]
        requests = dist.batch_isend_irecv(operations) if operations else []
        offsets_N = np.arange(matrix.shape[1]) - self.block_of(matrix.shape[1]).start
        mixed = torch.empty(len(interior), source.shape[1], dtype=source.dtype, device=source.device)
        mix_rows(self.engine, matrix, source, mixed, interior, offsets_N)
        target.index_copy_(0, places["interior"], mixed)
        for request in requests:
            request.wait()
        self.crossed_bytes += sum(rows.nbytes for rows in outgoing.values())
        if len(boundary):
            at_hand = torch.cat([source.index_select(0, places["needed"]), *foreign.values()])
            mixed = torch.empty(len(boundary), source.shape[1], dtype=source.dtype, device=source.device)
            mix_rows(self.engine, matrix, at_hand, mixed, boundary, position_N)
            target.index_copy_(0, places["boundary"], mixed)

    def _plan(self, matrix: sparse.csr_array) -> tuple:
        """The own rows to send to each process and how many to get from it, the receivers that need no foreign row
        and those that do, where each row will be at hand, and the places here of both and of the own rows that the
        latter need; computed once a matrix, places on the device."""
        kept = self._plans.get(id(matrix))
        if kept is not None and kept[0] is matrix:
            return kept[1]
        to, of = self._divided[matrix.shape[0]], self._divided[matrix.shape[1]]
        receivers_of = [matrix[b.start : b.stop] for b in to]
        wanted = [np.unique(part.indices) for part in receivers_of]  # rows that each process needs
        me = self.among.rank
        own, places_of = of[me], lambda rows, here: self._places(rows - here.start)
        sends = {
            p: places_of(rows, own)
            for p, rows in ((p, _within(wanted[p], own)) for p in range(self.among.world))
            if p != me and len(rows)
        }
        receives = {
            p: rows.tolist()
            for p, rows in ((p, _within(wanted[me], b)) for p, b in enumerate(of))
            if p != me and len(rows)
        }
        received = receivers_of[me]
        alien = (received.indices < own.start) | (received.indices >= own.stop)
        has_alien = np.bincount(np.repeat(np.arange(received.shape[0]), np.diff(received.indptr))[alien],
                                minlength=received.shape[0]) > 0  # fmt: skip
        here = np.arange(to[me].start, to[me].stop)
        boundary = here[has_alien]
        needed = _within(np.unique(matrix[boundary].indices), own) if len(boundary) else here[:0]
        order = [*needed.tolist(), *(k for rows in receives.values() for k in rows)]
        position_N = np.full(matrix.shape[1], -1)
        position_N[order] = np.arange(len(order))
        interior = here[~has_alien]
        parts = {"interior": (interior, to[me]), "boundary": (boundary, to[me]), "needed": (needed, own)}
        places = {name: places_of(*part) for name, part in parts.items()}
        counts = {p: len(rows) for p, rows in receives.items()}
        result = (sends, counts, interior, boundary, position_N, places)
        self._plans[id(matrix)] = (matrix, result)
        return result

    def _places(self, rows: np.ndarray) -> Tensor:
        """Places of rows, on the device."""
        return send(torch.as_tensor(rows, dtype=torch.int64), self.device)

    # ---- looking --------------------------------------------------------------------------------

    def collect(self, values_R: Tensor) -> Tensor:
        """Values of the rows here as values of all rows [N, ...]."""
        parts = [values_R.new_empty(len(b), *values_R.shape[1:]) for b in self._blocks]
        self._all(parts, values_R)
        return torch.cat(parts)

    def consensus(self) -> Tensor:
        """The mean row of all processes [1, D]: the sum goes from process to process, so that rows are added in
        the order of one process, and the last one tells it to all."""
        total_D = torch.zeros_like(self.rows_RD[0])
        if self.among.rank > 0:
            dist.recv(total_D, group=self.among.handle, group_src=self.among.rank - 1)
        self._add_counted(total_D, self.rows_RD)
        if self.among.rank < self.among.world - 1:
            dist.send(total_D, group=self.among.handle, group_dst=self.among.rank + 1)
        dist.broadcast(total_D, group=self.among.handle, group_src=self.among.world - 1)
        return total_D[None] / self.counted().sum()

    def total_crossed_bytes(self) -> int:
        """Bytes that crossed process boundaries in gossip, all processes together."""
        total = torch.tensor([self.crossed_bytes], dtype=torch.int64)
        dist.all_reduce(total)
        return int(total)


def _within(rows: np.ndarray, block: range) -> np.ndarray:
    return rows[(rows >= block.start) & (rows < block.stop)]
