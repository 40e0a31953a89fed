"""The field's algorithms on the same shards: accuracy, the worst worker, and the bytes to a target.

    python -m benchmarks.algorithms                                              digits, MLP, minutes
    python -m benchmarks.algorithms --dataset_name cifar10 --dataset_path CIFAR --model cnn_group --epochs 20 --jobs 1

Sixteen workers, shards by Dirichlet(10, 1, 0.1). For each algorithm and concentration the learning rate is the one of a
fixed grid with the best validation accuracy on seeds of its own; then it is trained on other seeds, which are reported:
mean and 95 % t-interval of the test accuracy of the consensus model and of the worst worker, and the bytes that all
workers together had sent when the consensus model first reached the target on validation data. Everything else is as
the algorithm has it by default. Further flags are those of main.py. A run that is finished is not trained again, so the
command can be stopped and started; tables go to RESULTS/algorithms_DATA/table.md as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.args import Config

os.environ.setdefault("OMP_NUM_THREADS", "1")

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM = 1 / 30  # rates of AdamW against those of SGD
TUNED_ON = 1000  # added to a seed on which rates are chosen
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gossip": {},
    "gossip, cta": {"order": "cta"},
    "gossip, base graph": {"mode": "base"},
    "gossip, one-peer exponential": {"mode": "exponential_one_peer"},
    "quasi-global momentum": {"protocol": "qg", "optimizer": "nesterov"},
    "D2": {"protocol": "d2"},
    "gradient tracking": {"protocol": "tracking"},
    "CHOCO, top 5 %": {"protocol": "choco", "compression": "top_k", "compression_share": 0.05},
    "CHOCO, 4 bits": {"protocol": "choco", "compression": "quantize", "compression_bits": 4},
    "RelaySGD, tree": {"protocol": "relay", "mode": "tree"},
    "push-sum, exponential": {"protocol": "pushsum", "mode": "exponential"},
    "DiLoCo, 10 steps": {"protocol": "diloco", "optimizer": "adamw", "local_steps": 10},
    "FedAvg": {"protocol": "fedavg"},
    "FedProx": {"protocol": "fedprox"},
    "SCAFFOLD": {"protocol": "scaffold"},
    "all-reduce": {"mode": "all"},
    "alone": {"protocol": "local"},
}


def trained(config: Config, run_dir: str) -> dict[str, Any]:
    """The figures of a run, trained where it is not finished: the best validation accuracy of the consensus model, its
    test accuracy and the worst worker's, and bytes and rounds by validation accuracy. A run that diverged has none."""
    import warnings

    from training.round_losses import WorkerFailed
    from training.run import train_run
    from utils.records import read_metrics, write_json

    warnings.simplefilter("ignore")  # said once, by the first process
    folder = Path(run_dir)
    if (folder / "diverged.json").exists():
        return {}
    try:
        summary = train_run(config, folder)
    except WorkerFailed as error:
        write_json(folder / "diverged.json", {"error": str(error)})
        return {}
    lines = read_metrics(folder)
    return {
        "validation": lines[-1]["consensus_val_accuracy"],
        "consensus": summary["test_accuracy"],
        "worst": min(summary["worker_test_accuracy"]),
        "sent": [(line["bytes"], line["consensus_val_accuracy"]) for line in lines],
    }


