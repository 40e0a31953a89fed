"""N workers as the rows of one matrix: local steps, gossip, evaluation.

All float state of worker k is row k of ``rows_RD``; what its optimizer remembers is a row of a second
matrix. A local step runs chunk by chunk on the engine, gossip is one product with the mixing matrix,
and averaging, checkpointing or sending a worker is one operation on a row.

Several replicas of the fleet may train side by side (``replicas`` = M): same batches and mixing,
different sample weights. That is how the audit retrains many times at the price of one process.

Legend: N workers, M replicas, R = M N rows (row = replica * N + worker), P trainable floats,
D floats a row, S floats of an optimizer's state, B batch, n samples of the data set (or workers of
a chunk, as in _nD), C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from data.batches import PADDING, Batches, Samples, augmentation_keys
from utils import devices
from utils.devices import send
from utils.errors import UsageError
from utils.progress import Progress, ignored
from workers.batch import Batch, Gradients, added
from workers.engine import Engine
from workers.evaluation import evaluate_rows
from workers.mixing import mix_replicas, mix_rows, without_workers
from workers.optimizers import SGD, Optimizer, descend, state_size
from workers.private import Privacy
from workers.robust import Byzantine, robust_mix, sent_rows
from workers.step_graph import StepGraph

PLAIN = SGD()
COLUMNS = 1 << 16  # floats of a sum over rows that stay in a CPU's cache


class State(NamedTuple):
    """A fleet's rows [R, D], its optimizers' state [R, S], and a protocol's matrices, by name."""

    rows_RD: Tensor
    state_RS: Tensor
    extra: dict[str, Tensor]
    of_round: dict[str, Tensor]


