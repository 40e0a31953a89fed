"""Method ``if``: against pyDVL's own numbers, a hand-written EKFAC, and retraining.

Legend: n training samples, v validation samples, F features, A = F + 1, C classes.
"""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.influence_if_part import FrozenNetwork, features_of, fit_head
from networks import head, load_model
from training.pruning import open_stage1
from utils.errors import UsageError
from utils.influence.last_layer import last_layer_influence, pairwise_influence
from utils.influence.optimum import gradient_ratio
from utils.parser import parse
from utils.pruning_args import PruningConfig


def problem(n=40, v=15, F=5, C=3, bias=True, seed=0) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    """A random layer, and random training and validation samples, all float64."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.utils.skip_init(nn.Linear, F, C, bias=bias, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    features = torch.randn(n + v, F, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (n + v,), generator=generator)
    return layer, features[:n], labels[:n], features[n:], labels[n:]


def with_ones(features_nF: Tensor) -> Tensor:
    return torch.cat([features_nF, torch.ones_like(features_nF[:, :1])], 1)


def test_touches_no_random_state_and_not_the_layer():
    layer, *data = problem()  # first in the file: the import of pyDVL, too, must leave no trace
    before = [parameter.clone() for parameter in layer.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        last_layer_influence(layer, *data)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    for parameter, old in zip(layer.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None
    assert not layer._forward_hooks and not layer._backward_hooks
    assert torch.get_default_dtype() == torch.float32


def test_equals_dense_ekfac_by_hand():
    """Everything spelled out per sample: Kronecker factors, eigenbases, diagonal, a dense solve."""
    layer, train_nF, labels_n, val_vF, labels_v = problem()
    n, delta = len(labels_n), 0.02

    def gradients(features, labels):  # [samples, C A], the layer as one matrix [C, A]
        matrix_CA = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().requires_grad_()
        rows = []
        for a_A, label in zip(with_ones(features), labels, strict=True):
            loss = nn.functional.cross_entropy((matrix_CA @ a_A)[None], label[None])
            rows.append(torch.autograd.grad(loss, matrix_CA)[0].flatten())
        return torch.stack(rows)

    factor_AA, factor_CC, pseudo = 0, 0, []
    for a_A in with_ones(train_nF):
        p_C = torch.softmax(layer(a_A[:-1]), 0).detach()
        z_C = sum(p_C[c].sqrt() * (nn.functional.one_hot(torch.tensor(c), 3) - p_C) for c in range(3))
        factor_AA, factor_CC = factor_AA + torch.outer(a_A, a_A) / n, factor_CC + torch.outer(z_C, z_C) / n
        pseudo.append(torch.outer(z_C, a_A).flatten())
    basis = torch.kron(torch.linalg.eigh(factor_CC)[1], torch.linalg.eigh(factor_AA)[1])
    diagonal = (torch.stack(pseudo) @ basis).square().mean(0)
    damped = basis @ torch.diag(diagonal + delta) @ basis.T
    expected_n = gradients(train_nF, labels_n) @ torch.linalg.solve(damped, gradients(val_vF, labels_v).mean(0)) / n

    scores_n = last_layer_influence(layer, train_nF, labels_n, val_vF, labels_v, regularization=delta)
    torch.testing.assert_close(scores_n, expected_n, rtol=1e-9, atol=1e-14)

    default_n = last_layer_influence(layer, train_nF, labels_n, val_vF, labels_v)
    tenth = 0.1 * diagonal.mean().item()
    told_n = last_layer_influence(layer, train_nF, labels_n, val_vF, labels_v, regularization=tenth)
    torch.testing.assert_close(default_n, told_n, rtol=1e-9, atol=1e-14)


@pytest.fixture
def double_default():
    """pyDVL allocates in the default dtype: a run of its own code in float64 needs this."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def digits(n: int, v: int, flipped=0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images [., 1, 8, 8] in float64 and labels; which training labels were flipped."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[: n + v]
    images, labels = images[order].view(-1, 1, 8, 8) / 16, labels[order]
    flips_n = torch.arange(n) < flipped * n
    labels[:n][flips_n] = (labels[:n][flips_n] + 3) % 10
    return images[:n], labels[:n], images[n:], labels[n:], flips_n


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_features_give_the_scores_of_the_frozen_network(double_default):
    train, train_y, val, val_y, _ = digits(48, 24)
    model = load_model("cnn", 10, (1, 8, 8), seed=0).double()
    fit_head(model, (train, train_y), 16)
    frozen = FrozenNetwork(model, (train, train_y), (val, val_y), batch_size=16)
    pair = [features_of(model, data, 16) for data in ((train, train_y), (val, val_y))]
    scores_n = last_layer_influence(head(model), pair[0], train_y, pair[1], val_y)
    torch.testing.assert_close(scores_n, frozen.averaged(), rtol=1e-8, atol=1e-14)
    matrix_vn = torch.cat(list(frozen.columns()))
    torch.testing.assert_close(scores_n, matrix_vn.mean(0) / 48, rtol=1e-8, atol=1e-14)


