"""Random groups of training samples, which the audit and metasmoothness switch off.

Legend: M groups, g samples each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.pruning import Stage1
from utils.random import permutations


def audit_groups(stage1: Stage1) -> Tensor:
    """The groups [M, g] that the flags of an audit ask for; each depends on its number alone, not on how many there
    are."""
    config, train_ids = stage1.config, stage1.job.train_ids
    count, size = config.audit_groups, max(1, round(config.audit_fraction * len(train_ids)))
    number_M1 = torch.arange(count)[:, None]
    order_Mn = permutations(torch.full((count,), len(train_ids)), config.audit_seed, "audit", number_M1)
    return train_ids[order_Mn[:, :size]]
