# pragma version >=0.4.3,<0.5
"""
@title Rewards
@license Apache-2.0
@notice Pays the workers of a training run by the value of their updates. A requester deposits a budget; a panel of
        evaluators commits to lists of values and reveals them; anyone posts the payout list that follows from them, and
        anyone can have one leaf of it proved on chain; then each worker claims its amount.

        deposit -> commit | reveal | check (strike) | post | dispute (challenge, answer, convict) | claim | refund

        Nothing loops over workers; loops over the panel have at most 15 turns. No function gives anybody, the owner
        included, a deposit that the rules do not give it. A bond that is lost stays here for good: nobody gains by it,
        except half of a dispute's, which goes to the winner. README.md beside this file has the rules, who can harm
        whom, and what is proved.
"""

import panels
import proofs
import vault

initializes: panels
initializes: vault
exports: (panels.__interface__, vault.__interface__)

struct Posting:
    root: bytes32
    total: uint256  # sum of weights
    remainder: uint256  # the smallest that is rounded up,
    last: uint256  # and the last worker with it that is
    poster: address
    stake: uint256
    at: uint256
    open: uint256  # challenges that wait for an answer
    void: bool

struct Challenge:
    challenger: address
    deadline: uint256
    settled: bool

event Deposited:
    run: indexed(bytes32)
    requester: indexed(address)
    config: bytes32
    budget: uint256

event Posted:
    run: indexed(bytes32)
    round: uint256
    root: bytes32
    cid: String[96]

event Challenged:
    run: indexed(bytes32)
    round: uint256
    index: uint256

event Answered:  # with the siblings: who holds the values finds the wrong part of a list that is kept back
    run: indexed(bytes32)
    round: uint256
    index: uint256
    leaf: proofs.Leaf
    proof: DynArray[bytes32, proofs.MAX_DEPTH]

event Convicted:
    run: indexed(bytes32)
    round: uint256
    index: uint256

event Claimed:
    run: indexed(bytes32)
    index: uint256
    account: indexed(address)
    amount: uint256

event Refunded:
    run: indexed(bytes32)
    amount: uint256

STAKE: constant(uint256) = 40  # bonds; half of it is more than the MAX_DEPTH that finding a hidden leaf costs

postings: public(HashMap[bytes32, HashMap[uint256, Posting]])  # run, round
challenges: public(HashMap[bytes32, HashMap[uint256, HashMap[uint256, Challenge]]])  # run, round, index
claimed: HashMap[bytes32, HashMap[uint256, uint256]]  # run, index // 256


@deploy
def __init__(token: address, bond: uint256, periods: vault.Periods):
    """
    @param token An ERC-20 token whose transfers move what they say: deposits and bonds are in it.
    @param bond What evaluators and challengers stake; a poster stakes 40 times as much.
    @param periods In seconds. The dispute is long enough for a challenge at every level of the deepest tree.
    """
    panels.__init__()
    vault.__init__(token, bond, periods)


@external
@nonreentrant
def deposit(
    nonce: uint256,
    config: bytes32,
    roster: bytes32,
    workers: uint256,
    evaluators: DynArray[address, proofs.MAX_PANEL],
    quorum: uint256,
    commit_by: uint256,
    budget: uint256,
) -> bytes32:
    """
    @notice Opens a run whose id nobody else can take, and takes the budget for it.
    @param config Digest of config.json.
    @param roster Root over the workers' addresses: who is paid is settled before anything is evaluated.
    @param evaluators In ascending order; lists of at least `quorum` of them, more than half, have to count.
    @param commit_by When commitments end; the other periods follow.
    @return The run's id.
    """
    run: bytes32 = vault._run_id(msg.sender, nonce, config)
    assert vault.runs[run].requester == empty(address), "run id used"
    assert budget > 0 and budget <= vault.MAX_BUDGET, "budget"
    assert workers > 0 and workers <= 2**proofs.MAX_DEPTH, "workers"
    assert commit_by > block.timestamp and commit_by <= block.timestamp + vault.MAX_WAIT, "commit_by"
    reveal_by: uint256 = commit_by + vault.PERIODS.reveal
    check_by: uint256 = reveal_by + vault.PERIODS.check
    panels.convene(
        run,
        panels.Panel(seats=evaluators, quorum=quorum, commit_by=commit_by, reveal_by=reveal_by, check_by=check_by),
    )
    vault.runs[run] = vault.Run(
        requester=msg.sender,
        budget=budget,
        paid=0,
        workers=workers,
        depth=proofs.depth(workers),
        roster=roster,
        post_by=check_by + vault.PERIODS.post,
        round=0,
        closed=False,
    )
    log Deposited(run=run, requester=msg.sender, config=config, budget=budget)
    vault.take(budget)
    return run


@external
@nonreentrant
def commit(run: bytes32, seat: uint256, commitment: bytes32):
    """
    @notice An evaluator stakes a bond on a list of values that nobody can read yet.
    @param commitment keccak256 of (chain id, this contract, run, sender, root, salt): of no use to another sender.
    """
    panels.commit(run, seat, commitment)
    vault.take(vault.BOND)


