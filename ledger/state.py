"""Digests of workers' states, and states in the store.

A state is what follows from nothing else: a worker's row, what its optimizer remembers, and what a protocol keeps
beside (a server's model). Tensors are taken in canonical layout, as checkpoints have them.

Legend: R rows here, D floats a row, S floats of an optimizer's state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ledger.store import Store
from training.build import Job
from utils.digest import digest_tensors
from workers.optimizers import canonical_state, state_from_canonical
from workers.worker_vision import Fleet

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
        fleet, instead = self.fleet, instead or {}
        workers = list(fleet.owned)

        def digest(worker: int) -> str:
            return digest_tensors({"row": self._row(instead.get(worker, fleet.rows_RD[worker - fleet.owned.start]))})

        return dict(zip(workers, fleet.engine.map(digest, workers), strict=True))

    def after(self) -> dict[int, State]:
        """Of each worker's whole state."""
        fleet, workers = self.fleet, list(self.fleet.owned)
        extra = {name: digest_tensors({name: tensor}) for name, tensor in self._extra().items()}

        def digest(worker: int) -> State:
            at = worker - fleet.owned.start
            row, state = fleet.rows_RD[at], fleet.state_RS[at]
            return {
                "row": digest_tensors({"row": self._row(row)}),
                "state": digest_tensors({"state": self._state(state)}),
                **extra,
            }

        return dict(zip(workers, fleet.engine.map(digest, workers), strict=True))

    def keep(self, store: Store) -> None:
        """Put all tensors of this instant into the store."""
        for row, state in zip(self.fleet.rows_RD, self.fleet.state_RS, strict=True):
            store.put_tensor("row", self._row(row))
            store.put_tensor("state", self._state(state))
        for name, tensor in self._extra().items():
            store.put_tensor(name, tensor)

    def _row(self, row_D: Tensor) -> Tensor:
        return self.fleet.layout.canonical(row_D.detach().cpu()[None])[0]

    def _state(self, state_S: Tensor) -> Tensor:
        return canonical_state(self.fleet.optimizer, self.fleet.layout, state_S.detach().cpu()[None])[0]

    def _extra(self) -> dict[str, Tensor]:
        return {name: self.fleet.layout.canonical(tensor.cpu()) for name, tensor in self.fleet.extra.items()}


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
    further = {name: digest for name, digest in states[0].items() if name not in ("row", "state")}
    fleet.extra = {n: layout.from_canonical(store.get_tensor(d)).to(fleet.device).clone() for n, d in further.items()}
