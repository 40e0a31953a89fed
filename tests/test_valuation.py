"""What institutions' data are worth: Shapley values by enumeration, methods that must agree, the command."""

import dataclasses
import json
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

import valuation.truth
from tests.command import refused
from training.build import build
from training.coalitions import all_coalitions
from training.trajectory import RecordedRun
from utils.errors import UsageError
from utils.registry import VALUATIONS
from utils.scores import read_scores
from valuation.__main__ import grand_study, main
from valuation.args import ValuationConfig
from valuation.comparison import judged, over_seeds, table
from valuation.institutions import empty_utility, institution_tests, utilities, worth_metric
from valuation.methods import HEAD_DECAY, fitted_head, knn_game, reconstruction, why_not
from valuation.truth import of_orders, prefixes, random_orders, shapley, trained

SMALL = ("--quiet", "--threads", "1", "--epochs", "3", "--num_workers", "3", "--max_train", "300", "--no-plots")


def study_of(**settings):
    small = {"quiet": True, "threads": 1, "epochs": 3, "num_workers": 3, "max_train": 300, "engine": "threads"}
    config = ValuationConfig(**small | settings)
    job = build(config.training())
    return grand_study(config, job, institution_tests(job), empty_utility(job))


@given(st.lists(st.floats(-1, 1), min_size=16, max_size=16))
def test_shapley_values_are_means_over_orders(drawn):
    worth = dict(zip([(), *all_coalitions(4)], drawn, strict=True))
    marginal = np.zeros(4)
    for order in permutations(range(4)):
        for place, i in enumerate(order):
            before = tuple(sorted(order[:place]))
            marginal[i] += (worth[tuple(sorted((*before, i)))] - worth[before]) / 24
    np.testing.assert_allclose(shapley(worth, 4), marginal, atol=1e-12)
    assert shapley(worth, 4).sum() == pytest.approx(worth[0, 1, 2, 3] - worth[()], abs=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=16, max_size=16))
def test_over_all_orders_the_estimate_is_exact(drawn):
    worth = dict(zip([(), *all_coalitions(4)], drawn, strict=True))
    orders = [list(order) for order in permutations(range(4))]
    assert prefixes(orders) == all_coalitions(4)
    values_N, error_N = of_orders(worth, orders)
    np.testing.assert_allclose(values_N, shapley(worth, 4), atol=1e-12)
    assert (error_N >= 0).all() and np.isnan(of_orders(worth, orders[:1])[1]).all()
    assert random_orders(7, 9, 3)[:5] == random_orders(7, 5, 3) and sorted(random_orders(7, 1, 3)[0]) == list(range(7))


def test_many_institutions_have_an_estimate(tmp_path, capsys):
    flags = [*SMALL, "--results_dir", str(tmp_path), "--run_name", "v", "--num_workers", "13", "--min_shard", "2"]
    assert main([*flags, "--orders", "2", "--epochs", "1", "--valuations", "equal", "size"]) == 0
    record = json.loads((tmp_path / "v/valuation/valuation.json").read_text())
    assert len(record["truth"]) == len(record["truth_error"]) == 13
    assert sum(record["truth"]) == pytest.approx(record["utility"] - record["empty"])
    assert "std. error" in capsys.readouterr().out


def test_of_one_round_the_reconstruction_is_the_truth(tmp_path):
    """From a common start a coalition's model after a round is the start and the mean of its members' moves."""
    study = study_of(epochs=1, lr=0.3)
    found = trained(study.job, all_coalitions(3), study.tests, tmp_path / "c.jsonl", lambda ticks: None)
    worth = {(): study.empty, **{members: line["utility"] for members, line in found.items()}}
    np.testing.assert_allclose(reconstruction(study), shapley(worth, 3), atol=1e-12)
    assert worth[0, 1, 2] == pytest.approx(study.empty + study.total, abs=1e-12)
    assert np.ptp(reconstruction(study)) > 0


@pytest.mark.parametrize("partition", ["dirichlet", "sizes"])
def test_test_sets_are_disjoint_complete_and_alike(partition):
    job = build(ValuationConfig(quiet=True, partition=partition, sizes=(1, 1, 2, 4), num_workers=4).training())
    tests = institution_tests(job)
    assert sorted(torch.cat(tests).tolist()) == list(range(len(job.dataset.test_targets_m)))
    for shard, ids in zip(job.shards, tests, strict=True):
        mix, test_mix = (torch.bincount(t, minlength=10).double() / len(t)
                         for t in (job.dataset.targets_n[shard], job.dataset.test_targets_m[ids]))  # fmt: skip
        assert float((mix - test_mix).abs().max()) < 0.08
    if partition == "sizes":
        assert [round(len(shard) / len(job.shards[0])) for shard in job.shards] == [1, 1, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(tests, institution_tests(job), strict=True))


