"""Transfer to each worker's own data: K local epochs from the final model, before and after.

A worker's accuracy is measured on its own class mix: its accuracy on each class of the test set, weighted
by how often the class occurs in its shard.

Legend: N workers, C classes, D floats a row, n test samples.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from networks import head
from training.build import Job
from utils.progress import bar
from workers.evaluation import predictions
from workers.worker_vision import Fleet


def finetune(job: Job, model_1D: Tensor) -> dict[str, Any]:
    """Give every worker ``--finetune`` epochs on its own shard from this model, at the run's base learning
    rate decayed to zero by a cosine; ``--finetune_head`` moves the last layer only.

    Returns accuracies by worker on its own class mix, before and after, and their means.
    """
    config = job.config
    fleet = job.make_fleet()
    fleet.rows_RD.copy_(model_1D.expand_as(fleet.rows_RD))
    fleet.optimizer = dataclasses.replace(fleet.optimizer, weight_decay=config.wd)  # without a protocol's own
    mix_NC = class_mix(job)
    before_N = own_accuracy(job, fleet, mix_NC)
    moving_D = movable(job, fleet) if config.finetune_head else None
    steps_N = config.finetune * -(-job.batches.lengths_N // job.batches.sizes_N)
    total = int(steps_N.max())
    with bar(total, f"fine-tuning {config.num_workers} workers", "step", config.quiet) as ticks:
        for t in range(total):
            workers = (steps_N > t).nonzero()[:, 0].tolist()
            lr = config.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * t / total)).item())
            fleet.step(torch.full_like(steps_N, t), lr, workers)
            if moving_D is not None:
                fleet.rows_RD[:, ~moving_D] = model_1D[:, ~moving_D]
            ticks.update()
    after_N = own_accuracy(job, fleet, mix_NC)
    return {
        "epochs": config.finetune,
        "head_only": config.finetune_head,
        "before": before_N.tolist(),
        "after": after_N.tolist(),
        "mean_before": before_N.mean().item(),
        "mean_after": after_N.mean().item(),
    }


def movable(job: Job, fleet: Fleet) -> Tensor:
    """Which columns of a row belong to the last linear layer [D], bool."""
    last = head(job.model)
    name = next(name for name, module in job.model.named_modules() if module is last)
    moving_D = torch.zeros(fleet.layout.D, dtype=torch.bool, device=fleet.device)
    for entry in fleet.layout.parameters:
        if entry.name.rpartition(".")[0] == name:
            moving_D[entry.offset : entry.offset + entry.numel] = True
    return moving_D


def class_mix(job: Job) -> Tensor:
    """The share of each class in each worker's shard [N, C]."""
    classes = job.dataset.task.num_outputs
    counts = [torch.bincount(job.dataset.targets_n[shard], minlength=classes) for shard in job.shards]
    counts_NC = torch.stack(counts).double()
    return counts_NC / counts_NC.sum(1, keepdim=True)


def own_accuracy(job: Job, fleet: Fleet, mix_NC: Tensor) -> Tensor:
    """Accuracy [N] of every worker on the test set, reweighted to its own class mix. Classes that the test
    set lacks are left out of the mix."""
    samples = job.test_samples
    predicted_Rn = predictions(fleet.engine, fleet.rows_RD, samples, torch.arange(len(samples.targets_n)))
    predicted_Nn = fleet.collect(predicted_Rn).cpu()
    labels_n = samples.targets_n.cpu()
    member_nC = torch.nn.functional.one_hot(labels_n, mix_NC.shape[1]).double()
    hits_NC = (predicted_Nn == labels_n).double() @ member_nC
    known_C = member_nC.sum(0) > 0
    mix_NC = mix_NC * known_C
    accuracy_NC = hits_NC / member_nC.sum(0).clamp(min=1)
    return (accuracy_NC * mix_NC).sum(1) / mix_NC.sum(1)
