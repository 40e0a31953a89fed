"""Flags that do nothing are said, contradictions refused; the table knows every flag, and what it says is true."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
from command import metrics, refused, same_tensors, train

import main_pruned
from utils.args import Config
from utils.effects import ALWAYS, EFFECTS, rows_of
from utils.errors import UsageError
from utils.parser import parse
from utils.pruning_args import PruningConfig

IN_TABLE = {name for row in EFFECTS for name in row.flags}

# flag -> [(a command line in which it does nothing, one in which it counts)], one for each row on it
EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "history": [("--history 7", "--history 7 --dataset_name air")],
    "horizon": [("--horizon 2", "--horizon 2 --dataset_name timeseries")],
    "sound_seconds": [("--sound_seconds 2", "--sound_seconds 2 --dataset_name audiofolder")],
    "neighbors": [("--neighbors 4", "--neighbors 4 --mode nearest")],
    "base_neighbors": [("--base_neighbors 2", "--base_neighbors 2 --mode base")],
    "torus": [("--torus 2 4", "--torus 2 4 --mode torus")],
    "branches": [("--branches 3", "--branches 3 --mode tree")],
    "order": [("--order cta --protocol qg", "--order cta")],
    "qg_momentum": [("--qg_momentum 0.5", "--qg_momentum 0.5 --protocol qg")],
    "compression": [("--compression sign", "--compression sign --protocol choco")],
    "compression_share": [
        ("--compression_share 0.5 --protocol choco --compression sign", "--compression_share 0.5 --protocol choco")
    ],
    "compression_bits": [
        ("--compression_bits 8 --protocol choco", "--compression_bits 8 --protocol choco --compression quantize")
    ],
    "consensus_step": [("--consensus_step 0.5", "--consensus_step 0.5 --protocol choco")],
    "outer_lr": [("--outer_lr 0.5", "--outer_lr 0.5 --protocol diloco")],
    "outer_momentum": [("--outer_momentum 0.5", "--outer_momentum 0.5 --protocol diloco")],
    "prox": [("--prox 0.1 --protocol fedavg", "--prox 0.1 --protocol fedprox")],
    "server_lr": [("--server_lr 0.5", "--server_lr 0.5 --protocol scaffold")],
    "dataset_path": [("--dataset_path x", "--dataset_path x --dataset_name cifar10")],
    "download": [
        ("--download", "--download --dataset_name svhn"),
        ("--download --dataset_name imagefolder", "--download --dataset_name cifar100"),
    ],
    "dirichlet": [
        ("--dirichlet --partition iid", "--dirichlet"),
        ("--no-dirichlet --partition dirichlet", "--no-dirichlet --partition shards"),
    ],
    "nonIID": [
        ("--nonIID --partition shards", "--nonIID"),
        ("--no-nonIID --partition preference", "--nonIID --partition preference"),
        ("--nonIID --dirichlet", "--nonIID --no-dirichlet"),
    ],
    "node_datasize": [
        ("--node_datasize 20", "--node_datasize 20 --nonIID"),
        ("--node_datasize 20 --partition iid", "--node_datasize 20 --partition preference"),
    ],
    "alpha": [("--alpha 0.3 --nonIID", "--alpha 0.3"), ("--alpha 0.3 --no-dirichlet", "--alpha 0.3 --dirichlet")],
    "min_shard": [("--min_shard 3 --partition iid", "--min_shard 3")],
    "self_balancing": [("--self_balancing --partition shards", "--self_balancing --partition dirichlet")],
    "shards_per_worker": [("--shards_per_worker 3", "--shards_per_worker 3 --partition shards")],
    "mode": [
        ("--mode all --protocol fedavg", "--mode all"),
        ("--mode all --protocol local", "--mode all --protocol chained --chain_order shortest"),
        ("--mode all --num_workers 1", "--mode all --num_workers 2"),
    ],
    "topology_file": [
        ("--topology_file x --protocol fedavg", "--topology_file x --mode file"),
        ("--topology_file x --num_workers 1", "--topology_file x --mode file --num_workers 2"),
        ("--topology_file x", "--topology_file x --mode file"),
    ],
    "aggregation": [("--aggregation median --num_workers 1", "--aggregation median")],
    "local_steps": [("--local_steps 3 --protocol fedavg", "--local_steps 3 --protocol local")],
    "sizes": [("--sizes 1 2", "--sizes 1 2 --partition sizes --num_workers 2")],
    "server_weights": [("--server_weights equal", "--server_weights equal --protocol fedavg")],
    "fraction_fit": [("--fraction_fit 0.5", "--fraction_fit 0.5 --protocol fedavg")],
    "server_momentum": [("--server_momentum 0.5 --protocol chained", "--server_momentum 0.5 --protocol fedavg")],
    "local_epochs": [
        ("--local_epochs 2", "--local_epochs 2 --protocol fedavg"),
        ("--local_epochs 2 --protocol local", "--local_epochs 2 --protocol chained"),
    ],
    "keep_momentum": [
        ("--keep_momentum", "--keep_momentum --protocol fedasync"),
        ("--keep_momentum --protocol fedavg --momentum 0", "--keep_momentum --protocol fedavg"),
    ],
    "async_alpha": [("--async_alpha 0.3 --protocol fedavg", "--async_alpha 0.3 --protocol fedasync")],
    "staleness_exponent": [("--staleness_exponent 1", "--staleness_exponent 1 --protocol fedasync")],
    "buffer_size": [("--buffer_size 2", "--buffer_size 2 --protocol fedasync")],
    "policy": [
        ("--policy FILE --protocol chained", "--policy FILE --protocol chained --chain_order policy"),
    ],
    "chain_order": [("--chain_order random", "--chain_order random --protocol chained")],
    "latency_ms": [("--latency_ms 5 --protocol local", "--latency_ms 5")],
    "bandwidth_mbps": [("--bandwidth_mbps 5 --protocol local", "--bandwidth_mbps 5 --protocol fedavg")],
    "finetune_head": [("--finetune_head", "--finetune_head --finetune 1")],
    "ledger_keys": [("--ledger_keys x", "--ledger_keys x --ledger y")],
    "ledger_every": [("--ledger_every 2", "--ledger_every 2 --ledger y")],
    "ledger_states": [("--ledger_states 2", "--ledger_states 2 --ledger y")],
    "beta2": [("--beta2 0.9", "--beta2 0.9 --optimizer adam")],
    "eps": [("--eps 1e-7", "--eps 1e-7 --optimizer adamw")],
    "gamma": [
        ("--gamma 0.5", "--gamma 0.5 --scheduler exponential"),
        ("--gamma 0.5 --scheduler constant", "--gamma 0.5 --scheduler multistep"),
    ],
    "milestones": [
        ("--milestones 1", "--milestones 1 --scheduler multistep"),
        ("--milestones 1 --scheduler exponential", "--milestones 1 --scheduler multistep"),
    ],
    "min_delta": [("--min_delta 0.1", "--min_delta 0.1 --patience 2")],
    "dp_clip": [("--dp_clip 2", "--dp_clip 2 --dp_noise 1")],
    "dp_delta": [("--dp_delta 0.1 --dp_noise 0", "--dp_delta 0.1 --dp_noise 1")],
    "tf32": [("--no-tf32 --device cpu", "--no-tf32")],
    "amp": [("--amp --dtype float64", "--amp")],
    "channels_last": [
        ("--channels_last --model mlp", "--channels_last"),
        ("--channels_last --model lstm_mean", "--channels_last --model densenet121"),
    ],
    "threads": [
        ("--threads 1 --engine loop", "--threads 1"),
        ("--threads 1 --device cuda:0", "--threads 1 --device cpu"),
    ],
    "batch_parts": [("--batch_parts 2 --stages 2", "--batch_parts 2")],
    "microbatches": [("--microbatches 4", "--microbatches 4 --stages 2")],
    "schedule": [("--schedule gpipe", "--schedule gpipe --stages 2")],
    "split_labels": [("--split_labels first", "--split_labels first --stages 3")],
    "split_at": [("--split_at 4", "--split_at 4 --stages 2")],
    "stage1_dir": [
        ("--stage1_dir x --stage 1", "--stage1_dir x"),
        ("--stage1_dir x --seeds 2", "--stage1_dir x --seeds 1"),
    ],
    "run_name": [("--run_name a --stage1_dir x", "--run_name a")],
    "results_dir": [("--results_dir a --stage1_dir x", "--results_dir a")],
    "model": [("--model mlp --model_A cnn", "--model mlp --model_A mlp")],
    "pruning_algorithm": [("--pruning_algorithm if --stage 1", "--pruning_algorithm if --stage 2")],
    "train_ratio": [
        ("--train_ratio 0.7 --stage 1", "--train_ratio 0.7"),
        ("--train_ratio 0.7 --audit", "--train_ratio 0.7 --audit --pruning_algorithm if"),
        ("--train_ratio 0.7 --pruning_algorithm noprune", "--train_ratio 0.7 --pruning_algorithm random"),
        ("--train_ratio 0.7 --choose_ratio 0.9", "--train_ratio 0.7"),
    ],
    "control": [
        ("--no-control --stage 1", "--no-control"),
        ("--no-control --pruning_algorithm random", "--no-control --pruning_algorithm if"),
        ("--no-control --train_ratio 1", "--no-control --train_ratio 0.9"),
        ("--no-control --sweep 0.9", "--no-control --sweep 0.9 --pruning_algorithm if"),
    ],
    "prune_scope": [
        ("--prune_scope global --stage 1", "--prune_scope global"),
        ("--prune_scope global --audit", "--prune_scope global --sweep 0.9"),
    ],
    "model_B": [
        ("--model_B mlp --stage 1", "--model_B mlp"),
        ("--model_B mlp --audit", "--model_B mlp --pruning_algorithm noprune"),
    ],
    "stage2_epochs": [
        ("--stage2_epochs 3 --stage 1", "--stage2_epochs 3"),
        ("--stage2_epochs 3 --audit", "--stage2_epochs 3 --sweep 0.9"),
    ],
    "sweep": [("--sweep 0.9 --stage 1", "--sweep 0.9")],
    "methods": [
        ("--methods if --audit --stage 1", "--methods if --audit"),
        ("--methods if", "--methods if --sweep 0.5"),
    ],
    "dice_hops": [
        ("--dice_hops 2 --stage 1", "--dice_hops 2 --pruning_algorithm dice"),
        ("--dice_hops 2", "--dice_hops 2 --audit"),
        ("--dice_hops 2 --audit --methods if", "--dice_hops 2 --audit --methods if dice"),
    ],
    "dice_rounds": [
        ("--dice_rounds 2 --stage 1", "--dice_rounds 2 --pruning_algorithm dice"),
        ("--dice_rounds 2 --pruning_algorithm if", "--dice_rounds 2 --sweep 0.5"),
    ],
    "delete_checkpoints": [
        ("--delete_checkpoints 2 --stage 1", "--delete_checkpoints 2 --pruning_algorithm delete"),
        ("--delete_checkpoints 2 --pruning_algorithm if", "--delete_checkpoints 2 --sweep 0.5"),
    ],
    "target": [
        ("--target consensus --stage 1", "--target consensus"),
        ("--target consensus --pruning_algorithm random", "--target consensus --pruning_algorithm if"),
    ],
    "edges": [("--edges --stage 1", "--edges")],
    "memory_gb": [("--memory_gb 1 --stage 1", "--memory_gb 1")],
    "audit": [("--audit --stage 1", "--audit")],
    "prune_steps": [
        ("--prune_steps 2 --audit", "--prune_steps 2"),
        ("--prune_steps 2 --pruning_algorithm random", "--prune_steps 2 --pruning_algorithm random --sweep 0.5"),
        ("--prune_steps 2 --stage 1", "--prune_steps 2 --sweep 0.5 --methods if"),
    ],
    "choose_ratio": [
        ("--choose_ratio 0.9 --audit", "--choose_ratio 0.9"),
        ("--choose_ratio 0.9 --pruning_algorithm random", "--choose_ratio 0.9 --pruning_algorithm if"),
        ("--choose_ratio 0.9 --stage 1", "--choose_ratio 0.9 --audit --pruning_algorithm if"),
    ],
    "val_folds": [
        ("--val_folds 2 --audit", "--val_folds 2"),
        ("--val_folds 2 --pruning_algorithm random", "--val_folds 2 --pruning_algorithm random --sweep 0.5"),
        ("--val_folds 2 --stage 1", "--val_folds 2 --sweep 0.5 --methods if"),
    ],
    "smoothness": [("--smoothness --stage 1", "--smoothness"), ("--smoothness --audit", "--smoothness --edges")],
    "audit_groups": [("--audit_groups 5 --audit --stage 1", "--audit_groups 5 --audit"), ("--audit_groups 5", "")],
    "audit_fraction": [
        ("--audit_fraction 0.1 --stage 1", "--audit_fraction 0.1 --audit"),
        ("--audit_fraction 0.1 --sweep 0.5", "--audit_fraction 0.1 --sweep 0.5 --audit"),
        ("--audit_fraction 0.1", "--audit_fraction 0.1 --smoothness"),
    ],
    "audit_seed": [("--audit_seed 1 --stage 1", "--audit_seed 1 --audit"), ("--audit_seed 1", "")],
    "cluster": [
        ("--cluster local:2 --stage 1", "--cluster local:2 --audit"),
        ("--cluster local:2 --sweep 0.5", "--cluster local:2 --sweep 0.5 --audit"),
    ],
    "overwrite": [("--overwrite --audit", "--overwrite --audit --sweep 0.9")],
}


def said(words: str) -> list[str]:
    """What is said of the flags of a command line of main_pruned.py: warnings, or the line that refuses it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            parse(PruningConfig, words.split(), "")
        except UsageError as error:
            return [str(error)]
    return [str(warning.message) for warning in caught]


