"""What each step of a payout costs in gas, on the embedded chain.

    python -m benchmarks.gas                            8 workers, 1, 3 and 15 evaluators
    python -m benchmarks.gas --workers 8 131072         larger trees: longer proofs

Gas is a count of the EVM's work, the same on every machine; at g gwei, and e dollars an ether, n gas cost n g e 1e-9
dollars. `commit`, `reveal` and `release_evaluator` are paid for by each evaluator, `challenge` and `answer` only in a
dispute, `claim` by or for each worker (17,000 more for the first of each 256 workers, whose word of the bitmap is new).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ledger.chain import Chain
from ledger.payout import Payout, Run, commitment, deploy, run_id
from ledger.trees import Tree, value_leaves
from utils.errors import UsageError, refusal

STEPS = (
    "deploy VNX", "deploy Rewards", "deposit", "commit", "reveal", "release_evaluator", "post", "challenge", "answer",
    "convict", "claim", "release_poster", "refund",
)  # fmt: skip
BUDGET, BOND, SUPPLY = 10**24, 10**18, 2**256 - 1


def measure(workers: int, evaluators: int) -> dict[str, int]:
    """Gas of each step of one run; the dearest where a step is made several times, the cheapest for ``claim``."""
    chain = Chain.embedded(accounts=evaluators + 2)
    owner, poster, *others = chain.accounts
    panel = sorted(others, key=lambda account: int(account, 16))
    token, rewards, gas = deploy(chain, owner, bond=BOND, supply=SUPPLY)

    def send(function: str, *arguments: object, sender: str = owner, pick=max) -> None:
        used = chain.send(rewards, function, *arguments, sender=sender).gas
        gas[function] = pick(used, gas.get(function, used))

    for account in (owner, poster, *panel):
        if account != owner:
            chain.send(token, "transfer", account, 1000 * BOND, sender=owner)
        chain.send(token, "approve", rewards.address, 2**256 - 1, sender=account)
    for account in panel:
        chain.send(rewards, "set_evaluator", account, True, sender=owner)
    periods = chain.call(rewards, "periods")
    accounts = [f"0x{0xACC0 + worker:040x}" for worker in range(workers)]
    values_N = [(worker * 7919) % 1000 for worker in range(workers)]

    for nonce in range(2):  # the first list is convicted and posted again; the second run's goes back unclaimed
        run = Run(chain.chain_id, rewards.address, run_id(owner, nonce, bytes(32)), BUDGET)
        payout = Payout.of(run, accounts, [values_N] * evaluators)
        tree = Tree(value_leaves(run.id, values_N))
        payout.__dict__["lists"] = [tree] * evaluators  # equal lists: one tree
        commit_by = chain.now + periods[0]
        quorum = evaluators // 2 + 1
        send("deposit", nonce, bytes(32), payout.roster.root, workers, panel, quorum, commit_by, BUDGET)
        if nonce:
            chain.wait_until(commit_by + periods[0] + periods[1])
            send("refund", run.id)
            continue
        for seat, account in enumerate(panel):
            send("commit", run.id, seat, commitment(run, account, tree.root, bytes(32)), sender=account)
        chain.wait_until(commit_by)
        for seat, account in enumerate(panel):
            send("reveal", run.id, seat, tree.root, bytes(32), "b" * 59, sender=account)
        chain.wait_until(commit_by + periods[0] + periods[1])
        for seat in range(evaluators):
            send("release_evaluator", run.id, seat)
        send("post", run.id, *payout.posting(), "b" * 59, sender=poster)
        send("challenge", run.id, 0, 1)
        chain.wait_until(chain.now + periods[3])
        send("convict", run.id, 1)
        send("post", run.id, *payout.posting(), "b" * 59, sender=poster)
        for index in (1, workers - 1):
            send("challenge", run.id, 1, index)
            send("answer", *payout.evidence(index), sender=poster)
        chain.wait_until(chain.now + periods[4] + periods[3])
        send("release_poster", run.id)
        for index in range(1, min(workers, 4)):
            send("claim", *payout.claim(index), pick=min)
    return gas


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print a markdown table."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--workers", type=int, nargs="+", default=[8], help="at least 3 [8]")
    own.add_argument("--evaluators", type=int, nargs="+", default=[1, 3, 15], help="1 to 15 [1 3 15]")
    options = own.parse_args(argv)
    try:
        if min(options.workers) < 3 or max(options.workers) > 2**17:
            raise UsageError("--workers: from 3 to 131072")
        if min(options.evaluators) < 1 or max(options.evaluators) > 15:
            raise UsageError("--evaluators: from 1 to 15")
        cases = [(workers, evaluators) for workers in options.workers for evaluators in options.evaluators]
        columns = [measure(*case) for case in cases]
    except UsageError as error:
        return refusal(error)
    heads = [f"{workers:,} workers, {evaluators} evaluators" for workers, evaluators in cases]
    print("| step | " + " | ".join(heads) + " |")
    print("| --- |" + " ---: |" * len(heads))
    for step in STEPS:
        print(f"| `{step}` | " + " | ".join(f"{gas[step]:,}" for gas in columns) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
