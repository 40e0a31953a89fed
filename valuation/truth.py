"""What institutions' data are truly worth: their Shapley values in the game of all coalitions, each trained.

    phi_i = 1/N sum over S without i of (U(S + i) - U(S)) / binomial(N - 1, |S|)

Legend: N institutions, C coalitions, D floats a row.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from training.build import Job
from training.coalitions import Coalition, Trained, train_coalitions
from utils.progress import Progress
from utils.records import MetricsLog
from valuation.institutions import utilities


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


def trained(
    job: Job, coalitions: Sequence[Coalition], tests: list[Tensor], path: Path, progress: Progress
) -> dict[Coalition, dict[str, Any]]:
    """What each coalition came to: ``utility``, ``by_test``, ``rounds``, ``seconds``; kept in coalitions.jsonl, which
    is read where it has them. As many train side by side as keep the engine busy."""
    log = MetricsLog(path)
    found = {tuple(line["members"]): line for line in (log.read() if path.exists() else [])}
    missing = [members for members in coalitions if members not in found]
    progress(len(coalitions) - len(missing))
    while missing:
        piece, rows = [], 0
        while missing and (not piece or rows + len(missing[0]) <= job.engine.busy_rows):
            rows += len(missing[0])
            piece.append(missing.pop(0))
        start = time.perf_counter()
        result = train_coalitions(job, piece)
        seconds = (time.perf_counter() - start) / len(piece)
        for line in lines_of(job, piece, result, tests):
            line = {"round": len(found), **line, "seconds": seconds}
            log.append(line)
            found[tuple(line["members"])] = line
        progress(len(piece))
    return found


def lines_of(job: Job, coalitions: Sequence[Coalition], result: Trained, tests: list[Tensor]) -> list[dict[str, Any]]:
    """A record of each coalition."""
    by_test_CN = utilities(job, result.rows_CD, tests)
    return [
        {"members": list(members), "utility": float(by_test_N.mean()), "by_test": by_test_N.tolist(), "rounds": rounds}
        for members, by_test_N, rounds in zip(coalitions, by_test_CN, result.rounds, strict=True)
    ]
