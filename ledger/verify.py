"""What can be checked of a ledger without training: signatures, chains, roots, and that records fit together.

The first thing that is wrong is said in one line. What this cannot see: a worker that trained on something else than it
says, or not at all (``replay.py`` does), a ledger all of whose records were signed anew with other keys (unless the
public keys are given from elsewhere), and a tail that was cut off (unless a later round's chain hash is given from
elsewhere, an anchor).

Legend: N workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ledger.keys import PUBLIC, read_public
from ledger.records import (
    NO_RECORD,
    Ledger,
    Record,
    closed,
    digest_of,
    has_sent,
    is_signed,
    record_payload,
    sent_message,
)
from utils.errors import UsageError


class Wrong(Exception):
    """The first thing that is wrong, in a line. ``worker``: whose doing it is, where that is proved."""

    def __init__(self, text: str, worker: int | None = None):
        super().__init__(text)
        self.worker = worker


@dataclass
class Checked:
    """A ledger whose records fit together. ``rounds``: the lines that close rounds; ``records``: those of each line,
    by worker; ``ended``: whether a last record closes it."""

    folder: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    records: list[dict[int, Record]]
    ended: bool

    @property
    def workers(self) -> int:
        """N."""
        return len(self.records[0])

    def after(self, r: int) -> dict[int, dict[str, str]]:
        """Digests of all workers' states after round r, which must be a recorded one."""
        at = next(i for i, line in enumerate(self.rounds) if line["round"] == r)
        return {k: record.what["after"] for k, record in self.records[at].items()}


def verify(folder: Path, keys: list[str] | None = None, anchors: Iterable[str] = ()) -> Checked:
    """Check a ledger. ``keys``: public keys (hex) that are known from elsewhere; ``anchors``: chain hashes of rounds,
    put down elsewhere while the run went.

    Raises :class:`Wrong`, and :class:`UsageError` where it is no ledger.
    """
    from utils.records import read_record

    ledger = Ledger(folder)
    lines = ledger.rounds()
    config = read_record(folder / "config.json", "config", "identity", "execution")
    workers, every = settings_of(config, folder)
    public = read_public(folder / PUBLIC)[0][:workers]
    if len(public) < workers:
        raise Wrong(f"the run has {workers} workers, and {folder / PUBLIC} has keys of {len(public)}")
    for k, key in enumerate(public if keys is not None else ()):
        if keys[k : k + 1] != [key]:
            raise Wrong(f"the key of worker {k} is not the one that is known of it", k)
    run = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    found = in_rounds(ledger, public, run)
    known = {line["chain"] for line in lines}
    before, previous, chain, records = {}, dict.fromkeys(range(len(public)), NO_RECORD), NO_RECORD, []
    for at, line in enumerate(lines):
        r, kind = line["round"], line["kind"]
        here = found.pop((r, kind), {})
        name = {"start": "the start", "end": "the end"}.get(kind, f"round {r}")
        then = lines[at - 1]["round"] if at else 0
        if (at == 0) != (kind == "start") or at == 0 != r:
            raise Wrong(f"{name}: the ledger must begin with the workers' start, and have one")
        if at and (lines[at - 1]["kind"] == "end" or (r != then if kind == "end" else r <= then)):
            raise Wrong(f"{name} stands after round {then}: the order was changed")
        for k in range(len(public)):
            if k not in here:
                raise Wrong(f"{name}: the record of worker {k} is missing: it was deleted")
            check_record(here[k], name, public[k], run, previous[k], before.get(k))
        if kind == "start":
            check_start(here, config, public)
        else:
            check_shards(here, name, records[0])
        if r - then > every:
            raise Wrong(f"{name} stands after round {then}, and at least each {every}-th is recorded (--ledger_every): "
                        "some were left out")  # fmt: skip
        if kind == "round":
            check_rows(here, name, public, run)
        again = closed(chain, r, [here[k].digest for k in range(len(public))])
        if again != {n: line.get(n) for n in again}:
            raise Wrong(f"{name}: its root or chain hash is not that of its records and the round before")
        before = {k: record.what["after"] for k, record in here.items()}
        previous, chain = {k: record.digest for k, record in here.items()}, line["chain"]
        records.append(here)
    if found:
        (r, kind), here = min(found.items())
        raise Wrong(f"round {r}: records of workers {sorted(here)} ({kind}) are there, and nothing closes them: the "
                    "line of rounds.jsonl was deleted, or the run was killed there (--resume closes it)")  # fmt: skip
    for anchor in anchors:
        if anchor not in known:
            raise Wrong(f"the anchor {anchor[:16]}... is in no round: what came then was deleted or changed")
    return Checked(folder, config, lines, records, lines[-1]["kind"] == "end")


def settings_of(config: dict[str, Any], folder: Path) -> tuple[int, int]:
    """N, and the most rounds from one record to the next."""
    fields = config["config"] if isinstance(config["config"], dict) else {}
    workers, every = (fields.get(name) for name in ("num_workers", "ledger_every"))
    identity = config["identity"] if isinstance(config["identity"], dict) else {}
    if not all(type(n) is int and n > 0 for n in (workers, every)) or not isinstance(identity.get("digest"), str):
        raise UsageError(f"{folder / 'config.json'} is damaged: it is not the record of a run.")
    return workers, every


