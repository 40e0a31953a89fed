"""``if``: the influence function on the last linear layer, with pyDVL's EKFAC Fisher.

With a_i the inputs of the layer (and a 1 for its bias), p_i its softmax output and r_i = p_i - onehot(y_i),
the gradient of sample i's cross entropy is the outer product r_i a_i'. The influence function (Koh and
Liang, ICML 2017) of removing sample i from the mean training loss is, for the mean validation loss L,

    score_i = (1/n) <grad L, (G + delta I)^-1 grad l_i>          positive = helpful: removal raises L

EKFAC (George et al., NeurIPS 2018) writes G in the basis Q_g (x) Q_a of the two Kronecker factors'
eigenvectors, as a diagonal d. In that basis the whole method is

    V = mean over validation of (Q_g' r)(Q_a' a)'
    score_i = (1/n) (Q_g' r_i)' [V / (d + delta)] (Q_a' a_i)

so validation is one matrix before it meets training: O(n + v) work, nothing of size n x v, no gradient of a
single sample. The numbers are those of ``EkfacInfluence.influences`` on the frozen network, averaged over
validation (tested).

What pyDVL 0.10 calls the Fisher has no random draws, hence is reproducible, and is not the usual one: it is
the second moment of z = sum_c sqrt(p_c) (e_c - p), and z z' is the usual diag(p) - p p' plus cross terms of
each two classes. It vanishes where p is uniform, so that scores need a trained layer. On L2-regularized
softmax regression its scores rank as well as those of the usual Fisher, except in a strongly regularized,
underfitted model (rank correlation with retraining 0.91 against 0.97).

All in float64, a batch at a time: pyDVL's softmax gives NaN in float32 once logits are 103 apart, and the
inverse would magnify float32's rounding.

Legend: n training samples, v validation samples, B batch, F features, A = F + 1 with a bias, C classes.
"""

from __future__ import annotations

import functools
import logging
import math
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.errors import UsageError
from utils.influence.independent_outputs import independent_influence
from utils.influence.method import Method, Options
from utils.influence.optimum import FAR, gradient_ratio
from utils.influence.targets import node_weights
from utils.influence.trajectory import LastLayer, Trajectory
from utils.progress import Progress

if TYPE_CHECKING:
    import zarr

DAMPING = 0.1  # default delta as a share of G's mean eigenvalue, Grosse et al., arXiv 2308.03296


def last_layer_influence(
    head: nn.Linear,
    train_features_nF: Tensor,
    train_labels_n: Tensor,
    val_features_vF: Tensor,
    val_labels_v: Tensor,
    *,
    regularization: float | None = None,
    batch_size: int = 1024,
) -> Tensor:
    """Influence of each training sample on the mean validation loss through the last layer.

    Returns scores [n], float64, on the device of ``head``, in units of validation loss: positive = helpful,
    the estimated rise of the mean validation cross entropy when the sample leaves the mean training loss
    (at an optimum of that loss in the layer's weights).

    ``features`` are the inputs of ``head`` in evaluation mode, computed once; they may live on another
    device and go to that of ``head`` by batches of ``batch_size``, which bounds the memory and changes
    scores by rounding only. ``regularization`` is delta, added to every eigenvalue of G; the default is
    0.1 times their mean, which adapts to the scale of the features. For a layer trained to convergence
    with weight decay, that decay is the natural delta.

    Neither ``head`` nor a global random generator is changed or read. Raises UsageError: data that do not
    fit the layer, a bad setting, features or weights that are not finite.

    Source: Koh and Liang, ICML 2017; EKFAC of George et al., NeurIPS 2018, as in pyDVL.
    """
    train = _Samples(head, train_features_nF, train_labels_n, batch_size, "training")
    val = _Samples(head, val_features_vF, val_labels_v, batch_size, "validation")
    fisher = _fit(train, regularization)
    mean_CA = sum(residual_BC.T @ inputs_BA for residual_BC, inputs_BA in fisher.rotate(val)) / len(val)
    factor_CA = mean_CA / fisher.damped_CA
    scores_n = torch.cat([((r_BC @ factor_CA) * a_BA).sum(1) for r_BC, a_BA in fisher.rotate(train)]) / len(train)
    if not scores_n.isfinite().all():
        raise _not_finite()
    return scores_n


