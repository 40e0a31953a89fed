"""A round computed again: who did something else than train on its samples and mix what it got?

A run is a pure function of its configuration, so from a state that is in the store (or from the start) any round can be
computed again, to the bit, by anybody who has the data, and compared with what was signed. The first round that differs
tells who: a row that was sent and is not what its worker's state and samples give convicts that worker; so does a state
after the round that is not what the received rows give. Whether this machine comes to the same bits at all is told by
the workers that do agree; where nobody agrees nobody is convicted.

What replay cannot show: that the samples are good. Bad data, committed honestly, are what audits of influence are for.

Legend: N workers.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ledger import merkle, state
from ledger.observer import senders_of
from ledger.records import Ledger, Record
from ledger.samples import shard_entries
from ledger.store import Store
from ledger.verify import Checked, Wrong
from training.build import Job, build
from training.execution import Execution
from training.protocols import load_protocol
from utils.args import Config
from utils.errors import UsageError
from utils.progress import Progress, ignored
from utils.random import permutations
from utils.recorded import read_recorded, recorded_fields, recorded_files
from workers.worker_vision import Fleet


class CannotJudge(Exception):
    """This machine does not come to the run's bits, in a line: nobody is convicted by it."""


@dataclass(frozen=True)
class Again:
    """A round, computed again: digests of the rows that were sent, and of states after it, by worker; whose rows each
    worker mixes, with what weights."""

    round: int
    sent: dict[int, str]
    after: dict[int, state.State]
    senders: dict[int, list[tuple[int, float]]]


def job_of(checked: Checked, dataset_path: str | None = None, threads: int | None = None) -> Job:
    """The run of a ledger, built here. Raises :class:`UsageError` where the data are not here, or others."""
    path = str(checked.folder / "config.json")
    record, hints = read_recorded(path), typing.get_type_hints(Config)
    given = {"dataset_path": dataset_path} if dataset_path else {}
    config = Config(**{**recorded_fields(path, record, hints), **given})
    config = dataclasses.replace(config, **recorded_files(path, record, config, given), ledger=None, quiet=True)
    execution = Execution(**checked.config["execution"])
    if threads:
        execution = dataclasses.replace(execution, threads=threads)
    job = build(config, execution)
    if job.identity["digest"] != checked.config["identity"]["digest"]:
        raise UsageError(f"the data or files here are not those of the ledger {checked.folder}: give --dataset_path.")
    job.byzantine = None  # an honest run of this configuration
    return job


