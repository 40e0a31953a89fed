"""Gossip that survives bad workers: robust replacements for the weighted mean, and the bad workers.

A rule makes one receiver's new row out of its own row and its neighbours' rows. ``mean`` is the gossip
of workers/mixing.py; ``median`` and ``trimmed_mean`` work on each coordinate and ignore the mixing
weights (Yin et al. 2018, arXiv:1803.01498; without a server: BRIDGE, Fang et al. 2022,
arXiv:1908.08098); ``clipped`` keeps the weights and shortens what comes from far away (He,
Karimireddy & Jaggi 2022, arXiv:2202.01545).

No rule can save a receiver that hears mostly bad workers; :func:`exposed` names those receivers.

To add a rule, write a function ``(target_D, own_D, neighbours, weights, own_weight)`` and put it in
AGGREGATIONS; an attack is a function ``(row_D, *keys) -> row_D`` in ATTACKS.

Legend: N workers, n receivers, A rows at hand, D floats a row, d neighbours of a receiver,
P trainable floats of it (BatchNorm statistics lie in P..D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from utils import devices
from utils.bad_workers import bad_workers
from utils.devices import send
from utils.errors import choose
from utils.random import derive_seed
from workers.engine import Engine
from workers.mixing import mix_rows

NETWORK_LIMIT = 64  # rows up to which a sorting network beats torch.sort (4 to 8 times)
CACHED = 1 << 18  # floats that are worked on at a time: 1 MiB stays in the second-level cache


# ---- rules: one receiver -------------------------------------------------------------------------


def mean(
    target_D: Tensor, own_D: Tensor, neighbours: Sequence[Tensor], weights: Sequence[float], own_weight: float
) -> None:
    """The weighted mean: own_weight * own + sum_j weights[j] * neighbours[j]. One bad row spoils it."""
    _combine(target_D, [own_D, *neighbours], [own_weight, *weights])


def median(
    target_D: Tensor, own_D: Tensor, neighbours: Sequence[Tensor], weights: Sequence[float], own_weight: float
) -> None:
    """Coordinate-wise median of the own row and the neighbours' rows (the mean of the two middle values
    where their number is even). Weights are ignored. Right while at most d // 2 neighbours are bad."""
    _middle(target_D, [own_D, *neighbours], len(neighbours) // 2)


def trimmed_mean(
    target_D: Tensor,
    own_D: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[float],
    own_weight: float,
    trim: int | None = None,
) -> None:
    """Coordinate-wise mean without the ``trim`` largest and the ``trim`` smallest of the d + 1 rows.
    Weights are ignored. ``trim``: default :func:`trimmed_of`. Right while at most ``trim`` neighbours are bad."""
    trim = trimmed_of(len(neighbours)) if trim is None else trim
    if not 0 <= trim <= len(neighbours) // 2:
        raise ValueError(f"cannot trim {trim} at both ends of {len(neighbours) + 1} rows")
    _middle(target_D, [own_D, *neighbours], trim)


def trimmed_of(neighbours: int) -> int:
    """How many values ``trimmed_mean`` drops at each end: a third of the neighbours, rounded up, but
    never all of them.

    A third is the classical bound on Byzantine participants. It has to be rounded up: on sparse graphs
    (d = 4) two of the bad workers have the same receiver more often than not, and a receiver that falls
    is one bad worker more for its own neighbours.
    """
    return min(neighbours // 2, -(-neighbours // 3))


def clipped(
    target_D: Tensor,
    own_D: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[float],
    own_weight: float,
    radius: float | None = None,
) -> None:
    """Self-centred clipping: x_i + sum_j W_ij CLIP(x_j - x_i, tau_i), where CLIP(v, tau) shortens v to
    length tau (He, Karimireddy & Jaggi 2022). A bad neighbour j moves the receiver by W_ij tau_i at most,
    so those with less than half of the neighbours' weight are outpulled.

    ``radius``: tau_i; default :func:`clipping_radius` of the neighbours' distances. Infinity is the mean.
    """
    distances = _distances(own_D, neighbours)
    if radius is None:
        radius = clipping_radius(distances, weights)
    shares = [1.0 if s <= radius else radius / s for s in distances]
    kept = [weight * share for weight, share in zip(weights, shares, strict=True)]
    _combine(target_D, [own_D, *neighbours], [own_weight + sum(weights) - sum(kept), *kept])


def clipping_radius(distances: Sequence[float], weights: Sequence[float]) -> float:
    """tau_i: the smallest radius that leaves at least half of the neighbours' weight unclipped; with equal
    weights the lower median of the distances. It is at most the distance of the farthest honest neighbour
    while the bad ones hold no more than half of the weight.

    This is the threshold of CS+ (Gaucher, Dieuleveut & Hendrikx 2025, arXiv:2410.10418: clip twice the
    weight that may be bad) for a quarter of the neighbours' weight. The practical rule of He et al.,
    sqrt(sum of W_ij distance^2 over the nearest / weight that may be bad), must be told how many are bad and
    clips nothing at a receiver that hears one more: with 2 sign flippers among 16 workers on the
    exponential graph it lost the run (measured), and this radius did not.
    """
    half = sum(weights) / 2 * (1 - 1e-9)  # equal weights do not add up exactly
    held = 0.0
    for distance, weight in sorted(zip(distances, weights, strict=True)):
        held += weight
        if held >= half:
            return distance
    return math.inf  # no neighbours


AGGREGATIONS: dict[str, Callable[..., None]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "clipped": clipped,
}
COORDINATEWISE = ("median", "trimmed_mean")  # symmetric in the rows: the own row is one among them


def _combine(target_D: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    """``target_D = sum_l weights[l] * rows[l]``, left to right, block by block."""
    for block in _blocks(target_D, CACHED // 4):
        out = torch.mul(rows[0][block], weights[0], out=target_D[block])
        for row_D, weight in zip(rows[1:], weights[1:], strict=True):
            out.add_(row_D[block], alpha=weight)


def _distances(own_D: Tensor, rows: Sequence[Tensor]) -> list[float]:
    """Euclidean distances to the own row, block by block; infinite where they overflow."""
    squares = [F.mse_loss(own_D[b], x_D[b], reduction="sum") for x_D in rows for b in _blocks(own_D, CACHED)]
    if not squares:
        return []
    return [math.sqrt(sum(parts)) for parts in torch.stack(squares).view(len(rows), -1).tolist()]  # one look


def _middle(target_D: Tensor, rows: list[Tensor], trim: int) -> None:
    """Coordinate-wise mean of the rows without the ``trim`` smallest and largest values."""
    count = len(rows)
    for block in _blocks(target_D, max(1, CACHED // count)):
        out = target_D[block]
        ordered = _ascending([row_D[block] for row_D in rows])
        out.copy_(ordered[trim])
        for row in ordered[trim + 1 : count - trim]:
            out.add_(row)
        out.div_(count - 2 * trim)


def _blocks(row_D: Tensor, size: int) -> list[slice]:
    """A row in pieces that stay in a CPU's cache; in one on an accelerator."""
    size = len(row_D) if devices.is_accelerator(row_D.device) else size
    return [slice(start, start + size) for start in range(0, len(row_D), max(1, size))]


def _ascending(rows: list[Tensor]) -> Sequence[Tensor]:
    """The rows with each coordinate's values in ascending order (new memory)."""
    if len(rows) > NETWORK_LIMIT:
        return torch.stack(rows, 1).sort(1).values.unbind(1)
    rows, spare = [row.clone() for row in rows], torch.empty_like(rows[0])
    for low, high in sorting_network(len(rows)):
        torch.minimum(rows[low], rows[high], out=spare)
        torch.maximum(rows[low], rows[high], out=rows[high])
        rows[low], spare = spare, rows[low]
    return rows


@cache
def sorting_network(count: int) -> tuple[tuple[int, int], ...]:
    """Comparisons (low, high) that sort ``count`` values, done in this order: Batcher's merge exchange
    (Knuth, TAOCP volume 3, algorithm 5.2.2M)."""
    pairs = []
    p = 1 << max(0, (count - 1).bit_length() - 1)
    top = p
    while p > 0:
        q, r, gap = top, 0, p
        while True:
            pairs += [(i, i + gap) for i in range(count - gap) if i & p == r]
            if q == p:
                break
            gap, q, r = q - p, q // 2, p
        p //= 2
    return tuple(pairs) if count > 1 else ()


# ---- the gossip step -----------------------------------------------------------------------------


def robust_mix(
    engine: Engine,
    rule: str,
    matrix: sparse.csr_array,
    source_AD: Tensor,
    target_nD: Tensor,
    receivers: np.ndarray | None = None,
    position_N: np.ndarray | None = None,
    sent: dict[int, Tensor] | None = None,
) -> None:
    """The gossip step under a rule: the new row of ``receivers[i]`` (default: all) into ``target_nD[i]``,
    which must not overlap the source.

    ``matrix``: W, row = receiver. ``source_AD`` holds what these receivers and their neighbours have,
    ``position_N[l]`` says where row l is (default: at l). ``sent``: what a bad worker sends instead of what
    it has; a receiver's own row is always what it has. Without it, ``mean`` is :func:`mix_rows` to the bit.

    The rules other than ``mean`` ignore a sender whose row is not finite, as if it had sent nothing
    (``clipped`` leaves its weight with the receiver), and read a negative BatchNorm variance as 0, for
    nobody honest sends one: so the new variance is an average of nonnegative ones. The statistics are
    aggregated apart from the parameters: the units of one must not set the radius of the other. A
    receiver whose own row is not finite is not healed.

    Raises UsageError for an unknown rule.
    """
    function = choose(AGGREGATIONS, rule, "rule (--aggregation)")
    sent = sent or {}
    if rule == "mean" and not sent:
        mix_rows(engine, matrix, source_AD, target_nD, receivers, position_N)
        return
    rows = list(range(matrix.shape[0])) if receivers is None else [int(receiver) for receiver in receivers]

    def has(row: int) -> Tensor:
        return source_AD[row if position_N is None else int(position_N[row])]

    links = [_links(matrix, receiver) for receiver in rows]
    heard = sorted({sender for link in links for sender in link})
    received = {sender: sent[sender] if sender in sent else has(sender) for sender in heard}
    if rule != "mean":
        received = _checked(engine, received)
    P, width = engine.layout.P, target_nD.shape[1]
    parts = [part for part in (slice(0, P), slice(P, width)) if part.start < width]

    # Where everybody hears everybody the rows are the same for all honest receivers: done once.
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, receiver in enumerate(rows):
        same = rule in COORDINATEWISE and receiver in received and receiver not in sent
        key = tuple(sorted({receiver, *links[i]})) if same else (-1, receiver)
        groups.setdefault(key, []).append(i)

    def mix_one(group: list[int]) -> None:
        first = group[0]
        own_D, row_D = has(rows[first]), target_nD[first]
        weights = {sender: weight for sender, weight in links[first].items() if sender in received}
        own_weight = 1.0 - sum(weights.values())
        for part in parts:
            neighbours = [received[sender][part] for sender in weights]
            function(row_D[part], own_D[part], neighbours, list(weights.values()), own_weight)
        for i in group[1:]:
            target_nD[i] = row_D

    engine.map(mix_one, list(groups.values()))


def _links(matrix: sparse.csr_array, receiver: int) -> dict[int, float]:
    """Who sends to the receiver, ascending, and with what weight; not the receiver itself."""
    first, last = matrix.indptr[receiver], matrix.indptr[receiver + 1]
    senders, weights = matrix.indices[first:last].tolist(), matrix.data[first:last].tolist()
    return {j: w for j, w in zip(senders, weights, strict=True) if j != receiver}


def _checked(engine: Engine, received: dict[int, Tensor]) -> dict[int, Tensor]:
    """The received rows that are finite, without impossible values. All are looked at before the host waits."""
    layout = engine.layout
    variances = [e for e in layout.buffers if e.name.endswith("running_var")]

    def look(row_D: Tensor) -> Tensor:
        parts = [e.view(row_D) for e in variances] if len(row_D) == layout.D else []  # else momentum
        return torch.stack([row_D.isfinite().all(), *((v < 0).any() for v in parts)])

    if not received:
        return {}
    looks = torch.stack(engine.map(look, list(received.values()))).tolist()
    result = {}
    for (sender, row_D), (finite, *negative) in zip(received.items(), looks, strict=True):
        if finite and any(negative):
            row_D = row_D.clone()
            for entry in variances:
                entry.view(row_D).clamp_(min=0)
        if finite:
            result[sender] = row_D
    return result


# ---- bad workers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Byzantine:
    """Workers that send bad rows instead of their own, and how. They train and receive as all do."""

    workers: tuple[int, ...]
    attack: str


def sign_flip(row_D: Tensor, *keys: int) -> Tensor:
    """The negated row."""
    return -row_D


def noise(row_D: Tensor, *keys: int) -> Tensor:
    """Gaussian noise with the row's own root mean square, and nothing of the row; the same for the same
    keys on every device."""
    generator = torch.Generator().manual_seed(derive_seed("byzantine noise", *keys))
    scale = torch.linalg.vector_norm(row_D) / math.sqrt(len(row_D))
    return send(torch.randn(len(row_D), generator=generator, dtype=row_D.dtype), row_D.device) * scale


def not_a_number(row_D: Tensor, *keys: int) -> Tensor:
    """NaN everywhere."""
    return torch.full_like(row_D, torch.nan)


ATTACKS: dict[str, Callable[..., Tensor]] = {"sign_flip": sign_flip, "noise": noise, "nan": not_a_number}


def parse_byzantine(text: str, num_workers: int, seed: int) -> Byzantine:
    """``COUNT:KIND`` as workers drawn by ``seed``, and their attack. Raises UsageError as ``bad_workers`` does."""
    workers, attack = bad_workers("--byzantine", text, ATTACKS, num_workers, "byzantine", seed, least=0)
    return Byzantine(tuple(workers), attack)


def sent_rows(
    byzantine: Byzantine,
    rows: dict[int, Tensor] | Tensor,
    round_index: int,
    seed: int,
    num_workers: int | None = None,
) -> dict[int, Tensor]:
    """What the bad workers send instead of their rows in a round: row number -> [D].

    ``rows``: the whole matrix, or a dict of the rows of this process (bad workers it does not hold are
    left out). ``num_workers``: N where the matrix holds several replicas (row = replica * N + worker),
    in which a worker draws the same noise. A pure function of (row, seed, worker, round).
    """
    held = range(len(rows)) if isinstance(rows, Tensor) else sorted(rows)
    attack = ATTACKS[byzantine.attack]
    owner = {row: row % num_workers if num_workers else row for row in held}
    return {r: attack(rows[r], seed, k, round_index) for r, k in owner.items() if k in byzantine.workers}


def exposed(rule: str, matrix: sparse.csr_array, byzantine: Byzantine) -> list[int]:
    """The honest receivers that hear more bad workers than the rule can take: worth a warning, for
    they fall, and are one bad worker more to their own neighbours."""
    return [
        receiver
        for receiver in range(matrix.shape[0])
        if receiver not in byzantine.workers and _is_exposed(rule, _links(matrix, receiver), byzantine)
    ]


def _is_exposed(rule: str, links: dict[int, float], byzantine: Byzantine) -> bool:
    bad = [sender for sender in links if sender in byzantine.workers]
    if rule == "mean" or byzantine.attack == "nan":  # what is not finite is not heard
        return rule == "mean" and bool(bad)
    if rule == "clipped":  # at half of the weight, bad and honest neighbours pull equally hard
        return sum(links[sender] for sender in bad) > sum(links.values()) / 2 * (1 - 1e-9)
    return len(bad) > (trimmed_of(len(links)) if rule == "trimmed_mean" else len(links) // 2)
