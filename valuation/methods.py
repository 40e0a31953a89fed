"""Methods that value institutions without training all coalitions, each a function of a :class:`Study`.

To add one, write it here and a line in ``utils.registry.VALUATIONS``.

Legend: N institutions, n samples, C coalitions, D floats a row, F features.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.multilabel import Multilabel
from data.regression import Regression
from training.build import Job
from training.coalitions import Coalition, Trained, all_coalitions
from training.trajectory import RecordedRun
from utils.errors import UsageError
from utils.influence import Options, score
from utils.random import derive_seed, normals
from valuation.args import MOST_EXACT
from valuation.features import features_of
from valuation.institutions import utilities
from valuation.knn_shapley import balanced_tests, by_owner, knn_shapley, knn_shapley_regression, rescaled
from valuation.truth import shapley

OF_SGD = ("cascade", "delete", "if")  # methods that differentiate steps of SGD
OF_SAMPLES = ("ddval", *OF_SGD)  # methods that value samples
ALL_COALITIONS = ("knn_game", "heads", "reconstruction")  # methods that go through them
ONE_CLASS = ("knn_game", "heads")
PIECE = 256  # samples whose noise is drawn at once
HEAD_STEPS, HEAD_DECAY = 200, 1e-3


@dataclass
class Study:
    """What methods may look at. ``grand``: the model of all institutions, and the round that it is of; ``total``: what
    it is worth more than none; ``worth``: that of every coalition, where all were trained."""

    job: Job
    tests: list[Tensor]
    grand: Trained
    empty: float
    total: float
    k: int
    updates: Updates
    worth: Mapping[Coalition, float] | None = None
    feature_noise: float = 0.0
    samples: dict[str, Tensor] = field(default_factory=dict)  # values [n] of methods that value samples
    layer: str | None = None  # whose output is the features; None: what enters the last linear layer

    @property
    def count(self) -> int:
        """N."""
        return len(self.job.shards)

    @property
    def owner_n(self) -> Tensor:
        """The institution of each training sample, in the order of ``train_ids``."""
        owner = torch.full((len(self.job.dataset.targets_n),), -1)
        for k, shard in enumerate(self.job.shards):
            owner[shard] = k
        return owner[self.job.train_ids]

    @cached_property
    def model(self) -> torch.nn.Module:
        """The grand model, in evaluation mode."""
        model = copy.deepcopy(self.job.model).to(self.job.samples.dtype).to(self.grand.rows_CD.device).eval()
        self.job.engine.layout.attach(model, self.grand.rows_CD[0])
        return model

    @cached_property
    def features(self) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
        """The grand model's features and targets of the training samples, with ``--feature_noise``, and of each
        institution's test samples. (Training features are what institutions share: each can value them on a test set
        that stays at home, since values are means over the test sets.)"""
        job, task, model = self.job, self.job.dataset.task, self.model
        targets_n, targets_m = job.dataset.targets_n, job.dataset.test_targets_m
        if isinstance(task, Regression):
            targets_n, targets_m = (task.encoded(targets)[:, 0] for targets in (targets_n, targets_m))
        tests = [(features_of(model, job.test_samples, ids_m, self.layer), targets_m[ids_m]) for ids_m in self.tests]
        shared_nF = features_of(model, job.samples, job.train_ids, self.layer)
        add_noise(shared_nF, self.feature_noise, job)
        return (shared_nF, targets_n[job.train_ids]), tests

    @cached_property
    def trajectory(self) -> RecordedRun:
        """The federated run of all, up to the grand model."""
        layout, rounds = self.job.engine.layout, self.grand.rounds[0]
        trajectory = RecordedRun(dataclasses.replace(self.job, _kept={}), rounds)
        trajectory.set_final({"rows": layout.canonical(self.grand.rows_CD.expand(self.count, -1).contiguous())})
        return trajectory

    def of_samples(self, name: str, values_n: Tensor) -> np.ndarray:
        """Values of the training samples (in the order of ``train_ids``) as values of institutions: scaled so that they
        sum to what the grand model is worth."""
        scaled_n = rescaled(values_n, self.total)
        self.samples[name] = scaled_n
        return by_owner(scaled_n, self.owner_n, self.count).numpy()


class Updates:
    """What members of the grand coalition sent each round: ``moves``, [N, D] a round."""

    def __init__(self) -> None:
        self.moves: list[Tensor] = []

    def watch(self, r: int, before_D: Tensor, after_ND: Tensor) -> None:
        """A round of the grand coalition."""
        self.moves.append(after_ND - before_D)


def ddval(study: Study) -> np.ndarray:
    """k-nearest-neighbour Shapley values on the grand model's features (Pandl et al., arXiv 2305.01657), mean over the
    institutions' test sets; of findings, mean over those of which a test set knows both sides, as many of each."""
    task = study.job.dataset.task
    (train_nF, train_targets), tests = study.features
    if isinstance(task, Multilabel):
        return study.of_samples("ddval", of_findings(train_nF, train_targets, tests, study))
    values = knn_shapley_regression if isinstance(task, Regression) else knn_shapley
    found = [values(train_nF, train_targets, test_mF, test_targets, study.k) for test_mF, test_targets in tests]
    return study.of_samples("ddval", torch.stack(found).mean(0))


