"""What ``python -m homogeneous`` found, as pictures: how the agent learned, all policies side by side, and one walk.

Reads policies.json and episodes.jsonl. Legend: N nodes, E learned walks, S measured walks of a policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.records import MetricsLog, PathLike, read_record, spelled
from visualization.style import BLUE, GREY, RED, save, style

WINDOW = 10  # walks that a mean of the learning curve is over


def plot_walks(folder: PathLike) -> list[Path]:
    """All pictures of a results folder, written into ``plots`` in it. Raises UsageError of damaged records."""
    folder, record = Path(folder), read_record(Path(folder, "policies.json"), "policies", "goal", "max_hops", "metric")
    plots, written = folder / "plots", []
    plots.mkdir(exist_ok=True)
    log = MetricsLog(folder / "episodes.jsonl")
    with style():
        if log.path.exists() and (lines := log.read()):
            written.append(save(draw_learning(lines, record), plots / "learning.png"))
        written.append(save(draw_policies(record), plots / "policies.png"))
        written.append(save(draw_walk(record), plots / "walk.png"))
    return written


def draw_learning(lines: list[dict[str, Any]], record: dict[str, Any]) -> Figure:
    """Hops and return of every walk that the agent learned from, and how much it still tried at random."""
    figure = Figure(figsize=(9, 3.4))
    hops_axes, return_axes = figure.subplots(1, 2)
    hops_E = np.array([len(walk["nodes"]) for walk in lines])
    return_E = np.array([walk["return"] for walk in lines], float)
    for axes, values_E, name in ((hops_axes, hops_E, "hops"), (return_axes, return_E, "return")):
        axes.plot(values_E, ".", color=GREY, markersize=4)
        if len(values_E) >= WINDOW:
            mean_E = np.convolve(values_E, np.ones(WINDOW) / WINDOW, "valid")
            axes.plot(np.arange(WINDOW - 1, len(values_E)), mean_E, color=BLUE, linewidth=2)
        axes.set(xlabel="walk", ylabel=name)
    hops_axes.yaxis.get_major_locator().set_params(integer=True)
    hops_axes.set_title(f"What the agent learned from (line: mean of {WINDOW})")
    rate_axes = return_axes.twinx()
    rate_axes.plot([w["exploration"] for w in lines], color=RED, linestyle="--", linewidth=1)
    rate_axes.set(ylim=(0, 1.05), ylabel="share of random hops")
    rate_axes.yaxis.label.set_color(RED)
    rate_axes.grid(False)
    return figure


def draw_policies(record: dict[str, Any]) -> Figure:
    """Hops, distance and both together of every policy: each walk a dot, the mean a bar."""
    policies = record["policies"]
    order = sorted(policies, key=lambda name: -np.mean(policies[name]["total"]))
    figure = Figure(figsize=(11, 1.2 + 0.36 * len(order)))
    panels = {"counted": "hops (not arrived: twice the most)", "cost": "distance", "total": "hops + weighted distance"}
    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for y, name in enumerate(order):
            values_S, reached_S = np.array(policies[name][key], float), np.array(policies[name]["reached"], bool)
            colour = RED if name == "agent" else GREY if name in record.get("oracles", ()) else BLUE
            axes.barh(y, values_S.mean(), color=colour, alpha=0.35)
            axes.plot(values_S[reached_S], np.full(reached_S.sum(), y), "o", color=colour, markersize=3)
            axes.plot(values_S[~reached_S], np.full((~reached_S).sum(), y), "x", color=colour, markersize=5)
        axes.set(xlabel=label, ylim=(-0.6, len(order) - 0.4))
        axes.grid(axis="y", visible=False)
    axes = figure.axes[0]
    labels = [name.replace("_", " ") + " *" * (name in record.get("oracles", ())) for name in order]
    axes.set_yticks(range(len(order)), labels)
    count = len(next(iter(policies.values()))["hops"])
    goal = f"{spelled(record['metric'])} {record['goal']:g} on validation samples"
    title = f"{count} walks each to {goal}; x: not arrived; *: cannot be had (looks ahead, or has all data at one node)"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def draw_walk(record: dict[str, Any]) -> Figure:
    """One walk of the agent (or of the best policy) and the metric along it."""
    policies = record["policies"]
    name = "agent" if "agent" in policies else min(policies, key=lambda name: np.mean(policies[name]["total"]))
    nodes, figures = policies[name]["nodes"][0], policies[name]["figures"][0]
    N = 1 + max(max(walk, default=0) for policy in policies.values() for walk in policy["nodes"])
    angle_N = np.pi / 2 - 2 * np.pi * np.arange(N) / N
    x_N, y_N = np.cos(angle_N), np.sin(angle_N)
    figure = Figure(figsize=(10, 4.2))
    graph, curve = figure.subplots(1, 2, width_ratios=(1, 1.5))
    visits_N = np.bincount(nodes, minlength=N)
    for a, b in zip([0, *nodes], nodes, strict=False):
        if a != b:
            graph.annotate("", (x_N[b], y_N[b]), (x_N[a], y_N[a]), arrowprops={
                "arrowstyle": "-|>", "color": GREY, "alpha": 0.5, "shrinkA": 12, "shrinkB": 12,
                "connectionstyle": "arc3,rad=0.12"})  # fmt: skip
    graph.scatter(x_N, y_N, 180 + 60 * visits_N, color=[BLUE if v else "#DDDDDD" for v in visits_N], zorder=3)
    for k in range(N):
        colour = "white" if visits_N[k] else "black"
        graph.text(x_N[k], y_N[k], str(k), ha="center", va="center", color=colour, zorder=4)
    graph.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
    graph.axis("off")
    graph.set_title(f"A walk of {name.replace('_', ' ')}: larger nodes trained more often")
    curve.plot(range(len(figures)), figures, "o-", color=BLUE, markersize=3)
    curve.axhline(record["goal"], color=RED, linestyle="--", linewidth=1)
    for hop, node in enumerate(nodes, 1):
        place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
        curve.annotate(str(node), (hop, figures[hop]), fontsize=7, color=GREY, **place)
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.set(xlabel="hop (numbers: the node that trained)", ylabel=spelled(record["metric"]))
    curve.set_title("and what its model was worth (dashed: the goal)")
    return figure