@external
@nonreentrant
def release_evaluator(run: bytes32, seat: uint256):
    """
    @notice Gives the bond back to an evaluator that revealed, and that the others have not struck.
    """
    assert block.timestamp >= panels.panels[run].check_by, "early"
    assert seat in panels._counted(run), "lost"
    assert not panels.values[run][seat].released, "released"
    panels.values[run][seat].released = True
    vault.give(panels.panels[run].seats[seat], vault.BOND)


@external
@nonreentrant
def post(run: bytes32, root: bytes32, total: uint256, remainder: uint256, last: uint256, cid: String[96]):
    """
    @notice Anyone posts the payout list that follows from the lists that count, with a stake on every leaf of it.
    @param total Sum of weights; 0: nobody is owed anything.
    @param remainder A share is rounded up where its remainder is larger, or equal and the index at most `last`.
    """
    r: vault.Run = vault.runs[run]
    assert r.requester != empty(address) and not r.closed, "run"
    assert block.timestamp >= panels.panels[run].check_by, "early"
    assert block.timestamp < r.post_by, "late"
    assert self.postings[run][r.round].root == empty(bytes32) and root != empty(bytes32), "posted"
    assert panels._quorate(run), "quorum"
    self.postings[run][r.round] = Posting(
        root=root,
        total=total,
        remainder=remainder,
        last=last,
        poster=msg.sender,
        stake=STAKE * vault.BOND,
        at=block.timestamp,
        open=0,
        void=False,
    )
    log Posted(run=run, round=r.round, root=root, cid=cid)
    vault.take(STAKE * vault.BOND)


@external
@nonreentrant
def challenge(run: bytes32, round: uint256, index: uint256):
    """
    @notice Anyone stakes a bond on that leaf `index` of the list cannot be proved.
    @param round Of the posting that is meant: another one may have come between.
    """
    posting: Posting = self.postings[run][round]
    assert posting.root != empty(bytes32) and not posting.void, "posting"
    assert index < vault.runs[run].workers, "index"
    assert block.timestamp < posting.at + vault.PERIODS.dispute, "late"
    assert self.challenges[run][round][index].challenger == empty(address), "challenged"
    self.challenges[run][round][index] = Challenge(
        challenger=msg.sender, deadline=block.timestamp + vault.PERIODS.response, settled=False
    )
    self.postings[run][round].open += 1
    log Challenged(run=run, round=round, index=index)
    vault.take(vault.BOND)


@external
@nonreentrant
def answer(
    run: bytes32,
    index: uint256,
    leaf: proofs.Leaf,
    proof: DynArray[bytes32, proofs.MAX_DEPTH],
    before: proofs.Leaf,
    before_proof: DynArray[bytes32, proofs.MAX_DEPTH],
    roster_proof: DynArray[bytes32, proofs.MAX_DEPTH],
    opened: DynArray[int256, proofs.MAX_PANEL],
    opened_proofs: DynArray[DynArray[bytes32, proofs.MAX_DEPTH], proofs.MAX_PANEL],
):
    """
    @notice Anyone proves a challenged leaf from the lists that count: whose it is, the median of its values, its amount,
            and that the sums go on from the leaf before it; of the last leaf, that they come to the totals. The challenger's
            bond is lost, half of it to the poster.
    @param before Leaf index - 1; all zero for index 0.
    @param opened The values that the lists have at index, in the order of seats, with their proofs.
    """
    r: vault.Run = vault.runs[run]
    posting: Posting = self.postings[run][r.round]
    dispute: Challenge = self.challenges[run][r.round][index]
    assert dispute.challenger != empty(address) and not dispute.settled, "challenge"
    assert block.timestamp < dispute.deadline, "late"

    proofs.check(posting.root, r.depth, index, proofs.payout_leaf(run, index, leaf), proof)
    proofs.check(r.roster, r.depth, index, proofs.roster_leaf(index, leaf.account), roster_proof)
    if index == 0:
        assert before.weights == 0 and before.amounts == 0, "before"
    else:
        proofs.check(posting.root, r.depth, index - 1, proofs.payout_leaf(run, index - 1, before), before_proof)

    seats: DynArray[uint256, proofs.MAX_PANEL] = panels._counted(run)
    assert len(opened) == len(seats) and len(opened_proofs) == len(seats), "values"
    for k: uint256 in range(len(seats), bound=proofs.MAX_PANEL):
        value_leaf: bytes32 = proofs.value_leaf(run, index, opened[k])
        proofs.check(panels.values[run][seats[k]].root, r.depth, index, value_leaf, opened_proofs[k])
    weight: uint256 = proofs.weight(opened)
    share: uint256 = proofs.share(r.budget, weight, posting.total, posting.remainder, posting.last, index)

    assert leaf.amount == share, "amount"
    assert leaf.weights == before.weights + weight, "weights"
    assert leaf.amounts == before.amounts + share, "amounts"
    if index == r.workers - 1:
        proofs.check_end(index, proof)
        assert leaf.weights == posting.total, "total"
        assert posting.total == 0 or leaf.amounts == r.budget, "total"

    self.challenges[run][r.round][index].settled = True
    self.postings[run][r.round].open -= 1
    self.postings[run][r.round].stake += vault.BOND // 2
    log Answered(run=run, round=r.round, index=index, leaf=leaf, proof=proof)


