"""What the data of each worker did: bars of influence, and the ripples on the topology graph.

Legend: N workers.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from utils.errors import UsageError
from utils.records import PathLike
from visualization.checked import load_node_view, load_topology
from visualization.style import (
    BLACK,
    GREY,
    draw_edges,
    graph_edges,
    index_ticks,
    mark_rows,
    node_diameter,
    place_workers,
    plain,
    power_ticks,
    save,
    styled,
)

MOST_DRAWN_WORKERS = 32  # above it the ripples become a heat map
MOST_NAMED_BARS = 48
MOST_RIPPLES = 64  # arrows, but at least 3 a worker
SIGNS = colormaps["RdBu"]  # red harms, blue helps: told apart with every common colour blindness
HARMED, HELPED = SIGNS(0.08), SIGNS(0.92)


def plot_node_view(stage1_dir: PathLike, node_json: PathLike, out: PathLike) -> Path:
    """Draw a ``node_view_<algorithm>.json`` on the graph of its stage and write the picture to ``out``.

    Raises UsageError where a record is missing or damaged, or the two are of different runs.
    """
    view, topology = load_node_view(node_json), load_topology(stage1_dir)
    scored, there = len(view["worker_influence"]), topology["num_workers"]
    if scored != there:
        raise UsageError(f"{node_json} is of {scored} workers, {stage1_dir} of {there}; score this run again")
    return save(draw_node_view(view, topology), out)


@styled
def draw_node_view(view: dict[str, Any], topology: dict[str, Any]) -> Figure:
    """Left the influence of each worker's data, sorted; right whom it helped and harmed.

    ``view['table'][j][k]`` is how much the data of worker j helped worker k within ``view['hops']``
    hops; without a table the graph alone is coloured. What a worker did to itself is no arrow, but
    on the diagonal of the heat map that takes the graph's place for many workers.
    """
    influence_N = np.array(view["worker_influence"], dtype=float)
    bad = set(view.get("bad_workers") or ())
    table_NN = None if view.get("table") is None else np.array(view["table"], dtype=float)
    workers = len(influence_N)
    figure = Figure(figsize=(10.5, 5.6))
    bars, graph = figure.subplots(1, 2, width_ratios=(2, 3))
    largest = float(np.nanmax(np.abs(influence_N), initial=0)) or 1.0
    colour_N4 = SIGNS(Normalize(-largest, largest)(influence_N))
    _bars(bars, influence_N, colour_N4, bad)
    bars.set_title(f"Influence of each worker's data ({plain(view['algorithm'])})" + "\n■ bad data" * bool(bad))
    if table_NN is not None and workers > MOST_DRAWN_WORKERS:
        _heat_map(figure, graph, table_NN, bad)
    else:
        _ripples(graph, topology, table_NN, colour_N4, bad)
    if table_NN is not None:
        hops = view.get("hops", 1)
        graph.set_title(f"Whom it helped and harmed within {hops} hop{'s' * (hops != 1)}")
    elif workers:
        graph.set_title("The same on the topology")
    return figure


def _bars(axes: Axes, influence_N: np.ndarray, colour_N4: np.ndarray, bad: Collection[int]) -> None:
    """Sorted bars, the least helpful worker at the bottom; bad workers hatched and marked."""
    workers = len(influence_N)
    order_N = np.argsort(influence_N, kind="stable")
    look = {"edgecolor": "#444444", "linewidth": 0.6, "height": 0.8} if workers <= MOST_NAMED_BARS else {"height": 1}
    bars = axes.barh(range(workers), influence_N[order_N], color=colour_N4[order_N], **look)
    marked = [row for row, k in enumerate(order_N) if int(k) in bad]
    for row in marked:
        bars[row].set_hatch("/////")
    mark_rows(axes, marked)
    axes.axvline(0, color=BLACK, linewidth=0.9)
    axes.grid(False, axis="y")
    axes.set(ylim=(-0.7, workers - 0.3), ylabel="worker")
    if workers <= MOST_NAMED_BARS:
        axes.set_yticks(range(workers), list(map(str, order_N)))
        axes.tick_params(axis="y", left=False)
    else:
        axes.set(yticks=[], ylabel=f"{workers:,} workers, sorted")
    axes.locator_params(axis="x", nbins=5)
    power_ticks(axes.xaxis, "sum of the scores of its samples")


def _ripples(
    axes: Axes,
    topology: dict[str, Any],
    table_NN: np.ndarray | None,
    colour_N4: np.ndarray,
    bad: Collection[int],
) -> None:
    """The graph: nodes in the colours of the bars, an arrow for each strong effect on another worker."""
    workers = len(colour_N4)
    lines_E2, arrows_E2 = graph_edges(topology)
    place_N2, torus = place_workers(topology["mode"], workers, np.concatenate([lines_E2, arrows_E2]))
    axes.set_aspect("equal")
    axes.axis("off")
    axes.margins(0.1)
    if workers == 1:
        axes.set(xlim=(-2, 2), ylim=(-1, 3))
    diameter = 0.8 * node_diameter(place_N2)
    if table_NN is None:
        draw_edges(axes, place_N2, lines_E2, arrows_E2, torus, diameter)
    else:
        draw_arrows(axes, table_NN, place_N2, diameter)
    for k in range(workers):
        marker = "s" if k in bad else "o"
        edge = {"markeredgecolor": BLACK, "markeredgewidth": 2.2 if k in bad else 0.8 * (diameter > 8)}
        size = diameter * (0.85 if k in bad else 1)
        axes.plot(*place_N2[k], marker, markersize=size, color=colour_N4[k], zorder=3, **edge)
        if diameter >= 2 + 5.2 * len(str(workers - 1)):
            ink = "white" if colour_N4[k, :3] @ (0.3, 0.59, 0.11) < 0.5 else "black"
            axes.text(*place_N2[k], str(k), ha="center", va="center_baseline", color=ink, size=9, zorder=4)
    for artist in (*axes.lines, *axes.texts, *axes.patches):
        artist.set_in_layout(False)  # they stay inside the axes; measuring hundreds takes seconds


def draw_arrows(
    axes: Axes, table_NN: np.ndarray, place_N2: np.ndarray, diameter: float, what: str = "the receiver"
) -> None:
    """Effects [giver, receiver]: as wide as the effect is large; of each giver the strongest ones. ``what`` was helped
    or harmed."""
    workers = len(table_NN)
    effect_NN = np.nan_to_num(table_NN * (1 - np.eye(workers)))  # what a worker did to itself is no arrow
    size_NN = np.abs(effect_NN)
    each, largest = max(3, MOST_RIPPLES // workers), size_NN.max(initial=0)
    rank_NN = np.argsort(np.argsort(-size_NN, axis=1, kind="stable"), axis=1, kind="stable")
    drawn = np.argwhere((rank_NN < each) & (size_NN > 0)).tolist()
    crowd = min(1.0, 60 / max(len(drawn), 1))
    for giver, receiver in sorted(drawn, key=lambda pair: -effect_NN[*pair]):  # harm in front
        share = crowd * size_NN[giver, receiver] / largest
        axes.add_patch(
            FancyArrowPatch(
                place_N2[giver], place_N2[receiver], connectionstyle="arc3,rad=0.16", arrowstyle="-|>",
                mutation_scale=5 + 8 * share, linewidth=0.5 + 3.5 * share, alpha=0.8,
                color=HELPED if effect_NN[giver, receiver] > 0 else HARMED,
                shrinkA=diameter / 2 + 1, shrinkB=diameter / 2 + 2,
            )
        )  # fmt: skip
    if not drawn:
        axes.text(0.5, 0, "no worker had an effect on another", transform=axes.transAxes, ha="center", color=GREY)
        return
    handles = [
        Line2D([], [], color=color, linewidth=3, label=label)
        for color, label in ((HELPED, f"helped {what}"), (HARMED, f"harmed {what}"))
    ]
    said = f"widest arrow: {largest:.2g}"
    if len(drawn) < (size_NN > 0).sum():
        said += f"; the {each} strongest effects of each worker are drawn"
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, title=said)


def _heat_map(figure: Figure, axes: Axes, table_NN: np.ndarray, bad: Collection[int]) -> None:
    """The table itself; the scale ends where 1 % of the cells go beyond it."""
    workers = len(table_NN)
    size = np.abs(table_NN[np.isfinite(table_NN) & (table_NN != 0)])
    limit = float(np.quantile(size, 0.99)) if len(size) else 1.0
    look = {"cmap": SIGNS, "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    image = axes.imshow(table_NN, extent=(0, workers, workers, 0), **look)
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.8)
    power_ticks(bar.ax.yaxis, "effect of its data, positive: helped")
    axes.grid(False)
    for axis in axes.xaxis, axes.yaxis:
        index_ticks(axis, workers, list(map(str, range(workers))), most=12)
    mark_rows(axes, [k + 0.5 for k in bad])
    axes.set(xlabel="worker that was helped or harmed", ylabel="worker whose data it was")
