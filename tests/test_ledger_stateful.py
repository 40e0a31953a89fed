"""Whatever anyone does in whatever order: the contract holds what it owes, and no run pays out more than it took in."""

from __future__ import annotations

import functools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from ledger_game import BOND, BUDGET, PERIODS, STAKE, VALUES_EN, WORKERS, Game, with_leaves

from ledger.chain import Chain, Refused
from ledger.payout import Payout

RUN, INDEX, SEAT = st.integers(0, 1), st.integers(0, len(WORKERS) - 1), st.integers(0, 2)


@functools.cache
def begun() -> tuple[Game, dict[str, object]]:
    """One chain for all examples, with the states that they begin in: before both runs, revealed, and evaluated."""
    game = Game(Chain.embedded())
    states = {"new": game.chain.snapshot()}
    right = [game.payout(nonce=run) for run in (0, 1)]
    commit_by = [game.deposit(payout, nonce=run) for run, payout in enumerate(right)]
    for payout in right:
        game.commit(payout)
    game.chain.wait_until(commit_by[1])
    for payout in right:
        game.reveal(payout)
    states["revealed"] = game.chain.snapshot()
    game.chain.wait_until(commit_by[1] + PERIODS.reveal + PERIODS.check)
    states["evaluated"] = game.chain.snapshot()
    return game, states


class Rewards(RuleBasedStateMachine):
    """Two runs of five workers and three evaluators. A rule is tried whether or not its time has come.

    balance: what the contract holds, by a model that knows only which transactions went through.
    taken, paid: of each run's deposit. stakes, open: of each run's posting.
    """

    @initialize(state=st.sampled_from(("new", "revealed", "evaluated", "evaluated")))
    def begin(self, state):
        self.game, states = begun()
        self.game.chain.revert(states[state])
        new = state == "new"
        self.right = [self.game.payout(nonce=run) for run in (0, 1)]
        self.posted: list[Payout | None] = [None, None]
        self.round, self.stakes, self.open = [0, 0], [0, 0], [{}, {}]
        self.taken, self.paid = [0 if new else BUDGET] * 2, [0, 0]
        self.balance = 0 if new else 2 * BUDGET + 6 * BOND

    def attempt(self, function: str, *arguments, by: str, moves: int = 0) -> bool:
        try:
            self.game.do(function, *arguments, by=by)
        except Refused:
            return False
        self.balance += moves
        return True

    @rule(run=RUN)
    def deposit(self, run):
        try:
            self.game.deposit(self.right[run], nonce=run)
        except Refused:
            return
        self.taken[run] += BUDGET
        self.balance += BUDGET

    @rule(run=RUN, seats=st.sets(SEAT, min_size=2))
    def commit(self, run, seats):
        for seat in seats:
            try:
                self.game.commit(self.right[run], [seat])
            except Refused:
                continue
            self.balance += BOND

    @rule(run=RUN, seats=st.sets(SEAT, min_size=2))
    def reveal(self, run, seats):
        for seat in seats:
            try:
                self.game.reveal(self.right[run], [seat])
            except Refused:
                continue

    @rule(run=RUN, by=SEAT, struck=SEAT)
    def strike(self, run, by, struck):
        self.attempt("strike", self.right[run].run.id, by, struck, by=self.game.evaluators[by])

    @rule(run=RUN, wrong=st.one_of(st.none(), INDEX, st.just("all")))
    def post(self, run, wrong):
        """The list that follows from the lists that count; or one leaf is a unit off, or each owed the whole budget."""
        seats = self.game.see("counted", self.right[run].run.id)
        payout = Payout.of(self.right[run].run, WORKERS, [VALUES_EN[seat] for seat in seats or (0, 1, 2)])
        if wrong is not None:
            changed = range(len(WORKERS)) if wrong == "all" else [wrong]
            amounts = {i: BUDGET if wrong == "all" else payout.leaves[i].amount + 1 for i in changed}
            payout = with_leaves(payout, {i: payout.leaves[i]._replace(amount=amounts[i]) for i in changed})
        arguments = (payout.run.id, *payout.posting(), "")
        if self.attempt("post", *arguments, by=self.game.poster, moves=STAKE * BOND):
            self.posted[run], self.stakes[run] = payout, STAKE * BOND

    @rule(run=RUN, index=INDEX, by_poster=st.booleans())
    def challenge(self, run, index, by_poster):
        by = self.game.poster if by_poster else self.game.challenger
        if self.attempt("challenge", self.right[run].run.id, self.round[run], index, by=by, moves=BOND):
            self.open[run][self.round[run], index] = True

    @rule(run=RUN, index=INDEX)
    def answer(self, run, index):
        if self.posted[run] and self.attempt("answer", *self.posted[run].evidence(index), by=self.game.poster):
            assert self.open[run].pop((self.round[run], index))
            assert self.posted[run].leaves[index].amount == self.right[run].leaves[index].amount
            self.stakes[run] += BOND // 2

    @rule(run=RUN, index=INDEX)
    def convict(self, run, index):
        reward = self.stakes[run] // 2 + BOND
        if self.attempt("convict", self.right[run].run.id, index, by=self.game.stranger, moves=-reward):
            assert self.open[run].pop((self.round[run], index))
            self.round[run], self.stakes[run], self.posted[run] = self.round[run] + 1, 0, None

    @rule(run=RUN, index=INDEX)
    def claim(self, run, index):
        if payout := self.posted[run]:
            amount = payout.leaves[index].amount
            if self.attempt("claim", *payout.claim(index), by=self.game.stranger, moves=-amount):
                self.paid[run] += amount

    @rule(run=RUN, index=INDEX)
    def claim_from_the_other_run(self, run, index):
        if payout := self.posted[1 - run]:
            id = self.right[run].run.id
            assert not self.attempt("claim", id, *payout.claim(index)[1:], by=self.game.stranger)

    @rule(run=RUN)
    def refund(self, run):
        rest = self.taken[run] - self.paid[run]
        if self.attempt("refund", self.right[run].run.id, by=self.game.stranger, moves=-rest):
            self.paid[run] += rest

    @rule(run=RUN, seat=SEAT)
    def release_evaluator(self, run, seat):
        self.attempt("release_evaluator", self.right[run].run.id, seat, by=self.game.stranger, moves=-BOND)

    @rule(run=RUN)
    def release_poster(self, run):
        if self.attempt("release_poster", self.right[run].run.id, by=self.game.stranger, moves=-self.stakes[run]):
            self.stakes[run] = 0

    @rule(run=RUN)
    def release_challengers(self, run):
        for round, index in list(self.open[run]):
            id = self.right[run].run.id
            if self.attempt("release_challenger", id, round, index, by=self.game.stranger, moves=-BOND):
                del self.open[run][round, index]

    @rule(seconds=st.sampled_from((PERIODS.response, PERIODS.dispute + PERIODS.response, PERIODS.claim)))
    def wait(self, seconds):
        self.game.chain.wait_until(self.game.chain.now + seconds)

    @invariant()
    def the_contract_holds_what_it_owes(self):
        """To the unit what the model says; and that covers what runs, postings and open challenges are still owed."""
        owed = sum(self.taken) - sum(self.paid) + sum(self.stakes) + BOND * sum(map(len, self.open))
        assert self.game.held() == self.balance >= owed

    @invariant()
    def no_run_pays_more_than_it_took(self):
        assert all(paid <= taken for paid, taken in zip(self.paid, self.taken, strict=True))


@pytest.mark.slow
def test_any_order_of_anything():
    few = settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Rewards, settings=few)