class Replay:
    """Rounds of a ledger's run, computed again."""

    def __init__(self, checked: Checked, job: Job):
        self.checked, self.job = checked, job
        self.store = Store(checked.folder / "store")
        self.recorded = [line["round"] for line in checked.rounds if line["kind"] != "end"]
        self.protocol = load_protocol(job.config.protocol)

    def fleet(self) -> Fleet:
        """The workers at the start of the run."""
        fleet = self.job.make_fleet()
        self.protocol.start(fleet, self.job)
        return fleet

    def states(self) -> list[int]:
        """The recorded rounds whose states are in the store; 0 is the start, which follows from the configuration."""
        whole = state.states_are_whole(self.job)
        return [r for r in self.recorded if r == 0 or whole and state.stored(self.store, self.checked.after(r))]

    def rounds(self, first: int, last: int, progress: Progress = ignored) -> Iterator[Again]:
        """Every recorded round after ``first`` (whose states are in the store, or 0) up to ``last``."""
        fleet = self.fleet()
        digests = state.StateDigests(fleet)
        if first:
            state.load(fleet, self.store, self.checked.after(first))
        if digests.after() != self.checked.after(first):
            raise Wrong(f"round {first}: the states that follow from the configuration are not those of the ledger")
        sent: dict[int, str] = {}
        wanted = set(self.recorded)

        def watch() -> None:
            if now + 1 in wanted:
                sent.update(digests.rows())

        now, fleet.watch = first, watch
        for event in self.protocol.run(fleet, self.job, first):
            now = event.done
            progress(1)
            if now in wanted:
                yield Again(now, dict(sent), digests.after(), senders_of(self.protocol, self.job, now - 1))
            if now >= last:
                break

    def check(self, rounds: Sequence[int], progress: Progress = ignored) -> int:
        """Compute these recorded rounds again, each from the last state before it that is in the store; how many
        records were compared. Raises :class:`Wrong` of the first that differs, and :class:`CannotJudge`."""
        self.check_ends()
        compared, starts, todo = 0, self.states(), sorted(rounds)
        while todo:
            start = max(r for r in starts if r < todo[0])
            stop = min([r for r in starts if r > start], default=todo[-1])
            stop = min(max(stop, todo[0]), todo[-1])
            last = start
            for again in self.rounds(start, stop, progress):
                self.compare(again)
                compared, last = compared + len(again.sent), again.round
            if last < todo[0]:
                raise Wrong(f"round {todo[0]}: the run of this configuration has no such round")
            todo = [r for r in todo if r > last]
        return compared

    def check_ends(self) -> None:
        """What can be told without training: states and samples at the start, and after which round the run ends.
        Raises :class:`Wrong`."""
        after = state.StateDigests(self.fleet()).after()
        odd = [k for k, record in self.checked.records[0].items() if record.what["after"] != after[k]]
        if odd:  # of all of them: maybe this machine draws other bits
            raise Wrong(f"the start: workers {odd} began with other states than the configuration gives",
                        odd[0] if len(odd) < len(after) else None)  # fmt: skip
        for k, record in self.checked.records[0].items():
            if record.what["samples"] != len(self.job.shards[k]):
                raise Wrong(f"the start: worker {k} says that it has {record.what['samples']} samples, and its shard "
                            f"has {len(self.job.shards[k])}", k)  # fmt: skip
        config, last = self.job.config, self.recorded[-1]
        rounds = self.protocol.rounds(self.job)
        rounds = min(rounds, config.max_rounds or rounds)
        if self.checked.ended and last != rounds and not config.patience:
            raise Wrong(f"the end stands after round {last}, and a run of this configuration has {rounds}")

    def compare(self, again: Again) -> None:
        """Records of a round against the round computed again. Raises as :meth:`check` does."""
        records = self.records(again)
        odd = [k for k, record in records.items() if record.what["sent"] != again.sent[k]]
        if odd:
            self.judge(again, odd)
        for k, record in records.items():
            told = [(got["worker"], got["weight"]) for got in record.what["received"]]
            if told != [(j, weight) for j, weight in again.senders.get(k, []) if j != k]:
                raise Wrong(f"round {again.round}: worker {k} names other senders or weights than its neighbours", k)
        odd = [k for k, record in records.items() if record.what["after"] != again.after[k]]
        if odd:
            mixing = {k for k, record in records.items() if record.what["received"]}
            if mixing and mixing <= set(odd):
                raise CannotJudge(f"round {again.round}: rows are as they were sent, but this machine comes to other "
                                  "states after mixing for everybody")  # fmt: skip
            raise Wrong(f"round {again.round}: worker {odd[0]}'s state after the round is not what mixing the rows "
                        "that it received gives: convicted", odd[0])  # fmt: skip

    def records(self, again: Again) -> dict[int, Record]:
        """What was signed of a round, by worker."""
        return self.checked.records[self.recorded.index(again.round)]

    def agrees(self, again: Again) -> bool:
        """Whether this machine came to the bits of somebody who trained in this round: a row that nobody changed is no
        evidence."""
        return any(
            record.what["sent"] == again.sent[k] != record.what["before"]["row"]
            for k, record in self.records(again).items()
        )

    def judge(self, again: Again, odd: list[int]) -> None:
        """Some sent other rows than they should have."""
        if not self.agrees(again) and not self.comes_to_the_same(again.round):
            raise CannotJudge(
                f"round {again.round}: this machine does not come to the bits of any worker (another processor, "
                "library or number of threads?): cannot judge"
            )
        before = self.recorded[self.recorded.index(again.round) - 1]
        if len(odd) > 1 and again.round - before > 1 and again.senders:
            raise Wrong(
                f"rounds {before + 1} to {again.round}: the rows of workers {', '.join(map(str, odd))} are not what "
                "training and mixing give; who began it nobody can tell, since rows mixed between these records "
                "(--ledger_every)"
            )
        also = f"; so did {', '.join(f'worker {k}' for k in odd[1:])}" if odd[1:] else ""
        raise Wrong(
            f"round {again.round}: worker {odd[0]} sent a row that its state and its samples do not give"
            f"{self.looks_like(odd[0], again.round)}: convicted{also}",
            odd[0],
        )

    def looks_like(self, worker: int, r: int) -> str:
        """What a wrong row is, where it is known."""
        at = self.recorded.index(r)
        row = self.checked.records[at][worker].what["sent"]
        if row == self.checked.after(self.recorded[at - 1])[worker]["row"]:
            return ": it is the row that it began with, untrained (a stale model)"
        for earlier in range(1, at):
            for k, record in self.checked.records[earlier].items():
                if row == record.what["sent"]:
                    whose = "its own" if k == worker else f"worker {k}'s"
                    return f": it is {whose} of round {self.recorded[earlier]} (an old update)"
        for k, record in self.checked.records[at].items():
            if k != worker and row == record.what["sent"]:
                return f": it is that of worker {k} (a copy)"
        return ""

    def comes_to_the_same(self, r: int) -> bool:
        """Whether this machine comes to the bits of somebody in another round of the run than ``r``: in the rounds
        that follow states in the store, one after the other."""
        for start in self.states():
            following = [other for other in self.recorded if other > start][:1]
            if following and following[0] != r and any(map(self.agrees, self.rounds(start, following[0]))):
                return True
        return False


def chosen(what: str, checked: Checked, seed: int = 0) -> list[int]:
    """The rounds that --replay asks for: 'all', 'sample:K' or a round. Raises :class:`UsageError` of others."""
    recorded = [line["round"] for line in checked.rounds if line["kind"] == "round"]
    if what == "all":
        return recorded
    if what.startswith("sample:") and what[7:].isdecimal() and int(what[7:]) > 0:
        order = permutations(
            torch.tensor([len(recorded)]), seed, "replayed rounds", torch.zeros(1, 1, dtype=torch.int64)
        )
        return sorted(recorded[i] for i in order[0][: int(what[7:])].tolist())
    if what.isdecimal() and int(what) in recorded:
        return [int(what)]
    raise UsageError(f"--replay {what}: give 'all', 'sample:K' or one of {len(recorded)} recorded rounds, from "
                     f"{recorded[0] if recorded else '-'} to {recorded[-1] if recorded else '-'}.")  # fmt: skip


def shards_fit(checked: Checked, job: Job, salts: dict[int, bytes]) -> None:
    """Raises :class:`Wrong` where a worker's committed samples are not those of its shard. ``salts``: of workers that
    have opened theirs."""
    for k, salt in salts.items():
        top = merkle.root(shard_entries(job, k, salt)).hex()
        for line, records in zip(checked.rounds, checked.records, strict=True):
            if records[k].what["shard"] != top:
                raise Wrong(
                    f"round {line['round']}: worker {k} committed to other samples than its shard: convicted", k
                )


def anchors_of(folder: Path) -> list[str]:
    """'round chain-hash' of every round, to be put elsewhere."""
    return [f"{line['round']} {line['chain']}" for line in Ledger(folder).rounds()]
