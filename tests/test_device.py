"""The GPU path on the stand-in accelerator (:mod:`tests.stand_in`): the CPU's numbers to the bit, nothing mixed, few
synchronizations and launches; and mistakes planted on purpose are noticed.

Learning rates are sums of few powers of two: a recorded step reads them as float32.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.own_process import in_own_process
from tests.runs import digits_job, recorded
from tests.stand_in import DeviceError, Log, stand_in, unlogged
from training.build import Job
from training.protocols import load_protocol
from training.retrain import retrain
from training.trainer import Trainer, mean_loss, train
from utils.errors import UsageError
from utils.influence import Options, score
from utils.influence.ripples import ripples
from utils.records import read_json
from utils.topology import build_topology
from workers.step_graph import MOST_ROWS, StepGraph
from workers.worker_vision import Batch, Fleet, predictions

# Most synchronizations and kernel launches (a replayed graph is one) of each part, once graphs are recorded.
# step: Fleet.step; gossip: Fleet.mix on the ring; round: both, and the loss that the trainer logs; evaluation: the
# trainer's line of metrics. Figures of the code as it is; what they should be is behind them.
BUDGETS: dict[tuple[str, str, int], dict[str, tuple[int, int]]] = {}
# Synchronizations and launches of scoring a run of 8 workers and 4 steps, the replay of its states included.
SCORE_BUDGETS: dict[tuple[str, str], tuple[int, int]] = {}


def a_job(device: str, **settings) -> Job:
    """A job of four rounds of four workers in float32 on a device; 'normed' is a small network with BatchNorm."""
    defaults = dict(device=device, dtype="float32", epochs=1, batch_size=16, max_train=240, num_workers=4, lr=0.0625)
    settings = defaults | settings
    if device == "cpu" and settings.get("engine") == "graph":
        settings["engine"] = "loop"
    network = None
    if settings.get("model") == "normed":
        torch.manual_seed(0)
        settings["model"] = "cnn"
        layers = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)
        network = nn.Sequential(*layers)
    return digits_job(network, **settings)


def rounds_of(job: Job, fleet: Fleet) -> list[float]:
    """Train to the end; the losses of the rounds."""
    return [mean_loss(event) for event in load_protocol(job.config.protocol).run(fleet, job)]


def trained(job: Job) -> dict[str, Tensor]:
    """Everything that training and looking at its result computes."""
    fleet = job.make_fleet()
    losses = torch.tensor(rounds_of(job, fleet), dtype=torch.float64)
    loss_N, accuracy_N = fleet.evaluate(job.samples, job.val_ids)
    model_1D = fleet.consensus()
    return {
        "losses": losses,
        "rows": fleet.rows_RD,
        "momentum": fleet.momentum_RP,
        "loss_N": loss_N,
        "accuracy_N": accuracy_N,
        "consensus": model_1D,
        "loss_1": fleet.evaluate(job.samples, job.val_ids, model_1D)[0],
        "distance": fleet.consensus_distance(),
        "predictions": predictions(fleet.engine, fleet.rows_RD, job.samples, job.val_ids),
    }


def same_on_both(compute, **settings) -> Log:
    """``compute(job)`` gives the same bits on the CPU and on the device."""
    expected = compute(a_job("cpu", **settings))
    with stand_in() as log:
        result = compute(a_job("cuda", **settings))
        with unlogged():
            result = {name: tensor.cpu() for name, tensor in result.items()}
    assert {k: v.dtype for k, v in result.items()} == {k: v.dtype for k, v in expected.items()}
    different = {n: (result[n] - e).abs().max().item() for n, e in expected.items() if not torch.equal(result[n], e)}
    assert different == {}, different
    assert log.errors == []
    return log


# ---- the same numbers ----------------------------------------------------------------------------

TRAININGS = {
    "cnn": dict(model="cnn", engine="graph"),
    "cnn-channels_last": dict(model="cnn", engine="graph", channels_last=True),
    "mlp-vmap-threads": dict(model="mlp", engine="vmap", num_workers=8, threads=2),
    "mlp-loop-one_peer": dict(model="mlp", engine="loop", mode="exponential_one_peer", init="per_worker"),
    "mlp-graph-local_steps": dict(model="mlp", engine="graph", local_steps=2, epochs=2, scheduler="multistep"),
    "normed-graph": dict(model="normed", engine="graph"),
    "normed-loop": dict(model="normed", engine="loop", augment="crop"),
    "normed-vmap": dict(model="normed", engine="vmap"),
    "graph-ragged-augmented": dict(model="normed", engine="graph", batch_size=64, epochs=4, augment="crop_flip"),
    "vmap-ragged": dict(model="mlp", engine="vmap", batch_size=64, epochs=4),
    "fedavg": dict(model="mlp", engine="graph", protocol="fedavg", fraction_fit=0.5, epochs=2),
    "fedavg-momentum": dict(model="mlp", engine="vmap", protocol="fedavg", server_momentum=0.5, epochs=2),
    "fedasync": dict(model="mlp", engine="loop", protocol="fedasync"),
    "chained": dict(model="mlp", engine="graph", protocol="chained", epochs=2),
    "local": dict(model="mlp", engine="graph", protocol="local"),
    "all": dict(model="mlp", engine="vmap", mode="all", num_workers=6),
    "median": dict(model="mlp", engine="graph", mode="all", aggregation="median", byzantine="1:sign_flip"),
    "trimmed_mean": dict(model="normed", engine="loop", mode="all", aggregation="trimmed_mean", byzantine="1:noise"),
    "clipped": dict(model="normed", engine="graph", mode="all", aggregation="clipped", byzantine="1:noise"),
    "isolate": dict(model="mlp", engine="graph", mode="all", aggregation="median", byzantine="1:nan",
                    on_bad_worker="isolate"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
@in_own_process
def test_training_gives_the_bits_of_the_cpu(name):
    same_on_both(trained, **TRAININGS[name])


@pytest.mark.parametrize("engine", ["loop", "vmap", "graph"])
@in_own_process
def test_replicas_with_weights_give_the_bits_of_the_cpu(engine):
    def retrained(job: Job) -> dict[str, Tensor]:
        weights_Mn = torch.ones(3, len(job.dataset.labels_n))
        weights_Mn[1, job.train_ids[::3]] = 0.0
        weights_Mn[2, job.train_ids[::2]] = 0.5
        return {target: retrain(job, 3, weights_Mn, target) for target in ("nodes", "consensus", "worker:1")}

    same_on_both(retrained, model="mlp", engine=engine)


SCORED = {
    "mlp-vmap": dict(model="mlp_smooth", engine="vmap"),
    "mlp-graph-ragged": dict(model="mlp_smooth", engine="graph", batch_size=64, epochs=3, local_steps=2),
    "cnn-graph": dict(model="cnn_smooth", engine="graph", mode="exponential_one_peer"),
    "normed-loop": dict(model="normed", engine="loop"),
    "fedavg": dict(model="mlp_smooth", engine="graph", protocol="fedavg", fraction_fit=0.5, epochs=2),
    "chained": dict(model="mlp_smooth", engine="graph", protocol="chained"),
}


@pytest.mark.parametrize("name", SCORED)
@in_own_process
def test_scores_are_the_bits_of_the_cpu(name):
    def scored(job: Job) -> dict[str, Tensor]:
        methods = ["cascade", "dice", "delete", *(["if"] if name in ("cnn-graph", "normed-loop") else [])]
        run, options = recorded(job, memory_limit=1e5), Options(dice_hops=2, dice_rounds=2, delete_checkpoints=2)
        scores = {method: score(method, run, options) for method in methods}
        return scores | {"ripples": ripples(run, hops=1, rounds=1)}

    same_on_both(scored, **SCORED[name])


@in_own_process
def test_a_whole_run_leaves_the_files_of_the_cpu(tmp_path):
    """The command's path: 'auto' tries a recorded step, the trainer evaluates, checkpoints, resumes and tests."""
    settings = dict(model="cnn", engine="auto", epochs=2, checkpoint_every=2, threads=2)
    train(a_job("cpu", **settings | dict(engine="loop")), tmp_path / "cpu")
    with stand_in() as log:
        job = a_job("cuda", **settings)
        assert job.execution.engine == "graph"
        for max_rounds in (4, None):  # killed after four rounds, resumed
            stopped = dataclasses.replace(job, config=dataclasses.replace(job.config, max_rounds=max_rounds))
            train(stopped, tmp_path / "cuda")
    assert log.errors == []
    models = [(tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "cuda")]
    assert models[0] == models[1]
    summaries = [read_json(tmp_path / device / "summary.json") for device in ("cpu", "cuda")]
    for summary in summaries:
        del summary["seconds"], summary["samples_per_second"]
    assert summaries[0] == summaries[1]


