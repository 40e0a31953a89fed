"""What values of samples are good for: OpenDataVal's tasks, by definition and by brute force."""

import json

import numpy as np
import pytest
import torch
from command import refused
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from test_valuation import study_of

from benchmarks import valuation
from training.coalitions import train_coalitions
from utils.influence.statistics import f1, lower_cluster
from valuation.args import ValuationConfig

SMALL = ("--quiet", "--threads", "1", "--num_workers", "3", "--max_train", "120", "--epochs", "1")


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=12, unique=True))
def test_the_lower_cluster_is_that_of_2_means(drawn):
    scores_n = np.array(drawn) / 7
    flagged_n, order = lower_cluster(scores_n), np.sort(scores_n)

    def within(split: int) -> float:
        return sum(((side - side.mean()) ** 2).sum() for side in (order[:split], order[split:]))

    least = min(within(split) for split in range(1, len(order)))
    assert within(int(flagged_n.sum())) == pytest.approx(least, rel=1e-9, abs=1e-9)
    assert scores_n[flagged_n].max() < scores_n[~flagged_n].min()


def test_f1_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    flagged_n, bad_n = rng.random(50) < 0.4, rng.random(50) < 0.2
    assert f1(flagged_n, bad_n) == pytest.approx(f1_score(bad_n, flagged_n))
    assert f1(np.zeros(3, bool), np.zeros(3, bool)) == 0


def test_what_is_found_of_a_known_order():
    """Ten samples of twenty are bad: the lowest eight, and two of the highest."""
    values_n, bad_n = np.arange(20.0), np.isin(np.arange(20), [*range(8), 18, 19])
    figures = valuation.found(values_n, bad_n)
    assert figures["found"][4] == pytest.approx(0.4) and figures["found"][-1] == 1 and figures["found"][0] == 0
    assert figures["found_as_many"] == pytest.approx(0.8) and figures["f1"] == pytest.approx(0.8)
    assert figures["auroc"] == pytest.approx(0.8)


def test_removal_takes_the_lowest_or_the_highest_first():
    values_n = np.random.default_rng(0).permutation(40)
    kept_Cn = valuation.kept_masks(values_n)
    assert kept_Cn.shape == (38, 40)
    for s, (without_low_n, without_high_n) in enumerate(zip(kept_Cn[:19], kept_Cn[19:], strict=True), 1):
        assert sorted(values_n[without_low_n]) == list(range(2 * s, 40))
        assert sorted(values_n[without_high_n]) == list(range(40 - 2 * s))


def test_refits_are_trainings_on_what_is_kept():
    """With all samples it is the model of all; an institution without samples takes no part: the coalition of the
    others, to the bit."""
    study = study_of()
    job, everybody = study.job, (0, 1, 2)
    again = train_coalitions(job, [everybody], held=[job.shards])
    assert torch.equal(again.rows_CD, study.grand.rows_CD) and again.rounds == study.grand.rounds
    others_n = (study.owner_n != 1).numpy()
    half_n = np.arange(len(others_n)) % 2 == 0
    found = valuation.refitted(job, np.array([others_n, half_n]), lambda ticks: None)
    assert found[0] == float(valuation.accuracies(job, train_coalitions(job, [(0, 2)]).rows_CD)[0])
    held = [shard[torch.isin(shard, job.train_ids[torch.from_numpy(half_n)])] for shard in job.shards]
    alone = train_coalitions(job, [everybody], held=[held])
    assert found[1] == float(valuation.accuracies(job, alone.rows_CD)[0]) and sum(map(len, held)) == half_n.sum()


def test_wrong_labels_and_noise_are_known():
    study = study_of(worker_flips=(0.0, 0.5, 0.0))
    bad_n = valuation.bad_samples(study.job)
    assert bad_n.sum() == round(0.5 * len(study.job.shards[1])) and set(study.owner_n[bad_n].tolist()) == {1}
    noisy = study_of(bad_data="1:noise")
    assert set(noisy.owner_n[valuation.bad_samples(noisy.job)].tolist()) == set(noisy.job.corruption["bad_workers"])
    assert valuation.bad_samples(noisy.job).sum() == len(noisy.job.shards[noisy.job.corruption["bad_workers"][0]])


def test_influence_is_left_out_where_there_is_none():
    assert valuation.able(ValuationConfig()) == list(valuation.METHODS)
    assert valuation.able(ValuationConfig(optimizer="adam")) == ["ddval", "self_loss", "random"]


def test_own_losses_are_those_of_the_model_of_all():
    study = study_of()
    samples = study.job.samples
    images, labels = samples.plain(study.job.train_ids[:7])
    expected = torch.nn.functional.cross_entropy(study.model(images), labels, reduction="none")
    torch.testing.assert_close(valuation.own_losses(study)[:7], expected.detach())


@pytest.mark.slow
def test_the_tasks(tmp_path, capsys):
    out = tmp_path / "v.json"
    flags = [*SMALL, "--out", str(out), "--runs", "2", "--methods", "ddval", "random"]
    assert valuation.main(flags) == 0
    record, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert printed.count("| ddval |") == printed.count("| random |") == 2 and "20% of the training samples" in printed
    assert [seed["seed"] for seed in record["seeds"]] == [0, 1] and record["settings"]["flip_labels"] == 0.2
    curves = record["curves"]["ddval"]
    assert [len(curves["lowest_removed"][0]), len(curves["found"][0])] == [20, 21] and out.with_suffix(".png").exists()
    means = [[seed["methods"]["ddval"]["lowest_removed"][3] for seed in record["seeds"]]]
    assert curves["lowest_removed"][0][3] == pytest.approx(np.mean(means))
    air = [*SMALL, "--dataset_name", "air", "--model", "lstm_mean"]
    assert "samples of one of two" in refused(capsys, valuation.main(air))
    assert "for pictures" in refused(capsys, valuation.main([*air, "--bad_data", "1:noise"]))
    assert "no-such" in refused(capsys, valuation.main([*SMALL, "--dataset_name", "no-such"]))
