"""What readers of data sets are asked, and what they give.

Legend: n train samples, m test samples, G owners.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data.task import Task


@dataclass(frozen=True)
class ReadOptions:
    """What a reader may be asked for. ``image_size``: pixels a side. ``download``: fetch what is missing. ``history``
    and ``horizon``: steps of a time series that a sample shows, and that are to be predicted. ``seconds``: the
    longest sound."""

    image_size: int | None = None
    download: bool = False
    progress: bool = True
    history: int = 14
    horizon: int = 3
    seconds: float = 3.0


@dataclass(frozen=True, eq=False)
class Owners:
    """Who owns each train sample (a station, a speaker, an institution). ``positions_GX``: where owners are, in any
    unit, so that straight distances say who is near; ``test_owner_m``: who owns each test sample (None: nobody
    knows)."""

    owner_n: Tensor  # int64, from 0
    names: tuple[str, ...]  # G
    positions_GX: Tensor | None = None  # float64
    test_owner_m: Tensor | None = None  # int64


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set as a reader gives it. A train sample's id is its row in ``inputs_n``: the same for every seed, machine
    and file system."""

    inputs_n: Tensor  # pictures, uint8 [n, C, H, W]; or sequences, float32 [n, T, F], NaN where nothing is known
    targets_n: Tensor  # as the task has them
    test_inputs_m: Tensor
    test_targets_m: Tensor
    task: Task
    skipped: tuple[str, ...] = ()  # what the reader found and left out, in words
    sources: tuple[str, ...] = ()  # [n] where each train sample lies: its file, or its number in the original files
    owners: Owners | None = None
    order_n: Tensor | None = None  # int64: when each train sample was, where validation has to come later than training
    gap: int = 0  # samples closer than this in ``order_n`` share data
    notes: tuple[str, ...] = ()  # what else a run should say at its start
    val_n: Tensor | None = None  # bool: train samples that are for validation, where the data set itself says so

    @property
    def pictures(self) -> bool:
        """Whether samples are pictures."""
        return self.inputs_n.dim() == 4

    @property
    def channels(self) -> int:
        """Channels of pictures, features of sequences."""
        return self.inputs_n.shape[1 if self.pictures else 2]
