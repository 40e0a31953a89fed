"""``python -m ledger demo``: eight workers learn the digits, two of them with wrong labels; who is paid what?

Trains with a ledger, computes some of its rounds again, scores every sample by the exact cascade, holds the scores
against real retraining, pays by them on a chain in this process, and everybody claims.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from ledger import paying
from ledger.audited import audited
from ledger.replay import Replay, chosen, job_of
from ledger.verify import verify
from training.audit import audit, report
from training.pruning import open_stage1, run_stage1
from training.run import own_folder
from utils.pruning_args import PruningConfig
from visualization.ledger import plot_payout
from visualization.report import write_report

FLIPPED = {6: 0.3, 7: 0.6}  # worker: share of its labels that are wrong
BUDGET = 1_000_000


def config_of(results_dir: str, overwrite: bool, quiet: bool) -> PruningConfig:
    """The run of the demonstration."""
    folder = Path(results_dir, "ledger-demo")
    return PruningConfig(
        model="mlp", num_workers=8, epochs=12.0, worker_flips=tuple(FLIPPED.get(k, 0.0) for k in range(8)),
        results_dir=results_dir, run_name=folder.name, ledger=str(folder / "ledger"), audit=True,
        methods=("cascade",), audit_groups=32, overwrite=overwrite, resume=not overwrite, quiet=quiet,
    )  # fmt: skip


def demo(results_dir: str, overwrite: bool, quiet: bool) -> dict[str, Any]:
    """All of it; what payout.json holds."""
    config = config_of(results_dir, overwrite, quiet)
    folder = Path(results_dir, config.run_name)
    with own_folder(folder):
        if overwrite:
            shutil.rmtree(config.ledger, ignore_errors=True)
        run_stage1(config)
        checked = verify(Path(config.ledger))
        rounds = chosen("sample:3", checked)
        compared = Replay(checked, job_of(checked)).check(rounds)
        print(f"the ledger holds: {len(checked.rounds)} rounds of {checked.workers} workers; rounds "
              f"{', '.join(map(str, rounds))} computed again: {compared} records, to the bit")  # fmt: skip
        stage1 = open_stage1(dataclasses.replace(config, overwrite=False, resume=True))
        print(report(audit(stage1), folder))
        record = paying.pay(folder, audited(folder, "cascade"), BUDGET)
        shares = {k: share for k, share in enumerate(stage1.job.config.worker_flips) if share}
        print(paying.table(record))
        told = ", ".join(f"worker {k}: {share:.0%}" for k, share in shares.items())
        print(f"wrong labels: {told}; {plot_payout(folder, config.worker_flips)}")
        print(f"report: {write_report(folder)}")
    return record
