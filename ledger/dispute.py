"""Two parties that do not agree on a run: where their ledgers part, and who is convicted.

Rounds are chained, so two ledgers that agree on a round agree on all before it: the first round that differs is found
by bisection, with log2 T comparisons of one hash each, and computed again from the last state before it. Before that a
round on which both agree is: it tells whether this machine comes to the run's bits at all. Where it does not, the
verdict is 'cannot judge', and never 'convicted'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ledger.replay import CannotJudge, Replay
from ledger.verify import Checked, Wrong, two_heads
from training.build import Job
from utils.errors import UsageError

Verdict = Literal["agreed", "convicted", "cleared", "cannot judge"]


@dataclass(frozen=True)
class Judgement:
    """What came out. ``round``: the first that differs; ``comparisons``: of chain hashes that it took to find it;
    ``workers``: who is convicted, by the number of the ledger (0: the first, 1: the second) that has its wrong record.
    ``why``: a line."""

    verdict: Verdict
    round: int | None
    comparisons: int
    workers: dict[int, int]
    why: str


def first_difference(mine: list[str], theirs: list[str]) -> tuple[int | None, int]:
    """The first place at which two chains of hashes differ, and the comparisons that it took. None: one begins as the
    other goes on."""
    low, high, comparisons = 0, min(len(mine), len(theirs)), 0
    while low < high:
        middle = (low + high) // 2
        comparisons += 1
        if mine[middle] == theirs[middle]:
            low = middle + 1
        else:
            high = middle
    return (low if low < min(len(mine), len(theirs)) else None), comparisons


def judge(mine: Checked, theirs: Checked, job: Job) -> Judgement:
    """Whose ledger is wrong in the first round in which they differ. Raises :class:`UsageError` where they are not of
    one run."""
    if mine.config["identity"]["digest"] != theirs.config["identity"]["digest"]:
        raise UsageError(f"{mine.folder} and {theirs.folder} are ledgers of two runs: there is nothing to judge.")
    place, comparisons = first_difference(*([line["chain"] for line in one.rounds] for one in (mine, theirs)))
    if place is None:
        shorter = len(mine.rounds) != len(theirs.rounds)
        why = "one is shorter than the other: its tail is missing" if shorter else "they are the same"
        return Judgement("agreed", None, comparisons, {}, why)
    r = mine.rounds[place]["round"]
    lines = [one.rounds[place] for one in (mine, theirs)]
    if (lines[0]["round"], lines[0]["kind"]) != (lines[1]["round"], lines[1]["kind"]):
        how = ["is closed" if line["kind"] == "end" else f"has round {line['round']}" for line in lines]
        why = f"{mine.folder} {how[0]}, and {theirs.folder} {how[1]}: 'verify --replay' says which is no end of the run"
        return Judgement("cannot judge", r, comparisons, {}, why)
    if place == 0:
        return Judgement("cannot judge", r, comparisons, {}, "they differ in the start: keys, data or environment")
    replay = Replay(mine, job)
    states = [start for start in replay.states() if start < r]
    if not calibrated(replay, r):
        return Judgement("cannot judge", r, comparisons, {}, "this machine does not come to the bits of the rounds on "
                         "which both agree")  # fmt: skip
    for again in replay.rounds(max(states), r):
        if again.round < r:
            try:
                replay.compare(again)
            except Wrong as error:  # both agree on it, and it is wrong all the same
                found = {} if error.worker is None else {error.worker: 0}
                return Judgement("convicted", again.round, comparisons, found, str(error))
            except CannotJudge as error:
                return Judgement("cannot judge", again.round, comparisons, {}, str(error))
    wrong = {}
    for number, checked in enumerate((mine, theirs)):
        for k, record in checked.records[place].items():
            if record.what["sent"] != again.sent[k] or record.what["after"] != again.after[k]:
                wrong.setdefault(k, number)
    senders = {k: n for k, n in wrong.items() if (mine, theirs)[n].records[place][k].what["sent"] != again.sent[k]}
    wrong = senders or wrong  # who mixed a wrong row did what it should
    if len(wrong) > 1 and r - mine.rounds[place - 1]["round"] > 1 and again.senders:
        return Judgement("cannot judge", r, comparisons, {}, "rows mixed since the last record (--ledger_every)")
    if not wrong:
        return Judgement("cleared", r, comparisons, {}, "what both signed is what training and mixing give")
    twice = {k for at, k in two_heads(mine, theirs) if at == r}
    said = ", ".join(
        f"worker {k} (its record in {(mine, theirs)[n].folder}{'; it signed two' if k in twice else ''})"
        for k, n in sorted(wrong.items())
    )
    return Judgement("convicted", r, comparisons, wrong, said)


def calibrated(replay: Replay, r: int) -> bool:
    """Whether this machine comes to the bits of a recorded round before ``r``; of the first round where there is none
    before."""
    for start in replay.states():
        following = [other for other in replay.recorded if start < other < r][:1]
        if following:
            return any(map(replay.agrees, replay.rounds(start, following[0])))
    return replay.comes_to_the_same(r)


def most_comparisons(rounds: int) -> int:
    """What bisection over so many rounds takes at most."""
    return math.ceil(math.log2(rounds + 1))
