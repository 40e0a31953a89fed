"""What a finished run leaves: its model, its predictions, its summary.

Legend: D floats a row, C outputs, m test samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.task import Task
from networks import model_metadata, save_model
from training.build import Job
from training.finetune import finetune
from training.privacy import spent, steps_made
from utils.records import write_confusion, write_json, write_predictions
from workers import distributed
from workers.evaluation import predictions
from workers.worker_vision import Fleet

RESAMPLES = 100  # of the test samples


def interval(task: Task, predicted_m: np.ndarray, targets_m: np.ndarray) -> list[float]:
    """The ends of the 95 % interval of the first metric over the test samples (bootstrap, normal), for metrics that are
    no means over samples."""
    draws = np.random.default_rng(0).integers(len(targets_m), size=(RESAMPLES, len(targets_m)))
    half = 1.96 * float(np.std([task.score(predicted_m[i], targets_m[i]) for i in draws], ddof=1))
    middle = task.score(predicted_m, targets_m)
    return [middle - half, middle + half]


def save_result(job: Job, fleet: Fleet, model_1D: Tensor, run_dir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Complete the summary and, in the first process, write it, with model.safetensors, predictions.npz and, where
    there are classes, confusion.npz."""
    if job.config.finetune:
        summary["finetune"] = finetune(job, model_1D)
    if fleet.privacy is not None:
        summary["privacy"] = spent(job, steps_made(job, summary["rounds"]))
    if isinstance(fleet, distributed.ShardedFleet):
        summary["processes"] = distributed.world()
        summary["crossed_bytes"] = fleet.total_crossed_bytes()
    if fleet.isolated:
        summary["isolated"] = sorted(fleet.isolated)
    if job.byzantine is not None:
        summary["byzantine"] = {"workers": list(job.byzantine.workers), "attack": job.byzantine.attack}
    if distributed.rank() > 0:
        return summary
    data, task = job.dataset, job.dataset.task
    targets_m = data.test_targets_m.numpy()
    test_ids = torch.arange(len(targets_m))
    predicted_m = predictions(fleet.engine, model_1D, job.test_samples, test_ids)[0].cpu().numpy()
    write_predictions(run_dir, targets_m, predicted_m)
    summary |= {f"test_{name}": values for name, values in task.by_output(predicted_m, targets_m).items()}
    if task.hits(predicted_m, targets_m) is None:  # an accuracy's follows from its figure
        summary[f"test_{task.metric.name}_interval"] = interval(task, predicted_m, targets_m)
    counts_CC = task.confusion(predicted_m, targets_m)
    if counts_CC is not None:
        write_confusion(run_dir, counts_CC, task.names)
    about = {"mean": data.mean_C.tolist(), "std": data.std_C.tolist(), "task": task.record()}
    metadata = model_metadata(job.config.model, task.num_outputs, job.samples.shape, **about)
    save_model(fleet.layout.state_dict(model_1D[0]), run_dir / "model.safetensors", metadata)
    write_json(run_dir / "summary.json", summary)
    return summary
