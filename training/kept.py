"""Figures of retrainings, made here or elsewhere, each kept as soon as it is there: a kill costs one fleet."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from training.cluster import completed
from training.pruning import Stage1
from training.recipe import Recipe
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
        self.stage1 = stage1
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

    def missing(self, parts: Sequence[list[int]]) -> list[list[int]]:
        """The parts that have figures which are not there."""
        return [part for part in parts if not self.values.keys() >= set(part)]

    def make(
        self,
        kind: str,
        parts: Sequence[list[int]],
        work: Callable[[list[int]], dict[str, Any]],
        here: Callable[[list[int]], Sequence[float]],
        elsewhere: Callable[[list[int]], object],
    ) -> None:
        """All figures of these parts: by recipes of a ``kind``, of what ``work`` says of a part, where results of them
        are there or ``--cluster`` takes them (then ``elsewhere`` is told); the others ``here``, which is asked for what
        of a part is missing."""
        recipes = [Recipe.of(kind, self.stage1.job, work(part)) for part in parts]
        folder = self.stage1.folder / "jobs" / self.path.stem
        for p, values in completed(self.stage1.config.cluster, recipes, folder):
            self.add(parts[p], [float(value) for value in values])
            elsewhere(parts[p])
        for part in self.missing(parts):
            left = [i for i in part if i not in self.values]
            self.add(left, list(here(left)))
