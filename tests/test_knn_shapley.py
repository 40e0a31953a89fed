"""k-NN Shapley values: against the definition (all coalitions), pyDVL and a loop; what they keep, what is refused.

Legend: n training samples, m test samples, F features, L findings.
"""

from __future__ import annotations

import json
from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.knn_shapley import blocks, loop, main, order, recursive_values
from data.multilabel import UNKNOWN
from data.regression import Regression
from utils.errors import UsageError
from valuation.knn_shapley import balanced_tests, by_owner, knn_shapley, knn_shapley_regression, nearest_first, rescaled

DOUBLE = torch.float64
NAN, INF = float("nan"), float("inf")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1000 + seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.dtype == DOUBLE
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def utility(features: tuple[Tensor, Tensor], targets_n: Tensor, target: Tensor, k: int, regression: bool):
    """U of a set of training samples for one test sample, word by word."""
    distances_n = (features[0].double() - features[1].double()).square().sum(1)

    def of(members: set[int]) -> float:
        nearest = sorted(members, key=lambda i: (float(distances_n[i]), i))[:k]
        if not regression:
            return sum(bool(targets_n[i] == target) for i in nearest) / k
        predicted, y = sum(float(targets_n[i]) for i in nearest) / k, float(target)
        return y**2 - (predicted - y) ** 2

    return of


def defined(train_nF: Tensor, targets_n: Tensor, test_mF: Tensor, targets_m: Tensor, k: int, known_n=None) -> Tensor:
    """The Shapley value's definition: marginal contributions to all coalitions of the others."""
    n, regression = len(train_nF), targets_n.is_floating_point()
    players = [i for i in range(n) if known_n is None or known_n[i]]
    values_n = torch.zeros(n, dtype=DOUBLE)
    for test_F, target in zip(test_mF, targets_m, strict=True):
        of = utility((train_nF, test_F), targets_n, target, k, regression)
        worth = {s: of(set(s)) for size in range(len(players) + 1) for s in combinations(players, size)}
        for i in players:
            for coalition in worth:
                if i not in coalition:
                    gain = worth[tuple(sorted((*coalition, i)))] - worth[coalition]
                    values_n[i] += gain / (len(players) * comb(len(players) - 1, len(coalition)))
    return values_n / len(test_mF)


SIZES = [(n, k) for n in range(1, 8) for k in range(1, 5)] + [(8, 3)]


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_is_the_definition(n, k):
    train_nF, test_mF = normal(n, 3), normal(2, 3, seed=1)
    labels_n, labels_m = integers(3, n), integers(3, 2, seed=1)
    close(knn_shapley(train_nF, labels_n, test_mF, labels_m, k), defined(train_nF, labels_n, test_mF, labels_m, k))
    values_n, values_m = normal(n, seed=2), normal(2, seed=3)
    expected_n = defined(train_nF, values_n, test_mF, values_m, k)
    close(knn_shapley_regression(train_nF, values_n, test_mF, values_m, k), expected_n)


@pytest.mark.parametrize("k", [1, 3])
def test_unknown_ones_do_not_play(k):
    train_nF, test_mF = normal(6, 2), normal(4, 2, seed=1)
    train_nL, test_mL = integers(2, 6, 3).byte(), integers(2, 4, 3, seed=1).byte()
    train_nL[[0, 3], 1], train_nL[:, 2], test_mL[[1, 2], 0] = UNKNOWN, UNKNOWN, UNKNOWN
    values_nL = knn_shapley(train_nF, train_nL, test_mF, test_mL, k, by_finding=True)
    known_n = train_nL[:, 1] != UNKNOWN
    close(values_nL[:, 0], defined(train_nF, train_nL[:, 0], test_mF[[0, 3]], test_mL[[0, 3], 0], k))
    close(values_nL[:, 1], defined(train_nF, train_nL[:, 1], test_mF, test_mL[:, 1], k, known_n))
    assert not values_nL[[0, 3], 1].any() and not values_nL[:, 2].any()
    assert torch.equal(knn_shapley(train_nF, train_nL, test_mF, test_mL, k), values_nL.mean(1))

    outputs_nL, outputs_mL = normal(6, 2, seed=4), normal(4, 2, seed=5)
    outputs_nL[[1, 4], 0], outputs_mL[2, 1] = NAN, NAN
    values_nL = knn_shapley_regression(train_nF, outputs_nL, test_mF, outputs_mL, k, by_finding=True)
    known_n = ~outputs_nL[:, 0].isnan()
    close(values_nL[:, 0], defined(train_nF, outputs_nL[:, 0], test_mF, outputs_mL[:, 0], k, known_n))
    close(values_nL[:, 1], defined(train_nF, outputs_nL[:, 1], test_mF[[0, 1, 3]], outputs_mL[[0, 1, 3], 1], k))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_ties_are_by_index(dtype):
    """On a grid most distances are shared, and the mean, which is subtracted, is no float."""
    train_nF, test_mF = integers(3, 7, 2).to(dtype) + 0.1, integers(3, 7, 2, seed=1).to(dtype) + 0.1
    labels_n, labels_m = integers(2, 7), integers(2, 7, seed=1)
    grid = [part.round() for part in (train_nF, test_mF)]
    close(knn_shapley(train_nF, labels_n, test_mF, labels_m, 2), defined(grid[0], labels_n, grid[1], labels_m, 2))


