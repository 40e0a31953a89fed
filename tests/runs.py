"""Small real runs on the digits for tests of influence and training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from training.build import Job, build
from training.protocols import load_protocol
from training.retrain import retrain
from training.trajectory import RecordedRun
from utils.args import Config
from workers.engine import Engine
from workers.row_layout import RowLayout


def digits_job(network: nn.Module | None = None, **settings) -> Job:
    """A job on the digits in float64: 8 workers, ring, momentum and weight decay on, few steps.

    ``network`` (or model='mlp_tiny') puts another network in the place of the configuration's."""
    defaults = dict(
        model="mlp_smooth",
        epochs=3,
        dtype="float64",
        engine="loop",
        quiet=True,
        max_train=400,
        lr=0.1,
        wd=1e-2,
        threads=1,
        channels_last=False,
    )
    if settings.get("model") == "mlp_tiny":
        settings["model"] = "mlp_smooth"
        torch.manual_seed(0)
        network = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 10)).double()
    job = build(Config(**(defaults | settings)))
    if network is not None:
        layout = RowLayout(network)
        row_D = torch.empty(layout.D, dtype=job.samples.dtype)
        layout.write(network, row_D)
        job.model, job.initial_ND = network, row_D[None].to(job.initial_ND.device)
        job.engine = Engine(network, layout, job.engine.name, job.engine.threads)
    return job


def recorded(job: Job, **options) -> RecordedRun:
    """The job's run, to be replayed."""
    return RecordedRun(job, load_protocol(job.config.protocol).rounds(job), **options)


def final_objective(job: Job, weights_n: Tensor, target: str = "nodes") -> float:
    """F after a whole training with these sample weights."""
    rounds = load_protocol(job.config.protocol).rounds(job)
    return retrain(job, rounds, weights_n[None], target)[0].item()


def torch_gradient(job: Job, row_D: Tensor, ids_n: Tensor) -> Tensor:
    """The gradient [P] of the mean loss on these samples, by autograd on the plain network."""
    images, labels_n = job.samples.plain(ids_n)
    row_D = row_D.detach().clone().requires_grad_()
    tensors = {e.name: e.view(row_D) for e in job.engine.layout.entries}
    F.cross_entropy(functional_call(job.model.eval(), tensors, (images,)), labels_n).backward()
    return row_D.grad[: job.engine.layout.P]
