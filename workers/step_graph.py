"""A step of the whole fleet, recorded once and replayed: what the ``graph`` engine does on a GPU.

A GPU is done with a layer of a small network before the CPU has asked for the next one, and N workers ask
N times. Here the forward pass, backward pass and update of all workers are captured in one CUDA graph, on
parallel streams, so that a step is one launch. Only the batch is made anew, outside of the graph and for
all workers at once, and copied to where the graph reads it.

The arithmetic is that of the ``loop`` engine, operator by operator; on a GPU the learning rate is rounded to
float32, in which the fused update reads it from memory. Elsewhere than on a GPU nothing is captured: the same
code runs on the same fixed tensors, which is how the tests hold it to the loop's bits.

Legend: N workers, R rows, D floats a row, B batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.errors import UsageError

if TYPE_CHECKING:
    from workers.worker_vision import Batch, Fleet

STREAMS = 8  # branches of the graph; each holds the activations of one worker at a time
GRAPHS = 4  # gossip writes to a second matrix, and the two take turns: each has a graph of its own
MOST_ROWS = 512  # recording takes two plain steps, and a graph has every kernel of every row


class StepGraph:
    """``StepGraph(fleet)(fleet, batch, lr)`` is one SGD step of all rows of that fleet; the losses [R] before it.

    It keeps nothing of the fleet but the matrices that its graphs write to (the fleet holds this object, and
    memory of a GPU should not wait for a garbage collection).
    """

    def __init__(self, fleet: Fleet):
        self._device = fleet.device
        self._sizes = fleet.per_row(fleet.batches.sizes_N).tolist()
        self._losses_R = torch.zeros(fleet.num_rows, device=fleet.device)
        on_gpu = fleet.device.type == "cuda"
        # A tensor, since a number would be baked into the graph.
        self._lr = torch.zeros((), dtype=torch.float32 if on_gpu else torch.float64, device=fleet.device)
        self._batch: Batch | None = None
        self._recorded: dict[tuple[int, int], tuple[Callable[[Fleet], None], Tensor, Tensor]] = {}
        # Memory is used again only by the stream that had it: all graphs share one pool and these streams.
        self._pool: tuple[int, int] | None = None
        self._capture = torch.cuda.Stream(fleet.device) if on_gpu else None
        self._streams = [torch.cuda.Stream(fleet.device) for _ in range(min(STREAMS, fleet.num_rows) * on_gpu)]

    def __call__(self, fleet: Fleet, batch: Batch, lr: float) -> Tensor:
        """One step; the graph reads and writes the fleet's matrices where they lie now."""
        self._lr.fill_(lr)
        if self._batch is None:
            self._batch = batch
        else:
            for field in dataclasses.fields(batch):
                getattr(self._batch, field.name).copy_(getattr(batch, field.name))
        matrices = fleet.rows_RD, fleet.momentum_RP
        where = matrices[0].data_ptr(), matrices[1].data_ptr()
        if where not in self._recorded:
            if len(self._recorded) == GRAPHS:
                del self._recorded[next(iter(self._recorded))]
            # The matrices are held too: memory that a graph writes to must not become another tensor's.
            self._recorded[where] = (self._record(fleet), *matrices)
        self._recorded[where][0](fleet)
        return self._losses_R.clone()

    def _step_row(self, fleet: Fleet, row: int) -> None:
        """The step of one row, from its part of the fixed batch (without its padding)."""
        whole, size = self._batch, self._sizes[row]
        part = slice(row, row + 1)
        own = dataclasses.replace(
            whole,
            images=whole.images[part, :size],
            labels=whole.labels[part, :size],
            weights=whole.weights[part, :size],
            sizes=whole.sizes[part],
            ids=whole.ids[part, :size],
        )
        fleet.train_chunk([row], own, self._lr, self._losses_R)

    def _rehearse_row(self, fleet: Fleet, row: int) -> None:
        """The step of one row, undone: libraries choose their kernels and workspaces before a capture."""
        rows_D, momentum_P = fleet.rows_RD[row], fleet.momentum_RP[row]
        before_D, before_P = rows_D.clone(), momentum_P.clone()
        self._step_row(fleet, row)
        rows_D.copy_(before_D)
        momentum_P.copy_(before_P)

    def _on_streams(self, fleet: Fleet, step: Callable[[Fleet, int], None]) -> None:
        """``step`` for every row, on streams that start from the current one and join it again."""
        own = torch.cuda.current_stream(self._device)
        for i, stream in enumerate(self._streams):
            stream.wait_stream(own)
            with torch.cuda.stream(stream):
                for row in range(fleet.num_rows)[i :: len(self._streams)]:
                    step(fleet, row)
        for stream in self._streams:
            own.wait_stream(stream)

    def _step_all(self, fleet: Fleet) -> None:
        for row in range(fleet.num_rows):
            self._step_row(fleet, row)

    def _record(self, fleet: Fleet) -> Callable[[Fleet], None]:
        """A function that replays the step on the fleet's matrices."""
        if self._device.type != "cuda":
            return self._step_all
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device):
                self._on_streams(fleet, self._rehearse_row)
                torch.cuda.synchronize(self._device)
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._capture, capture_error_mode="thread_local"
                ):
                    self._on_streams(fleet, self._step_row)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"this network's steps cannot be recorded ({reason}): use --engine loop.") from error
        self._pool = graph.pool()  # graphs run in turn and leave nothing behind: one memory for all
        return lambda fleet: graph.replay()
