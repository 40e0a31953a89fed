"""What a cut of a network gives away, as a picture: the share of the inputs that a probe rebuilds by the depth of the
cut, and some inputs as it rebuilds them.

Legend: K cuts, m inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from utils.records import PathLike
from visualization.style import BLUE, GREY, plain, save, style

MOST_ROWS = 12  # cuts whose rebuilt inputs are shown


def plot_leak(record: dict[str, Any], shown: Sequence[Tensor], path: PathLike) -> Path:
    """Draw the record of ``python -m benchmarks.leak``. ``shown``: some inputs [m, C, H, W], then what each cut gives
    back of them; no pictures where inputs are none."""
    with style():
        return save(draw_leak(record, shown), path)


def draw_leak(record: dict[str, Any], shown: Sequence[Tensor]) -> Figure:
    """Left the curve, right the inputs."""
    cuts, pictures = record["cuts"], bool(shown) and shown[0].dim() == 4
    figure = Figure(figsize=(10 if pictures else 5.5, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2)) if pictures else (figure.subplots(), None)
    for name, colour in (("untrained", GREY), ("trained", BLUE)):
        means, lows, highs = zip(*(cut["intervals"][name] for cut in cuts), strict=True)
        left.plot(range(len(cuts)), means, "o-", color=colour, label=name, markersize=4)
        left.fill_between(range(len(cuts)), lows, highs, color=colour, alpha=0.2, linewidth=0)
    names = [f"{plain(cut['before'])}\n{plain(cut['layer'])}\n{cut['floats']:,}" for cut in cuts]
    step = max(1, -(-len(cuts) // 12))
    left.set_xticks(range(0, len(cuts), step), names[::step], fontsize=8)
    left.set(xlabel="what the second stage begins with, and how many floats cross",
             ylabel="share of the inputs' variance", ylim=(min(0.0, left.get_ylim()[0]), 1.02),
             title=f"What a linear probe rebuilds from the activations of {plain(record['model'])}")  # fmt: skip
    left.legend()
    if right is not None:
        _show(right, shown, [cut["before"] for cut in cuts])
    return figure


def _show(axes: Axes, shown: Sequence[Tensor], names: Sequence[str]) -> None:
    """The inputs in the first row, what each cut gives back of them in one below it."""
    step = max(1, -(-(len(shown) - 1) // MOST_ROWS))
    low, high = float(shown[0].min()), float(shown[0].max())
    gap = max(1, shown[0].shape[2] // 8)
    rows = [np.pad(row.double().numpy(), [(0, 0), (0, 0), (gap, 0), (gap, 0)], constant_values=low)
            for row in (shown[0], *shown[1::step])]  # fmt: skip
    sheet = np.concatenate([np.concatenate(list(row), axis=-1) for row in rows], axis=-2)
    picture = np.clip((sheet - low) / (high - low or 1.0), 0, 1)
    axes.imshow(picture[0] if len(picture) != 3 else picture.transpose(1, 2, 0), cmap="gray_r", vmin=0, vmax=1)
    height = rows[0].shape[2]
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], ["inputs", *map(plain, names[::step])])
    axes.set(xticks=[], title="and what it looks like")
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