def of_findings(train_nF: Tensor, train_nL: Tensor, tests: list[tuple[Tensor, Tensor]], study: Study) -> Tensor:
    """Values [n]: mean over the findings, and the test sets, that have positive and negative test samples."""
    found = []
    for k, (test_mF, test_mL) in enumerate(tests):
        there = [f for f, column_m in enumerate(test_mL.T) if (column_m == 0).any() and (column_m == 1).any()]
        if not there:
            continue
        seed = derive_seed(study.job.config.seed, "balanced tests", k) % 2**31
        counted_mL = balanced_tests(test_mL[:, there], seed=seed)
        found.append(knn_shapley(train_nF, train_nL[:, there], test_mF, test_mL[:, there], study.k, counted=counted_mL))
    if not found:
        raise UsageError("ddval: no institution's test set has both sides of a finding.")
    return torch.stack(found).mean(0)


def knn_game(study: Study) -> np.ndarray:
    """The institutions' own Shapley values in the game of k-NN models on the grand model's features: a coalition is
    worth the share of right votes on its members' samples. (ddval sums those of samples, for which an institution is
    no unit: a sample joins one that may be half there.)"""
    (train_nF, train_n), tests = study.features
    worth, member_nN = {(): 0.0}, torch.nn.functional.one_hot(study.owner_n, study.count).bool()
    distances = [torch.cdist(test_mF.double(), train_nF.double()) for test_mF, _ in tests]
    for members in all_coalitions(study.count):
        ids = member_nN[:, list(members)].any(1).nonzero()[:, 0]
        shares = []
        for distance_mn, (_, test_m) in zip(distances, tests, strict=True):
            near_mk = distance_mn[:, ids].topk(min(study.k, len(ids)), largest=False).indices
            shares.append(float((train_n[ids][near_mk] == test_m[:, None]).sum(1).double().mean() / study.k))
        worth[members] = float(np.mean(shares))
    return scaled(shapley(worth, study.count), study.total)


def heads(study: Study) -> np.ndarray:
    """The institutions' Shapley values in the game of linear heads on the grand model's features, one trained on the
    samples of each coalition to its optimum (the idea of SaFE)."""
    (train_nF, train_n), tests = study.features
    mean_F, std_F = train_nF.mean(0), train_nF.std(0).clamp(min=1e-6)
    scaled_nF = ((train_nF - mean_F) / std_F).double()
    worth, C = {(): study.empty}, study.job.dataset.task.num_outputs
    for members in all_coalitions(study.count):
        ids = torch.isin(study.owner_n, torch.tensor(members)).nonzero()[:, 0]
        head = fitted_head(scaled_nF[ids], train_n[ids], C)
        right = [
            float((head(((test_mF - mean_F) / std_F).double()).argmax(1) == test_m).double().mean())
            for test_mF, test_m in tests
        ]
        worth[members] = float(np.mean(right))
    return shapley(worth, study.count)


