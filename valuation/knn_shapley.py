"""The exact Shapley value of every training sample for a k-nearest-neighbour model on features (Jia et al., "Efficient
Task-Specific Data Valuation for Nearest Neighbor Algorithms", VLDB 2019, arXiv 1908.08619).

The players are the training samples. What a set S of them is worth to one test sample depends on the min(k, |S|) in S
that are nearest to it, and the divisor is k even where S has fewer:

- classification: U(S) = (number of them with the right label) / k;
- regression: U(S) = y^2 - (p(S) - y)^2, y the test sample's value, p(S) = (the sum of their values) / k: by how much S
  is better than predicting 0, which is the training mean where values are standardized. (A constant added to U changes
  no Shapley value: these are those of -(p(S) - y)^2. Jia et al. set that to 0 for the empty set, which takes y^2 / n
  off every one of n samples.)

U of the empty set is 0, so the values of all samples sum to U of all of them. Values are means over test samples and
over findings. A sample whose label is unknown for a finding is no player for it, and worth 0 there.

The nearest comes first, by squared Euclidean distance; distances that agree in float32 are a tie, and the sample that
comes first in the data is the nearer one.

Legend: n training samples, m test samples, F features, L findings, b test samples of a block, c training samples of a
chunk, r players of a finding, i of an institution.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.multilabel import UNKNOWN
from utils.errors import UsageError
from utils.progress import Progress, ignored
from utils.random import permutations

BLOCK = 1 << 26  # bytes of distances that a thread holds at a time
CHUNK = 256  # training samples of one product: in double precision they fit a cache up to 1,024 features or so
NOISE = 1e-13  # of the largest distance: what rounding makes of a distance that is 0
ROUNDING = 1e-12  # a sum below this share of what it is made of is 0

# The values of the players in the order of distance [r], from their targets in that order [r] and the test sample's.
Rule = Callable[[Tensor, Tensor], Tensor]


def knn_shapley(
    train_nF: Tensor,
    train_targets: Tensor,
    test_mF: Tensor,
    test_targets: Tensor,
    k: int = 3,
    *,
    counted: Tensor | None = None,
    by_finding: bool = False,
    block_bytes: int = BLOCK,
    threads: int | None = None,
    progress: Progress = ignored,
) -> Tensor:
    """Values [n] in float64 of the training samples for the k-NN classifier; ``by_finding``: [n, L].

    Targets are integer labels, [n] and [m], or findings, [n, L] and [m, L], as :mod:`data.multilabel` has them: 0, 1,
    or 255 where unknown. ``counted`` [m], or [m, L] with a test set for each finding, says which test samples count
    (where the finding is known; all by default): see :func:`balanced_tests`.

    Features of any scale; the product of test and training features is taken in float64. ``block_bytes`` bounds the
    distances that each of ``threads`` threads (one a core by default) holds at a time; beside them stands one chunk of
    256 training samples. The number of threads changes no bit. ``progress`` gets how many test samples are done.

    Raises UsageError: features that are no finite numbers, shapes that do not fit, targets of another kind, k < 1, a
    finding without any test sample.
    """
    columns = _findings(train_targets, "training"), _findings(test_targets, "test")
    return _values(train_nF, columns, test_mF, counted, k, _matching, by_finding, block_bytes, threads, progress)


def knn_shapley_regression(
    train_nF: Tensor,
    train_values: Tensor,
    test_mF: Tensor,
    test_values: Tensor,
    k: int = 3,
    *,
    counted: Tensor | None = None,
    by_finding: bool = False,
    block_bytes: int = BLOCK,
    threads: int | None = None,
    progress: Progress = ignored,
) -> Tensor:
    """Values [n] in float64, in squared units of the targets, for k-NN regression; ``by_finding``: [n, L].

    Targets are float, [n] and [m], or several outputs [n, L] and [m, L], NaN where unknown: standardized ones, since a
    neighbour that is missing counts as 0. (Of a :class:`data.regression.Regression`: ``task.encoded(targets)[:, 0]``.)
    All else as in :func:`knn_shapley`.
    """
    columns = _outputs(train_values, "training"), _outputs(test_values, "test")
    return _values(train_nF, columns, test_mF, counted, k, _averaging, by_finding, block_bytes, threads, progress)


def by_owner(values_n: Tensor, owner_n: Tensor, count: int) -> Tensor:
    """The sum of each institution's values, float64 [i] with i = ``count``; ``owner_n`` holds integers in 0 .. i - 1.
    UsageError where a sample has no such owner. An institution without samples has 0."""
    if values_n.dim() != 1 or owner_n.shape != values_n.shape:
        raise UsageError(f"values of shape {tuple(values_n.shape)} need one owner each, not {tuple(owner_n.shape)}.")
    strange = ((owner_n < 0) | (owner_n >= count)).nonzero()
    if len(strange):
        first = int(strange[0])
        raise UsageError(f"sample {first} belongs to institution {int(owner_n[first])}, but there are {count}.")
    return torch.zeros(count, dtype=torch.float64).index_add_(0, owner_n.long(), values_n.double())


def rescaled(values: Tensor, total: float) -> Tensor:
    """Values times one factor, so that they sum to ``total``: what the samples are worth in units of a metric, say.

    A total of the other sign turns all signs around. UsageError where the values sum to 0 (to rounding: the
    nearest-neighbour model is as good as none), since no factor does it then.
    """
    values = values.double()
    now = values.sum()
    if now.abs() <= ROUNDING * values.abs().sum():
        raise UsageError(f"values that sum to 0 cannot be scaled to sum to {total:g}: the k-NN is as good as none.")
    return values * (total / now)


def balanced_tests(targets_mL: Tensor, limit: int = 300, seed: int = 0) -> Tensor:
    """Which test samples count for which finding, bool [m, L]: of those without the finding and of those with it at
    most ``limit`` each, drawn by ``seed`` alone. Unknown ones do not count.

    UsageError where a finding has none of one side, or ``limit`` < 1.
    """
    columns_mL = _findings(targets_mL, "test").data
    if limit < 1:
        raise UsageError(f"a balanced test set needs at least one sample a side, not {limit}.")
    counted_mL = torch.zeros(columns_mL.shape, dtype=torch.bool)
    for finding, targets_m in enumerate(columns_mL.T):
        for side, name in ((0, "without"), (1, "with")):
            there = (targets_m == side).nonzero()[:, 0]
            if not len(there):
                raise UsageError(f"no test sample is known to be {name} finding {finding}: leave the finding out.")
            (drawn,) = permutations(torch.tensor([len(there)]), "balanced tests", seed, finding, side)
            counted_mL[there[drawn[:limit]], finding] = True
    return counted_mL


# ---- what is checked --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Targets [n, L] or [m, L], which of them are known, and what they are of."""

    data: Tensor
    known: Tensor
    kind: str


