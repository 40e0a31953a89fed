"""Who a node is, proved by a key, whoever registered it with Flower.

Flower lets in every node whose key somebody registered, and does not tie what a node says to its key: not the
``partition-id`` that it claims, and not its replies. So the server has an allow-list of its own, the public key
of each worker, and puts a fresh random challenge into every message. A node signs a statement: who it is, what
it was asked, and what it answers. The server builds the same statement from what it sent and received, so
anything altered, swapped or replayed does not verify.

Nothing here knows Flower.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key, load_ssh_public_key

from federated.rounds import Arrays, Reply
from utils.digest import digest_json, digest_tensors
from utils.errors import UsageError

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

ALGORITHM = ec.ECDSA(hashes.SHA384())
MAKE_KEYS = "federated/certificates.sh makes the right ones"


@dataclass(frozen=True)
class Question:
    """What makes one message of the server unlike any other: the run, the node it goes to, the challenge."""

    run: int
    node: int
    challenge: str = field(default_factory=lambda: secrets.token_hex(16))


def introduction(question: Question, worker: int, fingerprint: str) -> dict[str, Any]:
    """The statement of a node that says which worker it is and what data it has."""
    return {"says": "introduction", **dataclasses.asdict(question), "worker": worker, "fingerprint": fingerprint}


def training(question: Question, worker: int, r: int, asked: Arrays, reply: Reply) -> dict[str, Any]:
    """The statement of a worker that was ``asked`` to train a model in round ``r``."""
    return {
        "says": "training",
        **dataclasses.asdict(question),
        "worker": worker,
        "round": r,
        "asked": digest_tensors(asked),
        "arrays": digest_tensors(reply.arrays),
        "loss": reply.loss,
    }


def sign(key: PrivateKey, statement: Mapping[str, Any]) -> bytes:
    """The signature of a statement."""
    return key.sign(digest_json(statement).encode(), ALGORITHM)


def is_signed(key: PublicKey, statement: Mapping[str, Any], signature: bytes) -> bool:
    """Whether the owner of ``key`` signed exactly this statement."""
    try:
        key.verify(signature, digest_json(statement).encode(), ALGORITHM)
    except InvalidSignature:
        return False
    return True


def read_private_key(file: Path) -> PrivateKey:
    """A node's own key. Raises :class:`UsageError` for anything but an elliptic-curve key without a passphrase."""
    content = _read(file)
    try:
        key = load_ssh_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a passphrase
        raise UsageError(f"{file} is no OpenSSH private key without a passphrase: {MAKE_KEYS}.") from None
    if not isinstance(key, PrivateKey):
        raise UsageError(f"{file} is no elliptic-curve key: {MAKE_KEYS}.")
    return key


def read_allow_list(folder: Path, workers: int) -> list[PublicKey]:
    """The public key of each worker K, in ``folder``/node-K.pub. Raises :class:`UsageError` where one is
    missing or of another kind, or where two workers have the same: one node could then be both."""
    keys = [_read_public_key(folder / f"node-{worker}.pub") for worker in range(workers)]
    for worker, key in enumerate(keys):
        if key in keys[:worker]:
            raise UsageError(f"workers {keys.index(key)} and {worker} share a key in {folder}: give each its own.")
    return keys


def is_listed(keys: list[PublicKey], public: bytes) -> bool:
    """Whether a public key, in PEM as Flower keeps it, is one of the workers'."""
    return load_pem_public_key(public) in keys


def _read_public_key(file: Path) -> PublicKey:
    content = _read(file)
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{file} is no OpenSSH public key: {MAKE_KEYS}.") from None
    if not isinstance(key, PublicKey):
        raise UsageError(f"{file} is no elliptic-curve key: {MAKE_KEYS}.")
    return key


def _read(file: Path) -> bytes:
    try:
        return file.expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the key {file} ({error.strerror}): {MAKE_KEYS}.") from None
