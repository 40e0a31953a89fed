"""What a worker's samples are known by: salted, so that their digests tell nobody what they are.

Legend: n samples of a worker.
"""

from __future__ import annotations

import hashlib
import hmac

from training.build import Job
from utils.digest import digest_tensors


def salt_of(salt: bytes, sample_id: int) -> bytes:
    """The salt of one sample, which opens no other."""
    return hmac.new(salt, b"%d" % sample_id, hashlib.sha256).digest()


def entry(job: Job, sample_id: int, salt: bytes) -> bytes:
    """An entry of a shard's Merkle tree. ``salt``: of this sample."""
    data = job.dataset
    digest = digest_tensors({"input": data.inputs_n[sample_id], "target": data.targets_n[sample_id]})
    return salt + sample_id.to_bytes(8, "big") + bytes.fromhex(digest)


def shard_entries(job: Job, worker: int, salt: bytes) -> list[bytes]:
    """The entries of a worker's samples [n], in ascending order of ids. ``salt``: the worker's."""
    return [entry(job, i, salt_of(salt, i)) for i in sorted(job.shards[worker].tolist())]
