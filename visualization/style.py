"""How every picture looks, and the parts that pictures are made of: curves, scales, graphs.

No pyplot anywhere, so no user's session, backend or setting is touched.
Legend: N workers, T logged rounds, E edges.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from utils.records import PathLike, write_atomically
from utils.registry import INFLUENCE

Lines = list[dict[str, Any]]
P = ParamSpec("P")

# Okabe and Ito's palette, told apart with every common colour blindness (yellow left out: too pale on white).
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#8C8C8C"
CATEGORIES = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)
DASHES = ("-", "--", ":", "-.")

MARKS = ("o", "s", "D", "^", "v", "P", "*")

# One colour and mark a method of pruning, the same in every picture: by its place in the registry.
METHODS = {
    name: {"color": CATEGORIES[k % len(CATEGORIES)], "marker": MARKS[k % len(MARKS)]}
    for k, name in enumerate(name for name in INFLUENCE if name != "random")
} | {"random": {"color": GREY, "marker": "X", "linestyle": "--"}}
OTHER = {"color": ORANGE, "marker": "v"}

# Above these numbers a picture leaves out what could no longer be read (or drawn in seconds), and says so.
MOST_LABELLED_NODES = 64
MOST_ARROWS = 2_000
MOST_EDGES = 20_000

LONGEST_NAME = 14  # letters of a class name that a tick has room for
LONGEST_LABEL = 60  # letters of a legend's entry

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "savefig.dpi": 150,
}


@contextmanager
def style() -> Iterator[None]:
    """This style inside, the caller's matplotlib settings again after it."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the pictures
        matplotlib.rcParams.update(STYLE)
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function under this style."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return wrapper


def save(figure: Figure, path: PathLike) -> Path:
    """Write ``figure`` as PNG, atomically. Raises UsageError where the disk refuses."""
    path = Path(path)
    with style():
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def category(k: int) -> dict[str, str]:
    """Colour and dash of the k-th series; 28 different ones."""
    return {"color": CATEGORIES[k % len(CATEGORIES)], "linestyle": DASHES[k // len(CATEGORIES) % len(DASHES)]}


def plain(text: object, longest: int = LONGEST_NAME) -> str:
    """A user's text (the name of a class, run or file) as matplotlib may draw it: on one line and of at most
    ``longest`` letters, never taken for a formula or for a label to hide. What the font lacks becomes its code."""
    words = " ".join(str(text).split())
    visible = "".join(_drawable(letter) for letter in words if unicodedata.category(letter) not in ("Cc", "Cf"))
    visible = visible or "(no name)"
    if len(visible) > longest:  # names often differ in their last letters
        end = longest // 4
        visible = f"{visible[: longest - 1 - end]}…{visible[-end:]}"
    if any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in visible):
        visible = f"\N{FIRST STRONG ISOLATE}{visible}\N{POP DIRECTIONAL ISOLATE}"  # else it turns what stands around it
    hidden = visible.startswith("_")  # a legend leaves such labels out
    return " " * hidden + visible.replace("$", r"\$")


def _drawable(letter: str) -> str:
    if unicodedata.category(letter) == "Cs":  # half of a pair, from a file name that is no UTF-8
        return "\N{REPLACEMENT CHARACTER}"
    return letter if ord(letter) in _letters_of_the_font() else f"U+{ord(letter):X}"


@functools.cache
def _letters_of_the_font() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def note(axes: Axes, text: str) -> None:
    """Say in the middle of an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def note_if_empty(axes: Axes) -> None:
    """Say so where no curve has a point."""
    if not any(len(curve.get_xdata()) for curve in axes.lines):
        note(axes, "no finite figure was logged")


# ---- parts of pictures --------------------------------------------------------------------------


def mean_curve(runs: Sequence[Lines], x: str, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """``x`` and ``key`` over the rounds that all these runs (seeds of one configuration) logged, as means over the
    runs, and the sample standard deviation of ``key``: float [T] each; None for a single run."""
    by_round = [
        {row["round"]: (row[x], row[key]) for row in lines if row.get(x) is not None and row.get(key) is not None}
        for lines in runs
    ]
    rounds = sorted(set.intersection(*map(set, by_round)))
    xy_ST2 = np.array([[of_run[r] for r in rounds] for of_run in by_round], dtype=float).reshape(len(runs), -1, 2)
    deviation_T = xy_ST2[..., 1].std(0, ddof=1) if len(runs) > 1 else None
    return *xy_ST2.mean(0).T, deviation_T


def series(lines: Lines, x: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of ``key`` and their ``x`` over the lines that have both (float [T], float [T])."""
    pairs = [(row[x], row[key]) for row in lines if row.get(x) is not None and row.get(key) is not None]
    x_T, y_T = np.array(pairs, dtype=float).reshape(-1, 2).T
    return x_T, y_T


def line(axes: Axes, x_T: np.ndarray, y_T: np.ndarray, **look: Any) -> None:
    """A curve; few points get markers, so that a single one is seen."""
    axes.plot(x_T, y_T, marker="o" if len(x_T) <= 3 else None, markersize=4, **look)


def worker_lines(axes: Axes, lines: Lines, x: str, key: str) -> None:
    """One thin line a worker, as one collection (1,024 lines cost what one does)."""
    rows = [row for row in lines if row.get(x) is not None and row.get(key)]
    if not rows or len(rows[0][key]) < 2:
        return
    x_T, y_TN = np.array([row[x] for row in rows], float), np.array([row[key] for row in rows], float)
    workers = y_TN.shape[1]
    label = f"validation, each of {workers:,} workers"
    if len(rows) == 1:
        axes.scatter(np.repeat(x_T, workers), y_TN[0], s=10, color=SKY, alpha=0.6, label=label)
        return
    segments_NT2 = np.stack([np.broadcast_to(x_T[:, None], y_TN.shape), y_TN], -1).swapaxes(0, 1)
    alpha = float(np.clip(3 / workers**0.7, 0.02, 0.8))
    axes.add_collection(LineCollection(segments_NT2, colors=SKY, linewidths=0.8, alpha=alpha, label=label))
    axes.autoscale_view()


def loss_scale(axes: Axes) -> None:
    """From zero, or logarithmic where the curves span more than a factor of 20."""
    values = np.concatenate([np.asarray(curve.get_ydata(), float) for curve in axes.lines] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    else:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * values.max(initial=0)))


