"""What is claimed about training speed, and whether a benchmark's rows bear it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A claim on the fastest execution of each (model, N): ``figure`` reaches ``bound``, or stays below."""

    figure: str
    bound: float
    models: tuple[str, ...]
    at_most: bool = False
    min_workers: int = 1
    channels_last: bool = False  # True: among the rows of this layout
    amp: bool = False


BARS = (
    Bar("ratio_plain", 1.15, ("cnn",)),
    Bar("ratio_limit", 0.95, ("cnn",), channels_last=True),
    Bar("ratio_limit", 0.95, ("resnet18",)),
    Bar("ratio_plain", 1.7, ("cnn", "resnet18"), amp=True),
    Bar("ratio_limit", 2.0, ("mlp",), min_workers=256),
    Bar("ratio_limit", 0.9, ("mlp_wide",)),
    Bar("gossip_share", 0.05, ("cnn", "resnet18"), at_most=True),
)
GPU_BARS = (  # there the limit is one model at the joint batch, and plain is a loop over N models
    Bar("ratio_limit", 0.7, ("cnn", "resnet18")),
    Bar("ratio_plain", 3.0, ("resnet18",)),
)
CERTIFICATE = {  # what ``benchmarks.gpu`` asks of a GPU: (bound, whether the figure must stay below it)
    "distance": (1e-9, True),  # float64, as a share of the largest entry
    "left": (1.0, True),  # MiB
    "waits": (0, True),
    "one_model": (0.8, False),
    "graph": (3.0, False),
    "rows": (4.3, True),  # parameters, gossip's second matrix, momentum, gathered neighbours; the batch twice
    "scoring": (4.5, True),
    "scores": (1e-6, True),
    "resume": (0, True),
}
FLAT = 1.5  # a worker's gossip may cost so many times more at one N >= 16 than at another, noise included

MEANING = {
    "ratio_plain": "of /plain",
    "ratio_limit": "of /limit",
    "gossip_share": "gossip's share of a round",
    "gossip_flatness": "gossip time a worker, largest / smallest N",
}


def check_bars(rows: Sequence[dict[str, Any]], bars: Sequence[Bar] = BARS) -> list[dict[str, Any]]:
    """Every bar that these rows of ``benchmarks.training`` have a figure for, with that figure and whether it
    is met."""
    checks = []
    for bar in bars:
        for model in bar.models:
            fitting = [
                row
                for row in rows
                if row["model"] == model
                and row["amp"] == bar.amp
                and row["workers"] >= bar.min_workers
                and (row["channels_last"] or not bar.channels_last)
            ]
            for workers in sorted({row["workers"] for row in fitting}):
                same_size = [row for row in fitting if row["workers"] == workers]
                best = max(same_size, key=lambda row: row["node_steps_per_second"])
                checks.append(
                    _check(best, str(workers), bar.figure, best[bar.figure], bar.bound, bar.at_most)
                )
    return checks + _check_flatness(rows)


def _check_flatness(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["workers"] >= 16:
            groups.setdefault((row["model"], row["execution"]), []).append(row)
    checks = []
    for group in groups.values():
        group.sort(key=lambda row: row["workers"])
        if len(group) > 1:
            growth = group[-1]["gossip_us_per_worker"] / group[0]["gossip_us_per_worker"]
            sizes = f"{group[0]['workers']}-{group[-1]['workers']}"
            checks.append(_check(group[0], sizes, "gossip_flatness", growth, FLAT, at_most=True))
    return checks


def _check(
    row: dict[str, Any], workers: str, figure: str, value: float, bound: float, at_most: bool
) -> dict[str, Any]:
    return {
        "model": row["model"],
        "workers": workers,
        "execution": row["execution"],
        "figure": figure,
        "value": value,
        "bound": bound,
        "at_most": at_most,
        "ok": value <= bound if at_most else value >= bound,
    }


def describe(check: dict[str, Any]) -> str:
    """A check as one line."""
    who = f"{check['model']} N={check['workers']} ({check['execution']})"
    return judged(check, who, MEANING[check["figure"]])


def judged(check: dict[str, Any], who: str, meaning: str) -> str:
    """A figure beside its bar (``bound`` None: it has none), as one line."""
    verdict = "ok" if check["ok"] else "missed"
    bar = "" if check["bound"] is None else f" {'<=' if check['at_most'] else '>='} {check['bound']:g}"
    return f"{verdict:6}  {who}: {check['value']:.3g}{bar}  {meaning}"
