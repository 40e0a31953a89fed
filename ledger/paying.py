"""From audited values to money: ``python -m ledger pay``, ``claim`` and ``demo``.

Without ``--rpc`` the whole game is played on a chain in this process, which shows what would be paid and costs nothing;
with it on the chain of that node, by accounts that the node signs for or whose private keys are in LEDGER_ACCOUNTS.
What was paid lies in payout.json: the list, its evidence, and all that a claim needs.

Legend: N workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledger.audited import Audited
from ledger.store import Store, cid
from utils.errors import UsageError
from utils.files import read_bytes, replaced
from utils.records import read_record, write_json

if TYPE_CHECKING:
    from web3.contract import Contract

    from ledger.chain import Chain
    from ledger.payout import Paid

ACCOUNTS = "LEDGER_ACCOUNTS"
PAYOUT = "payout.json"
EVALUATORS = 3  # of the chain in this process, who all compute the same: scores are pure functions of the run


def chain_at(rpc: str | None, accounts: int) -> Chain:
    """The chain of a node, or one in this process with so many accounts."""
    from ledger.chain import Chain

    if rpc is None:
        return Chain.embedded(accounts)
    keys = [word for word in re.split(r"[\s,]+", os.environ.get(ACCOUNTS, "")) if word]
    return Chain.connect(rpc, keys)


def contracts(chain: Chain, rewards: str | None) -> tuple[Contract, Contract, dict[str, int]]:
    """Token and rewards, with the gas of what was deployed: new ones, or those at an address."""
    from ledger.payout import deploy

    if rewards is None:
        if not chain.accounts:
            raise UsageError(f"this node signs for no account: put private keys into {ACCOUNTS}.")
        return deploy(chain, chain.accounts[0])
    found = chain.at("Rewards", rewards)
    return chain.at("VNX", chain.call(found, "TOKEN")), found, {}


def pay(
    folder: Path, found: Audited, budget: int, *, rpc: str | None = None, rewards: str | None = None,
    accounts: Sequence[str] | None = None, nonce: int = 0, claims: bool = True,
) -> dict[str, Any]:
    """Pay workers by their audited values; what payout.json holds. Raises :class:`UsageError` where one has no
    address (on the chain in this process each gets one)."""
    from ledger import payout

    N = len(found.values_N)
    chain = chain_at(rpc, 1 + EVALUATORS + N)
    where = list(accounts or found.addresses)
    if rpc is None:
        where = [address or chain.accounts[1 + EVALUATORS + k] for k, address in enumerate(where)]
    missing = [k for k, address in enumerate(where) if address is None]
    if missing:
        raise UsageError(f"worker {missing[0]} has signed no address to be paid at (ledger keys --addresses), and none "
                         "is given (--addresses).")  # fmt: skip
    token, contract, gas = contracts(chain, rewards)
    evaluators = chain.accounts[1 : 1 + (EVALUATORS if rpc is None else 1)] or chain.accounts[:1]
    store = Store(folder / "payout")
    paid = payout.pay(
        chain, contract, token, budget, [found.values_N.tolist()] * len(evaluators), where,
        bytes.fromhex(found.run), nonce, evaluators=evaluators, secret=secret_of(folder, nonce), put=kept_in(store),
    )  # fmt: skip
    if claims:
        paid = payout.claim_all(chain, contract, paid)
    record = record_of(paid, found, gas, rpc)
    write_json(folder / PAYOUT, record)
    return record


def kept_in(store: Store) -> Callable[[bytes], str]:
    """Keeps content in a store; its CID."""
    return lambda content: cid(store.put(content))


def secret_of(folder: Path, nonce: int) -> bytes:
    """What commitments are salted from: kept, for a payment that goes on after a kill."""
    path = folder / f".payout-secret-{nonce}"
    if not path.exists():
        with replaced(path) as temporary:
            temporary.touch(0o600)
            temporary.write_bytes(os.urandom(32))
    return read_bytes(path, "the secret of commitments", limit=32)


def record_of(paid: Paid, found: Audited, gas: dict[str, int], rpc: str | None) -> dict[str, Any]:
    """What payout.json holds: the evidence, whether it was forced and over what doubts, the list, the gas."""
    return {
        "evidence": found.evidence, "forced": bool(found.doubts), "doubts": found.doubts,
        "simulated": rpc is None, "list": paid.payout.to_json(), "workers": paid.table(), "gas": {**gas, **paid.gas},
    }  # fmt: skip


def claim(folder: Path, worker: int, rpc: str) -> int:
    """Claim one worker's amount from payout.json; the gas."""
    from ledger.payout import Payout
    from ledger.payout import claim as claimed

    record = read_record(folder / PAYOUT, "list", "simulated")
    if record["simulated"]:
        raise UsageError(f"{folder / PAYOUT} was paid on a chain in that process, which is gone: pay with --rpc URL.")
    chain = chain_at(rpc, 0)
    owed = Payout.from_json(record["list"])
    if not 0 <= worker < len(owed.accounts):
        raise UsageError(f"--worker {worker}: the list has workers 0 to {len(owed.accounts) - 1}.")
    return claimed(chain, chain.at("Rewards", owed.run.contract), owed, worker)


def table(record: dict[str, Any]) -> str:
    """What is printed: a line a worker."""
    lines = [f"{'worker':>6s}  {'value':>12s}  {'amount':>22s}  {'gas':>9s}  account"]
    for row in record["workers"]:
        gas = "-" if row["gas"] is None else f"{row['gas']:,}"
        lines.append(f"{row['worker']:6d}  {row['value']:12.6f}  {row['amount']:22,}  {gas:>9s}  {row['account']}")
    total = sum(row["amount"] for row in record["workers"])
    lines.append(f"{'sum':>6s}  {'':12s}  {total:22,}")
    return "\n".join(lines)
