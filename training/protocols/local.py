"""Local training: no communication, each worker alone on its shard.

With one worker it is the ordinary baseline: SGD on all the data.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from training.protocols import RoundPlan
from training.protocols.gossip import Gossip

if TYPE_CHECKING:
    from training.build import Job


class Local(Gossip):
    """Gossip's rounds without the gossip."""

    has_edges = False

    def plan(self, job: Job, r: int) -> RoundPlan:
        """Everybody trains."""
        alone = super().plan(job, r)
        seconds = float(job.virtual_time.compute_N(alone.steps_N.numpy()).max())
        return dataclasses.replace(alone, mixing=None, end=None, messages=0, sent_bytes=0, seconds=seconds)
