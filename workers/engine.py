"""How the work of N workers is executed: the only place that knows about threads and vmap.

The fleet cuts its rows into chunks and hands each chunk to a function; an engine decides how many
workers a chunk holds and which thread runs it.

- ``threads``: one worker a chunk, chunks spread over Python threads with one intra-op thread each
  (PyTorch releases the GIL inside its operators). Best for convolutions and wide layers.
- ``loop``: the same on a single thread.
- ``graph``: as ``loop``, but a step of all workers is recorded once as a CUDA graph of parallel streams and
  replayed (:mod:`workers.step_graph`). For GPUs, where launching kernels is what costs.
- ``vmap``: many workers a chunk; the forward pass runs under ``torch.vmap``, so a linear layer of all
  workers becomes one batched product, and autograd differentiates that. Best for small MLPs.

Legend: N workers, n workers of one chunk, B batch, C outputs, P/D floats of a row.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils import devices
from utils.errors import UsageError
from workers.row_layout import GPU_ALIGNMENT, Entry, RowLayout, without_counters

R = TypeVar("R")

VMAP_CHUNK = 128  # workers; measured on the 64-64-10 MLP: 64 to 128 keep a chunk's rows in the cache
GPU_VMAP_CHUNK = 1024  # there is no cache to keep them in, and every chunk is launched anew
# Errors of the machine, not of the network: out of memory, and whatever leaves a GPU in an unknown state.
DEVICE_ERRORS = tuple(getattr(torch, n) for n in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, n))
KEPT = 64  # mixing matrices whose weights are kept: the period of any topology but a large one-peer graph
ENGINES = ("auto", "measure", "threads", "loop", "vmap", "graph")
CHUNKS_A_THREAD = {"threads": 4, "loop": 4, "vmap": 2, "graph": 512}  # a graph launches its rows together
IN_PARTS = ("threads", "loop")  # engines that can cut a worker's batch into parts


def cuts_batches(name: str) -> bool:
    """Whether the engine of that name can cut a worker's batch into parts."""
    return name in IN_PARTS


