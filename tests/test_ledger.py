"""The ledger: what honest runs sign holds, and every cheat is found and named."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("securesystemslib", reason="pip install -r requirements-ledger.txt")
pytest.importorskip("multiformats", reason="pip install -r requirements-ledger.txt")

from command import arguments, refused, train  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import main as main_py  # noqa: E402
import utils.registry  # noqa: E402
from data.batches import Batches  # noqa: E402
from ledger import merkle, observer  # noqa: E402
from ledger.__main__ import main as ledger_main  # noqa: E402
from ledger.dispute import first_difference, judge, most_comparisons  # noqa: E402
from ledger.keys import make_keys, read_keys  # noqa: E402
from ledger.opening import _message, judge_opening, open_round  # noqa: E402
from ledger.records import Ledger, closed, enveloped, payload_of, sent_message  # noqa: E402
from ledger.replay import CannotJudge, Replay, job_of, shards_fit  # noqa: E402
from ledger.store import Store, cid, tensor_of  # noqa: E402
from ledger.verify import Wrong, verify  # noqa: E402
from utils.digest import digest_json, digest_tensors  # noqa: E402
from utils.errors import UsageError  # noqa: E402

SMALL = ("--model", "mlp", "--num_workers", "4", "--max_train", "320", "--batch_size", "16", "--epochs", "2", "--quiet",
         "--no-plots", "--engine", "loop", "--ledger_states", "2")  # fmt: skip


def signed_run(folder: Path, *flags: str, name: str = "run") -> Path:
    """The ledger of a small run."""
    ledger = folder / f"{name}-ledger"
    keys = folder / "keys"
    if not keys.exists():
        make_keys(keys, 4)
    train(folder, *SMALL, "--run_name", name, "--ledger", str(ledger), "--ledger_keys", str(keys), *flags)
    return ledger


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The folder of keys and the ledger of an honest run of ten rounds."""
    return signed_run(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def copied(honest, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(honest, tmp_path / "ledger"))


def replayed(ledger: Path, rounds: list[int] | None = None) -> int:
    checked = verify(ledger)
    replay = Replay(checked, job_of(checked))
    return replay.check(rounds or replay.recorded[1:])


# ---- honest runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--protocol", "fedavg"),
        ("--protocol", "fedasync"),
        ("--protocol", "chained"),
        ("--protocol", "local", "--ledger_every", "3"),
        ("--optimizer", "adam", "--ledger_every", "2", "--engine", "vmap"),
        ("--patience", "1", "--ledger_every", "7", "--lr", "1", "--epochs", "8"),
        ("--protocol", "fedavg", "--fraction_fit", "0.5", "--server_momentum", "0.5", "--local_epochs", "1"),
        ("--num_workers", "1", "--protocol", "local"),
        pytest.param(("--model", "shufflenet", "--max_rounds", "2"), marks=pytest.mark.slow),
        (
            "--mode",
            "exponential_one_peer",
            "--local_steps",
            "3",
            "--aggregation",
            "median",
            "--on_bad_worker",
            "isolate",
        ),
    ],
    ids=" ".join,
)
def test_every_round_of_an_honest_run_comes_to_the_same_bits(tmp_path, flags):
    ledger = signed_run(tmp_path, *flags)
    checked = verify(ledger)
    assert checked.ended
    assert replayed(ledger) == checked.workers * (len(checked.rounds) - 2)  # all but the start and the end


def test_a_run_with_a_ledger_is_the_run_without_one(tmp_path):
    ledger = signed_run(tmp_path)
    train(tmp_path, *SMALL[:-2], "--run_name", "bare")
    same = [tmp_path / name / "stage1" / "model.safetensors" for name in ("run", "bare")]
    assert same[0].read_bytes() == same[1].read_bytes()
    assert verify(ledger).ended