def pairwise_influence(
    head: nn.Linear,
    train_features_nF: Tensor,
    train_labels_n: Tensor,
    val_features_vF: Tensor,
    val_labels_v: Tensor,
    path: str | Path,
    *,
    regularization: float | None = None,
    chunk: int = 256,
) -> zarr.Array:
    """The influence of every training sample on every validation sample, written to a zarr array at ``path``.

    Returns the array [n, v], float32, in chunks of ``chunk`` x ``chunk``; the mean of row i is
    :func:`last_layer_influence` of sample i. Only two chunks' gradients (2 x chunk x A C floats) and one
    chunk of scores are in memory. Raises UsageError as there, and if ``path`` exists.
    """
    import zarr

    train = _Samples(head, train_features_nF, train_labels_n, chunk, "training")
    val = _Samples(head, val_features_vF, val_labels_v, chunk, "validation")
    if Path(path).exists():
        raise UsageError(f"{path} exists: delete it or choose another path for the pairwise influences.")
    fisher = _fit(train, regularization)
    scores_nv = zarr.create_array(
        str(path), shape=(len(train), len(val)), chunks=(chunk, chunk), dtype="float32",
        attributes={"method": "if", "regularization": fisher.delta, "axes": ["training", "validation"]},
    )  # fmt: skip
    for first, (r_BC, a_BA) in enumerate(fisher.rotate(train)):
        gradient_BP = torch.einsum("bc,ba->bca", r_BC, a_BA / len(train)).div_(fisher.damped_CA).flatten(1)
        for second, (s_BC, b_BA) in enumerate(fisher.rotate(val)):
            block_BB = gradient_BP @ torch.einsum("bc,ba->bca", s_BC, b_BA).flatten(1).T
            i, j = first * chunk, second * chunk
            scores_nv[i : i + len(r_BC), j : j + len(s_BC)] = block_BB.float().cpu().numpy()
    return scores_nv


class _Samples:
    """A float64 copy of the layer, and one data set in batches on the layer's device."""

    def __init__(self, head: nn.Linear, features_nF: Tensor, labels_n: Tensor, batch_size: int, name: str) -> None:
        if not isinstance(head, nn.Linear):
            raise UsageError(f"method 'if' takes a linear last layer: give it an nn.Linear, not {type(head)}.")
        F, C = head.in_features, head.out_features
        if features_nF.dim() != 2 or features_nF.shape[1] != F or labels_n.shape != features_nF.shape[:1]:
            raise UsageError(
                f"{name} features {tuple(features_nF.shape)} and labels {tuple(labels_n.shape)} do not fit "
                f"the last layer: pass features [n, {F}] and labels [n]."
            )
        if len(labels_n) == 0:
            raise UsageError(f"method 'if' needs {name} samples, and there are none.")
        if labels_n.min() < 0 or labels_n.max() >= C:
            raise UsageError(f"{name} labels are the classes of the last layer: they must lie in 0 to {C - 1}.")
        if batch_size < 1:
            raise UsageError(f"a batch needs at least one sample, not {batch_size}.")
        # A copy, since pyDVL leaves gradients in it; made on "meta", since nn.Linear draws its weights.
        self.layer = nn.Linear(F, C, bias=head.bias is not None, device="meta")
        for key, parameter in head.named_parameters():
            setattr(self.layer, key, nn.Parameter(parameter.detach().to(torch.float64, copy=True)))
        self.features_nF, self.labels_n, self.batch_size = features_nF.detach(), labels_n, batch_size

    def __len__(self) -> int:
        return len(self.labels_n)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [B, F] and labels [B]. (A DataLoader would draw from the global generator.)"""
        batches = zip(self.features_nF.split(self.batch_size), self.labels_n.split(self.batch_size), strict=True)
        for features_BF, labels_B in batches:
            features_BF = features_BF.to(self.layer.weight, copy=True)
            # Torch warns about a backward hook (pyDVL has one) if no input requires a gradient.
            yield features_BF.requires_grad_(), labels_B.to(self.layer.weight.device, torch.int64)


@dataclass(frozen=True)
class _Fisher:
    """pyDVL's G: the eigenvectors of its Kronecker factors (columns), its diagonal in their basis, delta."""

    vectors_AA: Tensor
    vectors_CC: Tensor
    values_CA: Tensor
    delta: float

    @property
    def damped_CA(self) -> Tensor:
        return self.values_CA + self.delta

    @torch.no_grad()
    def rotate(self, samples: _Samples) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch Q_g' r [B, C] and Q_a' a [B, A]; their outer products are the samples' gradients."""
        for features_BF, labels_B in samples:
            residual_BC = samples.layer(features_BF).softmax(1)
            residual_BC.scatter_add_(1, labels_B[:, None], -torch.ones_like(residual_BC[:, :1]))
            if samples.layer.bias is not None:
                features_BF = torch.cat([features_BF, torch.ones_like(features_BF[:, :1])], 1)
            yield residual_BC @ self.vectors_CC, features_BF @ self.vectors_AA


