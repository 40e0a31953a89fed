"""Rewards on a chain: the rules, and every attack on them that must fail, on each kind of chain."""

from __future__ import annotations

import dataclasses

import pytest
from ledger_game import (
    BOND,
    BUDGET,
    CONFIG,
    PERIODS,
    STAKE,
    VALUES_EN,
    WORKERS,
    refused,
    tampered,
    with_leaves,
)  # fmt: skip

from ledger.amounts import MAX_WEIGHT
from ledger.payout import Leaf, Payout, commitment, run_id
from ledger.trees import root_of


def test_everyone_is_paid_what_the_values_say_and_every_bond_comes_back(game):
    payout, before = game.payout(), game.held(game.poster)
    game.final(payout)
    for index in (0, 2, 4):
        game.do("claim", *payout.claim(index), by=game.stranger)
    assert [game.held(account) for account in WORKERS] == payout.split.amounts
    assert sum(payout.split.amounts) == BUDGET and payout.split.amounts[1] == payout.split.amounts[3] == 0
    with refused("nothing"):
        game.do("claim", *payout.claim(1), by=game.stranger)
    for seat in range(3):
        game.do("release_evaluator", payout.run.id, seat, by=game.stranger)
        with refused("released"):
            game.do("release_evaluator", payout.run.id, seat, by=game.evaluators[seat])
    game.do("release_poster", payout.run.id, by=game.stranger)
    with refused("released"):
        game.do("release_poster", payout.run.id, by=game.poster)
    assert game.held() == 0 and game.held(game.poster) == before


# --- claims


def test_claim_twice(final):
    game, payout = final
    game.do("claim", *payout.claim(0), by=game.stranger)
    for by in (game.stranger, game.owner):
        with refused("claimed"):
            game.do("claim", *payout.claim(0), by=by)
    assert game.held(WORKERS[0]) == payout.split.amounts[0]


def test_claims_of_many_workers_do_not_share_a_bit(game):
    accounts = [f"0x{0xB0B + worker:040x}" for worker in range(300)]
    payout = game.final(game.payout([[worker + 1 for worker in range(300)]] * 3, accounts, budget=10**9))
    for index in (0, 44, 255, 256, 299):
        game.do("claim", *payout.claim(index), by=game.stranger)
        assert game.see("is_claimed", payout.run.id, index) and game.held(accounts[index]) > 0
    assert not game.see("is_claimed", payout.run.id, 1)


def test_claim_for_another(final):
    game, payout = final
    run, index, leaf, proof = payout.claim(0)
    with refused("proof"):
        game.do("claim", run, index, leaf._replace(account=game.stranger), proof, by=game.stranger)
    with refused("proof"):  # another's index
        game.do("claim", run, 2, leaf, proof, by=game.stranger)
    before = game.held(game.stranger)
    game.do("claim", run, index, leaf, proof, by=game.stranger)
    assert game.held(game.stranger) == before and game.held(WORKERS[0]) == leaf.amount


def test_claim_of_another_run(final):
    game, first = final
    second = game.payout(nonce=1)
    game.final(second, nonce=1)
    game.do("claim", *first.claim(0), by=game.stranger)
    with refused("proof"):
        game.do("claim", second.run.id, *first.claim(0)[1:], by=game.stranger)
    for index in (0, 2, 4):  # the other run still owes its workers everything
        game.do("claim", *second.claim(index), by=game.stranger)
    assert game.held(WORKERS[0]) == 2 * first.split.amounts[0]


def test_claim_of_another_contract_or_chain(final):
    game, payout = final
    for run in (payout.run._replace(chain_id=1), payout.run._replace(contract=game.token.address)):
        with refused("proof"):
            game.do("claim", *dataclasses.replace(payout, run=run).claim(0), by=game.stranger)


def test_forged_proof(final):
    game, payout = final
    run, index, leaf, proof = payout.claim(0)
    for forged in (
        [bytes(32), *proof[1:]],
        proof[::-1],
        proof[:-1],
        [*proof, bytes(32)],
        [],
    ):
        with refused("proof"):
            game.do("claim", run, index, leaf, forged, by=game.stranger)
    for greedy in (leaf._replace(amount=leaf.amount + 1), leaf._replace(amount=BUDGET), Leaf(game.stranger, 1, 1, 1)):
        with refused("proof"):
            game.do("claim", run, index, greedy, proof, by=game.stranger)
    with refused("index"):
        game.do("claim", run, 5, leaf, proof, by=game.stranger)


