"""The section on rewards: what ``python -m ledger`` pays whom, from payout.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.records import read_record
from visualization.ledger import said
from visualization.report.parts import Cell, Table, Text, number
from visualization.report.records import pictures


def paid(folder: Path) -> list[Any]:
    """Who gets what, by which scores; nothing where nothing was paid. Raises UsageError of a damaged record."""
    path = folder / "payout.json"
    if not path.is_file():
        return []
    record = read_record(path, "workers", "evidence", "list")
    budget = int(record["list"]["budget"])
    rows = [
        [Cell(str(row["worker"]), row["worker"]), number(row["value"], "+.4g"),
         Cell(f"{row['amount']:,}", row["amount"]), number(row["amount"] / budget, ".1%"), row["account"]]
        for row in record["workers"]
    ]  # fmt: skip
    head = ["worker", "value", "amount", "of the budget", "account"]
    text = Text(f"A budget of {budget:,} is split by {said(record['evidence'])}.")
    return [text, *pictures(folder, "payout"), Table("What each worker gets", head, rows)]