def test_every_flag_was_considered():
    flags = {f.name for f in dataclasses.fields(PruningConfig)}
    assert {f.name for f in dataclasses.fields(Config)} <= flags
    assert IN_TABLE | ALWAYS == flags and not IN_TABLE & ALWAYS
    assert EXAMPLES.keys() == IN_TABLE


@pytest.mark.parametrize("name", EXAMPLES)
def test_flags_without_effect(name):
    rows_that_spoke = set()
    for silent, counted in EXAMPLES[name]:
        lines = [line for line in said(silent) if line.startswith((f"--{name} ", f"--no-{name} "))]
        assert len(lines) == 1 and "{" not in lines[0] and "\n" not in lines[0], silent
        assert not [line for line in said(counted) if line.startswith((f"--{name} ", f"--no-{name} "))], counted
        config = dataclasses.replace(PruningConfig(), **typed(silent))
        row = next(row for row in rows_of(name) if not row.counts(config))
        assert ("contradicts" in lines[0]) == row.refused
        rows_that_spoke.add(row)
    assert rows_that_spoke == set(rows_of(name)), "an example for each row"


def typed(words: str) -> dict:
    """The flags of a command line, by name, without any look at whether they fit."""
    config, plain = parse(PruningConfig, words.split(), "", varied=True), PruningConfig()
    return {k: v for k, v in vars(config).items() if v != getattr(plain, k)}


