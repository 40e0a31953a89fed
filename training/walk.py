"""Models that walk: each goes from node to node, and whoever it visits trains it; somebody decides who is next.

It is chained training (:mod:`training.protocols.chained`) with the order left open, of many walks side by side: a walk
is a row of one fleet, with a start and batches of its own seed. A walk in the order of ``--protocol chained`` is that
run, to the bit.

Legend: M walks, N nodes, D floats a row, S strata of the validation samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.batches import Visits
from training.build import Job, initial_model
from training.execution import optimizer_of
from training.protocols import local_epoch_steps
from utils.random import derive_seed
from workers.batch import Batch
from workers.engine import Engine
from workers.row_layout import GPU_ALIGNMENT, RowLayout
from workers.worker_vision import Fleet


class WalkingFleet(Fleet):
    """A fleet whose rows are walks: they are augmented as the node's batches are, and a row's bits do not depend on
    which others train beside it. (Batched products of one row round in another way than those of several; so do sums
    over batches that are padded to another width, and updates of the last floats of a chunk, which is why rows are
    aligned.)"""

    batches: Visits

    def batch_width(self, sizes_n: Tensor) -> int:
        """One width for all chunks, where a chunk is several rows."""
        return self.batches.width if self.engine.batched else super().batch_width(sizes_n)

    def batch(self, rows: list[int], ids_NB: Tensor, keys_NB: Tensor | None) -> Batch:
        """Of two rows at least."""
        return super().batch(self._several(rows), ids_NB, keys_NB)

    def train_chunk(self, chunk: list[int], batch: Batch, lr: float | Tensor, losses_R: Tensor) -> None:
        """Two rows at least: a single one is trained twice side by side."""
        super().train_chunk(self._several(chunk), batch, lr, losses_R)

    def measure(self, rows: list[int], ids_v: Tensor) -> dict[str, Tensor]:
        """:meth:`evaluate` of some rows; every chunk has two at least."""
        chunks = 2 * self.engine.threads if self.engine.batched else 1
        padded = rows + rows[:1] * (-len(rows) % chunks)
        values = self.evaluate(self.samples, ids_v, self.rows_RD[padded])
        return {name: value_R[: len(rows)].cpu() for name, value_R in values.items()}

    def _several(self, rows: list[int]) -> list[int]:
        return rows * 2 if self.engine.batched and len(rows) == 1 else rows


class Walks:
    """M models that walk side by side, each a row of a fleet. A walk has ``rounds`` visits at most, which sets the
    learning rate of each. ``hop_M``: visits so far; ``visits_MN``: at each node. ``strata``: the validation samples
    of each class (or stratum) that has any. ``keep_state``: every node keeps its optimizer's state for the walk's next
    visit, instead of handing it on with the model. ``moved_M``: how far the last visit moved each model."""

    def __init__(self, job: Job, count: int, rounds: int, keep_state: bool = False):
        self.job, self.rounds = job, rounds
        self._kept: dict[tuple[int, int], Tensor] | None = {} if keep_state else None
        self.steps_N = local_epoch_steps(job)
        N = len(job.shards)
        batches = Visits(job.shards, job.config.batch_size, [0] * count)
        self.engine = job.engine
        if job.engine.batched:
            layout = RowLayout(job.model, align=GPU_ALIGNMENT)
            self.engine = Engine(job.model, layout, job.engine.name, job.engine.threads, job.engine.autocast)
        self.fleet = WalkingFleet(
            self.engine,
            torch.zeros(self.engine.layout.D, dtype=job.initial_ND.dtype, device=job.initial_ND.device),
            job.samples,
            batches,
            optimizer=optimizer_of(job.config),
            seed=derive_seed(job.config.seed, "augmentation"),
            weights_Mn=job.sample_weights_n[None],
        )
        strata_v = job.dataset.task.strata(job.dataset.targets_n)[job.val_ids]
        self.strata = [job.val_ids[strata_v == s] for s in strata_v.unique()]
        self.metric = job.dataset.task.metric
        self.at_M = torch.zeros(count, dtype=torch.int64)
        self.hop_M = torch.zeros(count, dtype=torch.int64)
        self.visits_MN = torch.zeros(count, N, dtype=torch.int64)
        self.moved_M = torch.zeros(count, dtype=torch.float64)

    def start(self, walks: Sequence[int], seeds: Sequence[int]) -> None:
        """These walks begin anew, each with the start and the batches of a run of its seed."""
        walks = list(walks)
        for m, seed in zip(walks, seeds, strict=True):
            model = initial_model(self.job.config, self.job.dataset.task, self.job.samples.shape, seed)
            self.fleet.rows_RD[m] = self.engine.rows([model], self.fleet.dtype)[0].to(self.fleet.device)
            self.fleet.batches.seed_walk(m, derive_seed(seed, "batches"))
        self.fleet.reset_state(walks)
        self.moved_M[walks] = 0.0
        if self._kept is not None:
            self._kept = {(m, k): state_S for (m, k), state_S in self._kept.items() if m not in walks}
        self.at_M[walks], self.hop_M[walks], self.visits_MN[walks] = 0, 0, 0

    def visit(self, walks: Sequence[int], nodes: Sequence[int]) -> None:
        """Each of these walks goes to a node, which trains it for ``--local_epochs``."""
        walks = torch.as_tensor(list(walks))
        self.at_M[walks] = torch.as_tensor(list(nodes))
        self.fleet.batches.move(self.at_M)
        before_mP = self.fleet.rows_RD[walks, : self.engine.layout.P]
        self._swap_state(walks.tolist(), fetch=True)
        first_M = self.visits_MN.gather(1, self.at_M[:, None])[:, 0] * self.steps_N[self.at_M]
        lr_of = {h: self.job.learning_rate(h, self.rounds) for h in self.hop_M[walks].unique().tolist()}
        for lr in sorted(set(lr_of.values())):
            alike = [m for m in walks.tolist() if lr_of[int(self.hop_M[m])] == lr]
            for s in range(int(self.steps_N[self.at_M[alike]].max())):
                self.fleet.step(first_M + s, lr, [m for m in alike if s < self.steps_N[self.at_M[m]]])
        self._swap_state(walks.tolist(), fetch=False)
        step_mP = self.fleet.rows_RD[walks, : self.engine.layout.P] - before_mP
        self.moved_M[walks] = step_mP.double().norm(dim=1).cpu()
        self.visits_MN[walks, self.at_M[walks]] += 1
        self.hop_M[walks] += 1

    def _swap_state(self, walks: list[int], fetch: bool) -> None:
        """Take up what these walks' optimizers knew at their nodes, or leave there what they know."""
        if self._kept is None:
            return
        for m in walks:
            place, state_S = (m, int(self.at_M[m])), self.fleet.state_RS[m]
            if not fetch:
                self._kept[place] = state_S.clone()
            elif place in self._kept:
                state_S.copy_(self._kept[place])
            else:
                state_S.zero_()

    def tried_from(self, other: Walks, m: int, nodes: Sequence[int]) -> np.ndarray:
        """The validation loss of another's walk ``m`` after each of these nodes has trained it, tried on walks of our
        own."""
        rows = list(range(len(nodes)))
        self.fleet.rows_RD[rows], self.fleet.state_RS[rows] = other.fleet.rows_RD[m], other.fleet.state_RS[m]
        seed = int(other.fleet.batches.seeds_M[m])
        for row in rows:
            self.fleet.batches.seed_walk(row, seed)
        self.hop_M[rows], self.visits_MN[rows], self.at_M[rows] = other.hop_M[m], other.visits_MN[m], other.at_M[m]
        if other._kept is not None:
            self._kept = {(row, k): other._kept[m, k] for row in rows for k in nodes if (m, k) in other._kept}
        self.visit(rows, nodes)
        return self.fleet.measure(rows, self.job.val_ids)["loss"].numpy()

    def measure(self, walks: Sequence[int]) -> list[tuple[float, ...]]:
        """The task's first metric, the loss, and the loss in each stratum of these walks' models, on the validation
        samples."""
        return self._figures(lambda ids_v: self.fleet.measure(list(walks), ids_v))

    def figures_of(self, fleet: Fleet) -> tuple[float, ...]:
        """The same of the model that walks over a chained run's fleet."""
        row_1D = fleet.rows_RD[:1]
        return self._figures(lambda ids_v: fleet.evaluate(self.job.samples, ids_v, row_1D))[0]

    def _figures(self, measure: Callable[[Tensor], dict[str, Tensor]]) -> list[tuple[float, ...]]:
        whole, losses = measure(self.job.val_ids), [measure(ids_v)["loss"] for ids_v in self.strata]
        values_MK = torch.stack([whole[self.metric.name], whole["loss"], *losses], 1)
        return [tuple(values) for values in values_MK.tolist()]
