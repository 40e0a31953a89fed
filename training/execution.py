"""How a run is executed: on what device, by which engine, in how many threads and parts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from data.batches import Batches, Samples
from training.protocols import load_protocol
from utils.args import Config
from utils.errors import UsageError
from utils.registry import OPTIMIZERS, load
from workers import distributed
from workers.engine import IN_PARTS, Engine, cuts_batches
from workers.optimizers import Optimizer
from workers.tuning import batch_parts, choose_execution, splits


@dataclass(frozen=True)
class Execution:
    """What could change the bits of a run besides its configuration: chosen at the first start,
    recorded in config.json, and reused by resume, replay, audit and stage 2."""

    device: str
    engine: str
    threads: int
    channels_last: bool
    batch_parts: int = 1  # runs of older versions do not record it

    def __post_init__(self) -> None:
        kinds = {"device": str, "engine": str, "threads": int, "channels_last": bool, "batch_parts": int}
        odd = [name for name, kind in kinds.items() if type(getattr(self, name)) is not kind]
        if odd or min(self.threads, self.batch_parts) < 1:
            raise TypeError(f"no execution: {vars(self)}")  # of a damaged record


def first_execution(config: Config, model: nn.Module, samples: Samples, batches: Batches) -> Execution:
    """How a run that starts now is executed; of several processes the first one decides."""
    device = find_device(config.device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // here)
    if device.type == "cuda":
        threads = here = 1  # a GPU is fed by one thread, and what it batches does not depend on the cores beside it
    engine = IN_PARTS[0] if config.stages > 1 and config.engine == "auto" else config.engine
    chosen = choose_execution(
        model, samples, batches, engine, config.channels_last, threads, device, autocast_of(config),
        optimizer_of(config), config.dp_noise is not None,
    )  # fmt: skip
    engine, channels_last = distributed.share_json(chosen)
    parts = first_parts(config, model, samples, batches, engine, threads * here)
    own = "cuda" if device.type == "cuda" and "LOCAL_RANK" in os.environ else str(device)
    return Execution(own, engine, threads, channels_last, parts)


def optimizer_of(config: Config) -> Optimizer:
    """What a local step is."""
    weight_decay = load_protocol(config.protocol).weight_decay(config)
    settings = {"momentum": config.momentum, "weight_decay": weight_decay}
    if config.optimizer not in ("sgd", "nesterov"):
        settings |= {"beta2": config.beta2, "eps": config.eps}
    return load(OPTIMIZERS, config.optimizer, "optimizer")(**settings)


def first_parts(
    config: Config, model: nn.Module, samples: Samples, batches: Batches, engine: str, threads: int
) -> int:
    """Parts that a batch is cut into: as ``--batch_parts`` says, or by the rule, which reads how many workers train at
    a time and the threads of all processes here."""
    if config.dp_noise is not None:  # sample by sample anyway
        return 1
    if config.stages > 1:
        return config.microbatches
    if config.batch_parts is None:
        at_once = load_protocol(config.protocol).workers_at_once(config)
        return batch_parts(model, samples.shape, int(batches.sizes_N.max()), at_once, threads, engine)
    if config.batch_parts > 1 and not cuts_batches(engine):
        raise UsageError(f"--batch_parts needs --engine {' or '.join(IN_PARTS)}; this run's is '{engine}'.")
    if config.batch_parts > 1 and not splits(model):
        raise UsageError(f"{config.model} normalizes over its batch, which cannot be cut: leave out --batch_parts.")
    return config.batch_parts


def find_device(name: str) -> torch.device:
    """'auto', 'cpu', 'cuda' or 'cuda:K' as a device that is there; under torchrun 'cuda' is the process's own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device '{name}': use auto, cpu, cuda or cuda:K.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device '{name}' is not there: {torch.cuda.device_count()} CUDA devices were found. "
            "Use --device cpu or auto."
        )
    return device


def engine_of(config: Config, model: nn.Module, execution: Execution, device: torch.device) -> Engine:
    """What executes the steps."""
    return Engine.on(
        device, model, execution.engine, execution.threads, execution.channels_last, autocast_of(config),
        execution.batch_parts,
    )  # fmt: skip


def autocast_of(config: Config) -> torch.dtype | None:
    """The dtype of mixed precision."""
    return torch.bfloat16 if config.amp else None


def use_one_thread_an_operator(deterministic: bool) -> None:
    """Workers run in parallel, operators do not: two OpenMP threads spin."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
