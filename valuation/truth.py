"""What institutions' data are truly worth: their Shapley values in the game of all coalitions, each trained.

    phi_i = 1/N sum over S without i of (U(S + i) - U(S)) / binomial(N - 1, |S|)

Of many institutions they are estimated from random orders in which these join.

Legend: N institutions, O orders, C coalitions, D floats a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.build import Job
from training.cluster import completed
from training.coalitions import Coalition, Trained, train_coalitions
from training.recipe import Recipe
from utils.errors import UsageError
from utils.progress import Progress, bar, ignored
from utils.random import permutations
from utils.records import MetricsLog
from valuation.institutions import institution_tests, utilities


def shapley(worth: Mapping[Coalition, float], count: int) -> np.ndarray:
    """Shapley values [N] from what every coalition is worth, the empty one, (), included."""
    values_N = np.zeros(count)
    for members, utility in worth.items():
        size = len(members)
        for i in range(count):
            if i in members:
                values_N[i] += utility / comb(count - 1, size - 1)
            else:
                values_N[i] -= utility / comb(count - 1, size)
    return values_N / count


def random_orders(count: int, orders: int, seed: int) -> list[list[int]]:
    """So many orders of the institutions; more of them begin with the same ones."""
    rows = torch.arange(orders)[:, None]
    return permutations(torch.full((orders,), count), seed, "orders of institutions", rows).tolist()


def prefixes(orders: Sequence[Sequence[int]]) -> list[Coalition]:
    """All coalitions that form as institutions join in these orders, the smallest first."""
    found = {tuple(sorted(order[: size + 1])) for order in orders for size in range(len(order))}
    return sorted(found, key=lambda members: (len(members), members))


def of_orders(worth: Mapping[Coalition, float], orders: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """What each institution adds when it joins, mean over orders [N], and the standard error of that mean [N] (NaN of
    one order): an estimate of Shapley values without bias."""
    added_ON = np.zeros((len(orders), len(orders[0])))
    for o, order in enumerate(orders):
        for place, i in enumerate(order):
            added_ON[o, i] = worth[tuple(sorted(order[: place + 1]))] - worth[tuple(sorted(order[:place]))]
    if len(orders) == 1:
        return added_ON[0], np.full(added_ON.shape[1], np.nan)
    return added_ON.mean(0), added_ON.std(0, ddof=1) / np.sqrt(len(orders))


def trained(
    job: Job, coalitions: Sequence[Coalition], tests: list[Tensor], path: Path, progress: Progress,
    cluster: str | None = None,
) -> dict[Coalition, dict[str, Any]]:
    """What each coalition came to: ``utility``, ``by_test``, ``rounds``, ``seconds``; kept in coalitions.jsonl, which
    is read where it has them, as are results of recipes in ``jobs/``. As many train side by side as keep the engine
    busy. ``cluster``: where they train, each by a recipe of its own."""
    log = MetricsLog(path)
    found = {tuple(line["members"]): line for line in (log.read() if path.exists() else [])}

    def keep(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            log.append({"round": len(found), **line})
            found[tuple(line["members"])] = line
        progress(len(lines))

    missing = [members for members in coalitions if members not in found]
    progress(len(coalitions) - len(missing))
    recipes = [Recipe.of("coalitions", job, {"members": [list(members)]}) for members in missing]
    for _, lines in completed(cluster, recipes, path.parent / "jobs"):
        keep(lines)
    missing = [members for members in missing if members not in found]  # done nowhere else
    for piece in pieces_of(missing, job.engine.busy_rows):
        keep(trained_here(job, piece, tests))
    return found


def pieces_of(coalitions: Sequence[Coalition], rows: int) -> list[list[Coalition]]:
    """The coalitions, in order, in pieces of at most so many members together, or of one coalition."""
    pieces: list[list[Coalition]] = []
    for members in coalitions:
        if pieces and sum(map(len, pieces[-1])) + len(members) <= rows:
            pieces[-1].append(members)
        else:
            pieces.append([members])
    return pieces


def trained_here(
    job: Job, piece: list[Coalition], tests: list[Tensor], progress: Progress = ignored
) -> list[dict[str, Any]]:
    """The records of coalitions that train side by side."""
    start = time.perf_counter()
    result = train_coalitions(job, piece, progress)
    seconds = (time.perf_counter() - start) / len(piece)
    return [line | {"seconds": seconds} for line in lines_of(job, piece, result, tests)]


def coalitions(job: Job, work: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the coalitions with these ``members``: of a recipe's work."""
    N, given = len(job.shards), work.get("members")
    ordered = type(given) is list and given and all(
        type(members) is list and members and all(type(k) is int and 0 <= k < N for k in members)
        and sorted(set(members)) == members
        for members in given
    )  # fmt: skip
    if not ordered:
        raise UsageError(f"coalitions are lists of 'members', in order, from 0 to {N - 1}.")
    tests = job.once("institution tests", lambda: institution_tests(job))
    rounds = math.ceil(job.config.epochs / job.config.local_epochs)  # at most
    with bar(len(given) * rounds, f"coalitions: {len(given)}", "round", job.config.quiet) as ticks:
        return trained_here(job, [tuple(members) for members in given], tests, ticks.update)


def lines_of(job: Job, coalitions: Sequence[Coalition], result: Trained, tests: list[Tensor]) -> list[dict[str, Any]]:
    """A record of each coalition."""
    by_test_CN = utilities(job, result.rows_CD, tests)
    return [
        {"members": list(members), "utility": float(by_test_N.mean()), "by_test": by_test_N.tolist(), "rounds": rounds}
        for members, by_test_N, rounds in zip(coalitions, by_test_CN, result.rounds, strict=True)
    ]
