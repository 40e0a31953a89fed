"""From a configuration to everything a run needs: the only place that joins config, data, networks
and workers.

Legend: N workers, n training samples (all that the data set has, by sample id), D floats a row.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import reprlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.batches import Batches, Samples
from data.corruption import corrupt
from data.dataset_loader import Dataset, load_dataset, split_validation, subset
from networks import load_model
from training.identity import Identity, identity_of
from training.protocols import load_protocol
from utils.args import Config
from utils.dirichlet import partition
from utils.errors import UsageError
from utils.files import read_lines
from utils.provenance import provenance
from utils.random import derive_seed
from utils.scheduler import learning_rate
from utils.topology import Topology, build_topology
from utils.virtual_time import VirtualTime
from workers import distributed
from workers.engine import Engine
from workers.robust import Byzantine, parse_byzantine
from workers.tuning import IN_PARTS, batch_parts, choose_execution, products, splits
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
    batch_parts: int = 1  # runs of older versions do not record it


@dataclass
class Job:
    """A run, ready to start. Sample ids index ``dataset.images_nCHW``; ``train_ids`` (partitioned over
    the workers in ``shards``) and ``val_ids`` are disjoint. ``whole_N``: samples each worker had before pruning;
    the length of a run and of its local epochs follows from these, so pruning does not shorten the training."""

    config: Config
    execution: Execution
    identity: Identity
    dataset: Dataset
    samples: Samples
    test_samples: Samples
    train_ids: Tensor
    val_ids: Tensor
    shards: list[Tensor]
    whole_N: Tensor
    batches: Batches
    topology: Topology
    model: nn.Module
    engine: Engine
    initial_ND: Tensor
    corruption: dict[str, Any]
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """``compute()``, kept under a name: what a protocol derives from the configuration once."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

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
            row_bytes=self.engine.layout.num_floats * self.samples.dtype.itemsize,
            speed_spread=c.speed_spread,
            latency_ms=c.latency_ms,
            bandwidth_mbps=c.bandwidth_mbps,
        )

    @cached_property
    def sample_products(self) -> int:
        """Multiplications of a forward pass of one sample."""
        return products(self.model, tuple(self.dataset.images_nCHW.shape[1:]))

    @property
    def steps_per_epoch(self) -> int:
        """ceil(n / (N B)): the same for every worker, so shards do not set the length of a run."""
        return math.ceil(int(self.whole_N.sum()) / (self.config.num_workers * self.config.batch_size))

    @property
    def total_steps(self) -> int:
        """Local steps of the whole run (each worker's)."""
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
            ids = read_sample_ids("drop_samples", self.config.drop_samples, len(weights_n))
            warn_outside("--drop_samples", ids, self.train_ids)
            weights_n[ids] = 0.0
            if not bool(weights_n[self.train_ids].any()):
                raise UsageError(f"--drop_samples {self.config.drop_samples} leaves no training sample with a weight.")
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


