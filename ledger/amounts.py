"""Who gets how much: values as fixed-point integers, medians over evaluators, and a budget split in proportion to them.

Everything is exact: integers of any size, no rounding that depends on a machine. ledger/contracts/proofs.vy computes
the same for one worker on a chain.

Legend: N workers, E evaluators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.errors import UsageError

FRACTION_BITS = 64  # of a fixed-point value: the unit is 2**-64, and scaling a float by a power of two is exact
MAX_WEIGHT = 2**112  # the largest value that counts; MAX_WEIGHT * MAX_BUDGET fits a chain's 256 bits
MAX_BUDGET = 2**96
MAX_WORKERS = 2**17


def fixed_point(values_N: Sequence[float]) -> list[int]:
    """Values in units of 2**-64, rounded to the nearest (ties to even).

    Raises UsageError for one that is not finite or not below 2**48 in size.
    """
    fixed_N = []
    for index, value in enumerate(values_N):
        value = float(value)
        if not abs(value) < MAX_WEIGHT >> FRACTION_BITS:
            raise UsageError(f"worker {index} has the value {value}: only finite values below 2**48 can be paid by.")
        fixed_N.append(round(math.ldexp(value, FRACTION_BITS)))
    return fixed_N


def lower_median(values_E: Sequence[int]) -> int:
    """The element at position (E - 1) // 2 of the sorted values: one of them, so that whoever has more than half of the
    evaluators on its side keeps it between their values."""
    return sorted(values_E)[(len(values_E) - 1) // 2]


def weight(values_E: Sequence[int]) -> int:
    """What a worker's share is in proportion to: the lower median of its values, at least 0, at most MAX_WEIGHT."""
    return min(max(lower_median(values_E), 0), MAX_WEIGHT)


@dataclass(frozen=True)
class Split:
    """A budget split among N workers.

    amounts: of each worker; they sum to the budget, or to 0 where no weight is positive (then the budget goes back).
    total: sum of weights.
    remainder, last: a share is rounded up where budget * weight mod total is larger than ``remainder``, or equal to it
        and the worker's index at most ``last``: by this a single amount can be checked without looking at the others.
    """

    amounts: list[int]
    total: int
    remainder: int
    last: int


def split(budget: int, weights_N: Sequence[int]) -> Split:
    """The largest-remainder split of ``budget`` in proportion to weights (Hamilton's method); of equal remainders the
    lower index is rounded up first.

    Raises UsageError for a budget or a number of workers that contracts do not take.
    """
    if not 0 < budget <= MAX_BUDGET:
        raise UsageError(f"a budget of {budget} cannot be paid: it has to be from 1 to 2**96 units of the token.")
    if not 0 < len(weights_N) <= MAX_WORKERS:
        raise UsageError(f"{len(weights_N):,} workers cannot be paid: from 1 to {MAX_WORKERS:,} can.")
    total = sum(weights_N)
    if total == 0:
        return Split([0] * len(weights_N), 0, 0, 0)
    shares = [divmod(budget * weight, total) for weight in weights_N]
    amounts = [share for share, _ in shares]
    missing = budget - sum(amounts)  # fewer than the workers whose remainder is not 0
    if not missing:
        return Split(amounts, total, total, 0)  # no remainder is that large
    order = sorted(range(len(shares)), key=lambda index: (-shares[index][1], index))[:missing]
    for index in order:
        amounts[index] += 1
    return Split(amounts, total, shares[order[-1]][1], order[-1])


def share(budget: int, weight: int, total: int, remainder: int, last: int, index: int) -> int:
    """One worker's amount under posted totals, as the contract computes it; 0 where it would divide by 0."""
    if weight == 0 or total == 0:
        return 0
    amount, left = divmod(budget * weight, total)
    return amount + (left > remainder or (left == remainder and index <= last))
