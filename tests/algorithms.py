"""Decentralized algorithms as plain loops over workers, in the words of their papers: what the house is held to.

Each takes a :class:`World` and a number of rounds, and returns the workers' parameters. They share the house's batches,
mixing matrices and learning rates, and nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from runs import torch_gradient


class World:
    """What an algorithm needs: gradients of worker k at its step t (weight decay included), mixing weights, rates."""

    def __init__(self, job):
        self.job, self.N, self.c = job, job.config.num_workers, job.config
        self.beta, self.nesterov = job.config.momentum, job.config.optimizer == "nesterov"
        P = job.engine.layout.P
        start = job.initial_ND[:, :P].double()
        self.start = [start[k if len(start) > 1 else 0].clone() for k in range(self.N)]

    def gradient(self, k, x, t, wd=None):
        steps_N = torch.zeros(self.N, dtype=torch.int64)
        steps_N[k] = t
        ids = self.job.batches.ids(steps_N)[k, : int(self.job.batches.sizes_N[k])]
        return torch_gradient(self.job, x, ids) + (self.c.wd if wd is None else wd) * x

    def W(self, r):
        return torch.tensor(self.job.topology.mixing(r).toarray())

    def lr(self, r, rounds):
        return self.job.learning_rate(r, rounds)

    def steps(self, k, x, m, first, count, lr, drift=0.0):
        """Local steps with momentum."""
        for s in range(count):
            g = self.gradient(k, x, first + s) + drift
            m = self.beta * m + g
            x = x - lr * (g + self.beta * m if self.nesterov else m)
        return x, m


def mixed(W, xs):
    return [sum(W[k, l] * xs[l] for l in range(len(xs))) for k in range(len(xs))]


def gossip(w, rounds, total):
    x, m, tau = w.start, [torch.zeros_like(v) for v in w.start], w.c.local_steps
    for r in range(rounds):
        before, lr, W = x, w.lr(r, total), w.W(r)
        x, m = zip(*(w.steps(k, x[k], m[k], r * tau, tau, lr) for k in range(w.N)), strict=True)
        if w.c.order == "cta":
            x = [a - (b - y) for a, b, y in zip(mixed(W, before), before, x, strict=True)]
        else:
            x = mixed(W, x)
    return x


def qg(w, rounds, total):
    x, m, tau, mu = w.start, [torch.zeros_like(v) for v in w.start], w.c.local_steps, w.c.qg_momentum
    for r in range(rounds):
        lr = w.lr(r, total)
        half = [w.steps(k, x[k], m[k], r * tau, tau, lr)[0] for k in range(w.N)]
        new = mixed(w.W(r), half)
        m = [mu * m[k] + (1 - mu) * (x[k] - new[k]) / (lr * tau) for k in range(w.N)]
        x = new
    return x


def d2(w, rounds, total):
    """In the paper's form: 2 X - X_prev - (lr G - lr_prev G_prev)."""
    x, m, previous = w.start, [torch.zeros_like(v) for v in w.start], None
    W = w.W(0)
    if np.linalg.eigvalsh(W.numpy())[0] < -1 / 3 + 1e-9:
        W = (W + torch.eye(w.N)) / 2
    for r in range(rounds):
        lr, m, g = w.lr(r, total), list(m), []
        for k in range(w.N):
            gradient = w.gradient(k, x[k], r)
            m[k] = w.beta * m[k] + gradient
            g.append(gradient + w.beta * m[k] if w.nesterov else m[k])
        if previous is None:
            new = mixed(W, [x[k] - lr * g[k] for k in range(w.N)])
        else:
            x_, g_, lr_ = previous
            new = mixed(W, [2 * x[k] - x_[k] - (lr * g[k] - lr_ * g_[k]) for k in range(w.N)])
        previous, x = (x, g, lr), new
    return x


def tracking(w, rounds, total, watch=None):
    x, m, y, g_ = w.start, [torch.zeros_like(v) for v in w.start], None, None
    for r in range(rounds):
        lr, W, m, g = w.lr(r, total), w.W(r), list(m), []
        for k in range(w.N):
            gradient = w.gradient(k, x[k], r)
            m[k] = w.beta * m[k] + gradient
            g.append(m[k])
        y = g if y is None else [a + b - c for a, b, c in zip(mixed(w.W(r - 1), y), g, g_, strict=True)]
        g_ = g
        x = [a - lr * b for a, b in zip(mixed(W, x), y, strict=True)]
    return x


