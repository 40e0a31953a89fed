"""Bad data on purpose, recorded by sample id: ground truth for methods that claim to find it.

Legend: n training samples, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.dataset_loader import Dataset
from utils.bad_workers import bad_workers
from utils.errors import UsageError
from utils.random import integers, permutations, uniform

KINDS = ("label_flip", "noise")


def corrupt(
    dataset: Dataset, shards: list[Tensor], flip_share: float, bad_data: str | None, seed: int,
    worker_flips: Sequence[float] = (),
) -> tuple[Dataset, dict[str, Any]]:
    """The data set with flipped labels and bad workers' data, and what was done (empty: nothing).

    ``flip_share`` of all training labels become another class, drawn uniformly, and of each worker's a share of its own
    where ``worker_flips`` says so. ``bad_data``
    'COUNT:label_flip' flips all labels of COUNT workers' shards; 'COUNT:noise' replaces their images by
    noise. Validation and test stay as they are, and the fingerprint is that of the data without all this.
    """
    if flip_share == 0 and bad_data is None and not any(worker_flips):
        return dataset, {}
    workers, kind = [], None
    if bad_data is not None:
        workers, kind = bad_workers("--bad_data", bad_data, KINDS, len(shards), seed, "bad workers")
    classes, flips = dataset.task.num_outputs, flip_share > 0 or any(worker_flips) or kind == "label_flip"
    if flips and (dataset.targets_n.dim() != 1 or classes < 2):
        raise UsageError(
            "--flip_labels, --worker_flips and --bad_data label_flip need samples of one of two classes or more; "
            f"{dataset.name} has samples {dataset.task.what}."
        )
    if kind == "noise" and not dataset.pictures:
        raise UsageError("--bad_data noise is for pictures: leave it out.")
    labels_n, images_nCHW = dataset.targets_n.clone(), dataset.inputs_n
    train_ids = torch.cat(shards).sort().values
    count = round(flip_share * len(train_ids))
    order = permutations(torch.tensor([len(train_ids)]), seed, "flip")[0]
    flipped = train_ids[order[:count]].sort().values
    for k, share in enumerate(worker_flips):
        order = permutations(torch.tensor([len(shards[k])]), seed, "flip of worker", k)[0]
        flipped = torch.cat([flipped, shards[k][order[: round(share * len(shards[k]))]]]).unique()
    bad_ids = torch.cat([shards[k] for k in workers]) if workers else torch.empty(0, dtype=torch.int64)
    if kind == "label_flip":
        flipped = torch.cat([flipped, bad_ids]).unique()
    elif kind == "noise":
        images_nCHW = images_nCHW.clone()
        pixels = images_nCHW[0].numel()
        noise = uniform(seed, "noise", bad_ids[:, None], torch.arange(pixels))
        images_nCHW[bad_ids] = (noise * 256).to(torch.uint8).view(-1, *images_nCHW.shape[1:])
    if flips:
        shift = 1 + integers(classes - 1, seed, "flip to", flipped)
        labels_n[flipped] = (labels_n[flipped] + shift) % classes
    record = {"flipped": flipped.tolist(), "flip_share": flip_share, "bad_workers": workers, "kind": kind}
    record |= {"worker_flips": list(worker_flips)} if any(worker_flips) else {}
    return dataclasses.replace(dataset, targets_n=labels_n, inputs_n=images_nCHW), record
