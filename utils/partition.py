"""Split a data set over workers: IID, class preference, label shards, by owner (Dirichlet: utils/dirichlet.py).

Every partitioner takes the label array of the training samples (the strata of other tasks) and returns one int64
array a worker: positions into that array, no position twice. The result depends on the arguments alone. To add one,
write it here and add a line to ``utils.registry.PARTITIONS``.

Legend: N workers, C classes, n samples, G owners.
"""

from __future__ import annotations

import inspect

import numpy as np

from utils.errors import UsageError
from utils.random import numpy_rng
from utils.registry import PARTITIONS, load


def partition(kind: str, labels_n: np.ndarray, num_workers: int, seed: int, **options: object) -> list[np.ndarray]:
    """The shards of the partitioner ``kind``. ``options`` may hold the options of all partitioners (a configuration
    does); each gets those that it names. An option that none has is a TypeError."""
    function = load(PARTITIONS, kind, "partition")
    taken = {name: inspect.signature(load(PARTITIONS, name, "partition")).parameters for name in PARTITIONS}
    unknown = set(options) - {option for parameters in taken.values() for option in parameters}
    if unknown:
        raise TypeError(f"no partitioner takes {', '.join(sorted(unknown))}")
    own = taken[kind]
    return function(labels_n, num_workers, seed=seed, **{k: v for k, v in options.items() if k in own})


def iid_partition(labels_n: np.ndarray, num_workers: int, seed: int) -> list[np.ndarray]:
    """Deal a random permutation of the samples in equal parts; sizes differ by at most 1.
    Complete and disjoint."""
    labels_n = checked(labels_n, num_workers)
    return np.array_split(numpy_rng("iid_partition", seed).permutation(len(labels_n)), num_workers)


def sizes_partition(
    labels_n: np.ndarray, num_workers: int, seed: int, sizes: tuple[float, ...] = ()
) -> list[np.ndarray]:
    """Deal a random permutation of the samples in parts that are to each other as ``sizes``. Complete and disjoint.
    Raises UsageError where there is not one size a worker."""
    labels_n = checked(labels_n, num_workers)
    if len(sizes) != num_workers:
        raise UsageError(f"--sizes has {len(sizes)} numbers: it needs one for each of {num_workers} workers.")
    ends = np.round(np.cumsum(sizes) / np.sum(sizes) * len(labels_n)).astype(np.int64)
    return np.split(numpy_rng("sizes_partition", seed).permutation(len(labels_n)), ends[:-1])


def class_preference_partition(
    labels_n: np.ndarray,
    num_workers: int,
    seed: int,
    node_datasize: int | None = None,
    concentration: float = 0.5,
) -> list[np.ndarray]:
    """Every worker draws its own class mix and takes ``node_datasize`` samples by it.

    The mix is Dirichlet(concentration, ..., concentration) over the C classes; samples are taken
    without replacement, workers in turn. What a class can no longer give is asked from the classes
    of the worker's mix that have samples left, and when these are empty too, from any. So the mixes
    of late workers are true to their draw only while the data last: keep N * node_datasize well
    below n where that matters. Disjoint; complete only if N * node_datasize = n.

    ``node_datasize``: samples a worker, n // N if None. Raises UsageError if it asks for more than
    there is, or is below 1, or the concentration is not positive.
    """
    labels_n = checked(labels_n, num_workers)
    n = len(labels_n)
    size = n // num_workers if node_datasize is None else node_datasize
    if size < 1:
        raise UsageError(f"--node_datasize must be 1 or more, not {size}.")
    if num_workers * size > n:
        raise UsageError(
            f"{num_workers} workers with {size} samples each (--node_datasize) need {num_workers * size} "
            f"training samples, and there are {n}; at most {n // num_workers} a worker can be had."
        )
    if not (concentration > 0 and np.isfinite(concentration)):
        raise UsageError(f"the concentration of the class mix must be a positive number, not {concentration}.")

    rng = numpy_rng("class_preference_partition", seed)
    pools = [rng.permutation(np.flatnonzero(labels_n == label)) for label in np.unique(labels_n)]
    left_C = np.array([len(pool) for pool in pools])
    shards = []
    for _ in range(num_workers):
        mix_C = rng.dirichlet(np.full(len(pools), float(concentration)))
        taken_C = _draw_counts(rng, mix_C, left_C, size)
        first_C = left_C - taken_C  # pools are used up from their end
        shard = np.concatenate([pool[a:b] for pool, a, b in zip(pools, first_C, left_C, strict=True)])
        left_C = first_C
        shards.append(rng.permutation(shard))
    return shards