def test_predicts_retraining_of_a_convex_model():
    """Softmax regression with an L2 penalty, retrained to its optimum without each of 60 samples."""
    n, decay = 200, 1e-2
    train, labels_n, val, labels_v, flips_n = digits(n, 400, flipped=0.1)
    train_nF, val_vF = train.flatten(1), val.flatten(1)
    inputs_nA, onehot_nC = with_ones(train_nF), nn.functional.one_hot(labels_n, 10).double()

    def gradient(matrix_CA: Tensor, weights_n: Tensor) -> Tensor:
        """Of sum_i w_i l_i / n + decay / 2 |W|^2."""
        p_nC = (inputs_nA @ matrix_CA.T).softmax(1)
        return ((p_nC - onehot_nC) * weights_n[:, None]).T @ inputs_nA / n + decay * matrix_CA

    def hessian_factor(matrix_CA: Tensor) -> Tensor:
        p_nC = (inputs_nA @ matrix_CA.T).softmax(1)
        blocks_nCC = torch.diag_embed(p_nC) - p_nC[:, :, None] * p_nC[:, None, :]
        hessian = torch.einsum("cdna,nb->cadb", torch.einsum("ncd,na->cdna", blocks_nCC, inputs_nA), inputs_nA)
        return torch.linalg.cholesky(hessian.reshape(650, 650) / n + decay * torch.eye(650, dtype=torch.float64))

    def descend(matrix_CA: Tensor, weights_n: Tensor, factor: Tensor | None = None) -> Tensor:
        """Newton's method to the optimum; with the factor of a Hessian nearby where one is given."""
        for _ in range(50):
            gradient_CA = gradient(matrix_CA, weights_n)
            if gradient_CA.norm() < 1e-9:
                return matrix_CA
            root = hessian_factor(matrix_CA) if factor is None else factor
            matrix_CA = matrix_CA - torch.cholesky_solve(gradient_CA.view(-1, 1), root).view_as(matrix_CA)
        raise AssertionError("Newton's method did not converge")

    def val_loss(matrix_CA: Tensor) -> float:
        return nn.functional.cross_entropy(with_ones(val_vF) @ matrix_CA.T, labels_v).item()

    ones_n = torch.ones(n, dtype=torch.float64)
    full_CA = descend(torch.zeros(10, 65, dtype=torch.float64), ones_n)
    factor = hessian_factor(full_CA)
    without = (ones_n.index_fill(0, torch.tensor(i), 0.0) for i in range(60))  # the 20 flipped ones among them
    rise = [val_loss(descend(full_CA, weights_n, factor)) for weights_n in without]
    rise = np.array(rise) - val_loss(full_CA)

    layer = nn.Linear(64, 10).double()
    layer.weight.data, layer.bias.data = full_CA[:, :-1].clone(), full_CA[:, -1].clone()
    for delta in (decay, None):
        scores_n = last_layer_influence(layer, train_nF, labels_n, val_vF, labels_v, regularization=delta).numpy()
        assert spearmanr(scores_n[:60], rise).statistic > 0.9
        assert roc_auc_score(~flips_n, scores_n) > 0.9  # mislabelled samples score low
    # the same unit as the rise: with delta = decay, within the error of EKFAC
    scores_n = last_layer_influence(layer, train_nF, labels_n, val_vF, labels_v, regularization=decay)
    assert 0.5 < np.polyfit(rise, scores_n[:60].numpy(), 1)[0] < 2.0


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 30),
    v=st.integers(1, 20),
    C=st.integers(2, 5),
    bias=st.booleans(),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_scores_are_reproducible_and_independent_of_the_batch_size(n, v, C, bias, sizes):
    case = problem(n, v, F=4, C=C, bias=bias, seed=n)
    one, two = (last_layer_influence(*case, batch_size=size) for size in sizes)
    assert one.shape == (n,) and one.dtype == torch.float64
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6 * one.abs().max().item())
    torch.manual_seed(n + 1)
    assert torch.equal(one, last_layer_influence(*case, batch_size=sizes[0]))


def test_takes_float32_and_features_of_an_inference_pass():
    layer, train_nF, labels_n, val_vF, labels_v = problem()
    exact = last_layer_influence(layer, train_nF, labels_n, val_vF, labels_v)
    with torch.inference_mode():
        train_nF, val_vF = train_nF.float(), val_vF.float()
    scores = last_layer_influence(layer.float(), train_nF, labels_n.int(), val_vF, labels_v)
    torch.testing.assert_close(scores, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())


