"""Small runs with a ledger for tests: honest ones, workers that cheat, and ledgers that were tampered with."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

pytest.importorskip("securesystemslib", reason="pip install -r requirements-ledger.txt")
pytest.importorskip("multiformats", reason="pip install -r requirements-ledger.txt")

from command import train  # noqa: E402

import utils.registry  # noqa: E402
from data.batches import Batches  # noqa: E402
from ledger import observer  # noqa: E402
from ledger.keys import Keys, make_keys  # noqa: E402
from ledger.records import NO_RECORD, Ledger, closed, enveloped, record_payload, sent_message  # noqa: E402
from ledger.replay import Replay, job_of  # noqa: E402
from ledger.verify import Wrong, verify  # noqa: E402

SMALL = ("--model", "mlp", "--num_workers", "4", "--max_train", "320", "--batch_size", "16", "--epochs", "2", "--quiet",
         "--no-plots", "--engine", "loop", "--ledger_states", "2")  # fmt: skip


def signed_run(folder: Path, *flags: str, name: str = "run") -> Path:
    """The ledger of a small run."""
    ledger = folder / f"{name}-ledger"
    keys = folder / "keys"
    if not keys.exists():
        make_keys(keys, 4)
    train(folder, *SMALL, "--run_name", name, "--ledger", str(ledger), "--ledger_keys", str(keys), *flags)
    return ledger


def replayed(ledger: Path, rounds: list[int] | None = None) -> int:
    checked = verify(ledger)
    replay = Replay(checked, job_of(checked))
    return replay.check(rounds or replay.recorded[1:])


def decoded(line: str) -> str:
    return base64.b64decode(json.loads(line)["envelope"]["payload"]).decode()


class Cheater(observer.LedgerObserver):
    """Worker 2 is dishonest in round 5: what it sends is signed as if it were honest."""

    who, when = 2, 5
    how = ""

    def _sent(self) -> None:
        if not hasattr(self, "old"):
            self.old, self.began = [], None
        row_D = self.fleet.rows_RD[self.who]
        if self.done + 1 == self.when:
            getattr(self, self.how)(row_D)
        self.old.append(row_D.clone())
        super()._sent()

    def round(self, event) -> None:
        super().round(event)
        self.began = self.fleet.rows_RD[self.who].clone()

    def poisoned(self, row_D):
        row_D[:10] += 0.5

    def stale(self, row_D):
        row_D.copy_(self.began)

    def replayed_old_update(self, row_D):
        row_D.copy_(self.old[1])

    def copied(self, row_D):
        row_D.copy_(self.fleet.rows_RD[1])


class OtherData(observer.LedgerObserver):
    """Worker 2 trains on worker 1's samples, and says that it trains on its own."""

    def begin(self, trainer) -> None:
        super().begin(trainer)
        shards = list(trainer.job.shards)
        shards[2] = shards[1][: len(shards[2])]
        self.fleet.batches = Batches(shards, trainer.config.batch_size, trainer.job.batches.seed)


class OtherRoot(observer.LedgerObserver):
    """Worker 2 commits to samples that are not its own."""

    def begin(self, trainer) -> None:
        entries = observer.shard_entries
        try:
            observer.shard_entries = lambda job, k, salt: entries(job, 1 if k == 2 else k, salt)
            super().begin(trainer)
        finally:
            observer.shard_entries = entries


class WrongMixing(observer.LedgerObserver):
    """Worker 2 does not take what its neighbours send in round 5."""

    def _sent(self) -> None:
        super()._sent()
        self.own = self.fleet.rows_RD[2].clone()

    def round(self, event) -> None:
        if event.done == 5:
            self.fleet.rows_RD[2] = self.own
        super().round(event)


class Between(observer.LedgerObserver):
    """Worker 2 cheats in round 5, which is not recorded."""

    def _sent(self) -> None:
        if self.done + 1 == 5 or self.done == 4:
            self.fleet.rows_RD[2, :10] += 0.5
        super()._sent()


def dishonest(monkeypatch, kind: type, how: str = "") -> None:
    monkeypatch.setattr(kind, "how", how, raising=False)
    monkeypatch.setitem(utils.registry.OBSERVERS, "ledger", f"{__name__}:{kind.__name__}")


def rewrite(path: Path, change) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def place(lines: list, r: int, worker: int) -> int:
    """Where the record of a worker and round stands."""
    return next(i for i, line in enumerate(lines) if line["round"] == r and is_of(line, worker))


def is_of(line: dict, worker: int) -> bool:
    return json.loads(base64.b64decode(line["envelope"]["payload"]))["predicate"]["worker"] == worker


def wrong(ledger: Path, match: str, **known) -> Wrong:
    with pytest.raises(Wrong, match=match) as found:
        verify(ledger, **known)
    return found.value


def resigned(
    ledger: Path, keys: Keys, changes: dict[tuple[int, int], dict] | None = None, run: str | None = None,
    without: tuple[int, ...] = (), end: int | None = None,
) -> None:
    """Sign all again, as somebody with all keys could. ``changes``: (round, worker) -> what the statement says then;
    ``run``: for another run; ``without``: rounds that are left out; ``end``: after which round all of them close it."""
    said = {(x.round, x.worker, x.kind): x.what for x in Ledger(ledger).records()}
    lines = [line for line in Ledger(ledger).rounds() if line["kind"] == "end" or line["round"] not in without]
    for name in ("records-0.jsonl", "rounds.jsonl"):
        (ledger / name).unlink()
    writer, chain, previous, after = Ledger(ledger), NO_RECORD, dict.fromkeys(range(4), NO_RECORD), {}
    for line in lines:
        r, kind, envelopes = line["round"], line["kind"], {}
        for k in range(4):
            what = {**said[r, k, kind], "previous": previous[k], **(changes or {}).get((r, k), {})}
            if without and kind == "round":
                what["before"] = after[k]
            if end is not None and kind == "end":
                what |= {"round": end, "after": after[k]}
            if run is not None:
                what["run"] = run
            if run is not None and kind == "round":
                rows = {j: said[r, j, kind]["sent"] for j in range(4)}
                signed = {j: keys.sign(j, sent_message(run, r, j, row)).hex() for j, row in rows.items()}
                what["signature"] = signed[k]
                what["received"] = [{**got, "signature": signed[got["worker"]]} for got in what["received"]]
            envelopes[k], after[k] = enveloped(record_payload(kind, what), keys, k), what["after"]
        r = end if end is not None and kind == "end" else r
        previous = writer.add(envelopes, r, kind)
        closing = closed(chain, r, list(previous.values()))
        writer.close(closing, kind)
        chain = closing["chain"]


def received(checked, r: int, k: int, sender: int, row: str, signature: str) -> list[dict]:
    """What worker k received in round r, but for one row."""
    was = checked.records[r][k].what["received"]
    return [{**got, "row": row, "signature": signature} if got["worker"] == sender else got for got in was]
