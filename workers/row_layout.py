"""Where each tensor of a network lies in a worker's row.

A row holds all float state of one worker: trainable parameters first, then float buffers
(BatchNorm statistics), which gossip mixes and SGD leaves alone. Integer counters stay outside.

On a GPU tensors and rows start at multiples of 32 floats, so that odd rows are as well aligned as even ones for
tensor cores; what lies between is zero and never in a file.

Legend: N workers, P trainable floats, D = P + buffer floats (gaps included), n workers of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

GPU_ALIGNMENT = 32  # floats: 128 bytes, a line of the cache


@dataclass(frozen=True)
class Entry:
    """One tensor of the network: ``row[offset : offset + numel]``, in ``shape``.

    ``channels_last``: the floats of a convolution's weight are stored output, height, width, input;
    the view still has the canonical shape (output, input, height, width).
    """

    name: str
    shape: torch.Size
    offset: int
    channels_last: bool = False

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def view(self, rows: Tensor) -> Tensor:
        """The tensor as a view: ``rows`` [D] gives ``shape``, [n, D] gives [n, *shape]."""
        flat = rows.narrow(-1, self.offset, self.numel)
        if not self.channels_last:
            return flat.unflatten(-1, self.shape) if self.shape else flat.squeeze(-1)
        out, inp, height, width = self.shape
        return flat.unflatten(-1, (out, height, width, inp)).movedim(-1, -3)


class RowLayout:
    """The map between a network's named tensors and a row of D floats.

    ``RowLayout(model, channels_last, align)``; ``parameters`` and ``buffers`` are the entries in row order, which
    start at multiples of ``align``; ``P`` and ``D`` the floats of the first and of both, ``num_parameters`` and
    ``num_floats`` without the gaps.
    """

    def __init__(self, model: nn.Module, channels_last: bool = False, align: int = 1):
        floats = [(name, tensor) for name, tensor in model.named_buffers() if tensor.is_floating_point()]
        self.align = align
        self.parameters, self.P = _entries(list(model.named_parameters()), 0, align, channels_last)
        self.buffers, self.D = _entries(floats, self.P, align)
        self.num_parameters = sum(e.numel for e in self.parameters)
        self.num_floats = sum(e.numel for e in self.entries)

    @property
    def entries(self) -> list[Entry]:
        return self.parameters + self.buffers

    def unfilled(self, like: Tensor) -> Tensor:
        """Memory for rows whose tensors will be filled: what lies between them is zero."""
        return torch.empty_like(like) if self.D == self.num_floats else torch.zeros_like(like)

    def write(self, model: nn.Module, row_D: Tensor) -> None:
        """Copy the model's tensors into a row."""
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for entry in self.entries:
                entry.view(row_D).copy_(state[entry.name])

    def state_dict(self, row_D: Tensor) -> dict[str, Tensor]:
        """The row as named tensors in canonical layout, copied."""
        return {e.name: e.view(row_D).detach().clone(memory_format=torch.contiguous_format) for e in self.entries}

    def attach(self, model: nn.Module, row_D: Tensor) -> nn.Module:
        """Make the model's parameters and float buffers views into the row; returns the model."""
        for entry in self.entries:
            path, _, leaf = entry.name.rpartition(".")
            owner = model.get_submodule(path)
            if leaf in owner._parameters:
                owner._parameters[leaf].data = entry.view(row_D)
            else:
                owner._buffers[leaf] = entry.view(row_D)
        return model

    def canonical(self, matrix: Tensor) -> Tensor:
        """The matrix [..., D] or [..., P] without gaps and with every tensor in canonical order (what files hold).
        The matrix itself where it already is."""
        if self._is_canonical():
            return matrix
        places = self._places if matrix.shape[-1] == self.D else self._places[: self.num_parameters]
        return matrix.index_select(-1, places.to(matrix.device))

    def from_canonical(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        whole = matrix.shape[-1] == self.num_floats
        if self._is_canonical():
            return matrix
        result = matrix.new_zeros(*matrix.shape[:-1], self.D if whole else self.P)
        for entry, plain in self._canonical_places(self.entries if whole else self.parameters):
            entry.view(result).copy_(plain.view(matrix))
        return result

    @cached_property
    def _places(self) -> Tensor:
        """Where each float of a canonical row is in a row [floats]. One gather is twice as fast as a copy a tensor."""
        row_D = torch.arange(self.D, dtype=torch.int32)
        return torch.cat([e.view(row_D).reshape(-1) for e in self.entries])

    def _is_canonical(self) -> bool:
        return self.D == self.num_floats and not any(e.channels_last for e in self.parameters)

    def _canonical_places(self, entries: list[Entry]) -> Iterator[tuple[Entry, Entry]]:
        """Each entry, and where it is in a canonical row."""
        offset = 0
        for entry in entries:
            yield entry, Entry(entry.name, entry.shape, offset)
            offset += entry.numel


def _entries(
    tensors: list[tuple[str, Tensor]], offset: int, align: int, channels_last: bool = False
) -> tuple[list[Entry], int]:
    """Entries of named tensors from ``offset`` on, each at a multiple of ``align``, and where the next one goes."""
    entries = []
    for name, tensor in tensors:
        entries.append(Entry(name, tensor.shape, offset, channels_last and tensor.dim() == 4))
        offset = -(-(offset + tensor.numel()) // align) * align
    return entries, offset


def without_counters(model: nn.Module) -> nn.Module:
    """Drop BatchNorm's integer step counters (unused while its momentum is a number), in place.
    They would be state outside the row."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.momentum is None:
                raise ValueError("BatchNorm with momentum=None averages by a step counter, which rows do not hold")
            module.num_batches_tracked = None
    return model
