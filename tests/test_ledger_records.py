"""Cheats on paper, which signatures and chains find, and the parts that they are made of."""

from __future__ import annotations

import base64
import json
import shutil

import pytest
import torch
from command import arguments, refused
from hypothesis import given
from hypothesis import strategies as st
from ledger_runs import SMALL, is_of, place, received, replayed, resigned, rewrite, signed_run, wrong

import main as main_py
from ledger import merkle
from ledger.__main__ import main as ledger_main
from ledger.dispute import judge
from ledger.keys import make_keys, read_keys
from ledger.records import enveloped, payload_of, sent_message
from ledger.replay import job_of
from ledger.store import Store, cid, tensor_of
from ledger.verify import Wrong, verify
from utils.digest import digest_tensors
from utils.errors import UsageError

# ---- cheats on paper, which signatures and chains find ------------------------------------------------------


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
    resigned(copied, read_keys(honest.parent / "keys", range(4)), without=(4,))
    wrong(copied, r"round 5 stands after round 3, and at least each 1-th is recorded \(--ledger_every\)")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 7}, "worker 2 says that it has 7 samples, and its shard has"),
        ({"samples": 0}, "worker 2 says that it has 0 samples, and its shard has"),
    ],
)
def test_what_a_start_says_is_compared_wherever_replay_begins(copied, honest, changes, said):
    resigned(copied, read_keys(honest.parent / "keys", range(4)), {(0, 2): changes})
    with pytest.raises(Wrong, match=said) as found:
        replayed(copied, [5])
    assert found.value.worker == 2


def test_all_who_close_a_run_too_early(copied, honest):
    keys = read_keys(honest.parent / "keys", range(4))
    checked = verify(copied)
    last = checked.rounds[-1]["round"]
    resigned(copied, keys, without=(last,), end=last - 1)
    assert verify(copied).ended  # all of them signed it
    with pytest.raises(Wrong, match=f"the end stands after round {last - 1}, and a run .* has {last}"):
        replayed(copied, [5])
    found = judge(verify(honest), verify(copied), job_of(checked))
    assert found.verdict == "cannot judge" and "is closed" in found.why


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
    from multiformats import CID, multihash

    store, tensor = Store(tmp_path), torch.randn(3, 5)
    digest = store.put_tensor("row", tensor)
    assert digest == digest_tensors({"row": tensor})
    assert torch.equal(store.get_tensor(digest), tensor)
    assert cid(digest) == str(CID("base32", 1, "raw", multihash.wrap(bytes.fromhex(digest), "sha2-256")))
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


@pytest.mark.parametrize("passphrase", ["\udcff", "ü" * 500])
def test_any_bytes_are_a_passphrase(tmp_path, passphrase):
    make_keys(tmp_path / "keys", 1, passphrase)
    assert read_keys(tmp_path / "keys", [0], passphrase).private
    with pytest.raises(UsageError, match="at most 1023 bytes"):
        make_keys(tmp_path / "others", 1, "ü" * 512)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "nowhere"], "no ledger"),
        (["verify", "{ledger}", "--replay", "sometimes"], "sample:K"),
        (["verify", "{ledger}", "--replay", "99"], "recorded rounds"),
        (["verify", "{ledger}", "--anchor", "nowhere"], "cannot read --anchor"),
        (["open", "{ledger}", "--worker", "9", "--round", "1", "--keys", "k", "--out", "o"], "workers 0 to 3"),
        (["judge", "{ledger}", "{ledger}/keys.json"], "damaged"),
        (["verify", "{ledger}", "--anchor", "/dev/null"], "regular file"),
        (["verify", "{ledger}", "--anchor", "{ledger}/empty"], "no chain hash"),
        (["keys", "--workers", "0", "--out", "k"], "--workers 0"),
        (["keys", "--workers", "1", "--out", "k", "--addresses", "0x12"], "'0x12' is no address"),
        (["pay", "run", "--budget", "1", "--nonce", "-1"], "--nonce -1"),
        (["pay-me"], "invalid choice"),
        ([], "required"),
    ],
)
def test_what_the_command_line_refuses(copied, capsys, words, said):
    (copied / "empty").write_text("\n")
    assert ledger_main([word.format(ledger=copied) for word in words]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
