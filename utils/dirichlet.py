"""Split a data set over workers by Dirichlet(alpha): the usual model of workers that see different classes.

Legend: N workers, C classes, n samples.
"""

from __future__ import annotations

import numpy as np

from utils.errors import UsageError
from utils.partition import checked

MAX_DRAWS = 11  # flwr-datasets draws once and retries ten times


def dirichlet_partition(
    labels_n: np.ndarray,
    num_workers: int,
    alpha: float,
    seed: int,
    min_shard: int = 10,
    self_balancing: bool = False,
) -> list[np.ndarray]:
    """Split every class over the workers in proportions drawn from Dirichlet(alpha, ..., alpha).

    The method is that of Yurochkin et al. 2019 (arXiv:1905.12022), step for step as flwr-datasets'
    ``DirichletPartitioner`` does it, so the same labels, alpha and seed give the same shards there
    and here. A small alpha gives workers with few classes and shards of very different size; a large
    one approaches IID. Complete and disjoint.

    ``min_shard``: samples that every worker must get; up to 11 draws are made until it holds
    (with 0, a shard may be empty). ``self_balancing``: a worker that holds more than n / N samples
    gets none of the following classes (in the original code, not in the paper).

    Raises UsageError for alpha <= 0, and when no draw gives every worker ``min_shard`` samples.
    """
    labels_n = checked(labels_n, num_workers)
    n = len(labels_n)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise UsageError(f"--alpha must be a positive number, not {alpha}; try 0.1 (skewed) to 100 (near IID).")
    if min_shard < 0:
        raise UsageError(f"--min_shard must be 0 or more, not {min_shard}.")
    if num_workers * min_shard > n:
        raise UsageError(
            f"{num_workers} workers with at least {min_shard} samples each (--min_shard) need "
            f"{num_workers * min_shard} training samples, and there are {n}; "
            f"lower --num_workers or --min_shard."
        )

    rng = np.random.default_rng(seed)  # one stream through all labels, draws and shuffles
    members_of_class = [np.flatnonzero(labels_n == label) for label in np.unique(labels_n)]
    largest_minimum = 0
    for _ in range(MAX_DRAWS):
        shards = _dirichlet_draw(rng, members_of_class, num_workers, alpha, n, self_balancing)
        smallest = min(map(len, shards))
        if smallest >= min_shard:
            for shard in shards:
                rng.shuffle(shard)
            return shards
        largest_minimum = max(largest_minimum, smallest)
    raise UsageError(
        f"no Dirichlet draw out of {MAX_DRAWS} with alpha {alpha} gave each of the {num_workers} workers "
        f"{min_shard} of the {n} samples (the best left one with {largest_minimum}); "
        f"lower --min_shard or --num_workers, raise --alpha, or change --seed."
    )


def _dirichlet_draw(
    rng: np.random.Generator,
    members_of_class: list[np.ndarray],
    num_workers: int,
    alpha: float,
    n: int,
    self_balancing: bool,
) -> list[np.ndarray]:
    """One attempt: the shards in class order, whatever their size."""
    sizes_N = np.zeros(num_workers, dtype=np.int64)
    pieces: list[list[np.ndarray]] = [[] for _ in range(num_workers)]
    for members in members_of_class:
        share_N = rng.dirichlet(np.full(num_workers, float(alpha)))
        if self_balancing:
            share_N[sizes_N > n / num_workers] = 0.0
            total = np.cumsum(share_N)[-1]  # added left to right; np.sum's pairwise order rounds differently
            # All open workers drew exactly 0 (alpha << 1). flwr-datasets divides 0 by 0 there, and its
            # cast of NaN to int puts every cut at the start: the last worker gets the class, as here.
            share_N = share_N / total if total > 0 else np.zeros(num_workers)
        cuts = (np.cumsum(share_N) * len(members)).astype(np.int64)[:-1]
        for worker, piece in enumerate(np.split(members, cuts)):
            pieces[worker].append(piece)
            sizes_N[worker] += len(piece)
    return [np.concatenate(parts) for parts in pieces]
