"""What a worker signs, and how it hangs together.

A record is an in-toto statement (v1) in a DSSE envelope, so that what reads those reads it: which run, which round,
which worker; digests of its state before, of the row that it sent, of the rows that it received (each with its sender's
own signature of having sent this row to all), of its state after; the Merkle root of its samples; and the digest of the
same worker's record before. A line of rounds.jsonl closes a round: the Merkle root over all workers' records, and a
hash that chains it to the round before. Nothing in a record depends on a clock or on chance, so a run that goes on
after a kill signs the same bytes again.

A ledger is a folder: config.json (the run's), keys.json (public keys), records-0.jsonl, ... (one a process),
rounds.jsonl, store/ (states).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ledger import merkle
from ledger.keys import Keys
from utils.errors import UsageError
from utils.files import parse_json
from utils.records import MetricsLog

STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD = "application/vnd.in-toto+json"
KINDS = {  # what is stated: an in-toto predicateType
    "start": "urn:decentralized-learning:start:v1",
    "round": "urn:decentralized-learning:round:v1",
    "end": "urn:decentralized-learning:end:v1",
}
NO_RECORD = "0" * 64  # what the first record and the first round have before them


def payload_of(kind: str, what: Mapping[str, Any], subject: str, digest: str) -> bytes:
    """A statement as the bytes that are signed: JSON in one spelling. ``digest``: of what it is about (SHA-256)."""
    statement = {
        "_type": STATEMENT, "subject": [{"name": subject, "digest": {"sha256": digest}}], "predicateType": KINDS[kind],
        "predicate": what,
    }  # fmt: skip
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


def sent_message(run: str, r: int, worker: int, digest: str) -> bytes:
    """What a worker signs when it sends a row: the same to all who get it."""
    text = {"run": run, "round": r, "worker": worker, "sent": digest}
    return b"decentralized-learning sent " + json.dumps(text, sort_keys=True).encode()


def enveloped(payload: bytes, keys: Keys, worker: int) -> dict[str, Any]:
    """The payload in a DSSE envelope, signed by the worker."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD, {})
    envelope.sign(keys.signers[worker])
    return envelope.to_dict()


def is_signed(envelope: Mapping[str, Any], public: str) -> bool:
    """Whether the owner of the public key (hex) signed the envelope."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    try:
        signed = Envelope.from_dict(json.loads(json.dumps(envelope)))
        [keyid] = signed.signatures
        signed.verify([SSlibKey(keyid, "ed25519", "ed25519", {"public": public})], 1)
    except (VerificationError, ValueError, KeyError, TypeError):
        return False
    return True


def has_sent(public: str, message: bytes, signature: str) -> bool:
    """Whether the owner of the public key (hex) signed a :func:`sent_message` (``signature`` in hex)."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Record:
    """A record that was read: its envelope, its payload's digest, and what the statement says."""

    envelope: dict[str, Any]
    digest: str
    kind: str
    what: dict[str, Any]

    @property
    def round(self) -> int:
        """After how many rounds of the run."""
        return self.what["round"]

    @property
    def worker(self) -> int:
        """Whose it is."""
        return self.what["worker"]


def record_of(envelope: Any, where: str) -> Record:
    """Read a record. Raises :class:`UsageError` where it is none."""
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        statement = parse_json(payload)
        kind = next(name for name, uri in KINDS.items() if uri == statement["predicateType"])
        what = statement["predicate"]
        record = Record(dict(envelope), digest_of(payload), kind, what)
        if type(record.round) is int and type(record.worker) is int and min(record.round, record.worker) >= 0:
            return record
    except (KeyError, TypeError, ValueError, StopIteration, AttributeError, binascii.Error):
        pass
    raise UsageError(f"{where} is damaged: it is no record of a ledger.")


def digest_of(payload: bytes) -> str:
    """By which a record is known."""
    return hashlib.sha256(payload).hexdigest()


def closed(before: str, r: int, digests: list[str]) -> dict[str, Any]:
    """The line of rounds.jsonl for these records (their digests, in the order of workers)."""
    top = merkle.root([bytes.fromhex(digest) for digest in digests])
    chain = hashlib.sha256(b"round %d " % r + bytes.fromhex(before) + top).hexdigest()
    return {"round": r, "records": len(digests), "root": top.hex(), "chain": chain}


class Ledger:
    """The files of a ledger. What is there is never changed: a line that is written again must be the same."""

    def __init__(self, folder: Path, part: int = 0):
        self.folder, self.part = folder, part
        self._records = MetricsLog(folder / f"records-{part}.jsonl")
        self._rounds = MetricsLog(folder / "rounds.jsonl")
        self._known: dict[tuple[int, int, str], str] = {}
        self._closed: dict[tuple[int, str], dict[str, Any]] = {}

    def go_on(self) -> None:
        """Remember what this process has written before."""
        if self._records.path.exists():
            for record in self._read(self._records):
                self._known[record.round, record.worker, record.kind] = record.digest
        if self._rounds.path.exists():
            self._closed = {(line["round"], line.get("kind", "round")): line for line in self._rounds.read()}

    def add(self, envelopes: Mapping[int, dict[str, Any]], r: int, kind: str) -> dict[int, str]:
        """Keep the envelopes of some workers; their payloads' digests. Raises :class:`UsageError` where others were
        kept before: the run does not come to the same again."""
        digests = {k: digest_of(base64.b64decode(envelope["payload"])) for k, envelope in envelopes.items()}
        for k, digest in digests.items():
            if self._known.get((r, k, kind), digest) != digest:
                raise UsageError(
                    f"the ledger {self.folder} has another record of worker {k} after round {r}: this run does not "
                    "come to the same. Give another --ledger folder, or run it with the same code on the same machine."
                )
        new = [k for k in envelopes if (r, k, kind) not in self._known]
        if new:
            self._records.append(*({"round": r, "envelope": envelopes[k]} for k in new))
            self._known |= {(r, k, kind): digests[k] for k in new}
        return digests

    def close(self, line: dict[str, Any], kind: str = "round") -> None:
        """Keep the line that closes a round."""
        then = self._closed.get((line["round"], kind))
        if then is None:
            self._rounds.append({**line, "kind": kind})
            self._closed[line["round"], kind] = line
        elif then["chain"] != line["chain"]:
            raise UsageError(
                f"the ledger {self.folder} closed round {line['round']} with other records: give another --ledger "
                "folder."
            )

    def records(self) -> Iterator[Record]:
        """All records of all processes, as they lie there."""
        for path in sorted(self.folder.glob("records-*.jsonl")):
            yield from self._read(MetricsLog(path))

    def rounds(self) -> list[dict[str, Any]]:
        """The lines that close rounds, the first one first. Raises :class:`UsageError` where there are none."""
        if not self._rounds.path.exists():
            raise UsageError(f"{self.folder} is no ledger (there is no rounds.jsonl): give the folder of --ledger.")
        lines = self._rounds.read()
        for line in lines:
            if not all(isinstance(line.get(name), str) for name in ("root", "chain", "kind")):
                raise UsageError(f"{self._rounds.path} is damaged: a line has no root and chain.")
        return lines

    def _read(self, log: MetricsLog) -> Iterator[Record]:
        for number, line in enumerate(log.read(), start=1):
            yield record_of(line.get("envelope"), f"{log.path}, line {number}")
