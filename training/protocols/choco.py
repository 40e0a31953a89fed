"""CHOCO-SGD: gossip with compressed differences (Koloskova et al., ICML 2019, arXiv 1902.00340; deep networks: ICLR
2020, arXiv 1907.09356, Algorithm 1).

    X' = X - lr G;   H+ = H + Q(X' - H);   X+ = X' + gamma (W - I) H+;   H = X at the start

H is what the neighbours know of a worker; only Q of a difference crosses a link, and what Q leaves out stays in the
difference. (Every worker also holds the sum of its neighbours' H, which costs no message; here they are read where they
are.) The start is known to everybody, so H begins there. Q works on a worker's whole model; the statistics of BatchNorm
are averaged as they are.

How Q is chosen: :mod:`workers.compression`. ``--compression none`` with ``--consensus_step 1`` is gossip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scipy import sparse

from training.protocols.gossip import Gossip, check_doubly_stochastic
from utils.errors import UsageError
from utils.linear import Line, Lines, Nonlinear
from workers.compression import Compressor

if TYPE_CHECKING:
    from torch import Tensor

    from training.build import Job
    from utils.args import Config
    from workers.worker_vision import Fleet


def compressor_of(job: Job) -> Compressor:
    """Q, of this run."""
    config = job.config
    return Compressor(config.compression, config.compression_share, config.compression_bits, config.seed)


class Choco(Gossip):
    """Gossip by compressed differences."""

    further_rows = 4

    def check(self, job: Job) -> None:
        """Neighbours add up what they were told, so they must stay the same."""
        if job.topology.period > 1:
            raise UsageError(
                f"--protocol choco needs neighbours that stay the same: those of --mode {job.config.mode} change from "
                "round to round."
            )
        check_doubly_stochastic(job)

    def message_bytes(self, job: Job) -> int:
        """A compressed difference, and the statistics of BatchNorm."""
        layout, width = job.engine.layout, job.samples.dtype.itemsize
        return compressor_of(job).message_bytes(layout.num_parameters, width) + (
            job.virtual_time.row_bytes - job.parameter_bytes
        )

    def states(self, fleet: Fleet, job: Job) -> dict[str, Tensor]:
        """H."""
        return {"known": fleet.rows_RD[:, : fleet.layout.P].clone()}

    def after(self, job: Job, r: int, W: sparse.csr_array, lr: float) -> Lines:
        """The end of a round."""
        gamma, compressor = job.config.consensus_step, compressor_of(job)
        compressed: Lines = ()
        if compressor.kind != "none":
            compressed = (Nonlinear("change", lambda fleet, change: compressor(fleet, change, r)),)
        return (
            Line("change", rows=1, known=-1),
            *compressed,
            Line("known", known=1, change=1),
            Line("mixed", known=W),
            Line("rows", rows=1, mixed=gamma, known=-gamma),
        )

    def not_linear(self, config: Config) -> str | None:
        """Of what Q leaves out nothing can be told."""
        if config.compression != "none":
            return f"--compression {config.compression} has no derivative that would predict a change"
        return None
