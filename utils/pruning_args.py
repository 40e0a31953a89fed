"""The flags of ``main_pruned.py`` on top of those of ``main.py``."""

from __future__ import annotations

from dataclasses import dataclass

from utils.args import Config
from utils.errors import UsageError
from utils.flags import FRACTION, NOT_NEGATIVE, POSITIVE, SHARE, Check, check_cluster, flag
from utils.registry import INFLUENCE, NETWORKS

METHODS = (*INFLUENCE, "noprune")
STAGE: Check = (lambda v: v in (1, 2), "must be 1 (train) or 2 (score, prune, retrain)")
RANKED: Check = (lambda v: v >= 3, "must be 3 or greater: a rank correlation needs points")


@dataclass(frozen=True)
class PruningConfig(Config):
    """A training configuration, and what to do with the trained run."""

    stage: int = flag(
        2,
        "pruning",
        "1: train and keep what scoring needs; 2: score, prune, train again on what is kept, compare "
        "(trains stage 1 first if it has not been)",
        check=STAGE,
        changes_results=False,
    )
    pruning_algorithm: str | None = flag(
        None,
        "pruning",
        "how samples are scored for pruning (default: cascade, or none with --audit, --smoothness, --sweep or --edges)",
        choices=METHODS,
        changes_results=False,
    )
    train_ratio: float = flag(
        0.95, "pruning", "share of the training samples to keep", check=SHARE, changes_results=False
    )
    choose_ratio: tuple[float, ...] = flag(
        (), "pruning", "shares to choose from instead of --train_ratio, as in 0.95 0.9 0.85 0.75 0.6: the one by which "
        "parts of the validation set gain most that had no say in it, and all where none gains for sure; each costs a "
        "retraining a part", check=FRACTION, changes_results=False,
    )
    prune_steps: int = flag(
        1, "pruning", "prune in so many steps: score, prune a little, train again, score again; each costs a training "
        "and its scores", check=POSITIVE, changes_results=False,
    )
    val_folds: int = flag(
        1, "pruning", "prune by scores in units of their own noise over so many parts of the validation set, each a "
        "scoring: what a small validation set cannot tell is kept", check=POSITIVE, changes_results=False,
    )
    control: bool = flag(
        True,
        "pruning",
        "train a random pruning of the same size beside stage 2, and say whether the scores did better",
        changes_results=False,
    )
    prune_scope: str = flag(
        "worker",
        "pruning",
        "keep the best samples of each worker, or of all workers together",
        choices=("worker", "global"),
        changes_results=False,
    )
    model_A: str | None = flag(
        None, "pruning", "network of stage 1, which scores (default: --model)", choices=NETWORKS,
        changes_results=False,
    )
    model_B: str | None = flag(
        None, "pruning", "network of stage 2 (default: that of stage 1)", choices=NETWORKS, changes_results=False
    )
    stage1_dir: str | None = flag(
        None,
        "pruning",
        "score this finished run (results/NAME/stage1); what follows is put beside it",
        changes_results=False,
        metavar="FOLDER",
    )
    stage2_epochs: float | None = flag(
        None,
        "pruning",
        "epochs of stage 2, each with as many steps as one of stage 1 (default: as many as stage 1 made)",
        check=POSITIVE,
        changes_results=False,
    )
    sweep: tuple[float, ...] = flag(
        (),
        "pruning",
        "shares to keep, as in 0.9 0.6 0.2: prune to each of them by each of --methods, and plot the accuracies",
        check=SHARE,
        changes_results=False,
    )
    methods: tuple[str, ...] = flag(
        tuple(INFLUENCE),
        "pruning",
        "methods that --audit and --sweep compare",
        choices=INFLUENCE,
        changes_results=False,
    )

    dice_hops: int = flag(
        1, "influence", "dice: gossip steps over which a sample's influence is followed", check=POSITIVE,
        changes_results=False,
    )
    dice_rounds: int = flag(
        5, "influence", "dice: steps of the run that are scored, evenly spaced", check=POSITIVE, changes_results=False
    )
    delete_checkpoints: int = flag(
        10, "influence", "delete: states of the run that are scored, evenly spaced", check=POSITIVE,
        changes_results=False,
    )
    target: str = flag(
        "nodes",
        "influence",
        "whose validation loss: nodes (the mean over all), consensus (of their mean model) or worker:K; if and "
        "delete look at one model, the mean one for the nodes",
        changes_results=False,
    )
    edges: bool = flag(
        False, "influence", "tell what every edge of the graph did to --target in every round (docs/algorithms.md)",
        changes_results=False,
    )
    memory_gb: float = flag(
        4.0,
        "influence",
        "gigabytes for states of the run held at once, and for retrainings side by side",
        check=POSITIVE,
        changes_results=False,
    )

    audit: bool = flag(
        False, "audit", "check the scores: retrain without random groups of samples, and compare", changes_results=False
    )
    smoothness: bool = flag(
        False, "audit", "tell whether scores can be trusted before any is computed: switch samples off in two halves, "
        "and see whether the weights move straight (metasmoothness; an audit tells it, too)", changes_results=False,
    )
    audit_groups: int = flag(40, "audit", "groups, each a retraining", check=RANKED, changes_results=False)
    audit_fraction: float = flag(
        0.05, "audit", "share of the training samples in each group", check=FRACTION, changes_results=False
    )
    audit_seed: int = flag(0, "audit", "seed that draws the groups", check=NOT_NEGATIVE, changes_results=False)
    cluster: str | None = flag(
        None,
        "audit",
        "retrain elsewhere: local:K for K processes here, slurm:K for K jobs, tcp://HOST:PORT or tls://HOST:PORT for a "
        "Dask scheduler, recipes for files that you run (python -m training.job)",
        changes_results=False,
        metavar="ADDRESS",
    )

    @property
    def prunes_by(self) -> str | None:
        """The method that prunes for stage 2; None where only an audit, a sweep or the like was asked for."""
        others = self.audit or self.smoothness or self.sweep or self.edges
        return self.pruning_algorithm or (None if others else "cascade")

    @property
    def chooses(self) -> bool:
        """Whether the share to keep is chosen: by scores, of one method."""
        return bool(self.choose_ratio) and self.prunes_by not in (None, "random", "noprune")

    def check(self) -> None:
        """Settings that do not go together."""
        super().check()
        check_cluster(self.cluster)
        check_target(self.target, self.num_workers)


def check_target(target: str, num_workers: int | None) -> None:
    """Raises :class:`UsageError` unless ``target`` is nodes, consensus or worker:K."""
    if target in ("nodes", "consensus"):
        return
    kind, _, worker = target.partition(":")
    most = 10**6 if num_workers is None else num_workers  # as many as there are owners, once they are counted
    if kind != "worker" or not worker.isdecimal() or int(worker) >= most:
        raise UsageError(
            f"unknown influence target '{target}': use nodes, consensus or worker:K with K from 0 to {most - 1}."
        )
