"""Disputes over payout lists: a wrong one falls, whatever of it is kept back; a right one stands, and who errs pays."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from ledger_game import BOND, BUDGET, PERIODS, STAKE, WORKERS, Game, refused, tampered, with_leaves

from ledger.amounts import Split
from ledger.payout import Payout
from ledger.watch import next_leaf, wrong_leaf


def test_wrong_challenge_loses_its_bond(game):
    payout = game.evaluated(game.payout())
    challenger, poster = game.held(game.challenger), game.held(game.poster)
    game.post(payout)
    for index in (0, 4):
        game.do("challenge", payout.run.id, 0, index, by=game.challenger)
        game.do("answer", *payout.evidence(index), by=game.stranger)  # whoever has the lists
        with refused("challenge"):
            game.do("convict", payout.run.id, index, by=game.challenger)
        with refused("challenged"):
            game.do("challenge", payout.run.id, 0, index, by=game.challenger)
    game.finish(payout)
    game.do("claim", *payout.claim(0), by=game.stranger)
    game.do("release_poster", payout.run.id, by=game.poster)
    assert game.held(game.challenger) == challenger - 2 * BOND
    assert game.held(game.poster) == poster + BOND


def swapped(payout):
    accounts = payout.accounts.copy()
    accounts[0] = payout.accounts[1]
    return tampered(payout, accounts=accounts), 0, "proof"


def wrong_median(payout):
    """Worker 1 gets a share, and everything fits together."""
    return Payout.of(payout.run, WORKERS, [[7, 1, 5, 0, 10]] * 3), 1, "amount"


def wrong_amount(payout):
    amounts = payout.split.amounts.copy()
    amounts[0], amounts[2] = amounts[0] + 1, amounts[2] - 1
    return tampered(payout, split=dataclasses.replace(payout.split, amounts=amounts)), 0, "amount"


def wrong_total(payout):
    """Everyone's share of a smaller total: more than the budget."""
    total = payout.split.total - 1
    amounts = [BUDGET * weight // total for weight in payout.weights]
    return tampered(payout, split=Split(amounts, total, total, 0)), 4, "total"


def wrong_rounding(payout):
    """Nobody is rounded up: a unit stays with the requester."""
    amounts = [BUDGET * weight // payout.split.total for weight in payout.weights]
    return tampered(payout, split=Split(amounts, payout.split.total, payout.split.total, 0)), 4, "total"


def wrong_sum(payout):
    return with_leaves(payout, {2: payout.leaves[2]._replace(amounts=1)}), 2, "amounts"


def nobody_is_owed(payout):
    return tampered(payout, split=Split([0] * 5, 0, 0, 0)), 4, None


@pytest.mark.parametrize(
    "cheat", (swapped, wrong_median, wrong_amount, wrong_total, wrong_rounding, wrong_sum, nobody_is_owed)
)
def test_right_challenge_wins(evaluated, cheat):
    game, payout = evaluated
    challenger, poster = game.held(game.challenger), game.held(game.poster)
    wrong, index, reason = cheat(payout)
    game.post(wrong)
    assert wrong_leaf(payout, game.posted(payout), wrong.tree) == index
    game.do("challenge", payout.run.id, 0, index, by=game.challenger)
    evidence = (
        *wrong.evidence(index)[:-3],
        *payout.evidence(index)[-3:],
    )  # the best there is: true values, true address
    with pytest.raises(ValueError, match="refused") as error:
        game.do("answer", *evidence, by=game.poster)
    assert reason is None or error.value.reason == reason
    with refused("early"):
        game.do("convict", payout.run.id, index, by=game.challenger)
    game.chain.wait_until(game.chain.now + PERIODS.response)
    with refused("late"):
        game.do("answer", *evidence, by=game.poster)
    game.do("convict", payout.run.id, index, by=game.stranger)
    assert game.held(game.challenger) == challenger + STAKE * BOND // 2
    assert game.held(game.poster) == poster - STAKE * BOND


def test_after_a_conviction_the_right_list_takes_its_place(evaluated):
    game, payout = evaluated
    game.post(wrong_amount(payout)[0])
    game.convicted(payout, 0)
    game.post(payout)
    assert wrong_leaf(payout, game.posted(payout), None) is None
    with refused("posting"):
        game.do("challenge", payout.run.id, 0, 1, by=game.challenger)
    game.finish(payout)
    for worker in (0, 2, 4):
        game.do("claim", *payout.claim(worker), by=game.stranger)
    assert [game.held(account) for account in WORKERS] == payout.split.amounts


def test_a_friend_of_the_poster_does_not_shield_a_wrong_leaf(evaluated):
    """It can take the only challenge of the wrong leaf, but then that one convicts, and half the stake is lost."""
    game, payout = evaluated
    poster, friend = game.held(game.poster), game.held(game.stranger)
    game.post(wrong_amount(payout)[0])
    game.do("challenge", payout.run.id, 0, 2, by=game.challenger)  # an honest one besides
    game.convicted(payout, 0, by=game.stranger)
    assert game.held(game.poster) + game.held(game.stranger) == poster + friend - STAKE * BOND // 2
    before = game.held(game.challenger)
    game.do("release_challenger", payout.run.id, 0, 2, by=game.stranger)
    assert game.held(game.challenger) == before + BOND
    for index in (0, 2):
        with refused("settled"):
            game.do("release_challenger", payout.run.id, 0, index, by=game.challenger)
    assert game.held() == BUDGET + (3 + STAKE // 2) * BOND


@pytest.mark.parametrize("place", (0, 1, 6, 10, "beyond"))
def test_wrong_leaf_of_a_list_that_is_kept_back(game, place):
    """Only the root is known, and what the poster's answers show: it is found at a profit."""
    accounts = [f"0x{0xCA11 + worker:040x}" for worker in range(11)]
    payout = game.payout([[5, 3, 0, 9, 1, 4, 8, 2, 7, 6, 10]] * 3, accounts)
    game.evaluated(payout)
    before = game.held(game.challenger)
    if place == "beyond":  # a position that no worker has
        wrong = with_leaves(payout, {})
        wrong.tree.levels[0][13] = 1
        rebuild(wrong.tree)
    else:
        leaf = payout.leaves[place]
        wrong = with_leaves(payout, {place: leaf._replace(amount=leaf.amount + 1)})
    game.post(wrong)
    posted, tries = game.posted(payout), 0
    index = wrong_leaf(payout, posted)
    while index is not None:
        game.do("challenge", payout.run.id, 0, index, by=game.challenger)
        tries += 1
        try:
            events = game.do("answer", *wrong.evidence(index), by=game.poster).events
        except ValueError:
            break
        ((_, answer),) = events
        index = next_leaf(payout, posted, index, answer["proof"])
    assert index == (10 if place == "beyond" else place) and tries <= 5
    game.chain.wait_until(game.chain.now + PERIODS.response)
    game.do("convict", payout.run.id, index, by=game.challenger)
    assert game.held(game.challenger) > before


def rebuild(tree):
    """The levels above changed leaves."""
    tree.levels = type(tree)([bytes(leaf) for leaf in tree.levels[0]]).levels


def test_challenges_end(evaluated):
    game, payout = evaluated
    game.post(payout)
    with refused("index"):
        game.do("challenge", payout.run.id, 0, 5, by=game.challenger)
    with refused("posting"):
        game.do("challenge", payout.run.id, 1, 0, by=game.challenger)
    game.chain.wait_until(game.posted(payout).at + PERIODS.dispute)
    with refused("late"):
        game.do("challenge", payout.run.id, 0, 0, by=game.challenger)


@pytest.mark.parametrize("workers", (1, 2, 5))
def test_the_right_list_answers_every_challenge(game, workers):
    draw = random.Random(workers)
    values_EN = [[draw.randint(-(10**18), 10**19) for _ in range(workers)] for _ in range(3)]
    payout = game.payout(values_EN, [f"0x{0xD0 + worker:040x}" for worker in range(workers)])
    game.evaluated(payout)
    game.post(payout)
    for index in range(workers):
        game.do("challenge", payout.run.id, 0, index, by=game.challenger)
        game.do("answer", *payout.evidence(index), by=game.poster)


@pytest.mark.slow
def test_fifteen_evaluators_and_the_deepest_tree(new_chain):
    """The largest panel over the most workers, 131,072: leaves are challenged, answered and claimed."""
    chain = new_chain()
    game = Game(chain)
    game.evaluators = sorted(chain.accounts[5:20], key=lambda account: int(account, 16))
    for account in game.evaluators[:]:
        chain.send(game.rewards, "set_evaluator", account, True, sender=game.owner)
        chain.send(game.token, "transfer", account, BOND, sender=game.owner)
        chain.send(game.token, "approve", game.rewards.address, BOND, sender=account)
    accounts = [f"0x{0xE0 + worker:040x}" for worker in range(2**17)]
    shared = [index % 1000 for index in range(2**17)]
    payout = game.payout([shared] * 15, accounts, budget=10**24)
    payout.__dict__["lists"] = dataclasses.replace(payout, values_EN=[shared]).lists * 15  # one tree, not fifteen
    commit_by = game.deposit(payout, quorum=8)
    game.commit(payout, range(15))
    chain.wait_until(commit_by)
    game.reveal(payout, range(15))
    chain.wait_until(commit_by + PERIODS.reveal + PERIODS.check)
    game.post(payout)
    for index in (1, 2**17 - 1):
        game.do("challenge", payout.run.id, 0, index, by=game.challenger)
        game.do("answer", *payout.evidence(index), by=game.poster)
    game.finish(payout)
    game.do("claim", *payout.claim(2**17 - 1), by=game.stranger)
    assert game.held(accounts[-1]) == payout.split.amounts[-1] > 0


def test_medians_of_every_order(game):
    """The contract's sort is the off-chain one, for all orders of distinct and equal values."""
    orders = list(itertools.permutations((3, -1, 8))) + [(2, 2, 9), (9, 2, 2), (2, 9, 2), (5, 5, 5)]
    payout = game.payout([list(column) for column in zip(*orders, strict=True)], [f"0x{i + 1:040x}" for i in range(10)])
    assert payout.weights == [3] * 6 + [2] * 3 + [5]
    game.evaluated(payout)
    game.post(payout)
    for index in range(10):
        game.do("challenge", payout.run.id, 0, index, by=game.challenger)
        game.do("answer", *payout.evidence(index), by=game.poster)