def choco(w, rounds, total):
    Q = compress(w)
    x, m, known = w.start, [torch.zeros_like(v) for v in w.start], w.start
    tau, gamma = w.c.local_steps, w.c.consensus_step
    for r in range(rounds):
        lr = w.lr(r, total)
        x, m = zip(*(w.steps(k, x[k], m[k], r * tau, tau, lr) for k in range(w.N)), strict=True)
        known = [h + Q(v - h, k, r) for k, (h, v) in enumerate(zip(known, x, strict=True))]
        x = [v + gamma * (a - h) for v, a, h in zip(x, mixed(w.W(r), known), known, strict=True)]
    return x


def compress(w):
    from workers.compression import Compressor

    compressor = Compressor(w.c.compression, w.c.compression_share, w.c.compression_bits, w.c.seed)
    return lambda x, k, r: compressor.row(x, k, r)


def relay(w, rounds, total):
    links = [(i, j) for i in range(w.N) for j in range(w.N) if i != j and w.W(0)[i, j] != 0]
    near = {i: [j for a, j in links if a == i] for i in range(w.N)}
    zero, tau = torch.zeros_like(w.start[0]), w.c.local_steps
    x, m = w.start, [zero] * w.N
    message, count = dict.fromkeys(links, zero), dict.fromkeys(links, 0)
    for r in range(rounds):
        lr = w.lr(r, total)
        x, m = zip(*(w.steps(k, x[k], m[k], r * tau, tau, lr) for k in range(w.N)), strict=True)
        message, count = (
            {(i, j): own[i] + sum(old[k, i] for k in near[i] if k != j) for i, j in links}
            for own, old in ((x, message), ([1] * w.N, count))
        )
        x = [
            (x[i] + sum(message[j, i] for j in near[i]) + (w.N - 1 - sum(count[j, i] for j in near[i])) * x[i]) / w.N
            for i in range(w.N)
        ]
    return x


def pushsum(w, rounds, total):
    x, m, weight = w.start, [torch.zeros_like(v) for v in w.start], [1.0] * w.N
    for r in range(rounds):
        W, lr, m = w.W(r), w.lr(r, total), list(m)
        P = W / W.sum(0, keepdim=True)
        for k in range(w.N):
            g = w.gradient(k, x[k] / weight[k], r)
            m[k] = w.beta * m[k] + g
            x = [*x[:k], x[k] - lr * m[k], *x[k + 1 :]]
        x, weight = mixed(P, x), mixed(P, weight)
    return [v / u for v, u in zip(x, weight, strict=True)]


def diloco(w, rounds, total):
    theta, m, velocity, tau = w.start[0], [torch.zeros_like(v) for v in w.start], 0.0, w.c.local_steps
    for r in range(rounds):
        lr = w.lr(r, total)
        ends, m = zip(*(w.steps(k, theta, m[k], r * tau, tau, lr) for k in range(w.N)), strict=True)
        delta = sum(theta - x for x in ends) / w.N
        velocity = w.c.outer_momentum * velocity + delta
        theta = theta - w.c.outer_lr * (delta + w.c.outer_momentum * velocity)
    return [theta] * w.N


def _sampled(w, r):
    from training.protocols.fedavg import FedAvg

    plan = FedAvg().plan(w.job, r)
    return plan, plan.steps_N.nonzero()[:, 0].tolist()


def fedprox(w, rounds, total):
    theta = w.start[0]
    for r in range(rounds):
        plan, chosen = _sampled(w, r)
        ends = {}
        for k in chosen:
            x, m = theta, torch.zeros_like(theta)
            for s in range(int(plan.steps_N[k])):
                g = w.gradient(k, x, int(plan.first_N[k]) + s) + w.c.prox * (x - theta)
                m = w.beta * m + g
                x = x - w.lr(r, total) * m
            ends[k] = x
        weight = w.job.batches.lengths_N.double()
        theta = sum(weight[k] * ends[k] for k in chosen) / sum(weight[k] for k in chosen)
    return [theta] * w.N


def scaffold(w, rounds, total):
    assert w.beta == 0  # as in the paper
    theta, zero = w.start[0], torch.zeros_like(w.start[0])
    c, own = zero, [zero] * w.N
    for r in range(rounds):
        plan, chosen = _sampled(w, r)
        lr, ends, changes = w.lr(r, total), {}, []
        for k in chosen:
            y, K = theta, int(plan.steps_N[k])
            for s in range(K):
                y = y - lr * (w.gradient(k, y, int(plan.first_N[k]) + s) - own[k] + c)
            ends[k] = y
            changes.append((theta - y) / (K * lr) - c)
        for k, change in zip(chosen, changes, strict=True):
            own[k] = own[k] + change
        weight = w.job.batches.lengths_N.double()
        mean = sum(weight[k] * ends[k] for k in chosen) / sum(weight[k] for k in chosen)
        theta, c = theta + w.c.server_lr * (mean - theta), c + sum(changes) / w.N
    return [theta] * w.N
