"""Bars and when a run is evaluated: what a person sees while it trains."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import command
import pytest
import torch
from command import arguments, prune, train
from hypothesis import given
from hypothesis import strategies as st

import main
import main_pruned
from training.evaluation import (
    LEAST_SAMPLES,
    LEAST_TIMES,
    SHARE,
    SHARE_OF_SHORT_RUNS,
    SHORT,
    SHORT_PRODUCTS,
    evenly_spread,
    plan_evaluations,
)
from utils.progress import bar, within


def test_bars_say_what_they_are_part_of(capsys):
    with within("run 2 of 3"), within("stage 2"), bar(4, "gossip 8 workers") as ticks:
        ticks.update(4)
    with bar(1, "alone") as ticks:
        ticks.update()
    shown = capsys.readouterr().err
    assert "run 2 of 3: stage 2: gossip 8 workers: 100%" in shown and "\ralone: 100%" in shown.replace("\n", "\r")


def test_the_runs_of_a_sweep_and_the_seeds_are_counted(tmp_path, capsys):
    words = [w for w in arguments(tmp_path, "--epochs", "1", "--seeds", "2") if w != "--quiet"]
    assert main_pruned.main([*words, "--sweep", "0.9", "0.5", "--methods", "random", "delete"]) == 0
    shown = capsys.readouterr().err
    for seed, (i, (method, share)) in itertools.product(
        (0, 1), enumerate(itertools.product(("random", "delete"), ("0.9", "0.5")))
    ):
        assert f"seed {seed} ({seed + 1} of 2): run {i + 1} of 4, {method}, {share} kept: gossip 4 workers" in shown


# ---- evaluations ------------------------------------------------------------------------------------------------


def job_like(train: int, val: int, test: int, epochs: float, products: int = 10**5) -> SimpleNamespace:
    return SimpleNamespace(
        sample_products=products,
        train_ids=torch.arange(train),
        val_ids=torch.arange(val),
        test_samples=SimpleNamespace(targets_n=torch.arange(test)),
        config=SimpleNamespace(epochs=epochs),
    )


@given(
    train=st.integers(10, 10**6), val=st.integers(1, 10**5), test=st.integers(1, 10**5),
    epochs=st.floats(0.1, 500), rounds=st.integers(1, 10**5), workers=st.integers(0, 2000),
    products=st.integers(0, 10**10),
)  # fmt: skip
def test_evaluating_costs_its_share_at_most(train, val, test, epochs, rounds, workers, products):
    job = job_like(train, val, test, epochs, products)
    plan = plan_evaluations(job, rounds, workers, None)
    assert 1 <= plan.every <= rounds
    assert 1 <= plan.of_workers <= val and 1 <= plan.of_workers_test <= test
    if workers:
        assert plan.of_workers >= min(val, LEAST_SAMPLES)
    training = 3 * epochs * train
    short = min(SHARE_OF_SHORT_RUNS * training, SHORT, SHORT_PRODUCTS / max(1, products))
    allowed = max(SHARE * training, short)
    tested = test + workers * plan.of_workers_test
    if workers and plan.of_workers_test > min(test, LEAST_SAMPLES):
        assert tested <= allowed / 4 * 1.001
    allowed -= min(tested, allowed / 2)
    least = val + workers * min(val, LEAST_SAMPLES)
    assert rounds / plan.every * least <= allowed * 1.001 or plan.every == rounds  # one is made in any case
    if plan.every > -(-rounds // min(rounds, max(epochs, LEAST_TIMES))):  # no fewer than that makes necessary
        assert rounds / (plan.every - 1) * least > allowed * 0.999
    if workers and plan.of_workers > LEAST_SAMPLES:
        assert -(-rounds // plan.every) * (val + workers * plan.of_workers) <= allowed * 1.001


def test_a_job_of_five_minutes_spends_its_share_and_no_more():
    """18 epochs of 18,000 pictures on 16 CNN workers: with the test about 4 % in forward passes."""
    job = job_like(18_000, 2_000, 4_000, 18, products=5_866_112)
    plan = plan_evaluations(job, 648, 16, None)
    times = -(-648 // plan.every)
    passes = times * (2_000 + 16 * plan.of_workers) + 4_000 + 16 * plan.of_workers_test
    assert times >= 8 and passes <= 0.045 * 3 * 18 * 18_000


@given(count=st.integers(1, 500), most=st.integers(1, 600))
def test_a_spread_part_has_no_gaps(count, most):
    ids = evenly_spread(torch.arange(count), most)
    assert len(ids) == min(count, most) and ids[0] == 0
    steps = torch.cat([ids, torch.tensor([count])]).diff()
    assert steps.max() - steps.min() <= 1


def test_few_epochs_still_give_ten_points(tmp_path):
    rows = command.metrics(train(tmp_path, "--epochs", "4", "--max_train", "1200", "--num_workers", "2"))
    assert len(rows) >= 11 and rows[-1]["epoch"] == 4


def test_the_evaluations_that_a_user_asks_for_are_made():
    job = job_like(1000, 100_000, 1000, 10)
    assert plan_evaluations(job, 100, 8, 7).every == 7
    assert plan_evaluations(job, 100, 8, 7).of_workers == LEAST_SAMPLES
    assert plan_evaluations(job, 100, 8, None).every == 100


# ---- scoring ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("memory", [pytest.param("4", marks=pytest.mark.slow), "1e-9"])
@pytest.mark.parametrize("snapshots", [True, False])
def test_the_bar_of_cascade_ends_where_it_says(tmp_path, monkeypatch, memory, snapshots):
    """Each step is counted once replayed and once walked back, however often it is replayed."""
    import training.scores

    seen = []

    class Counted:
        def __init__(self, total):
            self.total, self.n = total, 0
            seen.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, ticks=1):
            self.n += ticks
            assert self.n <= self.total

    monkeypatch.setattr(training.scores, "bar", lambda total, *_: Counted(total))
    if not snapshots:
        monkeypatch.setattr("training.pruning.room_for_states", lambda *_: False)
    for method in ("cascade", "dice", "delete", "if", "random"):
        prune(tmp_path, "--pruning_algorithm", method, "--memory_gb", memory, "--no-control", "--epochs", "6")
        assert seen[-1].n == seen[-1].total > 0, method


def test_testing_many_workers_shows_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.trainer.LONG_TEST", 100)
    words = [w for w in arguments(tmp_path) if w != "--quiet"]
    assert main.main(words) == 0
    assert "testing: 100%" in capsys.readouterr().err
