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
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ledger import merkle
from ledger.keys import Keys
from utils.digest import digest_json
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
DIGEST, SIGNATURE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{128}")
NO_RECORD = "0" * 64  # what the first record and the first round have before them


def payload_of(kind: str, what: Mapping[str, Any], subject: str, digest: str) -> bytes:
    """A statement as the bytes that are signed: JSON in one spelling. ``digest``: of what it is about (SHA-256)."""
    statement = {
        "_type": STATEMENT, "subject": [{"name": subject, "digest": {"sha256": digest}}], "predicateType": KINDS[kind],
        "predicate": what,
    }  # fmt: skip
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


def is_digest(value: Any) -> bool:
    """Whether it is a SHA-256, a public key or a root, in lower-case hexadecimal."""
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _is_signature(value: Any) -> bool:
    return isinstance(value, str) and SIGNATURE.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and {"row", "state"} <= value.keys() and all(map(is_digest, value.values()))


def _is_received(value: Any) -> bool:
    kinds = {"worker": _is_number, "weight": lambda w: type(w) in (int, float), "row": is_digest,
             "signature": _is_signature}  # fmt: skip
    return isinstance(value, list) and all(_has(got, kinds) for got in value)


def _has(value: Any, kinds: Mapping[str, Callable[[Any], bool]]) -> bool:
    """Whether it is an object that has just these entries, of these kinds."""
    return (
        isinstance(value, dict) and value.keys() == kinds.keys() and all(kinds[name](value[name]) for name in kinds)
    )


COMMON = {"run": is_digest, "round": _is_number, "worker": _is_number, "shard": is_digest, "previous": is_digest,
          "after": _is_state}  # fmt: skip
STATED: dict[str, dict[str, Callable[[Any], bool]]] = {  # all that a statement of each kind has, and nothing else
    "start": {**COMMON, "data": is_digest, "environment": lambda value: isinstance(value, dict), "key": is_digest,
              "address": lambda value: value is None or isinstance(value, str), "samples": _is_number},
    "round": {**COMMON, "before": _is_state, "sent": is_digest, "signature": _is_signature, "received": _is_received},
    "end": COMMON,
}  # fmt: skip


def record_payload(kind: str, what: Mapping[str, Any]) -> bytes:
    """The one spelling of a record."""
    subject = f"worker {what['worker']} after round {what['round']}"
    return payload_of(kind, what, subject, digest_json(what["after"]))


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
    except (VerificationError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
        if _has(what, STATED[kind]):
            return Record(dict(envelope), digest_of(payload), kind, what)
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
        """Remember what has been written before, by whatever process."""
        for record in self.records():
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

    def parts(self) -> list[list[Record]]:
        """The records of each process, as they lie there."""
        return [list(self._read(MetricsLog(path))) for path in sorted(self.folder.glob("records-*.jsonl"))]

    def records(self) -> Iterator[Record]:
        """All of them."""
        for part in self.parts():
            yield from part

    def rounds(self) -> list[dict[str, Any]]:
        """The lines that close rounds, the first one first. Raises :class:`UsageError` where there are none."""
        if not self._rounds.path.exists():
            raise UsageError(f"{self.folder} is no ledger (there is no rounds.jsonl): give the folder of --ledger.")
        lines = self._rounds.read()
        for line in lines:
            if line.get("kind") not in KINDS or not (is_digest(line.get("root")) and is_digest(line.get("chain"))):
                raise UsageError(f"{self._rounds.path} is damaged: a line has no root and chain.")
        if not lines:
            raise UsageError(f"{self._rounds.path} closes no round yet.")
        return lines

    def _read(self, log: MetricsLog) -> Iterator[Record]:
        for number, line in enumerate(log.read(), start=1):
            yield record_of(line.get("envelope"), f"{log.path}, line {number}")
