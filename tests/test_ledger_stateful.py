"""Whatever anyone does in whatever order: the contract holds what it owes, and no run pays out more than it took in."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ledger_game import BOND, PERIODS, Game, with_leaves

from ledger.chain import Chain, Refused
from ledger.payout import Payout, commitment
from ledger.trees import Tree, value_leaves

RUNS, WORKERS, SEATS = 2, 3, 3
RUN, INDEX, SEAT = st.integers(0, RUNS - 1), st.integers(0, WORKERS - 1), st.integers(0, SEATS - 1)
BUDGETS = (1009, 700)
ACCOUNTS = [f"0x{0xACC + worker:040x}" for worker in range(WORKERS)]
VALUES_EN = [[4, -1, 9], [5, 0, 9], [6, 2, -9]]
_base: list[Game] = []


def base() -> Game:
    """One chain for all examples: each begins where it began."""
    if not _base:
        _base.append(Game(Chain.embedded()))
    return _base[0]


class Rewards(RuleBasedStateMachine):
    """Two runs, three workers, three evaluators; a rule is tried whether or not its time has come."""

    @initialize()
    def begin(self):
        self.game = game = base()
        self.before = game.chain.snapshot()
        self.right = [game.payout(VALUES_EN, ACCOUNTS, BUDGETS[run], nonce=run) for run in range(RUNS)]
        self.posted: dict[tuple[int, int], Payout] = {}
        self.taken, self.paid = [0] * RUNS, [0] * RUNS

    def teardown(self):
        self.game.chain.revert(self.before)

    def attempt(self, function: str, *arguments, by: str) -> bool:
        try:
            self.game.do(function, *arguments, by=by)
        except Refused:
            return False
        return True

    def round(self, run: int) -> int:
        return self.game.see("runs", self.right[run].run.id)[7]

    def counted(self, run: int) -> Payout:
        """The right list from the lists that count."""
        right = self.right[run]
        seats = self.game.see("counted", right.run.id)
        return Payout.of(right.run, ACCOUNTS, [VALUES_EN[seat] for seat in seats]) if seats else right

    @rule(run=RUN)
    def deposit(self, run):
        try:
            self.game.deposit(self.right[run], nonce=run)
        except Refused:
            return
        self.taken[run] += BUDGETS[run]

    @rule(run=RUN, seats=st.sets(SEAT, min_size=2))
    def commit(self, run, seats):
        for seat in seats:
            root = Tree(value_leaves(self.right[run].run.id, VALUES_EN[seat])).root
            sealed = commitment(self.right[run].run, self.game.evaluators[seat], root, bytes([seat]) * 32)
            self.attempt("commit", self.right[run].run.id, seat, sealed, by=self.game.evaluators[seat])

    @rule(run=RUN, seats=st.sets(SEAT, min_size=2))
    def reveal(self, run, seats):
        for seat in seats:
            opened = (self.right[run].lists[seat].root, bytes([seat]) * 32, "")
            self.attempt("reveal", self.right[run].run.id, seat, *opened, by=self.game.evaluators[seat])

    @rule(run=RUN, by=SEAT, struck=SEAT)
    def strike(self, run, by, struck):
        self.attempt("strike", self.right[run].run.id, by, struck, by=self.game.evaluators[by])

    @rule(run=RUN, wrong=st.sampled_from((None, 0, 1, 2, "all")))
    def post(self, run, wrong):
        payout = self.counted(run)
        if wrong == "all":  # everyone is owed the whole budget
            greedy = {i: leaf._replace(amount=BUDGETS[run]) for i, leaf in enumerate(payout.leaves)}
            payout = with_leaves(payout, greedy)
        elif wrong is not None:
            leaf = payout.leaves[wrong]
            payout = with_leaves(payout, {wrong: leaf._replace(amount=leaf.amount + 1)})
        if self.attempt("post", payout.run.id, *payout.posting(), "", by=self.game.poster):
            self.posted[run, self.round(run)] = payout

    @rule(run=RUN, index=INDEX, by_poster=st.booleans())
    def challenge(self, run, index, by_poster):
        by = self.game.poster if by_poster else self.game.challenger
        self.attempt("challenge", self.right[run].run.id, self.round(run), index, by=by)

    @rule(run=RUN, index=INDEX)
    def answer(self, run, index):
        if payout := self.posted.get((run, self.round(run))):
            self.attempt("answer", *payout.evidence(index), by=self.game.poster)

    @rule(run=RUN, index=INDEX)
    def convict(self, run, index):
        self.attempt("convict", self.right[run].run.id, index, by=self.game.stranger)

    @rule(run=RUN, index=INDEX)
    def claim(self, run, index):
        if payout := self.posted.get((run, self.round(run))):
            if self.attempt("claim", *payout.claim(index), by=self.game.stranger):
                self.paid[run] += payout.leaves[index].amount

    @rule(run=RUN)
    def claim_from_the_other_run(self, run):
        if payout := self.posted.get((1 - run, self.round(1 - run))):
            assert not self.attempt("claim", self.right[run].run.id, *payout.claim(0)[1:], by=self.game.stranger)

    @rule(run=RUN)
    def refund(self, run):
        before = self.game.held(self.game.requester)
        if self.attempt("refund", self.right[run].run.id, by=self.game.stranger):
            self.paid[run] += self.game.held(self.game.requester) - before

    @rule(run=RUN, seat=SEAT, index=INDEX)
    def release(self, run, seat, index):
        id = self.right[run].run.id
        self.attempt("release_evaluator", id, seat, by=self.game.stranger)
        self.attempt("release_poster", id, by=self.game.stranger)
        for round in range(self.round(run) + 1):
            self.attempt("release_challenger", id, round, index, by=self.game.stranger)

    @rule(
        seconds=st.sampled_from((PERIODS.response, PERIODS.reveal, PERIODS.dispute + PERIODS.response, PERIODS.claim))
    )
    def wait(self, seconds):
        self.game.chain.wait_until(self.game.chain.now + seconds)

    @invariant()
    def the_contract_holds_what_it_owes(self):
        owed = 0
        for run in range(RUNS):
            id = self.right[run].run.id
            state = self.game.see("runs", id)
            if not state[8]:
                owed += state[1] - state[2]
            for seat in range(SEATS):
                commitment_, _, _, released = self.game.see("values", id, seat)
                owed += BOND * (any(commitment_) and not released)
            for round in range(state[7] + 1):
                owed += self.game.see("postings", id, round)[5]
                for index in range(WORKERS):
                    challenger, _, settled = self.game.see("challenges", id, round, index)
                    owed += BOND * (int(challenger, 16) > 0 and not settled)
        assert self.game.held() >= owed

    @invariant()
    def no_run_pays_more_than_it_took(self):
        assert all(paid <= taken for paid, taken in zip(self.paid, self.taken, strict=True))
        workers = sum(self.game.held(account) for account in ACCOUNTS)
        assert workers <= sum(self.paid)


@pytest.mark.slow
def test_any_order_of_anything():
    import hypothesis.stateful

    checks = dict(deadline=None, suppress_health_check=list(HealthCheck))
    hypothesis.stateful.run_state_machine_as_test(
        Rewards, settings=settings(max_examples=15, stateful_step_count=30, **checks)
    )
