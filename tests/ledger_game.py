"""A run of rewards for tests: five workers, three evaluators, and everybody else who may interfere.

Legend: N workers, E evaluators.
"""

from __future__ import annotations

import dataclasses
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

if not all(map(find_spec, ("web3", "vyper", "eth_tester", "eth"))):  # importing them raises the recursion limit
    pytest.skip("pip install -r requirements-ledger.txt", allow_module_level=True)

from ledger.chain import MNEMONIC, Chain, Refused  # noqa: E402
from ledger.payout import STAKE, Payout, Periods, Posting, Run, commitment, run_id  # noqa: E402

BOND = 10**18
BUDGET = 1_000_003
SUPPLY = 10**27
PERIODS = Periods(reveal=1000, check=1000, post=1000, response=100, dispute=1800, claim=10_000)
CONFIG = bytes(range(32))
TOKENS = Path(__file__).parent / "contracts"
WORKERS = [f"0x{0xA11CE + worker:040x}" for worker in range(5)]
VALUES_EN = [[7, -3, 5, 0, 11], [6, 4, 5, 0, 10], [90, -4, 5, -1, 10]]  # weights 7, 0, 5, 0, 10


@contextmanager
def refused(reason: str):
    """What is inside must be refused, for this reason."""
    with pytest.raises(Refused) as error:
        yield
    assert error.value.reason == reason


@contextmanager
def anvil():
    """The address of an anvil of its own; skips where none is installed."""
    command = shutil.which("anvil")
    if command is None:
        pytest.skip("no anvil: 'make test-anvil' installs it from npm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--accounts", "24", "--mnemonic", MNEMONIC, "--silent"]
    process = subprocess.Popen([command, *options])
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Game:
    """A chain with both contracts, and who is who on it."""

    def __init__(self, chain: Chain, token: str = "VNX") -> None:
        self.chain = chain
        self.owner, self.requester, self.poster, self.challenger, self.stranger, *rest = chain.accounts
        self.evaluators = sorted(rest[:3], key=lambda account: int(account, 16))
        folder = {} if token == "VNX" else {"folder": TOKENS}
        self.token, _ = chain.deploy(token, SUPPLY, sender=self.owner, **folder)
        self.rewards, _ = chain.deploy("Rewards", self.token.address, BOND, tuple(PERIODS), sender=self.owner)
        for account in (self.requester, self.poster, self.challenger, self.stranger, *self.evaluators):
            chain.send(self.token, "transfer", account, 10**6 * BOND, sender=self.owner)
            chain.send(self.token, "approve", self.rewards.address, 2**256 - 1, sender=account)
        for account in self.evaluators:
            chain.send(self.rewards, "set_evaluator", account, True, sender=self.owner)

    def do(self, function: str, *arguments, by: str):
        return self.chain.send(self.rewards, function, *arguments, sender=by)

    def see(self, function: str, *arguments):
        return self.chain.call(self.rewards, function, *arguments)

    def encoded(self, function: str, *arguments) -> str:
        """The data of a call."""
        return self.rewards.encode_abi(function, self.chain._arguments(arguments))

    def held(self, account: str | None = None) -> int:
        """What an account, or the contract, has of the token."""
        return self.chain.call(self.token, "balanceOf", account or self.rewards.address)

    def payout(self, values_EN=VALUES_EN, accounts=WORKERS, budget=BUDGET, nonce=0, requester=None) -> Payout:
        """The right list of a run."""
        id = run_id(requester or self.requester, nonce, CONFIG)
        return Payout.of(Run(self.chain.chain_id, self.rewards.address, id, budget), accounts, values_EN)

    def deposit(self, payout: Payout, nonce: int = 0, quorum: int = 2, by: str | None = None, **changed) -> int:
        """Returns when commitments end."""
        commit_by = changed.pop("commit_by", self.chain.now + 1000)
        terms = {"budget": payout.run.budget, "panel": self.evaluators, "workers": len(payout.accounts)} | changed
        given = (nonce, CONFIG, payout.roster.root, terms["workers"], terms["panel"], quorum, commit_by)
        self.do("deposit", *given, terms["budget"], by=by or self.requester)
        return commit_by

    def commit(self, payout: Payout, seats=(0, 1, 2)) -> None:
        for seat in seats:
            sealed = commitment(payout.run, self.evaluators[seat], payout.lists[seat].root, bytes([seat]) * 32)
            self.do("commit", payout.run.id, seat, sealed, by=self.evaluators[seat])

    def reveal(self, payout: Payout, seats=(0, 1, 2)) -> None:
        for seat in seats:
            opened = (payout.lists[seat].root, bytes([seat]) * 32, "cid")
            self.do("reveal", payout.run.id, seat, *opened, by=self.evaluators[seat])

    def evaluated(self, payout: Payout, nonce: int = 0, **options) -> Payout:
        """Deposited, committed, revealed, checked: a list can be posted."""
        commit_by = self.deposit(payout, nonce, **options)
        self.commit(payout)
        self.chain.wait_until(commit_by)
        self.reveal(payout)
        self.chain.wait_until(commit_by + PERIODS.reveal + PERIODS.check)
        return payout

    def post(self, payout: Payout, by: str | None = None) -> None:
        self.do("post", payout.run.id, *payout.posting(), "cid", by=by or self.poster)

    def posted(self, payout: Payout) -> Posting:
        """What stands on the chain for the run."""
        return Posting(*self.see("postings", payout.run.id, self.see("runs", payout.run.id)[7]))

    def final(self, payout: Payout, nonce: int = 0, **options) -> Payout:
        """Posted, and the dispute over."""
        self.evaluated(payout, nonce, **options)
        self.post(payout)
        self.finish(payout)
        return payout

    def finish(self, payout: Payout) -> None:
        self.chain.wait_until(self.posted(payout).at + PERIODS.dispute + PERIODS.response)

    def convicted(self, payout: Payout, index: int, by: str | None = None) -> None:
        """A challenge that nobody answers."""
        by = by or self.challenger
        self.do("challenge", payout.run.id, self.see("runs", payout.run.id)[7], index, by=by)
        self.chain.wait_until(self.chain.now + PERIODS.response)
        self.do("convict", payout.run.id, index, by=by)


def tampered(payout: Payout, **changed) -> Payout:
    """A list that does not follow from the values."""
    return dataclasses.replace(payout, **changed)


def with_leaves(payout: Payout, changes: dict) -> Payout:
    """A list whose leaves were changed by hand: index to leaf."""
    wrong = dataclasses.replace(payout)
    wrong.__dict__["leaves"] = [changes.get(index, leaf) for index, leaf in enumerate(payout.leaves)]
    return wrong


__all__ = [
    "BOND", "BUDGET", "CONFIG", "Game", "PERIODS", "STAKE", "VALUES_EN", "WORKERS", "anvil", "refused", "tampered",
    "with_leaves",
]  # fmt: skip
