"""From a configuration to everything a run needs: the only place that joins config, data, networks
and workers.

Legend: N workers, n training samples (all that the data set has, by sample id), D floats a row.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.batches import Batches, Samples, SequenceSamples
from data.dataset_loader import Dataset
from data.task import Task
from networks import load_model
from training import split
from training.deal import deal, kept_shards, read_sample_ids, warn_outside
from training.execution import (
    Execution,
    engine_of,
    find_device,
    first_execution,
    optimizer_of,
    use_one_thread_an_operator,
)
from training.identity import Identity, check_replay, identity_of
from training.privacy import make_private, privacy_of
from training.split import in_processes, stages_of
from utils.args import Config
from utils.errors import UsageError
from utils.provenance import provenance
from utils.random import derive_seed
from utils.scheduler import learning_rate
from utils.topology import Topology, build_topology
from utils.virtual_time import VirtualTime
from workers import distributed
from workers.engine import Engine
from workers.robust import Byzantine, parse_byzantine
from workers.stages import Stage, StagedFleet
from workers.tuning import products, splits
from workers.worker_vision import Fleet

T = TypeVar("T")

NATURAL_IMAGES = ("cifar10", "cifar100", "tinyimagenet", "imagefolder")


@dataclass
class Job:
    """A run, ready to start. Sample ids index ``dataset.inputs_n``; ``train_ids`` (partitioned over
    the workers in ``shards``) and ``val_ids`` are disjoint. ``owners``: the owner that each worker is, where shards are
    owners'. ``whole_N``: samples each worker had before pruning;
    the length of a run and of its local epochs follows from these, so pruning does not shorten the training.
    ``decisions``: what was decided as the run went and does not follow from the configuration; checkpoints keep it, and
    whoever replays the run reads it."""

    config: Config
    execution: Execution
    identity: Identity
    dataset: Dataset
    samples: Samples
    test_samples: Samples
    train_ids: Tensor
    val_ids: Tensor
    shards: list[Tensor]
    owners: list[int] | None
    whole_N: Tensor
    batches: Batches
    topology: Topology
    model: nn.Module
    engine: Engine
    initial_ND: Tensor
    stages: list[Stage]
    corruption: dict[str, Any]
    decisions: dict[str, list] = field(default_factory=dict)
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
            **split.in_time(self.stages, self.execution.batch_parts, c, self.samples.dtype.itemsize),
        )

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a worker's parameters, without the statistics of BatchNorm."""
        return self.engine.layout.num_parameters * self.samples.dtype.itemsize

    @cached_property
    def sample_products(self) -> int:
        """Multiplications of a forward pass of one sample."""
        return products(self.model, self.samples.shape)

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
        weights_n = torch.ones(len(self.dataset.targets_n))
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
        fleet = self._kind(whole=weights_Mn is not None)(
            self.engine,
            self.initial_ND,
            self.samples,
            self.batches,
            optimizer=optimizer_of(self.config),
            seed=derive_seed(self.config.seed, "augmentation"),
            weights_Mn=self.sample_weights_n[None] if weights_Mn is None else weights_Mn,
            privacy=privacy_of(self.config),
        )
        if self.byzantine is not None:
            fleet.uncounted = frozenset(self.byzantine.workers)
        return fleet

    def _kind(self, whole: bool) -> Callable[..., Fleet]:
        """What makes a fleet of this run. ``whole``: of several replicas, all here and unsplit, which gives the same
        numbers."""
        if whole:
            return Fleet
        if in_processes(self.config):
            from workers.pipeline import PipelineFleet  # takes long to load

            how = {"schedule": self.config.schedule, "labels": self.config.split_labels}
            return partial(PipelineFleet, stages=self.stages, **how)
        if self.stages:
            return partial(StagedFleet, stages=self.stages)
        return distributed.ShardedFleet if distributed.started() else Fleet