def test_of_equal_samples_the_first_is_nearest():
    """Also where their distance is 0 but for rounding, as when data are valued on themselves."""
    features = normal(200, 64, dtype=torch.float32) * 100 + 1000
    labels = torch.cat([torch.arange(200), torch.arange(200) + 1000])
    values = knn_shapley(features.repeat(2, 1), labels, features, torch.arange(200), 1)
    close(values[:200], torch.full((200,), 1 / 200, dtype=DOUBLE))
    close(values[200:], torch.zeros(200, dtype=DOUBLE))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 10), st.integers(1, 8), st.integers(0, 10**6), st.booleans())
def test_what_holds_for_all(n, m, k, seed, regression):
    train_nF, test_mF = normal(n, 4, seed=seed), normal(m, 4, seed=seed + 1)
    if regression:
        values_of, train, test = knn_shapley_regression, normal(n, seed=seed + 2), normal(m, seed=seed + 3)
    else:
        values_of, train, test = knn_shapley, integers(3, n, seed=seed), integers(3, m, seed=seed + 1)
    values_n = values_of(train_nF, train, test_mF, test, k)
    whole = [utility((train_nF, test_mF[t]), train, test[t], k, regression)(set(range(n))) for t in range(m)]
    assert values_n.sum().item() == pytest.approx(sum(whole) / m, abs=1e-11)

    mixed_m, mixed_n = normal(m, seed=seed + 4).argsort(), normal(n, seed=seed + 5).argsort()
    close(values_of(train_nF, train, test_mF[mixed_m], test[mixed_m], k), values_n)
    close(values_of(train_nF[mixed_n], train[mixed_n], test_mF, test, k), values_n[mixed_n])
    for scale in (1e-30, 1e30):
        close(values_of(train_nF * scale, train, test_mF * scale, test, k), values_n)

    small = [values_of(train_nF, train, test_mF, test, k, block_bytes=size, threads=1) for size in (1, 1000)]
    for values in small:
        close(values, values_n)
    assert torch.equal(values_of(train_nF, train, test_mF, test, k, block_bytes=1000, threads=3), small[1])

    twice = torch.cat([train_nF, train_nF[:1]]), torch.cat([train, train[:1]])  # equal samples are worth the same
    values_n = values_of(*twice, test_mF, test, k)
    assert values_n[0].item() == pytest.approx(values_n[-1].item(), abs=1e-11)


def test_nobody_is_right_or_all_are():
    data = normal(9, 2), torch.zeros(9, dtype=torch.long), normal(4, 2, seed=1)
    assert not knn_shapley(*data, torch.ones(4, dtype=torch.long)).any()
    close(knn_shapley(*data, torch.zeros(4, dtype=torch.long)), torch.full((9,), 1 / 9, dtype=DOUBLE))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_equals_pydvl(k):
    from pydvl.valuation.dataset import Dataset
    from pydvl.valuation.methods.knn_shapley import KNNShapleyValuation
    from sklearn.neighbors import KNeighborsClassifier

    train_nF, test_mF, labels_n, labels_m = normal(80, 5), normal(30, 5, seed=1), integers(3, 80), integers(3, 30)
    theirs = KNNShapleyValuation(
        KNeighborsClassifier(n_neighbors=k), Dataset(test_mF.numpy(), labels_m.numpy()), progress=False
    ).fit(Dataset(train_nF.numpy(), labels_n.numpy()))
    ours_n = knn_shapley(train_nF, labels_n, test_mF, labels_m, k)
    close(ours_n, torch.from_numpy(theirs.result.values.copy()), 1e-9)