def _fit(train: _Samples, regularization: float | None) -> _Fisher:
    """G of the training set, in pyDVL's two passes: Kronecker factors, then the corrected eigenvalues."""
    if regularization is not None and not 0 < regularization < math.inf:
        raise UsageError(f"the regularization of method 'if' must be positive, not {regularization}.")
    EkfacInfluence, EighError = _import_pydvl()

    class Float64Ekfac(EkfacInfluence):
        """pyDVL allocates its sums in the default dtype, and then cannot multiply them with float64."""

        @staticmethod
        def _init_layer_kfac_blocks(module: nn.Module) -> tuple[Tensor, Tensor]:
            inputs_AA, outputs_CC = EkfacInfluence._init_layer_kfac_blocks(module)
            return inputs_AA.double(), outputs_CC.double()

        @staticmethod
        def _init_layer_diag(module: nn.Module) -> Tensor:
            return EkfacInfluence._init_layer_diag(module).double()

    try:
        with torch.enable_grad():
            ekfac = Float64Ekfac(train.layer, update_diagonal=True).fit(train)
    except EighError as error:  # what a NaN in the factors ends in
        raise _not_finite() from error
    ((_, (_, vectors_AA, vectors_CC, values)),) = ekfac.ekfac_representation
    values_CA = values.view(len(vectors_CC), len(vectors_AA))
    delta = DAMPING * values_CA.mean().item() if regularization is None else regularization
    if delta < 1e-24:  # rounding is all that is left of G
        raise UsageError(
            "the last layer predicts every class alike, where pyDVL's Fisher vanishes: train the model "
            "first, or pass a regularization."
        )
    return _Fisher(vectors_AA, vectors_CC, values_CA, delta)


def _not_finite() -> UsageError:
    return UsageError(
        "the influences are not finite: the features or the last layer hold NaN, infinity or huge values; "
        "check that training did not diverge."
    )


@functools.cache
def _import_pydvl() -> tuple[type, type[Exception]]:
    """``EkfacInfluence`` and its eigenvalue error. Here, since the import takes seconds; and without its
    side effects: it draws from :mod:`random`, warns of its own deprecations, and logs each call."""
    state = random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pydvl.influence.torch import EkfacInfluence
        from pydvl.influence.torch.util import TorchLinalgEighException
    random.setstate(state)
    logging.getLogger("pydvl").setLevel(logging.WARNING)
    return EkfacInfluence, TorchLinalgEighException


def score(trajectory: Trajectory, options: Options, progress: Progress) -> Tensor:
    """Scores [n] at the final consensus model, which stands for the nodes; ``target`` worker:K: at worker K's."""
    layer = trajectory.last_layer(node_weights(trajectory.num_workers, options.target))
    ids_n = (trajectory.worker_of_n >= 0).nonzero()[:, 0].cpu()
    scores_n = torch.zeros(len(trajectory.worker_of_n), dtype=torch.float64)
    if layer.train_curvatures is None:  # outputs depend on each other: cross-entropy
        found_n = last_layer_influence(
            layer.head, layer.train_features, layer.train_targets, layer.val_features, layer.val_targets
        )
    else:
        found_n = independent_influence(
            layer.head, layer.train_features, layer.train_residuals, layer.train_curvatures, layer.val_features,
            layer.val_residuals,
        )  # fmt: skip
    scores_n[ids_n] = found_n.cpu()
    if (ratio := optimality(trajectory, layer)) >= FAR:
        warnings.warn(
            f"'if' assumes a last layer at its optimum, and this one is not there: the mean gradient is {ratio:.2f} of "
            f"the samples' own. From {FAR:g} on its scores foretold retraining badly: train longer, let workers "
            "average more often, or take 'cascade' (docs/trust.md)",
            stacklevel=2,
        )
    progress(1)
    return scores_n


def optimality(trajectory: Trajectory, layer: LastLayer) -> float:
    """:func:`utils.influence.optimum.gradient_ratio` of the layer, on the samples that it was trained on."""
    return gradient_ratio(layer.head, layer.train_features, layer.train_residuals, trajectory.weight_decay)


METHOD = Method(score, ("target",))
