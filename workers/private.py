"""Differentially private local steps: DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

The gradient of each sample is cut to a norm of C at most, these are added, Gaussian noise of deviation sigma C is added
to the sum, and that over the size of the batch is what the optimizer gets. So one sample moves the sum by no more than
C, and the noise hides whether it was there.

The noise of a step is a function of (seed, worker, step), like all that is random here: a run resumes to the bit, and
coalitions have common random numbers. Whoever knows the seed can therefore take the noise off again: what is computed
here is what private training comes to, and a deployment would have to draw its noise from a secret.

Legend: n workers of a chunk, B batch, C outputs, D floats a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.task import Task
from utils.random import normals
from workers.batch import Batch, Gradients, added
from workers.engine import Engine

# Floats of samples' own gradients that a chunk holds at once. Processor time of a step of 32 samples, all at once and
# in four pieces: CNN on 1 x 8 x 8 (1 million floats in all) 15 and 24 ms, on 3 x 32 x 32 (9 million) 144 and 115 ms.
FLOATS = 1 << 22
PIECE = 1 << 16  # floats of noise that are drawn at once: their bits stay in the cache


@dataclass(frozen=True)
class Privacy:
    """``noise``: sigma, its deviation in units of ``clip``; ``clip``: C, the largest norm of a sample's gradient over
    all trainable parameters."""

    noise: float
    clip: float = 1.0

    def gradients(self, engine: Engine, task: Task, rows_nD: Tensor, batch: Batch) -> Gradients:
        """What a chunk's batch asks of its rows: over the size of the batch, the sum of clipped gradients and noise.
        A sample of weight w counts w times what is left of its gradient after clipping: one of weight 0 is as good as
        absent, and none of a weight up to 1 counts for more than C."""
        floats = len(rows_nD) * engine.layout.num_parameters  # of one sample of each worker
        pieces = batch.cut(-(-batch.ids.shape[1] // max(1, FLOATS // floats)))
        leaves = engine.leaves(rows_nD)
        whole = added([self._clipped(engine, task, leaves, rows_nD, piece) for piece in pieces])
        sums = whole.gradients
        if self.noise:
            noise_nP = self.noise * self.clip * drawn(batch.keys, engine.layout.num_parameters).to(rows_nD.dtype)
            parts = noise_nP.split([e.numel for e in engine.layout.parameters], 1)
            sums = [total + part.reshape(total.shape) for total, part in zip(sums, parts, strict=True)]
        each = engine.batched  # sums of each worker, or of the only one of the chunk
        gradients = [t / (batch.sizes.view(-1, *(1,) * (t.dim() - 1)) if each else batch.sizes[0]) for t in sums]
        return Gradients(leaves, gradients, whole.loss_n / batch.sizes)

    def _clipped(self, engine: Engine, task: Task, leaves: list[Tensor], rows_nD: Tensor, batch: Batch) -> Gradients:
        """The sums over a part of the batch: of clipped gradients, and of losses."""
        layout = engine.layout
        names = [e.name for e in layout.parameters]
        parameters = dict(zip(names, (leaf.detach() for leaf in leaves), strict=True))
        buffers = dict(zip((e.name for e in layout.buffers), engine.views(layout.buffers, rows_nD), strict=True))

        def loss(parameters: dict, buffers: dict, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            """Of one sample of one worker; once to be differentiated, once to be kept."""
            outputs_1C = engine.call({**parameters, **buffers}, x[None], train=True)
            value = task.losses(outputs_1C[None], y[None, None])[0, 0]
            return value, value

        def of_worker(
            parameters: dict, buffers: dict, inputs_B: Tensor, targets_B: Tensor, weights_B: Tensor
        ) -> tuple[list[Tensor], Tensor]:
            each = torch.vmap(torch.func.grad(loss, has_aux=True), (None, None, 0, 0))
            own, losses_B = each(parameters, buffers, inputs_B, targets_B)
            flat = [own[name].reshape(len(losses_B), -1) for name in names]
            norm_B = torch.stack([torch.linalg.vector_norm(gradient, dim=1) for gradient in flat]).norm(dim=0)
            counted_B = weights_B * (self.clip / norm_B).clamp(max=1.0)
            sums = [(counted_B[None] @ gradient)[0] for gradient in flat]
            shaped = [total.view(own[name].shape[1:]) for name, total in zip(names, sums, strict=True)]
            return shaped, (losses_B * weights_B).sum()

        data = batch.inputs, batch.targets, batch.weights
        if engine.batched:
            sums, loss_n = torch.vmap(of_worker)(parameters, buffers, *data)
        else:
            sums, total = of_worker(parameters, buffers, *(tensor[0] for tensor in data))
            loss_n = total[None]
        return Gradients(leaves, sums, loss_n)


def drawn(keys_n: Tensor, count: int) -> Tensor:
    """Standard normal noise [n, count], float64: a function of each row's key and the place in the row, in canonical
    order whatever the layout of rows is."""
    starts = range(0, count, PIECE)
    return torch.cat([normals(min(PIECE, count - start), keys_n[:, None], "noise", start) for start in starts], 1)
