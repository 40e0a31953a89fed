"""Train N workers without a server: each does SGD on its own shard and averages with its neighbours.

    python main.py                                        digits, 8 workers on a ring, Dirichlet 0.8
    python main.py --mode exponential --num_workers 16    another graph
    python main.py --no-dirichlet                         IID shards
    torchrun --nproc-per-node 2 main.py ...               the same run over several processes
    python main.py --dataset_name cifar10 --download --model resnet18 --num_workers 16 --epochs 30

The run directory (results/NAME/stage1) holds the configuration, metrics, checkpoints and plots.
"""

from __future__ import annotations

from utils.command import STOPPED, begin, interrupted, ready

if __name__ == "__main__":
    begin()  # first, so that Ctrl-C and a missing package are a line from the first moment on

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
    from utils.args import Config
    from utils.errors import UsageError, refusal
    from utils.parser import parse

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    config = folder = None
    try:
        config = parse(Config, argv, __doc__)
        from training.deal import with_workers
        from training.execution import find_device
        from training.run import check_same_command, own_folder, run_folder, run_name, train_seeds
        from workers import distributed

        ready()
        config = with_workers(config)
        distributed.join(find_device(config.device))
        lead = distributed.rank() == 0
        if distributed.started():
            check_same_command(config)  # but each may have its data elsewhere, so the first one names the folder
            config = dataclasses.replace(config, run_name=distributed.share_json(run_name(config)))
        folder = run_folder(config)
        with own_folder(folder):
            summary, run_dirs = train_seeds(config)
            distributed.leave()
            if lead and config.plots:
                from visualization.report import draw_run

                draw_run(run_dirs, folder)
        if lead:
            report(config, summary, folder)
    except (UsageError, OSError) as error:  # OSError: a path that cannot be used
        return refusal(error)
    except KeyboardInterrupt:
        print(interrupted(config, folder), file=sys.stderr)
        return STOPPED
    return 0


def report(config: Config, summary: dict[str, Any], folder: Path) -> None:
    """The last line of a run, and one on how private it was."""
    from utils.records import figure_of, metric_of, privacy_said, shown, spelled

    metric = metric_of(summary)
    std = summary.get(f"test_{metric['name']}_std")
    spread = "" if std is None else f" +- {std:.4f} over {config.seeds} seeds"
    print(
        f"test {spelled(metric['name'])} of the consensus model {shown(figure_of(summary), metric)}{spread}; "
        f"{summary['epochs']:.0f} epochs in {summary['seconds']:.0f} s; {folder}"
    )
    if "privacy" in summary:
        print(privacy_said(summary["privacy"]))
    if config.plots:
        print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
