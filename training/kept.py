"""Figures of retrainings, each kept as soon as it is there: a kill costs one fleet."""

from __future__ import annotations

import math
import warnings
from typing import Any

from training.pruning import Stage1
from utils.digest import digest_json
from utils.errors import UsageError
from utils.records import read_record, write_json


class Kept:
    """Figures by number, in <what>-<digest>.json with the settings that they depend on: the run and its execution, and
    those given."""

    def __init__(self, stage1: Stage1, what: str, settings: dict[str, Any]):
        self.settings = {
            "run": stage1.job.identity["digest"], "execution": vars(stage1.job.execution), **settings
        }  # fmt: skip
        self.path = stage1.folder / f"{what}-{digest_json(self.settings)[:12]}.json"
        self.values: dict[int, float] = {}
        if self.path.exists():
            try:
                self.values = self._read()
            except UsageError as error:
                warnings.warn(f"{error}; retraining anew", stacklevel=2)

    def _read(self) -> dict[int, float]:
        record = read_record(self.path, "settings", "values", "digest")
        try:
            if record["settings"] == self.settings and digest_json(record["values"]) == record["digest"]:
                return {int(i): float(value) for i, value in record["values"].items()}
        except (TypeError, ValueError, AttributeError):
            pass
        raise UsageError(f"{self.path} is damaged")

    def add(self, indices: list[int], values: list[float]) -> None:
        """Keep the results of a fleet."""
        self.values |= dict(zip(indices, values, strict=True))
        named = {str(i): v if math.isfinite(v) else str(v) for i, v in sorted(self.values.items())}  # JSON knows no NaN
        write_json(self.path, {"settings": self.settings, "values": named, "digest": digest_json(named)})