class Fleet:
    """N workers (times M replicas) that train on their own shards and mix rows.

    ``initial_ND``: a row to start from, [D] for a common start or [N, D]. ``weights_Mn``: weight of
    every sample of the data set in each replica (default: one replica, all ones). ``owned``: the workers
    whose rows live here (default: all; :mod:`workers.distributed` gives each process a part). ``privacy``: how much of
    a sample local steps may show (default: all of it; :mod:`workers.private`).
    """

    def __init__(
        self,
        engine: Engine,
        initial_ND: Tensor,
        samples: Samples,
        batches: Batches,
        *,
        optimizer: Optimizer = PLAIN,
        seed: int = 0,
        weights_Mn: Tensor | None = None,
        owned: range | None = None,
        privacy: Privacy | None = None,
    ):
        self.engine, self.layout = engine, engine.layout
        self.privacy = privacy
        self.samples, self.batches = samples, batches
        self.optimizer, self.seed = optimizer, seed
        self.device, self.dtype = initial_ND.device, initial_ND.dtype
        self.num_workers = len(batches.lengths_N)
        if weights_Mn is None:
            weights_Mn = torch.ones(1, len(samples.targets_n))
        self.weights_Mn = weights_Mn.to(self.device, self.dtype)
        self._all_count = bool((self.weights_Mn == 1).all())
        self.replicas = len(weights_Mn)
        self.owned = range(self.num_workers) if owned is None else owned
        self.num_rows = self.replicas * len(self.owned)
        if engine.batched and batches.ragged and self.layout.buffers:
            raise UsageError(
                "the vmap engine cannot train BatchNorm on batches of different sizes; use --engine threads, "
                "or a --batch_size no larger than the smallest shard"
            )
        start_ND = initial_ND.expand(self.num_workers, -1)
        self.rows_RD = start_ND[self.owned.start : self.owned.stop].repeat(self.replicas, 1)
        size = state_size(optimizer, self.layout)
        self.state_RS = torch.zeros(self.num_rows, size, device=self.device, dtype=self.dtype)
        self.extra: dict[str, Tensor] = {}  # further state of a protocol, such as a server's model
        self.of_round: dict[str, Tensor] = {}  # what a protocol keeps for the length of a round (utils.linear)
        self.isolated: set[int] = set()  # workers that nobody hears any more
        self.uncounted: frozenset[int] = frozenset()  # workers that the consensus leaves out from the start
        self.watch: Callable[[], None] | None = None  # told when the local steps of a round have been made
        self._spare_RD = torch.empty(0)
        self._step_graph: StepGraph | None = None

    def rows_of(self, workers: list[int] | None = None) -> list[int]:
        """The rows here of these workers (default: all) in every replica, ascending."""
        if workers is None:
            return list(range(self.num_rows))
        here = [k - self.owned.start for k in workers if k in self.owned]
        return [m * len(self.owned) + i for m in range(self.replicas) for i in here]

    def per_row(self, values_N: Tensor) -> Tensor:
        """A value of each worker as a value of each row here [R]."""
        return send(values_N[self.owned.start : self.owned.stop].repeat(self.replicas), self.device)

    @property
    def row_sizes(self) -> list[int]:
        """Samples in the batch of each row here."""
        return self.per_row(self.batches.sizes_N).tolist()

    def collect(self, values_R: Tensor) -> Tensor:
        """Values of the rows here as values of all rows, wherever they live."""
        return values_R

    @property
    def others(self) -> str:
        """The processes that this one cannot go on without, in words."""
        return "nobody"

    @property
    def part(self) -> tuple[int, int] | None:
        """Which part of how many of a checkpoint this process writes (None: none)."""
        return 0, 1

    def restack(self) -> None:
        """See to it that the rows here are whole: before anybody but :meth:`step` reads them."""

    # ---- local training -------------------------------------------------------------------------

    def schedule(self, steps_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """What worker k trains on at its step ``steps_N[k]``: sample ids [N, B], and the hashes [N, B] that determine
        how each is augmented, and the noise of private steps (None: nothing is random)."""
        ids_NB = self.batches.ids(steps_N)
        if self.samples.augmentation == "none" and self.privacy is None:
            return ids_NB, None
        return ids_NB, augmentation_keys(self.seed, self.batches.workers_N, steps_N, ids_NB.shape[1])

    def batch(self, rows: list[int], ids_NB: Tensor, keys_NB: Tensor | None) -> Batch:
        """The batch of a chunk, as the schedule says."""
        rows_n = torch.tensor(rows)
        workers_n = self.owned.start + rows_n % len(self.owned)
        sizes_n = self.batches.sizes_N[workers_n]
        size = self.batch_width(sizes_n)
        ids_nB = send(ids_NB[workers_n, :size], self.device)
        padded = None
        if self.batches.ragged:
            padded = ids_nB == PADDING
            ids_nB = ids_nB.clamp(min=0)
        keys_nB = None if keys_NB is None else send(keys_NB[workers_n, :size], self.device)
        inputs, targets_nB = self.samples.training(ids_nB, keys_nB)
        if self._all_count:
            weights_nB = torch.ones(ids_nB.shape, dtype=self.dtype, device=self.device)
        else:
            replicas_n = send(rows_n // self.num_workers, self.device)
            weights_nB = self.weights_Mn[replicas_n[:, None], ids_nB]
        if padded is not None:
            weights_nB = weights_nB.masked_fill(padded, 0.0)
        noise_n = None if self.privacy is None else keys_nB[:, 0]
        return Batch(inputs, targets_nB, weights_nB, send(sizes_n.to(self.dtype), self.device), ids_nB, noise_n)

    def batch_width(self, sizes_n: Tensor) -> int:
        """Slots of a batch of a chunk whose workers take so many samples."""
        return int(sizes_n.max())

    def step(self, steps_N: Tensor, lr: float, workers: list[int] | None = None) -> Tensor:
        """One local step of the given workers (default: all), worker k at its own step ``steps_N[k]``, as the optimizer
        (:mod:`workers.optimizers`) makes it.

        Returns the training loss [R] before the step (0 for rows that did not step).
        """
        if workers is not None and len(workers) == self.num_workers:
            workers = None
        rows = self.rows_of(workers)
        schedule = self.schedule(steps_N)
        if self.engine.recorded and workers is None:
            self._step_graph = self._step_graph or StepGraph(self)
            return self._step_graph(self, self.batch(rows, *schedule), lr)
        losses_R = torch.zeros(self.num_rows, device=self.device)
        if self.engine.parts > 1 and 0 < len(rows) < self.engine.threads:
            self._train_in_parts(rows, schedule, lr, losses_R)
            return losses_R

        def run(chunk: list[int]) -> None:
            self.train_chunk(chunk, self.batch(chunk, *schedule), lr, losses_R)

        self.engine.map(run, self.engine.chunks(rows))
        return losses_R

    def train_chunk(self, chunk: list[int], batch: Batch, lr: float | Tensor, losses_R: Tensor) -> None:
        """One local step of the rows of a chunk on their batch; their losses go into ``losses_R``."""
        contiguous = chunk[-1] - chunk[0] + 1 == len(chunk)
        part = slice(chunk[0], chunk[-1] + 1) if contiguous else chunk  # a list would copy
        rows_nD, state_nS = self.rows_RD[part], self.state_RS[part]
        leaves, gradients, loss_n = added([self._gradients(rows_nD, b) for b in batch.cut(self.engine.parts)])
        drift_nP = self.of_round["drift"][part] if "drift" in self.of_round else None
        descend(self.engine, self.optimizer, leaves, gradients, rows_nD, state_nS, lr, drift_nP=drift_nP)
        if not contiguous:
            self.rows_RD[part], self.state_RS[part] = rows_nD, state_nS
        losses_R[part] = loss_n.to(losses_R.dtype)

    def _train_in_parts(
        self, rows: list[int], schedule: tuple[Tensor, Tensor | None], lr: float, losses_R: Tensor
    ) -> None:
        """:meth:`train_chunk` of fewer rows than threads, with the parts of their batches side by side: the same
        parts, added in the same order, so the same bits."""
        batches = self.engine.map(lambda row: self.batch([row], *schedule), rows)
        parts = [b.cut(self.engine.parts) for b in batches]
        rows_1D = [self.rows_RD[row : row + 1] for row in rows]
        tasks = [(row_1D, b) for row_1D, cut in zip(rows_1D, parts, strict=True) for b in cut]
        results = iter(self.engine.map(self._gradients, *zip(*tasks, strict=True)))
        for row, row_1D, cut in zip(rows, rows_1D, parts, strict=True):
            leaves, gradients, loss_1 = added([next(results) for _ in cut])
            part = slice(row, row + 1)
            drift_1P = self.of_round["drift"][part] if "drift" in self.of_round else None
            descend(self.engine, self.optimizer, leaves, gradients, row_1D, self.state_RS[part], lr, drift_nP=drift_1P)
            losses_R[row] = loss_1

    def _gradients(self, rows_nD: Tensor, batch: Batch) -> Gradients:
        """What a chunk's batch, or a part of it, asks of its rows."""
        if self.privacy is not None:
            return self.privacy.gradients(self.engine, self.samples.task, rows_nD, batch)
        leaves = self.engine.leaves(rows_nD)
        outputs_nBC = self.engine.outputs(leaves, rows_nD, batch.inputs, train=True)
        loss_n = batch.mean(self.samples.task.losses(outputs_nBC, batch.targets))
        return Gradients(leaves, torch.autograd.grad(loss_n.sum(), leaves), loss_n.detach())

    # ---- mixing --------------------------------------------------------------------------------

    def mix(self, matrix: sparse.csr_array, state: bool = False) -> None:
        """X <- W X in every replica (row = receiver); ``state``: that of the optimizers too."""
        self.rows_RD = self._mixed(matrix, self.rows_RD)
        if state:
            self.state_RS = self._mixed(matrix, self.state_RS)

    def mix_robustly(
        self, matrix: sparse.csr_array, rule: str, byzantine: Byzantine | None, round_index: int, isolate: bool = False
    ) -> None:
        """A gossip step under a robust rule, in which bad workers send what they please. ``isolate``: who
        sends a row that is not finite is heard no more, from this step on."""
        source_ND, target = self.all_rows(), self._spare(self.rows_RD)
        sent = {} if byzantine is None else sent_rows(byzantine, source_ND, round_index, self.seed)
        garbage = {k for k, row_D in sent.items() if not bool(row_D.isfinite().all())} if isolate else set()
        if garbage - self.isolated:
            self.isolated |= garbage
            matrix = without_workers(matrix, self.isolated)
        sent = {k: row_D for k, row_D in sent.items() if k not in self.isolated}
        robust_mix(
            self.engine, rule, matrix, source_ND, target, np.arange(self.owned.start, self.owned.stop), sent=sent
        )
        self.rows_RD, self._spare_RD = target, self.rows_RD

    def all_rows(self) -> Tensor:
        """The rows of all workers [N, D], of one replica."""
        return self.rows_RD

    def isolate(self, loss_R: Tensor) -> None:
        """From now on nobody hears a worker whose loss or row is not finite, and it trains no more."""
        sound_R = self.collect(loss_R.isfinite() & self.rows_RD.isfinite().all(1))
        self.isolated |= set((~sound_R).nonzero()[:, 0].tolist())

    def _spare(self, source: Tensor) -> Tensor:
        return self._spare_RD if self._spare_RD.shape == source.shape else torch.empty_like(source)

    def spare(self) -> Tensor:
        """A second matrix [R, D], for the rows after a round."""
        return self._spare(self.rows_RD)

    def swap(self, rows_RD: Tensor) -> None:
        """What :meth:`spare` gave are the rows now: the two matrices take turns."""
        self.rows_RD, self._spare_RD = rows_RD, self.rows_RD

    def _mixed(self, matrix: sparse.csr_array, source: Tensor) -> Tensor:
        target = self._spare(source)
        self.mix_into(matrix, source, target)
        self._spare_RD = source  # the two matrices take turns: no copy back
        return target

    def mix_into(self, matrix: sparse.csr_array, source: Tensor, target: Tensor) -> None:
        """``target`` [A, X] = W ``source`` [B, X] in every replica, for a matrix [A, B]; of several processes, the
        rows that live here."""
        if self.replicas == 1:
            mix_rows(self.engine, matrix, source, target)
        else:
            mix_replicas(self.engine, matrix, self._block_diagonal(matrix), source, target)

    def divide(self, owner_A: np.ndarray) -> None:
        """A protocol has A rows, of these workers [A], ascending: of several processes each has its workers'."""

    def block_of(self, rows: int) -> range:
        """Which of a protocol's ``rows`` live here: all."""
        return self.owned if rows == self.num_workers else range(rows)

    def _block_diagonal(self, matrix: sparse.csr_array) -> sparse.csr_array:
        def blocks() -> sparse.csr_array:
            return sparse.csr_array(sparse.kron(sparse.eye_array(self.replicas), matrix, format="csr"))

        return self.engine.kept(("blocks", self.replicas, id(matrix)), matrix, blocks)

    def reset_state(self, workers: list[int]) -> None:
        """These workers' optimizers forget."""
        if len(workers) == self.num_workers:
            self.state_RS.zero_()
        else:
            rows = torch.tensor(self.rows_of(workers), dtype=torch.int64)  # none, maybe, in one of several processes
            self.state_RS.index_fill_(0, send(rows, self.device), 0.0)

    def zeros(self, rows: int | None = None) -> Tensor:
        """A matrix [R, P] of a protocol's own, or of ``rows`` rows (of which those that live here)."""
        here = len(self.block_of(self.num_workers if rows is None else rows)) * self.replicas
        return torch.zeros(here, self.layout.P, device=self.device, dtype=self.dtype)

    def copied(self) -> State:
        """All that the next steps depend on."""
        kept = ({name: tensor.clone() for name, tensor in store.items()} for store in (self.extra, self.of_round))
        return State(self.rows_RD.clone(), self.state_RS.clone(), *kept)

    def put_back(self, state: State) -> None:
        """Go to a state that was :meth:`copied`. In place: a recorded step knows where all of it lies."""
        self.rows_RD.copy_(state.rows_RD)
        self.state_RS.copy_(state.state_RS)
        self.extra = {name: tensor.clone() for name, tensor in state.extra.items()}
        for name, tensor in state.of_round.items():
            if name in self.of_round:
                self.of_round[name].copy_(tensor)
            else:
                self.of_round[name] = tensor.clone()

    # ---- looking --------------------------------------------------------------------------------

    def counted(self) -> Tensor:
        """Which workers the consensus is made of [N], bool, on the CPU: all but isolated and Byzantine ones."""
        counted_N = torch.ones(self.num_workers, dtype=torch.bool)
        counted_N[sorted(self.isolated | self.uncounted)] = False
        return counted_N

    def consensus(self) -> Tensor:
        """The mean row of each replica [M, D]: the consensus model."""
        total_MD = torch.zeros(self.replicas, self.layout.D, device=self.device, dtype=self.dtype)
        for total_D, rows_ND in zip(total_MD, self.rows_RD.view(self.replicas, self.num_workers, -1), strict=True):
            self._add_counted(total_D, rows_ND)
        return total_MD / self.counted().sum()

    def _add_counted(self, total_D: Tensor, rows_nD: Tensor) -> None:
        """Add the counted ones of the rows of the workers here, one after the other: their sum must not depend
        on how many processes hold them."""
        left_out = self.isolated | self.uncounted

        def add(columns: slice) -> None:
            for worker, x_D in zip(self.owned, rows_nD, strict=True):
                if worker not in left_out:
                    total_D[columns].add_(x_D[columns])

        step = self.layout.D if devices.is_accelerator(self.device) else COLUMNS
        self.engine.map(add, [slice(i, i + step) for i in range(0, self.layout.D, step)])

    def consensus_distance(self) -> Tensor:
        """Root mean square distance of the workers' parameters to their mean, for each replica [M]
        (Kong et al. 2021), on the CPU: sqrt(1/N sum_k ||x_k - mean||^2)."""
        mean_MP = self.consensus()[:, : self.layout.P]
        squares_R = [  # a row at a time: no second matrix
            (x_D[: self.layout.P] - mean_MP[row // len(self.owned)]).square().sum(dtype=torch.float64)
            for row, x_D in enumerate(self.rows_RD)
        ]
        squares_MN = self.collect(torch.stack(squares_R)).cpu().view(self.replicas, self.num_workers)
        return squares_MN[:, self.counted()].mean(1).sqrt()

    def evaluate(
        self, samples: Samples, ids_n: Tensor, rows_RD: Tensor | None = None, batch_size: int | None = None,
        progress: Progress = ignored,
    ) -> dict[str, Tensor]:
        """The mean 'loss' [R] and the task's metrics [R] of every row (default: the workers) on these samples.
        ``progress``: gets the forward passes that have been made."""
        if rows_RD is not None:
            return evaluate_rows(self.engine, rows_RD, samples, ids_n, batch_size, progress)
        own = evaluate_rows(self.engine, self.rows_RD, samples, ids_n, batch_size, progress)
        return dict(zip(own, self.collect(torch.stack(list(own.values()), 1)).unbind(1), strict=True))

    def module(self, row: int, model: nn.Module) -> nn.Module:
        """``model`` with its parameters and float buffers as views into a row of the fleet."""
        return self.layout.attach(model, self.rows_RD[row])
