"""Which edges of the graph helped, and when (``--edges``).

Legend: N workers, T rounds, E edges, B bins of rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.errors import UsageError
from utils.records import PathLike
from utils.scores import EDGES, read_scores
from visualization.checked import load_topology
from visualization.node_view import SIGNS, draw_arrows
from visualization.style import BLACK, node_diameter, place_workers, power_ticks, round_ticks, save, styled

MOST_ROWS = 40  # edges of the table: those that did most
MOST_BINS = 120  # of rounds


def plot_edges(stage1_dir: PathLike, zarr_path: PathLike, out: PathLike) -> Path:
    """Draw edges.zarr on the graph of its stage and over time, and write the picture to ``out``. Raises UsageError
    where a record is missing or damaged, or the two are of different runs."""
    record, topology = read_scores(zarr_path, ("helped",), EDGES), load_topology(stage1_dir)
    ends = np.concatenate([record["receiver"], record["sender"]])
    if record["helped"].ndim != 2 or len(ends) != 2 * record["helped"].shape[1]:
        raise UsageError(f"{zarr_path} is damaged: its lists differ in length; --edges computes them again")
    if len(ends) and not 0 <= ends.min() <= ends.max() < topology["num_workers"]:
        raise UsageError(f"{zarr_path} names workers that {stage1_dir} does not have; --edges computes them again")
    return save(draw_edge_influence(record["helped"], record["receiver"], record["sender"], topology), out)


@styled
def draw_edge_influence(
    helped_TE: np.ndarray, receiver_E: np.ndarray, sender_E: np.ndarray, topology: dict[str, Any]
) -> Figure:
    """Left the graph: what each edge did over all rounds. Right the edges that did most, by rounds, and the sum of all
    edges. Positive = the edge lowered the final validation loss."""
    figure = Figure(figsize=(11, 5.8))
    graph, right = figure.subfigures(1, 2, width_ratios=(5, 6))
    total_E = np.nan_to_num(helped_TE).sum(0)
    _graph(graph.subplots(), total_E, receiver_E, sender_E, topology)
    if not helped_TE.size:
        return figure
    time, table = right.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    bins = np.unique(np.linspace(0, len(helped_TE), min(len(helped_TE), MOST_BINS) + 1).astype(int))
    binned_BE = np.add.reduceat(np.nan_to_num(helped_TE), bins[:-1]) / np.diff(bins)[:, None]
    sum_B = binned_BE.sum(1)
    time.stairs(np.maximum(sum_B, 0), bins, fill=True, color=SIGNS(0.85))
    time.stairs(np.minimum(sum_B, 0), bins, fill=True, color=SIGNS(0.15))
    time.axhline(0, color=BLACK, linewidth=0.8)
    time.set_title("All edges of a round together")
    power_ticks(time.yaxis, "helped")
    _table(right, table, binned_BE, bins, total_E, [f"{k} → {l}" for k, l in zip(sender_E, receiver_E, strict=True)])
    return figure


def _graph(
    axes: Axes, total_E: np.ndarray, receiver_E: np.ndarray, sender_E: np.ndarray, topology: dict[str, Any]
) -> None:
    N = topology["num_workers"]
    pairs_E2 = np.stack([sender_E, receiver_E], 1)
    place_N2, _ = place_workers(topology["mode"], N, pairs_E2)
    table_NN = np.zeros((N, N))
    table_NN[sender_E, receiver_E] = total_E
    axes.set_aspect("equal")
    axes.axis("off")
    axes.margins(0.1)
    if N == 1:
        axes.set(xlim=(-2, 2), ylim=(-1, 3))
    diameter = 0.8 * node_diameter(place_N2)
    draw_arrows(axes, table_NN, place_N2, diameter, "the final loss")
    axes.scatter(*place_N2.T, s=diameter**2, c="#DDDDDD", edgecolors=BLACK, linewidths=0.8 * (diameter > 8), zorder=3)
    if diameter >= 2 + 5.2 * len(str(N - 1)):
        for k, (x, y) in enumerate(place_N2):
            axes.text(x, y, str(k), ha="center", va="center_baseline", size=9, zorder=4)
    for artist in (*axes.lines, *axes.texts, *axes.patches):
        artist.set_in_layout(False)  # they stay inside the axes; measuring hundreds takes seconds
    axes.set_title("What each edge did over the whole run")


def _table(
    figure: Any, axes: Axes, binned_BE: np.ndarray, bins: np.ndarray, total_E: np.ndarray, names: list[str]
) -> None:
    """Rows: edges, the most helpful one first; those in between are left out where there are too many."""
    order_E = np.argsort(-total_E, kind="stable")
    if len(order_E) > MOST_ROWS:
        order_E = np.concatenate([order_E[: MOST_ROWS // 2], order_E[-MOST_ROWS // 2 :]])
    size = np.abs(binned_BE[binned_BE != 0])
    limit = float(np.quantile(size, 0.98)) if len(size) else 1.0
    mesh = axes.pcolormesh(
        bins, np.arange(len(order_E) + 1), binned_BE[:, order_E].T, cmap=SIGNS, vmin=-limit, vmax=limit, shading="flat"
    )
    axes.set_ylim(len(order_E), 0)
    axes.set_yticks(np.arange(len(order_E)) + 0.5, [names[e] for e in order_E], fontsize=6 if len(order_E) > 20 else 8)
    axes.tick_params(axis="y", left=False)
    axes.grid(False)
    bar = figure.colorbar(mesh, ax=axes, extend="both", shrink=0.9)
    power_ticks(bar.ax.yaxis, "helped, a round")
    left_out = len(total_E) - len(order_E)
    axes.set_title("Edges by rounds" + (f" ({left_out} between the best and the worst left out)" if left_out else ""))
    axes.set(xlabel="round")
    round_ticks(axes)