def test_after_a_kill_the_run_signs_the_same_bytes(tmp_path):
    whole = signed_run(tmp_path)
    flags = ("--checkpoint_every", "3")
    ledger = signed_run(tmp_path, *flags, "--max_rounds", "7", name="killed")
    text = (ledger / "records-0.jsonl").read_text()
    # What a kill leaves: a checkpoint at round 6, records of round 7, and a torn line.
    run_dir = tmp_path / "killed" / "stage1"
    (run_dir / "checkpoints" / "round-00000007.safetensors").unlink()
    (run_dir / "summary.json").unlink()
    kept = [line for line in text.splitlines(keepends=True) if '"urn:decentralized-learning:end' not in decoded(line)]
    (ledger / "records-0.jsonl").write_text("".join(kept) + kept[-1][:50])
    rounds = (ledger / "rounds.jsonl").read_text().splitlines(keepends=True)
    (ledger / "rounds.jsonl").write_text("".join(rounds[:-1]))
    signed_run(tmp_path, *flags, "--max_rounds", "7", "--resume", name="killed")
    assert (ledger / "records-0.jsonl").read_text() == text
    assert verify(ledger).ended and verify(whole).ended


def decoded(line: str) -> str:
    return base64.b64decode(json.loads(line)["envelope"]["payload"]).decode()


def test_a_ledger_begins_with_the_run(tmp_path, capsys):
    flags = (*SMALL[:-2], "--max_rounds", "4", "--checkpoint_every", "2")
    train(tmp_path, *flags)
    (tmp_path / "run" / "stage1" / "summary.json").unlink()
    again = arguments(tmp_path, *flags, "--resume", "--ledger", str(tmp_path / "ledger"))
    assert "from the first round on" in refused(capsys, main_py.main(again))


def test_other_readers_of_dsse_and_in_toto_read_the_records(honest):
    import hashlib

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    line = json.loads((honest / "records-0.jsonl").read_text().splitlines()[5])["envelope"]
    payload = base64.b64decode(line["payload"])
    kind = line["payloadType"].encode()
    # DSSE 1.0's pre-authentication encoding, written from its definition.
    encoded = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    public = json.loads((honest / "keys.json").read_text())["keys"]
    statement = json.loads(payload)
    key = bytes.fromhex(public[statement["predicate"]["worker"]])
    Ed25519PublicKey.from_public_bytes(key).verify(base64.b64decode(line["signatures"][0]["sig"]), encoded)
    assert statement["_type"] == "https://in-toto.io/Statement/v1" and statement["predicateType"].startswith("urn:")
    assert len(statement["subject"][0]["digest"]["sha256"]) == hashlib.sha256().digest_size * 2


# ---- cheats of a worker, which replay finds ----------------------------------------------------------------


class Cheater(observer.LedgerObserver):
    """Worker 2 is dishonest in round 5: what it sends is signed as if it were honest."""

    who, when = 2, 5
    how = ""

    def _sent(self) -> None:
        if not hasattr(self, "old"):
            self.old, self.began = [], None
        row_D = self.fleet.rows_RD[self.who]
        if self.done + 1 == self.when:
            getattr(self, self.how)(row_D)
        self.old.append(row_D.clone())
        super()._sent()

    def round(self, event) -> None:
        super().round(event)
        self.began = self.fleet.rows_RD[self.who].clone()

    def poisoned(self, row_D):
        row_D[:10] += 0.5

    def stale(self, row_D):
        row_D.copy_(self.began)

    def replayed_old_update(self, row_D):
        row_D.copy_(self.old[1])

    def copied(self, row_D):
        row_D.copy_(self.fleet.rows_RD[1])


class OtherData(observer.LedgerObserver):
    """Worker 2 trains on worker 1's samples, and says that it trains on its own."""

    def begin(self, trainer) -> None:
        super().begin(trainer)
        shards = list(trainer.job.shards)
        shards[2] = shards[1][: len(shards[2])]
        self.fleet.batches = Batches(shards, trainer.config.batch_size, trainer.job.batches.seed)


