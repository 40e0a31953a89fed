"""What a model predicts of the test set: values against what came, areas by finding.

Legend: m test samples, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from visualization.measures import Shown
from visualization.style import BLACK, BLUE, GREY, RED, note, plain, styled

MOST_PANELS = 4  # outputs of a regression that get a panel, evenly spread
MOST_DOTS = 2_000  # above it dots become a density
MOST_NAMED_FINDINGS = 60
VIEW = (0.002, 0.998)  # quantiles that axes show: a single storm must not shrink the rest


@styled
def draw_predicted(targets_m2C: np.ndarray, predicted_mC: np.ndarray, shown: Shown | None = None) -> Figure:
    """A panel an output: predicted against actual values of the test set, with the error of the model and of the
    forecast to beat; and the errors of all outputs where there are several.

    ``targets_m2C``: values (NaN: unknown) and the forecast to beat. Dashed: predicted = actual.
    """
    shown = shown or Shown()
    actual_mC, forecast_mC = targets_m2C[:, 0], targets_m2C[:, 1]
    outputs = actual_mC.shape[1]
    names = shown.outputs if len(shown.outputs) == outputs else tuple(f"output {c}" for c in range(outputs))
    picked = np.unique(np.linspace(0, outputs - 1, min(outputs, MOST_PANELS)).round().astype(int))
    figure = Figure(figsize=(max(5.6, 3.3 * len(picked) + 3.0 * (outputs > 1) + 0.9), 4.0))
    panels = figure.subplots(1, len(picked) + (outputs > 1), squeeze=False)[0]
    picture = None
    for axes, c in zip(panels, picked, strict=False):
        known_m = np.isfinite(actual_mC[:, c]) & np.isfinite(predicted_mC[:, c])
        dots = _against(axes, actual_mC[known_m, c], predicted_mC[known_m, c])
        picture = picture or dots
        axes.set(xlabel=f"actual{shown.metric.units}", ylabel=f"predicted{shown.metric.units}")
        rmse = [_rmse(of_mC[:, c], actual_mC[:, c]) for of_mC in (predicted_mC, forecast_mC)]
        axes.set_title(f"{plain(names[c], 24)}\nRMSE {_number(rmse[0])}, to beat {_number(rmse[1])}")
    if picture is not None:
        figure.colorbar(picture, ax=panels[len(picked) - 1], label="test samples", shrink=0.9)
    if outputs > 1:
        model_C, forecast_C = (
            [_rmse(of_mC[:, c], actual_mC[:, c]) for c in range(outputs)] for of_mC in (predicted_mC, forecast_mC)
        )
        _errors(panels[-1], model_C, forecast_C, names, shown)
    rmse, to_beat = (_rmse(of_mC, actual_mC) for of_mC in (predicted_mC, forecast_mC))
    unit = plain(shown.metric.unit) if shown.metric.unit else ""
    said = f"RMSE {_number(rmse, '.4g')} {unit}".rstrip()
    if np.isfinite(to_beat):
        both_mC = np.where(np.isfinite(forecast_mC), actual_mC, np.nan)
        skill = 1 - (_rmse(predicted_mC, both_mC) / to_beat) ** 2 if to_beat > 0 else float("nan")
        said += f"; the forecast to beat {_number(to_beat, '.4g')} {unit}".rstrip()
        said += f" (skill {_number(skill, '.3f')})"
    figure.suptitle(f"Predicted and actual values of {len(actual_mC):,} test samples: {said}", x=0.01, ha="left",
                    fontsize=11)  # fmt: skip
    return figure


def _against(axes: Axes, actual_k: np.ndarray, predicted_k: np.ndarray):
    """Dots, or their density, which is returned for its scale; both axes alike."""
    if not len(actual_k):
        note(axes, "no value is known")
        return None
    ends = np.quantile(np.concatenate([actual_k, predicted_k]), VIEW if len(actual_k) > MOST_DOTS else (0, 1))
    pad = 0.04 * np.ptp(ends) or 1.0
    low, high = ends[0] - pad, ends[1] + pad
    dots = None
    if len(actual_k) > MOST_DOTS:
        dots = axes.hexbin(actual_k, predicted_k, gridsize=44, extent=(low, high, low, high), cmap="Blues",
                           norm=LogNorm(), mincnt=1, linewidths=0.1)  # fmt: skip
    else:
        axes.scatter(actual_k, predicted_k, s=14, color=BLUE, alpha=float(np.clip(60 / len(actual_k), 0.25, 0.8)),
                     linewidths=0)  # fmt: skip
    axes.plot([low, high], [low, high], color=BLACK, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.set(xlim=(low, high), ylim=(low, high))
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return dots


def _errors(axes: Axes, model_C: list[float], forecast_C: list[float], names: tuple[str, ...], shown: Shown) -> None:
    """The error of each output, of the model and of the forecast to beat."""
    place_C = np.arange(len(model_C))
    axes.plot(place_C, forecast_C, "X--", color=GREY, markersize=6, label="forecast to beat")
    axes.plot(place_C, model_C, "o-", color=RED, markersize=6, label="model")
    highest = np.nanmax([*model_C, *forecast_C, 0]) if np.isfinite([*model_C, *forecast_C]).any() else 1.0
    axes.set(ylim=(0, 1.25 * (highest or 1.0)), ylabel=f"RMSE{shown.metric.units}", title="By output")
    step = -(-len(names) // 6)
    axes.set_xticks(place_C[::step], [plain(name) for name in names[::step]])
    if max(len(name) for name in names) > 3:
        for label in axes.xaxis.get_ticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.4, len(model_C) - 0.6)
    axes.legend(loc="upper left", ncols=2, columnspacing=1.0, handlelength=1.6)


def _rmse(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Over what is known; NaN where nothing is."""
    squares = (predicted - actual) ** 2
    known = squares[np.isfinite(squares)]
    return float(np.sqrt(known.mean())) if len(known) else float("nan")