def log_ticks(axis: Axis) -> None:
    """Numbers in full at a logarithmic axis; between powers of ten only where the axis holds few of those."""
    low, high = axis.get_view_interval()

    def in_full(value: float, _: int) -> str:
        return np.format_float_positional(value, precision=3, fractional=False, trim="-")

    axis.set_major_formatter(in_full)
    axis.set_minor_formatter(in_full if high < 10 * low else NullFormatter())
    if 10 * low <= high < 300 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def round_ticks(axes: Axes, most: int = 6, whole: bool = True) -> None:
    """Few, round and, where they count something, ``whole`` numbers along x; a single point gets room."""
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=whole, steps=[1, 2, 5, 10]))
    x = np.concatenate([curve.get_xdata() for curve in axes.lines] or [np.empty(0)])
    if len(x) and np.ptp(x) == 0:
        axes.set_xlim(x[0] - 1, x[0] + 1)


def power_ticks(axis: Axis, label: str, unit: str = "") -> None:
    """Label ``axis`` and take a power of ten out of its ticks into the label; call it once limits stand."""
    largest = max(map(abs, axis.get_view_interval()))
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    power = 0 if -2 <= power <= 3 else power
    axis.set_major_formatter(lambda value, _: f"{value / 10.0**power:.6g}".replace("-", "−"))
    scale = rf"$10^{{{power}}}$" if power else ""
    units = " ".join(filter(None, (scale, unit)))
    axis.set_label_text(f"{label} ({units})" if units else label)


def mark_rows(axes: Axes, rows: Sequence[float]) -> None:
    """Black squares at the right edge of these rows."""
    look = {"color": BLACK, "marker": "s", "markersize": 4, "linestyle": "", "clip_on": False}
    if rows:  # an empty curve that is not clipped upsets the layout
        axes.plot([1.03] * len(rows), rows, transform=axes.get_yaxis_transform(), **look)


