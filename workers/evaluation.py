"""What models given as rows make of samples: loss, accuracy, predictions, in evaluation mode.

Legend: R rows, D floats a row, n samples, B batch, C classes; [n, B] in ``_evaluate``: n rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import Samples
from utils import devices
from utils.devices import send
from utils.progress import Progress, ignored
from workers.engine import Engine

# Samples evaluated at once: larger batches cost the CNN 1.8 times as much a sample on a CPU (freshly mapped memory),
# while a GPU idles at small ones.
EVALUATION_BATCH, GPU_EVALUATION_BATCH = 128, 1024


def cross_entropy(logits_nBC: Tensor, labels_nB: Tensor) -> Tensor:
    """Cross-entropy of each sample [n, B]; half-precision logits are widened first."""
    wide = logits_nBC if logits_nBC.dtype == torch.float64 else logits_nBC.float()
    return F.cross_entropy(wide.flatten(0, -2), labels_nB.flatten(), reduction="none").view_as(labels_nB)


@torch.no_grad()
def evaluate_rows(
    engine: Engine, rows_RD: Tensor, samples: Samples, ids_n: Tensor, batch_size: int | None = None,
    progress: Progress = ignored,
) -> tuple[Tensor, Tensor]:
    """Mean loss [R] and accuracy [R] of models given as rows, in evaluation mode."""

    def summed(logits_nBC: Tensor, labels_nB: Tensor) -> Tensor:
        loss_n = cross_entropy(logits_nBC, labels_nB).sum(1, dtype=torch.float64)
        return torch.stack([loss_n, (logits_nBC.argmax(-1) == labels_nB).sum(1).double()], 1)

    pieces = _evaluate(engine, rows_RD, samples, ids_n, batch_size, summed, progress)
    loss_R, hits_R = torch.stack(pieces).sum(0).unbind(1)
    return loss_R / len(ids_n), hits_R / len(ids_n)


@torch.no_grad()
def predictions(
    engine: Engine, rows_RD: Tensor, samples: Samples, ids_n: Tensor, batch_size: int | None = None
) -> Tensor:
    """The class that each row predicts for each sample: [R, n], int64."""
    return torch.cat(_evaluate(engine, rows_RD, samples, ids_n, batch_size, lambda logits, _: logits.argmax(-1)), 1)


def _evaluate(
    engine: Engine,
    rows_RD: Tensor,
    samples: Samples,
    ids_n: Tensor,
    batch_size: int | None,
    reduce: Callable[[Tensor, Tensor], Tensor],
    progress: Progress = ignored,
) -> list[Tensor]:
    """``reduce(logits [n, B, C], labels [n, B])`` for all rows, one tensor [R, ...] a batch of samples.

    Every (chunk of rows, batch of samples) is a task of its own, so that a single row uses all threads.
    """
    batch_size = batch_size or (GPU_EVALUATION_BATCH if devices.is_accelerator(rows_RD.device) else EVALUATION_BATCH)
    chunks = engine.chunks(range(len(rows_RD)))
    pieces = list(send(ids_n, samples.labels_n.device).split(batch_size))

    def run(chunk: list[int], piece: Tensor) -> Tensor:
        images, labels_B = samples.plain(piece)
        rows_nD = rows_RD[chunk[0] : chunk[-1] + 1]
        leaves = [leaf.detach() for leaf in engine.leaves(rows_nD)]
        logits_nBC = engine.logits(leaves, rows_nD, images.expand(len(chunk), *images.shape), train=False)
        return reduce(logits_nBC, labels_B.expand(len(chunk), -1))

    tasks = [(chunk, piece) for piece in pieces for chunk in chunks]
    results = []
    for task, result in zip(tasks, engine.each(torch.no_grad()(run), *zip(*tasks, strict=True)), strict=True):
        results.append(result)
        progress(len(task[0]) * len(task[1]))
    return [torch.cat(results[i : i + len(chunks)]) for i in range(0, len(results), len(chunks))]
