"""The flags of ``python -m homogeneous`` on top of those of ``main.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from utils.args import SCHEDULES, Config
from utils.errors import UsageError
from utils.flags import NOT_NEGATIVE, POSITIVE, flag
from utils.registry import NETWORKS, PARTITIONS, TOPOLOGIES

AGENTS = ("dqn", "none")


@dataclass(frozen=True)
class WalkConfig(Config):
    """What the walking model, the nodes and their data are, and how the agent learns and is measured."""

    protocol: str = flag("chained", "protocols", "a walk is chained training", choices=("chained",))
    num_workers: int | None = flag(
        None, "topology", "nodes (default: 10, or all owners with --partition natural)", check=POSITIVE
    )
    mode: str = flag("all", "topology", "who may follow whom", choices=TOPOLOGIES)
    model: str = flag("mlp", "model", "network", choices=NETWORKS)
    partition: str | None = flag("dirichlet", "partition", "the partition by its name", choices=PARTITIONS)
    alpha: float = flag(0.3, "partition", "--partition dirichlet: the smaller, the more nodes differ", check=POSITIVE)
    min_shard: int = flag(5, "partition", "--partition dirichlet: fewest samples of a node", check=NOT_NEGATIVE)
    lr: float = flag(0.02, "optimization", "learning rate", check=POSITIVE)
    scheduler: str = flag("constant", "optimization", "learning rate over the hops", choices=SCHEDULES)
    seeds: int = flag(
        10, "run", "walks of every policy that are measured; the agent has learned from none of them", check=POSITIVE,
        changes_results=False,
    )

    goal: float = flag(0.8, "walk", "a walk ends where its model's metric on the validation samples is as good as this")
    max_hops: int = flag(36, "walk", "a walk ends after so many hops", check=POSITIVE)
    distances: str = flag(
        "random",
        "walk",
        "what a hop between two nodes costs: random (the paper's draw), even (1 each), or a file with a matrix",
        metavar="WHAT",
    )
    cost_weight: float = flag(
        10.0, "walk", "hops that a distance of 1 is worth: policies are compared by hops + weight x distance",
        check=NOT_NEGATIVE,
    )
    agent: str = flag("dqn", "walk", "who learns", choices=AGENTS, changes_results=False)
    episodes: int = flag(120, "walk", "walks that the agent learns from", check=POSITIVE)
    side_by_side: int = flag(8, "walk", "walks at a time while the agent learns", check=POSITIVE)
    policies: tuple[str, ...] = flag((), "walk", "policies that are measured (default: all)", changes_results=False)
    partitions: int = flag(
        5, "walk", "other partitions of the data, on which all are measured too in two walks each",
        check=NOT_NEGATIVE, changes_results=False,
    )

    paper: bool = flag(False, "walk", "the world and the agent of the paper, as published (homogeneous/paper.py)")

    def __post_init__(self) -> None:
        if self.num_workers is None and self.partition != "natural":
            object.__setattr__(self, "num_workers", 10)
        super().__post_init__()

    def training(self) -> Config:
        """The chained run of ``max_hops`` hops that a walk is."""
        return self.plain(epochs=self.max_hops * self.local_epochs / self.num_workers, seeds=1)

    def check(self) -> None:
        """Settings that do not go together."""
        super().check()
        if self.paper != isinstance(self, PaperConfig):
            raise UsageError("--paper goes with a record of a run with --paper, and with no other.")
        if self.paper:
            corrupted = [name for name in ("flip_labels", "worker_flips", "bad_data") if getattr(self, name)]
            if corrupted or self.partition != "iid":
                raise UsageError(
                    f"--{(corrupted or ['partition'])[0]}: the nodes and data of --paper are the paper's: leave it out."
                )
            if "gradient" in self.policies:
                raise UsageError(
                    "--policies gradient differentiates walks that hand their momentum on (with --optimizer sgd), "
                    "and nodes of --paper keep theirs: leave one out."
                )
        if self.dp_noise is not None:
            raise UsageError("--dp_noise is for training (main.py --protocol chained), where epsilon is counted.")
        if self.paper and self.partitions:
            raise UsageError("--partitions: the paper has one (leave out --paper, or --partitions).")
        if self.num_workers is not None and self.num_workers < 2:
            raise UsageError("--num_workers 1: a walk needs two nodes at least.")


def _instead(name: str, value: object) -> object:
    """The flag with another default."""
    return dataclasses.field(default=value, metadata=WalkConfig.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class PaperConfig(WalkConfig):
    """The flags under ``--paper``: what the paper has is the default."""

    paper: bool = _instead("paper", True)
    model: str = _instead("model", "cnn_20_50")
    image_size: int | None = _instead("image_size", 28)
    partition: str | None = _instead("partition", "iid")  # the paper's shards take its place
    optimizer: str = _instead("optimizer", "adam")
    lr: float = _instead("lr", 1e-3)
    eps: float = _instead("eps", 1e-7)
    wd: float = _instead("wd", 0.0)
    augment: str = _instead("augment", "none")
    cost_weight: float = _instead("cost_weight", 1.0)
    partitions: int = _instead("partitions", 0)
    test_samples: int = flag(
        2000, "walk", "the goal is looked at on the first N test samples (which the paper does, and nobody should)",
        check=POSITIVE,
    )


def config_class(words: Sequence[str]) -> type[WalkConfig]:
    """Of these words of a command line."""
    return PaperConfig if any(word.split("=")[0] == "--paper" for word in words) else WalkConfig
