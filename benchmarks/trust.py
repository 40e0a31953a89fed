"""When can a score be trusted? Accuracy, metasmoothness and LDS of all methods, over networks and ways to train them.

    python -m benchmarks.trust                               39 settings on the digits, two seeds each: hours
    python -m benchmarks.trust --settings MLP CNN --seeds 1  some of them
    python -m benchmarks.trust --table                       what is there, as a table and as a picture

Each line of the record is a setting and a seed: main_pruned.py --audit with 40 groups of 1 and of 5 % of the samples
masked. Lines that are there, of the same flags, are not made again, and what a stopped one had retrained is gone on
with. The picture puts the LDS of ``cascade`` against metasmoothness, and the line at the foot of the table says below
what metasmoothness scores predict badly. Further flags are those of main_pruned.py and hold for every setting.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = ("cascade", "dice", "delete", "if")
FRACTIONS = (0.01, 0.05)
COMMON = ("--epochs", "20", "--lr", "0.05", "--val_fraction", "0.4")
VARIANTS: dict[str, dict[str, Any]] = {  # of networks.cnn.smooth_variant
    "smooth, GELU": {"activation": "GELU", "gain": 1.5},
    "smooth, tanh": {"activation": "Tanh", "gain": 1.3},
    "smooth, ReLU": {"activation": "ReLU", "gain": 1.4},
    "smooth, max-pooling": {"pooling": "MaxPool2d"},
    "smooth, GroupNorm": {"groups": 8},
    "smooth, twice as wide": {"width": 2.0},
    "smooth, half as wide": {"width": 0.5},
    "smooth, PyTorch's initialization": {"gain": 0.0},
}
SETTINGS: dict[str, tuple[str, ...]] = {
    "MLP": ("--model", "mlp"),
    "MLP, lr 0.2": ("--model", "mlp", "--lr", "0.2"),
    "MLP, lr 0.5": ("--model", "mlp", "--lr", "0.5"),
    "MLP, 80 epochs": ("--model", "mlp", "--epochs", "80"),
    "MLP, no momentum": ("--model", "mlp", "--momentum", "0"),
    "MLP, no momentum, lr 0.1": ("--model", "mlp", "--momentum", "0", "--lr", "0.1"),
    "MLP, no momentum, lr 0.2": ("--model", "mlp", "--momentum", "0", "--lr", "0.2"),
    "MLP, no momentum, lr 0.5": ("--model", "mlp", "--momentum", "0", "--lr", "0.5"),
    "MLP, no momentum, 80 epochs": ("--model", "mlp", "--momentum", "0", "--epochs", "80"),
    "MLP, lr 0.005": ("--model", "mlp", "--lr", "0.005"),
    "MLP, lr 0.01": ("--model", "mlp", "--lr", "0.01"),
    "MLP, lr 0.02": ("--model", "mlp", "--lr", "0.02"),
    "MLP, 6 workers on a torus, 6 epochs, momentum 0.5": (
        "--model", "mlp", "--num_workers", "6", "--mode", "grid", "--epochs", "6", "--momentum", "0.5",
    ),
    "MLP, everyone with everyone": ("--model", "mlp", "--mode", "all"),
    "MLP, exponential graph": ("--model", "mlp", "--mode", "exponential"),
    "MLP, alone": ("--model", "mlp", "--protocol", "local"),
    "MLP, 5 local steps": ("--model", "mlp", "--local_steps", "5"),
    "MLP, Dirichlet 0.1": ("--model", "mlp", "--alpha", "0.1"),
    "MLP, IID": ("--model", "mlp", "--no-dirichlet"),
    "MLP, tanh": ("--model", "mlp_smooth"),
    "CNN": ("--model", "cnn"),
    "CNN, lr 0.1": ("--model", "cnn", "--lr", "0.1"),
    "CNN, 40 epochs": ("--model", "cnn", "--epochs", "40"),
    "CNN, no momentum, lr 0.2": ("--model", "cnn", "--momentum", "0", "--lr", "0.2"),
    "CNN, GroupNorm": ("--model", "cnn_group"),
    "smooth CNN": ("--model", "cnn_smooth"),
    "smooth CNN, lr 0.1": ("--model", "cnn_smooth", "--lr", "0.1"),
    "smooth CNN, lr 0.2": ("--model", "cnn_smooth", "--lr", "0.2"),
    "smooth CNN, GroupNorm, lr 0.1": ("--model", "cnn_smooth_group", "--lr", "0.1"),
    "smooth CNN, Dirichlet 0.1": ("--model", "cnn_smooth", "--alpha", "0.1"),
    "smooth CNN, everyone with everyone": ("--model", "cnn_smooth", "--mode", "all"),
    **{name: ("--model", name) for name in VARIANTS},
}
LARGER: dict[str, tuple[str, ...]] = {  # measured where asked for: for larger pictures, or slow
    "smooth CNN, head on the map": (
        "--model", "cnn_smooth_direct", "--lr", "0.004", "--batch_size", "8", "--wd", "0.02",
    ),
    "smooth CNN, stem, head on the map": (
        "--model", "cnn_smooth_stem", "--lr", "0.004", "--batch_size", "8", "--wd", "0.02",
    ),
    "ResNet18, 4 workers": ("--model", "resnet18", "--num_workers", "4", "--batch_size", "16", "--epochs", "15"),
}


def main(argv: list[str] | None = None) -> int:
    """Parse, measure what is missing, print, draw."""
    register()
    from utils.digest import digest_json
    from utils.errors import UsageError, refusal
    from utils.records import MetricsLog
    from visualization.trust import plot_trust

    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="NAME", choices=[*SETTINGS, *LARGER])
    own.add_argument("--seeds", type=int, default=2, help="seeds of each [2]")
    own.add_argument("--fractions", nargs="+", type=float, default=FRACTIONS, help="shares masked [0.01 0.05]")
    own.add_argument("--table", action="store_true", help="measure nothing")
    own.add_argument("--out", default="results/benchmarks/trust.jsonl", help="record; a picture goes beside it")
    asked, rest = own.parse_known_args(argv)
    try:
        if not all(0 < fraction < 1 for fraction in asked.fractions):
            raise UsageError("--fractions are shares of the samples, each between 0 and 1.")
        path = Path(asked.out)
        log = MetricsLog(path)
        there = log.read() if path.exists() else []
        same = [line for line in there if line["flags"] == flags(line["setting"], rest)]
        lines = {(line["setting"], line["seed"]): line for line in same if tells(line, asked.fractions)}
        wanted = [(name, seed) for seed in range(asked.seeds) for name in asked.settings]
        for name, seed in () if asked.table else wanted:
            if (name, seed) not in lines:
                print(f"{name}, seed {seed}", file=sys.stderr)
                folder = path.with_name(f"{path.name}.runs") / digest_json([flags(name, rest), seed])[:12]
                lines[name, seed] = measured(name, seed, rest, folder, asked.fractions)
                log.append({"round": len(there) + len(lines), **lines[name, seed]})
                shutil.rmtree(folder, ignore_errors=True)
        shown = [lines[key] for key in sorted(wanted, key=lambda key: asked.settings.index(key[0])) if key in lines]
        if not shown:
            raise UsageError(f"{path} has none of these yet: leave out --table.")
        print_table(shown, asked.fractions)
        print(plot_trust(shown, path.with_suffix(".png")))
    except UsageError as error:
        return refusal(error)
    return 0


def register() -> None:
    """Make the variants known as networks, before flags take their names."""
    from torch import nn

    from networks.cnn import smooth_variant
    from utils.registry import NETWORKS

    for name, parts in VARIANTS.items():
        named = {key: getattr(nn, value) if isinstance(value, str) else value for key, value in parts.items()}
        NETWORKS.setdefault(name, functools.partial(smooth_variant, **named))


def flags(name: str, rest: list[str]) -> list[str]:
    """What a setting is made of, but for its seed."""
    return [*COMMON, *(SETTINGS | LARGER).get(name, ()), *rest]


def tells(line: dict[str, Any], fractions: Sequence[float]) -> bool:
    """Whether a line of the record tells of all these shares."""
    return set(map(str, fractions)) <= line["lds"].keys()


def measured(name: str, seed: int, rest: list[str], folder: Path, fractions: Sequence[float]) -> dict[str, Any]:
    """A line of the record, by a run in this folder, which it goes on with where it was stopped."""
    from training.audit import audit
    from training.pruning import open_stage1
    from utils.influence.last_layer import optimality
    from utils.influence.targets import node_weights
    from utils.parser import parse
    from utils.pruning_args import PruningConfig
    from utils.records import read_record, write_json

    config = parse(PruningConfig, [*flags(name, rest), "--seed", str(seed)], __doc__, varied=True)
    config = dataclasses.replace(config, results_dir=str(folder), quiet=True, plots=False, run_name="run", resume=True)
    stage1 = open_stage1(dataclasses.replace(config, methods=METHODS))
    kept = folder / "seconds.json"
    seconds = read_record(kept, "training") if kept.exists() else {"training": stage1.summary["seconds"]}
    for method in METHODS:
        if method not in seconds:
            start = time.perf_counter()
            stage1.scores(method)
            write_json(kept, seconds := {**seconds, method: time.perf_counter() - start})
    weights_N = node_weights(config.num_workers, config.target)
    optimum = optimality(stage1.run, stage1.run.last_layer(weights_N))
    line = {"setting": name, "seed": seed, "flags": flags(name, rest), "accuracy": stage1.summary["test_accuracy"],
            "gradient_ratio": optimum, "seconds": seconds, "smoothness": {}, "lds": {}}  # fmt: skip
    for fraction in fractions:
        stage1.config = dataclasses.replace(stage1.config, audit_fraction=fraction)
        record = audit(stage1)
        line["smoothness"][str(fraction)] = record["metasmoothness"]["mean"]
        line["lds"][str(fraction)] = {m: [e["lds"], *e["interval"]] for m, e in record["methods"].items()}
    return line


def print_table(lines: list[dict[str, Any]], fractions: Sequence[float]) -> None:
    """A row a setting, means over its seeds; then how metasmoothness and LDS go together."""
    from benchmarks.common import table
    from visualization.trust import together

    rows, masked = [], [str(fraction) for fraction in fractions]
    for name in dict.fromkeys(line["setting"] for line in lines):
        mean = functools.partial(mean_of, [line for line in lines if line["setting"] == name])
        smooth = " / ".join(mean(lambda line, f=f: line["smoothness"][f]) for f in masked)
        lds = [" / ".join(mean(lambda line, f=f, m=m: line["lds"][f][m][0]) for f in masked) for m in METHODS]
        cost = [mean(lambda line, m=m: line["seconds"][m] / line["seconds"]["training"], digits=1) for m in METHODS]
        ratio = mean(lambda line: line["gradient_ratio"])
        rows.append([name, mean(lambda line: line["accuracy"], digits=3), smooth, ratio, *lds, " / ".join(cost)])
    shares = " / ".join(f"{100 * fraction:g}" for fraction in fractions)
    said_of = [f"LDS of {method}" for method in METHODS]
    head = ["setting", "test accuracy", f"metasmoothness, {shares} %", "gradient ratio", *said_of]
    table([*head, "cost of the four, trainings"], rows)
    print(together(lines))
    print(optimum_said(lines))


def optimum_said(lines: list[dict[str, Any]]) -> str:
    """The LDS of ``if`` where the last layer is far from its optimum and where it is not, in a line."""
    from utils.influence.optimum import FAR

    said = []
    for words, far in ((f"a gradient ratio from {FAR:g} on", True), ("a smaller one", False)):
        there = [line for line in lines if (line["gradient_ratio"] >= FAR) is far]
        found = [lds["if"][0] for line in there for lds in line["lds"].values()]
        if found:
            mean, ends = sum(found) / len(found), f"{min(found):.2f} to {max(found):.2f}"
            said.append(f"{words}: {mean:.2f} ({ends}, {len(found)} points)")
    return f"LDS of if with {'; with '.join(said)}"


def mean_of(lines: list[dict[str, Any]], get: Callable[[dict[str, Any]], float], digits: int = 2) -> str:
    """The mean of a figure over seeds, as the table has it."""
    return f"{sum(map(get, lines)) / len(lines):.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
