"""Robust gossip: rules against references, what bad workers can and cannot do, and a whole small run."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean
from torch import nn

from utils.errors import UsageError
from utils.topology import build_topology
from workers import robust
from workers.engine import Engine
from workers.mixing import mix_rows
from workers.robust import (
    AGGREGATIONS,
    ATTACKS,
    COORDINATEWISE,
    Byzantine,
    clipping_radius,
    exposed,
    parse_byzantine,
    robust_mix,
    sent_rows,
    sorting_network,
    trimmed_of,
)
from workers.row_layout import RowLayout

ROBUST = [rule for rule in AGGREGATIONS if rule != "mean"]
NOBODY = Byzantine((), "sign_flip")


def engine_of(model: nn.Module, threads: int = 1) -> Engine:
    return Engine(model, RowLayout(model), "threads", threads)


LINEAR = engine_of(nn.Linear(6, 5, bias=False))  # D = P = 30
NORMED = engine_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def random_rows(n: int, D: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gossip(rule, mode, rows_ND, sent=None, engine=LINEAR, seed=0) -> torch.Tensor:
    """One robust gossip step of all workers."""
    target_ND = torch.full_like(rows_ND, 99.0)
    matrix = build_topology(mode, len(rows_ND), seed).mixing(0)
    robust_mix(engine, rule, matrix, rows_ND, target_ND, sent=sent)
    return target_ND


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", AGGREGATIONS)
@pytest.mark.parametrize("mode", ["ring", "all", "star", "random", "exponential_one_peer"])
def test_agreement_is_kept(rule, mode):
    rows_ND = random_rows(1).expand(9, -1).contiguous()
    torch.testing.assert_close(gossip(rule, mode, rows_ND), rows_ND, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 11])
def test_coordinatewise_rules_on_a_complete_graph_equal_numpy_and_scipy(n):
    rows_ND = random_rows(n)
    expected = np.median(rows_ND.numpy(), axis=0)
    np.testing.assert_allclose(gossip("median", "all", rows_ND), np.tile(expected, (n, 1)), rtol=1e-12)
    expected = trim_mean(rows_ND.numpy(), (trimmed_of(n - 1) + 0.5) / n if n > 2 else 0.0, axis=0)
    np.testing.assert_allclose(gossip("trimmed_mean", "all", rows_ND), np.tile(expected, (n, 1)), rtol=1e-12)


def test_blocks_and_many_rows_equal_one_sort():
    rows = list(random_rows(robust.NETWORK_LIMIT + 6, D=9_000, seed=2))  # several blocks, torch.sort
    few = list(random_rows(7, D=3 * robust.CACHED // 7, seed=3))  # several blocks, sorting network
    for some in (rows, few):
        out = torch.empty_like(some[0])
        AGGREGATIONS["median"](out, some[0], some[1:], [], 1.0)
        assert torch.equal(out, torch.from_numpy(np.median(torch.stack(some).numpy(), axis=0)))


@pytest.mark.parametrize("count", range(1, 11))
def test_the_network_sorts(count):
    """By the 0-1 principle a network that sorts all zeros and ones sorts everything."""
    for bits in itertools.product((0, 1), repeat=count):
        values = list(bits)
        for low, high in sorting_network(count):
            values[low], values[high] = min(values[low], values[high]), max(values[low], values[high])
        assert values == sorted(bits)


def test_trim_counts():
    assert [trimmed_of(d) for d in range(9)] == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert trimmed_of(15) == 5
    own, *others = random_rows(5)
    with pytest.raises(ValueError, match="cannot trim 3"):
        AGGREGATIONS["trimmed_mean"](torch.empty(30), own, others, [], 1.0, trim=3)


@pytest.mark.parametrize("mode", ["ring", "random", "exponential"])
def test_clipping_with_an_infinite_radius_is_the_mixing_matrix(mode, monkeypatch):
    monkeypatch.setattr(robust, "clipping_radius", lambda distances, weights: math.inf)
    rows_ND = random_rows(9)
    expected = build_topology(mode, 9).mixing(0) @ rows_ND.numpy()
    np.testing.assert_allclose(gossip("clipped", mode, rows_ND), expected, rtol=1e-12, atol=1e-14)


def test_clipping_by_hand():
    own = torch.zeros(3, dtype=torch.float64)
    neighbours = [torch.tensor(v, dtype=torch.float64) for v in ([1, 0, 0], [0, 2, 0], [0, 0, 50])]
    out = torch.empty_like(own)
    AGGREGATIONS["clipped"](out, own, neighbours, [0.25] * 3, 0.25)  # radius 2: the lower median
    torch.testing.assert_close(out, torch.tensor([0.25, 0.5, 0.5], dtype=torch.float64))
    assert clipping_radius([5, 1, 3, 4], [0.2] * 4) == 3
    assert clipping_radius([5, 1, 3], [0.1, 0.1, 0.6]) == 3
    assert clipping_radius([7, 1], [1 / 3] * 2) == 1
    assert clipping_radius(range(1, 9), [1 / 9] * 8) == 4  # though four ninths add up to less than half of eight
    assert clipping_radius([], []) == math.inf


def test_mean_without_bad_workers_is_the_gossip_step_to_the_bit():
    rows_ND = random_rows(9, D=300_005)
    for mode in ("ring", "random", "all"):
        matrix = build_topology(mode, 9).mixing(0)
        expected = torch.empty_like(rows_ND)
        mix_rows(LINEAR, matrix, rows_ND, expected)
        assert torch.equal(gossip("mean", mode, rows_ND), expected)


def test_mean_uses_what_is_sent_and_what_one_has():
    rows_ND = random_rows(6)
    matrix = build_topology("ring", 6).mixing(0).toarray()
    expected = matrix @ rows_ND.numpy()
    for receiver in (1, 3):
        expected[receiver] -= matrix[receiver, 2] * 2 * rows_ND[2].numpy()
    np.testing.assert_allclose(gossip("mean", "ring", rows_ND, {2: -rows_ND[2]}), expected, rtol=1e-12)


@pytest.mark.parametrize("rule", AGGREGATIONS)
@pytest.mark.parametrize("mode", ["ring", "all", "random"])
def test_threads_processes_and_repetition_give_the_same_bits(rule, mode):
    """Processes: the rows in two parts, each with what it has and hears, in another order."""
    rows_ND = random_rows(7).float()
    sent = {3: -rows_ND[3]}
    expected = gossip(rule, mode, rows_ND, sent)
    pooled = engine_of(nn.Linear(6, 5, bias=False), threads=3)
    assert torch.equal(gossip(rule, mode, rows_ND, sent, pooled), expected)
    pooled.close()
    matrix = build_topology(mode, 7).mixing(0)
    for part in ([0, 1, 2], [3, 4, 5, 6]):
        heard = np.unique(matrix[part].indices)[::-1]
        position_N = np.full(7, -1)
        position_N[heard] = np.arange(len(heard))
        source_AD, target_nD = rows_ND[heard.copy()], torch.empty(len(part), 30)
        robust_mix(LINEAR, rule, matrix, source_AD, target_nD, np.array(part), position_N, sent)
        assert torch.equal(target_nD, expected[part])


# ---- bad workers ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_result_stays_among_the_honest_rows(data):
    """As many bad rows as the rule takes, of any finite value: each coordinate stays between the smallest
    and the largest honest value (median, trimmed mean); clipping moves no further than the farthest
    honest neighbour."""
    d = data.draw(st.integers(1, 9))
    rule = data.draw(st.sampled_from(ROBUST))
    bad = data.draw(st.integers(0, trimmed_of(d) if rule == "trimmed_mean" else d // 2))
    values = st.floats(-10, 10, width=32)
    anything = st.floats(allow_nan=False, allow_infinity=False, width=32)
    honest = [data.draw(st.lists(values, min_size=3, max_size=3)) for _ in range(d + 1 - bad)]
    evil = [data.draw(st.lists(anything, min_size=3, max_size=3)) for _ in range(bad)]
    order = data.draw(st.permutations(range(d)))
    rows = [torch.tensor(row) for row in honest[1:] + evil]
    own, out = torch.tensor(honest[0]), torch.empty(3)
    AGGREGATIONS[rule](out, own, [rows[i] for i in order], [1 / (d + 1)] * d, 1 / (d + 1))
    assert bool(out.isfinite().all())
    honest = torch.tensor(honest)
    if rule in COORDINATEWISE:
        assert bool((out >= honest.min(0).values - 1e-5).all())
        assert bool((out <= honest.max(0).values + 1e-5).all())
    else:
        assert (out - own).norm() <= (honest - own).norm(dim=1).max() * (1 + 1e-5) + 1e-5


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_heard(rule, value):
    """One bad float is enough; the receiver does as if the sender had sent nothing."""
    rows_ND = random_rows(8)
    bad = rows_ND[5].clone()
    bad[17] = value
    mixed = gossip(rule, "all", rows_ND, {5: bad})
    assert bool(mixed.isfinite().all())
    if rule in COORDINATEWISE:
        without = gossip(rule, "all", torch.cat([rows_ND[:5], rows_ND[6:]]))
        assert torch.equal(torch.cat([mixed[:5], mixed[6:]]), without)
    # Nothing from any neighbour: what remains is one's own row.
    alone = gossip(rule, "ring", rows_ND, {4: bad, 6: bad})[5]
    torch.testing.assert_close(alone, rows_ND[5], rtol=1e-14, atol=0)
    assert not bool(gossip("mean", "all", rows_ND, {5: bad}).isfinite().all())


@pytest.mark.parametrize("rule", ROBUST)
def test_batchnorm_statistics(rule):
    """Variances stay positive under sign flips, and do not set the radius of the parameters."""
    layout = NORMED.layout
    rows_ND = random_rows(9, layout.D).abs() + 0.1
    bad = Byzantine((0, 4), "sign_flip")
    (variance,) = [e for e in layout.buffers if e.name.endswith("running_var")]
    small_ND = rows_ND.clone()
    variance.view(small_ND)[1] = 0.001  # between two bad workers
    sent = sent_rows(Byzantine((0, 2), "sign_flip"), small_ND, 0, 1)
    assert bool((variance.view(gossip(rule, "ring", small_ND, sent, NORMED)) >= 0).all())
    assert torch.equal(sent[0], -small_ND[0])  # cleaned in a copy
    mixed = gossip(rule, "exponential", rows_ND, sent_rows(bad, rows_ND, 0, 1), NORMED)
    assert bool((variance.view(mixed) > 0).all())
    scaled_ND = rows_ND.clone()
    scaled_ND[:, layout.P :] *= 1000
    again = gossip(rule, "exponential", scaled_ND, sent_rows(bad, scaled_ND, 0, 1), NORMED)
    assert torch.equal(again[:, : layout.P], mixed[:, : layout.P])
    torch.testing.assert_close(again[:, layout.P :], mixed[:, layout.P :] * 1000)


def test_attacks():
    rows_ND = random_rows(4, D=20_000) * 3
    assert torch.equal(sent_rows(Byzantine((1, 3), "sign_flip"), rows_ND, 0, 0)[3], -rows_ND[3])
    assert bool(sent_rows(Byzantine((2,), "nan"), rows_ND, 0, 0)[2].isnan().all())
    noisy = Byzantine((0, 2), "noise")
    sent = sent_rows(noisy, rows_ND, 5, 1)
    assert list(sent) == [0, 2]
    assert sent[0].std().item() == pytest.approx(3, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([sent[0], sent[2]]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([sent[0], rows_ND[0]]))[0, 1]) < 0.05
    for other in (sent_rows(noisy, rows_ND, 6, 1), sent_rows(noisy, rows_ND, 5, 2)):
        assert not torch.equal(other[0], sent[0])
    # A process that holds some of the rows, and a fleet of two replicas, send the same.
    assert torch.equal(sent_rows(noisy, {2: rows_ND[2]}, 5, 1)[2], sent[2])
    replicas = sent_rows(noisy, rows_ND.repeat(2, 1), 5, 1, num_workers=4)
    assert list(replicas) == [0, 2, 4, 6]
    assert torch.equal(replicas[6], sent[2])


def test_parse_byzantine():
    assert parse_byzantine("0:nan", 4, 0) == Byzantine((), "nan")
    two = parse_byzantine("2:sign_flip", 16, seed=1)
    assert two == parse_byzantine("2:sign_flip", 16, seed=1)
    assert len(set(two.workers)) == 2 and set(two.workers) <= set(range(16))
    assert len({parse_byzantine("2:noise", 16, seed).workers for seed in range(8)}) > 4
    assert list(ATTACKS) == ["sign_flip", "noise", "nan"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sign_flip", "COUNT:KIND"),
        ("-1:nan", "COUNT:KIND"),
        ("", "COUNT:KIND"),
        ("2.5:nan", "COUNT:KIND"),
        ("9" * 5000 + ":nan", "COUNT:KIND"),
        ("4:nan", "none that is honest"),
        ("1:signflip", "Did you mean 'sign_flip'"),
        ("1:", "Choose from: sign_flip, noise, nan"),
    ],
)
def test_bad_text(text, says):
    with pytest.raises(UsageError, match=says) as caught:
        parse_byzantine(text, 4, 0)
    assert "\n" not in str(caught.value)


def test_unknown_rule():
    with pytest.raises(UsageError, match="Did you mean 'trimmed_mean'"):
        gossip("trimmed", "ring", random_rows(4))


def test_who_is_exposed():
    ring = build_topology("ring", 8).mixing(0)
    assert exposed("median", ring, Byzantine((1, 5), "sign_flip")) == []
    assert exposed("median", ring, Byzantine((1, 3), "sign_flip")) == [2]
    exponential = build_topology("exponential", 16).mixing(0)  # worker 5 hears 4, 3, 1 and 13
    assert exposed("clipped", exponential, Byzantine((1, 4), "sign_flip")) == [5]  # half: a draw
    assert exposed("median", exponential, Byzantine((1, 4), "sign_flip")) == []
    assert exposed("mean", ring, Byzantine((1, 3), "nan")) == [0, 2, 4]
    assert exposed("clipped", ring, Byzantine((1, 3), "nan")) == []
    everybody = build_topology("all", 16).mixing(0)
    six = Byzantine(tuple(range(6)), "noise")
    assert exposed("trimmed_mean", everybody, six) == list(range(6, 16))
    assert exposed("median", everybody, six) == exposed("clipped", everybody, six) == []


# ---- a whole run ---------------------------------------------------------------------------------


def descend(rule: str, mode: str, bad: Byzantine, rounds: int = 40) -> float:
    """16 workers minimize the mean of ||x - c_i||^2 / 2 with noisy gradients. Returns the worst honest
    worker's distance to the honest optimum, relative to that optimum's distance from the start."""
    generator = torch.Generator().manual_seed(4)
    centre_D = 3 * torch.randn(30, generator=generator)
    optima_ND = centre_D + torch.randn(16, 30, generator=generator)
    honest = [k for k in range(16) if k not in bad.workers]
    goal_D = optima_ND[honest].mean(0)
    matrix = build_topology(mode, 16).mixing(0)
    rows_ND, target_ND = torch.zeros(16, 30), torch.empty(16, 30)
    for r in range(rounds):
        noise_ND = 0.5 * torch.randn(16, 30, generator=generator)
        rows_ND -= 0.15 * (rows_ND - optima_ND + noise_ND)
        robust_mix(LINEAR, rule, matrix, rows_ND, target_ND, sent=sent_rows(bad, rows_ND, r, 0))
        rows_ND, target_ND = target_ND, rows_ND
    return float((rows_ND[honest] - goal_D).norm(dim=1).max() / goal_D.norm())


@pytest.mark.parametrize(
    ("mode", "attack"),
    [("all", "sign_flip"), ("exponential", "sign_flip"), ("exponential", "noise"), ("exponential", "nan")],
)
def test_robust_rules_reach_the_honest_optimum_where_the_mean_fails(mode, attack):
    bad = Byzantine((3, 7), attack)
    errors = {rule: descend(rule, mode, bad) for rule in AGGREGATIONS}
    assert not errors.pop("mean") < 0.5  # NaN fails as well
    assert max(errors.values()) < (0.15 if mode == "all" else 0.35)


def test_the_mean_is_best_where_nobody_is_bad():
    errors = {rule: descend(rule, "exponential", NOBODY) for rule in AGGREGATIONS}
    assert min(errors, key=errors.get) == "mean"
    assert max(errors.values()) < 0.2
