"""Random groups of training samples, which the audit and metasmoothness switch off.

Legend: M groups, g samples each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.pruning import Stage1
from utils.random import permutations


def random_groups(train_ids: Tensor, count: int, fraction: float, seed: int) -> Tensor:
    """Sample ids [M, g] of M random groups of ``fraction`` of the training samples."""
    size = max(1, round(fraction * len(train_ids)))
    order_Mn = permutations(torch.full((count,), len(train_ids)), seed, "audit", torch.arange(count)[:, None])
    return train_ids[order_Mn[:, :size]]


def audit_groups(stage1: Stage1) -> Tensor:
    """The groups [M, g] that the flags of an audit ask for."""
    config = stage1.config
    return random_groups(stage1.job.train_ids, config.audit_groups, config.audit_fraction, config.audit_seed)