def in_rounds(ledger: Ledger, public: list[str], run: str) -> dict[tuple[int, str], dict[int, Record]]:
    """The records of each round and kind, by worker."""
    found: dict[tuple[int, str], dict[int, Record]] = {}
    for part in ledger.parts():
        last: dict[int, tuple[int, int]] = {}
        for record in part:
            r, k, kind = record.round, record.worker, record.kind
            if k >= len(public):
                raise Wrong(f"round {r}: a record of worker {k}, and the run has {len(public)} workers")
            here = found.setdefault((r, kind), {})
            if here.setdefault(k, record).digest != record.digest:
                both = (here[k], record)
                if all(one.what["run"] == run and is_signed(one.envelope, public[k]) for one in both):
                    raise Wrong(f"round {r}: worker {k} signed two different records (two heads)", k)
                raise Wrong(f"round {r}: there are two records of worker {k}, and one of them is not its own, or not "
                            "of this run")  # fmt: skip
            place = (r, kind == "end")
            if place < last.get(k, (0, 0)):
                raise Wrong(f"worker {k}: the record of round {r} comes after that of round {last[k][0]}: the order "
                            "was changed")  # fmt: skip
            last[k] = place
    return found


def check_start(records: Mapping[int, Record], config: dict[str, Any], public: list[str]) -> None:
    """What workers state before the first round is what config.json and keys.json say."""
    for k, record in records.items():
        if record.what["data"] != config["identity"]["digest"] or record.what["key"] != public[k]:
            raise Wrong(f"the start: worker {k} signed for other data, or for another key", k)
        if record.what["environment"].get("execution") != config["execution"]:
            raise Wrong(f"the start: worker {k} signed for another execution than that of config.json", k)


def check_shards(records: Mapping[int, Record], name: str, starts: Mapping[int, Record]) -> None:
    """What a worker committed to at the start it cannot change."""
    for k, record in records.items():
        if record.what["shard"] != starts[k].what["shard"]:
            raise Wrong(f"{name}: worker {k} committed to other samples at the start", k)


def check_record(
    record: Record, name: str, public: str, run: str, previous: str, before: Mapping[str, str] | None
) -> None:
    """One record against its key, its run and the same worker's record before."""
    k, what = record.worker, record.what
    if not is_signed(record.envelope, public):
        raise Wrong(f"{name}: the signature of worker {k}'s record is not its own (forged, or changed after signing)")
    if digest_of(record_payload(record.kind, what)) != record.digest:
        raise Wrong(f"{name}: worker {k}'s record is not written as records are (its subject or its spelling)", k)
    if what["run"] != run:
        raise Wrong(f"{name}: worker {k} signed this for another run (another config.json)")
    if what["previous"] != previous:
        raise Wrong(f"{name}: worker {k}'s record does not follow the one that stands before it: one was deleted, "
                    "added or put elsewhere")  # fmt: skip
    if record.kind == "round" and before is not None and what["before"] != before:
        raise Wrong(f"{name}: worker {k} began with another state than it ended the round before with", k)
    if record.kind == "end" and what["after"] != before:
        raise Wrong(f"{name}: worker {k} closed with another state than that of its last round", k)


def check_rows(records: Mapping[int, Record], name: str, public: list[str], run: str) -> None:
    """What was received is what was sent."""
    for k, record in records.items():
        for got in record.what["received"]:
            j, row = got["worker"], got["row"]
            if j not in records or j == k:
                raise Wrong(f"{name}: worker {k} says that it got a row of worker {j}, which there is not", k)
            if (row, got["signature"]) == (records[j].what["sent"], records[j].what["signature"]):
                continue
            message = sent_message(run, record.round, j, row)
            if row != records[j].what["sent"] and has_sent(public[j], message, got["signature"]):
                raise Wrong(f"{name}: worker {j} sent worker {k} another row than its record says: it signed both "
                            "(different rows to different neighbours)", j)  # fmt: skip
            raise Wrong(f"{name}: worker {k} says that it got a row of worker {j} which that one did not send", k)
        message = sent_message(run, record.round, k, record.what["sent"])
        if not has_sent(public[k], message, record.what["signature"]):
            raise Wrong(f"{name}: worker {k} did not sign the row that it sent", k)


def two_heads(mine: Checked, theirs: Checked) -> list[tuple[int, int]]:
    """(round, worker) of records that one worker signed differently in two ledgers of one run: whoever signs two
    records of a round is convicted by them alone."""
    found = []
    other = {(record.round, record.kind, k): record for here in theirs.records for k, record in here.items()}
    for here in mine.records:
        for k, record in here.items():
            twin = other.get((record.round, record.kind, k))
            if twin is not None and twin.digest != record.digest:
                found.append((record.round, k))
    return found


def read_anchors(path: Path) -> list[str]:
    """Chain hashes, one a line (``--anchor`` of verify). Raises :class:`UsageError` where a line is none."""
    from utils.files import read_lines

    found = []
    for number, line in read_lines(path, "--anchor"):
        words = line.split()
        if words:
            if len(words[-1]) != 64 or set(words[-1]) - set("0123456789abcdef"):
                raise UsageError(f"--anchor {path}, line {number}: give a chain hash of 64 hexadecimal digits last.")
            found.append(words[-1])
    if not found:
        raise UsageError(f"--anchor {path} holds no chain hash: 'python -m ledger anchor' prints them.")
    return found
