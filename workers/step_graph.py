"""A step of the whole fleet, recorded once and replayed: what the ``graph`` engine does on a GPU.

A GPU is done with a layer of a small network before the CPU has asked for the next one, and N workers ask
N times. Here the forward pass, backward pass and update of all workers are captured in CUDA graphs of up to
512 rows, on parallel streams, so that a step is a few launches. Only the batch is made anew, outside of the
graphs and for all workers at once, and copied to where they read it.

The arithmetic is that of the ``loop`` engine, operator by operator; on a GPU the learning rate is rounded to
float32, in which the fused update reads it from memory. Elsewhere than on a GPU nothing is captured: the same
code runs on the same fixed tensors, which is how the tests hold it to the loop's bits.

Legend: N workers, R rows, D floats a row, S floats of an optimizer's state, B batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from utils.errors import UsageError
from workers.batch import Batch

STREAMS = 8  # branches of a graph; each holds the activations of one worker at a time
GRAPHED_ROWS = 512  # rows of one graph: it has every kernel of every row
Pool = tuple[int, int] | None
MATRICES = 4  # gossip writes to a second matrix, and the two take turns: each is recorded


class RecordingFailed(UsageError):
    """A step could not be recorded; nobody knows the state of CUDA, so the process should end."""


class Streams(NamedTuple):
    """The streams of a device: one to capture on, which runs nothing itself, and the branches."""

    capture: torch.cuda.Stream
    branches: tuple[torch.cuda.Stream, ...]


@cache
def streams_of(device: torch.device) -> Streams:
    """One set a device, for all fleets. PyTorch has 32 streams a device and hands them out in turn; when a graph
    is destroyed it clears the cuBLAS workspaces of the stream that the graph was captured on (pytorch issue
    193402). Were each fleet to take streams of its own, that could be a branch of another fleet's live graph."""
    return Streams(torch.cuda.Stream(device), tuple(torch.cuda.Stream(device) for _ in range(STREAMS)))


def record(
    device: torch.device, rows: int, step: Callable[[int], None], rehearse: Callable[[int], None], pool: Pool = None
) -> Callable[[], None]:
    """A function that does ``step(row)`` for all rows: on a GPU by replaying graphs of it, on parallel streams.

    ``rehearse(row)`` does the same without leaving a trace: libraries choose their kernels and workspaces before
    a capture. ``pool``: memory for what the graphs compute on the way, which other graphs may use too: they run in
    turn and leave nothing behind. Raises :class:`RecordingFailed` where a step cannot be captured.
    """
    if device.type != "cuda":
        return lambda: [step(row) for row in range(rows)]
    streams, graphs = streams_of(device), []
    pool = pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.device(device):
            for first in range(0, rows, GRAPHED_ROWS):
                block = range(first, min(first + GRAPHED_ROWS, rows))
                _on_branches(device, streams, block, rehearse)
                torch.cuda.synchronize(device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=streams.capture, capture_error_mode="thread_local"):
                    _on_branches(device, streams, block, step)
                graphs.append(graph)
    except RuntimeError as error:
        first = _first_of(error)
        if isinstance(first, torch.OutOfMemoryError) or not isinstance(first, RuntimeError):
            raise first from None  # the network is not to blame
        reason = str(first).splitlines()[0]
        raise RecordingFailed(f"this network's steps cannot be recorded ({reason}): use --engine loop.") from error
    return lambda: [graph.replay() for graph in graphs]


