"""An opening: what an accused worker shows of one round, so that somebody who does not have its data can judge it.

It holds the samples that the worker trained on in this round, each with its salt and the proof that it is in the root
that the worker had committed to before, and the worker's signature; states and opened samples lie in the ledger's
store. The judge computes the worker's steps again on these samples alone. Other samples stay closed: a salt opens one.
What it mixed afterwards is not judged here: replay does that, and needs no samples of others' but their rows.

Legend: N workers, B batch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from ledger import merkle, state
from ledger.keys import Keys
from ledger.records import has_sent
from ledger.replay import CannotJudge, Replay
from ledger.samples import entry, salt_of, shard_entries
from ledger.store import Store
from ledger.verify import Checked, Wrong
from training.build import Job
from training.protocols import load_protocol
from utils.digest import digest_json
from utils.errors import UsageError
from utils.records import read_record

Opening = dict[str, Any]


def open_round(checked: Checked, job: Job, worker: int, r: int, keys: Keys) -> Opening:
    """What the worker shows of round r, JSON-able; its tensors are put into the ledger's store. Raises
    :class:`UsageError` where the round is not recorded, or more than one round stands behind its record."""
    replay = Replay(checked, job)
    before = _round_before(checked, job, r)
    record = checked.records[replay.recorded.index(r)][worker]
    if keys.public[worker] != checked.records[0][worker].what["key"]:
        raise UsageError(f"these are not the keys of the ledger {checked.folder}: give those of --ledger_keys.")
    start = max(s for s in replay.states() if s <= before)
    fleet = replay.fleet()
    if start:
        state.load(fleet, replay.store, checked.after(start))
    for event in replay.protocol.run(fleet, job, start) if start < before else ():
        if event.done == before:
            break
    digests = state.StateDigests(fleet)
    digests.keep(replay.store, digests.after())
    salt = keys.salt(worker)
    entries = shard_entries(job, worker, salt)
    tree, ids = merkle.levels(entries), sorted(job.shards[worker].tolist())
    samples = []
    for i in trained_on(job, worker, r):
        data = {"input": job.dataset.inputs_n[i], "target": job.dataset.targets_n[i]}
        samples.append({
            "id": i, "salt": salt_of(salt, i).hex(),
            "proof": [step.hex() for step in merkle.proof(tree, ids.index(i))],
            **{name: replay.store.put_tensor(name, tensor) for name, tensor in data.items()},
        })  # fmt: skip
    opening = {"round": r, "worker": worker, "samples": samples}
    return {**opening, "signature": keys.sign(worker, _message(record.what["run"], opening)).hex()}


def _message(run: str, opening: Opening) -> bytes:
    """What the worker signs of an opening: else anybody could open for it, and badly."""
    what = {name: opening[name] for name in ("round", "worker", "samples")}
    return f"decentralized-learning opening {run} {digest_json(what)}".encode()


def trained_on(job: Job, worker: int, r: int) -> list[int]:
    """Ids of the samples that the worker trains on in round r (counted from 1), ascending."""
    plan, found = load_protocol(job.config.protocol).plan(job, r - 1), set()
    for s in range(int(plan.steps_N[worker])):
        found |= set(job.batches.ids(plan.first_N + s)[worker].tolist())
    return sorted(found - {-1})


def judge_opening(checked: Checked, job: Job, opening: Opening) -> str:
    """A line: the worker is cleared. Raises :class:`Wrong` where it is convicted: by a sample that is not the one it
    had committed to, by one that is missing, by its steps; :class:`CannotJudge` where this machine does not come to the
    bits of other rounds; :class:`UsageError` where the worker did not sign the opening. ``job``: of the run; of the
    worker's samples only those of the opening are used."""
    k, r, store = opening["worker"], opening["round"], Store(checked.folder / "store")
    before, replay = _round_before(checked, job, r), Replay(checked, job)
    if k >= checked.workers:
        raise UsageError(f"the opening is of worker {k}, and the run has workers 0 to {checked.workers - 1}.")
    record = checked.records[replay.recorded.index(r)][k]
    if not has_sent(checked.records[0][k].what["key"], _message(record.what["run"], opening), opening["signature"]):
        raise UsageError(f"worker {k} did not sign this opening of round {r}: it says nothing about the worker.")
    inputs_n, targets_n = job.dataset.inputs_n.clone(), job.dataset.targets_n.clone()
    inputs_n[job.shards[k]], targets_n[job.shards[k]] = 0, 0
    opened = {sample["id"]: sample for sample in opening["samples"]}
    missing = [i for i in trained_on(job, k, r) if i not in opened]
    if missing:
        raise Wrong(f"round {r}: worker {k} does not open sample {missing[0]}: convicted", k)
    shown = dataclasses.replace(job, dataset=dataclasses.replace(job.dataset, inputs_n=inputs_n, targets_n=targets_n))
    ids = sorted(job.shards[k].tolist())
    for i, sample in opened.items():
        if i not in ids or not _is_committed(shown, sample, ids, store, record.what["shard"]):
            raise Wrong(f"round {r}: sample {i} of worker {k} is not the one that it committed to: convicted", k)
    fleet = _with_samples(job, inputs_n, targets_n).make_fleet()
    state.load(fleet, store, checked.after(before))
    sent: dict[int, str] = {}
    fleet.watch = lambda: sent.update(state.StateDigests(fleet).rows())
    next(replay.protocol.run(fleet, job, before))
    if sent[k] != record.what["sent"]:
        if not replay.comes_to_the_same(r):
            raise CannotJudge(f"round {r}: this machine does not come to the bits of other rounds: cannot judge")
        raise Wrong(f"round {r}: worker {k}'s row is not what training on the opened samples gives: convicted", k)
    return f"round {r}: worker {k} sent what its state and its {len(opened)} opened samples give: cleared"


