"""The order that an agent gives a real run: ``main.py --protocol chained --chain_order policy --policy FILE``.

What the agent saw (the model's figures before every hop) and where it sent the model are decisions of the run:
checkpoints keep both, so that resuming goes on as if nothing had happened, and replay and influence methods read where
the model went.
"""

from __future__ import annotations

from pathlib import Path

from homogeneous.agent import Agent, load_agent
from homogeneous.world import Walking, World
from training.build import Job
from utils.errors import UsageError
from workers import distributed
from workers.worker_vision import Fleet


def decided(job: Job, hop: int) -> int:
    """Where the model went at this hop."""
    return job.decisions["visits"][hop]


def decide(fleet: Fleet, job: Job, hop: int) -> None:
    """Ask the agent, unless it was asked."""
    visits, seen = job.decisions.setdefault("visits", []), job.decisions.setdefault("seen", [])
    if hop < len(visits):
        return
    agent, walking = job.once("the agent of the walk", lambda: _begin(job))
    if hop == len(seen):
        seen.append(list(walking.walks.figures_of(fleet)))
    walking.known = {(job.config.seed, *visits[:h]): tuple(values) for h, values in enumerate(seen)}
    if walking.seeds != [job.config.seed] or len(walking.nodes[0]) > hop:
        walking.start([0], [job.config.seed])
    for node in visits[len(walking.nodes[0]) :]:
        walking.go([0], [node])
    visits.extend(agent(walking, [0]))


def check(job: Job) -> None:
    """Raises :class:`UsageError` where the agent is none, or knows other nodes."""
    job.once("the agent of the walk", lambda: _begin(job))


decided.decide, decided.check = decide, check


def _begin(job: Job) -> tuple[Agent, Walking]:
    if distributed.world() > 1:
        raise UsageError("--chain_order policy needs one process: the agent looks at the whole walk.")
    agent = load_agent(Path(job.config.policy))
    if not isinstance(agent, Agent):
        raise UsageError(f"--policy {job.config.policy}: an agent of --paper decides in the paper's world only.")
    walking = World(job, agent.rules).walks(1)
    walking.seeds = [None]  # not begun
    return agent, walking