def test_second_preimage_leaf(final):
    """An inner node proves itself with a shorter proof; only a contract that takes any length would pay for that."""
    game, payout = final
    run, index, leaf, proof = payout.claim(4)
    inner = bytes(payout.tree.levels[1][2])
    assert root_of(inner, 2, proof[1:]) == payout.tree.root
    for position in (2, 4):
        with refused("proof"):
            game.do("claim", run, position, leaf, proof[1:], by=game.stranger)
    hashed_once = dataclasses.replace(payout)  # a leaf hashed once, not twice, is another tree's
    assert hashed_once.tree.levels[0][0].tobytes() not in (inner, payout.tree.root)


def test_claim_before_the_window_ends(evaluated):
    game, payout = evaluated
    with refused("not final"):
        game.do("claim", *payout.claim(0), by=game.stranger)
    game.post(payout)
    game.chain.wait_until(game.posted(payout).at + PERIODS.dispute)
    for function, arguments in (("claim", payout.claim(0)), ("release_poster", [payout.run.id])):
        with refused("not final"):
            game.do(function, *arguments, by=game.stranger)
    game.finish(payout)
    game.do("claim", *payout.claim(0), by=game.stranger)


def test_claim_while_a_challenge_is_open(evaluated):
    game, payout = evaluated
    game.post(payout)
    game.do("challenge", payout.run.id, 0, 3, by=game.challenger)
    game.finish(payout)
    with refused("not final"):
        game.do("claim", *payout.claim(0), by=game.stranger)


def test_claim_after_the_deadline_is_the_requesters(final):
    game, payout = final
    before = game.held(game.requester) + BUDGET
    game.do("claim", *payout.claim(0), by=game.stranger)
    with refused("early"):
        game.do("refund", payout.run.id, by=game.requester)
    game.chain.wait_until(game.chain.now + PERIODS.claim)
    with refused("late"):
        game.do("claim", *payout.claim(2), by=game.stranger)
    game.do("refund", payout.run.id, by=game.stranger)
    assert game.held(game.requester) == before - payout.split.amounts[0]
    with refused("run"):
        game.do("refund", payout.run.id, by=game.requester)
    with refused("not final"):
        game.do("claim", *payout.claim(2), by=game.stranger)


# --- tokens


@pytest.mark.parametrize("mode", (2, 4, 8), ids=("returns false", "moves nothing", "keeps a fee"))
def test_deposit_in_a_token_that_lies(hostile, mode):
    hostile.chain.send(hostile.token, "behave", mode, b"", bytes(32), 0, sender=hostile.owner)
    with refused("token"):
        hostile.deposit(hostile.payout())
    assert hostile.see("runs", hostile.payout().run.id)[1] == 0


def test_claim_in_a_token_that_returns_false(hostile):
    payout = hostile.final(hostile.payout())
    hostile.chain.send(hostile.token, "behave", 2, b"", bytes(32), 0, sender=hostile.owner)
    with refused("token"):
        hostile.do("claim", *payout.claim(0), by=hostile.stranger)
    hostile.chain.send(hostile.token, "behave", 1, b"", bytes(32), 0, sender=hostile.owner)
    hostile.do("claim", *payout.claim(0), by=hostile.stranger)  # a failed claim is no claim
    assert hostile.held(WORKERS[0]) == payout.split.amounts[0]


def test_reentrant_token(hostile):
    payout = hostile.final(hostile.payout())
    again = {0: ("claim", *payout.claim(0)), 2: ("refund", payout.run.id), 4: ("release_poster", payout.run.id)}
    for index, call in again.items():
        calldata = hostile.encoded(*call)
        hostile.chain.send(hostile.token, "behave", 16, calldata, payout.run.id, index, sender=hostile.owner)
        hostile.do("claim", *payout.claim(index), by=hostile.stranger)
        assert hostile.chain.call(hostile.token, "seen_claimed")  # effects come before interactions
    attempts, entered = (hostile.chain.call(hostile.token, name) for name in ("attempts", "entered"))
    assert (attempts, entered) == (3, 0)
    assert [hostile.held(account) for account in WORKERS] == payout.split.amounts