# ---- few synchronizations and launches --------------------------------------------------------------


def measure(log: Log, action) -> tuple[tuple[int, int], str]:
    """Synchronizations and launches of an action, and where they are."""
    log.clear()
    action()
    where = [f"{count:5} x {what} at {line}" for (what, line), count in (log.syncs + log.copies).most_common()]
    return (log.waits, log.launches), "\n".join([*where, str(log.kernels.most_common(12))])


def parts_of(log: Log, job: Job, folder) -> dict[str, tuple[tuple[int, int], str]]:
    """The figures of each part of a training whose graphs are recorded."""
    trainer = Trainer(job, folder)
    trainer.stopping.update = lambda loss: False
    fleet, protocol = trainer.fleet, load_protocol(job.config.protocol)
    rounds = protocol.run(fleet, job)
    for _ in range(2):  # gossip takes turns between two matrices, each with its graph
        mean_loss(next(rounds))
    trainer.done = 2
    steps_N = torch.full((fleet.num_workers,), 2)
    return {
        "round": measure(log, lambda: mean_loss(next(rounds))),
        "gossip": measure(log, lambda: fleet.mix(job.topology.mixing(0))),
        "step": measure(log, lambda: fleet.step(steps_N, 0.0625)),
        "evaluation": measure(log, lambda: trainer._evaluate(mock.Mock(), 0.0625)),
    }


