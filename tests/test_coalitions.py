"""Coalitions side by side against each alone, against plain federated averaging, and what they may not share."""

import dataclasses

import pytest
import torch

from tests.runs import digits_job
from training.coalitions import all_coalitions, train_coalitions
from training.protocols import load_protocol

SETTINGS = dict(protocol="fedavg", server_weights="equal", num_workers=3, model="mlp", dtype="float32", epochs=5,
                scheduler="constant", partition="dirichlet", alpha=0.5)  # fmt: skip


def test_all_coalitions_are_there_once():
    assert all_coalitions(3) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert len(set(all_coalitions(7))) == 2**7 - 1


@pytest.mark.parametrize("engine", ["threads", "vmap"])
@pytest.mark.parametrize("extra", [{}, {"augment": "crop", "optimizer": "adam", "lr": 0.01}, {"keep_momentum": True}])
def test_the_coalition_of_all_is_federated_averaging(engine, extra):
    job = digits_job(engine=engine, **SETTINGS | extra)
    fleet, protocol = job.make_fleet(), load_protocol("fedavg")
    ends = [fleet.rows_RD[0].clone() for _ in protocol.run(fleet, job)]
    found = train_coalitions(job, [(1,), (0, 1, 2)])
    exact = dict(rtol=0, atol=0) if engine == "threads" else dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.rows_CD[1], ends[found.rounds[1] - 1], **exact)
    assert len(ends) == 5 and found.rounds[1] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_one_that_trains_alone_comes_to_the_same_bits(model):
    job = digits_job(engine="threads", **SETTINGS | {"model": model, "patience": 2, "epochs": 8, "lr": 0.3})
    together = train_coalitions(job, all_coalitions(3))
    assert len(set(together.rounds)) > 1  # each has its own early stop
    for c, members in enumerate(all_coalitions(3)):
        alone = train_coalitions(job, [members])
        assert torch.equal(alone.rows_CD[0], together.rows_CD[c]) and alone.rounds == [together.rounds[c]]


def test_nobody_else_is_averaged_or_trained_on():
    job = digits_job(engine="threads", **SETTINGS)
    other = dataclasses.replace(job, shards=[job.shards[0], job.shards[1], job.shards[0]], _kept={})
    members = [(0, 1), (0,), (0, 1, 2)]
    before, after = train_coalitions(job, members), train_coalitions(other, members)
    assert torch.equal(before.rows_CD[:2], after.rows_CD[:2]) and not torch.equal(before.rows_CD[2], after.rows_CD[2])


def test_the_last_coalition_is_watched():
    job, seen = digits_job(engine="threads", **SETTINGS), []
    found = train_coalitions(job, all_coalitions(3), watch=lambda r, *rows: seen.append([row.clone() for row in rows]))
    assert len(seen) == 5 and seen[0][1].shape == (3, job.engine.layout.D)
    assert torch.equal(seen[0][0], job.initial_ND[0])
    torch.testing.assert_close(seen[found.rounds[-1] - 1][1].mean(0), found.rows_CD[-1])
