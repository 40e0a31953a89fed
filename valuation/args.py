"""The flags of ``python -m valuation`` on top of those of ``main.py``."""

from __future__ import annotations

from dataclasses import dataclass

from utils.args import SCHEDULES, Config
from utils.errors import UsageError
from utils.flags import NOT_NEGATIVE, POSITIVE, flag, where
from utils.registry import NETWORKS, PARTITIONS, VALUATIONS

MOST_EXACT = 12  # institutions whose coalitions are all trained
# Flags of main.py that coalitions do not know, and what they must be.
PLAIN = {"init": "common", "drop_samples": None, "finetune": 0, "tensorboard": False, "log": (), "ledger": None,
         "on_bad_worker": "stop"}  # fmt: skip


@dataclass(frozen=True)
class ValuationConfig(Config):
    """Who the institutions are, how they train together, and by what methods their data are valued."""

    protocol: str = flag("fedavg", "protocols", "institutions train by federated averaging", choices=("fedavg",))
    server_weights: str = flag(
        "equal", "protocols", "institutions are averaged alike, whatever their size", choices=("equal",)
    )
    num_workers: int | None = flag(
        None, "topology", "institutions (default: 4, or all owners with --partition natural)", check=POSITIVE
    )
    model: str = flag("mlp", "model", "network", choices=NETWORKS)
    partition: str | None = flag("dirichlet", "partition", "the partition by its name", choices=PARTITIONS)
    alpha: float = flag(0.5, "partition", "--partition dirichlet: the smaller, the more institutions differ",
                        check=POSITIVE)  # fmt: skip
    epochs: float = flag(60, "optimization", "rounds at most (an epoch of an institution each)", check=POSITIVE)
    scheduler: str = flag("constant", "optimization", "learning rate over the rounds", choices=SCHEDULES)
    patience: int = flag(
        10, "optimization", "a coalition stops after N rounds without a better validation loss; 0: never",
        check=NOT_NEGATIVE,
    )  # fmt: skip

    valuations: tuple[str, ...] = flag(
        (), "valuation", "methods (default: all)", choices=VALUATIONS, changes_results=False
    )
    truth: bool = flag(
        True, "valuation", f"retrain all coalitions (above {MOST_EXACT} institutions those of --orders): what methods "
        "are measured by", changes_results=False,
    )
    orders: int = flag(
        20, "valuation", f"above {MOST_EXACT} institutions: random orders in which they join, that the truth is "
        "estimated from", check=POSITIVE, changes_results=False,
    )
    cluster: str | None = flag(
        None, "valuation", "train coalitions elsewhere: local:K processes here, slurm:K jobs, a Dask scheduler's "
        "tcp:// or tls://, or recipes that you run", changes_results=False,
    )
    cluster_options: str | None = flag(
        None, "valuation", "--cluster slurm:K: a YAML file with queue, memory, walltime, job_extra_directives",
        changes_results=False, metavar="FILE",
    )
    feature_layer: str | None = flag(
        None, "valuation", "ddval, knn_game, heads: features are the output of this layer, such as features of "
        "densenet121, instead of the input of the last one", metavar="NAME",
    )
    knn: int = flag(3, "valuation", "ddval: nearest neighbours", check=POSITIVE)
    feature_noise: float = flag(
        0.0, "valuation", "ddval, knn_game, heads: noise on the features that institutions share, in deviations of "
        "each", check=NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        if self.num_workers is None and self.partition != "natural":
            object.__setattr__(self, "num_workers", 4)
        super().__post_init__()

    def training(self) -> Config:
        """The federated run of all institutions."""
        return self.plain(seeds=1)

    def check(self) -> None:
        """Settings that do not go together."""
        super().check()
        if self.num_workers is not None and self.num_workers < 2:
            raise UsageError("--num_workers 1: values need two institutions at least.")
        where(self.cluster, self.cluster_options)
        for name, plain in PLAIN.items():
            if getattr(self, name) != plain:
                raise UsageError(f"--{name} is not for coalitions: leave it out.")
        if self.fraction_fit != 1 or self.server_momentum:
            raise UsageError("--fraction_fit and --server_momentum: here all members take part, and none has momentum.")