class OtherRoot(observer.LedgerObserver):
    """Worker 2 commits to samples that are not its own."""

    def begin(self, trainer) -> None:
        entries = observer.shard_entries
        try:
            observer.shard_entries = lambda job, k, salt: entries(job, 1 if k == 2 else k, salt)
            super().begin(trainer)
        finally:
            observer.shard_entries = entries


class WrongMixing(observer.LedgerObserver):
    """Worker 2 does not take what its neighbours send in round 5."""

    def _sent(self) -> None:
        super()._sent()
        self.own = self.fleet.rows_RD[2].clone()

    def round(self, event) -> None:
        if event.done == 5:
            self.fleet.rows_RD[2] = self.own
        super().round(event)


class Between(observer.LedgerObserver):
    """Worker 2 cheats in round 5, which is not recorded."""

    def _sent(self) -> None:
        if self.done + 1 == 5 or self.done == 4:
            self.fleet.rows_RD[2, :10] += 0.5
        super()._sent()


def dishonest(monkeypatch, kind: type, how: str = "") -> None:
    monkeypatch.setattr(kind, "how", how, raising=False)
    monkeypatch.setitem(utils.registry.OBSERVERS, "ledger", f"{__name__}:{kind.__name__}")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("poisoned", "do not give: convicted"),
        ("stale", "a stale model"),
        ("replayed_old_update", r"its own of round 2 \(an old update\)"),
        ("copied", r"that of worker 1 \(a copy\)"),
    ],
)
def test_a_row_that_training_does_not_give_convicts_its_sender(tmp_path, monkeypatch, how, named):
    dishonest(monkeypatch, Cheater, how)
    ledger = signed_run(tmp_path)
    verify(ledger)  # signatures and chains are right
    with pytest.raises(Wrong, match=named) as found:
        replayed(ledger)
    assert str(found.value).startswith("round 5: worker 2 ") and found.value.worker == 2
    assert ledger_main(["verify", str(ledger), "--replay", "5", "--quiet"]) == 1
    assert replayed(ledger, [4]) > 0  # nothing before is wrong, and what comes after is honest again
    assert replayed(ledger, [8]) > 0


def test_training_on_other_samples_than_ones_own_is_convicted(tmp_path, monkeypatch):
    dishonest(monkeypatch, OtherData)
    with pytest.raises(Wrong, match="round 1: worker 2 sent a row"):
        replayed(signed_run(tmp_path))


def test_committing_to_other_samples_than_ones_shard_is_convicted(tmp_path, monkeypatch):
    dishonest(monkeypatch, OtherRoot)
    checked = verify(signed_run(tmp_path))
    keys = read_keys(tmp_path / "keys", range(4))
    with pytest.raises(
        Wrong, match="the start: worker 2 committed to other samples|worker 2 committed to other"
    ) as found:
        shards_fit(checked, job_of(checked), {k: keys.salt(k) for k in range(4)})
    assert found.value.worker == 2


def test_opened_keys_show_what_samples_were_committed_to(honest, tmp_path, monkeypatch, capsys):
    assert ledger_main(["verify", str(honest), "--private", str(honest.parent / "keys")]) == 0
    assert "committed to the samples of its shard" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        dishonest(patched, OtherRoot)
        ledger = signed_run(tmp_path)
    assert ledger_main(["verify", str(ledger), "--private", str(tmp_path / "keys")]) == 1
    assert "worker 2 committed to other samples than its shard" in capsys.readouterr().out


def test_mixing_something_else_than_what_was_received_is_convicted(tmp_path, monkeypatch):
    dishonest(monkeypatch, WrongMixing)
    with pytest.raises(Wrong, match="round 5: worker 2's state after the round") as found:
        replayed(signed_run(tmp_path))
    assert found.value.worker == 2