def _is_committed(job: Job, sample: dict[str, Any], ids: list[int], store: Store, top: str) -> bool:
    """Whether an opened sample is the one at its place in the tree; it is put into the job's data set."""
    i, data = sample["id"], job.dataset
    try:
        data.inputs_n[i], data.targets_n[i] = store.get_tensor(sample["input"]), store.get_tensor(sample["target"])
        salt, steps = bytes.fromhex(sample["salt"]), [bytes.fromhex(step) for step in sample["proof"]]
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"the opening is damaged: sample {i} cannot be read ({error}).") from error
    return merkle.is_in(entry(job, i, salt), ids.index(i), len(ids), steps, bytes.fromhex(top))


def _with_samples(job: Job, inputs_n: Tensor, targets_n: Tensor) -> Job:
    encoded_n = job.dataset.task.encoded(targets_n)
    samples = dataclasses.replace(job.samples, inputs_n=inputs_n.to(job.samples.inputs_n.device),
                                  targets_n=encoded_n.to(job.samples.targets_n.device))  # fmt: skip
    return dataclasses.replace(job, samples=samples, _kept={})


def _round_before(checked: Checked, job: Job, r: int) -> int:
    recorded = [line["round"] for line in checked.rounds if line["kind"] != "end"]
    if r not in recorded[1:]:
        raise UsageError(f"round {r} is not recorded: give one of {recorded[1]} to {recorded[-1]}.")
    before = recorded[recorded.index(r) - 1]
    if before != r - 1:
        raise UsageError(
            f"the record of round {r} stands for {r - before} rounds (--ledger_every): one round is opened."
        )
    if not state.states_are_whole(job):
        raise UsageError("a round of this run depends on more than its workers' states: verify --replay judges it.")
    return before


def read_opening(path: Path) -> Opening:
    """Read one. Raises :class:`UsageError` of a damaged file."""
    opening = read_record(path, "round", "worker", "samples", "signature")
    kinds = {"id": int, "salt": str, "proof": list, "input": str, "target": str}
    whole = type(opening["samples"]) is list and type(opening["signature"]) is str
    whole = whole and all(type(opening[name]) is int and opening[name] >= 0 for name in ("round", "worker"))
    for sample in opening["samples"] if whole else ():
        whole = whole and type(sample) is dict and all(type(sample.get(n)) is kind for n, kind in kinds.items())
    if not whole:
        raise UsageError(f"{path} is damaged: it is no opening of a round.")
    return opening
