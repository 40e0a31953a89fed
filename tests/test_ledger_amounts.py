"""Values, medians, amounts and trees: exact, whatever the values, at any size that contracts take."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.amounts import MAX_BUDGET, MAX_WEIGHT, fixed_point, lower_median, share, split, weight
from ledger.keccak import keccak256
from ledger.trees import Tree, hashed, leaves, root_of, roster_leaves, value_leaves
from utils.errors import UsageError

BUDGETS = st.integers(1, MAX_BUDGET)
WEIGHTS = st.lists(st.one_of(st.just(0), st.integers(0, 5), st.integers(0, MAX_WEIGHT)), min_size=1, max_size=40)


# --- values


@settings(deadline=None)
@given(st.floats(-(2.0**47), 2.0**47))
def test_a_fixed_point_value_is_the_nearest(value):
    (fixed,) = fixed_point([value])
    assert abs(Fraction(fixed) - Fraction(value) * 2**64) <= Fraction(1, 2)


def test_values_of_any_kind_of_number():
    assert fixed_point(np.array([1.5, -0.25], dtype=np.float32)) == fixed_point([1.5, -0.25]) == [3 << 63, -(1 << 62)]
    assert fixed_point([0.1]) == [math.floor(0.1 * 2**64)]  # a float is an exact number of units, or nearly


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf, 2.0**48, -1e300))
def test_what_is_no_value(value):
    with pytest.raises(UsageError, match="worker 1 has the value"):
        fixed_point([0.0, value])


@settings(deadline=None)
@given(st.lists(st.integers(), min_size=1, max_size=15))
def test_more_than_half_of_the_evaluators_keep_the_median_between_their_values(values_E):
    median = lower_median(values_E)
    honest = len(values_E) // 2 + 1
    assert min(values_E[:honest]) <= median <= max(values_E[:honest])
    assert median == lower_median(values_E[::-1]) and median in values_E
    assert sum(value < median for value in values_E) <= (len(values_E) - 1) // 2


def test_weights_are_clamped():
    assert [weight([value]) for value in (-1, 0, 7, MAX_WEIGHT, 2**255 - 1)] == [0, 0, 7, MAX_WEIGHT, MAX_WEIGHT]
    assert weight([3, -1]) == 0 and weight([3, 1, 2]) == 2 and weight([1, 2, 3, 4]) == 2


# --- amounts


@settings(deadline=None)
@given(BUDGETS, WEIGHTS)
def test_a_split_is_exact_and_fair(budget, weights_N):
    result = split(budget, weights_N)
    assert result.total == sum(weights_N)
    if result.total == 0:
        assert result.amounts == [0] * len(weights_N)
        return
    assert sum(result.amounts) == budget
    for amount, weight_ in zip(result.amounts, weights_N, strict=True):
        assert abs(amount - Fraction(budget * weight_, result.total)) < 1  # never a unit off
    rounded_up = [
        (budget * weight_ % result.total, -index)
        for index, weight_ in enumerate(weights_N)
        if result.amounts[index] > budget * weight_ // result.total
    ]
    order = sorted(((budget * w % result.total, -index) for index, w in enumerate(weights_N)), reverse=True)
    assert sorted(rounded_up, reverse=True) == order[: len(rounded_up)]  # the largest remainders, lower indices first


@settings(deadline=None)
@given(BUDGETS, WEIGHTS)
def test_one_amount_is_checked_without_the_others(budget, weights_N):
    """What a contract computes for one worker from the posted totals is what the split gives it."""
    result = split(budget, weights_N)
    header = (result.total, result.remainder, result.last)
    assert [share(budget, w, *header, index) for index, w in enumerate(weights_N)] == result.amounts


@settings(deadline=None)
@given(BUDGETS, WEIGHTS, st.integers(0, 10**40), st.integers(0, 50))
def test_no_other_rounding_sums_to_the_budget(budget, weights_N, remainder, last):
    """A poster who rounds otherwise posts other amounts only with another sum: the last leaf cannot be proved."""
    result = split(budget, weights_N)
    amounts = [share(budget, w, result.total, remainder, last, index) for index, w in enumerate(weights_N)]
    assert amounts == result.amounts or sum(amounts) != budget


@settings(deadline=None)
@given(BUDGETS, st.lists(st.integers(1, 2**40), min_size=2, max_size=20), st.randoms())
def test_more_value_is_never_less_money(budget, weights_N, random):
    more = random.randrange(len(weights_N))
    raised = [w + (index == more) for index, w in enumerate(weights_N)]
    amounts = split(budget, raised).amounts
    assert amounts[more] >= split(budget, weights_N).amounts[more]
    ranked = sorted(range(len(raised)), key=lambda index: (raised[index], -index))
    assert all(amounts[a] <= amounts[b] for a, b in zip(ranked, ranked[1:], strict=False))


def test_a_hundred_thousand_workers():
    draw = random.Random(1)
    values_N = [draw.gauss(0.2, 1.0) for _ in range(100_000)]
    weights_N = [weight([value]) for value in fixed_point(values_N)]
    for budget in (1, 99_999, 10**24 + 7, MAX_BUDGET):
        result = split(budget, weights_N)
        assert sum(result.amounts) == budget
        for index in range(0, 100_000, 997):
            header = (result.total, result.remainder, result.last)
            assert share(budget, weights_N[index], *header, index) == result.amounts[index]
    equal = split(100_001, [1] * 100_000)  # one unit is left: the first has it
    assert equal.amounts == [2] + [1] * 99_999


@pytest.mark.parametrize("budget", (0, -5, MAX_BUDGET + 1))
def test_what_is_no_budget(budget):
    with pytest.raises(UsageError, match="cannot be paid"):
        split(budget, [1, 2])


def test_too_many_workers():
    for weights_N in ([], [1] * (2**17 + 1)):
        with pytest.raises(UsageError, match="workers cannot be paid"):
            split(10, weights_N)


# --- hashes and trees


def test_keccak_of_known_messages():
    """Of the empty message and 'abc' (Ethereum's test vectors), and of blocks on both sides of the rate."""

    def one(message: bytes) -> str:
        return keccak256(np.frombuffer(message, dtype=np.uint8).reshape(1, -1)).tobytes().hex()

    assert one(b"") == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"
    assert one(b"abc") == "4e03657aea45a94fc7d47ba826c8d667c0d1e6e33a64a036ec44f58fa12d6c45"
    keccak = pytest.importorskip("eth_hash.auto").keccak
    for length in (1, 64, 135, 136, 137, 271, 272, 300):
        message = bytes(range(256)) * 2
        assert one(message[:length]) == keccak(message[:length]).hex()


def test_many_hashes_are_those_of_each():
    messages = np.random.default_rng(0).integers(0, 256, (4500, 64), dtype=np.uint8)
    together = keccak256(messages)
    for index in (0, 2047, 2048, 4499):
        assert (keccak256(messages[index : index + 1]) == together[index]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.data())
def test_proofs_prove_their_own_position_only(count, data):
    tree = Tree(value_leaves(bytes(32), list(range(count))))
    index = data.draw(st.integers(0, count - 1))
    leaf, proof = bytes(tree.levels[0][index]), tree.proof(index)
    assert len(proof) == (count - 1).bit_length() and root_of(leaf, index, proof) == tree.root
    for other in range(2 ** len(proof)):
        assert (root_of(leaf, other, proof) == tree.root) == (other == index)


def test_leaves_are_hashed_twice_and_bound():
    (leaf,) = value_leaves(b"\1" * 32, [-1])
    encoded = b"\1" * 32 + bytes(32) + b"\xff" * 32
    once = keccak256(np.frombuffer(encoded, dtype=np.uint8).reshape(1, -1))
    assert leaf == keccak256(once).tobytes() and leaf != once.tobytes()
    accounts = ["0x" + 40 * "1", "0x" + 40 * "2"]
    distinct = {*roster_leaves(accounts), *roster_leaves(accounts[::-1]), *value_leaves(b"\2" * 32, [-1, -1]), leaf}
    assert len(distinct) == 7
    assert hashed(1, "0x02", b"\3") == hashed(1, 2, 3) and leaves([(1, 2)])[0] == hashed(hashed(1, 2))


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=3, max_size=9))
def test_a_tree_of_other_values_has_another_root(values_N):
    root = Tree(value_leaves(bytes(32), values_N)).root
    for index in range(len(values_N)):
        other = [value + (place == index) for place, value in enumerate(values_N)]
        assert Tree(value_leaves(bytes(32), other)).root != root
    assert Tree(value_leaves(bytes(32), [*values_N, 0])).root != root  # a leaf of value 0 is not an empty place