def _draw_counts(rng: np.random.Generator, mix_C: np.ndarray, left_C: np.ndarray, size: int) -> np.ndarray:
    """How many samples of each class: ``size`` in all, none above ``left_C``."""
    taken_C = np.zeros_like(left_C)
    while (missing := size - taken_C.sum()) > 0:  # each pass ends it or empties a class: at most C passes
        open_C = left_C - taken_C
        wish_C = np.where(open_C > 0, mix_C, 0.0)
        if wish_C.sum() == 0:
            wish_C = open_C.astype(np.float64)
        taken_C += np.minimum(rng.multinomial(missing, wish_C / wish_C.sum()), open_C)
    return taken_C


def label_shards_partition(
    labels_n: np.ndarray, num_workers: int, seed: int, shards_per_worker: int = 2
) -> list[np.ndarray]:
    """Sort by label, cut in N * shards_per_worker equal pieces, deal each worker that many at random
    (McMahan et al. 2017, arXiv:1602.05629): most workers see about ``shards_per_worker`` classes.
    Complete and disjoint; piece sizes differ by at most 1."""
    labels_n = checked(labels_n, num_workers)
    n, pieces = len(labels_n), num_workers * shards_per_worker
    if shards_per_worker < 1:
        raise UsageError(f"--shards_per_worker must be 1 or more, not {shards_per_worker}.")
    if pieces > n:
        raise UsageError(
            f"{num_workers} workers with {shards_per_worker} label shards each need {pieces} training "
            f"samples, and there are {n}; lower --num_workers or --shards_per_worker."
        )
    rng = numpy_rng("label_shards_partition", seed)
    shuffled = rng.permutation(n)  # so that which samples of a class share a piece is random too
    by_label = shuffled[np.argsort(labels_n[shuffled], kind="stable")]
    dealt = np.array_split(by_label, pieces)
    order = rng.permutation(pieces).reshape(num_workers, shards_per_worker)
    return [rng.permutation(np.concatenate([dealt[piece] for piece in row])) for row in order]


def natural_partition(
    labels_n: np.ndarray, num_workers: int, seed: int, owner_n: np.ndarray | None = None
) -> list[np.ndarray]:
    """Each worker holds what one owner has: those of the N owners with the most samples, in their order.

    Raises UsageError where the data set does not know its owners, or has fewer.
    """
    if owner_n is None:
        raise UsageError(
            "--partition natural needs data that say who owns each sample (air, timeseries, elpv, a manifest)."
        )
    owners = owners_by_size(owner_n)
    if num_workers > len(owners):
        raise UsageError(f"--num_workers is {num_workers}, and {len(owners)} owners have training samples.")
    return [np.flatnonzero(owner_n == owner) for owner in sorted(owners[:num_workers])]


def owners_by_size(owner_n: np.ndarray) -> list[int]:
    """The owners that have samples, the one with the most first."""
    counts_G = np.bincount(owner_n)
    return [int(g) for g in np.lexsort((np.arange(len(counts_G)), -counts_G)) if counts_G[g] > 0]


def checked(labels_n: np.ndarray, num_workers: int) -> np.ndarray:
    """The labels as an array. Raises UsageError where there are fewer of them than workers."""
    labels_n = np.asarray(labels_n)
    if labels_n.ndim != 1:
        raise ValueError(f"labels must be one-dimensional, not {labels_n.shape}")
    if num_workers < 1:
        raise UsageError(f"--num_workers must be 1 or more, not {num_workers}.")
    if num_workers > len(labels_n):
        raise UsageError(
            f"--num_workers is {num_workers}, but there are only {len(labels_n)} training samples; lower --num_workers."
        )
    return labels_n