def build(config: Config, execution: Execution | None = None, kept_ids: Tensor | None = None) -> Job:
    """Load, split, partition, connect, initialize. ``execution``: as recorded by an earlier start.
    ``kept_ids``: shards keep only these samples (default: what ``--keep_samples`` says); the run is as long as
    with all of them.

    Raises :class:`UsageError` where the configuration does not fit the data or the machine, and where processes
    that train together do not agree.
    """
    dataset, train_ids, val_ids, whole_shards, corruption = load_shards(config)
    if kept_ids is None and config.keep_samples:
        kept_ids = read_sample_ids("keep_samples", config.keep_samples, len(dataset.labels_n))
        warn_outside("--keep_samples", kept_ids, train_ids)
    shards = whole_shards if kept_ids is None else [s[torch.isin(s, kept_ids)] for s in whole_shards]
    empty = [k for k, s in enumerate(shards) if len(s) == 0]
    if empty:
        kept = "keep some of each worker's with --keep_samples" if kept_ids is not None else "a --min_shard of 1"
        raise UsageError(f"worker {empty[0]} got no samples: use fewer workers, a larger --alpha or {kept}.")
    identity = identity_of(config, dataset.fingerprint, shards)
    distributed.agree(identity, "data or settings")
    topology = build_topology(
        config.mode, config.num_workers, derive_seed(config.seed, "topology") % 2**32, config.topology_file
    )
    use_one_thread_an_operator(config.deterministic)
    models = initial_models(config, dataset)
    batches = Batches(shards, config.batch_size, derive_seed(config.seed, "batches"))
    check_batch_norm(config, models[0], dataset, batches)
    autocast = torch.bfloat16 if config.amp else None
    samples, test_samples = samples_of(config, dataset)
    if execution is None:
        execution = first_execution(config, models[0], samples, batches, autocast)
    device = find_device(execution.device)
    samples, test_samples = (
        dataclasses.replace(part, channels_last=execution.channels_last).to(device) for part in (samples, test_samples)
    )
    torch.backends.cudnn.allow_tf32 = config.tf32
    engine = Engine.on(
        device, models[0], execution.engine, execution.threads, execution.channels_last, autocast, execution.batch_parts
    )
    initial_ND = torch.zeros(len(models), engine.layout.D, dtype=samples.dtype)
    for row_D, model in zip(initial_ND, models, strict=True):
        engine.layout.write(model, row_D)
    return Job(
        config=config,
        execution=execution,
        identity=identity,
        dataset=dataset,
        samples=samples,
        test_samples=test_samples,
        train_ids=torch.cat(shards).sort().values,
        val_ids=val_ids,
        shards=shards,
        whole_N=torch.tensor([len(s) for s in whole_shards]),
        batches=batches,
        topology=topology,
        model=models[0],
        engine=engine,
        initial_ND=initial_ND.to(device),
        corruption=corruption,
    )


