"""All protocols on the same data, side by side, and the centralized baseline.

    python -m benchmarks.protocols                                       digits, MLP
    python -m benchmarks.protocols --dataset_name imagefolder --dataset_path CIFAR --model cnn --epochs 5

Further flags are those of main.py. Prints a markdown table for Dirichlet 0.1 and 1: accuracy, rounds, bytes and virtual
seconds (workers of different speed, links of 20 ms and 100 megabit per second), and draws the runs on one sheet each.
"""

from __future__ import annotations

import dataclasses
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

ALPHAS = (0.1, 1.0)
RUNS = {
    "centralized": {"protocol": "local", "num_workers": 1, "partition": "iid"},
    "gossip, ring": {"protocol": "gossip", "mode": "ring"},
    "gossip, exponential": {"protocol": "gossip", "mode": "exponential"},
    "fedavg": {"protocol": "fedavg"},
    "fedavg, half sampled": {"protocol": "fedavg", "fraction_fit": 0.5},
    "fedasync": {"protocol": "fedasync"},
    "chained": {"protocol": "chained", "chain_order": "random"},
    "local, mean of workers": {"protocol": "local"},
}
WORLD = ["--speed_spread", "0.5", "--latency_ms", "20", "--bandwidth_mbps", "100", "--min_shard", "2"]


def main() -> int:
    """Parse, run, print."""
    from training.run import run_folder, train_run
    from utils.args import Config
    from utils.errors import UsageError
    from utils.parser import parse
    from visualization.plot_utils import plot_compare

    try:
        flags = ["--model", "mlp", "--epochs", "20", "--quiet", *WORLD, *sys.argv[1:]]
        base = parse(Config, flags, __doc__, varied=True)
        print("| Dirichlet | protocol | test accuracy | rounds | megabytes | virtual seconds |")
        print("| --- | --- | --- | --- | --- | --- |")
        for alpha in ALPHAS:
            run_dirs = []
            for name, changes in RUNS.items():
                slug = "".join(c if c.isalnum() else "_" for c in name)
                config = dataclasses.replace(
                    base,
                    alpha=alpha,
                    overwrite=True,
                    run_name=f"protocols_{base.dataset_name}/{alpha:g}_{slug}",
                    **changes,
                )
                run_dir = run_folder(config) / "stage1"
                s = train_run(config, run_dir)
                workers = s["worker_test_accuracy"]
                accuracy = sum(workers) / len(workers) if name.startswith("local") else s["test_accuracy"]
                run_dirs.append(run_dir)
                cells = (f"{alpha:g}", name, f"{accuracy:.3f}", f"{s['rounds']}", f"{s['bytes'] / 1e6:.1f}",
                         f"{s['virtual_seconds']:.1f}")  # fmt: skip
                print("| " + " | ".join(cells) + " |", flush=True)
            plot_compare(
                run_dirs, run_folder(base).with_name(f"protocols_{base.dataset_name}") / f"alpha_{alpha:g}.png"
            )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
