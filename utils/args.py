"""The command line and the configuration it makes: one line a flag.

Every flag is a field of a frozen dataclass, with its default, its group in ``--help``, its help and
its check. ``utils.parser.parse`` turns argv into the dataclass; ``--config FILE`` starts from a recorded run's
config.json. To add a flag, add a field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from utils.contradictions import check_together
from utils.flags import (
    BELOW_ONE,
    BITS,
    FRACTION,
    NOT_ABOVE_ONE,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    SEEDS,
    SHARE,
    check_fields,
    flag,
)
from utils.registry import CHAIN_ORDERS, DATASETS, NETWORKS, OPTIMIZERS, PARTITIONS, PROTOCOLS, TOPOLOGIES

COMPRESSIONS = ("none", "top_k", "random_k", "sign", "quantize")
SCHEDULES = ("constant", "multistep", "exponential", "cosine")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. config.json holds it; ``--config`` replays it."""

    # data
    dataset_name: str = flag("digits", "data", "data set", choices=DATASETS)
    dataset_path: str | None = flag(
        None, "data", "where its files are (default: ./datasets/NAME)", changes_results=False, metavar="FOLDER"
    )
    image_size: int | None = flag(None, "data", "resize images to N x N pixels (default: as they are)", check=PIXELS)
    history: int = flag(14, "data", "time series: steps that a sample shows", check=POSITIVE)
    horizon: int = flag(3, "data", "time series: steps ahead that are predicted", check=POSITIVE)
    sound_seconds: float = flag(3.0, "data", "sound: seconds of a clip that are heard", check=POSITIVE)
    node_datasize: int | None = flag(
        None, "data", "with --nonIID: samples that each worker takes (default: an equal part of all)", check=POSITIVE
    )
    download: bool = flag(False, "data", "fetch the data set where its files are missing", changes_results=False)
    val_fraction: float = flag(
        0.1, "data", "share of the training data kept for validation, of each class alike", check=FRACTION
    )
    max_train: int | None = flag(
        None, "data", "train on N samples, of each class alike; the validation share is taken before", check=POSITIVE
    )
    augment: str = flag(
        "auto",
        "data",
        "random crops and flips of training pictures (auto: both for photographs in colour), noise or masks of "
        "training sequences",
        choices=("auto", "none", "crop", "crop_flip", "noise", "mask"),
    )
    flip_labels: float = flag(
        0.0, "data", "give this share of the training samples a wrong label, to test the scores", check=BELOW_ONE
    )
    worker_flips: tuple[float, ...] = flag(
        (), "data", "give these shares of each worker's training samples a wrong label", check=NOT_ABOVE_ONE
    )
    bad_data: str | None = flag(
        None,
        "data",
        "bad data at COUNT of the workers, as in 2:label_flip (wrong labels) or 2:noise (pictures of noise)",
        metavar="COUNT:KIND",
    )
    drop_samples: str | None = flag(
        None, "data", "sample ids that get weight 0, all else being as it was", metavar="FILE"
    )
    keep_samples: str | None = flag(
        None, "data", "sample ids: train on these alone, for as many steps as on all (pruning)", metavar="FILE"
    )

    # partition
    dirichlet: bool | None = flag(
        None, "partition", "split each class over the workers by Dirichlet(alpha): the default"
    )
    nonIID: bool | None = flag(None, "partition", "each worker draws a class mix of its own; --no-nonIID: all alike")
    partition: str | None = flag(
        None,
        "partition",
        "the partition by its name (preference: --nonIID; natural: a worker for each owner of data)",
        choices=PARTITIONS,
    )
    alpha: float = flag(
        0.8, "partition", "--dirichlet: concentration; the smaller, the more the workers differ", check=POSITIVE
    )
    min_shard: int = flag(10, "partition", "--dirichlet: fewest samples that a worker may get", check=NOT_NEGATIVE)
    self_balancing: bool = flag(False, "partition", "--dirichlet: no more for a worker that has its share")
    sizes: tuple[float, ...] = flag(
        (), "partition", "--partition sizes: how much each worker has against the others, as in 1 2 4", check=POSITIVE
    )
    shards_per_worker: int = flag(
        2, "partition", "--partition shards: pieces of the data, sorted by label, that a worker gets", check=POSITIVE
    )

    # model
    model: str = flag("cnn", "model", "network", choices=NETWORKS)
    pretrained: bool = flag(False, "model", "start from ImageNet weights (not for cnn and mlp)")
    init: str = flag("common", "model", "one start for all workers, or one each", choices=("common", "per_worker"))

    # topology
    mode: str = flag("ring", "topology", "who averages with whom", choices=TOPOLOGIES)
    topology_file: str | None = flag(
        None, "topology", "--mode file: an edge list, or a mixing matrix (row = receiver)", metavar="FILE"
    )
    neighbors: int = flag(3, "topology", "--mode nearest: workers that each is linked to at least", check=POSITIVE)
    base_neighbors: int = flag(1, "topology", "--mode base: most workers that each talks to in a round", check=POSITIVE)
    torus: tuple[int, ...] = flag((), "topology", "--mode torus: its sizes, as in 2 4 4", check=POSITIVE)
    branches: int = flag(2, "topology", "--mode tree: workers below each", check=POSITIVE)
    num_workers: int = flag(
        None,
        "topology",
        "how many workers train (default: 8; with --partition natural one for each owner)",
        check=POSITIVE,
    )
    local_steps: int = flag(1, "topology", "SGD steps of each worker before it averages, in a round", check=POSITIVE)

    # faults
    aggregation: str = flag(
        "mean",
        "faults",
        "how a worker combines its neighbours' models; all but mean survive bad senders",
        choices=("mean", "median", "trimmed_mean", "clipped"),
    )
    byzantine: str | None = flag(
        None, "faults", "COUNT of the workers send bad models, as in 2:sign_flip, 2:noise or 2:nan",
        metavar="COUNT:KIND",
    )  # fmt: skip
    on_bad_worker: str = flag(
        "stop", "faults", "when a worker's loss or model is no longer finite: stop the run, or go on without it",
        choices=("stop", "isolate"),
    )

    # protocols
    order: str = flag(
        "atc", "protocols", "gossip: adapt, then combine; or the other way round, both at once", choices=("atc", "cta")
    )
    qg_momentum: float = flag(
        0.9, "protocols", "qg: how much of the momentum stays, against the last move", check=BELOW_ONE
    )
    compression: str = flag("top_k", "protocols", "choco: what of a difference is sent", choices=COMPRESSIONS)
    compression_share: float = flag(0.05, "protocols", "choco, top_k and random_k: share that is sent", check=SHARE)
    compression_bits: int = flag(4, "protocols", "choco, quantize: bits a number", check=BITS)
    consensus_step: float = flag(0.3, "protocols", "choco: X of the way to the neighbours a round", check=SHARE)
    outer_lr: float = flag(0.7, "protocols", "diloco: learning rate of the outer step", check=POSITIVE)
    outer_momentum: float = flag(0.9, "protocols", "diloco: momentum of the outer step", check=BELOW_ONE)
    prox: float = flag(0.01, "protocols", "fedprox: X in the penalty (X / 2) |x - server's|^2", check=NOT_NEGATIVE)
    server_lr: float = flag(1.0, "protocols", "scaffold: learning rate of the server", check=POSITIVE)
    fraction_fit: float = flag(
        1.0, "protocols", "fedavg, fedprox, scaffold: share of the workers that the server samples", check=SHARE
    )
    local_epochs: int = flag(
        1, "protocols", "fedavg, fedprox, scaffold, fedasync, chained: epochs that a worker trains before it sends",
        check=POSITIVE,
    )
    server_weights: str = flag(
        "samples", "protocols", "fedavg, fedprox, scaffold: by what the server weighs what workers send",
        choices=("samples", "equal"),
    )
    server_momentum: float = flag(0.0, "protocols", "fedavg: momentum of the server", check=BELOW_ONE)
    keep_momentum: bool = flag(
        False, "protocols", "fedavg, fedprox, fedasync: a worker keeps its momentum when it gets a new model"
    )
    async_alpha: float = flag(0.6, "protocols", "fedasync: weight of an arriving model", check=SHARE)
    staleness_exponent: float = flag(
        0.5, "protocols", "fedasync: X in the weight (staleness + 1)^-X of a late model", check=NOT_NEGATIVE
    )
    buffer_size: int = flag(1, "protocols", "fedasync: models the server averages at a time (FedBuff)", check=POSITIVE)
    chain_order: str = flag(
        "fixed", "protocols", "chained: who is next (policy: what an agent says)", choices=CHAIN_ORDERS
    )
    policy: str | None = flag(
        None, "protocols", "--chain_order policy: an agent of python -m homogeneous (agent.safetensors)", metavar="FILE"
    )
    speed_spread: float = flag(
        0.0, "protocols", "virtual time: standard deviation of the logarithm of the workers' speeds", check=NOT_NEGATIVE
    )
    step_ms: float = flag(10.0, "protocols", "virtual time: milliseconds of a local step at speed 1", check=POSITIVE)
    latency_ms: float = flag(0.0, "protocols", "virtual time: milliseconds until a message arrives", check=NOT_NEGATIVE)
    bandwidth_mbps: float | None = flag(
        None, "protocols", "virtual time: megabits per second of a link (default: no limit)", check=POSITIVE
    )
    finetune: int = flag(
        0, "protocols", "epochs in which every worker adapts the final model to its own shard", check=NOT_NEGATIVE
    )
    finetune_head: bool = flag(False, "protocols", "--finetune: train the last layer only")

    # optimization
    epochs: float = flag(40, "optimization", "passes over the training data", check=POSITIVE)
    batch_size: int = flag(32, "optimization", "samples of a worker's SGD step", check=POSITIVE)
    lr: float = flag(0.05, "optimization", "learning rate", check=POSITIVE)
    optimizer: str = flag("sgd", "optimization", "what a local step is", choices=OPTIMIZERS)
    momentum: float = flag(0.9, "optimization", "momentum of SGD, beta1 of adam and adamw", check=BELOW_ONE)
    beta2: float = flag(0.999, "optimization", "adam, adamw: decay of the squares", check=BELOW_ONE)
    eps: float = flag(1e-8, "optimization", "adam, adamw: what is added to the root of the squares", check=POSITIVE)
    wd: float = flag(5e-4, "optimization", "weight decay", check=NOT_NEGATIVE)
    scheduler: str = flag("cosine", "optimization", "how the learning rate falls over the run", choices=SCHEDULES)
    gamma: float = flag(
        0.1, "optimization", "factor of multistep (at each milestone) and exponential (every epoch)", check=SHARE
    )
    warmup_step: int = flag(0, "optimization", "rounds in which the learning rate rises", check=NOT_NEGATIVE)
    milestones: tuple[float, ...] = flag(
        (), "optimization", "epochs at which multistep multiplies by gamma (default: at 50 %% and 75 %% of the run)",
        check=POSITIVE,
    )
    max_rounds: int | None = flag(
        None, "optimization", "stop after N rounds, though the learning rate is planned for more", check=POSITIVE
    )
    patience: int = flag(
        0, "optimization", "stop after N evaluations without a better validation loss; 0: never", check=NOT_NEGATIVE
    )
    min_delta: float = flag(
        0.0, "optimization", "--patience: a loss is better if it is lower by more than X", check=NOT_NEGATIVE
    )

    # privacy
    dp_noise: float | None = flag(
        None, "privacy", "differentially private steps (DP-SGD): deviation of the noise that a batch's gradients get, "
        "over --dp_clip (0: they are only clipped)", check=NOT_NEGATIVE,
    )
    dp_clip: float = flag(1.0, "privacy", "--dp_noise: the gradient of a sample is cut to this norm", check=POSITIVE)
    dp_delta: float | None = flag(
        None, "privacy", "--dp_noise: delta of epsilon (default: 1 / (10 n), n a worker's samples)", check=FRACTION
    )

    # machine
    device: str = flag("auto", "machine", "auto, cpu, cuda or cuda:K", changes_results=False)
    amp: bool = flag(False, "machine", "mixed precision: products in bfloat16")
    tf32: bool = flag(True, "machine", "convolutions of a GPU in TensorFloat-32, as PyTorch has it")
    dtype: str = flag("float32", "machine", "precision of parameters", choices=("float32", "float64"))
    seed: int = flag(0, "machine", "everything random derives from it", check=NOT_NEGATIVE)
    seeds: int = flag(
        1,
        "machine",
        "train N times, with the seeds --seed, --seed + 1, ..., and report mean and deviation",
        check=SEEDS,
        changes_results=False,
    )
    deterministic: bool = flag(
        False, "machine", "refuse GPU kernels whose result may vary from run to run", changes_results=False
    )
    threads: int | None = flag(
        None, "machine", "threads that train workers side by side (default: one a core)", check=POSITIVE,
        changes_results=False,
    )
    engine: str = flag(
        "auto",
        "machine",
        "how steps are executed; auto follows a rule, measure times some once, graph needs a GPU",
        changes_results=False,
        choices=("auto", "measure", "threads", "loop", "vmap", "graph"),
    )
    channels_last: bool | None = flag(
        None, "machine", "memory layout of convolutions (default: on)", changes_results=False
    )
    batch_parts: int | None = flag(
        None,
        "machine",
        "parts that each batch is cut into, side by side where fewer workers train than there are threads (default: "
        "by a rule of shapes and counts)",
        check=POSITIVE,
        changes_results=False,
    )

    # split
    stages: int = flag(
        1, "split", "stages that the network is cut into; under torchrun a process each", check=POSITIVE,
        changes_results=False,
    )
    microbatches: int = flag(
        1, "split", "--stages: parts of a batch, on which the stages work side by side", check=POSITIVE,
        changes_results=False,
    )
    schedule: str = flag(
        "gpipe", "split", "--stages: all forward passes first, or one forward, one backward, or so with two stages a "
        "process", choices=("gpipe", "1f1b", "interleaved"), changes_results=False,
    )
    split_labels: str = flag(
        "last", "split", "--stages: the end that has the labels; first: its process has the last stage too",
        choices=("last", "first"), changes_results=False,
    )
    split_at: tuple[str, ...] = flag(
        (), "split", "--stages: the module that each stage but the first begins with (default: by multiplications)",
        changes_results=False,
    )

    # run
    protocol: str = flag(
        "gossip", "run", "how workers train together (docs/algorithms.md)", choices=PROTOCOLS
    )
    results_dir: str = flag("results", "run", "folder of all runs", changes_results=False, metavar="FOLDER")
    run_name: str | None = flag(
        None, "run", "folder of this run in --results_dir (default: made of its main settings)", changes_results=False
    )
    config: str | None = flag(
        None, "run", "replay a recorded config.json; further flags override it", changes_results=False, metavar="FILE"
    )
    resume: bool = flag(
        False, "run", "go on with this run from its last checkpoint, or start it if there is none",
        changes_results=False,
    )
    overwrite: bool = flag(False, "run", "replace this run if it exists", changes_results=False)
    checkpoint_every: int | None = flag(
        None, "run", "rounds between checkpoints (default: at most one a minute)", check=POSITIVE, changes_results=False
    )
    eval_every: int | None = flag(
        None,
        "run",
        "rounds between evaluations (default: an epoch, or more where "
        "evaluating would cost more than its share of the training)",
        check=POSITIVE,
    )
    plots: bool = flag(True, "run", "draw the plots at the end", changes_results=False)
    log: tuple[str, ...] = flag(
        (), "run", "tell dashboards too (wandb: offline)", choices=("tensorboard", "wandb"), changes_results=False
    )
    tensorboard: bool = flag(False, "run", "the same as --log tensorboard", changes_results=False)
    ledger: str | None = flag(
        None, "ledger", "sign what every worker does into a ledger in FOLDER (docs/ledger.md)", metavar="FOLDER",
        changes_results=False,
    )
    ledger_keys: str | None = flag(
        None, "ledger", "private keys of the workers here, of 'python -m ledger keys' (default: new ones beside it)",
        metavar="FOLDER", changes_results=False,
    )
    ledger_every: int = flag(1, "ledger", "rounds between records", check=POSITIVE, changes_results=False)
    ledger_states: int | None = flag(
        None, "ledger", "rounds between states kept for replay (default: the root of the number of rounds)",
        check=POSITIVE, changes_results=False,
    )
    quiet: bool = flag(False, "run", "no progress bars", changes_results=False)

    def __post_init__(self) -> None:
        if self.num_workers is None and self.partition != "natural":
            object.__setattr__(self, "num_workers", 8)
        check_fields(self)
        self.check()

    def check(self) -> None:
        """Settings that do not go together."""
        check_together(self)

    @property
    def partition_kind(self) -> str:
        """The partition that --partition, --dirichlet and --nonIID ask for together."""
        if self.partition:
            return self.partition
        if self.dirichlet or (self.dirichlet is None and self.nonIID is None):
            return "dirichlet"
        return "preference" if self.nonIID else "iid"

    def plain(self, **changes: Any) -> Config:
        """The configuration of main.py that one of a room stands on, with changes."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)} | changes)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def changing_results(self) -> dict[str, Any]:
        """The fields that change the numbers of a run (what 'the same configuration' means)."""
        values = self.to_json()
        return {f.name: values[f.name] for f in dataclasses.fields(self) if f.metadata["changes_results"]}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names on which two ``changing_results()`` dictionaries differ; a name that one lacks counts only
    if the other is not at its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    return [k for k in sorted({*a, *b}) if a.get(k, plain.get(k)) != b.get(k, plain.get(k))]
