"""All policies on walks that nobody has learned from: how many hops, how far, did they arrive, and how much less than
a random policy needs.

A walk that does not arrive counts as twice the most hops (PAR2, as solvers are compared), so that staying at home is no
way to look good. (With --paper it counts as the hops it made, as there.)

Legend: S measured walks, the same for every policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from homogeneous.policies import ORACLES, Policy, run
from homogeneous.world import Walking, World
from utils.influence.statistics import mean_interval
from utils.progress import bar
from utils.random import numpy_rng

RESAMPLES = 2000
PENALTY = 2  # times the most hops: what a walk counts that does not arrive
COMPARED = ("hops", "cost", "total")


def record(walking: Walking) -> dict[str, list]:
    """What the walks of a policy came to, a value each: ``hops`` as made, ``counted`` hops (PAR2), ``cost`` (distance),
    ``total`` = counted hops + weight x distance, whether they ``reached`` the goal, and where they went."""
    rules, reached_S = walking.rules, walking.reached_M()
    penalty = 1 if walking.world.published else PENALTY
    counted_S = np.where(reached_S, walking.hop_M, penalty * rules.max_hops)
    return {
        "hops": walking.hop_M.tolist(),
        "counted": counted_S.tolist(),
        "cost": walking.cost_M.tolist(),
        "total": (counted_S + rules.cost_weight * walking.cost_M).tolist(),
        "reached": reached_S.tolist(),
        "nodes": walking.nodes,
        "figures": [[values[0] for values in measured] for measured in walking.measured],
    }


def measured(
    world: World, policies: dict[str, Policy], seeds: Sequence[int], quiet: bool
) -> dict[str, dict[str, list]]:
    """The :func:`record` of every policy, a walk of every seed."""
    found = {}
    for name, policy in policies.items():
        with bar(len(seeds) * world.rules.max_hops, f"walking: {name}", "hop", quiet) as ticks:
            found[name] = record(run(world, policy, seeds, ticks.update))
    return found


def compared(found: dict[str, dict[str, list]], seed: int) -> dict[str, Any]:
    """The records, how much less than a random policy each needs, and the agent than each."""
    others = [name for name in found if name != "agent" and "agent" in found]
    agent = {name: reduction(found["agent"], found[name], seed) for name in others}
    less = reductions(found, "random", seed) if "random" in found else {}
    return {"policies": found, "reduction": less, "agent_reduction": agent}


def printed(result: dict[str, Any]) -> str:
    """What of :func:`compared` is shown: the table, and what the agent adds."""
    notes = {name: f"  ({why})" for name, why in ORACLES.items()}
    lines = [table(result["policies"], result["reduction"], notes)]
    if result["agent_reduction"]:
        lines.append(verdict(result["agent_reduction"]))
        if "random" in result["agent_reduction"]:
            arrived = float(np.mean(result["policies"]["agent"]["reached"]))
            lines.append(f"{against_random(result['agent_reduction']['random'])} ({arrived:.0%} of its walks arrive)")
    return "\n".join(lines)


def against_random(less: dict[str, Any]) -> str:
    """The two figures of the paper, which has -50.8 and -74.6 %."""
    parts = []
    for key, what in (("hops", "hops"), ("cost", "distance")):
        low, high = less[f"{key}_interval"]
        parts.append(f"{what} {-less[key]:+.1%} [{-high:+.1%}, {-low:+.1%}]")
    return f"the agent against a random policy: {', '.join(parts)}"


def reductions(policies: dict[str, dict[str, list]], against: str, seed: int) -> dict[str, dict[str, Any]]:
    """:func:`reduction` of every policy against one of them."""
    return {name: reduction(own, policies[against], seed) for name, own in policies.items() if name != against}


def reduction(own: dict[str, list], other: dict[str, list], seed: int) -> dict[str, Any]:
    """By which share a policy needs less than another, of the mean over walks, with 95 % intervals: walks are drawn
    anew in pairs that start alike (bootstrap)."""
    draws = numpy_rng(seed, "bootstrap").integers(len(own["hops"]), size=(RESAMPLES, len(own["hops"])))
    found = {}
    for figure in COMPARED:
        own_S, other_S = (np.array(p["counted" if figure == "hops" else figure], float) for p in (own, other))
        found[figure] = float(_share(own_S.mean(), other_S.mean()))
        drawn = _share(own_S[draws].mean(1), other_S[draws].mean(1))
        found[f"{figure}_interval"] = np.quantile(drawn, (0.025, 0.975)).tolist()
    return found


def verdict(agent: dict[str, dict[str, Any]]) -> str:
    """What the agent adds, in words, from its :func:`reduction` against each policy."""
    words = {"needs less than": [], "cannot be told from": [], "needs more than": []}
    for name, less in agent.items():
        low, high = less["total_interval"]
        word = "needs less than" if low > 0 else "needs more than" if high < 0 else "cannot be told from"
        words[word].append(f"{name} ({less['total']:+.0%} [{low:+.0%}, {high:+.0%}])")
    said = [f"{word} {', '.join(names)}" for word, names in words.items() if names]
    return f"hops + weighted distance: the agent {'; '.join(said)}"


def _share(own: Any, other: Any) -> Any:
    """1 - own / other; where the other needs nothing, 0."""
    return 1 - np.divide(own, other, out=np.ones_like(np.asarray(other, float)), where=np.asarray(other) > 0)


def table(policies: dict[str, dict[str, list]], reduction: dict[str, dict[str, Any]], notes: dict[str, str]) -> str:
    """What is printed: a line a policy."""
    head = f"{'policy':14s} {'hops':>14s} {'median':>6s} {'arrived':>8s} {'distance':>9s} {'hops + cost':>16s}"
    lines = [f"{head}  less than random"]
    for name, own in policies.items():
        (hops, low_hops, _), (total, low_total, _) = mean_interval(own["counted"]), mean_interval(own["total"])
        less = ""
        if name in reduction:
            low, high = reduction[name]["total_interval"]
            less = f"{reduction[name]['total']:+.1%} [{low:+.1%}, {high:+.1%}]"
        lines.append(
            f"{name:14s} {hops:6.1f} ± {hops - low_hops:5.1f} {np.median(own['counted']):6.1f} "
            f"{np.mean(own['reached']):8.0%} {np.mean(own['cost']):9.3f} {total:8.1f} ± {total - low_total:5.1f}  "
            f"{less}{notes.get(name, '')}"
        )
    return "\n".join(lines)
