"""Values that each flag refuses: those that its kind and range say, or others that are written here."""

from __future__ import annotations

import dataclasses

from utils.args import Config
from utils.pruning_args import PruningConfig

HUGE = "1" + "0" * 30  # more than 64 bits
COUNT = ("0", "-1", "1.5", "many", "", "nan")  # whole numbers above 0
COUNT_OR_0 = ("-1", "1.5", "many", "", "nan")
NUMBER = ("0", "-1", "much", "", "nan", "inf", "-inf")  # above 0
NUMBER_OR_0 = ("-1", "much", "", "nan", "inf")
SHARE = ("0", "-0.1", "1.1", "half", "nan", "inf")
NAME = ("", "no-such-thing", "DIGITS", "a,b")

BAD: dict[str, tuple[str, ...]] = {
    "dataset_name": (*NAME, "cifar"),
    "image_size": (*COUNT, "3"),
    "history": COUNT,
    "horizon": COUNT,
    "ledger_every": COUNT,
    "ledger_states": COUNT,
    "sound_seconds": NUMBER,
    "neighbors": COUNT,
    "node_datasize": (*COUNT, "1000000"),
    "val_fraction": ("0", "1", "-1", "nan", "some"),
    "max_train": COUNT,
    "augment": NAME,
    "flip_labels": ("1", "-0.1", "nan", "some"),
    "worker_flips": ("1.1", "-0.1", "nan", "some", "0.1 0.2 0.3", ""),
    "stages": (*COUNT, "5", HUGE),
    "microbatches": COUNT,
    "split_at": ("9", "fc", "0", "1 3", "x y", ""),
    "bad_data": (
        "2",
        "label_flip",
        "2:",
        ":noise",
        "0:noise",
        "4:noise",
        "x:noise",
        "1:nose",
        "1.5:noise",
        "",
    ),
    "partition": NAME,
    "min_shard": (*COUNT_OR_0, "1000"),
    "sizes": ("0", "-1", "nan", "some", ""),
    "shards_per_worker": (*COUNT, "1000"),
    "model": (*NAME, "resnet", "model.safetensors"),
    "mode": (*NAME, "rings"),
    "num_workers": (*COUNT, "1000", HUGE),
    "byzantine": ("2", "2:", ":noise", "4:noise", "1:nose", "-1:noise", "x:noise"),
    "fraction_fit": SHARE,
    "server_momentum": ("1", "-0.1", "nan", "some"),
    "async_alpha": SHARE,
    "beta2": ("1", "-0.1", "nan", "some"),
    "eps": ("0", "-1", "nan", "some"),
    "momentum": ("1", "-0.1", "nan", "some"),
    "gamma": SHARE,
    "dp_delta": ("0", "1", "-1", "nan", "some"),
    "milestones": ("0", "-1", "5 3", "x", ""),
    "device": ("", "tpu", "cuda:99", "cuda:x", "cuda:-1", "meta", "gpu"),
    "dtype": (*NAME, "bfloat16"),
    "seeds": (*COUNT, "10001", HUGE),
    "protocol": (*NAME, "fedproxy"),
    "torus": ("0", "-1", "1.5", "x", ""),
    "qg_momentum": ("1", "-0.1", "nan", "some"),
    "outer_momentum": ("1", "-0.1", "nan", "some"),
    "compression_share": SHARE,
    "compression_bits": (*COUNT, "1", "17"),
    "consensus_step": SHARE,
}

BAD_PRUNING: dict[str, tuple[str, ...]] = {
    "stage": ("0", "3", "-1", "one", "1.5"),
    "pruning_algorithm": (*NAME, "cascad"),
    "train_ratio": SHARE,
    "choose_ratio": ("0", "1", "-0.5", "x", "nan", "0.9 2", ""),
    "sweep": ("0", "1.1", "-0.5", "x", "nan", "0.9 2", ""),
    "methods": ("noprune", "no-such-thing", "if dicee"),
    "audit_groups": (*COUNT, "2"),
    "audit_fraction": (*SHARE, "1"),
    "cluster": ("here", "local", "tcp:", "recipes:2"),
}

# Values that only the run can judge: tried with what else they need.
NEEDS = {
    "node_datasize": ("--partition", "preference"),
    "shards_per_worker": ("--partition", "shards"),
    "buffer_size": ("--protocol", "fedasync"),
    "stages": ("--engine", "auto"),
    "split_at": ("--stages", "2", "--engine", "auto"),
}
FREE_TEXT = {"config", "ledger", "ledger_keys", "dataset_path", "drop_samples", "keep_samples", "topology_file",
             "policy", "results_dir", "run_name", "stage1_dir"}  # fmt: skip
RUNS_FIRST = {"target"}  # judged only after stage 1: below


def is_boolean(f: dataclasses.Field) -> bool:
    return "bool" in f.type


def words(value: str) -> list[str]:
    return value.split(" ") if value else [""]


def usual(f: dataclasses.Field) -> tuple[str, ...] | None:
    """What a flag of this kind refuses; None: its text has to be known."""
    if f.metadata["choices"]:
        return NAME
    zero = f.metadata["check"] is None or f.metadata["check"][0](0)
    if "int" in f.type:
        return COUNT_OR_0 if zero else COUNT
    if "float" in f.type:
        return NUMBER_OR_0 if zero else NUMBER
    return None


for config_class, table in ((Config, BAD), (PruningConfig, BAD_PRUNING)):
    for f in dataclasses.fields(config_class):
        written = f.name in BAD or f.name in BAD_PRUNING or f.name in FREE_TEXT | RUNS_FIRST
        if not written and not is_boolean(f) and usual(f) is not None:
            table[f.name] = usual(f)
