"""Homogeneous Learning: one model walks over nodes with skewed data until it is good enough; an agent learns which node
should train it next, and is measured against policies that have learned nothing.

    python -m homogeneous                                 digits, ten nodes, in a few minutes
    python -m homogeneous --agent none                    the policies alone
    python -m homogeneous --dataset_name fashionmnist --model cnn --goal 0.7
    python -m homogeneous --paper                         the paper's world and agent (--paper --help: its defaults)

All flags of main.py that say what is trained, where and how work here too. Results: results/NAME/homogeneous/.
"""

from __future__ import annotations

from utils.command import STOPPED, begin, ready

if __name__ == "__main__":
    begin()

import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from homogeneous.args import WalkConfig
    from homogeneous.policies import Policy
    from homogeneous.world import World

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: parallel over walks, not inside operators


def main(argv: list[str] | None = None) -> int:
    """Parse, learn, measure, draw. Returns the exit code."""
    from homogeneous.args import config_class
    from utils.errors import UsageError, refusal
    from utils.parser import parse

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        config = parse(config_class(sys.argv[1:] if argv is None else argv), argv, __doc__)
        check_packages(config)
        from training.deal import with_workers
        from training.run import own_folder, run_folder

        ready()
        config = with_workers(config)
        folder = run_folder(config if config.run_name else config.training())
        with own_folder(folder):
            run(config, folder / "homogeneous")
    except (UsageError, OSError) as error:
        return refusal(error)
    except KeyboardInterrupt:
        print("interrupted; walks that have ended are kept: --resume goes on", file=sys.stderr)
        return STOPPED
    return 0


def check_packages(config: WalkConfig) -> None:
    """Raises :class:`UsageError` where an agent should learn and the packages that it needs are missing."""
    from importlib.util import find_spec

    from training.run import check_packages as check_their_packages
    from utils.errors import UsageError

    check_their_packages(config)
    missing = [name for name in ("gymnasium", "stable_baselines3") if find_spec(name) is None]
    if missing and config.agent != "none" and not config.paper:
        raise UsageError(
            f"the agent needs {' and '.join(missing)}: pip install -r requirements-homogeneous.txt (or --agent none)."
        )


def run(config: WalkConfig, folder: Path) -> dict[str, Any]:
    """Learn and measure; returns what policies.json holds."""
    from homogeneous.evaluation import compared, measured, printed
    from homogeneous.policies import ORACLES, chosen
    from homogeneous.world import World
    from training.rooms import bind_room, claim_room
    from utils.errors import UsageError
    from utils.random import derive_seed
    from utils.records import write_json

    names = chosen(config.policies)
    if "gradient" in names and (config.paper or config.optimizer != "sgd"):
        if config.policies:
            raise UsageError(f"--policies gradient differentiates steps of sgd, and these are {config.optimizer}'s.")
        names.remove("gradient")
    claim_room(config, folder)
    world = World.of(config)
    bind_room(config, world.job.identity, folder)
    policies = policies_of(config, names, world, folder)
    seeds = [derive_seed(config.seed, "measured walk", s) for s in range(config.seeds)]
    found = measured(world, policies, seeds, config.quiet)
    result = {
        **compared(found, config.seed),
        "seeds": seeds,
        "goal": config.goal,
        "max_hops": config.max_hops,
        "cost_weight": config.cost_weight,
        "metric": world.job.dataset.task.metric.name,
        "oracles": [name for name in ORACLES if name in found],
    }
    write_json(folder / "policies.json", result)
    print(printed(result))
    print(f"{config.seeds} walks each, that nobody has learned from; {folder}")
    if config.partitions:
        result["other_partitions"] = elsewhere(config, policies)
        write_json(folder / "policies.json", result)
        print(f"\non {config.partitions} other partitions of the data, which nobody has learned from, two walks each:")
        print(printed(result["other_partitions"]))
    if config.plots:
        from visualization.report import write_report
        from visualization.walks import plot_walks

        plot_walks(folder)
        print(f"report: {write_report(folder)}")
    return result