def _first_of(error: BaseException) -> BaseException:
    """What went wrong first: a capture that is left by an error ends with one of its own, since its streams have not
    been joined, and that is the one that arrives."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _on_branches(device: torch.device, streams: Streams, rows: range, step: Callable[[int], None]) -> None:
    """``step`` for every row, on streams that start from the current one and join it again."""
    own = torch.cuda.current_stream(device)
    branches = streams.branches[: len(rows)]
    for i, stream in enumerate(branches):
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            for row in rows[i :: len(branches)]:
                step(row)
    for stream in branches:
        own.wait_stream(stream)


class FixedBatch:
    """The batch of all rows, always in the same memory, where graphs read it. ``sizes``: samples of each row."""

    def __init__(self, sizes: list[int], batch: Batch):
        self._sizes, self._batch = sizes, batch

    def put(self, batch: Batch) -> None:
        """The next batch, in the place of the one before."""
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if value is not None:
                getattr(self._batch, field.name).copy_(value)

    def row(self, row: int) -> Batch:
        """A row's part of it, without its padding."""
        whole, size, part = self._batch, self._sizes[row], slice(row, row + 1)
        return dataclasses.replace(
            whole,
            inputs=whole.inputs[part, :size],
            targets=whole.targets[part, :size],
            weights=whole.weights[part, :size],
            sizes=whole.sizes[part],
            ids=whole.ids[part, :size],
        )


class Recorded(Protocol):
    """What a step is recorded of: a fleet (:mod:`workers.worker_vision`), as far as a step needs it."""

    device: torch.device
    num_rows: int
    row_sizes: list[int]
    rows_RD: Tensor
    state_RS: Tensor

    def train_chunk(self, chunk: list[int], batch: Batch, lr: Tensor, losses_R: Tensor) -> None: ...


class StepGraph:
    """``StepGraph(fleet)(fleet, batch, lr)`` is one local step of all rows of that fleet; the losses [R] before it.

    On a GPU it keeps nothing of the fleet but the matrices that its graphs write to: the fleet holds this object,
    and a GPU's memory should not wait for a garbage collection.
    """

    def __init__(self, fleet: Recorded):
        self._sizes = fleet.row_sizes
        self._losses_R = torch.zeros(fleet.num_rows, device=fleet.device)
        # A tensor, since a number would be baked into the graph.
        dtype = torch.float32 if fleet.device.type == "cuda" else torch.float64
        self._lr = torch.zeros((), dtype=dtype, device=fleet.device)
        self._batch: FixedBatch | None = None
        self._pool = torch.cuda.graph_pool_handle() if fleet.device.type == "cuda" else None  # one for all matrices
        self._recorded: dict[tuple[int, int], tuple[Callable[[], None], Tensor, Tensor]] = {}

    def __call__(self, fleet: Recorded, batch: Batch, lr: float) -> Tensor:
        """One step; the graphs read and write the fleet's matrices where they lie now."""
        self._lr.fill_(lr)
        if self._batch is None:
            self._batch = FixedBatch(self._sizes, batch)
        else:
            self._batch.put(batch)
        matrices = fleet.rows_RD, fleet.state_RS
        where = matrices[0].data_ptr(), matrices[1].data_ptr()
        if where not in self._recorded:
            if len(self._recorded) == MATRICES:
                del self._recorded[next(iter(self._recorded))]
            # The matrices are held too: memory that a graph writes to must not become another tensor's.
            self._recorded[where] = (self._record(fleet), *matrices)
        self._recorded[where][0]()
        return self._losses_R.clone()

    def _record(self, fleet: Recorded) -> Callable[[], None]:
        """A function that does the step on the fleet's matrices as they lie now."""
        step, rehearse = partial(self._step_row, fleet), partial(self._rehearse_row, fleet)
        return record(fleet.device, fleet.num_rows, step, rehearse, self._pool)

    def _step_row(self, fleet: Recorded, row: int) -> None:
        fleet.train_chunk([row], self._batch.row(row), self._lr, self._losses_R)

    def _rehearse_row(self, fleet: Recorded, row: int) -> None:
        """The step of one row, undone."""
        rows_D, state_S = fleet.rows_RD[row], fleet.state_RS[row]
        before_D, before_S = rows_D.clone(), state_S.clone()
        self._step_row(fleet, row)
        rows_D.copy_(before_D)
        state_S.copy_(before_S)
