"""A federation on this machine: a Flower server and its nodes, each a process, on 127.0.0.1.

    .venv-federated/bin/python -m federated.demo                          2 nodes, digits, 3 rounds
    .venv-federated/bin/python -m federated.demo --secure                 with TLS and keys that prove who is who
    .venv-federated/bin/python -m federated.demo --num_workers 3 --model cnn --epochs 5 --alpha 0.1

All other flags are main.py's; the run directory is that of main.py --protocol fedavg, so the same plots
and the same --resume work. Flower's logs are beside it, in results/NAME/flower.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from federated.processes import HOST, ROOT, Loopback
from federated.rounds import configuration
from training.run import run_folder
from utils.errors import UsageError

DEFAULTS = ["--num_workers", "2", "--model", "mlp", "--epochs", "3"]


def main(argv: list[str]) -> int:
    """Start everything, train, stop everything. Returns the exit code."""
    secure = "--secure" in argv
    given = DEFAULTS + [word for word in argv if word != "--secure"]
    try:
        config = configuration(shlex.join(given))
        folder = run_folder(config).resolve()
        # The server's process is Flower's: it must not depend on the folder it runs in.
        flags = shlex.join([*given, "--results_dir", str(Path(config.results_dir).resolve())])
        demonstrate(flags, config.num_workers, folder / "flower", secure)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the last round", file=sys.stderr)
        return 130
    return 0


def demonstrate(flags: str, nodes: int, folder: Path, secure: bool) -> None:
    """One run with ``nodes`` nodes; Flower's files and logs go to ``folder``."""
    keys = folder / "keys" if secure else None
    if keys:
        subprocess.run([ROOT / "federated" / "certificates.sh", str(keys), HOST, str(nodes)], check=True)
    with Loopback(folder, keys) as flower:
        for worker in range(nodes):
            if keys:
                flower.register(keys / f"node-{worker}")
            flower.start_node(worker, nodes)
        print(f"the server and {nodes} nodes run on {HOST}; training (logs in {folder})")
        flower.run(flags)
        print(next(line for line in reversed(flower.log("run")) if line.startswith(("test accuracy", "the run"))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
