"""Tasks: losses, metrics and strata against references, and every influence method on every task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, mean_absolute_error, roc_auc_score, root_mean_squared_error
from torch import nn
from torch.func import functional_call

from data.classification import Classification
from data.multilabel import UNKNOWN, Multilabel
from data.regression import BINS, Regression
from data.task import task_of
from tests.runs import digits_job, final_objective, recorded
from tests.task_data import FINDINGS, findings, series
from utils.errors import UsageError
from utils.influence import Options, score
from utils.influence.cascade import cascade
from utils.influence.independent_outputs import independent_influence
from utils.registry import DATASETS, TASKS


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Two data sets of other tasks under names that the command line knows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(DATASETS, "timeseries", lambda path, options: series())
    monkeypatch.setitem(DATASETS, "imagefolder", lambda path, options: findings())
    monkeypatch.chdir(tmp_path)


# ---- losses and metrics ------------------------------------------------------------------------------------------


def test_regression_is_measured_in_the_unit_of_the_data():
    arrays = series()
    task, targets = arrays.task, arrays.test_targets_m
    encoded = task.encoded(targets)
    outputs = encoded[:, 0].nan_to_num() + torch.randn(len(targets), 2, generator=torch.Generator().manual_seed(1)) / 3
    losses = task.losses(outputs[None], encoded[None])[0]
    for i in range(len(targets)):
        known = targets[i, 0].isfinite()
        assert losses[i].item() == pytest.approx(F.mse_loss(outputs[i][known], encoded[i, 0][known]).item(), rel=1e-5)
    measured = {name: value.item() for name, value in task.of_outputs(outputs[None], encoded).items()}
    predicted, known = task.predicted(outputs), targets[:, 0].isfinite()
    pair = targets[:, 0][known].numpy(), predicted[known].numpy()
    assert measured["rmse"] == pytest.approx(root_mean_squared_error(*pair), rel=1e-5)
    assert measured["mae"] == pytest.approx(mean_absolute_error(*pair), rel=1e-5)
    stays = targets[:, 1][known].numpy()
    against = 1 - (measured["rmse"] / root_mean_squared_error(pair[0], stays)) ** 2
    assert measured["skill"] == pytest.approx(against, rel=1e-5)
    assert task.score(predicted.numpy(), targets.numpy()) == pytest.approx(measured["rmse"], rel=1e-5)
    assert task.of_outputs(encoded[:, 1][None], encoded)["skill"].item() == pytest.approx(0, abs=1e-9)
    by_output = task.by_output(predicted.numpy(), targets.numpy())["rmse_by_output"]
    squares = [v**2 * n for v, n in zip(by_output.values(), known.sum(0).tolist(), strict=True)]
    assert (sum(squares) / known.sum().item()) ** 0.5 == pytest.approx(measured["rmse"], rel=1e-5)


def test_multilabel_looks_at_what_is_known():
    targets, generator = findings().test_targets_m, torch.Generator().manual_seed(1)
    task = Multilabel(FINDINGS)
    outputs = torch.randn(len(targets), 3, generator=generator).round(decimals=1)  # with ties
    losses = task.losses(outputs[None], targets[None])[0]
    for i in range(len(targets)):
        known = targets[i] != UNKNOWN
        if known.any():
            own = F.binary_cross_entropy_with_logits(outputs[i][known], targets[i][known].float())
            assert losses[i].item() == pytest.approx(own.item(), rel=1e-5)
    measured = task.of_outputs(outputs[None], targets)
    areas, precisions = [], []
    for c in range(3):
        known = targets[:, c] != UNKNOWN
        pair = targets[known, c].numpy(), outputs[known, c].numpy()
        areas.append(roc_auc_score(*pair))
        precisions.append(average_precision_score(*pair))
    assert measured["macro_auroc"].item() == pytest.approx(np.mean(areas))
    assert measured["mean_average_precision"].item() == pytest.approx(np.mean(precisions))
    by_class = task.by_output(outputs.numpy(), targets.numpy())
    assert list(by_class["auroc_by_class"].values()) == pytest.approx(areas)


def test_a_finding_of_one_kind_has_no_area():
    task, targets = Multilabel("ab"), torch.tensor([[0, 1], [0, 0], [0, UNKNOWN]], dtype=torch.uint8)
    outputs = torch.tensor([[0.1, 0.9], [0.2, 0.3], [0.3, 0.1]])
    assert task.of_outputs(outputs[None], targets)["macro_auroc"].item() == 1.0  # that of the other finding
    assert np.isnan(task.by_output(outputs.numpy(), targets.numpy())["auroc_by_class"]["a"])
    unknown = torch.full((3, 2), UNKNOWN, dtype=torch.uint8)
    assert task.of_outputs(outputs[None], unknown)["macro_auroc"].isnan().all()
    assert task.losses(outputs[None], unknown[None]).eq(0).all()


def test_strata_and_their_names():
    targets = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, UNKNOWN]], dtype=torch.uint8)
    task = Multilabel(FINDINGS)
    names = task.stratum_names(targets)
    assert [names[s] for s in task.strata(targets)] == ["rare", "bright", "none", "left"]
    arrays = series(count=400)
    bins, names = arrays.task.strata(arrays.targets_n), arrays.task.stratum_names(arrays.targets_n)
    assert len(names) == BINS and bins.bincount().min() >= 300 // BINS - 2
    means = arrays.targets_n[:, 0].nanmean(1)
    assert all(means[bins == b].max() <= means[bins == b + 1].min() for b in range(BINS - 1))
    assert torch.equal(Classification("ab").strata(torch.tensor([1, 0])), torch.tensor([1, 0]))


@pytest.mark.parametrize("task", [Classification("ab"), Multilabel(FINDINGS), series().task])
def test_a_record_makes_the_task_again(task):
    again = task_of(task.record())
    assert type(again) is type(task) and again.record() == task.record() and again.metrics == task.metrics
    assert {"classification", "multilabel", "regression"} == set(TASKS)
    with pytest.raises(UsageError, match="classification"):
        task_of({"kind": "classifcation", "names": []})


def test_statistics_are_those_of_what_is_known():
    targets = torch.tensor([[[1.0, 2.0], [0, 0]], [[3.0, float("nan")], [0, 0]]])
    task = Regression.of("ab", targets)
    assert task.mean_C == (2.0, 2.0) and task.std_C == (1.0, 1.0)  # a constant is not divided by 0


# ---- influence ---------------------------------------------------------------------------------------------------

SERIES = dict(dataset_name="timeseries", max_train=60, num_workers=4, batch_size=8, epochs=3, lr=0.05, min_shard=2)
PICTURES = dict(dataset_name="imagefolder", model="cnn_smooth", max_train=80, num_workers=4, batch_size=8, min_shard=2)
EVERY_TASK = [
    dict(SERIES, model="lstm", engine="threads"),
    dict(SERIES, model="lstm_mean", engine="vmap", partition="iid"),
    dict(SERIES, model="gru", engine="threads", augment="noise", partition="natural", mode="nearest"),
    dict(SERIES, model="mlp_smooth", engine="vmap", partition="iid"),
    dict(PICTURES, engine="threads"),
]


@pytest.mark.parametrize("settings", EVERY_TASK, ids=lambda s: f"{s['model']}-{s['engine']}")
def test_cascade_is_the_derivative_for_every_task(toys, settings):
    job = digits_job(**settings)
    scores_n = cascade(recorded(job))
    for i in [int(shard[1]) for shard in job.shards[:2]]:
        h, values = 1e-4, []
        for sign in (1, -1):
            weights_n = job.sample_weights_n.double()
            weights_n[i] += sign * h
            values.append(final_objective(job, weights_n))
        difference = (values[0] - values[1]) / (2 * h)
        assert difference != 0
        assert -scores_n[i].item() == pytest.approx(difference, rel=1e-5, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("settings", EVERY_TASK, ids=lambda s: f"{s['model']}-{s['engine']}")
def test_every_method_scores_every_task(toys, settings):
    run = recorded(digits_job(**settings))
    held = run.worker_of_n >= 0
    for method in ("if", "dice", "delete", "cascade"):
        scores_n = score(method, run, Options())
        assert scores_n[held].isfinite().all() and scores_n[held].std() > 0 and (scores_n[~held] == 0).all(), method


@pytest.mark.parametrize("settings", [EVERY_TASK[0], EVERY_TASK[4]], ids=["series", "findings"])
def test_products_with_gradients_are_those_of_a_loop(toys, settings):
    job = digits_job(**settings)
    run = recorded(job)
    rows_ND = run.final()
    direction_NP = torch.randn(rows_ND[:, : run.P].shape, generator=torch.Generator().manual_seed(0)).double()
    products_n = run.sample_products(rows_ND, direction_NP)
    for k, shard in enumerate(job.shards):
        for i in shard[:2].tolist():
            row_D = rows_ND[k].detach().clone().requires_grad_()
            tensors = {e.name: e.view(row_D) for e in job.engine.layout.entries}
            inputs, targets = job.samples.plain(torch.tensor([i]))
            outputs = functional_call(job.model.eval(), tensors, (inputs,))
            gradient_D = torch.autograd.grad(job.samples.task.losses(outputs[None], targets[None]).sum(), row_D)[0]
            expected = (gradient_D[: run.P] * direction_NP[k]).sum().item()
            assert products_n[i].item() == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("kind", ["regression", "multilabel"])
def test_if_in_closed_form_is_the_influence_function(kind):
    """Against autograd's Hessian of the mean training loss in the last layer's weights, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    arrays = series(values=3) if kind == "regression" else findings(120)
    task = arrays.task
    train, val = task.encoded(arrays.targets_n)[:60], task.encoded(arrays.test_targets_m)[:20]
    features = [torch.randn(len(t), 4, generator=generator).double() for t in (train, val)]
    head = nn.Linear(4, 3).double()
    delta = 0.05

    def mean_loss(parameters, which):
        weight_CF, bias_C = parameters[:12].view(3, 4), parameters[12:]
        outputs = features[which] @ weight_CF.T + bias_C
        return task.losses(outputs[None], (train, val)[which][None]).mean()

    parameters = torch.cat([head.weight.detach().flatten(), head.bias.detach()])
    hessian = torch.autograd.functional.hessian(lambda p: mean_loss(p, 0), parameters)
    gradient = torch.autograd.functional.jacobian(lambda p: mean_loss(p, 1), parameters)
    solved = torch.linalg.solve(hessian + delta * torch.eye(15).double(), gradient)
    expected = []
    for i in range(len(train)):
        def own(p, i=i):
            outputs = features[0][i : i + 1] @ p[:12].view(3, 4).T + p[12:]
            return task.losses(outputs[None], train[i : i + 1][None]).sum()

        expected.append(torch.autograd.functional.jacobian(own, parameters) @ solved / len(train))
    with torch.no_grad():
        outputs = [head(f) for f in features]
    found = independent_influence(
        head, features[0], task.residuals(outputs[0], train), task.curvatures(outputs[0], train), features[1],
        task.residuals(outputs[1], val), regularization=delta,
    )  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-12)


def test_a_target_of_one_worker_is_honoured_by_all(toys):
    run = recorded(digits_job(**EVERY_TASK[0]))
    for method in ("if", "delete"):
        targets = ("nodes", "consensus", "worker:1", "worker:2")
        scores = [score(method, run, Options(target=target)) for target in targets]
        assert torch.equal(scores[0], scores[1]), method
        assert not torch.equal(scores[0], scores[2]) and not torch.equal(scores[2], scores[3]), method
