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
from training.protocols import load_protocol
from utils.args import Config
from utils.errors import UsageError
from workers import distributed
from workers.engine import IN_PARTS, cuts_batches
from workers.row_layout import RowLayout
from workers.stages import Stage, cut, processes_of
from workers.tuning import splits

COLUMNS = ("gossip", "local", "fedavg", "chained")  # protocols that mix rows, and keep nothing beside


def in_processes(config: Config) -> bool:
    """Whether each stage has a process of its own."""
    return config.stages > 1 and distributed.started()


def stages_of(
    config: Config, model: nn.Module, layout: RowLayout, shape: tuple[int, ...], execution: Execution,
    shapes_differ: bool = False,
) -> list[Stage]:
    """The stages of a run; none where it has one. ``shapes_differ``: whether workers' batches do.

    Raises :class:`UsageError` where its network, its engine or its processes do not allow for them.
    """
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
        check_processes(config, model, execution, shapes_differ)
    if execution.batch_parts < config.stages and distributed.rank() == 0:
        warnings.warn(
            f"--microbatches {execution.batch_parts} for {config.stages} stages: over processes they wait for each "
            f"other {bubble(config.stages, execution.batch_parts):.0%} of the time",
            stacklevel=2,
        )
    return stages


def check_processes(config: Config, model: nn.Module, execution: Execution, shapes_differ: bool) -> None:
    """Raises :class:`UsageError` where the stages of the run cannot be processes."""
    P, world = processes_of(config.stages, config.schedule, config.split_labels), distributed.world()
    if world % P or world // P > config.num_workers:
        most = f" and at most {P * config.num_workers}" if config.num_workers > 1 else ""
        raise UsageError(
            f"--stages {config.stages} over processes needs torchrun --nproc-per-node {P}"
            f"{f', or a multiple of it{most}' if most else ''}: a pipeline is {P} processes, and these are {world}."
        )
    reason = load_protocol(config.protocol).not_linear(config)
    if config.protocol not in COLUMNS or config.order == "cta" or config.server_momentum:
        reason = f"--protocol {config.protocol} as it is here"
    if reason is not None or config.on_bad_worker == "isolate":
        raise UsageError(
            f"stages in processes of their own mix linearly, column by column: {reason or '--on_bad_worker isolate'} "
            "needs whole rows (without torchrun any protocol can have --stages)."
        )
    if shapes_differ and any(True for _ in model.buffers()):
        raise UsageError(
            f"{config.model} normalizes over its batch, and workers' batches differ in size: over processes shapes are "
            "static; use a --batch_size no larger than the smallest shard."
        )
    if config.schedule == "1f1b" and execution.batch_parts < config.stages:  # of a record
        raise UsageError(
            f"this run cuts its batches into {execution.batch_parts} microbatches, too few for --schedule 1f1b and "
            f"{config.stages} stages: use --schedule gpipe."
        )
    rounds = max(1, execution.batch_parts // P)
    if config.schedule == "interleaved" and execution.batch_parts % rounds:
        raise UsageError(
            f"this run cuts its batches into {execution.batch_parts} microbatches, and --schedule interleaved over {P} "
            f"processes needs a multiple of {rounds}: use --schedule gpipe."
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


def in_time(stages: list[Stage], microbatches: int, config: Config, itemsize: int) -> dict[str, Any]:
    """What virtual time has to know of a pipeline: its :func:`speedup`, and the messages that nothing else is done
    beside, the first microbatch's on its way forward and the last one's on its way back."""
    if not stages:
        return {}
    dearest = max(math.prod(stage.shape) for stage in stages[1:])
    return {
        "speedup": speedup([max(1, stage.products) for stage in stages], microbatches),
        "hops": 2 * (len(stages) - 1),
        "hop_bytes": itemsize * dearest * -(-config.batch_size // microbatches),
    }


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
    waits = 1 - speedup([max(1, stage.products) for stage in stages], parts) / len(stages)
    return (f"{len(stages)} stages ({shares} of the multiplications) {how}, {parts} microbatches (side by side they "
            f"would wait {waits:.0%} of the time, {bubble(len(stages), parts):.0%} were they equal)")  # fmt: skip