def _findings(targets: Tensor, what: str) -> Columns:
    """Labels [n] or findings [n, L] as columns."""
    if targets.is_floating_point() or targets.dim() not in (1, 2):
        raise UsageError(
            f"{what} targets are {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}: they "
            "must be integers, one a sample or several findings a sample."
        )
    targets = targets.detach().cpu()
    if targets.dim() == 1:
        return Columns(targets[:, None], torch.ones(len(targets), 1, dtype=torch.bool), "labels")
    odd = targets[(targets != 0) & (targets != 1) & (targets != UNKNOWN)]
    if len(odd):
        raise UsageError(f"{what} findings must be 0, 1 or {UNKNOWN} (unknown), not {int(odd[0])}.")
    return Columns(targets, targets != UNKNOWN, "findings")


def _outputs(targets: Tensor, what: str) -> Columns:
    """Values [n] or [n, L] as float64 columns."""
    if not targets.is_floating_point() or targets.dim() not in (1, 2):
        raise UsageError(f"{what} values are no float tensor with one or several numbers a sample.")
    if targets.isinf().any():
        raise UsageError(f"{what} values are infinite.")
    targets = targets.detach().cpu().double()
    columns = targets if targets.dim() == 2 else targets[:, None]
    return Columns(columns, ~columns.isnan(), "values")


def _check_features(features: Tensor, columns: Columns, what: str) -> Tensor:
    """The features, on the CPU."""
    if features.dim() != 2 or len(features) != len(columns.data):
        raise UsageError(
            f"{what} features of shape {tuple(features.shape)} do not fit {len(columns.data)} samples: a row each."
        )
    if not len(features):
        raise UsageError(f"there are no {what} samples.")
    return features.detach().cpu()


def _counted(counted: Tensor | None, test: Columns) -> Tensor:
    """Which test samples count for which column, bool [m, L]."""
    counted_mL = test.known
    if counted is not None:
        wide = counted[:, None] if counted.dim() == 1 else counted
        if counted.dtype != torch.bool or wide.shape not in (test.known.shape, (len(test.known), 1)):
            raise UsageError(f"counted test samples are no bool of shape {tuple(test.known.shape)}.")
        counted_mL = counted_mL & wide.cpu()
    empty = (~counted_mL.any(0)).nonzero()
    if len(empty):
        raise UsageError(f"no test sample counts for finding {int(empty[0])}: leave the finding out.")
    return counted_mL


