"""One model over processes: each trains a stage of the network (``torchrun``, ``--stages``).

Schedules and messages are those of torch.distributed.pipelining. Its shapes are static: they are given, so that no
object of a peer is unpickled, and a batch that does not divide evenly is filled up with zeros of weight 0. A process
steps its own columns of the row; :meth:`PipelineFleet.restack` tells all processes all columns, for whoever looks at
the whole model.

Legend: B batch, M microbatches, b samples of one, S stages, D floats a row.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from workers import distributed
from workers.optimizers import descend, moments_of
from workers.row_layout import Entry, without_counters
from workers.stages import Stage
from workers.worker_vision import Fleet

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Carried(nn.Module):
    """A stage whose outputs can be sent: messages are contiguous, and convolutions get what they expect."""

    def __init__(self, blocks: nn.Module, channels_last: bool):
        super().__init__()
        self.blocks, self.channels_last = blocks, channels_last

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the stage."""
        if self.channels_last and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self.blocks(inputs).contiguous()


class PipelineFleet(Fleet):
    """One worker, whose stage number :func:`distributed.rank` trains here. ``schedule``: 'gpipe' or '1f1b'; the
    engine's ``parts`` are the microbatches. The rows are whole at the start and after :meth:`restack`; in between the
    columns of other stages are old."""

    def __init__(self, *arguments: Any, stages: list[Stage], schedule: str, **options: Any):
        super().__init__(*arguments, **options)
        if self.num_rows != 1 or len(stages) != distributed.world():
            raise ValueError("a pipeline is one row, and as many processes as stages")
        self.stages, self.here = stages, distributed.rank()
        self.first, self.last = self.here == 0, self.here == len(stages) - 1
        self._group = dist.new_group(backend="gloo", timeout=distributed.STEP)
        self._stale = False
        stage, M = stages[self.here], self.engine.parts
        blocks = without_counters(copy.deepcopy(stage.module)).train()
        self._parameters = attach(blocks, stage, self.rows_RD[0])
        self._size = -(-int(self.batches.sizes_N[0]) // M)
        entering = torch.empty(self._size, *stage.shape, dtype=self.dtype, requires_grad=not self.first)
        with torch.no_grad():
            shape = copy.deepcopy(blocks).eval()(entering.detach().zero_()).shape
        leaving = torch.empty(shape, dtype=self.dtype, requires_grad=True)
        channels_last = any(entry.channels_last for entry in self.layout.parameters)
        carried = Carried(blocks, channels_last)
        pipe = PipelineStage(carried, self.here, len(stages), self.device, entering, leaving, group=self._group)
        self._pipeline = SCHEDULES[schedule](pipe, M, self._loss, scale_grads=False)

    @property
    def others(self) -> str:
        """Who else is needed, where one does not answer."""
        peers = [k + 1 for k in (self.here - 1, self.here + 1) if k in range(len(self.stages))]
        return f"stage {' or '.join(map(str, peers))} of {len(self.stages)}"

    @property
    def part(self) -> tuple[int, int] | None:
        """The first process writes the whole row."""
        return (0, 1) if self.first else None

    def _loss(self, outputs_bC: Tensor, slots_b: Tensor) -> Tensor:
        """The part of the loss that a microbatch is, of the samples in these slots of the batch."""
        targets, weights, sizes = self._wanted
        losses_1b = self.samples.task.losses(outputs_bC[None], targets[:, slots_b])
        return ((losses_1b * weights[:, slots_b]).sum(1) / sizes).sum()

    def step(self, steps_N: Tensor, lr: float, workers: list[int] | None = None) -> Tensor:
        """One local step of the model, of which this process makes its stage's; the training loss [1] before it."""
        loss_1 = torch.zeros(1)
        if not self.rows_of(workers):
            return loss_1
        for parameter in self._parameters:
            parameter.grad = None
        losses: list[Tensor] = []
        inputs, slots = [], None
        if self.first or self.last:
            batch = self.batch([0], *self.schedule(steps_N))
            if self.first:
                inputs = [filled(batch.inputs[0], self.engine.parts * self._size)]
            if self.last:
                slots = torch.arange(self.engine.parts * self._size)
                targets, weights = (filled(t[0], len(slots))[None] for t in (batch.targets, batch.weights))
                self._wanted = targets, weights, batch.sizes
        self._pipeline.step(*inputs, target=slots, losses=losses, return_outputs=False)
        gradients = [p.grad for p in self._parameters]
        entries = self.stages[self.here].parameters
        descend(self.engine, self.optimizer, self._parameters, gradients, self.rows_RD, self.state_RS, lr, entries)
        self._stale = True
        if self.last:
            loss_1 = torch.stack(losses).sum()[None].detach().to(loss_1.dtype)
        dist.broadcast(loss_1, len(self.stages) - 1, self._group)
        return loss_1

    def restack(self) -> None:
        """Every process gets the columns of every stage, of the row and of what the optimizer remembers of it."""
        if not self._stale:
            return
        moments, _ = moments_of(self.optimizer, self.layout.P, self.state_RS)
        for s, stage in enumerate(self.stages):
            columns = [c for row in (self.rows_RD, *moments) for c in columns_of(row[0], stage.parameters)]
            columns += columns_of(self.rows_RD[0], stage.buffers)
            together = torch.cat(columns)
            dist.broadcast(together, s, self._group)
            if s != self.here:
                for column, told in zip(columns, together.split([len(c) for c in columns]), strict=True):
                    column.copy_(told)
        self._stale = False


def columns_of(row_D: Tensor, entries: tuple[Entry, ...]) -> list[Tensor]:
    """These tensors of a row as views, flat, as they lie in it."""
    return [row_D[entry.offset : entry.offset + entry.numel] for entry in entries]


def attach(blocks: nn.Module, stage: Stage, row_D: Tensor) -> list[nn.Parameter]:
    """Make the parameters and float buffers of a stage views into a row; the parameters, in the stage's order."""
    parameters = []
    for entry in (*stage.parameters, *stage.buffers):
        path, _, leaf = entry.name.rpartition(".")
        owner = blocks.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(entry.view(row_D))
            parameters.append(owner._parameters[leaf])
        else:
            owner._buffers[leaf] = entry.view(row_D)
    return parameters


def filled(part_B: Tensor, count: int) -> Tensor:
    """Filled up with zeros to ``count`` samples."""
    missing = count - len(part_B)
    return part_B if not missing else torch.cat([part_B, part_B.new_zeros(missing, *part_B.shape[1:])])
