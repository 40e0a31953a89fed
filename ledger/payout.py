"""Rewards in numbers: the payout list that follows from evaluators' values, and one run of the whole game on a chain.

The contracts are ledger/contracts/; their README has the rules.

Legend: N workers, E evaluators.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ledger.amounts import FRACTION_BITS, MAX_WORKERS, Split, fixed_point, lower_median, split, weight
from ledger.trees import Tree, hashed, leaves, roster_leaves, value_leaves
from utils.errors import UsageError

if TYPE_CHECKING:
    from web3.contract import Contract

    from ledger.chain import Chain

STAKE = 40  # a posting's stake in bonds, as in Rewards.vy
ZERO = "0x" + 40 * "0"
HOUR, DAY = 3600, 86400


class Leaf(NamedTuple):
    """One worker's leaf of a payout list: ``weights`` and ``amounts`` are sums up to this worker, itself included."""

    account: str
    amount: int
    weights: int
    amounts: int


class Periods(NamedTuple):
    """How long each part of a run takes, in seconds; a dispute lasts at least 18 responses."""

    reveal: int = 6 * HOUR
    check: int = 6 * HOUR
    post: int = DAY
    response: int = 4 * HOUR
    dispute: int = 3 * DAY
    claim: int = 90 * DAY


class Posting(NamedTuple):
    """What was posted, as the contract has it (Rewards.vy)."""

    root: bytes
    total: int
    remainder: int
    last: int
    poster: str
    stake: int
    at: int
    open: int
    void: bool


class Run(NamedTuple):
    """A run on a chain: what the leaves of its payout list are bound to."""

    chain_id: int
    contract: str
    id: bytes
    budget: int


@dataclass(frozen=True)
class Payout:
    """The payout list of a run: whom it owes how much, and the proofs of it.

    values_EN: the fixed-point values of the lists that count, in the order of their seats.
    split: of the budget; a poster who cheats may have posted another one (``Payout.under``).
    """

    run: Run
    accounts: list[str]
    values_EN: list[list[int]]
    split: Split

    @classmethod
    def of(cls, run: Run, accounts: Sequence[str], values_EN: Sequence[Sequence[int]]) -> Payout:
        """The list that follows from the values: the only one that every challenge leaves standing."""
        weights_N = [weight(values) for values in zip(*values_EN, strict=True)]
        return cls(run, list(accounts), [list(values) for values in values_EN], split(run.budget, weights_N))

    @cached_property
    def weights(self) -> list[int]:
        return [weight(values) for values in zip(*self.values_EN, strict=True)]

    @cached_property
    def leaves(self) -> list[Leaf]:
        found, weights, amounts = [], 0, 0
        for account, amount, weight_ in zip(self.accounts, self.split.amounts, self.weights, strict=True):
            weights, amounts = weights + weight_, amounts + amount
            found.append(Leaf(account, amount, weights, amounts))
        return found

    @cached_property
    def tree(self) -> Tree:
        bound = (self.run.chain_id, self.run.contract, self.run.id)
        return Tree(leaves([(*bound, index, *leaf) for index, leaf in enumerate(self.leaves)]))

    @cached_property
    def roster(self) -> Tree:
        return Tree(roster_leaves(self.accounts))

    @cached_property
    def lists(self) -> list[Tree]:
        return [Tree(value_leaves(self.run.id, values_N)) for values_N in self.values_EN]

    def claim(self, index: int) -> tuple[Any, ...]:
        """The arguments of ``claim`` for one worker."""
        return self.run.id, index, self.leaves[index], self.tree.proof(index)

    def evidence(self, index: int) -> tuple[Any, ...]:
        """The arguments of ``answer`` to a challenge of one leaf."""
        before = (self.leaves[index - 1], self.tree.proof(index - 1)) if index else (Leaf(ZERO, 0, 0, 0), [])
        opened = [values_N[index] for values_N in self.values_EN]
        proofs = [tree.proof(index) for tree in self.lists]
        return (*self.claim(index), *before, self.roster.proof(index), opened, proofs)

    def posting(self) -> tuple[Any, ...]:
        """The arguments of ``post`` between the run and the list's CID."""
        return self.tree.root, self.split.total, self.split.remainder, self.split.last

    def to_json(self) -> dict[str, Any]:
        """All of it, for a file that claims are made from; large integers as text."""
        return {
            "chain_id": self.run.chain_id,
            "contract": self.run.contract,
            "run": self.run.id.hex(),
            "budget": str(self.run.budget),
            "accounts": self.accounts,
            "values": [[str(value) for value in values_N] for values_N in self.values_EN],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Payout:
        """The list of ``to_json``; amounts, sums and trees follow from it anew. Raises UsageError for anything else."""
        try:
            run = Run(
                int(record["chain_id"]), str(record["contract"]), bytes.fromhex(record["run"]), int(record["budget"])
            )
            values_EN = [[int(value) for value in values_N] for values_N in record["values"]]
            return cls.of(run, [str(account) for account in record["accounts"]], values_EN)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"this is no payout list: {error!r}.") from None


