"""Flags that do nothing in this configuration: one table of when each flag counts.

Only flags that were given on the command line are looked at, neither defaults nor what ``--config`` replays. One
that does nothing is warned about in a line; two that contradict each other are refused. A flag is in ``EFFECTS`` or
in ``ALWAYS``, and a test holds all flags to that. To add a flag, add it to one of them.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import UsageError

SERVERS = ("fedavg", "fedprox", "scaffold")  # whose server averages
Condition = Callable[[Any], bool]  # of a Config; rows on flags of main_pruned.py get a PruningConfig


@dataclass(frozen=True)
class Effect:
    """``flags`` count where the condition holds; ``needs`` says in words what they need, with fields of the
    configuration in braces. ``refused``: where it does not hold, the command line contradicts itself."""

    flags: tuple[str, ...]
    counts: Condition
    needs: str
    refused: bool = False


def _only(name: str, *values: Any) -> Condition:
    return lambda c: getattr(c, name) in values


def asks_graph(c: Any) -> bool:
    """Whether the protocol of a configuration asks who is whose neighbour."""
    if c.protocol == "chained":
        return c.chain_order in ("shortest", "policy")
    return c.protocol not in ("local", "diloco", *SERVERS, "fedasync")


def _model(c: Any) -> str:
    return getattr(c, "model_A", None) or c.model


def _scores(c: Any) -> bool:
    return getattr(c, "stage", 2) == 2  # rooms share some of these flags, and have no stages


def _prunes(c: Any) -> bool:
    return c.prunes_by not in (None, "noprune")


def _retrains(c: Any) -> bool:
    return c.prunes_by is not None or bool(c.sweep)


def _methods(c: Any) -> set[str | None]:
    """The methods whose scores are asked for."""
    return {c.prunes_by, *(c.methods if c.audit or c.sweep else ())}


def _scores_that_prune(c: Any) -> set[str | None]:
    return {c.prunes_by, *(c.methods if c.sweep else ())} - {"random", "noprune", None}


# Of several rows on a flag the first that does not hold speaks.
EFFECTS: tuple[Effect, ...] = (
    # data and partition
    Effect(("dataset_path",), lambda c: c.dataset_name not in ("digits", "air"), "{dataset_name} is at hand anyway"),
    Effect(
        ("download",),
        lambda c: c.dataset_name not in ("digits", "air", "elpv", "imagefolder", "audiofolder", "timeseries"),
        "there is nothing to fetch for --dataset_name {dataset_name}",
    ),
    Effect(("history", "horizon"), _only("dataset_name", "air", "timeseries"), "it is about time series"),
    Effect(("sound_seconds",), _only("dataset_name", "audiofolder"), "it is about sound"),
    Effect(
        ("dirichlet",),
        lambda c: c.partition in (None, "dirichlet") or not c.dirichlet,
        "--partition {partition} names another partition: leave one of them out",
        refused=True,
    ),
    Effect(
        ("dirichlet",),
        lambda c: c.partition != "dirichlet" or c.dirichlet,
        "--partition dirichlet asks for what --no-dirichlet switches off: leave one of them out",
        refused=True,
    ),
    Effect(
        ("nonIID",),
        lambda c: c.partition in (None, "preference") or not c.nonIID,
        "--partition {partition} names another partition: leave one of them out",
        refused=True,
    ),
    Effect(
        ("nonIID",),
        lambda c: c.partition != "preference" or c.nonIID,
        "--partition preference asks for what --no-nonIID switches off: leave one of them out",
        refused=True,
    ),
    Effect(
        ("nonIID",),
        lambda c: not (c.nonIID and c.dirichlet),
        "--dirichlet comes before it (--no-dirichlet --nonIID: each worker draws its own class mix)",
    ),
    Effect(
        ("node_datasize",),
        lambda c: c.partition_kind == "preference",
        "it needs --nonIID (without --dirichlet); --max_train takes fewer samples of all",
    ),
    Effect(
        ("alpha", "min_shard", "self_balancing"),
        lambda c: c.partition_kind == "dirichlet",
        "it is about the partition by --dirichlet",
    ),
    Effect(("sizes",), lambda c: c.partition_kind == "sizes", "it needs --partition sizes"),
    Effect(("shards_per_worker",), lambda c: c.partition_kind == "shards", "it needs --partition shards"),
    # who averages with whom
    Effect(
        ("mode", "topology_file"),
        asks_graph,
        "--protocol {protocol} asks no graph who is whose neighbour (gossip does, and chained with --chain_order "
        "shortest or policy)",
    ),
    Effect(
        ("mode", "topology_file", "aggregation"),
        lambda c: c.num_workers != 1,
        "one worker has nobody to average with",
    ),
    Effect(("neighbors",), _only("mode", "nearest"), "it needs --mode nearest"),
    Effect(("base_neighbors",), _only("mode", "base"), "it needs --mode base"),
    Effect(("torus",), _only("mode", "torus"), "it needs --mode torus"),
    Effect(("branches",), _only("mode", "tree"), "it needs --mode tree"),
    Effect(("topology_file",), _only("mode", "file"), "it needs --mode file"),
    Effect(
        ("local_steps",),
        lambda c: c.protocol not in (*SERVERS, "fedasync", "chained"),
        "--protocol {protocol} counts in --local_epochs",
    ),
    # protocols
    Effect(
        ("fraction_fit", "server_weights"),
        _only("protocol", *SERVERS),
        "it needs --protocol fedavg, fedprox or scaffold",
    ),
    Effect(("server_momentum",), _only("protocol", "fedavg", "fedprox"), "it needs --protocol fedavg or fedprox"),
    Effect(
        ("local_epochs",),
        _only("protocol", *SERVERS, "fedasync", "chained"),
        "it needs --protocol fedavg, fedprox, scaffold, fedasync or chained; --protocol {protocol} counts in "
        "--local_steps",
    ),
    Effect(
        ("keep_momentum",),
        _only("protocol", *SERVERS, "fedasync"),
        "it needs --protocol fedavg, fedprox or fedasync",
    ),
    Effect(
        ("keep_momentum",), lambda c: c.momentum > 0 or c.optimizer not in ("sgd", "nesterov"), "--momentum is 0"
    ),
    Effect(("order",), _only("protocol", "gossip"), "it needs --protocol gossip"),
    Effect(("qg_momentum",), _only("protocol", "qg"), "it needs --protocol qg"),
    Effect(("compression", "consensus_step"), _only("protocol", "choco"), "it needs --protocol choco"),
    Effect(
        ("compression_share",),
        lambda c: c.protocol == "choco" and c.compression in ("top_k", "random_k"),
        "it needs --protocol choco and --compression top_k or random_k",
    ),
    Effect(
        ("compression_bits",),
        lambda c: c.protocol == "choco" and c.compression == "quantize",
        "it needs --protocol choco and --compression quantize",
    ),
    Effect(("outer_lr", "outer_momentum"), _only("protocol", "diloco"), "it needs --protocol diloco"),
    Effect(("prox",), _only("protocol", "fedprox"), "it needs --protocol fedprox"),
    Effect(("server_lr",), _only("protocol", "scaffold"), "it needs --protocol scaffold"),
    Effect(
        ("async_alpha", "staleness_exponent", "buffer_size"),
        _only("protocol", "fedasync"),
        "it needs --protocol fedasync",
    ),
    Effect(("chain_order",), _only("protocol", "chained"), "it needs --protocol chained"),
    Effect(
        ("policy",),
        lambda c: c.protocol == "chained" and c.chain_order == "policy",
        "it needs --protocol chained --chain_order policy",
    ),
    Effect(
        ("latency_ms", "bandwidth_mbps"),
        lambda c: c.protocol != "local",
        "workers of --protocol local send nothing",
    ),
    Effect(("finetune_head",), lambda c: c.finetune > 0, "it needs --finetune EPOCHS"),
    Effect(("ledger_keys", "ledger_every", "ledger_states"), lambda c: c.ledger is not None, "it needs --ledger"),
    # optimization
    Effect(("beta2", "eps"), _only("optimizer", "adam", "adamw"), "it needs --optimizer adam or adamw"),
    Effect(
        ("gamma",),
        _only("scheduler", "multistep", "exponential"),
        "it needs --scheduler multistep or exponential, and this is {scheduler}",
    ),
    Effect(
        ("milestones",),
        _only("scheduler", "multistep"),
        "it needs --scheduler multistep, and this is {scheduler}",
    ),
    Effect(("min_delta",), lambda c: c.patience > 0, "it needs --patience EVALUATIONS"),
    # privacy
    Effect(("dp_clip",), lambda c: c.dp_noise is not None, "it needs --dp_noise"),
    Effect(("dp_delta",), lambda c: bool(c.dp_noise), "it needs a --dp_noise above 0"),
    # machine
    Effect(("tf32",), lambda c: c.device != "cpu", "it is about GPUs"),
    Effect(("amp",), lambda c: c.dtype == "float32", "PyTorch leaves --dtype {dtype} as it is"),
    Effect(
        ("channels_last",),
        lambda c: not _model(c).startswith(("mlp", "lstm", "gru")),
        "the network has no convolutions",
    ),
    Effect(("threads",), lambda c: c.engine not in ("loop", "graph"), "--engine {engine} takes one thread"),
    Effect(("threads",), lambda c: not c.device.startswith("cuda"), "a GPU is fed by one thread"),
    Effect(
        ("microbatches", "schedule", "split_at", "split_labels"), lambda c: c.stages > 1, "it needs --stages 2 or more"
    ),
    Effect(("batch_parts",), lambda c: c.stages == 1, "--microbatches cuts the batches of a split run"),
    # main_pruned.py
    Effect(
        ("stage1_dir",),
        _scores,
        "--stage 1 trains a run, and --stage1_dir takes one that is finished: leave one of them out",
        refused=True,
    ),
    Effect(
        ("stage1_dir",),
        lambda c: c.seeds == 1,
        "it is the run of one seed, and --seeds {seeds} wants several: leave one of them out",
        refused=True,
    ),
    Effect(
        ("run_name", "results_dir"),
        lambda c: getattr(c, "stage1_dir", None) is None,
        "everything is put beside --stage1_dir",
    ),
    Effect(
        ("model",),
        lambda c: getattr(c, "model_A", None) in (None, c.model),
        "--model_A {model_A} trains and scores in its place",
    ),
    Effect(
        (
            "pruning_algorithm",
            "train_ratio",
            "choose_ratio",
            "prune_steps",
            "val_folds",
            "control",
            "prune_scope",
            "model_B",
            "stage2_epochs",
            "sweep",
            "methods",
            "dice_hops",
            "dice_rounds",
            "delete_checkpoints",
            "target",
            "edges",
            "memory_gb",
            "audit",
            "smoothness",
            "audit_groups",
            "audit_fraction",
            "audit_seed",
            "cluster",
        ),
        _scores,
        "--stage 1 ends once the run is trained",
    ),  # fmt: skip
    Effect(
        ("train_ratio",),
        _prunes,
        "nothing is pruned by one method here (--pruning_algorithm METHOD does; --sweep has shares of its own)",
    ),
    Effect(
        ("choose_ratio",),
        lambda c: _prunes(c) and c.prunes_by != "random",
        "nothing is pruned by the scores of one method (--pruning_algorithm METHOD does)",
    ),
    Effect(("train_ratio",), lambda c: not getattr(c, "chooses", False), "--choose_ratio chooses it"),
    Effect(
        ("prune_steps", "val_folds"),
        lambda c: bool(_scores_that_prune(c)),
        "nothing is pruned by scores (--pruning_algorithm METHOD or --sweep does)",
    ),
    Effect(
        ("prune_scope",), lambda c: _prunes(c) or bool(c.sweep), "nothing is pruned (--pruning_algorithm METHOD does)"
    ),
    Effect(
        ("control",),
        lambda c: _prunes(c) and c.prunes_by != "random" and (c.train_ratio < 1 or c.chooses),
        "a random control is trained beside a pruning by another method, of a --train_ratio below 1",
    ),
    Effect(
        ("model_B", "stage2_epochs"),
        _retrains,
        "there is no stage 2 here (--pruning_algorithm METHOD or --sweep trains one)",
    ),
    Effect(("methods",), lambda c: c.audit or bool(c.sweep), "it needs --audit or --sweep"),
    Effect(
        ("dice_hops", "dice_rounds"),
        lambda c: "dice" in _methods(c),
        "dice is not among the methods (--pruning_algorithm dice)",
    ),
    Effect(
        ("delete_checkpoints",),
        lambda c: "delete" in _methods(c),
        "delete is not among the methods (--pruning_algorithm delete)",
    ),
    Effect(
        ("target",),
        lambda c: c.audit or getattr(c, "edges", False) or bool(_methods(c) - {"random", "noprune", None}),
        "only scores, --audit and --edges ask for an objective",
    ),
    Effect(("smoothness",), lambda c: not c.audit, "an audit tells it anyway"),
    Effect(("audit_groups",), lambda c: c.audit, "it needs --audit"),
    Effect(
        ("audit_fraction", "audit_seed", "cluster"),
        lambda c: getattr(c, "audit", True) or c.smoothness,
        "it needs --audit or --smoothness",
    ),
    Effect(
        ("overwrite",),
        lambda c: not hasattr(c, "stage") or c.stage == 1 or _retrains(c),
        "an audit replaces no run (--stage 1 --overwrite trains stage 1 again)",
    ),
)

# Flags that count in every configuration, or whose values are checked against the others elsewhere.
ALWAYS = frozenset(
    """
    dataset_name image_size val_fraction max_train augment flip_labels worker_flips bad_data drop_samples keep_samples
    partition pretrained init num_workers byzantine on_bad_worker speed_spread step_ms finetune epochs batch_size lr
    optimizer momentum wd scheduler warmup_step max_rounds patience device dtype seed seeds deterministic engine
    protocol config stages dp_noise resume checkpoint_every eval_every plots log tensorboard ledger quiet stage model_A
    """.split()
)


def check_given(config: Any, given: Mapping[str, Any]) -> None:
    """Look at the flags that were ``given`` on the command line (by name, with their values).

    Raises :class:`UsageError` where two contradict each other; warns once for each that does nothing here. (Of several
    processes that train together the first one warns.)
    """
    for row, name in without_effect(config, given):
        if row.refused:
            raise UsageError(f"{_spelt(name, given[name])} contradicts another flag: {_words(row, config)}.")
    if os.environ.get("RANK", "0") == "0":
        for row, name in without_effect(config, given):
            warnings.warn(f"{_spelt(name, given[name])} has no effect here: {_words(row, config)}", stacklevel=3)


def without_effect(config: Any, given: Mapping[str, Any]) -> Iterator[tuple[Effect, str]]:
    """The given flags that do nothing, each with the first row that says so. (A switch that is off already and is
    switched off once more does what it says.)"""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in given:
        if isinstance(given[name], bool) and given[name] == defaults[name]:
            continue
        row = next((row for row in rows_of(name) if not row.counts(config)), None)
        if row is not None:
            yield row, name


def rows_of(name: str) -> Iterable[Effect]:
    """What the table says of a flag."""
    return (row for row in EFFECTS if name in row.flags)


def _spelt(name: str, value: Any) -> str:
    return f"--no-{name}" if value is False else f"--{name}"


def _words(row: Effect, config: Any) -> str:
    return row.needs.format(**vars(config))
