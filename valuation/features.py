"""Features of samples: what the model of all institutions makes of them, by which methods compare samples.

Legend: n samples, F features.
"""

from __future__ import annotations

import copy
import os

import torch
from torch import Tensor, nn

from data.batches import Samples
from networks import features
from training.build import Job
from utils.errors import UsageError
from workers.derivatives import piece_size

PIECE = 256  # samples whose features are computed at once, at most
SHARE_OF_MEMORY = 0.6  # that features may take


@torch.no_grad()
def features_of(model: nn.Module, samples: Samples, ids_n: Tensor, layer: str | None = None) -> Tensor:
    """What enters the model's last linear layer [n, F], or the output of a layer, flattened, in small pieces."""
    rows_nF, piece = torch.empty(0), min(PIECE, piece_size(samples))
    for first in range(0, len(ids_n), piece):
        rows_bF = features(model, samples.plain(ids_n[first : first + piece])[0], layer).cpu()
        if first == 0:  # all room at once: to put pieces together takes twice as much
            rows_nF = rows_bF.new_empty(len(ids_n), rows_bF.shape[1])
        rows_nF[first : first + piece] = rows_bF
    return rows_nF


@torch.no_grad()
def check_layer(job: Job, layer: str | None) -> None:
    """Raises :class:`UsageError` where the network has no such layer, or it gives no features, or so many that those of
    all samples do not fit into the memory."""
    model = copy.deepcopy(job.model).to(job.samples.dtype).to(job.initial_ND.device).eval()
    row_F = features(model, job.samples.plain(job.train_ids[:2])[0], layer)[0]
    count = len(job.train_ids) + len(job.dataset.test_targets_m)
    needed, there = count * row_F.numel() * row_F.element_size(), memory()
    if needed > SHARE_OF_MEMORY * there:
        raise UsageError(
            f"{row_F.numel():,} features of {count:,} samples take {needed / 1e9:.0f} GB, and this machine has "
            f"{there / 1e9:.0f}: take a smaller --max_train or --image_size, or a --feature_layer that gives fewer."
        )


def memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
