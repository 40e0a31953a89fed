"""Who is right? Disputes between two ledgers, and openings of one round."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_runs import Between, Cheater, dishonest, received, replayed, resigned, signed_run

from ledger.__main__ import main as ledger_main
from ledger.dispute import first_difference, judge, most_comparisons
from ledger.keys import make_keys, read_keys
from ledger.opening import _message, judge_opening, open_round
from ledger.records import sent_message
from ledger.replay import CannotJudge, Replay, job_of
from ledger.verify import Wrong, verify
from utils.errors import UsageError

# ---- disputes ------------------------------------------------------------------------------------------------


def test_a_dispute_finds_the_first_round_by_bisection_and_convicts(tmp_path, monkeypatch):
    mine = signed_run(tmp_path)
    with monkeypatch.context() as patched:
        dishonest(patched, Cheater, "poisoned")
        theirs = signed_run(tmp_path, name="theirs")
    shutil.copyfile(mine / "config.json", theirs / "config.json")  # of one run: so say both parties
    run = hashlib.sha256((mine / "config.json").read_bytes()).hexdigest()
    resigned(theirs, read_keys(tmp_path / "keys", range(4)), run=run)
    checked = [verify(one) for one in (mine, theirs)]
    found = judge(*checked, job_of(checked[0]))
    assert (found.verdict, found.round, found.workers) == ("convicted", 5, {2: 1})
    assert found.comparisons <= most_comparisons(len(checked[0].rounds))
    assert ledger_main(["dispute", str(mine), str(theirs)]) == 1
    assert judge(*reversed(checked), job_of(checked[1])).workers == {2: 0}


def test_a_machine_that_does_not_come_to_the_bits_convicts_nobody(tmp_path, monkeypatch):
    mine = signed_run(tmp_path)
    checked = verify(mine)
    job = job_of(checked)
    job.initial_ND = job.initial_ND.clone()
    original = job.engine.outputs
    monkeypatch.setattr(job.engine, "outputs", lambda *a, **k: original(*a, **k) * (1 + 1e-6))  # another processor
    with pytest.raises(CannotJudge, match="cannot judge"):
        Replay(checked, job).check([5])
    theirs = Path(shutil.copytree(mine, tmp_path / "theirs"))
    keys = read_keys(tmp_path / "keys", range(4))
    signature = keys.sign(1, sent_message(checked.records[5][0].what["run"], 5, 1, "ab" * 32)).hex()
    changes = {(5, k): {"received": received(checked, 5, k, 1, "ab" * 32, signature)} for k in (0, 2)}
    resigned(theirs, keys, {(5, 1): {"sent": "ab" * 32, "signature": signature}, **changes})
    other = verify(theirs)
    assert judge(checked, other, job).verdict == "cannot judge"
    assert judge(checked, other, job_of(checked)).workers == {1: 1}


SOME_TRAIN = [("--protocol", "chained"), ("--protocol", "fedavg", "--fraction_fit", "0.5")]


@pytest.mark.parametrize("flags", SOME_TRAIN, ids=" ".join)
def test_rows_that_nobody_changed_are_no_evidence(tmp_path, monkeypatch, flags):
    """On a machine of other bits those who did not train agree all the same."""
    checked = verify(signed_run(tmp_path, *flags))
    job = job_of(checked)
    original = job.engine.outputs
    monkeypatch.setattr(job.engine, "outputs", lambda *a, **k: original(*a, **k) * (1 + 1e-6))
    with pytest.raises(CannotJudge):
        Replay(checked, job).check([2])


def test_a_cheat_between_two_records_blames_nobody_else(tmp_path, monkeypatch):
    dishonest(monkeypatch, Between)
    with pytest.raises(Wrong, match="who began it nobody can tell") as found:
        replayed(signed_run(tmp_path, "--ledger_every", "2"))
    assert found.value.worker is None


def test_two_equal_ledgers_and_ledgers_of_two_runs(tmp_path, honest, capsys):
    assert ledger_main(["dispute", str(honest), str(honest)]) == 0
    other = signed_run(tmp_path, "--lr", "0.01")
    assert ledger_main(["dispute", str(honest), str(other)]) == 2
    assert "two runs" in capsys.readouterr().err


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_bisection_finds_the_first_difference(same, more, others):
    chain = [f"same {i}" for i in range(same)]
    mine, theirs = chain + [f"mine {i}" for i in range(more)], chain + [f"theirs {i}" for i in range(others)]
    place, comparisons = first_difference(mine, theirs)
    assert place == (same if more and others else None)
    assert comparisons <= most_comparisons(min(len(mine), len(theirs)))


# ---- openings -------------------------------------------------------------------------------------------------


def test_an_opening_clears_an_honest_worker_without_any_other_sample(copied, honest):
    checked, keys = verify(copied), read_keys(honest.parent / "keys", [1])
    job = job_of(checked)
    opening = open_round(checked, job, 1, 5, keys)
    assert len(opening["samples"]) == 16 < len(job.shards[1])
    blind = job_of(checked)  # the judge has none of the worker's samples
    blind.dataset.inputs_n[blind.shards[1]] = 0
    assert judge_opening(checked, blind, opening).endswith("cleared")

    def signed(samples):
        changed = {**opening, "samples": samples}
        return {**changed, "signature": keys.sign(1, _message(checked.records[5][1].what["run"], changed)).hex()}

    with pytest.raises(Wrong, match="does not open sample"):
        judge_opening(checked, blind, signed(opening["samples"][1:]))
    other = dict(opening["samples"][0], input=opening["samples"][1]["input"])
    with pytest.raises(Wrong, match="is not the one that it committed to"):
        judge_opening(checked, blind, signed([other, *opening["samples"][1:]]))
    with pytest.raises(UsageError, match="did not sign this opening"):  # by somebody who wants it convicted
        judge_opening(checked, blind, {**opening, "samples": []})


def test_an_opening_of_the_first_round_follows_the_protocol(tmp_path):
    ledger = signed_run(tmp_path, "--protocol", "fedavg", "--init", "per_worker")
    checked, job = verify(ledger), job_of(verify(ledger))
    opening = open_round(checked, job, 1, 1, read_keys(tmp_path / "keys", [1]))
    assert judge_opening(checked, job, opening).endswith("cleared")


def test_keys_of_another_ledger_open_nothing(copied, tmp_path):
    make_keys(tmp_path / "other", 4)
    checked = verify(copied)
    with pytest.raises(UsageError, match="not the keys of the ledger"):
        open_round(checked, job_of(checked), 1, 5, read_keys(tmp_path / "other", [1]))


def test_an_opening_on_other_bits_convicts_nobody(copied, honest, monkeypatch):
    checked = verify(copied)
    opening = open_round(checked, job_of(checked), 1, 5, read_keys(honest.parent / "keys", [1]))
    job = job_of(checked)
    original = job.engine.outputs
    monkeypatch.setattr(job.engine, "outputs", lambda *a, **k: original(*a, **k) * (1 + 1e-6))
    with pytest.raises(CannotJudge):
        judge_opening(checked, job, opening)


def test_silence_convicts_once_the_time_has_passed(honest, tmp_path, capsys):
    words = ["judge", str(honest), str(tmp_path / "opening.json")]
    assert ledger_main(words) == 2
    assert ledger_main([*words, "--deadline_passed"]) == 1
    assert "convicted" in capsys.readouterr().out


def test_an_opening_convicts_who_sent_something_else(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        dishonest(patched, Cheater, "poisoned")
        ledger = signed_run(tmp_path)
    checked, keys = verify(ledger), read_keys(tmp_path / "keys", [2])
    opening = open_round(checked, job_of(checked), 2, 5, keys)
    with pytest.raises(Wrong, match="is not what training on the opened samples gives") as found:
        judge_opening(checked, job_of(checked), opening)
    assert found.value.worker == 2