def load_shards(config: Config) -> tuple[Dataset, Tensor, Tensor, list[Tensor], dict[str, Any]]:
    """The data set (labels flipped where the configuration says so), the ids of its training and validation
    samples, each worker's shard, and what was corrupted."""
    dataset = load_dataset(
        config.dataset_name, config.dataset_path, config.image_size, config.download, progress=not config.quiet
    )
    train_ids, val_ids = split_validation(dataset.labels_n, config.val_fraction, derive_seed(config.seed, "split"))
    if config.max_train is not None:
        train_ids = train_ids[subset(dataset.labels_n[train_ids], config.max_train, derive_seed(config.seed, "subset"))]
    positions = partition(
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
    shards = [train_ids[torch.from_numpy(s)] for s in positions]
    dataset, corruption = corrupt(
        dataset, shards, config.flip_labels, config.bad_data, derive_seed(config.seed, "corruption")
    )
    return dataset, train_ids, val_ids, shards, corruption


def use_one_thread_an_operator(deterministic: bool) -> None:
    """Workers run in parallel, operators do not: two OpenMP threads spin."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)


def initial_models(config: Config, dataset: Dataset) -> list[nn.Module]:
    """The network that all workers start from, or one for each."""
    shape = tuple(dataset.images_nCHW.shape[1:])
    count = config.num_workers if config.init == "per_worker" else 1
    seeds = [derive_seed(config.seed, "init", k) % 2**32 for k in range(count)]
    return [load_model(config.model, dataset.num_classes, shape, config.pretrained, seed) for seed in seeds]


def check_batch_norm(config: Config, model: nn.Module, dataset: Dataset, batches: Batches) -> None:
    """Raises :class:`UsageError` where a batch of one sample leaves BatchNorm nothing to normalize over."""
    smallest = int(batches.sizes_N.min())
    if smallest > 1 or splits(model):
        return
    try:
        copy.deepcopy(model).to("meta").train()(torch.empty(1, *dataset.images_nCHW.shape[1:], device="meta"))
    except ValueError as error:
        worker = int(batches.sizes_N.argmin())
        raise UsageError(
            f"{config.model} normalizes over its batch, and a batch of worker {worker} has one sample: use a larger "
            "--batch_size or --min_shard, fewer workers, or a network without BatchNorm."
        ) from error


def samples_of(config: Config, dataset: Dataset) -> tuple[Samples, Samples]:
    """Training (and validation) samples, and test samples, which are never augmented."""
    augmentation = config.augment
    if augmentation == "auto":
        natural = dataset.channels == 3 and config.dataset_name in (*NATURAL_IMAGES, "imagefolder")
        augmentation = "crop_flip" if natural else "none"
    scale, dtype = (dataset.mean_C, dataset.std_C), getattr(torch, config.dtype)
    return (
        Samples(dataset.images_nCHW, dataset.labels_n, *scale, augmentation, dtype),
        Samples(dataset.test_images_mCHW, dataset.test_labels_m, *scale, "none", dtype),
    )


def first_execution(
    config: Config, model: nn.Module, samples: Samples, batches: Batches, autocast: torch.dtype | None
) -> Execution:
    """How a run that starts now is executed; of several processes the first one decides."""
    device = find_device(config.device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // here)
    if device.type == "cuda":
        threads = here = 1  # a GPU is fed by one thread, and what it batches does not depend on the cores beside it
    chosen = choose_execution(
        model, samples, batches, config.engine, config.channels_last, threads, device, autocast
    )
    engine, channels_last = distributed.share_json(chosen)
    parts = first_parts(config, model, samples, batches, engine, threads * here)
    own = "cuda" if device.type == "cuda" and "LOCAL_RANK" in os.environ else str(device)
    return Execution(own, engine, threads, channels_last, parts)


def first_parts(
    config: Config, model: nn.Module, samples: Samples, batches: Batches, engine: str, threads: int
) -> int:
    """Parts that a batch is cut into: as ``--batch_parts`` says, or by the rule, which reads how many workers train at
    a time (all, unless the protocol says otherwise) and the threads of all processes here."""
    if config.batch_parts is None:
        protocol = load_protocol(config.protocol)
        at_once = getattr(protocol, "workers_at_once", lambda config: config.num_workers)(config)
        shape, size = tuple(samples.images_nCHW.shape[1:]), int(batches.sizes_N.max())
        return batch_parts(model, shape, size, at_once, threads, engine)
    if config.batch_parts > 1 and engine not in IN_PARTS:
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


def read_sample_ids(flag: str, path: str, count: int) -> Tensor:
    """Sample ids from a text file (separated by white space, # comments), each in [0, count)."""
    words = [word for _, line in read_lines(path, f"--{flag}") for word in line.split()]
    odd = next((w for w in words if not (w.isascii() and w.isdigit() and len(w) < 19)), None)
    if odd is not None:
        raise UsageError(f"--{flag} {path}: {reprlib.repr(odd)} is no sample id (a whole number from 0).")
    ids = torch.tensor([int(w) for w in words], dtype=torch.int64)
    if len(ids) and int(ids.max()) >= count:
        raise UsageError(f"--{flag} {path}: sample ids go from 0 to {count - 1}.")
    return ids


def warn_outside(flag: str, ids: Tensor, train_ids: Tensor) -> None:
    """Say how many of the named samples are none that the run trains on."""
    outside = int((~torch.isin(ids, train_ids)).sum())
    if outside:
        warnings.warn(f"{flag}: {outside} of {len(ids)} ids are no training samples of this run", stacklevel=2)


def describe(job: Job) -> dict[str, Any]:
    """config.json: everything needed to repeat the run, and what it is bound to."""
    identity = {k: v for k, v in job.identity.items() if k != "files"}
    record = {"config": job.config.to_json(), "execution": vars(job.execution), **provenance()}
    return {**record, "files": job.identity["files"], "identity": identity}
