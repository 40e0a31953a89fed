"""What a figure is called, in which unit, whether more of it is better, and how axes and texts show it.

Records say which metric a run is measured by (checked.py reads them); nothing here or beside takes it for accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from utils.records import spelled
from visualization.style import plain

LONGEST_UNIT = 20  # letters
BRIGHT_IS_GOOD = {True: "viridis", False: "viridis_r"}  # colours of figures, by whether higher is better


@dataclass(frozen=True)
class Measure:
    """A metric, or a loss. ``name``: as in the keys of records. ``long``: what an axis calls it in full."""

    name: str
    higher_is_better: bool
    unit: str = ""
    long: str = ""

    @property
    def words(self) -> str:
        """What texts call it."""
        return plain(spelled(self.name), 40)

    @property
    def title(self) -> str:
        """The same at the beginning of a line."""
        return self.words[:1].upper() + self.words[1:]

    @property
    def is_accuracy(self) -> bool:
        """Whether it is a share of right answers, which is read as a percentage."""
        return self.name == "accuracy"

    @property
    def bounded(self) -> bool:
        """Whether 1 is the best there is (accuracy, AUROC, skill)."""
        return self.higher_is_better and not self.unit

    @property
    def units(self) -> str:
        """Its unit as axes show it, with a space before it; empty where it has none."""
        return f" ({plain(self.unit, LONGEST_UNIT)})" if self.unit else ""

    def text(self, value: float) -> str:
        """A figure without its unit."""
        return f"{value:.2%}" if self.is_accuracy else f"{value:.4g}"

    @property
    def direction(self) -> str:
        """', lower is better' where that is to be said."""
        return "" if self.higher_is_better or self.name == "loss" else ", lower is better"

    def label(self, before: str) -> str:
        """An axis' label: 'test RMSE (µg/m³), lower is better'."""
        return f"{before} {self.words}{self.units}{self.direction}"


ACCURACY = Measure("accuracy", True)
LOSSES = {
    "classification": Measure("loss", False, "nats", "cross-entropy loss"),
    "multilabel": Measure("loss", False, "nats", "binary cross-entropy loss"),
    "regression": Measure("loss", False, "standardized", "squared error loss"),
}
LOSS = LOSSES["classification"]
OTHER_LOSS = Measure("loss", False, "", "loss")


@dataclass(frozen=True)
class Shown:
    """What pictures of a run show. ``group``: what its samples are grouped by (class, finding, value); ``stratum``: the
    same as an axis says it; ``outputs``: the names of a model's outputs, where they are recorded."""

    metric: Measure = ACCURACY
    loss: Measure = LOSS
    group: str = "class"
    stratum: str = "class"
    outputs: tuple[str, ...] = ()

    @property
    def both(self) -> tuple[Measure, Measure]:
        """Loss and metric."""
        return self.loss, self.metric


GROUPS = {  # kind of task -> what samples are grouped by, in a word and in full
    "classification": ("class", "class"),
    "multilabel": ("finding", "rarest finding"),
    "regression": ("value", "mean value"),
}


def shown_of(kind: str, metric: Measure, outputs: tuple[str, ...] = ()) -> Shown:
    """What pictures of a task show."""
    group, stratum = GROUPS.get(kind, ("group", "group"))
    if kind == "regression":
        stratum += metric.units
    return Shown(metric, LOSSES.get(kind, OTHER_LOSS), group, stratum, outputs)


def number_axis(axis: Axis, measure: Measure) -> None:
    """Ticks of an axis of this measure: accuracies as percentages, others as plain numbers."""
    if measure.is_accuracy:
        axis.set_major_formatter(PercentFormatter(1))
    else:
        axis.set_major_formatter(ScalarFormatter(useOffset=False))


def metric_scale(axes: Axes, measure: Measure) -> None:
    """The y axis of a metric; one that has a best ends there."""
    low, high = axes.get_ylim()
    if measure.is_accuracy:
        axes.set_ylim(max(low, -0.01), min(high, 1.01))
    elif measure.bounded and np.isfinite(high):
        axes.set_ylim(low, max(min(high, 1.01), low + 1e-6))
    number_axis(axes.yaxis, measure)


def bytes_text(count: float) -> str:
    """A number of bytes, in a unit that suits it; empty where it is not known."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return "" if np.isnan(count) else f"{count:.3g} TB"


def setting_text(value: object) -> str:
    """The value of a flag as it is typed; empty where it has none."""
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