# ---- values of one test sample, players in the order of distance ------------------------------------------


def _matching(k: int, players: int) -> Rule:
    """Classification. Theorem 1 of Jia et al. says s_i = s_(i+1) + (g_i - g_(i+1)) w_i and s_r = g_r w_r, where g_i is
    1 if the i-th nearest has the right label and 0 otherwise, and w_i = min(k, i) / (k i) = 1 / max(k, i). Summed by
    parts that is s_i = g_i w_i - the sum over all farther j of g_j (w_(j-1) - w_j): one cumulative sum. It holds for
    any number of players: with fewer than k each is worth g_i / k."""
    weight_r = 1.0 / torch.arange(1, players + 1, dtype=torch.float64).clamp(min=k)
    drop_r = torch.zeros_like(weight_r)
    drop_r[1:] = weight_r[:-1] - weight_r[1:]

    def values(targets_r: Tensor, target: Tensor) -> Tensor:
        right_r = (targets_r == target).double()
        values_r = (drop_r * right_r).cumsum(0)
        total = values_r[-1].clone()
        return values_r.addcmul_(weight_r, right_r).sub_(total)

    return values


def _averaging(k: int, players: int) -> Rule:
    """Regression. s_i - s_(i+1) is the mean change of U when i takes the place of i + 1 in a random set of others, sets
    of every size equally likely. It is (y_i - y_(i+1)) / k (2 y - (y_i + y_(i+1) + 2 T) / k) where fewer than k members
    are nearer, T the sum over the set's nearest k - 1, and 0 elsewhere. The former has probability min(k, i) / i; with
    it a nearer sample is among the k - 1 with probability pair_i / 2, and a farther one, j, with pair_(j-1) / 2, where
    pair_i = min(k, i) min(k - 1, i - 1) / (i (i - 1)). Behind the farthest stands a sample of value 0. This is the
    recursion that Jia et al. give for regression."""
    rank_r = torch.arange(1, players + 1, dtype=torch.float64)
    near_r = rank_r.clamp(max=k) / rank_r
    pair_r = near_r * (rank_r - 1).clamp(max=k - 1) / (rank_r - 1).clamp(min=1)

    def values(targets_r: Tensor, target: Tensor) -> Tensor:
        next_r = torch.cat([targets_r[1:], targets_r.new_zeros(1)])
        nearer_r = pair_r * (targets_r.cumsum(0) - targets_r)
        farther_r = (pair_r * next_r).flip(0).cumsum(0).flip(0)  # from j = i + 1 on
        farther_r = torch.cat([farther_r[1:], farther_r.new_zeros(1)])
        slope_r = near_r * (2 * target - (targets_r + next_r) / k) - (nearer_r + farther_r) / k
        return ((targets_r - next_r) / k * slope_r).flip(0).cumsum(0).flip(0)

    return values


# ---- all test samples -------------------------------------------------------------------------------------


