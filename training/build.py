"""From a configuration to everything a run needs: the only place that joins config, data, networks
and workers.

Legend: N workers, n training samples (all that the data set has, by sample id), D floats a row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.batches import Batches, Samples
from data.corruption import corrupt
from data.dataset_loader import Dataset, load_dataset, split_validation
from networks import load_model
from utils.args import Config, file_digests
from utils.dirichlet import partition
from utils.errors import UsageError
from utils.provenance import provenance
from utils.random import derive_seed
from utils.scheduler import learning_rate
from utils.topology import Topology, build_topology
from utils.virtual_time import VirtualTime
from workers import distributed
from workers.engine import Engine
from workers.robust import Byzantine, parse_byzantine
from workers.row_layout import RowLayout
from workers.tuning import choose_execution
from workers.worker_vision import Fleet

T = TypeVar("T")

NATURAL_IMAGES = ("cifar10", "cifar100", "tinyimagenet")


@dataclass(frozen=True)
class Execution:
    """What could change the bits of a run besides its configuration: chosen at the first start,
    recorded in config.json, and reused by resume, replay, audit and stage 2."""

    device: str
    engine: str
    threads: int
    channels_last: bool


@dataclass
class Job:
    """A run, ready to start. Sample ids index ``dataset.images_nCHW``; ``train_ids`` (partitioned over
    the workers in ``shards``) and ``val_ids`` are disjoint."""

    config: Config
    execution: Execution
    dataset: Dataset
    samples: Samples
    test_samples: Samples
    train_ids: Tensor
    val_ids: Tensor
    shards: list[Tensor]
    topology: Topology
    model: nn.Module
    engine: Engine
    initial_ND: Tensor
    corruption: dict[str, Any]
    steps_override: int | None = None
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """``compute()``, kept under a name: what a protocol derives from the configuration once."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    @cached_property
    def batches(self) -> Batches:
        """The batch schedule."""
        return Batches(self.shards, self.config.batch_size, derive_seed(self.config.seed, "batches"))

    @cached_property
    def byzantine(self) -> Byzantine | None:
        """The workers that send bad rows, drawn by the seed."""
        if self.config.byzantine is None:
            return None
        return parse_byzantine(
            self.config.byzantine, self.config.num_workers, derive_seed(self.config.seed, "byzantine")
        )

    @cached_property
    def virtual_time(self) -> VirtualTime:
        """How long steps and messages take in the simulated world."""
        c = self.config
        return VirtualTime.draw(
            c.num_workers,
            derive_seed(c.seed, "virtual time"),
            step_ms=c.step_ms,
            row_bytes=self.engine.layout.D * self.samples.dtype.itemsize,
            speed_spread=c.speed_spread,
            latency_ms=c.latency_ms,
            bandwidth_mbps=c.bandwidth_mbps,
        )

    @property
    def steps_per_epoch(self) -> int:
        """ceil(n / (N B)): the same for every worker, so shards do not set the length of a run."""
        return math.ceil(len(self.train_ids) / (self.config.num_workers * self.config.batch_size))

    @property
    def total_steps(self) -> int:
        """Local steps of the whole run (each worker's)."""
        if self.steps_override is not None:
            return self.steps_override
        return math.ceil(self.config.epochs * self.steps_per_epoch)

    def learning_rate(self, r: int, total_rounds: int) -> float:
        """The schedule at round r, a pure function."""
        c = self.config
        rounds_per_epoch = max(1e-9, total_rounds / c.epochs)
        milestones = c.milestones or (c.epochs / 2, c.epochs * 3 / 4)
        return learning_rate(
            c.scheduler,
            r,
            base_lr=c.lr,
            rounds_per_epoch=rounds_per_epoch,
            total_rounds=total_rounds,
            gamma=c.gamma,
            warmup_step=c.warmup_step,
            milestones=milestones,
        )

    @cached_property
    def sample_weights_n(self) -> Tensor:
        """Weight of every sample: 1, or 0 where ``--drop_samples`` switches it off."""
        weights_n = torch.ones(len(self.dataset.labels_n))
        if self.config.drop_samples:
            weights_n[read_sample_ids(self.config.drop_samples, len(weights_n))] = 0.0
        return weights_n

    def make_fleet(self, weights_Mn: Tensor | None = None) -> Fleet:
        """A fleet at the start of the run; ``weights_Mn`` for several replicas (default: one). Under torchrun
        the part of it that lives in this process."""
        kind = distributed.ShardedFleet if distributed.started() and weights_Mn is None else Fleet
        fleet = kind(
            self.engine,
            self.initial_ND,
            self.samples,
            self.batches,
            momentum=self.config.momentum,
            weight_decay=self.config.wd,
            seed=derive_seed(self.config.seed, "augmentation"),
            weights_Mn=self.sample_weights_n[None] if weights_Mn is None else weights_Mn,
        )
        if self.byzantine is not None:
            fleet.silent = frozenset(self.byzantine.workers)
        return fleet