def run_id(requester: str, nonce: int, config: bytes) -> bytes:
    """The id that a deposit of ``requester`` for the configuration with that digest has, before it is made."""
    return hashed(requester, nonce, config)


def commitment(run: Run, sender: str, root: bytes, salt: bytes) -> bytes:
    """What an evaluator commits to."""
    return hashed(run.chain_id, run.contract, run.id, sender, root, salt)


def no_store(content: bytes) -> str:
    """Keeps nothing; names content by its SHA-256."""
    return hashlib.sha256(content).hexdigest()


def deploy(
    chain: Chain, owner: str, bond: int = 10**18, periods: Periods | None = None, supply: int = 10**27
) -> tuple[Contract, Contract, dict[str, int]]:
    """A token whose whole supply is ``owner``'s and the contract of rewards in it, with the gas of both."""
    token, token_made = chain.deploy("VNX", supply, sender=owner)
    rewards, made = chain.deploy("Rewards", token.address, bond, tuple(periods or Periods()), sender=owner)
    return token, rewards, {"deploy VNX": token_made.gas, "deploy Rewards": made.gas}


@dataclass(frozen=True)
class Paid:
    """A run that has been paid out as far as the chain's time has come.

    payout: the list. gas: of each kind of transaction, of the dearest one where there were several.
    claims: the gas of each worker's claim; None for one that has none, or whose turn has not come.
    """

    payout: Payout
    gas: dict[str, int]
    claims: list[int | None]

    def table(self) -> list[dict[str, Any]]:
        """One row a worker: worker, account, value (the median), amount (integer units), gas."""
        medians = [lower_median(values) / 2**FRACTION_BITS for values in zip(*self.payout.values_EN, strict=True)]
        columns = zip(self.payout.accounts, medians, self.payout.split.amounts, self.claims, strict=True)
        return [
            {"worker": worker, "account": account, "value": value, "amount": amount, "gas": gas}
            for worker, (account, value, amount, gas) in enumerate(columns)
        ]