def test_defaults_and_replayed_values_are_not_spoken_of(tmp_path):
    assert said("") == []
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"config": {"gamma": 0.5, "local_epochs": 3, "dirichlet": True}}))
    assert said(f"--config {file}") == []
    assert len(said(f"--config {file} --gamma 0.5")) == 1
    [line] = said(f"--config {file} --nonIID")  # the recorded --dirichlet goes on to decide
    assert "--nonIID" in line and "--no-dirichlet" in line


def test_a_switch_that_is_off_stays_off_in_silence():
    assert said("--no-download --no-audit --keep_momentum False --no-overwrite --no-finetune_head") == []


@pytest.mark.parametrize("words", [w for pairs in EXAMPLES.values() for w, _ in pairs if "contra" in said(w)[0]])
def test_contradictions_are_refused_by_the_command(words, tmp_path, capsys):
    line = refused(capsys, main_pruned.main(["--results_dir", str(tmp_path), "--num_workers", "4", *words.split()]))
    assert line.count("--") >= 2
    assert not list(tmp_path.iterdir())


def test_main_warns_in_one_line_each_and_goes_on(tmp_path, capsys):
    train(tmp_path, "--gamma", "0.5", "--min_delta", "0.1")
    lines = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert len(lines) == 2 and all(line.startswith("warning: --") for line in lines)


