"""Derivatives of training and evaluation that influence methods need, for all workers at once.

Each is one pass over its data: no per-sample gradient is ever stored. BatchNorm is differentiated
through its batch statistics while training, and through its running statistics while evaluating.

A Hessian-vector product is the gradient of a directional derivative: forward mode along the direction,
then one backward pass. It costs 2.4-2.9 training steps of a convolutional network, where a double
backward costs 3.1-3.6 (CNN and ResNet18, 3 x 32 x 32, one thread, channels_last). PyTorch's forward-mode
rules are not all differentiable (LayerNorm's is silently wrong), so the two are compared once for every
network, and the double backward serves where they differ.

Legend: N workers, R rows, n workers of a chunk, P trainable floats, D floats a row, S = D - P
statistics, B batch, L longest shard.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from data.batches import PADDING, Samples
from utils import devices
from utils.devices import send
from workers.batch import Batch
from workers.engine import DEVICE_ERRORS, Engine
from workers.open_modules import opened
from workers.step_graph import FixedBatch, record
from workers.worker_vision import Fleet

PIECE = 128 * 3 * 32 * 32  # pixel values that are evaluated at once: the CNN's activations of more are 1.3 times
LARGEST_PIECE = 500  # as slow a sample (freshly mapped memory), and those of fewer no faster


def piece_size(samples: Samples) -> int:
    """Samples that are evaluated at once."""
    if devices.is_accelerator(samples.targets_n.device):
        return LARGEST_PIECE
    return max(1, min(LARGEST_PIECE, PIECE // samples.inputs_n[0].numel()))


class Derivatives:
    """The derivatives of one fleet's training and evaluation.

    ``engine``: may differ from the fleet's in name or memory layout (a double backward is faster in
    NCHW where the step itself is faster in channels_last); rows are in that engine's layout.
    """

    def __init__(self, fleet: Fleet, engine: Engine | None = None):
        self.fleet, self.engine = fleet, engine or fleet.engine
        self.layout = self.engine.layout
        self._task = fleet.samples.task
        self._network = opened(self.engine.model, self.engine.batched)
        rates = {
            f"{name}.{kind}": module.momentum
            for name, module in self.engine.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
            for kind in ("running_mean", "running_var")
        }
        self._statistics = [e for e in self.layout.buffers if e.name in rates]
        self._rates = [rates[e.name] for e in self._statistics]
        self._product: Callable | None = None  # chosen at the first transposed_step
        self._graph: AdjointGraph | None = None

    # ---- the network as a function ----------------------------------------------------------------

    def _call(self, tensors: dict[str, Tensor], inputs: Tensor, train: bool) -> tuple[Tensor, list[Tensor]]:
        """Outputs of one worker, and the batch statistics in the order of ``self._statistics``."""
        local = self.engine.local
        modules = getattr(local, "opened", None)
        if modules is None or modules[0] is not self._network:
            modules = (self._network, {m: copy.deepcopy(self._network).train(m) for m in (True, False)})
            local.opened = modules
        network = modules[1][train]
        with self.engine.precision(inputs.device.type):
            outputs = functional_call(network, tensors, (inputs,), tie_weights=False)
        statistics = []
        if train:
            for entry in self._statistics:
                path, _, kind = entry.name.rpartition(".")
                statistics.append(network.get_submodule(path).batch_statistics[kind == "running_var"])
        return outputs, statistics

    def _outputs(self, leaves: list[Tensor], inputs_nB: Tensor, train: bool) -> tuple[Tensor, list[Tensor]]:
        """Outputs [n, B, C] and batch statistics [n, ...] with every tensor of the row among the leaves."""
        names = [e.name for e in self.layout.entries]
        tensors = dict(zip(names, leaves, strict=True))
        return self.engine.each_worker(lambda t, x: self._call(t, x, train), tensors, inputs_nB)

    def _leaves(self, rows_nD: Tensor, gradients: bool = True) -> list[Tensor]:
        return [view.data.requires_grad_(gradients) for view in self.engine.views(self.layout.entries, rows_nD)]

    def _duals(self, rows_nD: Tensor, direction_nP: Tensor, gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The leaves, and the same with the direction as the parameters' tangents.

        Both are copies that lie in memory alike: otherwise ``make_dual`` copies every tangent into zeros of
        the size of the leaf's whole storage, which may be the rows of all workers."""
        rows_nD = rows_nD.clone()
        tangents_nD = torch.zeros_like(rows_nD)
        tangents_nD[:, : self.layout.P] = direction_nP
        leaves, tangents = self._leaves(rows_nD, gradients), self._leaves(tangents_nD, gradients=False)
        count = len(self.layout.parameters)
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves[:count], tangents[:count], strict=True)]
        return leaves, duals + leaves[count:]

    def _pack(self, gradients: list[Tensor], rows_nD: Tensor) -> None:
        """Add tensors in the shape of the leaves to rows."""
        for view, gradient in zip(self.engine.views(self.layout.entries, rows_nD), gradients, strict=False):
            view.add_(gradient)

    # ---- evaluation -----------------------------------------------------------------------------------

    def validation_gradient(self, rows_RD: Tensor, samples: Samples, ids_n: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss [R] of every row on these samples in evaluation mode, and its gradient [R, D]."""
        chunks = self.engine.chunks(range(len(rows_RD)))
        size, threads = piece_size(samples), self.engine.threads
        if len(chunks) < threads:  # threads share the samples
            size = min(size, -(-len(ids_n) // threads))
        pieces = list(ids_n.split(size))
        groups = 1 if len(chunks) >= threads else min(threads, len(pieces))
        tasks = [(chunk, pieces[g::groups], g == 0) for chunk in chunks for g in range(groups)]

        value_R, gradient_RD = torch.zeros_like(rows_RD[:, 0]), torch.zeros_like(rows_RD)

        def run(chunk: list[int], pieces: list[Tensor], first: bool) -> tuple[slice, Tensor, Tensor]:
            part = slice(chunk[0], chunk[-1] + 1)
            rows_nD = rows_RD[part]
            leaves = self._leaves(rows_nD)
            value_n, gradient_nD = torch.zeros_like(value_R[part]), gradient_RD[part]
            if not first:
                gradient_nD = torch.zeros_like(rows_nD)
            for piece in pieces:
                inputs, targets_B = samples.plain(send(piece, samples.targets_n.device))
                outputs_nBC, _ = self._outputs(leaves, inputs.expand(len(chunk), *inputs.shape), train=False)
                loss_n = samples.task.losses(outputs_nBC, targets_B.expand(len(chunk), *targets_B.shape)).sum(1)
                self._pack(torch.autograd.grad(loss_n.sum(), leaves, materialize_grads=True), gradient_nD)
                value_n += loss_n.detach()
            return part, value_n, gradient_nD

        results = self.engine.map(run, *zip(*tasks, strict=True))
        for (_, _, first), (part, value_n, gradient_nD) in zip(tasks, results, strict=True):
            value_R[part] += value_n
            if not first:
                gradient_RD[part] += gradient_nD
        return value_R.div_(len(ids_n)), gradient_RD.div_(len(ids_n))

    def sample_products(
        self,
        rows_ND: Tensor,
        direction_NP: Tensor,
        samples: Samples,
        shards: list[Tensor],
        batch_size: int | None = None,
    ) -> Tensor:
        """<direction_j, grad loss_i(rows_j)> in evaluation mode for every sample i in shard j: [n].

        A directional derivative: one forward-mode pass gives it for a whole batch.
        """
        batch_size = batch_size or piece_size(samples)
        count = len(samples.targets_n)
        products_n = torch.zeros(count + 1, dtype=rows_ND.dtype, device=rows_ND.device)  # the last one for padding
        shards_NL = pad_sequence(shards, batch_first=True, padding_value=PADDING)
        shards_NL = send(shards_NL, rows_ND.device)

        def run(chunk: list[int]) -> None:
            part = slice(chunk[0], chunk[-1] + 1)
            _, duals = self._duals(rows_ND[part], direction_NP[part], gradients=False)
            longest = max(len(shards[k]) for k in chunk)
            for start in range(0, longest, batch_size):
                ids_nB = shards_NL[chunk[0] : chunk[-1] + 1, start : min(start + batch_size, longest)]
                inputs, targets_nB = samples.plain(ids_nB.clamp(min=0))
                outputs_nBC, _ = self._outputs(duals, inputs, train=False)
                tangent_nB = forward_ad.unpack_dual(samples.task.losses(outputs_nBC, targets_nB)).tangent
                products_n[torch.where(ids_nB == PADDING, count, ids_nB)] = tangent_nB.to(products_n.dtype)

        # One dual level entered outside the pool serves all threads; each thread entering its own does not.
        with torch.no_grad(), forward_ad.dual_level():
            self.engine.map(torch.no_grad()(run), self.engine.chunks(range(len(rows_ND))))
        return products_n[:count]

    def shard_gradient(self, rows_ND: Tensor, samples: Samples, shards: list[Tensor]) -> Tensor:
        """The sum of grad loss_i(rows_j) over the samples i of shard j, in evaluation mode: [N, P]."""
        batch_size = piece_size(samples)
        result_ND = torch.zeros_like(rows_ND)
        shards_NL = send(pad_sequence(shards, batch_first=True, padding_value=PADDING), rows_ND.device)

        def run(chunk: list[int]) -> None:
            part = slice(chunk[0], chunk[-1] + 1)
            leaves = self._leaves(rows_ND[part])
            for ids_nB in shards_NL[part, : max(len(shards[k]) for k in chunk)].split(batch_size, 1):
                inputs, targets_nB = samples.plain(ids_nB.clamp(min=0))
                losses_nB = samples.task.losses(self._outputs(leaves, inputs, train=False)[0], targets_nB)
                loss = (losses_nB * (ids_nB != PADDING)).sum()
                self._pack(torch.autograd.grad(loss, leaves, materialize_grads=True), result_ND[part])

        self.engine.map(run, self.engine.chunks(range(len(rows_ND))))
        return result_ND[:, : self.layout.P]

    # ---- training -------------------------------------------------------------------------------------

    def transposed_step(
        self,
        rows_ND: Tensor,
        rho_NP: Tensor,
        statistics_NS: Tensor,
        steps_N: Tensor,
        workers: list[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The transposed derivative of one local step of these workers, at their own steps ``steps_N``.

        With g(x, w) the batch gradient and s(x) the updated statistics, the gradient of
        <g, rho> + <s, statistics> with respect to rows and weights: ([N, D], [N, B], ids [N, B]).
        Workers that do not step pass their statistics' adjoint on.
        """
        ids_NB, keys_NB = self.fleet.schedule(steps_N)
        P = self.layout.P
        if self.engine.recorded and workers is None:
            batch = self.fleet.batch(list(range(len(rows_ND))), ids_NB, keys_NB)
            self._product = self._product or self._trusted(rows_ND[:1], batch)
            self._graph = self._graph or AdjointGraph(self, rows_ND, batch)
            ids_NB = send(ids_NB, rows_ND.device)
            return *self._graph(rows_ND, rho_NP, statistics_NS, batch), ids_NB
        result_ND = self.layout.unfilled(rows_ND)  # the chunks fill it
        if workers is not None:
            result_ND[:, :P] = 0.0
            result_ND[:, P:] = statistics_NS
        products_NB = torch.zeros(ids_NB.shape, dtype=rows_ND.dtype, device=rows_ND.device)
        stepped_N = torch.zeros(len(rows_ND), dtype=torch.bool)
        chunks = self.engine.chunks(range(len(rows_ND)) if workers is None else workers)
        if self._product is None and chunks:
            self._product = self._trusted(rows_ND[chunks[0]], self.fleet.batch(chunks[0], ids_NB, keys_NB))

        def run(chunk: list[int]) -> None:
            contiguous = chunk[-1] - chunk[0] + 1 == len(chunk)
            part = slice(chunk[0], chunk[-1] + 1) if contiguous else chunk
            batch, back_nD = self.fleet.batch(chunk, ids_NB, keys_NB), result_ND[part]
            products_nB = self._adjoint(rows_ND[part], rho_NP[part], statistics_NS[part], batch, back_nD)
            if not contiguous:
                result_ND[chunk] = back_nD
            products_NB[part, : products_nB.shape[1]] = products_nB.to(products_NB.dtype)
            stepped_N[chunk] = True

        with forward_ad.dual_level():
            self.engine.map(run, chunks)
        ids_NB = ids_NB.masked_fill(~stepped_N[:, None], PADDING)
        return result_ND, products_NB, send(ids_NB, rows_ND.device)

    def _adjoint(
        self, rows_nD: Tensor, rho_nP: Tensor, statistics_nS: Tensor, batch: Batch, back_nD: Tensor
    ) -> Tensor:
        """A chunk's transposed derivative into ``back_nD``; returns its products [n, B]. A dual level has to be
        entered."""
        down, products_nB = self._product(rows_nD, rho_nP, statistics_nS, batch)
        for view, gradient in zip(self.engine.views(self.layout.parameters, back_nD), down, strict=True):
            view.copy_(gradient)
        back_nD[:, self.layout.P :] = statistics_nS
        for entry, rate in zip(self._statistics, self._rates, strict=True):
            back_nD.narrow(1, entry.offset, entry.numel).mul_(1 - rate)
        return products_nB

    def _by_forward_mode(
        self, rows_nD: Tensor, rho_nP: Tensor, statistics_nS: Tensor, batch: Batch
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The gradient of <g, rho> + <s, statistics> with respect to a chunk's parameters, in the shape of its
        leaves, and with respect to its weights [n, B]. A dual level has to be entered."""
        leaves, duals = self._duals(rows_nD, rho_nP, gradients=True)
        dual_nBC, statistics = self._outputs(duals, batch.inputs, train=True)
        outputs_nBC, tangent_nBC = (part.to(rows_nD.dtype) for part in forward_ad.unpack_dual(dual_nBC))
        with forward_ad._set_fwd_grad_enabled(False):  # what backward reuses still has tangents: not again
            losses_nB = self._task.losses(outputs_nBC, batch.targets)
            slope_nBC = torch.autograd.grad(losses_nB.sum(), outputs_nBC, create_graph=True)[0]
            products_nB = (slope_nBC * tangent_nBC).sum(2) / batch.sizes[:, None]
            flow = (products_nB * batch.weights).sum() + self._statistics_flow(statistics, statistics_nS)
            down = torch.autograd.grad(flow, leaves[: len(self.layout.parameters)], materialize_grads=True)
        return down, products_nB.detach()

    def _by_double_backward(
        self, rows_nD: Tensor, rho_nP: Tensor, statistics_nS: Tensor, batch: Batch
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same, for every network that autograd can differentiate twice."""
        leaves = self._leaves(rows_nD)
        parameters = leaves[: len(self.layout.parameters)]
        weights_nB = batch.weights.detach().requires_grad_()
        outputs_nBC, statistics = self._outputs(leaves, batch.inputs, train=True)
        loss_n = (self._task.losses(outputs_nBC, batch.targets) * weights_nB).sum(1) / batch.sizes
        gradients = torch.autograd.grad(loss_n.sum(), parameters, create_graph=True)
        directions = self.engine.views(self.layout.parameters, rho_nP)
        flow = sum((g * direction).sum() for g, direction in zip(gradients, directions, strict=True))
        flow = flow + self._statistics_flow(statistics, statistics_nS)
        *down, products_nB = torch.autograd.grad(flow, [*parameters, weights_nB], materialize_grads=True)
        return tuple(down), products_nB

    def _statistics_flow(self, statistics: list[Tensor], adjoint_nS: Tensor) -> Tensor | float:
        """<updated running statistics, their adjoint>, as a function of the batch statistics."""
        P = self.layout.P
        return sum(
            rate * (statistic * adjoint_nS.narrow(1, entry.offset - P, entry.numel).unflatten(1, entry.shape)).sum()
            for entry, rate, statistic in zip(self._statistics, self._rates, statistics, strict=True)
        )

    def _trusted(self, rows_nD: Tensor, batch: Batch) -> Callable:
        """Forward mode where its derivative is right, else the double backward: both in float64 on four
        samples of one worker, along random directions."""
        generator = torch.Generator().manual_seed(0)
        row_1D = rows_nD[:1].double()
        random_1D = torch.randn(row_1D.shape, generator=generator, dtype=torch.float64).to(row_1D.device)
        weights_1B = batch.weights[:1, :4].double()
        few = Batch(batch.inputs[:1, :4].double(), batch.targets[:1, :4], weights_1B, weights_1B.sum(1) + 1, batch.ids)
        results = []
        try:
            with forward_ad.dual_level():
                for way in (self._by_forward_mode, self._by_double_backward):
                    down, products_1B = way(row_1D, *random_1D.tensor_split([self.layout.P], 1), few)
                    results.append(torch.cat([t.flatten() for t in (*down, products_1B)]))
        except RuntimeError as error:  # an operation without a forward-mode rule, or one that is not differentiable
            if isinstance(error, DEVICE_ERRORS):
                raise
            return self._by_double_backward
        error = (results[0] - results[1]).norm() / results[1].norm()
        return self._by_forward_mode if error < 1e-6 else self._by_double_backward


class AdjointGraph:
    """The transposed derivative of a step of all rows, recorded once: for cascade what :class:`StepGraph` is for
    training. What it returns is overwritten by the next call."""

    def __init__(self, derivatives: Derivatives, rows_ND: Tensor, batch: Batch):
        self._derivatives = derivatives
        self._rows_ND, self._back_ND = (derivatives.layout.unfilled(rows_ND) for _ in range(2))
        P = derivatives.layout.P
        self._rho_NP, self._statistics_NS = torch.zeros_like(rows_ND).tensor_split([P], 1)
        self._products_NB = torch.zeros(batch.ids.shape, dtype=rows_ND.dtype, device=rows_ND.device)
        self._batch = FixedBatch(derivatives.fleet.row_sizes, batch)
        self._rows_ND.copy_(rows_ND)
        with forward_ad.dual_level():
            self._replay = record(rows_ND.device, len(rows_ND), self._row, self._row)

    def __call__(
        self, rows_ND: Tensor, rho_NP: Tensor, statistics_NS: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        self._rows_ND.copy_(rows_ND)
        self._rho_NP.copy_(rho_NP)
        self._statistics_NS.copy_(statistics_NS)
        self._batch.put(batch)
        with forward_ad.dual_level():
            self._replay()
        return self._back_ND, self._products_NB

    def _row(self, row: int) -> None:
        part, batch = slice(row, row + 1), self._batch.row(row)
        arguments = (tensor[part] for tensor in (self._rows_ND, self._rho_NP, self._statistics_NS))
        products_1B = self._derivatives._adjoint(*arguments, batch, self._back_ND[part])
        self._products_NB[part, : products_1B.shape[1]] = products_1B
