"""An opening: what an accused worker shows of one round, so that somebody who does not have its data can judge it.

It holds the samples that the worker trained on in this round, each with its salt and the proof that it is in the root
that the worker had committed to before, the state that it began with, and the rows that it got with their senders'
signatures. The judge computes the worker's steps again on these samples alone. Other samples stay closed: a salt
opens one.

Legend: N workers, B batch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ledger import merkle, state
from ledger.keys import Keys
from ledger.replay import Replay
from ledger.samples import entry, salt_of, shard_entries
from ledger.store import Store
from ledger.verify import Checked, Wrong
from training.build import Job
from training.protocols import train_round
from utils.errors import UsageError
from utils.records import read_record, write_json

Opening = dict[str, Any]


def open_round(checked: Checked, job: Job, worker: int, r: int, keys: Keys) -> Opening:
    """What the worker shows of round r, JSON-able; its tensors are put into the ledger's store. Raises
    :class:`UsageError` where the round is not recorded, or more than one round stands behind its record."""
    replay = Replay(checked, job)
    before = _round_before(checked, r)
    start = max(s for s in replay.states() if s <= before)
    fleet = job.make_fleet()
    if start:
        state.load(fleet, replay.store, checked.after(start))
    for event in replay.protocol.run(fleet, job, start) if start < before else ():
        if event.done == before:
            break
    state.StateDigests(fleet).keep(replay.store)
    salt = keys.salt(worker)
    entries = shard_entries(job, worker, salt)
    tree, ids = merkle.levels(entries), sorted(job.shards[worker].tolist())
    samples = []
    for i in trained_on(job, worker, r):
        place = ids.index(i)
        data = {"input": job.dataset.inputs_n[i], "target": job.dataset.targets_n[i]}
        samples.append({
            "id": i, "place": place, "salt": salt_of(salt, i).hex(),
            "proof": [step.hex() for step in merkle.proof(tree, place)],
            **{name: replay.store.put_tensor(name, tensor) for name, tensor in data.items()},
        })  # fmt: skip
    record = checked.records[replay.recorded.index(r)][worker]
    return {"round": r, "worker": worker, "count": len(ids), "samples": samples, "record": record.envelope}


def trained_on(job: Job, worker: int, r: int) -> list[int]:
    """Ids of the samples that the worker trains on in round r (counted from 1), ascending."""
    from training.protocols import load_protocol

    plan, found = load_protocol(job.config.protocol).plan(job, r - 1), set()
    for s in range(int(plan.steps_N[worker])):
        found |= set(job.batches.ids(plan.first_N + s)[worker].tolist())
    return sorted(found - {-1})


def judge_opening(checked: Checked, job: Job, opening: Opening) -> str:
    """A line: the worker is cleared. Raises :class:`Wrong` where it is convicted: by a sample that is not the one it
    had committed to, by one that is missing, by its steps. ``job``: of the run; of its training samples only those of
    the opening are used."""
    k, r, store = opening["worker"], opening["round"], Store(checked.folder / "store")
    recorded = [line["round"] for line in checked.rounds if line["kind"] != "end"]
    record = checked.records[recorded.index(r)][k]
    inputs_n = torch.zeros_like(job.dataset.inputs_n)
    targets_n = job.dataset.targets_n.clone()
    targets_n[job.shards[k]] = 0
    opened = {sample["id"]: sample for sample in opening["samples"]}
    needed = trained_on(job, k, r)
    missing = [i for i in needed if i not in opened]
    if missing:
        raise Wrong(f"round {r}: worker {k} does not open sample {missing[0]}: convicted", k)
    shown = dataclasses.replace(job, dataset=dataclasses.replace(job.dataset, inputs_n=inputs_n, targets_n=targets_n))
    for i, sample in opened.items():
        inputs_n[i], targets_n[i] = store.get_tensor(sample["input"]), store.get_tensor(sample["target"])
        data, steps = entry(shown, i, bytes.fromhex(sample["salt"])), [bytes.fromhex(s) for s in sample["proof"]]
        if not merkle.is_in(data, sample["place"], opening["count"], steps, bytes.fromhex(record.what["shard"])):
            raise Wrong(f"round {r}: sample {i} of worker {k} is not the one that it committed to: convicted", k)
    fleet = _with_samples(job, inputs_n, targets_n).make_fleet()
    state.load(fleet, store, checked.after(_round_before(checked, r)))
    from training.protocols import load_protocol

    train_round(fleet, load_protocol(job.config.protocol).plan(job, r - 1))
    if state.StateDigests(fleet).rows()[k] != record.what["sent"]:
        raise Wrong(f"round {r}: worker {k}'s row is not what training on the opened samples gives: convicted", k)
    return f"round {r}: worker {k} sent what its state and its {len(opened)} opened samples give: cleared"


def _with_samples(job: Job, inputs_n: Tensor, targets_n: Tensor) -> Job:
    encoded_n = job.dataset.task.encoded(targets_n)
    samples = dataclasses.replace(job.samples, inputs_n=inputs_n.to(job.samples.inputs_n.device),
                                  targets_n=encoded_n.to(job.samples.targets_n.device))  # fmt: skip
    return dataclasses.replace(job, samples=samples, _kept={})


def _round_before(checked: Checked, r: int) -> int:
    recorded = [line["round"] for line in checked.rounds if line["kind"] != "end"]
    if r not in recorded[1:]:
        raise UsageError(f"round {r} is not recorded: give one of {recorded[1]} to {recorded[-1]}.")
    before = recorded[recorded.index(r) - 1]
    if before != r - 1:
        raise UsageError(
            f"the record of round {r} stands for {r - before} rounds (--ledger_every): one round is opened."
        )
    return before


def write_opening(path: Path, opening: Opening) -> None:
    """Keep it as JSON."""
    write_json(path, opening)


def read_opening(path: Path) -> Opening:
    """Read one. Raises :class:`UsageError` of a damaged file."""
    opening = read_record(path, "round", "worker", "count", "samples", "record")
    ok = all(type(opening[n]) is int and opening[n] >= 0 for n in ("round", "worker", "count"))
    kinds = {"id": int, "place": int, "salt": str, "proof": list, "input": str, "target": str}
    samples = opening["samples"]
    ok = (
        ok
        and isinstance(samples, list)
        and all(isinstance(s, dict) and all(type(s.get(n)) is kind for n, kind in kinds.items()) for s in samples)
    )
    if not ok:
        raise UsageError(f"{path} is damaged: it is no opening of a round.")
    return opening
