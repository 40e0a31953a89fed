"""The log of the stand-in accelerator, and what it asks of operators and their arguments, so often that it must be
quick."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Log:
    """What happened since :meth:`clear`. Keys: operator (kernels), or (what, line of the project)."""

    kernels: Counter[str] = field(default_factory=Counter)  # launched one by one; a replayed graph is one launch
    replayed: int = 0  # kernels inside replayed graphs
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)  # the host waits for the device
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)  # asynchronous ones between host and device
    errors: list[str] = field(default_factory=list)  # also those that somebody caught
    silent: bool = False

    def clear(self) -> None:
        for counter in (self.kernels, self.syncs, self.copies, self.errors):
            counter.clear()
        self.replayed = 0

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    @property
    def waits(self) -> int:
        return sum(self.syncs.values())


def leaves(tree: Any) -> Iterator[Any]:
    """What lies in tuples, lists and dicts."""
    if isinstance(tree, (tuple, list)):
        for part in tree:
            yield from leaves(part)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    else:
        yield tree


def mapped(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with ``function`` applied to what is of this kind."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([mapped(kind, function, part) for part in tree])
    if isinstance(tree, dict):
        return {key: mapped(kind, function, part) for key, part in tree.items()}
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """The (CPU) tensors of a tree that lie in plain memory."""
    return [t for t in leaves(tree) if isinstance(t, Tensor) and t.layout == torch.strided and t.numel()]


@functools.cache
def written_arguments(func) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def written(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a call writes to."""
    if func is torch.ops.aten.native_batch_norm.default and args[5]:  # its running statistics, unannounced
        return tensors(args[3:5])
    return tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in written_arguments(func)])


@functools.cache
def is_view(func) -> bool:
    """Whether the operator returns another look at its input and computes nothing."""
    returns = func._schema.returns
    view = bool(returns) and returns[0].alias_info is not None and not written_arguments(func)
    return view or func is torch.ops.aten._unsafe_view.default


def storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor looks at."""
    return tensor.untyped_storage().data_ptr()


def span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte of a tensor, as addresses."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
