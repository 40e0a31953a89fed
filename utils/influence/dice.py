"""``dice``: r-hop data influence cascade (Zhu et al., ICLR 2025).

Ground truth (DICE-GT): the sum, over the sample's own node right after its step and over every (node,
arrival time) within r hops, self-loops included, of q_k times the drop in that node's validation loss,
compared with the run in which the sample has weight 0 at step t. Its first-order estimate is the
recursion of ``cascade`` started at t + r, with q_k grad L(x_k^{t+s}) added at every s = r .. 1, plus
the own-node term at s = 0, so momentum and weight decay are part of it. Without them it is the paper's
Theorem 2, which sums over paths; this costs r Hessian-vector products a worker instead. One
difference: the Hessian here is that of the node which the perturbation has reached, at the step it
passes before it is passed on (checked against path enumeration with autograd's Hessians); the paper
prints the index of one node further along the path.

Legend: N workers, P trainable floats, D floats a row, n samples, T local steps, r hops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.errors import UsageError
from utils.influence.method import Method
from utils.influence.recursion import Adjoint, momentum_adjoint, step_back
from utils.influence.targets import objective
from utils.influence.trajectory import Trajectory
from utils.progress import Progress, ignored


def scored_steps(num_steps: int, hops: int, rounds: int) -> list[tuple[int, float]]:
    """Evenly spaced steps, each the middle of the stretch it stands for, the last with ``hops`` steps
    after it; with the number of steps that each stands for."""
    last = num_steps - hops
    if last < 0 or hops < 1:
        raise UsageError(f"--dice_hops {hops} does not fit a run of {num_steps} steps: choose 1 to {num_steps}.")
    rounds = min(rounds, last + 1)
    each = num_steps / rounds
    return [(min(int((c + 0.5) * each), last), each) for c in range(rounds)]


def dice(
    trajectory: Trajectory,
    hops: int = 1,
    rounds: int = 5,
    target: str = "nodes",
    progress: Progress = ignored,
) -> Tensor:
    """Scores [n], float64, summed over ``rounds`` scored steps: lr <v_j, grad loss_i(x_j^t)> times the
    steps that t stands for over n_j. At a scored step every training sample is scored at its own
    worker's parameters, as if it were in that batch."""
    scores_n = torch.zeros(len(trajectory.worker_of_n), dtype=torch.float64)
    for t, stands_for in scored_steps(trajectory.num_steps, hops, rounds):
        states = states_from(trajectory, t, hops)
        gradients = [objective(trajectory, rows_ND, target)[1] for rows_ND in states]
        rho_NP = direction(trajectory, t, states, gradients)
        products_n = trajectory.sample_products(states[0], rho_NP).double().cpu()
        scores_n -= products_n * shares(trajectory, stands_for)
        progress(1)
    return scores_n


def shares(trajectory: Trajectory, stands_for: float) -> Tensor:
    """steps / n_j for every sample: a step visits i with probability B / n_j and counts it 1 / B."""
    sizes_N = trajectory.shard_sizes_N.double().cpu()
    worker_n = trajectory.worker_of_n.cpu()
    return torch.where(worker_n >= 0, stands_for / sizes_N[worker_n], 0.0)


def states_from(trajectory: Trajectory, t: int, hops: int) -> list[Tensor]:
    """Rows [N, D] before steps t .. t + hops."""
    return [rows_ND.clone() for _, rows_ND in trajectory.forwards(range(t, t + hops + 1))]


def direction(trajectory: Trajectory, t: int, states: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """rho [N, P]: -lr times the paper's v_j, with momentum's part.

    ``states[s]``, ``gradients[s]``: rows before step t + s, and the gradient [N, D] of what counts of the
    objective there. With all but the last gradient zero this is ``cascade`` stopped at t + r.
    """
    adjoint = Adjoint.of_rows(gradients[-1], trajectory.P)
    for s in range(len(states) - 2, 0, -1):
        adjoint, _ = step_back(trajectory, t + s, states[s], adjoint)
        adjoint.rows_ND += gradients[s]
    _, rho_NP = momentum_adjoint(trajectory, t, adjoint)
    own = trajectory.step(t).lr * (1 + trajectory.momentum * trajectory.nesterov)
    return rho_NP.sub_(gradients[0][:, : trajectory.P], alpha=own)


METHOD = Method(
    lambda run, options, progress: dice(run, options.dice_hops, options.dice_rounds, options.target, progress),
    ("target", "dice_hops", "dice_rounds"),
    lambda run, options: len(scored_steps(run.num_steps, options.dice_hops, options.dice_rounds)),
)
