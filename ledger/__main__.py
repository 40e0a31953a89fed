"""The ledger of a run: who did what, checked by anybody.

    python main.py --ledger audit/run1                                sign what every worker does
    python -m ledger keys --workers 8 --out keys                      a key for each worker
    python -m ledger verify audit/run1                                signatures, chains, roots
    python -m ledger verify audit/run1 --replay sample:5              and five rounds computed again, to the bit
    python -m ledger verify audit/run1 --anchor anchors.txt           and that nothing was cut off
    python -m ledger anchor audit/run1                                chain hashes, to put where nobody can change them
    python -m ledger dispute audit/run1 theirs/run1                   where two ledgers part, and who is convicted
    python -m ledger open audit/run1 --worker 3 --round 7 --keys audit/run1-keys --out opening.json
    python -m ledger judge audit/run1 opening.json                    an accused worker shows one round, and is judged
    python -m ledger pay results/run1 --method cascade --budget 1000000
    python -m ledger demo                                             all of it, on the digits

Exit codes: 0 all is well, 1 something is wrong with the ledger, 2 the command has to be changed.
"""

from __future__ import annotations

from utils.command import STOPPED, begin, ready

if __name__ == "__main__":
    begin()

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: parallel over workers, not inside operators

WRONG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and do. Returns the exit code."""
    from utils.errors import LEDGER, UsageError, check_installed, refusal

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        arguments = _parser().parse_args(argv)
        check_installed(LEDGER, "requirements-ledger.txt", "the ledger")
        ready()
        return arguments.do(arguments)
    except (UsageError, OSError) as error:
        return refusal(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    from utils.parser import Parser

    parser = Parser(prog="python -m ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, do: object, help: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help)
        found.set_defaults(do=do)
        return found

    keys = command("keys", make, "make a key for every worker (a passphrase is read from LEDGER_PASSPHRASE)")
    keys.add_argument("--workers", type=int, required=True, metavar="N", help="how many")
    keys.add_argument("--out", required=True, metavar="FOLDER", help="a new folder for them")
    keys.add_argument("--addresses", nargs="+", metavar="0x...", help="where each wants to be paid; it is signed once")
    check = command("verify", check_ledger, "check a ledger; says the first thing that is wrong")
    check.add_argument("ledger", metavar="LEDGER", help="folder of --ledger")
    check.add_argument("--replay", metavar="WHAT", help="compute rounds again: all, sample:K or one round's number")
    check.add_argument("--anchor", metavar="FILE", help="chain hashes that were put elsewhere while the run went")
    check.add_argument("--keys", metavar="FILE", help="keys.json with the public keys as you know them")
    check.add_argument("--private", metavar="FOLDER", help="private keys of all workers, to check what samples they "
                       "committed to")  # fmt: skip
    anchor = command("anchor", anchors, "print the chain hash of every round")
    anchor.add_argument("ledger", metavar="LEDGER", help="folder of --ledger")
    opened = command("open", show, "what a worker shows of one round, for somebody who does not have its data")
    opened.add_argument("ledger", metavar="LEDGER", help="folder of --ledger")
    opened.add_argument("--worker", type=int, required=True, metavar="K", help="who is accused")
    opened.add_argument("--round", type=int, required=True, metavar="R", help="of what")
    opened.add_argument("--keys", required=True, metavar="FOLDER", help="its private key, which opens its samples")
    opened.add_argument("--out", required=True, metavar="FILE", help="where the opening is written")
    judged = command("judge", decide, "an opening: is the worker cleared or convicted?")
    judged.add_argument("ledger", metavar="LEDGER", help="folder of --ledger")
    judged.add_argument("opening", metavar="OPENING", help="file of 'open'")
    judged.add_argument("--deadline_passed", action="store_true", help="who has not opened by now is convicted")
    parted = command("dispute", settle, "two ledgers of one run: the first round that differs, and who is convicted")
    parted.add_argument("ledger", metavar="LEDGER", help="yours")
    parted.add_argument("theirs", metavar="THEIRS", help="the other party's")
    paid = command("pay", pay_run, "pay workers by values that were audited, on a chain here or at --rpc")
    paid.add_argument("run", metavar="RUN", help="folder of the run: results/NAME")
    paid.add_argument("--method", default="cascade", metavar="NAME", help="cascade, dice, delete, if, ddval [cascade]")
    paid.add_argument("--budget", type=int, required=True, metavar="N", help="units of the token")
    paid.add_argument("--min_lds", type=float, default=0.3, metavar="X", help="the audit's LDS must be above it [0.3]")
    paid.add_argument("--max_l1", type=float, default=0.2, metavar="X", help="ddval: its error must be below it [0.2]")
    paid.add_argument("--force", action="store_true", help="pay whatever the audit says")
    paid.add_argument("--ledger", metavar="LEDGER", help="the run's ledger (default: as the run says)")
    paid.add_argument("--keys", metavar="FILE", help="keys.json with the workers' public keys as you know them")
    paid.add_argument("--rpc", metavar="URL", help="an Ethereum node (default: a chain in this process, which shows "
                      "what would be paid); private keys of accounts are read from LEDGER_ACCOUNTS")  # fmt: skip
    paid.add_argument("--rewards", metavar="0x...", help="its contract (default: deploy a new one)")
    paid.add_argument("--addresses", nargs="+", metavar="0x...", help="of workers (default: as they signed)")
    paid.add_argument("--nonce", type=int, default=0, metavar="N", help="to pay the same run again [0]")
    claimed = command("claim", claim_one, "claim one worker's amount")
    claimed.add_argument("run", metavar="RUN", help="folder of the run, with payout.json")
    claimed.add_argument("--worker", type=int, required=True, metavar="K", help="whose")
    claimed.add_argument("--rpc", required=True, metavar="URL", help="the node")
    shown = command("demo", demonstrate, "all of it: digits, two workers with wrong labels, a minute")
    shown.add_argument("--results_dir", default="results", metavar="FOLDER", help="folder of all runs [results]")
    shown.add_argument("--overwrite", action="store_true", help="start it anew")
    shown.add_argument("--quiet", action="store_true", help="no progress bars")
    for one in (check, parted, opened, judged):
        one.add_argument("--dataset_path", metavar="FOLDER", help="where the data are here")
        one.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def make(arguments: argparse.Namespace) -> int:
    """``keys``"""
    from ledger.keys import make_keys
    from utils.errors import UsageError

    if not 1 <= arguments.workers <= 100_000:
        raise UsageError(f"--workers {arguments.workers}: it must be from 1 to 100000.")
    make_keys(Path(arguments.out), arguments.workers, os.environ.get("LEDGER_PASSPHRASE"), arguments.addresses)
    print(f"{arguments.workers} private keys and keys.json, which may be told: {arguments.out}")
    return 0


def check_ledger(arguments: argparse.Namespace) -> int:
    """``verify``"""
    from ledger.keys import read_keys, read_public
    from ledger.replay import CannotJudge, Replay, chosen, job_of, shards_fit
    from ledger.verify import Wrong, read_anchors, verify
    from utils.progress import bar

    folder = Path(arguments.ledger)
    anchors = read_anchors(Path(arguments.anchor)) if arguments.anchor else []
    known = read_public(Path(arguments.keys))[0] if arguments.keys else None
    try:
        checked = verify(folder, known, anchors)
        said = [f"{len(checked.rounds)} rounds of {checked.workers} workers: signatures, chains and roots are right"]
        job = job_of(checked, arguments.dataset_path) if arguments.replay or arguments.private else None
        if arguments.private:
            N = range(checked.workers)
            keys = read_keys(Path(arguments.private), N, os.environ.get("LEDGER_PASSPHRASE"))
            shards_fit(checked, job, {k: keys.salt(k) for k in N})
            said.append("every worker committed to the samples of its shard")
        if arguments.replay:
            rounds = chosen(arguments.replay, checked)
            replay = Replay(checked, job)
            with bar(len(rounds), "replay", "round", arguments.quiet) as ticks:
                try:
                    compared = replay.check(rounds, ticks.update)
                except CannotJudge as error:
                    print(error)
                    return WRONG
            said.append(f"{len(rounds)} rounds computed again: {compared} records are so to the bit")
    except Wrong as error:
        print(error)
        return WRONG
    if not checked.ended:
        said.append("no record closes it: the run goes on, or its tail is missing")
    print("; ".join(said))
    return 0


def anchors(arguments: argparse.Namespace) -> int:
    """``anchor``"""
    from ledger.replay import anchors_of

    print("\n".join(anchors_of(Path(arguments.ledger))))
    return 0


def show(arguments: argparse.Namespace) -> int:
    """``open``"""
    from ledger.keys import read_keys
    from ledger.opening import open_round
    from ledger.replay import job_of
    from ledger.verify import Wrong, verify
    from utils.errors import UsageError
    from utils.records import write_json

    try:
        checked = verify(Path(arguments.ledger))
    except Wrong as error:
        print(error)
        return WRONG
    k = arguments.worker
    if not 0 <= k < checked.workers:
        raise UsageError(f"--worker {k}: the run has workers 0 to {checked.workers - 1}.")
    keys = read_keys(Path(arguments.keys), [k], os.environ.get("LEDGER_PASSPHRASE"))
    job = job_of(checked, arguments.dataset_path)
    opening = open_round(checked, job, k, arguments.round, keys)
    write_json(arguments.out, opening)
    print(
        f"{len(opening['samples'])} samples of worker {k} in round {arguments.round}, and their proofs: {arguments.out}"
    )
    return 0


def decide(arguments: argparse.Namespace) -> int:
    """``judge``"""
    from ledger.opening import judge_opening, read_opening
    from ledger.replay import CannotJudge, job_of
    from ledger.verify import Wrong, verify

    if arguments.deadline_passed and not Path(arguments.opening).exists():
        print(f"there is no {arguments.opening}, and the time for it has passed: who was to open it is convicted")
        return WRONG
    opening = read_opening(Path(arguments.opening))
    try:
        checked = verify(Path(arguments.ledger))
        print(judge_opening(checked, job_of(checked, arguments.dataset_path), opening))
    except (CannotJudge, Wrong) as error:
        print(error)
        return WRONG
    return 0


def pay_run(arguments: argparse.Namespace) -> int:
    """``pay``"""
    from ledger import paying
    from ledger.amounts import MAX_BUDGET
    from ledger.audited import METHODS, audited
    from ledger.keys import read_public
    from utils.errors import UsageError, unknown_name
    from visualization.ledger import plot_payout
    from visualization.report import write_report

    if arguments.method not in METHODS:
        raise unknown_name("--method", arguments.method, METHODS)
    if not 0 < arguments.budget <= MAX_BUDGET:
        raise UsageError(f"--budget {arguments.budget}: it must be from 1 to {MAX_BUDGET}.")
    if not 0 <= arguments.nonce < 2**64:
        raise UsageError(f"--nonce {arguments.nonce}: it must be from 0 to 2^64 - 1.")
    folder = Path(arguments.run)
    bounds = {"min_lds": arguments.min_lds, "max_l1": arguments.max_l1, "force": arguments.force}
    known = read_public(Path(arguments.keys))[0] if arguments.keys else None
    ledger = arguments.ledger and Path(arguments.ledger)
    found = audited(folder, arguments.method, **bounds, ledger=ledger, keys=known)
    for doubt in found.doubts:
        print(f"forced, though {doubt}", file=sys.stderr)
    where = {"rpc": arguments.rpc, "rewards": arguments.rewards, "accounts": arguments.addresses}
    record = paying.pay(folder, found, arguments.budget, **where, nonce=arguments.nonce)
    print(paying.table(record))
    print(f"{folder / paying.PAYOUT}, {plot_payout(folder)}"
          + ("; a simulation: nothing was paid (--rpc URL pays)" if arguments.rpc is None else ""))  # fmt: skip
    if (folder / "report.html").is_file():
        print(f"report: {write_report(folder)}")
    return 0


def claim_one(arguments: argparse.Namespace) -> int:
    """``claim``"""
    from ledger.paying import claim

    gas = claim(Path(arguments.run), arguments.worker, arguments.rpc)
    print(f"worker {arguments.worker} has got what it is owed ({gas:,} gas)")
    return 0


def demonstrate(arguments: argparse.Namespace) -> int:
    """``demo``"""
    from ledger.demo import demo

    demo(arguments.results_dir, arguments.overwrite, arguments.quiet)
    return 0


def settle(arguments: argparse.Namespace) -> int:
    """``dispute``"""
    from ledger.dispute import judge, most_comparisons
    from ledger.replay import job_of
    from ledger.verify import Wrong, verify

    try:
        mine, theirs = (verify(Path(folder)) for folder in (arguments.ledger, arguments.theirs))
        found = judge(mine, theirs, job_of(mine, arguments.dataset_path))
    except Wrong as error:
        print(error)
        return WRONG
    if found.round is None:
        print(f"{found.verdict}: {found.why}")
        return 0
    print(f"they differ from round {found.round} on ({found.comparisons} of at most "
          f"{most_comparisons(len(mine.rounds))} comparisons): {found.verdict}: {found.why}")  # fmt: skip
    return WRONG


if __name__ == "__main__":
    sys.exit(main())