def test_findings_with_test_sets_of_their_own():
    train_nF, test_mF = normal(50, 4), normal(20, 4, seed=1)
    train_nL, test_mL = integers(2, 50, 3).byte(), integers(2, 20, 3, seed=1).byte()
    counted_mL = integers(3, 20, 3, seed=2) > 0
    values_nL = knn_shapley(train_nF, train_nL, test_mF, test_mL, counted=counted_mL, by_finding=True)
    for finding, counted_m in enumerate(counted_mL.T):
        one_n = knn_shapley(train_nF, train_nL[:, finding], test_mF[counted_m], test_mL[counted_m, finding])
        close(values_nL[:, finding], one_n)
    close(knn_shapley(train_nF, train_nL, test_mF, test_mL, counted=counted_mL), values_nL.mean(1))
    some_m = counted_mL[:, 0]
    close(
        knn_shapley(train_nF, train_nL, test_mF, test_mL, counted=some_m),
        knn_shapley(train_nF, train_nL, test_mF[some_m], test_mL[some_m]),
    )


def test_values_of_a_regression_task():
    """The data set's targets as the network sees them; a shift in all features changes nothing."""
    targets_n2L = torch.stack([normal(30, 2, dtype=torch.float32) * 5 + 40, torch.zeros(30, 2)], 1)
    values_nL = Regression.of(["a", "b"], targets_n2L).encoded(targets_n2L)[:, 0]
    features = normal(30, 3)
    values_n = knn_shapley_regression(features[:20], values_nL[:20], features[20:], values_nL[20:])
    moved = features + 1e7
    close(knn_shapley_regression(moved[:20], values_nL[:20], moved[20:], values_nL[20:]), values_n)


def test_progress_counts_test_samples():
    ticks = []
    data = normal(9, 2), integers(2, 9), normal(7, 2, seed=1), integers(2, 7)
    knn_shapley(*data, block_bytes=100, threads=2, progress=ticks.append)
    assert sum(ticks) == 7 and len(ticks) > 1


def test_sorts_by_bits():
    values_n = torch.tensor([0.5, 0.0, 1e-40, 3e38, 0.5, 1.0, 1e-40, 0.0, 0.50000006])
    assert torch.equal(nearest_first(values_n), values_n.argsort(stable=True))
    many_n = normal(5000, dtype=torch.float32).square()
    assert torch.equal(nearest_first(many_n), many_n.argsort(stable=True))