def policies_of(config: WalkConfig, names: list[str], world: World, folder: Path) -> dict[str, Policy]:
    """The policies of these names, and the agent; those that learn do so now, unless they have."""
    from homogeneous.policies import POLICIES

    policies = {name: POLICIES[name] for name in names if name in POLICIES}
    if "gradient" in names:
        policies["gradient"] = scheduled(config, world, folder)
    if config.agent != "none":
        policies["agent"] = agent = learned(config, world, folder)
        if config.paper:
            policies["agent_explores"] = agent.exploring
    return policies


def elsewhere(config: WalkConfig, policies: dict[str, Policy]) -> dict[str, Any]:
    """The same policies on other partitions of the data (but those that nobody can have)."""
    from homogeneous.evaluation import compared, measured
    from homogeneous.policies import ORACLES
    from homogeneous.world import World
    from utils.progress import bar
    from utils.random import derive_seed

    policies = {name: policy for name, policy in policies.items() if name not in ORACLES}
    found: dict[str, dict[str, list]] = {}
    with bar(config.partitions, "other partitions", "partition", config.quiet) as ticks:
        for p in range(config.partitions):
            seed = derive_seed(config.seed, "other partition", p) % 2**31
            world = World.of(dataclasses.replace(config, seed=seed))
            seeds = [derive_seed(seed, "measured walk", s) for s in range(2)]
            for name, own in measured(world, policies, seeds, quiet=True).items():
                for key, values in own.items():
                    found.setdefault(name, {}).setdefault(key, []).extend(values)
            ticks.update(1)
    return compared(found, config.seed)


def scheduled(config: WalkConfig, world: World, folder: Path) -> Policy:
    """The schedule of this folder, which is improved now where there is none."""
    from homogeneous.schedule import ROUNDS, Schedule, improved
    from utils.progress import bar
    from utils.records import read_record, write_json

    path, attempts = folder / "schedule.json", []
    if path.exists():
        return Schedule(read_record(path, "visits")["visits"])

    def told(attempt: dict[str, Any]) -> None:
        attempts.append(attempt)
        ticks.update(1)
        ticks.set_postfix(needs=f"{attempt['total']:.1f}")

    with bar(ROUNDS + 1, "a schedule follows its gradient", "attempt", config.quiet) as ticks:
        schedule = improved(world, config.seed, told)
    write_json(path, {"visits": schedule.visits, "attempts": attempts})
    return schedule


def learned(config: WalkConfig, world: World, folder: Path) -> Any:
    """The agent of this folder, which learns now where there is none."""
    from homogeneous.agent import learn, load_agent
    from homogeneous.paper import teach
    from utils.progress import bar
    from utils.records import MetricsLog

    path = folder / "agent.safetensors"
    if path.exists():
        return load_agent(path)
    log = MetricsLog(folder / "episodes.jsonl")  # a round is a walk
    done = log.read() if log.path.exists() else []

    events = None
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        events = SummaryWriter(folder / "tensorboard")

    def told(walk: dict[str, Any]) -> None:
        if walk["round"] >= len(done):
            log.append(walk)
        if events is not None:
            for name in ("return", "cost", "exploration"):
                events.add_scalar(name, walk[name], walk["round"])
            events.add_scalar("hops", len(walk["nodes"]), walk["round"])
        ticks.update(1)
        ticks.set_postfix(hops=len(walk["nodes"]), exploration=f"{walk['exploration']:.2f}")

    with bar(config.episodes, "the agent learns", "walk", config.quiet) as ticks:
        if config.paper:
            agent = teach(world, config.episodes, config.seed, done, told)
        else:
            agent = learn(world, config.episodes, config.side_by_side, config.seed, done, told)
    if events is not None:
        events.close()
    agent.save(path)
    return agent


if __name__ == "__main__":
    sys.exit(main())