# --- sums


def test_overflow(game):
    with refused("budget"):
        game.deposit(game.payout(), budget=2**96 + 1)
    huge = game.payout([[2**255 - 1, -(2**255), 2**112, 2**112 - 1, 1]] * 3, budget=2**90)
    assert huge.weights == [MAX_WEIGHT, 0, MAX_WEIGHT, MAX_WEIGHT - 1, 1]
    game.chain.send(game.token, "transfer", game.requester, 2**89, sender=game.owner)
    huge = game.payout(huge.values_EN, budget=2**89)
    game.evaluated(huge)
    game.post(huge)
    for index in range(5):
        game.do("challenge", huge.run.id, 0, index, by=game.challenger)
        game.do("answer", *huge.evidence(index), by=game.poster)


def test_sums_that_wrap_around(evaluated):
    game, payout = evaluated
    leaves = payout.leaves
    low = 2**256 - payout.weights[0]
    wrong = with_leaves(payout, {0: leaves[0]._replace(weights=low), 1: leaves[1]._replace(weights=low)})
    game.post(wrong)
    game.do("challenge", payout.run.id, 0, 2, by=game.challenger)
    with refused("weights"):
        game.do("answer", *wrong.evidence(2), by=game.poster)


def test_rounding_drain_of_a_list_that_nobody_challenged(evaluated):
    """Two runs; the first one's list owes everyone the whole budget. It is paid once, and not from the second's."""
    game, payout = evaluated
    other = game.payout(nonce=1)
    game.deposit(other, nonce=1)
    greedy = with_leaves(payout, {i: leaf._replace(amount=BUDGET) for i, leaf in enumerate(payout.leaves)})
    game.post(greedy)
    game.finish(payout)
    game.do("claim", *greedy.claim(1), by=game.stranger)
    for index in (0, 2, 3, 4):
        with refused("budget"):
            game.do("claim", *greedy.claim(index), by=game.stranger)
    assert game.see("runs", payout.run.id)[2] == BUDGET and game.see("runs", other.run.id)[1:3] == (BUDGET, 0)


# --- values


def test_copied_commitment(game):
    payout = game.payout()
    commit_by = game.deposit(payout)
    sealed = commitment(payout.run, game.evaluators[0], payout.lists[0].root, bytes(32))
    for seat in (0, 1):
        game.do("commit", payout.run.id, seat, sealed, by=game.evaluators[seat])
    game.chain.wait_until(commit_by)
    opened = (payout.lists[0].root, bytes(32), "cid")
    game.do("reveal", payout.run.id, 0, *opened, by=game.evaluators[0])
    with refused("commitment"):
        game.do("reveal", payout.run.id, 1, *opened, by=game.evaluators[1])
    with refused("seat"):
        game.do("reveal", payout.run.id, 0, *opened, by=game.evaluators[1])


def test_commitment_of_another_run(game):
    payout, other = game.payout(), game.payout(nonce=1)
    game.deposit(payout)
    commit_by = game.deposit(other, nonce=1)
    sealed = commitment(payout.run, game.evaluators[0], payout.lists[0].root, bytes(32))
    game.do("commit", other.run.id, 0, sealed, by=game.evaluators[0])
    game.chain.wait_until(commit_by)
    with refused("commitment"):
        game.do("reveal", other.run.id, 0, payout.lists[0].root, bytes(32), "cid", by=game.evaluators[0])


def test_commitments_are_not_replaced_nor_late(game):
    payout = game.payout()
    commit_by = game.deposit(payout)
    game.commit(payout, seats=[0])
    with refused("committed"):
        game.commit(payout, seats=[0])
    with refused("seat"):
        game.do("commit", payout.run.id, 1, bytes([1]) * 32, by=game.stranger)
    with refused("early"):
        game.reveal(payout, seats=[0])
    game.chain.wait_until(commit_by)
    with refused("late"):
        game.commit(payout, seats=[1])


