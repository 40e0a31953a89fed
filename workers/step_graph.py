"""A step of the whole fleet, recorded once and replayed: what the ``graph`` engine does on a GPU.

A GPU is done with a layer of a small network before the CPU has asked for the next one, and N workers ask
N times. Here the forward pass, backward pass and update of all workers are captured in one CUDA graph, on
parallel streams, so that a step is one launch. Only the batch is made anew, outside of the graph and for
all workers at once, and copied to where the graph reads it.

The arithmetic is that of the ``loop`` engine, operator by operator. Elsewhere than on a GPU nothing is
captured: the same code runs on the same fixed tensors, which is how the tests hold it to the loop's bits.

Legend: N workers, R rows, D floats a row, B batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workers.worker_vision import Batch, Fleet

STREAMS = 8  # branches of the graph; each holds the activations of one worker at a time
GRAPHS = 4  # gossip writes to a second matrix, and the two take turns: each has a graph of its own


class StepGraph:
    """``StepGraph(fleet)(batch, lr)`` is one SGD step of all rows; the losses [R] before it."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self._sizes = fleet.per_row(fleet.batches.sizes_N).tolist()
        self._losses_R = torch.zeros(fleet.num_rows, device=fleet.device)
        # A number would be baked into the graph. The fused update reads a float32 on a GPU.
        self._lr = torch.zeros((), dtype=torch.float32 if fleet.device.type == "cuda" else torch.float64,
                               device=fleet.device)  # fmt: skip
        self._batch: Batch | None = None
        self._recorded: dict[tuple[int, int], tuple[Callable[[], None], Tensor, Tensor]] = {}
        self._pool: tuple[int, int] | None = None

    def __call__(self, batch: Batch, lr: float) -> Tensor:
        """One step; the graph reads and writes the fleet's matrices where they lie now."""
        self._lr.fill_(lr)
        if self._batch is None:
            self._batch = batch
        else:
            for field in dataclasses.fields(batch):
                getattr(self._batch, field.name).copy_(getattr(batch, field.name))
        matrices = self._fleet.rows_RD, self._fleet.momentum_RP
        where = matrices[0].data_ptr(), matrices[1].data_ptr()
        if where not in self._recorded:
            if len(self._recorded) == GRAPHS:
                del self._recorded[next(iter(self._recorded))]
            # The matrices are held too: memory that a graph writes to must not become another tensor's.
            self._recorded[where] = (self._record(), *matrices)
        self._recorded[where][0]()
        return self._losses_R.clone()

    def _step_row(self, row: int) -> None:
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
        self._fleet.train_chunk([row], own, self._lr, self._losses_R)

    def _record(self) -> Callable[[], None]:
        """The step as a function that replays it."""
        rows = range(self._fleet.num_rows)
        if self._fleet.device.type != "cuda":

            def run() -> None:
                for row in rows:
                    self._step_row(row)

            return run
        device = self._fleet.device
        streams = [torch.cuda.Stream(device) for _ in range(min(STREAMS, len(rows)))]

        def fork_and_join() -> None:
            own = torch.cuda.current_stream(device)
            for i, stream in enumerate(streams):
                stream.wait_stream(own)
                with torch.cuda.stream(stream):
                    for row in rows[i :: len(streams)]:
                        self._step_row(row)
            for stream in streams:
                own.wait_stream(stream)

        # Once without a graph: libraries choose their kernels and workspaces. What that changed is put back.
        matrices = self._fleet.rows_RD, self._fleet.momentum_RP
        before = [matrix.clone() for matrix in matrices]
        fork_and_join()
        for matrix, kept in zip(matrices, before, strict=True):
            matrix.copy_(kept)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool):
            fork_and_join()
        self._pool = graph.pool()  # graphs run in turn and leave nothing behind: one memory for all
        return graph.replay