def test_wrong_labels_are_given_by_worker():
    config = ValuationConfig(quiet=True, worker_flips=(0.0, 0.5, 0.0, 1.0))
    job, clean = build(config.training()), build(dataclasses.replace(config, worker_flips=()).training())
    wrong_n = job.dataset.targets_n != clean.dataset.targets_n
    assert [round(float(wrong_n[shard].double().mean()), 2) for shard in job.shards] == [0.0, 0.5, 0.0, 1.0]
    assert sorted(job.corruption["flipped"]) == wrong_n.nonzero()[:, 0].tolist()


def test_the_game_of_neighbours_is_that_of_its_definition():
    study = study_of(max_train=60)
    study.tests = [ids[:6] for ids in study.tests]
    (train_nF, train_n), tests = study.features
    worth = {(): 0.0}
    for members in all_coalitions(3):
        shares = []
        for test_mF, test_m in tests:
            votes = []
            for x_F, y in zip(test_mF.double(), test_m, strict=True):
                order = sorted(
                    (float((x_F - train_nF[i].double()).square().sum()), i) for i in range(len(train_n))
                    if int(study.owner_n[i]) in members
                )  # fmt: skip
                votes.append(sum(int(train_n[i] == y) for _, i in order[:3]) / 3)
            shares.append(np.mean(votes))
        worth[members] = float(np.mean(shares))
    expected = shapley(worth, 3)
    np.testing.assert_allclose(knn_game(study), expected * study.total / expected.sum(), atol=1e-9)


def test_heads_are_logistic_regressions():
    torch.manual_seed(0)
    inputs, labels = torch.randn(80, 5, dtype=torch.float64), torch.arange(80) % 3
    theirs = LogisticRegression(C=1 / (HEAD_DECAY * 80), tol=1e-10, max_iter=5000).fit(inputs.numpy(), labels.numpy())
    ours = fitted_head(inputs, labels, 3)
    np.testing.assert_allclose(ours(inputs).softmax(1).numpy(), theirs.predict_proba(inputs.numpy()), atol=2e-3)


def test_figures_of_comparison():
    figures = judged(np.array([10.0, 10, 10]), np.array([8.0, 10, 12]))
    assert figures["cosine"] == pytest.approx(0.987, abs=5e-4) and figures["kendall_tau"] is None
    assert figures["relative_l1"] == pytest.approx(4 / 30) and figures["max_error"] == 2
    assert judged(np.array([1.0, 2, 3]), np.array([2.0, 4, 6]))["kendall_tau"] == 1
    assert judged(np.zeros(2), np.ones(2))["cosine"] is None
    records = [{"methods": {"a": {"cosine": value}}} for value in (0.9, 1.0)]
    assert over_seeds(records)["a"]["cosine"][0] == pytest.approx(0.95)


def test_undefined_metrics_are_refused():
    study = study_of()
    with pytest.raises(UsageError, match="test set of institution 1 is not defined"):
        utilities(study.job, study.grand.rows_CD, [study.tests[0], torch.empty(0, dtype=torch.int64)])


def test_the_command(tmp_path, capsys, monkeypatch):
    flags = [*SMALL, "--results_dir", str(tmp_path), "--run_name", "v"]
    original, calls = valuation.truth.train_coalitions, []

    def dies(job, coalitions, *rest):
        calls.append(coalitions)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(job, coalitions, *rest)

    monkeypatch.setattr("workers.engine.Engine.busy_rows", property(lambda self: 4))
    with monkeypatch.context() as patch:
        patch.setattr(valuation.truth, "train_coalitions", dies)
        assert main(flags) == 130
        calls.append(None)
        assert "--resume" in refused(capsys, main(flags))
        assert main([*flags, "--resume"]) == 0
    assert calls[0] == [(0,), (1,), (2,)] and calls[1] == calls[3] and calls[0] not in calls[3:]  # kept
    folder = tmp_path / "v" / "valuation"
    record = json.loads((folder / "valuation.json").read_text())
    assert set(record["methods"]) == {"ddval", "knn_game", "heads", "cascade", "delete", "if", "leave_one_out",
                                      "reconstruction", "equal", "size"}  # fmt: skip
    total = record["utility"] - record["empty"]
    for name in ("ddval", "equal", "size", "knn_game"):
        assert sum(record["methods"][name]["values"]) == pytest.approx(total)
    for name in ("cascade", "delete", "if"):
        assert sum(map(abs, record["methods"][name]["values"])) == pytest.approx(total)
    assert sum(record["truth"]) == pytest.approx(record["utility"] - record["empty"], abs=1e-6)
    kept = read_scores(folder / "values.zarr", ["ddval", "cascade", "delete", "if"])
    assert len(kept["ddval"]) == 300 and set(kept["worker"]) == {0, 1, 2}
    by_owner = np.bincount(kept["worker"], kept["ddval"])
    np.testing.assert_allclose(by_owner, record["methods"]["ddval"]["values"])
    assert table(record) in capsys.readouterr().out
    assert "--lr" in refused(capsys, main([*flags, "--resume", "--lr", "0.01"]))


