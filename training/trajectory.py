"""A recorded run as the influence methods see it: its plan, its states by replay, its derivatives.

A run is a pure function of (config, seed, step), so any state is had by replaying from the nearest
snapshot: those that stage 1 kept on disk, and the start of the run.

Legend: N workers, P trainable floats, D floats a row, T local steps, n samples.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from networks import head
from training import checkpoint
from training.build import Job
from training.protocols import check_differentiable, load_protocol, train_step
from utils.devices import send
from utils.influence.trajectory import LastLayer, Sent, Step, StepAdjoint
from utils.progress import Progress, ignored
from workers.derivatives import Derivatives, piece_size
from workers.rounds import end_round, sent
from workers.worker_vision import State


class RecordedRun:
    """A finished run of ``rounds`` rounds; implements ``utils.influence.trajectory.Trajectory``.

    ``run_dir``: where its snapshots are (None: only the start). ``memory_limit``: bytes that states
    held at once may take.
    """

    def __init__(self, job: Job, rounds: int, run_dir: Path | None = None, memory_limit: float = 4e9):
        self.job = job
        self.val_ids = job.val_ids  # the samples that judge
        self.fleet = job.make_fleet(job.sample_weights_n[None])  # whole: stages change no number
        self.derivatives = Derivatives(self.fleet)
        self.num_workers, self.P = self.fleet.num_workers, self.fleet.layout.P
        optimizer = self.fleet.optimizer
        self.momentum, self.weight_decay = optimizer.momentum, optimizer.weight_decay
        self.nesterov = getattr(optimizer, "nesterov", False)
        self._protocol = load_protocol(job.config.protocol)
        check_differentiable(job.config)
        self.rounds = rounds
        self._plans = [self._protocol.plan(job, r) for r in range(rounds)]
        self._first_step = [0, *accumulate(plan.num_steps for plan in self._plans)]
        self.num_steps = self._first_step[-1]
        state_bytes = self.fleet.rows_RD.numel() * self.fleet.rows_RD.element_size()
        self.states_in_memory = max(2, int(min(memory_limit / state_bytes, 1e12)))
        self._protocol.start(self.fleet, job)
        self._start = self.fleet.copied()
        self._now = 0
        self._on_disk: dict[int, Path] = {}
        if run_dir is not None:
            for path in checkpoint.stored(run_dir / checkpoint.TRAJECTORY):
                if checkpoint.round_of(path) <= rounds:
                    self._on_disk[self._first_step[checkpoint.round_of(path)]] = path
        self._final: Tensor | None = None
        self._replayed: Progress = ignored
        self._sent: dict[int, Sent] | None = None  # what was sent after steps, where that is asked for
        self._watched = range(0)  # those of these steps that are held

    # ---- the plan ---------------------------------------------------------------------------------

    @cached_property
    def shard_sizes_N(self) -> Tensor:
        """Samples each worker holds."""
        return torch.tensor([len(s) for s in self.job.shards])

    @cached_property
    def worker_of_n(self) -> Tensor:
        """The worker that holds each sample of the data set; -1 outside training."""
        worker_n = torch.full((len(self.job.dataset.targets_n),), -1)
        for k, shard in enumerate(self.job.shards):
            worker_n[shard] = k
        return worker_n

    def step(self, t: int) -> Step:
        """The plan of local step t."""
        r = bisect_right(self._first_step, t) - 1
        return self._plans[r].step(t - self._first_step[r])

    # ---- states -------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One local step forward."""
        step = self.step(self._now)
        train_step(self.fleet, step)
        if step.last:
            if self._sent is not None and self._now in self._watched:
                statistics_NS = self.fleet.rows_RD[:, self.P :].clone()
                self._sent[self._now] = Sent(sent(self.fleet, step.round), statistics_NS)
            end_round(self.fleet, step.round)
        self._replayed(self._now)
        self._now += 1

    def _go(self, t: int, held: dict[int, State] | None = None) -> None:
        """Bring the fleet to the state before step t, from wherever that takes the fewest steps."""
        held = held or {}
        best = max([u for u in (*held, *self._on_disk) if u <= t], default=0)
        if not best <= self._now <= t:
            if best in held or best == 0 and 0 not in self._on_disk:
                self.fleet.put_back(held.get(best, self._start))
            else:
                try:
                    found = checkpoint.read(self._on_disk[best], self.job.identity["digest"])
                    checkpoint.restore(self.fleet, found.tensors)
                except ValueError:  # damaged, or of another run: the one before it serves as well
                    del self._on_disk[best]
                    return self._go(t, held)
            self._now = best
        while self._now < t:
            self._advance()
        return None

    def final(self, progress: Progress = ignored) -> Tensor:
        """Rows [N, D] at the end of the run; ``progress`` gets a tick a step that is replayed to it."""
        if self._final is None:
            self._replayed = lambda t: progress(1)
            try:
                self._go(self.num_steps)
            finally:
                self._replayed = ignored
            self._final = self.fleet.rows_RD.clone()
        return self._final

    @contextlib.contextmanager
    def judged_by(self, val_ids: Tensor) -> Iterator[None]:
        """Within it a part of the validation set stands for all of it."""
        whole, self.val_ids = self.val_ids, val_ids
        try:
            yield
        finally:
            self.val_ids = whole

    def set_final(self, tensors: dict[str, Tensor]) -> None:
        """Take the end of the run from its last checkpoint instead of replaying to it."""
        self._final = self.fleet.layout.from_canonical(tensors["rows"].to(self.fleet.device)).clone()

    def forwards(self, steps: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Rows before each of these steps, ascending; valid until the next one is asked for."""
        for t in steps:
            self._go(t)
            yield t, self.fleet.rows_RD

    def backwards(self, first: int = 0, progress: Progress = ignored) -> Iterator[tuple[int, Tensor]]:
        """Rows before step t for t = T-1 .. first, in O(sqrt(T)) memory.

        Segments between snapshots are replayed, last first. A segment with more states than memory
        holds is cut again: states at the cuts are kept while it is walked. ``progress`` gets a tick a step, when it
        has been replayed for the first time, or been walked over.
        """
        waiting = set(range(first, self.num_steps))

        def replayed(t: int) -> None:
            if t in waiting:
                waiting.remove(t)
                progress(1)

        self._replayed = replayed
        cuts = sorted({first, *(t for t in self._on_disk if first < t < self.num_steps)})
        try:
            for start, stop in reversed(list(zip(cuts, [*cuts[1:], self.num_steps], strict=True))):
                for t, rows_ND in self._segment(start, stop, {}, self.states_in_memory):
                    yield t, rows_ND
                    replayed(t)
        finally:
            self._replayed = ignored

    def backwards_with_sent(
        self, progress: Progress = ignored
    ) -> Iterator[tuple[int, Tensor, Sent | None]]:
        """As :meth:`backwards`, with what the workers sent after each step that ended a round."""
        self._sent = {}
        try:
            for t, rows_ND in self.backwards(progress=progress):
                yield t, rows_ND, self._sent.pop(t, None)
        finally:
            self._sent = None

    def _segment(self, start: int, stop: int, held: dict, room: int) -> Iterator[tuple[int, Tensor]]:
        length = stop - start
        if length <= (room if self._sent is None else max(1, room // 2)):
            states, self._watched = [], range(start, stop)
            for t in range(start, stop):
                self._go(t, held)
                states.append(self.fleet.rows_RD.clone())
            if self._sent is not None:
                self._advance()  # through the end of the last round, too, though its state may be on the disk
            while states:
                yield start + len(states) - 1, states.pop()
            return
        # A state at a cut carries its momentum, so it takes the room of two (and what a protocol keeps, which is not
        # counted); the start is held already.
        # As few cuts as leave room for a whole piece; where none do, half of the room goes to cuts and
        # the pieces are cut again, at one more replay.
        whole = (c for c in range(1, room // 2) if self._sent is None and 2 * c - (-length // (c + 1)) <= room)
        cuts = next(whole, max(1, room // 4))
        held = dict(held)
        starts = [start + length * c // (cuts + 1) for c in range(cuts + 1)]
        for t in starts[1:]:
            self._go(t, held)
            held[t] = self.fleet.copied()
        for piece, piece_stop in reversed(list(zip(starts, [*starts[1:], stop], strict=True))):
            yield from self._segment(piece, piece_stop, held, max(2, room - 2 * cuts))
            if piece != start:
                del held[piece]

    def checkpoints(self, count: int) -> list[int]:
        """About ``count`` evenly spaced steps: where stage 1 keeps states, if it keeps enough. They follow from the
        configuration alone; states that are not on the disk are replayed."""
        count = min(count, self.num_steps)
        wanted = [int((c + 0.5) * self.num_steps / count) for c in range(count)]
        every = checkpoint.snapshot_interval(self._protocol.rounds(self.job))
        kept = [self._first_step[r] for r in range(every, self.rounds, every)]
        if len(kept) >= count:
            return sorted({min(kept, key=lambda t: abs(t - w)) for w in wanted})
        return wanted

    # ---- derivatives ----------------------------------------------------------------------------------

    def validation_gradient(self, rows_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean validation loss [R] and its gradient [R, D]."""
        return self.derivatives.validation_gradient(rows_RD, self.job.samples, self.val_ids)

    def step_adjoint(self, t: int, rows_ND: Tensor, rho_NP: Tensor, statistics_NS: Tensor) -> StepAdjoint:
        """The transposed derivative of local step t."""
        step = self.step(t)
        active = None if step.active is None else list(step.active)
        return StepAdjoint(
            *self.derivatives.transposed_step(rows_ND, rho_NP, statistics_NS, step.numbers_N, active)
        )

    def sample_products(self, rows_ND: Tensor, direction_NP: Tensor, batch_size: int | None = None) -> Tensor:
        """<direction_j, grad loss_i(rows_j)> for every training sample [n]."""
        return self.derivatives.sample_products(rows_ND, direction_NP, self.job.samples, self.job.shards, batch_size)

    def shard_gradient(self, rows_ND: Tensor) -> Tensor:
        """The sum of the gradients of worker j's own samples at its own parameters [N, P]."""
        return self.derivatives.shard_gradient(rows_ND, self.job.samples, self.job.shards)

    def last_layer(self, weights_N: Tensor) -> LastLayer:
        """The last linear layer of the model that is this average of the final rows."""
        samples, task = self.job.samples, self.job.samples.task
        model = copy.deepcopy(self.job.model).to(samples.dtype).to(self.fleet.device).eval()
        final_ND = self.final()  # may be replayed, hence not inside no_grad
        even = bool((weights_N == weights_N[0]).all())
        row_D = final_ND.mean(0) if even else (send(weights_N, final_ND.device).to(final_ND)[:, None] * final_ND).sum(0)
        self.fleet.layout.attach(model, row_D)
        seen = threading.local()  # as networks.features, for threads that share the module
        hook = head(model).register_forward_pre_hook(lambda _, inputs: setattr(seen, "inputs", inputs[0]))

        @torch.no_grad()
        def of_piece(piece: Tensor) -> tuple[Tensor, Tensor]:
            outputs = model(samples.plain(piece)[0])
            return seen.inputs, outputs

        def of(ids_m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            ids_m = send(ids_m, self.fleet.device)
            parts = self.fleet.engine.map(of_piece, ids_m.split(piece_size(samples)))
            features_mF, outputs_mC = (torch.cat(part) for part in zip(*parts, strict=True))
            return features_mF, outputs_mC, samples.targets_n[ids_m]

        (train_mF, train_mC, targets_m), (val_vF, val_vC, targets_v) = of(self.job.train_ids), of(self.val_ids)
        hook.remove()
        train_mC, val_vC = train_mC.double(), val_vC.double()
        return LastLayer(
            head(model), train_mF, targets_m, val_vF, targets_v, task.curvatures(train_mC, targets_m),
            task.residuals(train_mC, targets_m), task.residuals(val_vC, targets_v),
        )  # fmt: skip
