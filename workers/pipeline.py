"""Models over processes: each trains some stages of the network (``torchrun``, ``--stages``) and gossips their columns.

Processes are a mesh: a pipeline of P processes trains a block of workers, and the processes of one place in all
pipelines share out the rows as :class:`workers.distributed.ShardedFleet` does, of which each mixes the columns of its
stages. :meth:`PipelineFleet.restack` tells a pipeline's processes all columns, for whoever looks at whole models.

Schedules and messages are those of torch.distributed.pipelining. Its shapes are static: they are given, so that no
object of a peer is unpickled, and a batch that does not divide evenly is filled up with zeros of weight 0.

Legend: N workers, R of them here, B batch, M microbatches, b samples of one, S stages, P processes of a pipeline,
D floats a row.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.distributed as dist
from scipy import sparse
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from workers import distributed
from workers.optimizers import descend, moments_of
from workers.row_layout import Entry, without_counters
from workers.stages import Stage, processes_of


class LabelsFirst(_PipelineScheduleRuntime):
    """GPipe with the last stage where the first one is (a U, Vepakomma et al. 2018): all forward passes, the last
    stage's loss and backward pass as soon as a microbatch has come around, then all backward passes."""

    def __init__(self, stages: list[PipelineStage], M: int, loss: Any, **options: Any):
        super().__init__(stages, M, loss, **options)
        last, order = self._num_stages - 1, {}
        for place in range(self.pp_group_size):
            order[place] = [_Action(place, _ComputationType.FORWARD, m) for m in range(M)]
            if place == 0:
                order[place] += [_Action(last, way, m) for m in range(M) for way in
                                 (_ComputationType.FORWARD, _ComputationType.FULL_BACKWARD)]  # fmt: skip
            order[place] += [_Action(place, _ComputationType.FULL_BACKWARD, m) for m in range(M)]
        self.pipeline_order = order
        self._prepare_schedule_with_comms(order)


# Where a peer is gone it prints its whole plan, dozens of lines, before the error that says so.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


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


