"""``main.py --ledger``: what every worker did is signed as the run goes.

A record costs digests of the row that was sent, of the row and of the optimizer's state after the round, taken in the
threads that train. States are kept in the store every few rounds, so that a round can be replayed without all before.

Legend: N workers, n of them here, D floats a row.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from scipy import sparse
from torch import Tensor

from ledger import merkle
from ledger.keys import Keys, make_keys, read_keys
from ledger.records import NO_RECORD, Ledger, closed, enveloped, has_sent, record_payload, sent_message
from ledger.samples import shard_entries
from ledger.state import State, StateDigests, states_are_whole
from ledger.store import Store
from training.build import Job
from training.checkpoint import snapshot_interval
from training.observers import Observer
from training.protocols import Round, load_protocol
from training.trainer import Trainer
from utils.errors import UsageError
from utils.files import replaced
from utils.provenance import provenance
from utils.records import read_json, read_record, write_json
from workers import distributed
from workers.robust import sent_rows

PASSPHRASE = "LEDGER_PASSPHRASE"
T = TypeVar("T")


class LedgerObserver(Observer):
    """Writes the ledger of a run."""

    def __init__(self, trainer: Trainer):
        self.config, self.job, self.fleet = trainer.config, trainer.job, trainer.fleet
        self.folder, self.run_dir = Path(self.config.ledger), trainer.run_dir
        self.every, self.last = self.config.ledger_every, trainer.stop_after
        self.rounds, self.lead = trainer.rounds, trainer.lead
        self.protocol = load_protocol(self.config.protocol)
        self.may_stop = trainer.evaluations.every if self.config.patience else None

    def begin(self, trainer: Trainer) -> None:
        """Check that the folder is this run's, and write how it starts."""
        self.keys = self._keys()
        distributed.by_first(self._claim)
        self.run = _file_digest(self.folder / "config.json")
        self.ledger, self.store = Ledger(self.folder, distributed.rank()), Store(self.folder / "store")
        self.ledger.go_on()
        self.digests = StateDigests(self.fleet)
        self.done, self.sent = trainer.done, None
        self.roots = {k: merkle.root(shard_entries(self.job, k, self.keys.salt(k))).hex() for k in self.fleet.owned}
        self.fleet.watch = self._sent
        self._whole = states_are_whole(self.job)
        self._state_every = self.config.ledger_states or max(self.every, snapshot_interval(self.rounds))
        self.before = self.digests.after()
        if trainer.done == 0:
            self.previous = dict.fromkeys(self.fleet.owned, NO_RECORD)
            self.chain = NO_RECORD
            self._keep_states(0, self.before)
            self._write("start", 0, self._start())
            return
        self._go_on(trainer.done)

    def _keys(self) -> Keys:
        """Those of --ledger_keys; where the flag is not given, made beside the ledger, which may be shown to others."""
        folder = Path(self.config.ledger_keys or self.folder.with_name(f"{self.folder.name}-keys"))
        passphrase = os.environ.get(PASSPHRASE)
        if self.config.ledger_keys is None and self.lead and not (folder / "keys.json").exists():
            make_keys(folder, self.config.num_workers, passphrase)
        distributed.barrier()
        return read_keys(folder, self.fleet.owned, passphrase)

    def _claim(self) -> None:
        """The folder is new, or this run's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "config.json"
        own = read_json(self.run_dir / "config.json")
        if not record.exists():
            with replaced(record) as temporary:
                shutil.copyfile(self.run_dir / "config.json", temporary)
        then = read_record(record, "config", "identity")
        if then["identity"] != own["identity"]:
            raise UsageError(f"--ledger {self.folder} is the ledger of another run: give another folder.")
        if then["config"].get("ledger_every") != self.every:
            raise UsageError(f"--ledger {self.folder} was begun with --ledger_every "
                             f"{then['config'].get('ledger_every')}: give the same.")  # fmt: skip
        public = self.folder / "keys.json"
        told = {"keys": self.keys.public, "addresses": self.keys.addresses}
        if not public.exists():
            write_json(public, told)
        elif read_json(public) != told:
            raise UsageError(f"--ledger {self.folder} was begun with other keys: give --ledger_keys of those.")

    def _start(self) -> dict[int, dict[str, Any]]:
        """What each worker states before the first round."""
        own = read_json(self.folder / "config.json")
        environment = {**provenance(), "execution": own["execution"], "cpu": torch.backends.cpu.get_cpu_capability()}
        return {
            k: {
                "data": self.job.identity["digest"], "environment": environment, "key": self.keys.public[k],
                "address": self.keys.addresses[k], "samples": len(self.job.shards[k]), "after": self.before[k],
            }
            for k in self.fleet.owned
        }  # fmt: skip

    def _go_on(self, done: int) -> None:
        """Where a run goes on: the records of before must be there, up to its checkpoint."""
        self.previous, self.chain = {}, None
        found = {}
        for record in self.ledger.records():
            if record.round <= done and record.kind != "end" and record.worker in self.fleet.owned:
                if record.worker in found and record.round < found[record.worker].round:
                    continue
                found[record.worker] = record
        for line in self.ledger.rounds() if found else ():
            if line["round"] <= done and line["kind"] != "end":
                self.chain = line["chain"]
        if self.chain is None or set(found) != set(self.fleet.owned):
            raise UsageError(
                f"--ledger {self.folder} does not have the rounds before the checkpoint at round {done}: a ledger is "
                "written from the first round on (--overwrite starts the run anew)."
            )
        for k, record in found.items():
            self.previous[k] = record.digest
            self.before[k] = record.what["after"]

    def due(self, r: int) -> bool:
        """Whether round r (counted from 1) is recorded: also one that may turn out to be the last."""
        return r % self.every == 0 or r == self.last or self.may_stop is not None and r % self.may_stop == 0

    def _sent(self) -> None:
        """Rows after the local steps of a round, before anything is mixed: what workers send."""
        if not self.due(self.done + 1):
            return
        bad = {}
        if self.job.byzantine is not None:
            bad = sent_rows(self.job.byzantine, self.fleet.all_rows(), self.done, self.fleet.seed)
        self.sent = self.digests.rows(bad)

    def round(self, event: Round) -> None:
        """A round has ended: everybody signs."""
        self.done = event.done
        if not self.due(event.done):
            return
        after = self.digests.after()
        sent_N = self._of_all(self.sent)
        signed_N = self._of_all(
            self._each(lambda k: self.keys.sign(k, sent_message(self.run, event.done, k, sent_N[k])).hex())
        )
        senders = senders_of(self.protocol, self.job, event.done - 1)
        self._check_others(event.done, {j for k in self.fleet.owned for j, _ in senders.get(k, [])}, sent_N, signed_N)
        what = {
            k: {
                "before": self.before[k], "sent": sent_N[k], "signature": signed_N[k],
                "received": [
                    {"worker": j, "weight": weight, "row": sent_N[j], "signature": signed_N[j]}
                    for j, weight in senders.get(k, []) if j != k
                ],
                "after": after[k],
            }
            for k in self.fleet.owned
        }  # fmt: skip
        if event.done % self._state_every == 0 or event.done == self.last:
            self._keep_states(event.done, after)
        self._write("round", event.done, what)
        self.before = after

    def _check_others(self, r: int, senders: set[int], sent_N: dict[int, str], signed_N: dict[int, str]) -> None:
        """Nobody here puts its name under a row that its sender, in another process, did not sign."""
        for j in sorted(senders - set(self.fleet.owned)):
            if not has_sent(self.keys.public[j], sent_message(self.run, r, j, sent_N[j]), signed_N[j]):
                raise UsageError(f"round {r}: worker {j} did not sign the row that it sends: its keys are others than "
                                 "those of keys.json here, or it cheats.")  # fmt: skip

    def end(self, summary: dict[str, Any]) -> None:
        """The run is finished: nothing may follow."""
        self._write("end", self.done, {k: {"after": self.before[k]} for k in self.fleet.owned})

    def close(self) -> None:
        """Look no more."""
        self.fleet.watch = None

    def _write(self, kind: str, r: int, what: dict[int, dict[str, Any]]) -> None:
        """Sign what each worker here states, and close the round."""

        def signed(k: int) -> dict[str, Any]:
            common = {"run": self.run, "round": r, "worker": k, "shard": self.roots[k], "previous": self.previous[k]}
            return enveloped(record_payload(kind, {**common, **what[k]}), self.keys, k)

        self.previous = digests = self.ledger.add(self._each(signed), r, kind)
        all_N = self._of_all(digests)
        line = closed(self.chain, r, [all_N[k] for k in range(self.fleet.num_workers)])
        self.chain = line["chain"]
        if self.lead:
            self.ledger.close(line, kind)

    def _each(self, function: Callable[[int], T]) -> dict[int, T]:
        """``function(k)`` of every worker k here, in the threads that train: signing needs no lock of Python's."""
        workers, threads = list(self.fleet.owned), self.fleet.engine.threads
        parts = [workers[i::threads] for i in range(min(threads, len(workers)))]
        found = self.fleet.engine.map(lambda part: {k: function(k) for k in part}, parts)
        return {k: value for k, value in sorted(item for part in found for item in part.items())}

    def _keep_states(self, r: int, after: dict[int, State]) -> None:
        """States of this instant, from which rounds can be replayed."""
        if self._whole or r == 0:
            self.digests.keep(self.store, after)

    def _of_all(self, hexadecimal: dict[int, str]) -> dict[int, str]:
        """What workers of all processes have, as hexadecimal digits of one length."""
        if not distributed.started():
            return hexadecimal
        own = torch.tensor([list(bytes.fromhex(hexadecimal[k])) for k in self.fleet.owned], dtype=torch.uint8)
        rows: Tensor = self.fleet.collect(own)
        return {k: bytes(row.tolist()).hex() for k, row in enumerate(rows)}


def senders_of(protocol: Any, job: Job, r: int) -> dict[int, list[tuple[int, float]]]:
    """Whose rows each worker mixes at the end of round r, and with what weight."""
    mixing = protocol.plan(job, r).mixing
    return {} if mixing is None else job.engine.kept(("senders", id(mixing)), mixing, lambda: _of_rows(mixing))


def _of_rows(mixing: sparse.csr_array) -> dict[int, list[tuple[int, float]]]:
    places = zip(mixing.indptr, mixing.indptr[1:], strict=False)
    return {
        k: list(zip(mixing.indices[a:b].tolist(), mixing.data[a:b].tolist(), strict=True))
        for k, (a, b) in enumerate(places)
    }


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
