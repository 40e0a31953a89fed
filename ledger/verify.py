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
from ledger.records import NO_RECORD, Ledger, Record, closed, has_sent, is_signed, sent_message
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
    public, _ = read_public(folder / PUBLIC)
    if keys is not None and keys != public:
        odd = next((k for k, pair in enumerate(zip(keys, public, strict=False)) if pair[0] != pair[1]), len(public))
        raise Wrong(f"the key of worker {odd} is not the one that is known of it", odd)
    run = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    found = in_rounds(ledger, public)
    known = {line["chain"] for line in lines}
    before, previous, chain, records = {}, dict.fromkeys(range(len(public)), NO_RECORD), NO_RECORD, []
    for at, line in enumerate(lines):
        r, kind = line["round"], line["kind"]
        here = found.pop((r, kind), {})
        name = {"start": "the start", "end": "the end"}.get(kind, f"round {r}")
        if (at == 0) != (kind == "start"):
            raise Wrong(f"{name}: the ledger must begin with the workers' start, and have one")
        if at and (r <= lines[at - 1]["round"]) != (kind == "end") or lines[at - 1]["kind"] == "end" and at:
            raise Wrong(f"{name} stands after round {lines[at - 1]['round']}: the order was changed")
        for k in range(len(public)):
            if k not in here:
                raise Wrong(f"{name}: the record of worker {k} is missing: it was deleted")
            check_record(here[k], name, public[k], run, previous[k], before.get(k))
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
        raise Wrong(f"round {r}: records of workers {sorted(here)} ({kind}) are there, and nothing closes them: "
                    "the line of rounds.jsonl was deleted")  # fmt: skip
    for anchor in anchors:
        if anchor not in known:
            raise Wrong(f"the anchor {anchor[:16]}... is in no round: what came then was deleted or changed")
    return Checked(folder, config, lines, records, lines[-1]["kind"] == "end")


def in_rounds(ledger: Ledger, public: list[str]) -> dict[tuple[int, str], dict[int, Record]]:
    """The records of each round and kind, by worker."""
    found: dict[tuple[int, str], dict[int, Record]] = {}
    last: dict[int, tuple[int, int]] = {}
    for record in ledger.records():
        r, k, kind = record.round, record.worker, record.kind
        if k >= len(public):
            raise Wrong(f"round {r}: a record of worker {k}, and keys are known of {len(public)} workers")
        here = found.setdefault((r, kind), {})
        if k in here:
            if record.digest != here[k].digest and all(is_signed(one.envelope, public[k]) for one in (here[k], record)):
                raise Wrong(f"round {r}: worker {k} signed two different records (two heads)", k)
            raise Wrong(f"round {r}: there are two records of worker {k}, and one of them is not its own")
        here[k] = record
        place = (r, kind == "end")
        if place < last.get(k, (0, 0)):
            raise Wrong(f"worker {k}: the record of round {r} comes after that of round {last[k][0]}: the order was "
                        "changed", None)  # fmt: skip
        last[k] = place
    return found


def check_record(
    record: Record, name: str, public: str, run: str, previous: str, before: Mapping[str, str] | None
) -> None:
    """One record against its key, its run and the same worker's record before."""
    k, what = record.worker, record.what
    if not is_signed(record.envelope, public):
        raise Wrong(f"{name}: the signature of worker {k}'s record is not its own (forged, or changed after signing)")
    if what.get("run") != run:
        raise Wrong(f"{name}: worker {k} signed this for another run (another config.json)")
    if what.get("previous") != previous:
        raise Wrong(f"{name}: worker {k}'s record does not follow the one that stands before it: one was deleted, "
                    "added or put elsewhere")  # fmt: skip
    if record.kind == "round" and before is not None and what.get("before") != before:
        raise Wrong(f"{name}: worker {k} began with another state than it ended the round before with", k)
    if record.kind == "end" and what.get("after") != before:
        raise Wrong(f"{name}: worker {k} closed with another state than that of its last round", k)


def check_rows(records: Mapping[int, Record], name: str, public: list[str], run: str) -> None:
    """What was received is what was sent."""
    for k, record in records.items():
        for got in record.what["received"]:
            j, row = got["worker"], got["row"]
            if row == records[j].what["sent"]:
                continue
            if has_sent(public[j], sent_message(run, record.round, j, row), got["signature"]):
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
    return found
