"""``--edges``: what every edge of the graph did in every round, kept in influence/edges.zarr.

Legend: T rounds, E edges.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.pruning import Stage1
from training.scores import sound_scores
from utils.influence.cascade import ticks
from utils.influence.edges import Edges, edges
from utils.progress import bar
from utils.scores import EDGES, write_scores


def edges_for(stage1: Stage1) -> tuple[Path, Edges]:
    """Where they are kept, and what they are: read if they are of this run and objective, else computed and written."""
    settings = {
        "target": stage1.config.target,
        "run": stage1.job.identity["digest"],
        "rounds": stage1.run.rounds,
        "final_state": stage1.final_state,
    }
    path = stage1.folder / "influence" / "edges.zarr"
    if path.exists():
        kept = sound_scores(path, ("helped",), EDGES)
        if kept is not None and kept["settings"] == settings:
            return path, Edges(kept["helped"], kept["receiver"], kept["sender"])
    with bar(ticks(stage1.run), "edges", "tick", stage1.config.quiet) as shown:
        found = edges(stage1.run, stage1.config.target, shown.update)
    arrays = {"helped": found.helped_TE, "receiver": found.receiver_E, "sender": found.sender_E}
    path.parent.mkdir(exist_ok=True)
    write_scores(path, arrays, settings, ("helped",), EDGES)
    return path, found


def edges_said(stage1: Stage1) -> str:
    """The edges in two lines, once they are computed and written."""
    path, found = edges_for(stage1)
    if not found.helped_TE.size:
        return f"edges: there are none ({path})"
    total_E = found.helped_TE.sum(0)
    best, worst = int(total_E.argmax()), int(total_E.argmin())

    def named(e: int) -> str:
        return f"{found.sender_E[e]} -> {found.receiver_E[e]} ({total_E[e]:+.3g})"

    return (
        f"edges: {np.mean(total_E > 0):.0%} of {len(total_E)} helped over the {len(found.helped_TE)} rounds, together "
        f"they changed the validation loss by {-total_E.sum():+.3g} to first order ({path})\n"
        f"  most: {named(best)}; least: {named(worst)}"
    )