def pay(
    chain: Chain,
    rewards: Contract,
    token: Contract,
    budget: int,
    values: Sequence[float] | Sequence[Sequence[float]],
    accounts: Sequence[str],
    config: bytes,
    nonce: int = 0,
    requester: str | None = None,
    evaluators: Sequence[str] | None = None,
    secret: bytes | None = None,
    put: Callable[[bytes], str] = no_store,
) -> Paid:
    """Plays every part but the workers': deposit, commitments, revealed values, the list posted and its dispute waited
    for.

    values: one evaluator's, [N], or several', [E, N]. accounts: of workers, [N]. config: digest of config.json, 32
    bytes.
    requester, evaluators: accounts that ``chain`` can send from; by default its first, which must own the token's
        supply and the contract, and those after it. One process that plays all parties proves nothing about them.
    secret: 32 bytes that commitments are salted from. Called again with the same arguments it goes on where it was
        killed; a secret that was not kept cannot be revealed by, and the bonds are lost. By default a new one.
    put: stores a list of values, or the payout list, as JSON, and returns its CID.
    Raises UsageError for input that cannot be paid, before anything is sent.
    """
    lists = [values] if isinstance(values[0], int | float) else values
    requester = requester or chain.accounts[0]
    evaluators = list(evaluators or chain.accounts[1 : 1 + len(lists)])
    accounts = [chain.address(account) for account in accounts]
    checked(lists, accounts, evaluators, config)
    seated = sorted(zip(evaluators, lists, strict=True), key=lambda seat: int(seat[0], 16))
    panel, values_EN = [account for account, _ in seated], [fixed_point(values_N) for _, values_N in seated]
    run = Run(chain.chain_id, rewards.address, run_id(requester, nonce, config), budget)
    payout = Payout.of(run, accounts, values_EN)
    periods, bond = Periods(*chain.call(rewards, "periods")), chain.call(rewards, "BOND")
    secret = secret or secrets.token_bytes(32)
    gas: dict[str, int] = {}

    def send(contract: Contract, function: str, *arguments: Any, sender: str = requester) -> None:
        used = chain.send(contract, function, *arguments, sender=sender).gas
        gas[function] = max(used, gas.get(function, 0))

    if chain.call(rewards, "runs", run.id)[0] == ZERO:
        for account in panel:
            if not chain.call(rewards, "is_evaluator", account):
                send(rewards, "set_evaluator", account, True)
        send(token, "approve", rewards.address, budget + (STAKE + len(panel)) * bond)
        commit_by = chain.now + periods.reveal  # as long as revealing takes
        deposit = (nonce, config, payout.roster.root, len(accounts), panel, len(panel) // 2 + 1, commit_by, budget)
        send(rewards, "deposit", *deposit)
    *_, commit_by, _, check_by = chain.call(rewards, "panel", run.id)

    salts = [hashed(secret, run.id, seat) for seat in range(len(panel))]
    for seat, account in enumerate(panel):
        if not any(chain.call(rewards, "values", run.id, seat)[0]):
            if account != requester and chain.call(token, "balanceOf", account) < bond:
                send(token, "transfer", account, bond)
            if account != requester:
                send(token, "approve", rewards.address, bond, sender=account)
            sealed = commitment(run, account, payout.lists[seat].root, salts[seat])
            send(rewards, "commit", run.id, seat, sealed, sender=account)
    chain.wait_until(commit_by)
    for seat, account in enumerate(panel):
        if not any(chain.call(rewards, "values", run.id, seat)[1]):
            cid = put(json.dumps([str(value) for value in values_EN[seat]]).encode())
            send(rewards, "reveal", run.id, seat, payout.lists[seat].root, salts[seat], cid, sender=account)
    chain.wait_until(check_by)
    for seat in range(len(panel)):
        if not chain.call(rewards, "values", run.id, seat)[3]:
            send(rewards, "release_evaluator", run.id, seat)

    posted = Posting(*chain.call(rewards, "postings", run.id, 0))
    if not any(posted.root):
        send(rewards, "post", run.id, *payout.posting(), put(json.dumps(payout.to_json()).encode()))
        posted = Posting(*chain.call(rewards, "postings", run.id, 0))
    chain.wait_until(posted.at + periods.dispute + periods.response)
    if chain.call(rewards, "postings", run.id, 0)[5]:
        send(rewards, "release_poster", run.id)
    if payout.split.total == 0 and not chain.call(rewards, "runs", run.id)[8]:
        send(rewards, "refund", run.id)
    return Paid(payout, gas, [None] * len(accounts))


def checked(
    lists: Sequence[Sequence[float]], accounts: Sequence[str], evaluators: Sequence[str], config: bytes
) -> None:
    """Raises UsageError where a run cannot be put to a chain."""
    if len(config) != 32:
        raise UsageError(f"a digest of {len(config)} bytes: that of config.json has 32.")
    if not 0 < len(accounts) <= MAX_WORKERS:
        raise UsageError(f"{len(accounts):,} workers cannot be paid: from 1 to {MAX_WORKERS:,} can.")
    if any(len(values_N) != len(accounts) for values_N in lists):
        raise UsageError(f"{len(accounts)} addresses for {[len(values_N) for values_N in lists]} values.")
    if not 0 < len(lists) <= 15 or len(set(evaluators)) != len(lists):
        raise UsageError(f"{len(lists)} lists of values from {len(set(evaluators))} evaluators: there are 1 to 15.")
    if ZERO in accounts:
        raise UsageError(f"worker {list(accounts).index(ZERO)} cannot be paid at the address 0.")


def claim(chain: Chain, rewards: Contract, payout: Payout, worker: int, sender: str | None = None) -> int:
    """Claims one worker's amount, for its account whoever sends it; returns the gas.

    Raises Refused where the contract does not pay: too early, too late, paid already, nothing owed.
    """
    return chain.send(rewards, "claim", *payout.claim(worker), sender=sender or chain.accounts[0]).gas


def claim_all(chain: Chain, rewards: Contract, paid: Paid, sender: str | None = None) -> Paid:
    """``paid`` with the claims of all workers that are owed something."""
    amounts = enumerate(paid.payout.split.amounts)
    gas = [claim(chain, rewards, paid.payout, worker, sender) if amount else None for worker, amount in amounts]
    used = {"claim": max(found)} if (found := [cost for cost in gas if cost is not None]) else {}
    return Paid(paid.payout, paid.gas | used, gas)