def test_bad_workers_of_a_real_run_are_convicted(tmp_path):
    ledger = signed_run(tmp_path, "--byzantine", "1:sign_flip")
    bad = json.loads((ledger / "config.json").read_text())
    with pytest.raises(Wrong, match="convicted") as found:
        replayed(ledger)
    checked = verify(ledger)
    assert found.value.worker is not None and bad["config"]["byzantine"] == "1:sign_flip"
    others = set(range(4)) - {found.value.worker}
    replay = Replay(checked, job_of(checked))
    [again] = list(replay.rounds(0, 1))
    assert all(checked.records[1][k].what["sent"] == again.sent[k] for k in others)


# ---- cheats on paper, which signatures and chains find ------------------------------------------------------


def rewrite(path: Path, change) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def place(lines: list, r: int, worker: int) -> int:
    """Where the record of a worker and round stands."""
    return next(i for i, line in enumerate(lines) if line["round"] == r and is_of(line, worker))


def is_of(line: dict, worker: int) -> bool:
    return json.loads(base64.b64decode(line["envelope"]["payload"]))["predicate"]["worker"] == worker


def wrong(ledger: Path, match: str, **known) -> Wrong:
    with pytest.raises(Wrong, match=match) as found:
        verify(ledger, **known)
    return found.value