def build(config: Config, execution: Execution | None = None, kept_ids: Tensor | None = None) -> Job:
    """Load, split, partition, connect, initialize. ``execution``: as recorded by an earlier start.
    ``kept_ids``: shards keep only these samples (default: what ``--keep_samples`` says); the run is as long as
    with all of them.

    Raises :class:`UsageError` where the configuration does not fit the data or the machine, and where processes
    that train together do not agree.
    """
    dealt = deal(config)
    dataset = dealt.dataset
    check_replay(config, dataset.fingerprint)
    shards = kept_shards(config, dealt, kept_ids)
    if config.finetune and not dataset.task.one_class:
        raise UsageError("--finetune measures each worker on its own class mix: it needs samples of one class each.")
    identity = identity_of(config, dataset.fingerprint, shards)
    distributed.agree(identity, "data or settings")
    use_one_thread_an_operator(config.deterministic)
    samples, test_samples = samples_of(config, dataset)
    models = initial_models(config, dataset.task, samples.shape)
    make_private(config, models[0])
    batches = Batches(shards, config.batch_size, derive_seed(config.seed, "batches"))
    check_batch_norm(config, models[0], samples.shape, batches)
    torch.backends.cudnn.allow_tf32 = config.tf32  # for the trials too
    execution = execution or first_execution(config, models[0], samples, batches)
    device = find_device(execution.device)
    engine = engine_of(config, models[0], execution, device)
    samples, test_samples = (
        dataclasses.replace(part, channels_last=execution.channels_last).to(device) for part in (samples, test_samples)
    )
    return Job(
        config=config,
        execution=execution,
        identity=identity,
        dataset=dataset,
        samples=samples,
        test_samples=test_samples,
        train_ids=torch.cat(shards).sort().values,
        val_ids=dealt.val_ids,
        shards=shards,
        owners=dealt.owners,
        whole_N=torch.tensor([len(s) for s in dealt.shards]),
        batches=batches,
        topology=topology_of(config, dataset, dealt.owners),
        model=models[0],
        engine=engine,
        initial_ND=engine.rows(models, samples.dtype).to(device),
        stages=stages_of(config, models[0], engine.layout, samples.shape, execution, batches.ragged),
        corruption=dealt.corruption,
    )


def topology_of(config: Config, dataset: Dataset, owners: list[int] | None) -> Topology:
    """Who averages with whom."""
    known = owners is not None and dataset.owners.positions_GX is not None
    return build_topology(
        config.mode,
        config.num_workers,
        derive_seed(config.seed, "topology") % 2**32,
        path=config.topology_file,
        neighbors=config.neighbors,
        base_neighbors=config.base_neighbors,
        torus=config.torus,
        branches=config.branches,
        positions_NX=dataset.owners.positions_GX[owners].numpy() if known else None,
    )


def initial_models(config: Config, task: Task, shape: tuple[int, ...]) -> list[nn.Module]:
    """The network that all workers start from, or one for each."""
    count = config.num_workers if config.init == "per_worker" else 1
    return [initial_model(config, task, shape, config.seed, k) for k in range(count)]


def initial_model(config: Config, task: Task, shape: tuple[int, ...], seed: int, k: int = 0) -> nn.Module:
    """The network that worker k of a run of this seed starts from."""
    start = derive_seed(seed, "init", k) % 2**32
    return load_model(config.model, task.num_outputs, shape, config.pretrained, start)


def check_batch_norm(config: Config, model: nn.Module, shape: tuple[int, ...], batches: Batches) -> None:
    """Raises :class:`UsageError` where a batch of one sample leaves BatchNorm nothing to normalize over."""
    smallest = int(batches.sizes_N.min())
    if smallest > 1 or splits(model):
        return
    try:
        copy.deepcopy(model).to("meta").train()(torch.empty(1, *shape, device="meta"))
    except ValueError as error:
        worker = int(batches.sizes_N.argmin())
        raise UsageError(
            f"{config.model} normalizes over its batch, and a batch of worker {worker} has one sample: use a larger "
            "--batch_size or --min_shard, fewer workers, or a network without BatchNorm."
        ) from error


def samples_of(config: Config, dataset: Dataset) -> tuple[Samples, Samples]:
    """Training (and validation) samples, and test samples, which are never augmented."""
    kind = Samples if dataset.pictures else SequenceSamples
    augmentation = config.augment
    if augmentation == "auto":
        natural = dataset.pictures and dataset.channels == 3 and config.dataset_name in NATURAL_IMAGES
        augmentation = "crop_flip" if natural else "none"
    if augmentation not in kind.augmentations:
        what = "pictures" if dataset.pictures else "sequences"
        raise UsageError(f"--augment {augmentation}: choose from {', '.join(kind.augmentations)} for {what}.")
    task = dataset.task
    common = {"mean_C": dataset.mean_C, "std_C": dataset.std_C, "dtype": getattr(torch, config.dtype), "task": task}
    return (
        kind(dataset.inputs_n, task.encoded(dataset.targets_n), augmentation=augmentation, **common),
        kind(dataset.test_inputs_m, task.encoded(dataset.test_targets_m), **common),
    )


def describe(job: Job) -> dict[str, Any]:
    """config.json: everything needed to repeat the run, and what it is bound to."""
    identity = {k: v for k, v in job.identity.items() if k != "files"}
    task = job.dataset.task
    record = {"config": job.config.to_json(), "execution": vars(job.execution), **provenance()}
    record["task"] = {**task.record(), "metrics": [vars(metric) for metric in task.metrics]}
    if job.stages:
        record["stages"] = split.record(job.stages)
    if job.owners is not None:
        record["owners"] = [job.dataset.owners.names[g] for g in job.owners]
    return {**record, "files": job.identity["files"], "identity": identity}
