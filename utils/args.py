"""The command line and the configuration it makes: one line a flag.

Every flag is a field of a frozen dataclass, with its default, its group in ``--help``, its help and
its check. ``parse`` turns argv into the dataclass; ``--config FILE`` starts from a recorded run's
config.json. To add a flag, add a field.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from utils.errors import UsageError, unknown_name
from utils.files import check_text
from utils.recorded import LARGEST, read_recorded, recorded_fields, recorded_files

C = TypeVar("C", bound="Config")
Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda v: v > 0, "must be greater than 0")
NOT_NEGATIVE: Check = (lambda v: v >= 0, "must be 0 or greater")
FRACTION: Check = (lambda v: 0 < v < 1, "must be between 0 and 1, both excluded")
BELOW_ONE: Check = (lambda v: 0 <= v < 1, "must be at least 0 and below 1")
PIXELS: Check = (lambda v: 1 <= v <= 4096, "must be from 1 to 4096 pixels")
SHARE: Check = (lambda v: 0 < v <= 1, "must be above 0 and at most 1")
SEEDS: Check = (lambda v: 1 <= v <= 10_000, "must be from 1 to 10000")  # more are a mistake in typing, days later

DATASET_NAMES = ("digits", "svhn", "cifar10", "cifar100", "tinyimagenet", "fashionmnist", "imagefolder")
MODEL_NAMES = ("squeezenet", "shufflenet", "resnet18", "resnet34", "resnet50", "cnn", "cnn_smooth", "mlp", "mlp_smooth")
MODES = ("ring", "all", "exponential", "exponential_one_peer", "grid", "star", "random", "file")
SCHEDULES = ("constant", "multistep", "exponential", "cosine")
PARTITIONS = ("dirichlet", "preference", "shards", "iid")
PROTOCOL_NAMES = ("gossip", "local", "fedavg", "fedasync", "chained")
CHAIN_ORDERS = ("fixed", "random", "shortest")


def flag(
    default: Any,
    group: str,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    check: Check | None = None,
    numeric: bool = True,
) -> Any:
    """A field of a Config. ``numeric``: whether it changes the numbers of a run; paths, verbosity and
    plots do not, and are left out when two configurations are compared."""
    metadata = {"group": group, "help": help, "choices": choices, "check": check, "numeric": numeric}
    if isinstance(default, list):
        raise TypeError("use a tuple")
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. config.json holds it; ``--config`` replays it."""

    # data
    dataset_name: str = flag("digits", "data", "data set", choices=DATASET_NAMES)
    dataset_path: str | None = flag(None, "data", "where its files are (default: ./datasets/NAME)", numeric=False)
    image_size: int | None = flag(None, "data", "resize images to this many pixels a side", check=PIXELS)
    node_datasize: int | None = flag(None, "data", "samples a worker takes, with --nonIID", check=POSITIVE)
    download: bool = flag(False, "data", "fetch missing data sets", numeric=False)
    val_fraction: float = flag(0.1, "data", "share of train kept for validation, stratified", check=FRACTION)
    max_train: int | None = flag(
        None, "data", "keep so many training samples, stratified, once validation is split off", check=POSITIVE
    )
    augment: str = flag(
        "auto", "data", "auto crops and flips natural colour images", choices=("auto", "none", "crop", "crop_flip")
    )
    flip_labels: float = flag(0.0, "data", "flip this share of the training labels to test the scores", check=BELOW_ONE)
    bad_data: str | None = flag(None, "data", "COUNT:label_flip or COUNT:noise: the data of so many workers is bad")
    drop_samples: str | None = flag(None, "data", "file of sample ids that get weight 0; nothing else changes")
    keep_samples: str | None = flag(
        None, "data", "file of sample ids: shards keep only these, and train as many steps as before (pruning)"
    )

    # partition
    dirichlet: bool | None = flag(None, "partition", "split each class over workers by Dirichlet(alpha) [the default]")
    nonIID: bool | None = flag(None, "partition", "each worker draws its own class mix; --no-nonIID: IID")
    partition: str | None = flag(None, "partition", "name the partition instead", choices=PARTITIONS)
    alpha: float = flag(0.8, "partition", "Dirichlet concentration: small is more skewed", check=POSITIVE)
    min_shard: int = flag(10, "partition", "smallest shard that --dirichlet accepts", check=NOT_NEGATIVE)
    self_balancing: bool = flag(False, "partition", "--dirichlet gives no more to workers that have their share")
    shards_per_worker: int = flag(2, "partition", "label shards a worker gets, with --partition shards", check=POSITIVE)

    # model
    model: str = flag("cnn", "model", "network", choices=MODEL_NAMES)
    pretrained: bool = flag(False, "model", "start from ImageNet weights")
    init: str = flag(
        "common", "model", "one initialization for all workers, or one each", choices=("common", "per_worker")
    )

    # topology
    mode: str = flag("ring", "topology", "who averages with whom", choices=MODES)
    topology_file: str | None = flag(None, "topology", "edge list or matrix, with --mode file (row = receiver)")
    num_workers: int = flag(8, "topology", "how many workers train", check=POSITIVE)
    local_steps: int = flag(1, "topology", "SGD steps between two gossip steps", check=POSITIVE)

    # faults
    aggregation: str = flag(
        "mean",
        "faults",
        "how gossip combines rows; the others survive bad senders",
        choices=("mean", "median", "trimmed_mean", "clipped"),
    )
    byzantine: str | None = flag(
        None, "faults", "COUNT:sign_flip, COUNT:noise or COUNT:nan: workers that send bad rows"
    )
    on_bad_worker: str = flag(
        "stop", "faults", "a worker whose loss or row is not finite: stop, or isolate it", choices=("stop", "isolate")
    )

    # protocols
    fraction_fit: float = flag(
        1.0, "protocols", "fedavg: share of the workers that the server samples a round", check=SHARE
    )
    local_epochs: int = flag(
        1, "protocols", "fedavg, fedasync, chained: passes over its shard that a worker makes", check=POSITIVE
    )
    server_momentum: float = flag(0.0, "protocols", "fedavg: momentum of the server", check=BELOW_ONE)
    keep_momentum: bool = flag(
        False, "protocols", "fedavg, fedasync: a worker keeps its momentum when it gets a new model"
    )
    async_alpha: float = flag(0.6, "protocols", "fedasync: weight of an arriving model", check=SHARE)
    staleness_exponent: float = flag(0.5, "protocols", "fedasync: a of (staleness + 1)^-a", check=NOT_NEGATIVE)
    buffer_size: int = flag(1, "protocols", "fedasync: models the server averages at a time (FedBuff)", check=POSITIVE)
    chain_order: str = flag("fixed", "protocols", "chained: who is next", choices=CHAIN_ORDERS)
    speed_spread: float = flag(
        0.0, "protocols", "virtual time: deviation of the logarithm of workers' speed", check=NOT_NEGATIVE
    )
    step_ms: float = flag(10.0, "protocols", "virtual time: milliseconds of a local step at speed 1", check=POSITIVE)
    latency_ms: float = flag(0.0, "protocols", "virtual time: latency of a link", check=NOT_NEGATIVE)
    bandwidth_mbps: float | None = flag(
        None, "protocols", "virtual time: megabit per second of a link (default: infinite)", check=POSITIVE
    )
    finetune: int = flag(
        0, "protocols", "local epochs that every worker adapts the final model to its own shard", check=NOT_NEGATIVE
    )
    finetune_head: bool = flag(False, "protocols", "--finetune trains the last layer only")

    # optimization
    epochs: float = flag(40, "optimization", "passes over the training data", check=POSITIVE)
    batch_size: int = flag(32, "optimization", "samples a worker takes a step", check=POSITIVE)
    lr: float = flag(0.05, "optimization", "learning rate", check=POSITIVE)
    momentum: float = flag(0.9, "optimization", "SGD momentum", check=BELOW_ONE)
    wd: float = flag(5e-4, "optimization", "weight decay", check=NOT_NEGATIVE)
    scheduler: str = flag("cosine", "optimization", "learning rate over rounds", choices=SCHEDULES)
    gamma: float = flag(
        0.1, "optimization", "factor of multistep (a milestone) and exponential (an epoch)", check=SHARE
    )
    warmup_step: int = flag(0, "optimization", "rounds of linear warm-up", check=NOT_NEGATIVE)
    milestones: tuple[float, ...] = flag(
        (), "optimization", "epochs where multistep multiplies by gamma (default: 50 %% and 75 %%)"
    )
    max_rounds: int | None = flag(
        None, "optimization", "stop after so many rounds, though the schedule is longer", check=POSITIVE
    )
    patience: int = flag(
        0, "optimization", "stop after so many evaluations without a better loss (0: never)", check=NOT_NEGATIVE
    )
    min_delta: float = flag(0.0, "optimization", "what counts as better", check=NOT_NEGATIVE)

    # machine
    device: str = flag("auto", "machine", "auto, cpu, cuda or cuda:K", numeric=False)
    amp: bool = flag(False, "machine", "mixed precision (bfloat16)")
    tf32: bool = flag(True, "machine", "convolutions of a GPU in TensorFloat-32, PyTorch's default; --no-tf32: float32")
    dtype: str = flag("float32", "machine", "precision of parameters", choices=("float32", "float64"))
    seed: int = flag(0, "machine", "everything random derives from it", check=NOT_NEGATIVE)
    seeds: int = flag(
        1,
        "machine",
        "run so many seeds (seed, seed + 1, ...) and report mean and deviation",
        check=SEEDS,
        numeric=False,
    )
    deterministic: bool = flag(
        False, "machine", "refuse GPU kernels whose result may vary from run to run", numeric=False
    )
    threads: int | None = flag(None, "machine", "threads (default: one a core)", check=POSITIVE, numeric=False)
    engine: str = flag(
        "auto",
        "machine",
        "how steps are executed; auto follows a rule, measure times them once (graph: on a GPU)",
        numeric=False,
        choices=("auto", "measure", "threads", "loop", "vmap", "graph"),
    )
    channels_last: bool | None = flag(
        None, "machine", "memory layout of convolutions (default: channels_last)", numeric=False
    )
    batch_parts: int | None = flag(
        None,
        "machine",
        "parts that each batch is cut into, side by side where fewer workers train than there are threads (default: "
        "by a rule of shapes and counts)",
        check=POSITIVE,
        numeric=False,
    )

    # run
    protocol: str = flag("gossip", "run", "who trains, and who averages with whom", choices=PROTOCOL_NAMES)
    results_dir: str = flag("results", "run", "folder of all runs", numeric=False)
    run_name: str | None = flag(None, "run", "folder of this run (default: made of its main settings)", numeric=False)
    config: str | None = flag(None, "run", "start from a recorded config.json; flags override it", numeric=False)
    resume: bool = flag(False, "run", "go on from the last checkpoint, or start", numeric=False)
    overwrite: bool = flag(False, "run", "replace the run if it exists", numeric=False)
    checkpoint_every: int | None = flag(
        None, "run", "rounds between checkpoints (default: at most one a minute)", check=POSITIVE, numeric=False
    )
    eval_every: int | None = flag(
        None,
        "run",
        "rounds between evaluations (default: an epoch, or more where "
        "evaluating would cost more than its share of the training)",
        check=POSITIVE,
    )
    plots: bool = flag(True, "run", "draw the plots at the end", numeric=False)
    tensorboard: bool = flag(False, "run", "write TensorBoard events too", numeric=False)
    quiet: bool = flag(False, "run", "no progress bars", numeric=False)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, meta = getattr(self, f.name), f.metadata
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, str):
                    check_text(f"--{f.name}", number)
                if isinstance(number, float) and not math.isfinite(number):
                    raise UsageError(f"--{f.name} is {number}: it must be a finite number.")
                if isinstance(number, int | float) and abs(number) >= LARGEST:
                    raise UsageError(f"--{f.name} is {number}: it must be below {LARGEST:.0e}.")
            if value is not None and meta["choices"] and value not in meta["choices"]:
                raise unknown_name(f"--{f.name}", str(value), meta["choices"])
            if value is not None and meta["check"] and not meta["check"][0](value):
                raise UsageError(f"--{f.name} is {value}: it {meta['check'][1]}.")
        self.check()

    def check(self) -> None:
        """Settings that do not go together."""
        if self.mode == "file" and not self.topology_file:
            raise UsageError("--mode file needs --topology_file FILE (an edge list or a matrix).")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite contradict each other: choose one.")
        if list(self.milestones) != sorted(self.milestones) or any(m <= 0 for m in self.milestones):
            raise UsageError("--milestones must be increasing epochs greater than 0.")

        robust = self.aggregation != "mean" or self.byzantine is not None or self.on_bad_worker == "isolate"
        if robust and self.protocol != "gossip":
            raise UsageError(
                "--aggregation, --byzantine and --on_bad_worker isolate are about gossip: leave out "
                f"--protocol {self.protocol}."
            )

    @property
    def partition_kind(self) -> str:
        """The partition that --partition, --dirichlet and --nonIID ask for together."""
        if self.partition:
            return self.partition
        if self.dirichlet or (self.dirichlet is None and self.nonIID is None):
            return "dirichlet"
        return "preference" if self.nonIID else "iid"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def numeric(self) -> dict[str, Any]:
        """The fields that change the numbers of a run (what 'the same configuration' means)."""
        values = self.to_json()
        return {f.name: values[f.name] for f in dataclasses.fields(self) if f.metadata["numeric"]}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names on which two ``numeric()`` dictionaries differ; a name that one lacks counts only
    if the other is not at its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    return [k for k in sorted({*a, *b}) if a.get(k, plain.get(k)) != b.get(k, plain.get(k))]