def test_a_record_changed_after_signing(copied):
    def change(lines):
        envelope = lines[place(lines, 4, 1)]["envelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        statement["predicate"]["sent"] = "0" * 64
        envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
        return lines

    rewrite(copied / "records-0.jsonl", change)
    wrong(copied, "round 4: the signature of worker 1's record is not its own")


def test_a_record_signed_with_another_workers_key(copied, honest):
    keys = read_keys(honest.parent / "keys", range(4))

    def change(lines):
        at = place(lines, 4, 1)
        payload = base64.b64decode(lines[at]["envelope"]["payload"])
        lines[at]["envelope"] = enveloped(payload, keys, 2)
        return lines

    rewrite(copied / "records-0.jsonl", change)
    wrong(copied, "round 4: the signature of worker 1's record is not its own")


def test_swapped_order(copied):
    def change(lines):
        a, b = place(lines, 4, 1), place(lines, 5, 1)
        lines[a]["envelope"], lines[b]["envelope"] = lines[b]["envelope"], lines[a]["envelope"]
        return lines

    rewrite(copied / "records-0.jsonl", change)
    wrong(copied, "worker 1: the record of round 4 comes after that of round 5: the order was changed")


def test_swapped_rounds(copied):
    def change(lines):
        lines[4], lines[5] = lines[5], lines[4]
        return lines

    rewrite(copied / "rounds.jsonl", change)
    wrong(copied, "the order was changed|does not follow")


def test_deleted_record(copied):
    rewrite(copied / "records-0.jsonl", lambda lines: [x for x in lines if not (x["round"] == 4 and is_of(x, 1))])
    wrong(copied, "round 4: the record of worker 1 is missing: it was deleted")


def test_deleted_round(copied):
    rewrite(copied / "records-0.jsonl", lambda lines: [x for x in lines if x["round"] != 4])
    rewrite(copied / "rounds.jsonl", lambda lines: [x for x in lines if x["round"] != 4])
    wrong(copied, "round 5: worker 0's record does not follow the one that stands before it")


def test_deleted_tail_is_seen_with_an_anchor_alone(copied, capsys, tmp_path):
    assert ledger_main(["anchor", str(copied)]) == 0
    (tmp_path / "anchors.txt").write_text(capsys.readouterr().out)
    assert ledger_main(["verify", str(copied), "--anchor", str(tmp_path / "anchors.txt")]) == 0
    for name in ("records-0.jsonl", "rounds.jsonl"):
        rewrite(copied / name, lambda lines: [x for x in lines if x["round"] < 8])
    assert not verify(copied).ended  # all that is left is right
    assert ledger_main(["verify", str(copied), "--anchor", str(tmp_path / "anchors.txt")]) == 1
    assert "deleted or changed" in capsys.readouterr().out


def test_a_line_that_closes_a_round_is_changed(copied):
    def change(lines):
        lines[3]["root"] = "0" * 64
        return lines

    rewrite(copied / "rounds.jsonl", change)
    wrong(copied, "round 3: its root or chain hash")


def test_other_keys_than_those_that_are_known(copied, honest):
    known = json.loads((honest / "keys.json").read_text())["keys"]
    verify(copied, keys=known)
    wrong(copied, "the key of worker 1 is not the one that is known of it", keys=[known[0], "ab" * 32, *known[2:]])


def resigned(ledger: Path, keys, changes: dict[tuple[int, int], dict]) -> None:
    """Sign all again from the first change on, as somebody with all keys could. ``changes``: (round, worker) -> what
    the statement says then."""
    checked = verify(ledger)
    for name in ("records-0.jsonl", "rounds.jsonl"):
        (ledger / name).unlink()
    writer, chain, previous = Ledger(ledger), "0" * 64, dict.fromkeys(range(4), "0" * 64)
    for line, records in zip(checked.rounds, checked.records, strict=True):
        r, kind, envelopes = line["round"], line["kind"], {}
        for k in range(4):
            what = {**records[k].what, "previous": previous[k], **changes.get((r, k), {})}
            payload = payload_of(kind, what, f"worker {k} after round {r}", digest_json(what["after"]))
            envelopes[k] = enveloped(payload, keys, k)
        previous = writer.add(envelopes, r, kind)
        closing = closed(chain, r, list(previous.values()))
        writer.close(closing, kind)
        chain = closing["chain"]


def received(checked, r: int, k: int, sender: int, row: str, signature: str) -> list[dict]:
    """What worker k received in round r, but for one row."""
    was = checked.records[r][k].what["received"]
    return [{**got, "row": row, "signature": signature} if got["worker"] == sender else got for got in was]


def test_different_rows_to_different_neighbours(copied, honest):
    keys, checked, other = read_keys(honest.parent / "keys", range(4)), verify(copied), "ab" * 32
    run = checked.records[4][0].what["run"]
    signature = keys.sign(1, sent_message(run, 4, 1, other)).hex()
    resigned(copied, keys, {(4, 2): {"received": received(checked, 4, 2, 1, other, signature)}})
    assert wrong(copied, "round 4: worker 1 sent worker 2 another row than its record says").worker == 1


def test_a_row_that_a_receiver_made_up(copied, honest):
    keys, checked, other = read_keys(honest.parent / "keys", range(4)), verify(copied), "ab" * 32
    run = checked.records[4][0].what["run"]
    signature = keys.sign(2, sent_message(run, 4, 1, other)).hex()  # its own key is the only one it has
    resigned(copied, keys, {(4, 2): {"received": received(checked, 4, 2, 1, other, signature)}})
    assert wrong(copied, "round 4: worker 2 says that it got a row of worker 1 which that one did not send").worker == 2


def test_a_state_that_does_not_follow_from_the_round_before(copied, honest):
    keys, checked = read_keys(honest.parent / "keys", range(4)), verify(copied)
    before = {**checked.records[3][2].what["after"], "row": "ab" * 32}
    resigned(copied, keys, {(4, 2): {"before": before}})
    assert wrong(copied, "round 4: worker 2 began with another state").worker == 2


def test_other_senders_than_the_neighbours(copied, honest):
    keys, checked = read_keys(honest.parent / "keys", range(4)), verify(copied)
    resigned(copied, keys, {(4, 2): {"received": checked.records[4][2].what["received"][:1]}})
    verify(copied)
    with pytest.raises(Wrong, match="round 4: worker 2 names other senders or weights") as found:
        replayed(copied, [4])
    assert found.value.worker == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard": "ab" * 32}, "round 4: worker 2 committed to other samples at the start"),
        ({"received": []}, None),
        ({"more": 1}, "no record of a ledger"),
        ({"sent": "xy" * 32}, "no record of a ledger"),
        ({"before": {"row": "ab" * 32}}, "no record of a ledger"),
        ({"received": [{"worker": 9, "weight": 0.5, "row": "ab" * 32, "signature": "ab" * 64}]}, "which there is not"),
        ({"received": [{"worker": 1, "weight": "half", "row": "ab" * 32, "signature": "ab" * 64}]}, "no record of a"),
    ],
)
def test_statements_say_what_they_must_and_nothing_else(copied, honest, change, said):
    resigned(copied, read_keys(honest.parent / "keys", range(4)), {(4, 2): change})
    if said is None:
        assert verify(copied).ended
        return
    with pytest.raises((Wrong, UsageError), match=said):
        verify(copied)