def build(
    config: Config,
    execution: Execution | None = None,
    kept_ids: Tensor | None = None,
    total_steps: int | None = None,
) -> Job:
    """Load, split, partition, connect, initialize. ``execution``: as recorded by an earlier start.
    ``kept_ids``: shards keep only these samples (stage 2). ``total_steps``: instead of what ``epochs``
    say (stage 2 trains as long as stage 1 did, on less data).

    Raises :class:`UsageError` where the configuration does not fit the data or the machine.
    """
    dataset = load_dataset(
        config.dataset_name, config.dataset_path, config.image_size, config.download, progress=not config.quiet
    )
    train_ids, val_ids = split_validation(dataset.labels_n, config.val_fraction, derive_seed(config.seed, "split"))
    if config.max_train is not None and config.max_train < len(train_ids):
        keep = config.max_train / len(train_ids)
        _, chosen = split_validation(dataset.labels_n[train_ids], keep, derive_seed(config.seed, "subset"))
        train_ids = train_ids[chosen]
    shards = [
        train_ids[torch.from_numpy(s)]
        for s in partition(
            config.partition_kind,
            dataset.labels_n[train_ids].numpy(),
            config.num_workers,
            derive_seed(config.seed, "partition") % 2**32,
            alpha=config.alpha,
            min_shard=config.min_shard,
            self_balancing=config.self_balancing,
            node_datasize=config.node_datasize,
            shards_per_worker=config.shards_per_worker,
        )
    ]
    dataset, corruption = corrupt(
        dataset, shards, config.flip_labels, config.bad_data, derive_seed(config.seed, "corruption")
    )
    if kept_ids is not None:
        shards = [shard[torch.isin(shard, kept_ids)] for shard in shards]
    empty = [k for k, s in enumerate(shards) if len(s) == 0]
    if empty:
        raise UsageError(f"worker {empty[0]} got no samples: use fewer workers, a larger --alpha or --min_shard 1.")
    train_ids = torch.cat(shards).sort().values  # class preference may leave some out

    topology = build_topology(
        config.mode, config.num_workers, derive_seed(config.seed, "topology") % 2**32, config.topology_file
    )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # workers run in parallel, operators do not: two OpenMP threads spin
    dtype = getattr(torch, config.dtype)
    shape = tuple(dataset.images_nCHW.shape[1:])
    models = [
        load_model(
            config.model,
            dataset.num_classes,
            shape,
            config.pretrained,
            seed=derive_seed(config.seed, "init", k) % 2**32,
        )
        for k in range(config.num_workers if config.init == "per_worker" else 1)
    ]
    augmentation = config.augment
    if augmentation == "auto":
        natural = dataset.channels == 3 and config.dataset_name in (*NATURAL_IMAGES, "imagefolder")
        augmentation = "crop_flip" if natural else "none"
    samples = Samples(dataset.images_nCHW, dataset.labels_n, dataset.mean_C, dataset.std_C, augmentation, dtype)
    if execution is None:
        device = find_device(config.device)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = config.threads or max(1, len(os.sched_getaffinity(0)) // here)
        batches = Batches(shards, config.batch_size, 0)
        chosen = choose_execution(
            models[0],
            samples,
            batches,
            config.engine,
            config.channels_last,
            threads,
            device,
            torch.bfloat16 if config.amp else None,
        )
        engine, channels_last = distributed.share_json(chosen)
        own = "cuda" if device.type == "cuda" and "LOCAL_RANK" in os.environ else str(device)
        execution = Execution(own, engine, threads, channels_last)
    device = find_device(execution.device)
    samples = Samples(
        dataset.images_nCHW,
        dataset.labels_n,
        dataset.mean_C,
        dataset.std_C,
        augmentation,
        dtype,
        execution.channels_last,
    ).to(device)
    test_samples = Samples(
        dataset.test_images_mCHW,
        dataset.test_labels_m,
        dataset.mean_C,
        dataset.std_C,
        "none",
        dtype,
        execution.channels_last,
    ).to(device)
    layout = RowLayout(models[0], execution.channels_last)
    engine = Engine(models[0], layout, execution.engine, execution.threads, torch.bfloat16 if config.amp else None)
    initial_ND = torch.empty(len(models), layout.D, dtype=dtype)
    for row_D, model in zip(initial_ND, models, strict=True):
        layout.write(model, row_D)
    return Job(
        config,
        execution,
        dataset,
        samples,
        test_samples,
        train_ids,
        val_ids,
        shards,
        topology,
        models[0],
        engine,
        initial_ND.to(device),
        corruption,
        total_steps,
    )


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


def read_sample_ids(path: str, count: int) -> Tensor:
    """Sample ids from a text file (separated by white space, # comments), each in [0, count)."""
    try:
        text = Path(path).read_text()
        words = [w for line in text.splitlines() for w in line.partition("#")[0].split()]
        ids = torch.tensor([int(w) for w in words], dtype=torch.int64)
    except OSError as error:
        raise UsageError(f"--drop_samples {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"--drop_samples {path}: not a list of whole numbers ({error}).") from error
    if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < count):
        raise UsageError(f"--drop_samples {path}: sample ids go from 0 to {count - 1}.")
    return ids


def describe(job: Job) -> dict[str, Any]:
    """config.json: everything needed to repeat the run."""
    record = {"config": job.config.to_json(), "execution": vars(job.execution), **provenance()}
    digests = file_digests(job.config)
    return {**record, "files": digests} if digests else record
