"""What ``python -m ledger`` paid, as a picture: what each worker was worth, and what it got.

Reads payout.json. Legend: N workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils.records import PathLike, read_record
from visualization.style import BLUE, GREY, RED, save, style

MOST_NAMED = 40  # bars that have room for a number


def plot_payout(folder: PathLike, wrong_N: Sequence[float] = ()) -> Path:
    """payout.png beside payout.json. ``wrong_N``: the share of each worker's labels that are known to be wrong (of a
    demonstration). Raises UsageError of a damaged record."""
    record = read_record(Path(folder, "payout.json"), "workers", "evidence", "list")
    with style():
        return save(draw_payout(record, wrong_N), Path(folder, "payout.png"))


def draw_payout(record: dict[str, Any], wrong_N: Sequence[float] = ()) -> Figure:
    """Above the values, below the shares of the budget."""
    rows = record["workers"]
    N, budget = len(rows), int(record["list"]["budget"])
    colours = [RED if wrong_N and wrong_N[k] else BLUE for k in range(N)]
    figure = Figure(figsize=(max(5.5, min(14.0, 0.75 * N + 2)), 4.6))
    above, below = figure.subplots(2, 1, sharex=True)
    above.bar(range(N), [row["value"] for row in rows], color=colours)
    above.axhline(0, color="black", linewidth=0.8)
    above.set(ylabel="value", title=f"What each worker's data did to the models ({said(record['evidence'])})")
    shares = [100 * row["amount"] / budget for row in rows]
    bars = below.bar(range(N), shares, color=colours)
    if N <= MOST_NAMED:
        below.bar_label(bars, [f"{share:.1f} %" for share in shares], fontsize=8, color=GREY)
    below.set(xlabel="worker", ylabel="% of the budget", title=f"What it is paid, of {budget:,}")
    below.margins(y=0.15)
    if N <= MOST_NAMED:
        ticks = [f"{k}\n{wrong_N[k]:.0%} of its\nlabels wrong" if wrong_N and wrong_N[k] else f"{k}" for k in range(N)]
        below.set_xticks(range(N), ticks)
    below.grid(axis="x", visible=False)
    above.grid(axis="x", visible=False)
    return figure


def said(evidence: dict[str, Any]) -> str:
    """The audit in a few words."""
    if evidence.get("lds") is not None:
        low, high = evidence["interval"]
        return f"{evidence['method']}, LDS {evidence['lds']:.2f} [{low:.2f}, {high:.2f}]"
    if evidence.get("relative_l1") is not None:
        low, high = evidence["interval"]
        return f"{evidence['method']}, off by {evidence['relative_l1']:.0%} [{low:.0%}, {high:.0%}]"
    return f"{evidence['method']}, not audited"