def test_rounds_left_out_against_ledger_every(copied, honest):
    """All signed anew, as if round 4 had never been recorded."""
    keys = read_keys(honest.parent / "keys", range(4))
    without = {name: [] for name in ("records-0.jsonl", "rounds.jsonl")}
    for name in without:
        rewrite(copied / name, lambda lines: [line for line in lines if line["round"] != 4])
    checked = [line for line in Ledger(copied).rounds()]
    records = {(x.round, x.worker, x.kind): x for x in Ledger(copied).records()}
    for name in without:
        (copied / name).unlink()
    writer, chain, previous, after = Ledger(copied), "0" * 64, dict.fromkeys(range(4), "0" * 64), {}
    for line in checked:
        r, kind, envelopes = line["round"], line["kind"], {}
        for k in range(4):
            what = {**records[r, k, kind].what, "previous": previous[k]}
            what |= {"before": after[k]} if "before" in what else {}
            envelopes[k] = enveloped(payload_of(kind, what, f"worker {k} after round {r}", digest_json(what["after"])),
                                     keys, k)  # fmt: skip
            after[k] = what["after"]
        previous = writer.add(envelopes, r, kind)
        closing = closed(chain, r, list(previous.values()))
        writer.close(closing, kind)
        chain = closing["chain"]
    wrong(copied, r"round 5 stands after round 3, and at least each 1-th is recorded \(--ledger_every\)")


def test_two_heads(copied, honest):
    keys = read_keys(honest.parent / "keys", range(4))

    def change(lines):
        at = place(lines, 4, 1)
        statement = json.loads(base64.b64decode(lines[at]["envelope"]["payload"]))
        payload = payload_of(
            "round", {**statement["predicate"], "sent": "ab" * 32}, "worker 1 after round 4", "ab" * 32
        )
        lines.insert(at, {"round": 4, "envelope": enveloped(payload, keys, 1)})
        return lines

    rewrite(copied / "records-0.jsonl", change)
    assert wrong(copied, r"round 4: worker 1 signed two different records \(two heads\)").worker == 1


def test_a_ledger_of_another_configuration(copied):
    record = json.loads((copied / "config.json").read_text())
    record["config"]["lr"] = 0.1
    (copied / "config.json").write_text(json.dumps(record))
    wrong(copied, "signed this for another run")


def test_a_damaged_state_in_the_store(copied):
    checked = verify(copied)
    path = Store(copied / "store").path(checked.after(4)[1]["row"])
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UsageError, match="damaged"):
        replayed(copied, [5])


def test_a_folder_of_another_run_or_of_other_keys_is_refused(tmp_path, capsys):
    ledger = signed_run(tmp_path)
    other = ("--lr", "0.01", "--ledger", str(ledger), "--ledger_keys", str(tmp_path / "keys"))
    code = main_py.main(arguments(tmp_path, *SMALL, *other, name="other"))
    assert "is the ledger of another run" in refused(capsys, code)
    code = main_py.main(arguments(tmp_path, *SMALL, "--overwrite", "--ledger", str(ledger)))
    assert "begun with other keys" in refused(capsys, code)


