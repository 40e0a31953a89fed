# pragma version >=0.4.3,<0.5
"""
@title Vault
@license Apache-2.0
@notice Whose money is here: the token, the runs and what is left of their deposits, and the terms that all runs have.
        Part of Rewards.
"""

from ethereum.ercs import IERC20
import proofs

struct Periods:  # seconds
    reveal: uint256
    check: uint256
    post: uint256
    response: uint256  # to answer a challenge
    dispute: uint256
    claim: uint256

struct Run:
    requester: address
    budget: uint256
    paid: uint256  # to workers
    workers: uint256
    depth: uint256  # of its trees
    roster: bytes32  # root over (index, address)
    post_by: uint256
    round: uint256  # postings that were voided before
    closed: bool  # what was left is back at the requester

MAX_BUDGET: constant(uint256) = 2**96
MAX_WAIT: constant(uint256) = 366 * 86400

TOKEN: public(immutable(IERC20))
BOND: public(immutable(uint256))
PERIODS: immutable(Periods)

runs: public(HashMap[bytes32, Run])


@deploy
def __init__(token: address, bond: uint256, terms: Periods):
    assert bond > 0 and bond <= MAX_BUDGET, "bond"
    for period: uint256 in [terms.reveal, terms.check, terms.post, terms.response, terms.claim]:
        assert period > 0 and period <= MAX_WAIT, "period"
    assert terms.dispute <= MAX_WAIT and terms.response <= terms.dispute // (proofs.MAX_DEPTH + 1), "dispute"
    TOKEN = IERC20(token)
    BOND = bond
    PERIODS = terms


@external
@view
def periods() -> Periods:
    return PERIODS


@external
@view
def run_id(requester: address, nonce: uint256, config: bytes32) -> bytes32:
    return self._run_id(requester, nonce, config)


@internal
@pure
def _run_id(requester: address, nonce: uint256, config: bytes32) -> bytes32:
    return keccak256(abi_encode(requester, nonce, config))


@internal
def take(amount: uint256):
    held: uint256 = staticcall TOKEN.balanceOf(self)
    assert extcall TOKEN.transferFrom(msg.sender, self, amount), "token"
    assert staticcall TOKEN.balanceOf(self) == held + amount, "token"  # none that keeps a fee


@internal
def give(receiver: address, amount: uint256):
    assert extcall TOKEN.transfer(receiver, amount), "token"
