"""Training losses of rounds, read when that makes nobody wait.

Legend: R rows of the fleet.
"""

from __future__ import annotations

import dataclasses

import torch

from training.protocols import Round
from utils.devices import fetch
from utils.errors import UsageError


class WorkerFailed(UsageError):
    """A worker's loss is no longer a number."""


class LateLosses:
    """Mean training losses of rounds. On a GPU each is read a round late: asked for at once, the CPU would wait for
    the end of every round, and the GPU for the CPU after it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._waiting: tuple[Round, torch.cuda.Event] | None = None

    def put(self, event: Round) -> list[float]:
        """The means that can be read now: that of this round, on a GPU that of the one before it."""
        if self._device.type != "cuda":
            return [mean_loss(event)]
        read = self.flush()
        there = {name: fetch(getattr(event, name)) for name in ("train_loss_R", "trained_R")}
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self._device))
        self._waiting = dataclasses.replace(event, **there), arrived
        return read

    def flush(self) -> list[float]:
        """The mean that has not been read yet, if there is one."""
        if self._waiting is None:
            return []
        event, arrived = self._waiting
        self._waiting = None
        arrived.synchronize()
        return [mean_loss(event)]


def mean_loss(event: Round) -> float:
    """The mean training loss of a round over the workers that trained.

    Raises :class:`WorkerFailed` where a worker's loss is not finite.
    """
    failed = (event.trained_R & ~event.train_loss_R.isfinite()).nonzero()[:, 0].tolist()
    if failed:
        raise WorkerFailed(
            f"the training loss of worker {failed[0]} is {event.train_loss_R[failed[0]].item()} in round "
            f"{event.done}: lower --lr, add --warmup_step, or --on_bad_worker isolate."
        )
    if not bool(event.trained_R.any()):
        raise WorkerFailed(f"every worker has been isolated by round {event.done}: lower --lr.")
    return event.train_loss_R[event.trained_R].mean().item()