def _values(
    train_nF: Tensor,
    columns: tuple[Columns, Columns],
    test_mF: Tensor,
    counted: Tensor | None,
    k: int,
    rule: Callable[[int, int], Rule],
    by_finding: bool,
    block_bytes: int,
    threads: int | None,
    progress: Progress,
) -> Tensor:
    """Values [n], or [n, L], by ``rule``."""
    if k < 1:
        raise UsageError(f"k must be at least 1, not {k}.")
    train, test = columns
    train_nF, test_mF = _check_features(train_nF, train, "training"), _check_features(test_mF, test, "test")
    (n, L), F = train.data.shape, test_mF.shape[1]
    if train_nF.shape[1] != F:
        raise UsageError(f"training samples have {train_nF.shape[1]} features and test samples {F}.")
    if train.kind != test.kind or test.data.shape[1] != L:
        mine, theirs = (f"{part.data.shape[1]} ({part.kind})" for part in (train, test))
        raise UsageError(f"training samples have {mine} targets each and test samples {theirs}.")
    counted_mL = _counted(counted, test)
    space = Space(train_nF, test_mF)
    game = Game(train, test.data, counted_mL, {count: rule(k, count) for count in set(train.known.sum(0).tolist())})
    tests = counted_mL.any(1).nonzero()[:, 0]
    size = max(1, block_bytes // (4 * n + 8 * F))  # a row of distances and one of features for each test sample
    blocks = tests.tensor_split(-(-len(tests) // size))
    values_nL = torch.zeros(n, L, dtype=torch.float64)
    threads = threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads, "knn", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # Blocks are added in their order, whichever is ready first: the same bits with any number of threads.
        results = pool.map(lambda block_b: game.sums(block_b, space.distances(block_b)), blocks)
        for block_b, sums_Ln in zip(blocks, results, strict=True):
            values_nL += sums_Ln.T
            progress(len(block_b))
    values_nL /= counted_mL.sum(0)
    return values_nL if by_finding else values_nL.mean(1)


class Space:
    """Distances between samples. Features are centred, so that what they have in common costs no digits, and distances
    are in units of the largest that could be, so that no square leaves float32's range."""

    def __init__(self, train_nF: Tensor, test_mF: Tensor) -> None:
        self.train_nF, self.test_mF = train_nF, test_mF
        self.mean_F = torch.stack([rows.double().sum(0) for rows in train_nF.split(CHUNK)]).sum(0) / len(train_nF)
        self.square_n = self._squares(train_nF, "training")
        reach = self.square_n.max().sqrt() + self._squares(test_mF, "test").max().sqrt()
        self.unit = 1 / max(float(reach) ** 2, torch.finfo(torch.float64).tiny)

    def _squares(self, features: Tensor, what: str) -> Tensor:
        """Squared distances from the mean. A sum tells whether one of its terms is no finite number."""
        squares = torch.cat([(rows.double() - self.mean_F).square().sum(1) for rows in features.split(CHUNK)])
        if not squares.isfinite().all():
            at = next((i for i, row_F in enumerate(features) if not row_F.isfinite().all()), None)
            if at is not None:
                raise UsageError(f"{what} features of sample {at} are not finite.")
            raise UsageError(f"{what} features are too large: their squares are not finite.")
        return squares

    def distances(self, block_b: Tensor) -> Tensor:
        """Squared distances of some test samples from all training samples, float32 [b, n]."""
        test_bF = self.test_mF[block_b].double() - self.mean_F
        square_b1 = test_bF.square().sum(1, keepdim=True)
        distances_bn = torch.empty(len(block_b), len(self.train_nF))
        buffer_cF = torch.empty(CHUNK, test_bF.shape[1], dtype=torch.float64)
        for start, rows in self._chunks():
            centred_cF = torch.sub(rows, self.mean_F, out=buffer_cF[: len(rows)])
            square_c = self.square_n[start : start + len(rows)]
            exact_bc = torch.addmm(square_c, test_bF, centred_cF.T, alpha=-2).add_(square_b1)
            distances_bn[:, start : start + len(rows)] = exact_bc.mul_(self.unit).sub_(NOISE).clamp_(min=0)
        return distances_bn

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for rows in self.train_nF.split(CHUNK):
            yield start, rows
            start += len(rows)


class Game:
    """All players, and what they are worth to some test samples. ``rules`` are by number of players."""

    def __init__(self, train: Columns, targets_mL: Tensor, counted_mL: Tensor, rules: dict[int, Rule]) -> None:
        self.targets_Ln, self.known_Ln = train.data.T.contiguous(), train.known.T.contiguous()
        self.targets_mL, self.counted_mL, self.rules = targets_mL, counted_mL, rules
        self.players_L = train.known.sum(0).tolist()

    def sums(self, block_b: Tensor, distances_bn: Tensor) -> Tensor:
        """The sum over the test samples of a block of the values for each column [L, n]."""
        sums_Ln = torch.zeros(self.targets_Ln.shape, dtype=torch.float64)
        for test, distances_n in zip(block_b.tolist(), distances_bn, strict=True):
            order_n = nearest_first(distances_n)
            for column in self.counted_mL[test].nonzero()[:, 0].tolist():
                players = self.players_L[column]
                if not players:
                    continue
                order_r = order_n
                if players < len(order_n):
                    order_r = order_n[self.known_Ln[column].index_select(0, order_n)]
                targets_r = self.targets_Ln[column].index_select(0, order_r)
                values_r = self.rules[players](targets_r, self.targets_mL[test, column])
                sums_Ln[column].scatter_add_(0, order_r, values_r)
        return sums_Ln


def nearest_first(distances_n: Tensor) -> Tensor:
    """The stable order of nonnegative float32 numbers [n], int64. Their bits are ordered as they are, and NumPy sorts
    16-bit integers in linear time: by the lower half first, then by the upper one. A third of the time of one sort."""
    bits_n = distances_n.numpy().view(np.uint32)
    lower_n = np.argsort(bits_n.astype(np.uint16), kind="stable")
    upper_n = (bits_n >> 16).astype(np.uint16)
    return torch.from_numpy(lower_n[np.argsort(upper_n[lower_n], kind="stable")])