class PipelineFleet(distributed.ShardedFleet):
    """Workers whose networks are cut into ``stages``, of which this process trains some. ``schedule``: 'gpipe', '1f1b'
    or 'interleaved'; ``labels``: the end that keeps them, 'last' or 'first'; the engine's ``parts`` are the
    microbatches. Rows are whole at the start and after :meth:`restack`; in between the columns of other stages are
    old."""

    def __init__(self, *arguments: Any, stages: list[Stage], schedule: str, labels: str = "last", **options: Any):
        S, P = len(stages), processes_of(len(stages), schedule, labels)
        pipelines, self.place = distributed.world() // P, distributed.rank() % P
        self._pipe, column = _mesh(pipelines, P)
        super().__init__(*arguments, **options, among=distributed.Group(distributed.rank() // P, pipelines, column))
        self.stages = stages
        self._own = [s for s in range(S) if s % P == self.place]
        self._place_of = [s % P for s in range(S)]
        self._stale = False
        M = self.engine.parts
        self._size = -(-self.batch_width(self.batches.sizes_N) // M)
        channels_last = any(entry.channels_last for entry in self.layout.parameters)
        pipes = []
        self._blocks_of: dict[int, tuple[nn.Module, list[nn.Parameter]]] = {}
        for s in self._own:
            blocks = without_counters(copy.deepcopy(stages[s].module)).train()
            self._blocks_of[s] = blocks, attach(blocks, stages[s], self.rows_RD[0])
            entering = torch.empty(self._size, *stages[s].shape, dtype=self.dtype, requires_grad=s > 0)
            with torch.no_grad():
                shape = copy.deepcopy(blocks).eval()(entering.detach().zero_()).shape
            leaving = torch.empty(shape, dtype=self.dtype, requires_grad=True)
            carried = Carried(blocks, channels_last)
            pipes.append(PipelineStage(carried, s, S, self.device, entering, leaving, group=self._pipe))
        kind = LabelsFirst if labels == "first" else SCHEDULES[schedule]
        several = kind not in (ScheduleGPipe, Schedule1F1B)
        self._pipeline = kind(pipes if several else pipes[0], M, self._loss, scale_grads=False)

    @property
    def others(self) -> str:
        """Who else is needed, where one does not answer."""
        P = max(self._place_of) + 1
        places = [p for p in {(self.place - 1) % P, (self.place + 1) % P} if p != self.place]
        near = sorted(s + 1 for s, place in enumerate(self._place_of) if place in places)
        here = f"stage {' or '.join(map(str, near))} of {len(self.stages)}"
        return here if self.among.world == 1 else f"{here}, or another pipeline than {self.among.rank},"

    @property
    def part(self) -> tuple[int, int] | None:
        """The first process of each pipeline writes its whole rows."""
        return (self.among.rank, self.among.world) if self.place == 0 else None

    def _loss(self, outputs_bC: Tensor, slots_b: Tensor) -> Tensor:
        """The part of the loss that a microbatch is, of the samples in these slots of the batch."""
        targets, weights, sizes = self._wanted
        losses_1b = self.samples.task.losses(outputs_bC[None], targets[:, slots_b])
        return ((losses_1b * weights[:, slots_b]).sum(1) / sizes).sum()

    def step(self, steps_N: Tensor, lr: float, workers: list[int] | None = None) -> Tensor:
        """One local step of the workers here, of which this process makes its stages'; the training loss [R] before."""
        losses_R = torch.zeros(self.num_rows)
        rows = self.rows_of(workers)
        if not rows:
            return losses_R
        ends = {0, len(self.stages) - 1} & set(self._own)
        schedule = self.schedule(steps_N) if ends else None
        for row in rows:
            losses_R[row] = self._train(row, schedule, lr)
        self._stale = True
        dist.broadcast(losses_R, group=self._pipe, group_src=self._place_of[-1])
        return losses_R

    def _train(self, row: int, schedule: tuple | None, lr: float) -> float:
        """A step of a worker; its loss, where the last stage is here."""
        for s, (blocks, _) in self._blocks_of.items():
            attach(blocks, self.stages[s], self.rows_RD[row])
        losses: list[Tensor] = []
        inputs, slots, count = [], None, self.engine.parts * self._size
        if schedule is not None:
            batch = self.batch([row], *schedule)
            if self.place == 0:
                inputs = [filled(batch.inputs[0], count)]
            if len(self.stages) - 1 in self._blocks_of:
                slots = torch.arange(count)
                targets, weights = (filled(t[0], count)[None] for t in (batch.targets, batch.weights))
                self._wanted = targets, weights, batch.sizes
        self._pipeline.step(*inputs, target=slots, losses=losses, return_outputs=False)
        part = slice(row, row + 1)
        parameters = [p for _, several in self._blocks_of.values() for p in several]
        entries = tuple(entry for s in self._own for entry in self.stages[s].parameters)
        gradients = [p.grad for p in parameters]
        descend(
            self.engine, self.optimizer, parameters, gradients, self.rows_RD[part], self.state_RS[part], lr, entries
        )
        for parameter in parameters:
            parameter.grad = None
        return float(torch.stack(losses).sum().detach()) if losses else 0.0

    def _mixed(self, matrix: sparse.csr_array, source: Tensor) -> Tensor:
        """The columns of the stages here; the others stay as they are."""
        parts = [c for s in self._own for c in self._columns(s, source)]
        mixed = torch.cat(parts, 1)
        self.mix_into(matrix, torch.cat(parts, 1), mixed)
        for part, column in zip(parts, mixed.split([p.shape[1] for p in parts], 1), strict=True):
            part.copy_(column)
        self._stale = True
        return source

    def _columns(self, s: int, matrix: Tensor) -> list[Tensor]:
        """The columns of a stage as views: of the rows [R, D], or of what the optimizer remembers of them."""
        stage = self.stages[s]
        if matrix.shape[1] == self.layout.D and matrix is not self.state_RS:
            return [span(matrix, entry) for entry in (*stage.parameters, *stage.buffers)]
        moments, steps_R1 = moments_of(self.optimizer, self.layout.P, matrix)
        return [*(span(moment, entry) for moment in moments for entry in stage.parameters), steps_R1]

    def restack(self) -> None:
        """Every process of a pipeline gets the columns of every stage, of rows and of what optimizers remember."""
        if not self._stale:
            return
        for s, place in enumerate(self._place_of):
            columns = self._columns(s, self.rows_RD) + self._columns(s, self.state_RS)
            together = torch.cat(columns, 1)
            dist.broadcast(together, group=self._pipe, group_src=place)
            if place != self.place:
                for column, told in zip(columns, together.split([c.shape[1] for c in columns], 1), strict=True):
                    column.copy_(told)
        self._stale = False


def _mesh(pipelines: int, P: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Torch's names for this process's pipeline, and for the processes of its place in all pipelines. All processes
    make all groups, in one order."""
    me = distributed.rank()
    rows = [[w * P + place for place in range(P)] for w in range(pipelines)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    mine = []
    for several, timeout in ((rows, distributed.STEP), (columns, distributed.WAIT)):  # a pipeline may wait for a round
        for ranks in several:
            handle = dist.new_group(ranks, backend="gloo", timeout=timeout)
            if me in ranks:
                mine.append(handle)
    return mine[0], mine[1]


def span(matrix: Tensor, entry: Entry) -> Tensor:
    """A tensor's columns of a matrix, flat, as they lie in it."""
    return matrix[:, entry.offset : entry.offset + entry.numel]


def attach(blocks: nn.Module, stage: Stage, row_D: Tensor) -> list[nn.Parameter]:
    """Make the parameters and float buffers of a stage views into a row; the parameters, in the stage's order."""
    parameters = []
    for entry in (*stage.parameters, *stage.buffers):
        path, _, leaf = entry.name.rpartition(".")
        owner = blocks.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf].data = entry.view(row_D)
            parameters.append(owner._parameters[leaf])
        else:
            owner._buffers[leaf] = entry.view(row_D)
    return parameters


def filled(part_B: Tensor, count: int) -> Tensor:
    """Filled up with zeros to ``count`` samples."""
    missing = count - len(part_B)
    return part_B if not missing else torch.cat([part_B, part_B.new_zeros(missing, *part_B.shape[1:])])
