"""The ledger: what honest runs sign holds, and every cheat of a worker is found and named by replay."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import arguments, refused, train
from ledger_runs import SMALL, Cheater, OtherData, OtherRoot, WrongMixing, decoded, dishonest, replayed, signed_run

import main as main_py
from ledger.__main__ import main as ledger_main
from ledger.keys import make_keys, read_keys
from ledger.replay import Replay, job_of, shards_fit
from ledger.verify import Wrong, verify

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


def test_a_ledger_begins_with_the_run(tmp_path, capsys):
    flags = (*SMALL[:-2], "--max_rounds", "4", "--checkpoint_every", "2")
    train(tmp_path, *flags)
    (tmp_path / "run" / "stage1" / "summary.json").unlink()
    again = arguments(tmp_path, *flags, "--resume", "--ledger", str(tmp_path / "ledger"))
    assert "from the first round on" in refused(capsys, main_py.main(again))


def test_other_readers_of_dsse_and_in_toto_read_the_records(honest):
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