def assert_within(budgets: dict, figures: dict) -> None:
    excess = [
        f"{part}: {figure} synchronizations and launches, {budgets[part]} are allowed\n{where}"
        for part, (figure, where) in figures.items()
        if figure[0] > budgets[part][0] or figure[1] > budgets[part][1]
    ]
    assert excess == [], "\n".join(excess)


@pytest.mark.parametrize("model,engine,workers", BUDGETS)
@in_own_process
def test_synchronizations_and_launches_are_in_the_budget(model, engine, workers, tmp_path):
    size = dict(num_workers=workers, dirichlet=False, batch_size=2, max_train=min(1280, 8 * workers))
    with stand_in() as log:
        figures = parts_of(log, a_job("cuda", model=model, engine=engine, **size, epochs=2), tmp_path)
    assert_within(BUDGETS[model, engine, workers], figures)


@pytest.mark.parametrize("model,method", SCORE_BUDGETS)
@in_own_process
def test_synchronizations_and_launches_of_scores_are_in_the_budget(model, method):
    with stand_in() as log:
        run = recorded(a_job("cuda", model=model, engine="graph" if model != "mlp_smooth" else "vmap", num_workers=8))
        score("cascade", run, Options())  # records the graphs, and finds out which derivative to trust
        figure = measure(log, lambda: score(method, run, Options(dice_rounds=2, delete_checkpoints=2)))
    assert_within({method: SCORE_BUDGETS[model, method]}, {method: figure})