@external
@nonreentrant
def convict(run: bytes32, index: uint256):
    """
    @notice A challenge that nobody answered in time voids the posting: half of its stake and the challenger's own bond go
            to the challenger, and another list can be posted.
    """
    round: uint256 = vault.runs[run].round
    dispute: Challenge = self.challenges[run][round][index]
    assert dispute.challenger != empty(address) and not dispute.settled, "challenge"
    assert block.timestamp >= dispute.deadline, "early"
    self.challenges[run][round][index].settled = True
    reward: uint256 = self.postings[run][round].stake // 2 + vault.BOND
    self.postings[run][round].stake = 0
    self.postings[run][round].void = True
    vault.runs[run].round = round + 1
    vault.runs[run].post_by = block.timestamp + vault.PERIODS.post
    log Convicted(run=run, round=round, index=index)
    vault.give(dispute.challenger, reward)


@external
@nonreentrant
def release_poster(run: bytes32):
    """
    @notice Gives the stake, and what it won from challengers, back to the poster of a final list.
    """
    round: uint256 = vault.runs[run].round
    assert self._final(run, round), "not final"
    stake: uint256 = self.postings[run][round].stake
    assert stake > 0, "released"
    self.postings[run][round].stake = 0
    vault.give(self.postings[run][round].poster, stake)


@external
@nonreentrant
def release_challenger(run: bytes32, round: uint256, index: uint256):
    """
    @notice Gives the bond back to one whose challenge was open when another one voided the posting.
    """
    dispute: Challenge = self.challenges[run][round][index]
    assert self.postings[run][round].void, "not void"
    assert dispute.challenger != empty(address) and not dispute.settled, "settled"
    self.challenges[run][round][index].settled = True
    vault.give(dispute.challenger, vault.BOND)


@external
@nonreentrant
def claim(run: bytes32, index: uint256, leaf: proofs.Leaf, proof: DynArray[bytes32, proofs.MAX_DEPTH]):
    """
    @notice Pays a leaf of the final list to its account, whoever asks.
    """
    round: uint256 = vault.runs[run].round
    assert not vault.runs[run].closed and self._final(run, round), "not final"
    assert block.timestamp < self._claim_by(run, round), "late"
    assert index < vault.runs[run].workers, "index"
    leaf_hash: bytes32 = proofs.payout_leaf(run, index, leaf)
    proofs.check(self.postings[run][round].root, vault.runs[run].depth, index, leaf_hash, proof)
    assert not self._is_claimed(run, index), "claimed"
    assert leaf.amount > 0, "nothing"
    paid: uint256 = vault.runs[run].paid
    assert leaf.amount <= vault.runs[run].budget - paid, "budget"  # a list that nobody checked takes no other run's
    self.claimed[run][index // 256] |= 1 << (index % 256)
    vault.runs[run].paid = paid + leaf.amount
    log Claimed(run=run, index=index, account=leaf.account, amount=leaf.amount)
    vault.give(leaf.account, leaf.amount)


@external
@nonreentrant
def refund(run: bytes32):
    """
    @notice Gives the requester back what no worker can claim any more: no quorum, no list in time, no positive value, or
            unclaimed at the deadline.
    """
    r: vault.Run = vault.runs[run]
    assert r.requester != empty(address) and not r.closed, "run"
    if self.postings[run][r.round].root != empty(bytes32):
        assert self._final(run, r.round), "not final"
        nothing_owed: bool = self.postings[run][r.round].total == 0
        assert nothing_owed or block.timestamp >= self._claim_by(run, r.round), "early"
    elif block.timestamp < r.post_by:
        assert block.timestamp >= panels.panels[run].check_by, "early"
        assert not panels._quorate(run), "quorum"
    vault.runs[run].closed = True
    log Refunded(run=run, amount=r.budget - r.paid)
    vault.give(r.requester, r.budget - r.paid)


@external
@view
def is_claimed(run: bytes32, index: uint256) -> bool:
    return self._is_claimed(run, index)


@internal
@view
def _is_claimed(run: bytes32, index: uint256) -> bool:
    return self.claimed[run][index // 256] & (1 << (index % 256)) != 0


@internal
@view
def _final(run: bytes32, round: uint256) -> bool:
    if self.postings[run][round].root == empty(bytes32) or self.postings[run][round].open > 0:
        return False
    return block.timestamp >= self.postings[run][round].at + vault.PERIODS.dispute + vault.PERIODS.response


@internal
@view
def _claim_by(run: bytes32, round: uint256) -> uint256:
    at: uint256 = self.postings[run][round].at
    return at + vault.PERIODS.dispute + vault.PERIODS.response + vault.PERIODS.claim