# ---- disputes ------------------------------------------------------------------------------------------------


def test_a_dispute_finds_the_first_round_by_bisection_and_convicts(tmp_path, monkeypatch):
    mine = signed_run(tmp_path)
    with monkeypatch.context() as patched:
        dishonest(patched, Cheater, "poisoned")
        theirs = signed_run(tmp_path, name="theirs")
    shutil.copyfile(mine / "config.json", theirs / "config.json")  # of one run: so say both parties
    resign_for(theirs, mine, tmp_path / "keys")
    checked = [verify(one) for one in (mine, theirs)]
    found = judge(*checked, job_of(checked[0]))
    assert (found.verdict, found.round, found.workers) == ("convicted", 5, {2: 1})
    assert found.comparisons <= most_comparisons(len(checked[0].rounds))
    assert ledger_main(["dispute", str(mine), str(theirs)]) == 1
    assert judge(*reversed(checked), job_of(checked[1])).workers == {2: 0}


def resign_for(ledger: Path, other: Path, keys: Path) -> None:
    """Sign a ledger for the run of another one."""
    import hashlib

    run, signer = hashlib.sha256((other / "config.json").read_bytes()).hexdigest(), read_keys(keys, range(4))
    records = list(Ledger(ledger).records())
    lines = Ledger(ledger).rounds()
    for name in ("records-0.jsonl", "rounds.jsonl"):
        (ledger / name).unlink()
    writer, chain, previous = Ledger(ledger), "0" * 64, dict.fromkeys(range(4), "0" * 64)
    for line in lines:
        r, kind, envelopes = line["round"], line["kind"], {}
        for record in (x for x in records if (x.round, x.kind) == (r, kind)):
            k, what = record.worker, {**record.what, "run": run, "previous": previous[record.worker]}
            signed = {j: signer.sign(j, sent_message(run, r, j, sent_of(records, r, j))).hex() for j in range(4)}
            if kind == "round":
                what["signature"] = signed[k]
                what["received"] = [{**got, "signature": signed[got["worker"]]} for got in what["received"]]
            payload = payload_of(kind, what, f"worker {k} after round {r}", digest_json(what["after"]))
            envelopes[k] = enveloped(payload, signer, k)
        previous = writer.add(envelopes, r, kind)
        closing = closed(chain, r, list(previous.values()))
        writer.close(closing, kind)
        chain = closing["chain"]


def sent_of(records: list, r: int, worker: int) -> str:
    return next((x.what["sent"] for x in records if (x.round, x.worker, x.kind) == (r, worker, "round")), "0" * 64)


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


# ---- parts ------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=40), st.data())
def test_a_proof_holds_for_its_entry_and_place_alone(entries, data):
    tree = merkle.levels(entries)
    top, i = tree[-1][0], data.draw(st.integers(0, len(entries) - 1))
    steps = merkle.proof(tree, i)
    assert merkle.is_in(entries[i], i, len(entries), steps, top)
    assert not merkle.is_in(entries[i] + b"x", i, len(entries), steps, top)
    assert not merkle.is_in(entries[i], i, len(entries), [*steps, b"\0" * 32], top)
    j = data.draw(st.integers(0, len(entries) - 1))
    if entries[i] != entries[j]:
        assert not merkle.is_in(entries[i], j, len(entries), steps, top)


def test_a_node_is_no_leaf_and_no_list_has_the_root_of_another():
    entries = [b"a", b"b", b"c"]
    inner = merkle.levels(entries)[1]
    assert merkle.root(entries) != merkle.root([*entries, entries[-1]])  # Bitcoin's CVE-2012-2459
    assert not merkle.is_in(inner[0] + inner[1], 0, 1, [], merkle.root(entries))


