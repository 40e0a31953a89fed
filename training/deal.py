"""The data of a run, dealt out to its workers.

Legend: N workers, n training samples (all that the data set has, by sample id).
"""

from __future__ import annotations

import dataclasses
import reprlib
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.corruption import corrupt
from data.dataset_loader import Dataset, load_dataset, subset, validation_split
from utils.args import Config
from utils.errors import UsageError
from utils.files import read_lines
from utils.partition import owners_by_size, partition
from utils.random import derive_seed

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Dealt:
    """A data set (labels flipped where the configuration says so), dealt out: ids for training and validation, each
    worker's shard, the owner that each worker is (``--partition natural``), and what was corrupted."""

    dataset: Dataset
    train_ids: Tensor
    val_ids: Tensor
    shards: list[Tensor]
    owners: list[int] | None
    corruption: dict[str, Any]


def deal(config: Config) -> Dealt:
    """Load, split and partition."""
    dataset = load(config)
    train_ids, val_ids = training_ids(config, dataset)
    owner_n = None if dataset.owners is None else dataset.owners.owner_n[train_ids].numpy()
    positions = partition(
        config.partition_kind,
        dataset.task.strata(dataset.targets_n)[train_ids].numpy(),
        config.num_workers,
        derive_seed(config.seed, "partition") % 2**32,
        alpha=config.alpha,
        min_shard=config.min_shard,
        self_balancing=config.self_balancing,
        node_datasize=config.node_datasize,
        sizes=config.sizes,
        shards_per_worker=config.shards_per_worker,
        owner_n=owner_n,
    )
    shards = [train_ids[torch.from_numpy(s)] for s in positions]
    owners = [int(owner_n[s[0]]) for s in positions] if config.partition_kind == "natural" else None
    dataset, corruption = corrupt(
        dataset, shards, config.flip_labels, config.bad_data, derive_seed(config.seed, "corruption"),
        config.worker_flips,
    )
    return Dealt(dataset, train_ids, val_ids, shards, owners, corruption)


def load(config: Config) -> Dataset:
    """The data set that the configuration names."""
    return load_dataset(
        config.dataset_name,
        config.dataset_path,
        image_size=config.image_size,
        download=config.download,
        progress=not config.quiet,
        history=config.history,
        horizon=config.horizon,
        seconds=config.sound_seconds,
    )


def training_ids(config: Config, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Ids for training (``--max_train`` of them) and for validation."""
    train_ids, val_ids = validation_split(dataset, config.val_fraction, derive_seed(config.seed, "split"))
    if config.max_train is not None:
        strata_n = dataset.task.strata(dataset.targets_n)
        train_ids = train_ids[subset(strata_n[train_ids], config.max_train, derive_seed(config.seed, "subset"))]
    return train_ids, val_ids


def with_workers(config: C) -> C:
    """The configuration with its number of workers: one for each owner that has training samples, where
    ``--partition natural`` comes without ``--num_workers``."""
    if config.num_workers is not None:
        return config
    dataset = load(config)
    if dataset.owners is None:
        raise UsageError(f"--partition natural: {config.dataset_name} does not say who owns its samples.")
    train_ids, _ = training_ids(config, dataset)
    having = owners_by_size(dataset.owners.owner_n[train_ids].numpy())
    left_out = [name for g, name in enumerate(dataset.owners.names) if g not in set(having)]
    if left_out:
        warnings.warn(f"owners without training samples are left out: {', '.join(left_out)}", stacklevel=2)
    return dataclasses.replace(config, num_workers=len(having))


def kept_shards(config: Config, dealt: Dealt, kept_ids: Tensor | None) -> list[Tensor]:
    """The shards, of which only ``kept_ids`` or what ``--keep_samples`` names is left."""
    if kept_ids is None and config.keep_samples:
        kept_ids = read_sample_ids("keep_samples", config.keep_samples, len(dealt.dataset.targets_n))
        warn_outside("--keep_samples", kept_ids, dealt.train_ids)
    shards = dealt.shards if kept_ids is None else [s[torch.isin(s, kept_ids)] for s in dealt.shards]
    empty = [k for k, s in enumerate(shards) if len(s) == 0]
    if empty:
        kept = "keep some of each worker's with --keep_samples" if kept_ids is not None else "a --min_shard of 1"
        raise UsageError(f"worker {empty[0]} got no samples: use fewer workers, a larger --alpha or {kept}.")
    return shards


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