def test_only_the_first_process_warns(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert said("--gamma 0.5") == []
    assert "contradicts" in said("--dirichlet --partition iid")[0]


# ---- is it true? A run with such a flag equals the run without it -----------------------------------------

NUMERIC = {f.name for f in dataclasses.fields(Config) if f.metadata["changes_results"]}
HARMLESS = [
    words for name in EXAMPLES.keys() & NUMERIC for words, _ in EXAMPLES[name]
    if "no effect" in said(words)[-1] and not any(w in words for w in ("topology_file", "cuda", "model", "imagefolder"))
]  # fmt: skip


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Runs without the flag, each made once, by what else their command lines say."""
    folder, made = tmp_path_factory.mktemp("without"), {}

    def run(rest: tuple[str, ...]):
        if rest not in made:
            made[rest] = train(folder, *SHORT, *rest, name=str(len(made)))
        return made[rest]

    return run


SHORT = ("--epochs", "1", "--max_train", "150", "--speed_spread", "0.3", "--min_shard", "2")


def rest_of(words: str, name: str) -> tuple[str, ...]:
    """A command line without one flag and its value."""
    flags = words.split(" --")
    return tuple(
        word
        for flag in flags
        if flag.removeprefix("--").split()[0] not in (name, f"no-{name}")
        for word in f"--{flag.removeprefix('--')}".split()
    )


@pytest.mark.parametrize("words", sorted(HARMLESS))
def test_a_flag_that_is_said_to_do_nothing_does_nothing(words, without, tmp_path):
    name = words.split()[0].removeprefix("--").removeprefix("no-")
    plain = without(rest_of(words, name))
    run = train(tmp_path, *SHORT, *words.split())
    assert metrics(run) == metrics(plain)
    assert same_tensors(run / "model.safetensors", plain / "model.safetensors")


def test_the_comparison_can_fail(without, tmp_path):
    run = train(tmp_path, *SHORT, "--gamma", "0.5", "--scheduler", "exponential", "--epochs", "2")
    plain = without(("--scheduler", "exponential", "--epochs", "2"))
    assert metrics(run) != metrics(plain)
