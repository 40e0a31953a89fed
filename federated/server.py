"""The Flower ServerApp: the trainer of main.py, with a protocol whose workers are Flower nodes.

Evaluation, metrics, checkpoints and the run directory are the trainer's own, so a federated run is
read, plotted and resumed (``--resume``) like any other.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federated.identity import PublicKey, read_allow_list
from federated.nodes import Nodes
from federated.rounds import DeployedFedAvg, configuration, execution
from training.run import own_folder, prepare, run_folder
from training.trainer import Trainer
from utils.args import Config
from utils.errors import UsageError
from utils.records import figure_of, metric_of, shown

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the run that the flags describe, on the nodes that are there."""
    try:
        serve(grid, context)
    except UsageError as error:
        print(f"error: {error}")  # one line of 'flwr run --stream' says it, before Flower's traceback
        raise


def serve(grid: Grid, context: Context) -> None:
    """The run that the flags describe, in a folder that no other process works in."""
    config = configuration(str(context.run_config["flags"]))
    config = dataclasses.replace(config, quiet=True, checkpoint_every=config.checkpoint_every or 1)
    with own_folder(run_folder(config)):
        train(grid, context, config)


def train(grid: Grid, context: Context, config: Config) -> None:
    """The run, to its summary."""
    settings = context.run_config
    run_dir = run_folder(config) / "stage1"
    keys = allow_list(str(settings["node-keys"]), config.num_workers)
    job = prepare(config, run_dir, execution(config))
    if job is None:
        print(f"the run {run_dir} is finished")
        return
    nodes = Nodes(grid, job, context.run_id, keys, float(settings["nodes-seconds"]), float(settings["reply-seconds"]))
    trainer = Trainer(job, run_dir, notes={"deployment": {"flwr": version("flwr"), "nodes": config.num_workers}})
    trainer.protocol = DeployedFedAvg(nodes.exchange)
    summary = trainer.train()
    if config.plots:
        from visualization.plot_utils import plot_run
        from visualization.report import write_report

        plot_run(run_dir)
        write_report(run_dir)
    metric = metric_of(summary)
    said = f"test {metric['name']} {shown(figure_of(summary), metric)} after {summary['rounds']} rounds"
    print(f"{said}; {run_dir.resolve()}")


def allow_list(folder: str, workers: int) -> list[PublicKey] | None:
    """The key of each worker; None, with a warning, where the run names no folder of keys."""
    if folder:
        return read_allow_list(Path(folder), workers)
    print("warning: no node-keys in the run config: whoever the server lets in may say which worker it is")
    return None