def refused(values_of, message, *arguments, **options):
    with pytest.raises(UsageError, match=message) as caught:
        values_of(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_what_is_refused():
    train_nF, test_mF, labels_n, labels_m = normal(5, 2), normal(3, 2), integers(2, 5), integers(2, 3)
    for bad in (NAN, INF, -INF):
        damaged_nF, damaged_mF = train_nF.clone(), test_mF.clone()
        damaged_nF[3, 1], damaged_mF[2, 0] = bad, bad
        refused(knn_shapley, "training features of sample 3 are not finite", damaged_nF, labels_n, test_mF, labels_m)
        refused(knn_shapley, "test features of sample 2 are not finite", train_nF, labels_n, damaged_mF, labels_m)
    refused(knn_shapley, "too large", train_nF * 1e200, labels_n, test_mF, labels_m)
    for k in (0, -1):
        refused(knn_shapley, f"at least 1, not {k}", train_nF, labels_n, test_mF, labels_m, k)
    refused(knn_shapley, "do not fit 4 samples", train_nF, labels_n[:4], test_mF, labels_m)
    refused(knn_shapley, "have 2 features and test samples 1", train_nF, labels_n, test_mF[:, :1], labels_m)
    refused(knn_shapley, "no test samples", train_nF, labels_n, test_mF[:0], labels_m[:0])
    refused(knn_shapley, "must be integers", train_nF, labels_n.double(), test_mF, labels_m)
    findings_mL = torch.zeros(3, 2, dtype=torch.uint8)
    refused(knn_shapley, "targets each", train_nF, labels_n, test_mF, findings_mL)
    refused(knn_shapley, "0, 1 or 255", train_nF, labels_n[:, None] + 1, test_mF, findings_mL)
    findings_nL, unknown_mL = torch.zeros(5, 2, dtype=torch.uint8), findings_mL.clone()
    unknown_mL[:, 1] = UNKNOWN
    refused(knn_shapley, "counts for finding 1", train_nF, findings_nL, test_mF, unknown_mL)
    counted_m = torch.ones(2, dtype=torch.bool)
    refused(knn_shapley, "no bool of shape", train_nF, labels_n, test_mF, labels_m, counted=counted_m)
    values_n, values_m = normal(5), normal(3)
    refused(knn_shapley_regression, "no float", train_nF, labels_n, test_mF, values_m)
    refused(knn_shapley_regression, "infinite", train_nF, values_n / 0, test_mF, values_m)


# ---- sums, scales, test sets ------------------------------------------------------------------------------


def test_sums_of_institutions():
    values_n, owner_n = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0])
    assert by_owner(values_n, owner_n, 4).tolist() == [10.0, 0.0, 5.0, 0.0]
    refused(by_owner, "sample 0 belongs to institution 2", values_n, owner_n, 2)
    refused(by_owner, "sample 3 belongs to institution -1", values_n, torch.tensor([0, 0, 0, -1]), 2)
    refused(by_owner, "one owner each", values_n, owner_n[:3], 3)


def test_rescaled_sums_to_the_total():
    values_n = normal(10)
    assert rescaled(values_n, 0.3).sum().item() == pytest.approx(0.3)
    close(rescaled(values_n, values_n.sum().item()), values_n)
    for nothing_n in (torch.zeros(4), torch.tensor([0.1, 0.2, -0.3], dtype=DOUBLE)):
        refused(rescaled, "sum to 0", nothing_n, 0.5)


def test_balanced_test_sets():
    targets_mL = (integers(10, 900, 2) < 2).byte()
    targets_mL[:100, 1] = UNKNOWN
    counted_mL = balanced_tests(targets_mL, 200, seed=3)
    for counted_m, targets_m in zip(counted_mL.T, targets_mL.T, strict=True):
        there = [int((targets_m[counted_m] == side).sum()) for side in (0, 1, UNKNOWN)]
        assert there == [200, min(200, int((targets_m == 1).sum())), 0]
    assert torch.equal(counted_mL, balanced_tests(targets_mL, 200, seed=3))
    assert not torch.equal(counted_mL, balanced_tests(targets_mL, 200, seed=4))
    assert torch.equal(balanced_tests(targets_mL, 900), targets_mL != UNKNOWN)
    for one_side, name in ((0, "with"), (1, "without")):
        targets_mL[:, 1] = one_side
        refused(balanced_tests, f"known to be {name} finding 1", targets_mL)
    refused(balanced_tests, "at least one", targets_mL, 0)


# ---- the benchmark ----------------------------------------------------------------------------------------


def test_the_loop_computes_the_same():
    train_nF, test_mF, labels_n, labels_m = normal(40, 3), normal(1, 3, seed=1), integers(2, 40), integers(2, 1)
    order_n = order(train_nF.numpy(), test_mF[0].numpy())
    loop_n = recursive_values(order_n, labels_n.numpy(), int(labels_m[0]), 3)
    close(knn_shapley(train_nF, labels_n, test_mF, labels_m, 3), torch.from_numpy(loop_n))


def test_both_sides_of_the_benchmark_run():
    sizes = 50, 6, 4, 2
    ours, theirs = blocks(sizes, 3, 1)(), loop(sizes, 3, 10)()
    assert ours["seconds"] > 0 and ours["mib"] > 0 and theirs["seconds"] > theirs["recursion"] > 0


@pytest.mark.slow
def test_the_benchmark(tmp_path, capsys):
    out = tmp_path / "knn.json"
    assert main(["--quick", "--threads", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["seconds"] > 0 and record["gib"] > 0 and record["ratio"] > record["ratio_recursion"] > 0
    assert "loop, from 1 of 20 test samples" in capsys.readouterr().out