@dataclass
class Engine:
    """An execution strategy for one network.

    ``name``: 'threads', 'loop', 'vmap' or 'graph'. ``threads``: Python threads that run chunks.
    ``autocast``: dtype of mixed precision (bfloat16) or None. ``vmap_chunk``: most workers of a chunk of 'vmap'.
    ``parts``: parts that a worker's batch is cut into, for threads that would idle (of 'threads' and 'loop').
    """

    model: nn.Module
    layout: RowLayout
    name: str = "threads"
    threads: int = 1
    autocast: torch.dtype | None = None
    vmap_chunk: int = VMAP_CHUNK
    parts: int = 1
    local: threading.local = field(default_factory=threading.local, repr=False)
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)
    _kept: dict[Hashable, tuple] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.name not in ENGINES[2:]:
            raise UsageError(f"unknown engine '{self.name}'. Choose from: {', '.join(ENGINES)}.")
        devices.keep_freed_memory()
        # Parameters are handed in at every call, so the modules need no memory of their own.
        self._template = without_counters(copy.deepcopy(self.model)).to("meta")
        self.workers_a_chunk = self.vmap_chunk if self.batched else 1
        for module in self._template.modules():  # vmap does not know PyTorch's fused recurrent kernels
            if self.batched and hasattr(module, "fused"):
                module.fused = False
        if self.name in ("loop", "graph"):
            self.threads = 1
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads, "worker", initializer=torch.set_num_threads, initargs=(1,))

    @classmethod
    def on(
        cls,
        device: torch.device,
        model: nn.Module,
        name: str,
        threads: int,
        channels_last: bool,
        autocast: torch.dtype | None = None,
        parts: int = 1,
    ) -> Engine:
        """The engine of that name as it suits a device."""
        on_gpu = devices.is_accelerator(device)
        layout = RowLayout(model, channels_last, GPU_ALIGNMENT) if on_gpu else RowLayout(model, channels_last)
        return cls(model, layout, name, threads, autocast, GPU_VMAP_CHUNK if on_gpu else VMAP_CHUNK, parts)

    @property
    def batched(self) -> bool:
        """Whether a chunk is many workers at once, so that their tensors are [n, *shape]."""
        return self.name == "vmap"

    @property
    def recorded(self) -> bool:
        """Whether a step of all workers is recorded (:mod:`workers.step_graph`)."""
        return self.name == "graph"

    @property
    def busy_rows(self) -> int:
        """Rows that keep it busy: fewer leave threads or a GPU idle, more only take longer."""
        return self.workers_a_chunk * self.threads * CHUNKS_A_THREAD[self.name]

    def rows(self, models: list[nn.Module], dtype: torch.dtype) -> Tensor:
        """The models as rows [n, D]."""
        rows_nD = torch.zeros(len(models), self.layout.D, dtype=dtype)
        for row_D, model in zip(rows_nD, models, strict=True):
            self.layout.write(model, row_D)
        return rows_nD

    def kept(self, key: Hashable, source: object, compute: Callable[[], R]) -> R:
        """``compute()``, kept under a key for as long as ``source``, whose identity is part of the key, is: what
        gossip needs of a mixing matrix. The last few are kept."""
        found = self._kept.get(key)
        if found is None or found[0] is not source:
            if len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            found = self._kept[key] = (source, compute())
        return found[1]

    def chunks(self, rows: Sequence[int]) -> list[list[int]]:
        """``rows`` cut into chunks: consecutive, and even so that no thread idles."""
        rows = list(rows)
        if not rows:
            return []
        size = self.workers_a_chunk
        if size > 1:  # as many chunks as threads at least
            size = min(size, -(-len(rows) // self.threads))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def map(self, function: Callable[..., R], *arguments: Sequence) -> list[R]:
        """``[function(*a) for a in zip(*arguments)]`` on the pool, in order."""
        return list(self.each(function, *arguments))

    def each(self, function: Callable[..., R], *arguments: Sequence) -> Iterator[R]:
        """The same, each result as soon as it and those before it are there."""
        return map(function, *arguments) if self._pool is None else self._pool.map(function, *arguments)

    def _module(self, train: bool) -> nn.Module:
        """This thread's copy of the network: ``functional_call`` swaps tensors inside it."""
        modules = getattr(self.local, "modules", None)
        if modules is None:
            modules = {mode: copy.deepcopy(self._template).train(mode) for mode in (True, False)}
            self.local.modules = modules
        return modules[train]

    def precision(self, device_type: str) -> contextlib.AbstractContextManager:
        """The autocast region of mixed precision, or nothing."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.autocast)

    def views(self, entries: Sequence[Entry], rows_nD: Tensor) -> list[Tensor]:
        """These tensors of a chunk's rows, as views: [n, *shape], or [*shape] where a chunk is one worker. Rows of
        momentum or of a direction [n, P] will do for parameters."""
        rows = rows_nD if self.batched else rows_nD[0]
        return [entry.view(rows) for entry in entries]

    def each_worker(
        self, one: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, list[Tensor]]],
        tensors: dict[str, Tensor], inputs_nB: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """``one(tensors, inputs_B)`` of every worker of a chunk: a tensor and a list of tensors, all as [n, ...].
        ``tensors`` are as :meth:`views` has them."""
        if self.batched:
            return torch.vmap(one)(tensors, inputs_nB)
        first, further = one(tensors, inputs_nB[0])
        return first[None], [tensor[None] for tensor in further]

    def leaves(self, rows_nD: Tensor) -> list[Tensor]:
        """The chunk's parameters as :meth:`views` that require gradients. ``.data`` on purpose: the version
        counter of the matrix would count the other threads' updates of other rows as modifications of ours."""
        return [view.data.requires_grad_() for view in self.views(self.layout.parameters, rows_nD)]

    def call(self, tensors: dict[str, Tensor], inputs: Tensor, train: bool) -> Tensor:
        """Outputs of ONE worker: a pure function of its named tensors, except that BatchNorm updates
        the float buffers in ``tensors`` in place when training."""
        with self.precision(inputs.device.type):
            return functional_call(self._module(train), tensors, (inputs,), tie_weights=False)

    def outputs(self, parameters: list[Tensor], rows_nD: Tensor, inputs_nB: Tensor, train: bool) -> Tensor:
        """Outputs [n, B, C] of a chunk, with ``parameters`` as made by :meth:`leaves` and the float
        buffers of ``rows_nD``, which training-mode BatchNorm updates."""
        names = [e.name for e in self.layout.parameters]
        if not self.batched:
            buffers = {e.name: e.view(rows_nD[0]) for e in self.layout.buffers}
            return self.call({**dict(zip(names, parameters, strict=True)), **buffers}, inputs_nB[0], train)[None]
        # vmap writes through dense tensors only, so BatchNorm works on copies that are written back.
        buffers = {e.name: e.view(rows_nD).contiguous() for e in self.layout.buffers}

        def one(parameters: dict, buffers: dict, inputs: Tensor) -> Tensor:
            return self.call({**parameters, **buffers}, inputs, train)

        result = torch.vmap(one)(dict(zip(names, parameters, strict=True)), buffers, inputs_nB)
        if train:
            for entry in self.layout.buffers:
                entry.view(rows_nD).copy_(buffers[entry.name])
        return result

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