def test_an_object_is_found_by_the_houses_digest_and_checked(tmp_path):
    from multiformats import CID

    store, tensor = Store(tmp_path), torch.randn(3, 5)
    digest = store.put_tensor("row", tensor)
    assert digest == digest_tensors({"row": tensor})
    assert torch.equal(store.get_tensor(digest), tensor)
    assert CID.decode(cid(digest)).digest.hex() == "1220" + digest  # multihash: SHA-256, 32 bytes
    with pytest.raises(UsageError, match="no tensor"):
        tensor_of(b"something else")


def test_private_keys_are_private(tmp_path):
    make_keys(tmp_path / "keys", 2, passphrase="open sesame", addresses=["0x" + "ab" * 20, "0x" + "cd" * 20])
    path = tmp_path / "keys" / "worker-0001.pem"
    assert path.stat().st_mode & 0o777 == 0o600 and b"ENCRYPTED" in path.read_bytes()
    keys = read_keys(tmp_path / "keys", [1], "open sesame")
    assert list(keys.private) == [1] and keys.addresses[1] == "0x" + "cd" * 20
    for wrong_one in (None, "sesame"):
        with pytest.raises(UsageError, match="LEDGER_PASSPHRASE"):
            read_keys(tmp_path / "keys", [1], wrong_one)
    with pytest.raises(UsageError, match="not replaced"):
        make_keys(tmp_path / "keys", 2)
    shutil.copyfile(path, tmp_path / "keys" / "worker-0000.pem")
    with pytest.raises(UsageError, match="is not the key"):
        read_keys(tmp_path / "keys", [0], "open sesame")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_keys(tmp_path / "keys", [1], "open sesame")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "nowhere"], "no ledger"),
        (["verify", "{ledger}", "--replay", "sometimes"], "sample:K"),
        (["verify", "{ledger}", "--replay", "99"], "recorded rounds"),
        (["verify", "{ledger}", "--anchor", "nowhere"], "cannot read --anchor"),
        (["open", "{ledger}", "--worker", "9", "--round", "1", "--keys", "k", "--out", "o"], "workers 0 to 3"),
        (["judge", "{ledger}", "{ledger}/keys.json"], "damaged"),
        (["keys", "--workers", "0", "--out", "k"], "--workers 0"),
        (["pay-me"], "invalid choice"),
        ([], "required"),
    ],
)
def test_what_the_command_line_refuses(honest, capsys, words, said):
    assert ledger_main([word.format(ledger=honest) for word in words]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line


# ---- several processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_sign_for_their_own_workers_alone(tmp_path):
    """torchrun: each process has the private keys of its workers, and what they write together is one ledger."""
    make_keys(tmp_path / "keys", 4)
    for rank, own in enumerate((range(2), range(2, 4))):
        (tmp_path / f"keys-{rank}").mkdir()
        for name in ("keys.json", *(f"worker-{k:04d}.pem" for k in own)):
            shutil.copy(tmp_path / "keys" / name, tmp_path / f"keys-{rank}" / name)
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(main_py.__file__).parent)!r})\n"
        "import main\n"
        f"keys = {str(tmp_path / 'keys-')!r} + os.environ['RANK']\n"
        "sys.exit(main.main([*sys.argv[1:], '--ledger_keys', keys]))\n"
    )
    flags = arguments(tmp_path, *SMALL, "--mode", "ring", "--ledger", str(tmp_path / "ledger"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [(tmp_path / "ledger" / f"records-{p}.jsonl").read_text().splitlines() for p in range(2)]
    signers = [{json.loads(decoded(line))["predicate"]["worker"] for line in part} for part in parts]
    assert signers == [{0, 1}, {2, 3}]
    checked = verify(tmp_path / "ledger")
    assert checked.ended and replayed(tmp_path / "ledger") == 4 * (len(checked.rounds) - 2)