def _number(value: float, how: str = ".3g") -> str:
    return f"{value:{how}}".replace("-", "−") if np.isfinite(value) else "unknown"


@styled
def draw_areas(area_by_finding: Mapping[str, float]) -> Figure:
    """A bar a finding, the best on top: the area under its ROC curve on the test set; dashed: their mean, dotted: what
    chance gives. NaN: the test set has one kind of sample only."""
    names, areas = list(area_by_finding), np.array(list(area_by_finding.values()), dtype=float)
    order = np.argsort(np.where(np.isfinite(areas), -areas, np.inf), kind="stable")
    count, known = len(names), areas[np.isfinite(areas)]
    figure = Figure(figsize=(6.4, float(np.clip(1.5 + 0.27 * count, 2.6, 12))))
    axes = figure.subplots()
    axes.barh(np.arange(count), areas[order], height=0.8 if count <= MOST_NAMED_FINDINGS else 1, color=BLUE)
    axes.axvline(0.5, color=GREY, linewidth=1.2, linestyle=":", label="chance")
    if len(known):
        axes.axvline(known.mean(), color=BLACK, linewidth=1.2, linestyle=(0, (4, 2)), label=f"mean {known.mean():.3f}")
    axes.set(xlim=(0, 1), ylim=(count - 0.4, -0.6), xlabel="AUROC on the test set, higher is better")
    axes.set_title("AUROC by finding, consensus model")
    axes.grid(False, axis="y")
    if count <= MOST_NAMED_FINDINGS:
        axes.set_yticks(range(count), [plain(names[k], 30) for k in order])
        axes.tick_params(axis="y", left=False)
        for row, area in enumerate(areas[order]):
            text = f"{area:.3f}" if np.isfinite(area) else "one kind only"
            axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", size=9)
    else:
        axes.set(yticks=[], ylabel=f"{count:,} findings, the best on top")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