class Table:
    """All runs of a command."""

    def __init__(self, base: Config, asked: argparse.Namespace):
        self.base, self.asked = base, asked
        self.folder = Path(base.results_dir) / f"algorithms_{base.dataset_name}"
        self.pool = ProcessPoolExecutor(asked.jobs, get_context("spawn"))

    def run(self, alpha: float, name: str, rate: float, seed: int) -> tuple[Config, str]:
        """The configuration and the folder of a run."""
        changes = ALGORITHMS[name]
        slug = "".join(c if c.isalnum() else "_" for c in name)
        lr = rate * (ADAM if changes.get("optimizer") == "adamw" else 1)
        config = dataclasses.replace(
            self.base, alpha=alpha, lr=lr, seed=seed, resume=True, run_name=f"{slug}-{rate:g}-{seed}",
            results_dir=str(self.folder / f"alpha_{alpha:g}"), **changes,
        )  # fmt: skip
        return config, str(self.folder / f"alpha_{alpha:g}" / f"{slug}-{rate:g}-{seed}" / "stage1")

    def figures(self, keys: list[tuple]) -> dict[tuple, dict[str, Any]]:
        """Those of these runs (concentration, algorithm, rate, seed), some at a time."""
        from utils.progress import bar

        found = {}
        with bar(len(keys), "runs", "run", self.asked.quiet) as ticks:
            waiting = {self.pool.submit(trained, *self.run(*key)): key for key in keys}
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                ticks.update(1)
        return found

    def lines(self) -> Iterator[str]:
        """The table, in markdown."""
        asked, seed, S = self.asked, self.base.seed, self.asked.repeats
        pairs = [(alpha, name) for alpha in asked.alphas for name in asked.algorithms]
        tuning = range(seed + TUNED_ON, seed + TUNED_ON + asked.tuned_on)
        tried = self.figures([(*pair, rate, s) for pair in pairs for rate in asked.rates for s in tuning])

        def quality(pair: tuple, rate: float) -> float:
            return sum(tried[(*pair, rate, s)].get("validation", 0.0) for s in tuning)

        best = {pair: max(asked.rates, key=lambda rate: quality(pair, rate)) for pair in pairs}
        ended = self.figures([(*pair, best[pair], s) for pair in pairs for s in range(seed, seed + S)])
        yield "| Dirichlet | algorithm | rate | consensus | worst worker | MB to " + f"{asked.target:.0%} | MB in all |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        for alpha, name in pairs:
            rate = best[alpha, name]
            runs = [ended[alpha, name, rate, s] for s in range(seed, seed + S)]
            yield self.row(alpha, name, rate, [run for run in runs if run])

    def row(self, alpha: float, name: str, rate: float, runs: list[dict[str, Any]]) -> str:
        """A line of the table: of the runs that did not diverge."""
        lr = rate * (ADAM if ALGORITHMS[name].get("optimizer") == "adamw" else 1)
        edge = "*" if rate in (min(self.asked.rates), max(self.asked.rates)) else ""
        cells = [f"{alpha:g}", name, f"{lr:.3g}{edge}"]
        if len(runs) < self.asked.repeats:
            return "| " + " | ".join([*cells, f"diverged in {self.asked.repeats - len(runs)} runs", "", "", ""]) + " |"
        cells += [in_words([run[key] for run in runs]) for key in ("consensus", "worst")]
        reached = [next((b for b, accuracy in run["sent"] if accuracy >= self.asked.target), None) for run in runs]
        there = [b / 1e6 for b in reached if b is not None]
        cell = f"{sum(there) / len(there):.3g}" if there else "-"
        cells.append(cell if len(there) in (0, len(runs)) else f"{cell} ({len(there)} of {len(runs)} runs)")
        cells.append(f"{sum(run['sent'][-1][0] for run in runs) / len(runs) / 1e6:.3g}")
        return "| " + " | ".join(cells) + " |"


def in_words(values: list[float]) -> str:
    """Mean and half the width of the 95 % t-interval."""
    from utils.influence.statistics import mean_interval

    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean, low, _ = mean_interval(values)
    return f"{mean:.3f} ± {mean - low:.3f}"


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of its own, and those of main.py."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.algorithms", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--alphas", type=float, nargs="+", default=[10, 1, 0.1], help="concentrations of the shards")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS), metavar="NAME",
                        help=f"default: all, which are {'; '.join(ALGORITHMS)}".replace("%", "%%"))  # fmt: skip
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES),
                        help="learning rates to choose from; a thirtieth for AdamW")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="seeds that are reported")
    parser.add_argument("--tuned_on", type=int, default=1, help="seeds on which rates are chosen, others than those")
    parser.add_argument("--target", type=float, default=0.8, help="validation accuracy that bytes are counted to")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print."""
    from utils.args import Config
    from utils.errors import UsageError, refusal
    from utils.parser import parse

    asked, rest = arguments(sys.argv[1:] if argv is None else argv)
    flags = ["--model", "mlp", "--epochs", "30", "--batch_size", "16", "--num_workers", "16", "--eval_every", "2"]
    try:
        base = parse(Config, [*flags, "--quiet", "--no-plots", "--threads", "1", *rest], __doc__, varied=True)
        table = Table(base, asked)
        lines = []
        for line in table.lines():
            print(line, flush=True)
            lines.append(line)
        table.pool.shutdown()
        (table.folder / "table.md").write_text("\n".join(lines) + "\n")
    except UsageError as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
