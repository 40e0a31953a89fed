"""How often a run is evaluated, and on how many samples each worker: a rule of counts, never of a clock.

Cost is counted in forward passes of one sample; a training step costs three of a batch. (Processor time of evaluating
a sample on the CNN, 3 x 32 x 32: 0.75 to 0.9 of a third of what training on it takes.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.build import Job

LEAST_SAMPLES = 128  # of each worker, an evaluation; all, where there are fewer
LEAST_TIMES = 10  # a run is evaluated, where that costs no more than it may
SHARE = 0.04  # of the training that evaluating and the test may cost together
TEST_SHARE = 0.25  # of that, the test's; but the run's own model sees all of the test set, and each worker its least
SHARE_OF_SHORT_RUNS = 0.5  # where the time is a few seconds points matter more
SHORT = 100_000  # forward passes
SHORT_PRODUCTS = 10**11  # multiplications of forward passes: some five seconds of a core


@dataclass(frozen=True)
class EvaluationPlan:
    """``every``: rounds between evaluations. ``of_workers``: samples on which each worker is evaluated at most, an
    evenly spread part of the validation set (of the test set: ``of_workers_test``). The run's own model always
    sees all samples."""

    every: int
    of_workers: int
    of_workers_test: int


def plan_evaluations(job: Job, rounds: int, workers: int, every: int | None) -> EvaluationPlan:
    """The plan of a run of ``rounds`` rounds whose evaluation measures one model and ``workers`` more (0: they are
    all the same). ``every``: the number of rounds that a user or a protocol asks for.

    Unasked it is an epoch, or a tenth of a shorter run; where that would cost more than its share of the training,
    first workers see fewer samples, then there are fewer evaluations.
    """
    val, test, epochs = len(job.val_ids), len(job.test_samples.targets_n), job.config.epochs
    allowed = allowed_passes(3 * epochs * len(job.train_ids), job.sample_products)
    of_workers_test = _part(TEST_SHARE * allowed - test, workers, test)
    allowed -= min(test + workers * of_workers_test, allowed / 2)
    few = min(val, LEAST_SAMPLES)
    if every is None:
        wanted = min(rounds, max(epochs, LEAST_TIMES))
        affordable = allowed / (val + workers * few)
        every = min(rounds, max(1, math.ceil(rounds / min(wanted, max(1.0, affordable)))))
    times = math.ceil(rounds / every)
    of_workers = _part(allowed / times - val, workers, val)
    return EvaluationPlan(every, of_workers, of_workers_test)


def allowed_passes(training: float, products: int) -> float:
    """Forward passes that evaluating may take beside ``training`` ones in training. ``products``:
    multiplications of one."""
    short = min(SHORT, SHORT_PRODUCTS / max(1, products))
    return max(SHARE * training, min(SHARE_OF_SHORT_RUNS * training, short))


def evenly_spread(ids_n: Tensor, most: int) -> Tensor:
    """At most this number of the ids, as evenly spread as can be."""
    count = min(most, len(ids_n))
    return ids_n[torch.arange(count) * len(ids_n) // count]


def _part(allowed: float, workers: int, samples: int) -> int:
    """On how many of the ``samples`` each worker is evaluated."""
    if workers == 0:
        return samples
    return int(min(samples, max(LEAST_SAMPLES, allowed / workers)))
