"""A key for every worker: Ed25519 (RFC 8032), the private one in a file of its own that only its owner can read.

A folder of keys has worker-0000.pem, ..., and keys.json: what may be told, the public keys and the addresses at which
workers want to be paid. Of several processes or machines each needs the private keys of its own workers alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from utils.errors import UsageError
from utils.files import read_bytes
from utils.records import read_record, write_json

PUBLIC = "keys.json"
NO_ONE = 0o077  # permissions that a private key must not give
ADDRESS = re.compile("0x[0-9a-fA-F]{40}")
LONGEST_PASSPHRASE = 1023  # bytes that OpenSSL takes


@dataclass(frozen=True)
class Keys:
    """``private``: of the workers that this process speaks for; ``public`` and ``addresses``: of all (hex, or no
    address)."""

    private: dict[int, Ed25519PrivateKey]
    public: list[str]
    addresses: list[str | None]

    def sign(self, worker: int, message: bytes) -> bytes:
        """64 bytes."""
        return self.private[worker].sign(message)

    @cached_property
    def signers(self) -> dict[int, Any]:
        """What securesystemslib signs envelopes with."""
        from securesystemslib.signer import CryptoSigner

        return {worker: CryptoSigner(key) for worker, key in self.private.items()}

    def salt(self, worker: int) -> bytes:
        """What nobody else can know: it makes the digests of a worker's samples say nothing about them."""
        raw = self.private[worker].private_bytes_raw()
        return hashlib.sha256(b"salt of samples" + raw).digest()


def make_keys(
    folder: Path, workers: int, passphrase: str | None = None, addresses: Sequence[str] | None = None
) -> None:
    """Keys of so many workers. Raises :class:`UsageError` where the folder has some: a lost key is lost for ever."""
    if (folder / PUBLIC).exists():
        raise UsageError(f"{folder} holds keys: they are not replaced; give another folder.")
    if addresses is not None and len(addresses) != workers:
        raise UsageError(f"{len(addresses)} addresses are given for {workers} workers: one each.")
    for address in addresses or ():
        if not ADDRESS.fullmatch(address):
            raise UsageError(f"{address!r} is no address: 0x and 40 hexadecimal digits.")
    if passphrase and len(os.fsencode(passphrase)) > LONGEST_PASSPHRASE:
        raise UsageError(f"a passphrase has at most {LONGEST_PASSPHRASE} bytes.")
    folder.mkdir(parents=True, exist_ok=True)
    how = (
        serialization.BestAvailableEncryption(os.fsencode(passphrase)) if passphrase else serialization.NoEncryption()
    )
    public = []
    for k in range(workers):
        key = Ed25519PrivateKey.generate()
        text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
        path = folder / f"worker-{k:04d}.pem"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text)
        public.append(key.public_key().public_bytes_raw().hex())
    write_json(folder / PUBLIC, {"keys": public, "addresses": list(addresses or [None] * workers)})


def read_public(path: Path) -> tuple[list[str], list[str | None]]:
    """Public keys and addresses of all workers. Raises :class:`UsageError` of a damaged file."""
    record = read_record(path, "keys", "addresses")
    keys, addresses = record["keys"], record["addresses"]
    if not isinstance(keys, list) or not isinstance(addresses, list) or len(keys) != len(addresses):
        raise UsageError(f"{path} is damaged: it must hold a key and an address of each worker.")
    if not all(isinstance(key, str) and _is_key(key) for key in keys) or len(set(keys)) < len(keys):
        raise UsageError(f"{path} is damaged: its keys must be 64 hexadecimal digits each, all of them others.")
    if not all(address is None or isinstance(address, str) for address in addresses):
        raise UsageError(f"{path} is damaged: an address is a text, or null.")
    return keys, addresses


def _is_key(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def read_keys(folder: Path, workers: Iterable[int], passphrase: str | None = None) -> Keys:
    """The private keys of these workers, and what is known of all. Raises :class:`UsageError` where one is missing,
    readable by others, under another passphrase, or not the one of keys.json."""
    public, addresses = read_public(folder / PUBLIC)
    private = {}
    for k in workers:
        if k >= len(public):
            raise UsageError(f"{folder / PUBLIC} has keys of {len(public)} workers, and the run has more.")
        path = folder / f"worker-{k:04d}.pem"
        text = read_bytes(path, "the private key")
        if path.stat().st_mode & NO_ONE:
            raise UsageError(f"{path} can be read by others: chmod 600 it.")
        private[k] = _private(text, path, passphrase)
        if private[k].public_key().public_bytes_raw().hex() != public[k]:
            raise UsageError(f"{path} is not the key that {folder / PUBLIC} gives worker {k}.")
    return Keys(private, public, addresses)


def _private(text: bytes, path: Path, passphrase: str | None) -> Ed25519PrivateKey:
    try:
        key: Any = serialization.load_pem_private_key(text, os.fsencode(passphrase) if passphrase else None)
    except (TypeError, ValueError) as error:
        what = "it has none" if "not encrypted" in str(error) else "LEDGER_PASSPHRASE must be what it was made with"
        raise UsageError(f"{path} cannot be read with this passphrase ({what}), or is damaged.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is no Ed25519 key: 'python -m ledger keys' makes the right ones.")
    return key
