"""What a finished run leaves: its model, its predictions, its summary.

Legend: D floats a row, C outputs, m test samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks import model_metadata, save_model
from training.build import Job
from training.finetune import finetune
from training.privacy import spent, steps_made
from utils.records import write_confusion, write_json, write_predictions
from workers import distributed
from workers.evaluation import predictions
from workers.worker_vision import Fleet


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
    counts_CC = task.confusion(predicted_m, targets_m)
    if counts_CC is not None:
        write_confusion(run_dir, counts_CC, task.names)
    about = {"mean": data.mean_C.tolist(), "std": data.std_C.tolist(), "task": task.record()}
    metadata = model_metadata(job.config.model, task.num_outputs, job.samples.shape, **about)
    save_model(fleet.layout.state_dict(model_1D[0]), run_dir / "model.safetensors", metadata)
    write_json(run_dir / "summary.json", summary)
    return summary