def parse(config_class: type[C], argv: Sequence[str] | None, description: str) -> C:
    """argv as a ``config_class``. Raises :class:`UsageError` on bad values (argparse itself exits with
    code 2 on unknown flags)."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(f.metadata["group"] for f in fields)}
    for f in fields:
        _add(groups[f.metadata["group"]], f, hints[f.name])
    given = vars(parser.parse_args(argv))
    if "config" not in given:
        return config_class(**given)
    record = read_recorded(given["config"])
    config = config_class(**{**recorded_fields(given["config"], record, hints), **given})
    return dataclasses.replace(config, **recorded_files(given["config"], record, config, given))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message} (--help lists all flags)")


def _add(group: Any, f: dataclasses.Field, hint: Any) -> None:
    """One flag. Nothing is stored unless the user gives it, so that --config can be overridden."""
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += f": {', '.join(f.metadata['choices'])}"
    if f.default not in (None, (), False):
        text += f" [{f.default}]"
    kinds = [k for k in typing.get_args(hint) if k is not types.NoneType] or [hint]
    common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
    if typing.get_origin(hint) is tuple:
        group.add_argument(f"--{f.name}", nargs="+", type=_number(typing.get_args(hint)[0]), action=_Tuple, **common)
    elif kinds[0] is bool:
        names = [f"--{f.name}", f"--no-{f.name}"]
        group.add_argument(*names, action=_Boolean, nargs="?", metavar="True|False", **common)
    else:
        group.add_argument(f"--{f.name}", type=_number(kinds[0]), metavar=kinds[0].__name__.upper(), **common)


def _number(kind: type) -> Callable[[str], Any]:
    if kind is str:
        return str

    def convert(text: str) -> Any:
        return kind(text)

    convert.__name__ = {int: "whole number", float: "number"}.get(kind, kind.__name__)
    return convert


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class _Boolean(argparse.Action):
    """``--flag``, ``--no-flag`` and ``--flag True|False``."""

    def __call__(self, parser, namespace, values, option_string=None):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        negated = option_string.startswith("--no-")
        if values is None:
            value = True
        elif values.lower() in words and not negated:
            value = words[values.lower()]
        else:
            parser.error(f"{option_string}: '{values}' is neither True nor False")
        setattr(namespace, self.dest, value != negated)