def fitted_head(train_nF: Tensor, train_n: Tensor, classes: int) -> torch.nn.Linear:
    """Multinomial logistic regression with a small weight decay, by L-BFGS from zero."""
    head = torch.nn.Linear(train_nF.shape[1], classes, dtype=torch.float64)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=HEAD_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(head(train_nF), train_n) + HEAD_DECAY * head.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def why_not(name: str, job: Job, exact: bool) -> str | None:
    """Why a method gives no values of these data; None: it does. ``exact``: all coalitions are trained."""
    if name == "leave_one_out" and not exact:
        return f"it needs all coalitions (leave out --no-truth; at most {MOST_EXACT} institutions)"
    if name in OF_SGD and job.config.optimizer != "sgd":
        return "it differentiates steps of --optimizer sgd"
    if name in OF_SGD and job.config.dp_noise is not None:
        return "it asks what a sample did, which is what the steps of --dp_noise hide"
    if name in ALL_COALITIONS and len(job.shards) > MOST_EXACT:
        return f"it goes through all coalitions: at most {MOST_EXACT} institutions"
    if name in ONE_CLASS and not job.dataset.task.one_class:
        return "it needs samples of one class each; ddval takes others too"
    return None


def scaled(values_N: np.ndarray, total: float) -> np.ndarray:
    """Values that sum to the total."""
    return rescaled(torch.from_numpy(values_N), total).numpy()


def add_noise(features_nF: Tensor, noise: float, job: Job) -> None:
    """Gaussian noise to the features of the training samples, in place, in units of each feature's deviation over all
    of them: a function of the seed, the sample and the feature."""
    if not noise:
        return
    scale_F = noise * features_nF.std(0)
    for rows_bF, ids_b in zip(features_nF.split(PIECE), job.train_ids.split(PIECE), strict=True):
        drawn_bF = normals(features_nF.shape[1], job.config.seed, "feature noise", ids_b[:, None])
        rows_bF += scale_F * drawn_bF.to(features_nF.dtype)


def influence(study: Study, method: str) -> np.ndarray:
    """Scores of the federated run of all, up to the grand model, summed by institution, and scaled so that their
    absolute values sum to what the grand model is worth. (Where training stops at the least validation loss, more
    weight on all data alike changes nothing to first order: scores sum to about nothing, and are no unit.)"""
    scores_n = score(method, study.trajectory, Options(target="consensus"))[study.job.train_ids]
    values_N = by_owner(scores_n, study.owner_n, study.count)
    scale = study.total / max(float(values_N.abs().sum()), 1e-300)
    study.samples[method] = scores_n * scale
    return (values_N * scale).numpy()


def cascade(study: Study) -> np.ndarray:
    """The exact derivative of the whole training with respect to the samples' weights."""
    return influence(study, "cascade")


def delete(study: Study) -> np.ndarray:
    """Delete: first-order removal at checkpoints of the training."""
    return influence(study, "delete")


def influence_functions(study: Study) -> np.ndarray:
    """Influence functions at the last layer of the grand model."""
    return influence(study, "if")


def leave_one_out(study: Study) -> np.ndarray:
    """What the grand model loses without each institution: from the coalitions."""
    everybody = tuple(range(study.count))
    return np.array(
        [study.worth[everybody] - study.worth[tuple(k for k in everybody if k != i)] for i in everybody]
    )


def reconstruction(study: Study) -> np.ndarray:
    """Shapley values of models of all coalitions that are put together from what the members of the grand coalition
    sent: each round a coalition's model moves by the mean of its members' moves (OR, Song et al. 2019)."""
    coalitions = all_coalitions(study.count)
    share_CN = torch.zeros(len(coalitions), study.count, dtype=study.job.samples.dtype)
    for c, members in enumerate(coalitions):
        share_CN[c, list(members)] = 1 / len(members)
    moved_ND = torch.stack(study.updates.moves[: study.grand.rounds[0]]).sum(0).cpu()
    rows_CD = (study.job.initial_ND[0].cpu() + share_CN @ moved_ND).to(study.job.initial_ND.device)
    worth_C = utilities(study.job, rows_CD, study.tests).mean(1).tolist()
    return shapley({(): study.empty, **dict(zip(coalitions, worth_C, strict=True))}, study.count)


def equal(study: Study) -> np.ndarray:
    """The same for each: what any method has to beat."""
    return np.full(study.count, study.total / study.count)


def size(study: Study) -> np.ndarray:
    """In proportion to the number of training samples."""
    sizes_N = np.array([len(shard) for shard in study.job.shards], float)
    return sizes_N / sizes_N.sum() * study.total
