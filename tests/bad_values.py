"""Values that each flag refuses."""

from __future__ import annotations

import dataclasses

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
    "sound_seconds": NUMBER,
    "neighbors": COUNT,
    "node_datasize": (*COUNT, "1000000"),
    "val_fraction": ("0", "1", "-1", "nan", "some"),
    "max_train": COUNT,
    "augment": NAME,
    "flip_labels": ("1", "-0.1", "nan", "some"),
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
    "alpha": NUMBER,
    "min_shard": (*COUNT_OR_0, "1000"),
    "shards_per_worker": (*COUNT, "1000"),
    "model": (*NAME, "resnet", "model.safetensors"),
    "init": NAME,
    "mode": (*NAME, "rings"),
    "num_workers": (*COUNT, "1000", HUGE),
    "local_steps": COUNT,
    "aggregation": NAME,
    "byzantine": ("2", "2:", ":noise", "4:noise", "1:nose", "-1:noise", "x:noise"),
    "on_bad_worker": NAME,
    "fraction_fit": SHARE,
    "local_epochs": COUNT,
    "server_momentum": ("1", "-0.1", "nan", "some"),
    "async_alpha": SHARE,
    "staleness_exponent": NUMBER_OR_0,
    "buffer_size": COUNT,
    "chain_order": NAME,
    "speed_spread": NUMBER_OR_0,
    "step_ms": NUMBER,
    "latency_ms": NUMBER_OR_0,
    "bandwidth_mbps": NUMBER,
    "finetune": COUNT_OR_0,
    "epochs": NUMBER,
    "batch_size": COUNT,
    "lr": NUMBER,
    "momentum": ("1", "-0.1", "nan", "some"),
    "wd": NUMBER_OR_0,
    "scheduler": NAME,
    "gamma": SHARE,
    "warmup_step": COUNT_OR_0,
    "milestones": ("0", "-1", "5 3", "x", ""),
    "patience": COUNT_OR_0,
    "min_delta": NUMBER_OR_0,
    "device": ("", "tpu", "cuda:99", "cuda:x", "cuda:-1", "meta", "gpu"),
    "dtype": (*NAME, "bfloat16"),
    "seed": COUNT_OR_0,
    "seeds": (*COUNT, "10001", HUGE),
    "threads": COUNT,
    "engine": NAME,
    "batch_parts": COUNT,
    "protocol": (*NAME, "fedprox"),
    "checkpoint_every": COUNT,
    "max_rounds": COUNT,
    "eval_every": COUNT,
}

BAD_PRUNING: dict[str, tuple[str, ...]] = {
    "stage": ("0", "3", "-1", "one", "1.5"),
    "pruning_algorithm": (*NAME, "cascad"),
    "train_ratio": SHARE,
    "prune_scope": NAME,
    "model_A": NAME,
    "model_B": NAME,
    "stage2_epochs": NUMBER,
    "sweep": ("0", "1.1", "-0.5", "x", "nan", "0.9 2", ""),
    "methods": ("noprune", "no-such-thing", "if dicee"),
    "dice_hops": COUNT,
    "dice_rounds": COUNT,
    "delete_checkpoints": COUNT,
    "memory_gb": NUMBER,
    "audit_groups": (*COUNT, "2"),
    "audit_fraction": (*SHARE, "1"),
    "audit_seed": COUNT_OR_0,
    "cluster": ("here", "local", "tcp:"),
}

# Values that only the run can judge: tried with what else they need.
NEEDS = {
    "node_datasize": ("--partition", "preference"),
    "shards_per_worker": ("--partition", "shards"),
    "buffer_size": ("--protocol", "fedasync"),
}
FREE_TEXT = {"config", "dataset_path", "drop_samples", "keep_samples", "topology_file", "results_dir", "run_name",
             "stage1_dir"}  # fmt: skip
RUNS_FIRST = {"target"}  # judged only after stage 1: below


def is_boolean(f: dataclasses.Field) -> bool:
    return "bool" in f.type


def words(value: str) -> list[str]:
    return value.split(" ") if value else [""]
