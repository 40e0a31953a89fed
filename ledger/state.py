"""Digests of workers' states, and states in the store.

A state is what follows from nothing else: a worker's row, what its optimizer remembers, and what a protocol keeps
beside (a server's model). Tensors are taken in canonical layout, as checkpoints have them.

Legend: R rows here, D floats a row, S floats of an optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ledger.store import Store
from training.build import Job
from utils.digest import digest_rows, digest_tensors
from workers.optimizers import canonical_state, state_from_canonical
from workers.worker_vision import Fleet

LARGEST_COPY = 64 << 20  # bytes of rows that a thread has in canonical layout at a time
State = dict[str, str]  # the digests of a worker's tensors, by name


def states_are_whole(job: Job) -> bool:
    """Whether rows, optimizers' state and a protocol's tensors are all that a round depends on: else a run is replayed
    from its start."""
    return job.config.on_bad_worker == "stop" and job.config.chain_order != "policy"


class StateDigests:
    """Of the workers whose rows are here."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet

    def rows(self, instead: Mapping[int, Tensor] | None = None) -> dict[int, str]:
        """Of each worker's row. ``instead``: other rows [D] that some send."""
        found = dict(zip(self.fleet.owned, self._each("row", self.fleet.rows_RD, self._rows), strict=True))
        for worker, row_D in (instead or {}).items():
            if worker in found:
                found[worker] = digest_tensors({"row": self._rows(row_D[None])[0]})
        return found

    def after(self) -> dict[int, State]:
        """Of each worker's whole state."""
        shared, own = self._extra()
        common = {name: digest_tensors({name: tensor}) for name, tensor in shared.items()}
        each = {
            "row": self._each("row", self.fleet.rows_RD, self._rows),
            "state": self._each("state", self.fleet.state_RS, self._states),
            **{name: digest_rows(name, tensor) for name, tensor in own.items()},
        }
        return {
            worker: {**{name: digests[i] for name, digests in each.items()}, **common}
            for i, worker in enumerate(self.fleet.owned)
        }

    def _each(self, name: str, matrix_RX: Tensor, canonical: Callable[[Tensor], Tensor]) -> list[str]:
        """The digest of every row of a matrix, some rows a thread at a time."""
        row_bytes = max(1, matrix_RX[0].numel() * matrix_RX.element_size())
        at_once = max(1, min(-(-len(matrix_RX) // self.fleet.engine.threads), LARGEST_COPY // row_bytes))

        def digests(rows_nX: Tensor) -> list[str]:
            return digest_rows(name, canonical(rows_nX))

        return [digest for part in self.fleet.engine.map(digests, matrix_RX.split(at_once)) for digest in part]

    def keep(self, store: Store, after: Mapping[int, State]) -> None:
        """Put all tensors of this instant into the store. ``after``: their digests, as :meth:`after` gives them."""

        def put(worker: int, row_1D: Tensor, state_1S: Tensor) -> None:
            store.put_tensor("row", self._rows(row_1D)[0], after[worker]["row"])
            store.put_tensor("state", self._states(state_1S)[0], after[worker]["state"])

        self.fleet.engine.map(put, self.fleet.owned, self.fleet.rows_RD.split(1), self.fleet.state_RS.split(1))
        shared, own = self._extra()
        for name, tensor in shared.items():
            store.put_tensor(name, tensor)
        for name, tensor in own.items():
            for worker, row_P in zip(self.fleet.owned, tensor, strict=True):
                store.put_tensor(name, row_P, after[worker][name])

    def _rows(self, rows_nD: Tensor) -> Tensor:
        return self.fleet.layout.canonical(rows_nD.detach().cpu())

    def _states(self, state_nS: Tensor) -> Tensor:
        return canonical_state(self.fleet.optimizer, self.fleet.layout, state_nS.detach().cpu())

    def _extra(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A protocol's tensors: those that all workers share, and those with a row for each worker here."""
        found = {name: self.fleet.layout.canonical(tensor.cpu()) for name, tensor in self.fleet.extra.items()}
        own = {name: tensor for name, tensor in found.items() if len(tensor) == len(self.fleet.owned)}
        return {name: tensor for name, tensor in found.items() if name not in own}, own


def stored(store: Store, states: Mapping[int, State]) -> bool:
    """Whether all these states are in the store."""
    return all(store.has(digest) for state in states.values() for digest in state.values())


def load(fleet: Fleet, store: Store, states: Mapping[int, State]) -> None:
    """Put the fleet into the states of its workers (all of them). Raises :class:`UsageError` where one is damaged."""
    layout = fleet.layout
    rows_RD = torch.stack([store.get_tensor(states[k]["row"]) for k in fleet.owned])
    state_RS = torch.stack([store.get_tensor(states[k]["state"]) for k in fleet.owned])
    fleet.rows_RD.copy_(layout.from_canonical(rows_RD).to(fleet.device))
    fleet.state_RS.copy_(state_from_canonical(fleet.optimizer, layout, state_RS).to(fleet.device))
    fleet.extra = {}
    for name in states[0].keys() - {"row", "state"}:
        tensor = store.get_tensor(states[0][name])
        if tensor.dim() == 1:  # a row for each worker
            tensor = torch.stack([store.get_tensor(states[k][name]) for k in fleet.owned])
        fleet.extra[name] = layout.from_canonical(tensor).to(fleet.device).clone()
