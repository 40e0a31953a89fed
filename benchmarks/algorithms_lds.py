"""How well do scores predict retraining under each algorithm? The LDS of every method, on the digits.

    python -m benchmarks.algorithms_lds                         8 workers, MLP, 40 groups of 5 %; minutes
    python -m benchmarks.algorithms_lds --model cnn_smooth --algorithms D2 gossip

For each algorithm whose rounds are linear: main_pruned.py --audit with the same data, shards, groups and learning rate.
Prints the LDS and its 95 % bootstrap interval over groups. Further flags are those of main_pruned.py; what is there is
not retrained.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys

from benchmarks.algorithms import ALGORITHMS

os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = ("cascade", "dice", "delete", "if")
RUNS = {
    **{name: changes for name, changes in ALGORITHMS.items() if "CHOCO" not in name and "DiLoCo" not in name},
    "gossip, Nesterov": {"optimizer": "nesterov"},
    "CHOCO, all floats": {"protocol": "choco", "compression": "none"},
    "DiLoCo, 5 steps of SGD": {"protocol": "diloco", "local_steps": 5, "lr": 0.02},
    "FedAvg, server momentum": {"protocol": "fedavg", "server_momentum": 0.5},
}


def main(argv: list[str] | None = None) -> int:
    """Parse, audit, print."""
    import main_pruned
    from utils.records import read_json

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.algorithms_lds", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--algorithms", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME",
                        help=f"default: all, which are {'; '.join(RUNS)}".replace("%", "%%"))  # fmt: skip
    parser.add_argument("--results_dir", default="results/algorithms_lds", metavar="FOLDER", help="folder of all runs")
    asked, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    print("| algorithm | validation loss | " + " | ".join(METHODS) + " |")
    print("| --- |" + " --- |" * (len(METHODS) + 1))
    for name in asked.algorithms:
        slug = "".join(c if c.isalnum() else "_" for c in name)
        flags = [word for key, value in RUNS[name].items() for word in (f"--{key}", str(value))]
        words = ["--audit", "--methods", *METHODS, "--model", "mlp", "--epochs", "12", "--quiet", "--no-plots",
                 *flags, *rest, "--results_dir", asked.results_dir, "--run_name", slug]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            code = main_pruned.main(words)
        if code:
            return code
        record = read_json(os.path.join(asked.results_dir, slug, "audit.json"))
        cells = [name, f"{record['full']:.3f}"]
        for method in METHODS:
            entry = record["methods"][method]
            low, high = entry["interval"]
            cells.append(f"{entry['lds']:.2f} [{low:.2f}, {high:.2f}]")
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
