"""The most helpful and the most harmful samples themselves: pictures, series as lines, spectrograms as images.

Legend: n samples of the data set, m scored samples, T steps, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils.records import PathLike
from visualization.style import BLUE, LONGEST_LABEL, RED, plain, save, styled

LONGEST_SOURCE = 20  # letters of a folder or file name in a cell
LEAST_WIDTH = 8.0  # inches: what the headings say has to fit above few samples too
FEWEST_BANDS = 16  # features from which on a sequence is drawn as an image: a spectrogram
EACH = 16  # samples of a kind


def plot_contact_sheet(
    inputs_n: np.ndarray,
    labels_n: np.ndarray,
    scores_m: np.ndarray,
    sample_ids_m: np.ndarray,
    class_names: Sequence[str],
    out: PathLike,
    flipped: Collection[int] | None = None,
    method: str = "",
    sources: Sequence[str] | None = None,
) -> Path:
    """Draw the most helpful and the most harmful samples and write the sheet to ``out``."""
    args = inputs_n, labels_n, scores_m, sample_ids_m, class_names, flipped, method, sources
    return save(draw_contact_sheet(*args), out)


@styled
def draw_contact_sheet(
    inputs_n: np.ndarray,
    labels_n: np.ndarray,
    scores_m: np.ndarray,
    sample_ids_m: np.ndarray,
    class_names: Sequence[str],
    flipped: Collection[int] | None = None,
    method: str = "",
    sources: Sequence[str] | None = None,
    each: int = EACH,
) -> Figure:
    """The ``each`` highest-scored and lowest-scored samples, with label, score, sample id and source.

    ``inputs_n`` (pictures, uint8 [n, H, W, C] with C 1 or 3; or sequences, float [n, T, F] with NaN where nothing is
    known), ``labels_n`` (as trained on) and ``sources`` are by sample id; ``scores_m`` are those of ``sample_ids_m``.
    Samples whose id is in ``flipped`` get a thick frame.
    """
    order_m = np.argsort(-np.asarray(scores_m), kind="stable")
    order_m = order_m[np.isfinite(np.asarray(scores_m)[order_m])]
    each = min(each, len(order_m) // 2)
    shown = order_m[:each], order_m[::-1][:each]
    largest = np.abs(np.asarray(scores_m)[np.concatenate(shown)]).max(initial=0)
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    scale = rf" in $10^{{{power}}}$" if power else ""

    paint, painted = _painter(inputs_n, np.asarray(sample_ids_m)[np.concatenate(shown)])
    columns = int(np.clip(each, 4, 8))
    cell, heading, margin = (1.5 if sources else 1.2), 0.6, 0.1  # inches; known sizes, so no layout is searched
    named = [_two_lines(sources[sample_ids_m[i]]) for i in np.concatenate(shown)] if sources else []
    caption = 0.155 * (2 + max(map(len, named), default=0)) + 0.08
    block = heading + -(-each // columns) * (cell + caption)
    width, height = max(LEAST_WIDTH, margin + columns * cell), 2 * block + margin
    figure = Figure(figsize=(width, height), layout="none")
    by = f", {plain(method, LONGEST_LABEL)}" if method else ""
    for top, picked, title in zip((height, height - block), shown, ("Most helpful", "Most harmful"), strict=True):
        framed = "; framed: flipped label" if flipped else ""
        where = ", source (whole paths: stage1/sources.txt)" if sources else ""
        text = f"{title} samples{by}{painted}\nlabel, sample id, score{scale}{where}{framed}"
        figure.text(margin / width, (top - margin) / height, text, va="top", fontsize=11)
        for place, i in enumerate(picked):
            row, column = divmod(place, columns)
            x, y = margin + column * cell, top - heading - (row + 1) * (cell + caption) + margin
            side, sample = cell - margin, int(sample_ids_m[i])
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            paint(axes, inputs_n[sample])
            if flipped is not None and sample in flipped:
                look = {"fill": False, "color": RED, "linewidth": 5, "clip_on": False}
                axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **look))
            score = f"{scores_m[i] / 10.0**power:+.2f}".replace("-", "−")
            lines = [plain(class_names[labels_n[sample]]), f"#{sample}  {score}"]
            lines += _two_lines(sources[sample]) if sources else []
            axes.set_title("\n".join(lines), fontsize=9, loc="center", pad=5)
    return figure


Paint = Callable[[Axes, np.ndarray], None]


def _painter(inputs_n: np.ndarray, ids_k: np.ndarray) -> tuple[Paint, str]:
    """What draws one of these samples, on scales that they all share, and what there is to say about it."""
    if inputs_n.ndim == 4:
        return _picture, ""
    shown_kTF = inputs_n[ids_k]
    if inputs_n.shape[2] >= FEWEST_BANDS:
        low, high = _limits(shown_kTF)
        return (lambda axes, sample_TF: _spectrogram(axes, sample_TF, low, high)), "; steps to the right, features up"
    low, high = _limits(shown_kTF[..., 0])
    room = 0.05 * (high - low)
    steps = inputs_n.shape[1]
    said = f"; first feature over {steps} steps, all from {low:.3g} to {high:.3g}".replace("-", "−")
    return (lambda axes, sample_TF: _curve(axes, sample_TF[:, 0], low - room, high + room)), said


def _limits(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _picture(axes: Axes, image_HWC: np.ndarray) -> None:
    axes.axis("off")
    image = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _curve(axes: Axes, value_T: np.ndarray, low: float, high: float) -> None:
    """A series: what is known, joined; dots where steps are few enough to tell apart."""
    step_k = np.flatnonzero(np.isfinite(value_T))
    dots = {"marker": "o", "markersize": 2.5} if len(value_T) <= 32 or len(step_k) == 1 else {}
    axes.plot(step_k, value_T[step_k], color=BLUE, linewidth=1.2, **dots)
    axes.set(xlim=(-0.5, len(value_T) - 0.5), ylim=(low, high), xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#CCCCCC")


def _spectrogram(axes: Axes, value_TF: np.ndarray, low: float, high: float) -> None:
    """Time to the right, features upwards; what is padding or unknown stays white."""
    axes.axis("off")
    image_FT = np.ma.masked_invalid(value_TF.T)
    axes.imshow(image_FT, cmap="magma", vmin=low, vmax=high, origin="lower", aspect="auto", interpolation="nearest")


def _two_lines(source: str) -> list[str]:
    """A path as its folder, of which the end tells most, and its file name, cut to what a cell has room for."""
    folder, slash, name = source.rpartition("/")
    folder = f"…{folder[1 - LONGEST_SOURCE :]}" if len(folder) > LONGEST_SOURCE else folder
    return [*([plain(folder + slash, LONGEST_SOURCE + 1)] if slash else []), plain(name, LONGEST_SOURCE)]