def test_confident_layers_stay_finite():
    """Where float32's softmax is zero pyDVL's loss has the gradient 0 / 0."""
    layer, *data = problem()
    layer.weight.data *= 40
    assert (layer(data[0]).float().softmax(1) == 0).any()
    assert last_layer_influence(layer.float(), *data).isfinite().all()


def test_pairwise_means_are_the_scores(tmp_path):
    layer, *data = problem(n=23, v=11)
    scores_nv = pairwise_influence(layer, *data, tmp_path / "pairs.zarr", chunk=4)
    assert scores_nv.shape == (23, 11) and scores_nv.chunks == (4, 4)
    torch.testing.assert_close(
        torch.from_numpy(scores_nv[:]).double().mean(1),
        last_layer_influence(layer, *data),
        rtol=1e-4,
        atol=1e-6 * float(np.abs(scores_nv[:]).max()),
    )
    one = last_layer_influence(  # a column is the score for a validation set of one
        layer, data[0], data[1], data[2][7:8], data[3][7:8],
        regularization=scores_nv.attrs["regularization"],
    )  # fmt: skip
    np.testing.assert_allclose(scores_nv[:, 7], one.numpy(), rtol=1e-5, atol=1e-7 * one.abs().max().item())
    with pytest.raises(UsageError, match="exists: delete it"):
        pairwise_influence(layer, *data, tmp_path / "pairs.zarr")


def test_bad_input_is_named():
    layer, train_nF, labels_n, val_vF, labels_v = problem()

    def error(message, *arguments, **options):
        with pytest.raises(UsageError, match=message) as caught:
            last_layer_influence(*arguments, **options)
        assert "\n" not in str(caught.value)

    good = (layer, train_nF, labels_n, val_vF, labels_v)
    error("nn.Linear", nn.Conv2d(1, 1, 1), *good[1:])
    error(r"training features \(40, 4\)", layer, train_nF[:, :4], *good[2:])
    error("validation features .* do not fit", *good[:4], labels_v[:-1])
    error("needs validation samples", *good[:3], val_vF[:0], labels_v[:0])
    error("0 to 2", layer, train_nF, labels_n + 1, *good[3:])
    error("at least one sample", *good, batch_size=0)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        error("must be positive", *good, regularization=bad)
    error("diverge", layer, train_nF.clone().fill_(torch.nan), *good[2:])
    error("diverge", *good[:3], val_vF.clone().fill_(torch.inf), labels_v)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    error("train the model first", *good)
    assert last_layer_influence(*good, regularization=1.0).isfinite().all()


def residuals_of(layer: nn.Linear, features_nF: Tensor, labels_n: Tensor) -> Tensor:
    return layer(features_nF).softmax(1).detach() - nn.functional.one_hot(labels_n, layer.out_features)


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_ratio_is_what_autograd_says(bias):
    layer, features_nF, labels_n, *_ = problem(bias=bias)
    decay, parameters = 0.03, list(layer.parameters())
    each = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
        for loss in nn.functional.cross_entropy(layer(features_nF), labels_n, reduction="none").split(1)
    ]
    mean = torch.stack(each).mean(0) + decay * torch.cat([p.detach().flatten() for p in parameters])
    expected = mean.norm() / torch.stack(each).norm(dim=1).square().mean().sqrt()
    found = gradient_ratio(layer, features_nF, residuals_of(layer, features_nF, labels_n), decay)
    assert found == pytest.approx(expected.item(), rel=1e-10)


def test_the_gradient_ratio_is_zero_at_an_optimum_and_one_where_all_agree():
    layer, features_nF, labels_n, *_ = problem(n=60)
    decay = 0.1
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def objective() -> Tensor:
        optimizer.zero_grad()
        size = sum(p.square().sum() for p in layer.parameters())
        loss = nn.functional.cross_entropy(layer(features_nF), labels_n) + decay / 2 * size
        loss.backward()
        return loss

    optimizer.step(objective)
    assert gradient_ratio(layer, features_nF, residuals_of(layer, features_nF, labels_n), decay) < 1e-8
    alike_nF, same_n = features_nF[:1].repeat(9, 1), labels_n[:1].repeat(9)
    assert gradient_ratio(layer, alike_nF, residuals_of(layer, alike_nF, same_n)) == pytest.approx(1)
    assert gradient_ratio(layer, alike_nF, torch.zeros(9, 3)) == 0  # every sample fits: nothing pulls


def test_if_warns_where_the_last_layer_is_far_from_its_optimum(tmp_path):
    """The same training, ten times as long, is near it."""
    words = "--model mlp --lr 0.05 --val_fraction 0.3 --max_train 500 --pruning_algorithm if".split()
    short, long = (
        parse(PruningConfig, [*words, "--epochs", e, "--results_dir", str(tmp_path / e), "--quiet"], "", varied=True)
        for e in ("2", "30")
    )
    with pytest.warns(UserWarning, match="at its optimum"):
        open_stage1(short).scores("if")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_stage1(long).scores("if")
