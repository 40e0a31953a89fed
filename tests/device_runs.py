"""Jobs and figures that the tests on the stand-in accelerator share."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from tests.runs import digits_job
from tests.stand_in import Log, stand_in, unlogged
from training.build import Job
from training.protocols import load_protocol
from training.round_losses import mean_loss
from workers.evaluation import predictions
from workers.worker_vision import Fleet


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
    measured = fleet.evaluate(job.samples, job.val_ids)
    model_1D = fleet.consensus()
    return {
        "losses": losses,
        "rows": fleet.rows_RD,
        "momentum": fleet.state_RS,
        **{f"{name}_N": value_N for name, value_N in measured.items()},
        "consensus": model_1D,
        "loss_1": fleet.evaluate(job.samples, job.val_ids, model_1D)["loss"],
        "distance": fleet.consensus_distance(),
        "predictions": predictions(fleet.engine, fleet.rows_RD, job.samples, job.val_ids),
    }


def same_on_both(compute: Callable[[Job], dict[str, Tensor]], **settings) -> Log:
    """``compute(job)`` gives the same bits on the device and on a CPU that goes the way of devices."""
    with mock.patch("utils.devices.is_accelerator", return_value=True):
        expected = compute(a_job("cpu", **settings))
    with stand_in() as log:
        result = compute(a_job("cuda", **settings))
        with unlogged():
            result = {name: tensor.cpu() for name, tensor in result.items()}
    assert {k: v.dtype for k, v in result.items()} == {k: v.dtype for k, v in expected.items()}
    different = {n: (result[n] - e).abs().max().item() for n, e in expected.items() if not torch.equal(result[n], e)}
    assert different == {}, different
    assert log.errors == [], log.errors
    return log


def measure(log: Log, action: Callable[[], object]) -> tuple[tuple[int, int], str]:
    """Synchronizations and launches of an action, and where they are."""
    log.clear()
    action()
    where = [f"{count:5} x {what} at {line}" for (what, line), count in (log.syncs + log.copies).most_common()]
    return (log.waits, log.launches), "\n".join([*where, str(log.kernels.most_common(12))])


def assert_within(budgets: dict, figures: dict) -> None:
    excess = [
        f"{part}: {figure} synchronizations and launches, {budgets[part]} are allowed\n{where}"
        for part, (figure, where) in figures.items()
        if figure[0] > budgets[part][0] or figure[1] > budgets[part][1]
    ]
    assert excess == [], "\n".join(excess)
