"""The stages of a network (``--stages``) as a picture: what share of the work and of the parameters each has.

Legend: S stages.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from visualization.checked import Record
from visualization.style import BLUE, GREY, plain, styled

MOST_NAMED = 24  # stages that have room for what they begin and end with


@styled
def draw_stages(stages: list[Record]) -> Figure:
    """``stages``: those of config.json."""
    shares_S = [stage.number("share") for stage in stages]
    parameters_S = [stage.count("parameters") for stage in stages]
    blocks = [stage.texts("blocks") or ["-"] for stage in stages]
    S, total = len(stages), max(1, sum(parameters_S))
    figure = Figure(figsize=(7.5, max(2.2, min(9.0, 0.6 * S + 1.4))))
    axes = figure.subplots()
    for shift, values_S, colour, name in ((-0.2, shares_S, BLUE, "multiplications of a sample"),
                                          (0.2, [p / total for p in parameters_S], GREY, "parameters")):  # fmt: skip
        bars = axes.barh([s + shift for s in range(S)], [100 * v for v in values_S], 0.38, color=colour, label=name)
        if S <= MOST_NAMED:
            axes.bar_label(bars, [f" {v:.0%}" for v in values_S], fontsize=8, color="#444444")
    if S <= MOST_NAMED:
        ends = [f"{plain(b[0])} ... {plain(b[-1])}" if len(b) > 1 else plain(b[0]) for b in blocks]
        axes.set_yticks(range(S), [f"stage {s + 1}\n{end}" for s, end in enumerate(ends)], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="% of the network", title="Where the network is cut")
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="best")
    return figure