def test_reveal_that_differs(game):
    payout, other = game.payout(), game.payout(VALUES_EN[::-1])
    commit_by = game.deposit(payout)
    game.commit(payout)
    game.chain.wait_until(commit_by)
    with refused("commitment"):
        game.reveal(other, seats=[0])
    game.reveal(payout, seats=[0])
    with refused("revealed"):
        game.reveal(payout, seats=[0])


def test_late_reveal_loses_the_bond_and_without_a_quorum_the_budget_goes_back(game):
    payout, before = game.payout(), game.held(game.requester)
    commit_by = game.deposit(payout)
    game.commit(payout)
    game.chain.wait_until(commit_by)
    game.reveal(payout, seats=[0])
    game.chain.wait_until(commit_by + PERIODS.reveal)
    with refused("late"):
        game.reveal(payout, seats=[1])
    with refused("early"):
        game.do("refund", payout.run.id, by=game.requester)
    game.chain.wait_until(commit_by + PERIODS.reveal + PERIODS.check)
    with refused("quorum"):
        game.post(payout)
    game.do("refund", payout.run.id, by=game.requester)
    game.do("release_evaluator", payout.run.id, 0, by=game.evaluators[0])
    with refused("lost"):
        game.do("release_evaluator", payout.run.id, 1, by=game.evaluators[1])
    assert game.held(game.requester) == before and game.held() == 2 * BOND
    with refused("run"):
        game.post(payout)


def test_no_list_in_time(evaluated):
    game, payout = evaluated
    before = game.held(game.requester) + BUDGET
    with refused("quorum"):
        game.do("refund", payout.run.id, by=game.requester)
    game.chain.wait_until(game.see("runs", payout.run.id)[6])
    with refused("late"):
        game.post(payout)
    game.do("refund", payout.run.id, by=game.requester)
    assert game.held(game.requester) == before


def test_a_list_that_is_kept_back_is_struck(game):
    payout = game.payout()
    commit_by = game.deposit(payout)
    game.commit(payout)
    game.chain.wait_until(commit_by)
    game.reveal(payout)
    with refused("early"):
        game.do("strike", payout.run.id, 0, 2, by=game.evaluators[0])
    game.chain.wait_until(commit_by + PERIODS.reveal)
    for _ in range(2):  # one vote, however often
        game.do("strike", payout.run.id, 0, 2, by=game.evaluators[0])
    assert game.see("counted", payout.run.id) == [0, 1, 2]
    with refused("seat"):
        game.do("strike", payout.run.id, 1, 2, by=game.stranger)
    game.do("strike", payout.run.id, 1, 2, by=game.evaluators[1])
    assert game.see("counted", payout.run.id) == [0, 1]
    game.chain.wait_until(commit_by + PERIODS.reveal + PERIODS.check)
    with refused("late"):
        game.do("strike", payout.run.id, 0, 1, by=game.evaluators[0])
    with refused("lost"):
        game.do("release_evaluator", payout.run.id, 2, by=game.evaluators[2])
    two = Payout.of(payout.run, WORKERS, VALUES_EN[:2])
    game.post(two)
    game.do("challenge", payout.run.id, 0, 0, by=game.challenger)
    with refused("values"):
        game.do("answer", *two.evidence(0)[:-2], *payout.evidence(0)[-2:], by=game.poster)
    game.do("answer", *two.evidence(0), by=game.poster)


def test_no_positive_value(game):
    payout, before = game.payout([[-1, 0, -5, -7, 0]] * 3), game.held(game.requester)
    game.evaluated(payout)
    game.post(payout)
    for index in (0, 4):
        game.do("challenge", payout.run.id, 0, index, by=game.challenger)
        game.do("answer", *payout.evidence(index), by=game.poster)
    with refused("not final"):
        game.do("refund", payout.run.id, by=game.requester)
    game.finish(payout)
    with refused("nothing"):
        game.do("claim", *payout.claim(0), by=game.stranger)
    game.do("refund", payout.run.id, by=game.stranger)
    assert game.held(game.requester) == before


# --- who may do what


