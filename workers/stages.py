"""A network cut into stages, each with its own columns of the row, and a fleet whose steps go through them.

A stage is some blocks of the network (:mod:`networks.blocks`) and the tensors of the row that are theirs. In one
process a step takes the stages one after the other: each gets what the one before it returned, cut from its graph, and
hands back the gradient of that. The operators are those of the whole network, on the same numbers.

Legend: N workers, K blocks, S stages, n workers of a chunk (here: 1), B batch, C outputs, D floats a row.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from networks.blocks import blocks_of
from utils.errors import UsageError
from workers.batch import Batch, Gradients
from workers.row_layout import Entry, RowLayout, without_counters
from workers.tuning import products
from workers.worker_vision import Fleet


@dataclass(frozen=True, eq=False)
class Stage:
    """Consecutive blocks of a network. ``names``: theirs. ``module``: the network's own modules, in a sequence.
    ``parameters``, ``buffers``: their places in the row, by the names that they have in ``module``. ``shape``: what
    enters, of one sample. ``products``: multiplications of a forward pass of one sample."""

    names: tuple[str, ...]
    module: nn.Sequential
    parameters: tuple[Entry, ...]
    buffers: tuple[Entry, ...]
    shape: tuple[int, ...]
    products: int

    @property
    def num_parameters(self) -> int:
        return sum(entry.numel for entry in self.parameters)


def processes_of(stages: int, schedule: str, labels: str) -> int:
    """P, the processes of a pipeline: stage s is in process s mod P. With 'interleaved' each has two stages; where the
    first one keeps the labels it has the last stage too."""
    if labels == "first":
        return stages - 1
    return stages // 2 if schedule == "interleaved" else stages


def can_begin(block: nn.Module) -> bool:
    """Whether a stage can begin with the block: not where it would overwrite what was sent."""
    return not getattr(block, "inplace", False)


def cut(model: nn.Module, layout: RowLayout, shape: tuple[int, ...], count: int, at: Sequence[str] = ()) -> list[Stage]:
    """The network in ``count`` stages for samples of this shape. ``at``: the block that each stage but the first begins
    with, or the module that begins with it (default: where the largest number of multiplications of a stage is
    smallest, then where the fewest floats cross, then the last such place).

    Raises :class:`UsageError` of a network that is no sequence, or has no such blocks, or too few.
    """
    blocks = blocks_of(model)
    shapes_K, costs_K = _costs(blocks, shape, next(model.parameters()).dtype)
    weights_K = [any(True for _ in block.parameters()) for _, block in blocks]
    starts = [can_begin(block) for _, block in blocks]
    if at:
        cuts = _named(at, [name for name, _ in blocks], starts)
    else:
        cuts = balanced(costs_K, [math.prod(s) for s in shapes_K], weights_K, starts, count)
    stages = []
    for a, b in pairwise([0, *cuts, len(blocks)]):
        if not any(weights_K[a:b]):
            raise UsageError(f"--split_at {' '.join(at)}: the stage from {blocks[a][0]} on has no parameters.")
        names, modules = zip(*blocks[a:b], strict=True)
        parameters, buffers = _entries(layout, names, modules)
        stages.append(Stage(names, nn.Sequential(*modules), parameters, buffers, shapes_K[a], sum(costs_K[a:b])))
    places = sorted(entry.offset for stage in stages for entry in (*stage.parameters, *stage.buffers))
    owned = [id(parameter) for stage in stages for parameter in stage.module.parameters()]
    if places != [entry.offset for entry in layout.entries] or len(owned) > len(set(owned)):
        raise UsageError("the network cannot be cut into stages: parameters lie outside its blocks, or in two of them.")
    return stages


def balanced(
    costs_K: Sequence[int], crossing_K: Sequence[int], weights_K: Sequence[bool], starts_K: Sequence[bool], count: int
) -> list[int]:
    """The first blocks of stages 1 .. count - 1. ``costs_K``: of each block; ``crossing_K``: floats that enter it;
    ``weights_K``: whether it has parameters, which every stage needs; ``starts_K``: whether a stage may begin with it.

    By dynamic programming: first the least cost of the dearest stage, then of those cuts the least floats crossing.
    """
    K = len(costs_K)
    total = [0, *accumulate(costs_K)]
    weighted = [0, *accumulate(map(int, weights_K))]

    def cost(a: int, b: int) -> float:
        return total[b] - total[a] if weighted[b] > weighted[a] and (a == 0 or starts_K[a]) else math.inf

    def best(worth: Callable[[float, int, int], float]) -> tuple[float, list[int]]:
        ends = [(worth(0.0, 0, b), []) for b in range(K + 1)]
        for _ in range(count - 1):
            further = [(math.inf, [])] * 2
            for b in range(2, K + 1):
                a = min(range(b - 1, 0, -1), key=lambda a: worth(ends[a][0], a, b))  # of equals the last place
                further.append((worth(ends[a][0], a, b), [*ends[a][1], a]))
            ends = further
        return ends[K]

    possible = count <= sum(weights_K)
    dearest = best(lambda before, a, b: max(before, cost(a, b)))[0] if possible else math.inf
    if math.isinf(dearest):
        raise UsageError(
            f"--stages {count}: the network has {sum(weights_K)} blocks with parameters, and each stage needs one of "
            "its own."
        )
    return best(lambda before, a, b: before + crossing_K[a] * (a > 0) if cost(a, b) <= dearest else math.inf)[1]


def _named(at: Sequence[str], names: list[str], starts: list[bool]) -> list[int]:
    """The blocks of ``--split_at``."""
    cuts = []
    for wanted in at:
        found = next((i for i, name in enumerate(names) if name == wanted or name.startswith(f"{wanted}.")), None)
        if not found:
            raise UsageError(f"--split_at {wanted}: no stage can begin there; choose from: {', '.join(names[1:])}.")
        if not starts[found]:
            raise UsageError(f"--split_at {wanted}: it overwrites what it gets, so it belongs to the block before it.")
        cuts.append(found)
    if cuts != sorted(set(cuts)):
        raise UsageError(f"--split_at {' '.join(at)}: give each place once, in the order of the network.")
    return cuts


def _costs(
    blocks: list[tuple[str, nn.Module]], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[tuple[int, ...]], list[int]]:
    """What enters each block, of one sample, and the multiplications that it makes of it."""
    shapes, costs = [], []
    x_1 = torch.zeros(1, *shape, dtype=dtype)
    for _, block in blocks:
        shapes.append(tuple(x_1.shape[1:]))
        matrices = any(p.dim() > 1 for p in block.parameters())
        costs.append(products(block, shapes[-1]) if matrices else 0)
        with torch.no_grad():
            x_1 = copy.deepcopy(block).eval()(x_1)
    return shapes, costs


def _entries(
    layout: RowLayout, names: tuple[str, ...], modules: tuple[nn.Module, ...]
) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """The parameters and float buffers of these modules in the row, by their names in a sequence of the modules."""
    inside = {f"{name}.": f"{k}." for k, name in enumerate(names)}

    def renamed(entries: list[Entry]) -> tuple[Entry, ...]:
        return tuple(
            dataclasses.replace(entry, name=new + entry.name.removeprefix(old))
            for entry in entries
            for old, new in inside.items()
            if entry.name.startswith(old)
        )

    return renamed(layout.parameters), renamed(layout.buffers)


class StagedFleet(Fleet):
    """Workers whose networks are cut into ``stages``, all of them here."""

    def __init__(self, *arguments: Any, stages: list[Stage], **options: Any):
        super().__init__(*arguments, **options)
        self.stages = stages
        places = {entry.offset: i for i, entry in enumerate(self.layout.parameters)}
        self._leaves_of = [[places[entry.offset] for entry in stage.parameters] for stage in stages]
        # Parameters are handed in at every call, by threads side by side: each has copies of its own.
        self._templates = [without_counters(copy.deepcopy(stage.module)).to("meta").train() for stage in stages]
        self._local = threading.local()

    def _modules(self) -> list[nn.Module]:
        if not hasattr(self._local, "modules"):
            self._local.modules = copy.deepcopy(self._templates)
        return self._local.modules

    def _gradients(self, rows_nD: Tensor, batch: Batch) -> Gradients:
        leaves = self.engine.leaves(rows_nD)
        ends: list[tuple[Tensor, Tensor]] = []  # what entered and left each stage
        output = batch.inputs[0]
        for stage, module, mine in zip(self.stages, self._modules(), self._leaves_of, strict=True):
            entered = output.detach().requires_grad_(bool(ends))
            tensors = {e.name: leaves[i] for e, i in zip(stage.parameters, mine, strict=True)}
            with self.engine.precision(entered.device.type):
                tensors |= {e.name: e.view(rows_nD[0]) for e in stage.buffers}
                output = functional_call(module, tensors, (entered,), tie_weights=False)
            ends.append((entered, output))
        loss_n = batch.mean(self.samples.task.losses(output[None], batch.targets))
        gradients: list[Tensor] = [torch.empty(0)] * len(leaves)
        final, back = loss_n.sum(), None
        for s in reversed(range(len(self.stages))):
            entered, mine = ends[s][0], self._leaves_of[s]
            wanted = [leaves[i] for i in mine] + ([entered] if s > 0 else [])
            found = torch.autograd.grad(final, wanted, back)
            for i, gradient in zip(mine, found, strict=False):
                gradients[i] = gradient
            if s > 0:
                final, back = ends[s - 1][1], found[-1]
        return Gradients(leaves, gradients, loss_n.detach())