@pytest.mark.slow
def test_a_cluster_comes_to_the_same_bits(tmp_path):
    flags = [*SMALL, "--results_dir", str(tmp_path), "--valuations", "equal", "--engine", "threads", "--epochs", "2"]
    assert main([*flags, "--run_name", "here"]) == main([*flags, "--run_name", "there", "--cluster", "local:2"]) == 0
    here, there = (
        sorted((json.loads(line)["members"], json.loads(line)["utility"], json.loads(line)["rounds"])
               for line in (tmp_path / name / "valuation/coalitions.jsonl").read_text().splitlines())
        for name in ("here", "there")
    )  # fmt: skip
    assert here == there and len(here) == 7


def test_several_seeds_have_intervals(tmp_path, capsys):
    flags = [*SMALL, "--results_dir", str(tmp_path), "--run_name", "v", "--seeds", "2", "--max_train", "120"]
    assert main([*flags, "--valuations", "equal", "ddval", "--epochs", "2"]) == 0
    summary = json.loads((tmp_path / "v/valuation/summary.json").read_text())
    assert set(summary["methods"]) == {"equal", "ddval"} and len(summary["methods"]["ddval"]["relative_l1"]) == 3
    assert "over 2 seeds" in capsys.readouterr().out


def test_what_is_there_is_kept(tmp_path, capsys):
    flags = [*SMALL, "--results_dir", str(tmp_path), "--run_name", "v", "--max_train", "120", "--epochs", "2"]
    path = tmp_path / "v" / "valuation" / "valuation.json"
    assert main([*flags, "--valuations", "equal", "ddval"]) == 0
    first = json.loads(path.read_text())
    assert "needs all coalitions" in refused(capsys, main([*flags, "--no-truth", "--overwrite", "--valuations",
                                                           "leave_one_out"]))  # fmt: skip
    assert json.loads(path.read_text()) == first  # a refusal replaces nothing
    assert main([*flags, "--resume", "--no-truth", "--valuations", "size"]) == 0
    second = json.loads(path.read_text())
    assert second["truth"] == first["truth"] and set(second["methods"]) == {"equal", "ddval", "size"}
    assert second["methods"]["ddval"] == first["methods"]["ddval"]
    assert main([*flags, "--resume", "--valuations", "cascade"]) == 0
    kept = read_scores(path.parent / "values.zarr", ["ddval", "cascade"])
    assert sum(kept["ddval"]) == pytest.approx(first["utility"] - first["empty"])
    assert "--overwrite" in refused(capsys, main([*flags, "--seeds", "2"]))
    assert main([*flags, "--overwrite", "--no-truth", "--valuations", "equal"]) == 0
    assert set(json.loads(path.read_text())["methods"]) == {"equal"} and not (path.parent / "coalitions.jsonl").exists()


def test_of_errors_less_is_worth_more(tmp_path):
    """A regression is valued by its skill: without a model that is 0, and who makes the model worse is worth less."""
    study = study_of(dataset_name="air", model="lstm_mean", partition="iid", max_train=400, lr=0.01, epochs=2)
    assert worth_metric(study.job) == "skill" and study.empty == 0 and -5 < study.total < 1


@pytest.mark.parametrize("flags,words", [
    (["--valuations", "ddvall"], "ddvall"), (["--num_workers", "1"], "two institutions"),
    (["--protocol", "gossip"], "fedavg"),
    (["--no-truth", "--valuations", "leave_one_out"], "--no-truth"), (["--knn", "0"], "--knn"),
    (["--worker_flips", "0.1"], "--worker_flips"), (["--cluster", "here"], "local:K"),
    (["--partition", "sizes"], "--sizes"),
    (["--optimizer", "adam", "--valuations", "cascade"], "--optimizer sgd"), (["--server_momentum", "0.5"], "momentum"),
    (["--init", "per_worker"], "--init"), (["--lr", "9e14"], "smaller --lr"), (["--finetune", "2"], "--finetune"),
])  # fmt: skip
def test_bad_values_are_refused(tmp_path, capsys, flags, words):
    assert words in refused(capsys, main([*SMALL, "--results_dir", str(tmp_path), *flags]))


def test_what_cannot_be_done_is_left_out():
    def able(exact=True, **settings) -> set:
        job = study_of(**settings).job
        return {name for name in VALUATIONS if why_not(name, job, exact) is None}

    assert able() == set(VALUATIONS) and able(exact=False) == set(VALUATIONS) - {"leave_one_out"}
    assert set(VALUATIONS) - able(optimizer="adam", lr=0.01) == {"cascade", "delete", "if"}
    many = able(exact=False, num_workers=13, min_shard=2, epochs=1)
    assert set(VALUATIONS) - many == {"leave_one_out", "heads", "reconstruction", "knn_game"}


def test_influence_is_that_of_the_federated_run():
    """The end that scores start from is the model that was valued, to the bit."""
    study = study_of()
    final_ND = RecordedRun(study.job, study.grand.rounds[0]).final()
    assert torch.equal(final_ND, study.trajectory.final())
