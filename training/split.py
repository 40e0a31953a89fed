"""A network in stages (``--stages``): where it is cut, whether the run can be, and what its record says.

Legend: S stages, M microbatches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from training.execution import Execution
from utils.args import Config
from utils.errors import UsageError
from workers import distributed
from workers.engine import IN_PARTS, cuts_batches
from workers.row_layout import RowLayout
from workers.stages import Stage, cut
from workers.tuning import splits


def in_processes(config: Config) -> bool:
    """Whether each stage has a process of its own."""
    return config.stages > 1 and distributed.started()


def stages_of(
    config: Config, model: nn.Module, layout: RowLayout, shape: tuple[int, ...], execution: Execution
) -> list[Stage]:
    """The stages of a run; none where it has one. Raises :class:`UsageError` where its network, its engine or its
    processes do not allow for them."""
    if config.stages == 1:
        return []
    if not cuts_batches(execution.engine):
        raise UsageError(
            f"--stages needs --engine {' or '.join(IN_PARTS)}; this run's is '{execution.engine}': start another with "
            "--run_name NAME."
        )
    stages = cut(model, layout, shape, config.stages, config.split_at)
    if execution.batch_parts > 1 and not splits(model):
        raise UsageError(
            f"{config.model} normalizes over its batch, and its statistics would be those of microbatches, another run "
            "than the unsplit one: use --microbatches 1, or a network without BatchNorm."
        )
    if in_processes(config):
        check_processes(config, execution)
    if execution.batch_parts < config.stages and distributed.rank() == 0:
        warnings.warn(
            f"--microbatches {execution.batch_parts} for {config.stages} stages: over processes they wait for each "
            f"other {bubble(config.stages, execution.batch_parts):.0%} of the time",
            stacklevel=2,
        )
    return stages


def check_processes(config: Config, execution: Execution) -> None:
    """Raises :class:`UsageError` where the stages of the run cannot be processes."""
    if distributed.world() != config.stages:
        raise UsageError(
            f"--stages {config.stages} over processes needs torchrun --nproc-per-node {config.stages}, a process for "
            f"each stage, and these are {distributed.world()}."
        )
    if config.num_workers != 1 or config.protocol != "local":
        raise UsageError(
            "stages in processes of their own train one model so far: give --num_workers 1 --protocol local (without "
            "torchrun any number of workers and any protocol can have --stages)."
        )
    if config.schedule == "1f1b" and execution.batch_parts < config.stages:  # of a record
        raise UsageError(
            f"this run cuts its batches into {execution.batch_parts} microbatches, too few for --schedule 1f1b and "
            f"{config.stages} stages: use --schedule gpipe."
        )
    if execution.device != "cpu":
        raise UsageError("stages in processes of their own are for --device cpu so far.")
    for name in ("ledger", "finetune"):
        if getattr(config, name):
            raise UsageError(f"--{name} needs the whole model in one process: leave out --{name}, or torchrun.")


def bubble(stages: int, microbatches: int) -> float:
    """The share of a step in which a stage waits, all stages taking the same time and messages none:
    (S - 1) / (S - 1 + M) (Huang et al. 2019, GPipe, section 2.3)."""
    return (stages - 1) / (stages - 1 + microbatches)


def speedup(costs_S: Sequence[float], microbatches: int) -> float:
    """Of a step over one process, at most: M sum / ((M - 1) max + sum), which is S (1 - bubble) where all stages cost
    the same. Messages cost nothing."""
    return microbatches * sum(costs_S) / ((microbatches - 1) * max(costs_S) + sum(costs_S))


def bytes_a_sample(stages: list[Stage], itemsize: int) -> int:
    """Bytes between stages that training on a sample takes: what enters each stage but the first, and its gradient."""
    return 2 * itemsize * sum(math.prod(stage.shape) for stage in stages[1:])


def record(stages: list[Stage]) -> list[dict[str, Any]]:
    """What config.json says of the stages: blocks, parameters, multiplications of a sample and their share."""
    total = max(1, sum(stage.products for stage in stages))
    return [
        {
            "blocks": list(stage.names),
            "parameters": stage.num_parameters,
            "products": stage.products,
            "share": stage.products / total,
        }
        for stage in stages
    ]


def in_words(config: Config, stages: list[Stage], parts: int) -> str:
    """The stages in a part of a line; nothing where there is one."""
    if not stages:
        return ""
    shares = ", ".join(f"{stage['share']:.0%}" for stage in record(stages))
    how = config.schedule if in_processes(config) else "one after the other"
    return f"{len(stages)} stages ({shares} of the multiplications) {how}, {parts} microbatches"
