"""Train N workers without a server: each does SGD on its own shard and averages with its neighbours.

    python main.py                                        digits, 8 workers on a ring, Dirichlet 0.8
    python main.py --mode exponential --num_workers 16    another graph
    python main.py --no-dirichlet                         IID shards
    torchrun --nproc-per-node 2 main.py ...               the same run over several processes
    python main.py --dataset_name cifar10 --download --model resnet18 --num_workers 16 --epochs 30

The run directory (results/NAME/stage1) holds the configuration, metrics, checkpoints and plots.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.args import Config

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: parallel over workers, not inside operators


def main(argv: list[str] | None = None) -> int:
    """Parse, train, report. Returns the exit code: 0, or 2 where the user has to change something."""
    from utils.args import Config, parse
    from utils.errors import INTERRUPTED, UsageError, refusal

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        config = parse(Config, argv, __doc__)
        from training.build import find_device
        from training.run import check_same_command, own_folder, run_folder, run_name, train_seeds
        from workers import distributed

        distributed.join(find_device(config.device))
        lead = distributed.rank() == 0
        if distributed.started():
            check_same_command(config)  # but each may have its data elsewhere, so the first one names the folder
            config = dataclasses.replace(config, run_name=distributed.share_json(run_name(config)))
        with own_folder(run_folder(config)):
            summary, run_dirs = train_seeds(config)
            distributed.leave()
            if lead and config.plots:
                draw(run_dirs, run_folder(config))
        if lead:
            report(config, summary, run_folder(config))
    except (UsageError, OSError) as error:  # OSError: a path that cannot be used
        return refusal(error)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    return 0


def report(config: Config, summary: dict[str, Any], folder: Path) -> None:
    """The last line of a run."""
    spread = f" +- {summary['test_accuracy_std']:.4f} over {config.seeds} seeds" if config.seeds > 1 else ""
    print(
        f"test accuracy of the consensus model {summary['test_accuracy']:.4f}{spread}; "
        f"{summary['epochs']:.0f} epochs in {summary['seconds']:.0f} s; {folder}"
    )


def draw(run_dirs: list[Path], folder: Path) -> None:
    """The plots of each run, and one of all seeds."""
    from visualization.plot_utils import plot_run, plot_seeds

    for run_dir in run_dirs:
        plot_run(run_dir)
    if len(run_dirs) > 1:
        plot_seeds(run_dirs, folder / "seeds.png")


if __name__ == "__main__":
    if sys.stdout is not None:  # it is where stdout is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text in any encoding
    sys.exit(main())
