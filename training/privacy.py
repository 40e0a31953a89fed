"""How private a run is: what ``--dp_noise`` cannot go with, and the epsilon that its steps come to.

A run is (epsilon, delta)-differentially private for a sample of a worker's shard: whatever anybody concludes from all
rows that this worker ever sends is at most e^epsilon times as likely as without that sample, but for a chance of delta
(Dwork and Roth 2014). The accountant is Opacus's (Renyi differential privacy of the subsampled Gaussian mechanism;
Mironov et al., arXiv 1908.10530). It takes every sample to be drawn into each batch by chance; here batches run through
a shuffled shard, which is the convention of Opacus with ``poisson_sampling=False`` and of most published figures.

Legend: N workers.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.protocols import load_protocol
from utils.args import Config
from utils.errors import UsageError
from workers.private import Privacy
from workers.tuning import splits

if TYPE_CHECKING:
    from training.build import Job


def privacy_of(config: Config) -> Privacy | None:
    """What local steps may show of a sample; None: all of it."""
    return None if config.dp_noise is None else Privacy(config.dp_noise, config.dp_clip)


def check_accountant(config: Config) -> None:
    """Raises :class:`UsageError` where the package that counts epsilon is missing."""
    if not config.dp_noise:
        return
    try:
        import opacus.accountants  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--dp_noise needs the package that counts epsilon: pip install -r requirements-privacy.txt."
        ) from error


def make_private(config: Config, model: nn.Module) -> None:
    """Ready the network for gradients of single samples, in place, where the run is private. Raises
    :class:`UsageError` where that cannot be."""
    if config.dp_noise is None:
        return
    if not splits(model):
        raise UsageError(
            f"--dp_noise: {config.model} has BatchNorm, by which a sample has no gradient of its own and shows in "
            "statistics that are sent without noise: use a network without it, as cnn, mlp, squeezenet or lstm."
        )
    if config.finetune:
        raise UsageError("--finetune trains on, which no epsilon of --dp_noise would count: leave one of them out.")
    if config.ledger:
        raise UsageError("--ledger lets others compute the noise of --dp_noise, so it hides nothing: leave one out.")
    if (config.batch_parts or 1) > 1:
        raise UsageError("--batch_parts cuts batches, and --dp_noise takes them sample by sample: leave it out.")
    for module in model.modules():  # vmap does not know PyTorch's fused recurrent kernels
        if hasattr(module, "fused"):
            module.fused = False


def steps_made(job: Job, rounds: int) -> Tensor:
    """Local steps of each worker in that many rounds [N]."""
    protocol, steps_N = load_protocol(job.config.protocol), torch.zeros(len(job.shards), dtype=torch.int64)
    for r in range(rounds):
        steps_N += protocol.plan(job, r).steps_N
    return steps_N


def spent(job: Job, steps_N: Tensor) -> dict[str, Any]:
    """What summary.json says of a private run after so many local steps of each worker: ``epsilon`` and ``delta`` of
    the ``worker`` whose samples are protected least, and ``worker_epsilon``, ``worker_delta`` of each. Without noise
    nothing is protected: epsilon is None."""
    config = job.config
    found = {"noise": config.dp_noise, "clip": config.dp_clip, "epsilon": None}
    if not config.dp_noise:
        return found
    lengths, sizes = job.batches.lengths_N.tolist(), job.batches.sizes_N.tolist()
    deltas = [config.dp_delta or 1 / (10 * n) for n in lengths]
    each = [
        epsilon(config.dp_noise, size / n, steps, delta)
        for n, size, steps, delta in zip(lengths, sizes, steps_N.tolist(), deltas, strict=True)
    ]
    worst = max(range(len(each)), key=each.__getitem__)
    return found | {
        "epsilon": each[worst], "delta": deltas[worst], "worker": worst, "worker_epsilon": each, "worker_delta": deltas,
    }  # fmt: skip


@cache
def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Of so many steps with noise of that many times the clipping norm, each on a share ``rate`` of the samples: the
    least over the orders that Opacus's ``RDPAccountant`` looks at. Every order gives a bound that holds. They fall to
    the least one and rise again, so a bisection finds it with a tenth of them, which matters where each of hundreds of
    workers has a rate of its own."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    orders = sorted(RDPAccountant.DEFAULT_ALPHAS)

    @cache
    def bound(i: int) -> float:
        rdp = compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders[i : i + 1])
        return float(get_privacy_spent(orders=orders[i : i + 1], rdp=rdp, delta=delta)[0])

    if steps == 0:
        return 0.0
    low, high = 0, len(orders) - 1
    with warnings.catch_warnings():  # that the only order is the largest one
        warnings.simplefilter("ignore")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if bound(middle) <= bound(middle + 1) else (middle + 1, high)
        return bound(low)