def test_owner_withdraws(game):
    """The owner tries every function on a run of somebody else, in every part of it: no budget moves."""
    payout, owner = game.payout(), game.held(game.owner)
    arguments = {
        "claim": payout.claim(0),
        "refund": [payout.run.id],
        "release_evaluator": [payout.run.id, 0],
        "release_poster": [payout.run.id],
        "release_challenger": [payout.run.id, 0, 0],
        "convict": [payout.run.id, 0],
    }
    commit_by = game.deposit(payout)
    game.commit(payout)
    game.chain.wait_until(commit_by)
    game.reveal(payout)
    for account in game.evaluators:  # the panel stays
        game.do("set_evaluator", account, False, by=game.owner)
    game.do("set_evaluator", game.owner, True, by=game.owner)
    with refused("seat"):
        game.do("strike", payout.run.id, 0, 1, by=game.owner)
    for function, given in arguments.items():
        with pytest.raises(ValueError, match="refused"):
            game.do(function, *given, by=game.owner)
    game.chain.wait_until(commit_by + PERIODS.reveal + PERIODS.check)
    assert game.see("counted", payout.run.id) == [0, 1, 2]
    game.post(payout)
    for function, given in arguments.items():
        if function != "release_evaluator":
            with pytest.raises(ValueError, match="refused"):
                game.do(function, *given, by=game.owner)
    assert game.held() == BUDGET + (3 + STAKE) * BOND and game.held(game.owner) == owner
    with refused("owner"):
        game.do("set_evaluator", game.stranger, True, by=game.requester)


def test_root_replaced(game):
    payout = game.evaluated(game.payout())
    game.post(payout)
    wrong = tampered(payout, accounts=[game.stranger] * 5)
    with refused("posted"):
        game.post(wrong)
    game.finish(payout)
    with refused("late"):
        game.post(wrong)
    assert game.posted(payout).root == payout.tree.root


def test_root_replaced_while_lists_can_be_posted(evaluated):
    """A final list stays even where the time to post, begun anew by a conviction, has not run out."""
    game, payout = evaluated
    game.post(tampered(payout, accounts=[game.stranger] * 5))
    game.convicted(payout, 0)
    game.post(payout)
    with refused("posted"):
        game.post(payout, by=game.stranger)


def test_run_id_squatted(game):
    """Somebody deposits first, with the same nonce and configuration: it is another run."""
    payout = game.payout()
    game.deposit(game.payout(requester=game.stranger), by=game.stranger)
    game.deposit(payout)
    assert game.see("runs", payout.run.id)[0] == game.requester
    assert game.see("run_id", game.requester, 0, CONFIG) == payout.run.id == run_id(game.requester, 0, CONFIG)


def test_run_id_used_twice(game):
    payout = game.payout()
    game.deposit(payout)
    with refused("run id used"):
        game.deposit(payout)
    game.chain.wait_until(game.see("runs", payout.run.id)[6])
    game.do("refund", payout.run.id, by=game.requester)
    with refused("run id used"):  # not after it has ended either
        game.deposit(payout)


def test_deposit_griefing(game):
    payout = game.payout()
    for reason, changed in {
        "budget": {"budget": 0},
        "commit_by": {"commit_by": game.chain.now + 400 * 86400},
        "quorum": {"quorum": 1},
        "panel": {"panel": game.evaluators[::-1]},
        "evaluator": {"panel": sorted([*game.evaluators, game.stranger], key=lambda account: int(account, 16))},
    }.items():
        with refused(reason):
            game.deposit(payout, **({"quorum": 3} | changed))
    with refused("panel"):  # one seat each
        game.deposit(payout, panel=[game.evaluators[0]] * 2)
    for workers in (0, 2**17 + 1):
        with refused("workers"):
            game.deposit(payout, workers=workers)
    with refused("commit_by"):
        game.deposit(payout, commit_by=game.chain.now)
    with refused("allowance"):  # nobody deposits what is not its own
        game.deposit(payout, by=game.owner)
    game.deposit(payout)
    game.chain.send(game.token, "transfer", game.rewards.address, 12345, sender=game.owner)  # a gift confuses nothing
    game.commit(payout)
    assert game.held() == BUDGET + 3 * BOND + 12345
