"""What models given as rows make of samples: loss, metrics, predictions, in evaluation mode.

Legend: R rows, D floats a row, m samples, B batch, C outputs, K sums; [n, B] in ``_evaluate``: n rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data.batches import Samples
from utils import devices
from utils.devices import send
from utils.progress import Progress, ignored
from workers.engine import Engine

# Samples evaluated at once: larger batches cost the CNN 1.8 times as much a sample on a CPU (freshly mapped memory),
# while a GPU idles at small ones.
EVALUATION_BATCH, GPU_EVALUATION_BATCH = 128, 1024


@torch.no_grad()
def evaluate_rows(
    engine: Engine, rows_RD: Tensor, samples: Samples, ids_m: Tensor, batch_size: int | None = None,
    progress: Progress = ignored,
) -> dict[str, Tensor]:
    """The mean 'loss' [R] and the task's metrics [R] of models given as rows, in evaluation mode; float64."""
    task, count = samples.task, len(ids_m)

    def summed(outputs_nBC: Tensor, targets_nB: Tensor) -> Tensor:
        loss_n = task.losses(outputs_nBC, targets_nB).sum(1, dtype=torch.float64)
        return torch.cat([loss_n[:, None], task.sums(outputs_nBC, targets_nB)], 1)

    if task.summed:
        totals_RK = torch.stack(_evaluate(engine, rows_RD, samples, ids_m, batch_size, summed, progress)).sum(0)
        return {"loss": totals_RK[:, 0] / count, **task.of_sums(totals_RK[:, 1:], count)}
    kept = _evaluate(engine, rows_RD, samples, ids_m, batch_size, lambda outputs, _: outputs, progress)
    outputs_RmC, targets_m = torch.cat(kept, 1), samples.targets_n[send(ids_m, samples.targets_n.device)]
    losses_Rm = task.losses(outputs_RmC, targets_m.expand(len(rows_RD), *targets_m.shape))
    metrics = {name: value_R.to(rows_RD.device) for name, value_R in task.of_outputs(outputs_RmC, targets_m).items()}
    return {"loss": losses_Rm.mean(1, dtype=torch.float64), **metrics}


@torch.no_grad()
def predictions(
    engine: Engine, rows_RD: Tensor, samples: Samples, ids_m: Tensor, batch_size: int | None = None
) -> Tensor:
    """What each row makes of each sample, as the task's :meth:`Task.predicted`: [R, m, ...]."""

    def predicted(outputs_nBC: Tensor, _: Tensor) -> Tensor:
        return samples.task.predicted(outputs_nBC)

    return torch.cat(_evaluate(engine, rows_RD, samples, ids_m, batch_size, predicted), 1)


def _evaluate(
    engine: Engine,
    rows_RD: Tensor,
    samples: Samples,
    ids_m: Tensor,
    batch_size: int | None,
    reduce: Callable[[Tensor, Tensor], Tensor],
    progress: Progress = ignored,
) -> list[Tensor]:
    """``reduce(outputs [n, B, C], targets [n, B, ...])`` for all rows, one tensor [R, ...] a batch of samples.

    Every (chunk of rows, batch of samples) is a task of its own, so that a single row uses all threads.
    """
    batch_size = batch_size or (GPU_EVALUATION_BATCH if devices.is_accelerator(rows_RD.device) else EVALUATION_BATCH)
    chunks = engine.chunks(range(len(rows_RD)))
    pieces = list(send(ids_m, samples.targets_n.device).split(batch_size))

    def run(chunk: list[int], piece: Tensor) -> Tensor:
        inputs, targets_B = samples.plain(piece)
        rows_nD = rows_RD[chunk[0] : chunk[-1] + 1]
        leaves = [leaf.detach() for leaf in engine.leaves(rows_nD)]
        outputs_nBC = engine.outputs(leaves, rows_nD, inputs.expand(len(chunk), *inputs.shape), train=False)
        return reduce(outputs_nBC, targets_B.expand(len(chunk), *targets_B.shape))

    tasks = [(chunk, piece) for piece in pieces for chunk in chunks]
    results = []
    for task, result in zip(tasks, engine.each(torch.no_grad()(run), *zip(*tasks, strict=True)), strict=True):
        results.append(result)
        progress(len(task[0]) * len(task[1]))
    return [torch.cat(results[i : i + len(chunks)]) for i in range(0, len(results), len(chunks))]