def index_ticks(axis: Axis, count: int, names: Sequence[str], most: int) -> None:
    """Ticks in the middle of heat map cells, not more than ``most``."""
    ticks = np.arange(0, count, -(-count // most))
    axis.set_ticks(ticks + 0.5, [names[k] for k in ticks])


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend of ``axes`` under the figure, which grows where many entries need room."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        width = 0.085 * max(map(len, labels)) + 0.6  # inches an entry takes
        columns = int(np.clip(figure.get_figwidth() // width, 1, len(labels)))
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, -(-len(labels) // columns) - 2))
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        for handle in legend.get_lines():
            handle.set_alpha(1)


# ---- graphs ----------------------------------------------------------------------------------------


def graph_edges(topology: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that weigh each other alike (int [E, 2]) and the (sender, receiver) pairs of the rest.

    Weights are sums over the period; a worker's weight on itself is no edge.
    """
    workers = topology["num_workers"]
    receiver_E, sender_E, weight_E = (
        np.concatenate([matrix[name] for matrix in topology["matrices"]]) for name in ("receiver", "sender", "weight")
    )
    edge_E = (receiver_E != sender_E) & (weight_E != 0)
    if not edge_E.any():
        return np.empty((0, 2), int), np.empty((0, 2), int)
    code_E = (receiver_E * workers + sender_E)[edge_E].astype(int)
    code_E, position = np.unique(code_E, return_inverse=True)  # an edge of several rounds counts once
    weight_E = np.bincount(position, weight_E[edge_E])
    receiver_E, sender_E = np.divmod(code_E, workers)
    back_E = sender_E * workers + receiver_E
    found_E = np.minimum(np.searchsorted(code_E, back_E), len(code_E) - 1)
    alike_E = (code_E[found_E] == back_E) & np.isclose(weight_E[found_E], weight_E)
    pairs_E2 = np.stack([sender_E, receiver_E], 1)
    return pairs_E2[alike_E & (sender_E < receiver_E)], pairs_E2[~alike_E]


def place_workers(mode: str, workers: int, pairs_E2: np.ndarray) -> tuple[np.ndarray, bool]:
    """Position of each worker (float [N, 2]), and whether they lie on a torus of unit spacing.

    A grid lies on a grid, a star around its hub, a random graph, a tree, one of near neighbours or one from a file as
    springs pull it (Kamada and Kawai 1989; large ones Fruchterman and Reingold 1991), anything else on a circle,
    clockwise from the top.
    """
    angle_N = np.pi / 2 - 2 * np.pi * np.arange(workers) / max(workers, 1)
    circle_N2 = np.stack([np.cos(angle_N), np.sin(angle_N)], 1)
    rows = max(r for r in range(1, math.isqrt(workers) + 1) if workers % r == 0)
    if mode in ("grid", "torus") and rows > 1:
        shape = np.array([rows, workers // rows])
        cell_N2 = np.stack(np.divmod(np.arange(workers), shape[1]), 1)
        step_E2 = np.abs(cell_N2[pairs_E2[:, 0]] - cell_N2[pairs_E2[:, 1]])
        if (np.minimum(step_E2, shape - step_E2).sum(1) == 1).all():
            return cell_N2[:, ::-1] * (1.0, -1.0), True
    if mode == "star" and workers > 2 and len(pairs_E2):
        hub = int(np.bincount(pairs_E2.ravel()).argmax())
        angle = np.pi / 2 - 2 * np.pi * np.arange(workers - 1) / (workers - 1)
        return np.insert(np.stack([np.cos(angle), np.sin(angle)], 1), hub, 0.0, axis=0), False
    if mode in ("random", "nearest", "file", "grid", "torus", "tree", "line") and workers > 2:
        import networkx

        graph = networkx.empty_graph(workers)
        graph.add_edges_from(pairs_E2.tolist())
        if workers <= MOST_LABELLED_NODES * 4 and networkx.is_connected(graph):
            place = networkx.kamada_kawai_layout(graph)  # keeps nodes apart, but is cubic in N
        else:
            place = networkx.spring_layout(graph, seed=0, iterations=25)
        return np.stack([place[k] for k in range(workers)]), False
    return circle_N2, False


def node_diameter(place_N2: np.ndarray) -> float:
    """Largest readable node in points: most of the distance between neighbours on 340 points."""
    smallest, largest = 4.0, 28.0
    if len(place_N2) == 1:
        return largest
    if len(place_N2) > 2048:  # too many for the table of distances, and small in any case
        return smallest
    point_N = place_N2 @ (1, 1j)
    nearest_N = np.partition(np.abs(point_N[:, None] - point_N), 1, axis=1)[:, 1]
    few = len(place_N2) <= MOST_LABELLED_NODES  # then no two may touch
    spacing = 340 * np.quantile(nearest_N, 0 if few else 0.25) / np.ptp(place_N2, axis=0).max()
    return float(np.clip((0.85 if few else 0.6) * spacing, smallest, largest))


def draw_edges(
    axes: Axes,
    place_N2: np.ndarray,
    lines_E2: np.ndarray,
    arrows_E2: np.ndarray,
    torus: bool,
    diameter: float,
) -> str:
    """Lines and arrows between the nodes; returns what had to be left out, for the title."""
    left_out = []
    if len(arrows_E2) > MOST_ARROWS:
        lines_E2, arrows_E2 = np.concatenate([lines_E2, arrows_E2]), arrows_E2[:0]
        left_out.append("directions not drawn")
    if len(lines_E2) > MOST_EDGES:
        left_out.append(f"{MOST_EDGES:,} of {len(lines_E2):,} edges drawn")
        lines_E2 = np.random.default_rng(0).choice(lines_E2, MOST_EDGES, replace=False)
    segments_E22 = place_N2[lines_E2]
    if torus:  # an edge around the torus becomes two stubs that leave the grid
        step_E2 = segments_E22[:, 1] - segments_E22[:, 0]
        around_E = np.abs(step_E2).max(1, initial=0) > 1
        out_E2 = 0.45 * np.sign(step_E2[around_E])
        ends_E22 = segments_E22[around_E]
        stubs = [
            np.stack([ends_E22[:, 0], ends_E22[:, 0] - out_E2], 1),
            np.stack([ends_E22[:, 1], ends_E22[:, 1] + out_E2], 1),
        ]
        segments_E22 = np.concatenate([segments_E22[~around_E], *stubs])
    alpha = 0.9 if torus else min(0.7, 60 / (len(segments_E22) + 1) ** 0.75)
    axes.add_collection(LineCollection(segments_E22, colors=GREY, linewidths=1.2 if diameter > 8 else 0.6, alpha=alpha))
    look = {"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9, "alpha": 0.7, "mutation_scale": 10}
    gap = {"shrinkA": diameter / 2, "shrinkB": diameter / 2 + 1}
    for sender, receiver in arrows_E2:
        axes.add_patch(FancyArrowPatch(place_N2[sender], place_N2[receiver], **gap, **look))
    return "; ".join(left_out)
