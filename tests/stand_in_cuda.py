"""Streams, events and CUDA graphs of the stand-in accelerator (:mod:`tests.stand_in`).

Everything is computed at once and in order; what is kept is what a GPU would be allowed to do differently:

- A graph is a tape. After its capture everything that it wrote is as it was before, what it made is NaN (-1) until
  the first replay, and a look at that is refused.
- Kernels on two streams must not touch the same memory, one of them writing, unless one stream waited for the other.
- A copy to page-locked memory arrives when the host has waited, and one from there must find it unchanged until then.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.stand_in_tools import leaves, span, storage, tensors, written

Refuse = Callable[[str], None]


class Stream:
    """An order of kernels: how many it has run, and how many of each other stream it has waited for."""

    streams: Streams

    def __init__(self, device: Any = None, priority: int = 0, **_: Any):
        self.time, self.seen = 0, {}

    def wait_stream(self, other: Stream) -> None:
        for stream, time in {**other.seen, other: other.time}.items():
            self.seen[stream] = max(time, self.seen.get(stream, 0))
        self.streams.forget_if_joined()

    def wait_event(self, event: Event) -> None:
        self.wait_stream(event.stream)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.streams.wait("stream.synchronize")


class Event:
    """A moment of a stream; the host waits for it, which is logged."""

    streams: Streams

    def __init__(self, *_: Any, **__: Any):
        self.stream, self.arrivals = Stream(), 0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.streams.current
        self.stream.seen = {**stream.seen, stream: stream.time}
        self.arrivals = self.streams.numbered

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.streams.current).wait_event(self)

    def synchronize(self) -> None:
        self.streams.wait("event.synchronize", until=self.arrivals)

    def query(self) -> bool:
        self.streams.arrive(self.arrivals)
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class CUDAGraph:
    """A tape of kernels; see the module's documentation."""

    streams: Streams

    def __init__(self, keep_graph: bool = False):
        self.tape: list[tuple] = []
        self.made: dict[int, Tensor] = {}  # memory of its own, by address
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.replays = 0

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def save(self, tensor: Tensor) -> None:
        """Remember memory from before the capture that a kernel is about to write to."""
        address = storage(tensor)
        if address not in self.made and address not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before[address] = (whole, whole.clone())

    def add(self, func, args: tuple, kwargs: dict, result: Any) -> None:
        self.tape.append((func, args, kwargs, result))
        self.allocated(t for t in tensors(result) if storage(t) not in self.before)

    def allocated(self, results: Any) -> None:
        self.made.update({storage(t): t for t in results})

    def undo(self) -> None:
        """A capture has computed nothing."""
        for whole, old in self.before.values():
            whole.copy_(old)
        for tensor in self.made.values():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)
        self.before.clear()

    def replay(self) -> None:
        self.streams.launch_graph(self)
        self.replays += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for func, args, kwargs, result in self.tape:
                again = func(*args, **kwargs)
                for old, new in zip(leaves(result), leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self.tape.clear()


class Streams:
    """Which stream is current, what they ran since they last were together, and what is still under way."""

    def __init__(self) -> None:
        self.wait: Callable[..., None] = lambda *_, **__: None
        self.launch_graph: Callable[[CUDAGraph], None] = lambda graph: None
        self.clear()

    def clear(self) -> None:
        self.capture: CUDAGraph | None = None
        self.default = self.root = self.current = Stream()  # root: where streams fork from and join again
        self.graphs: dict[int, CUDAGraph] = {}  # by the memory that they made
        self.touched: dict[int, list[tuple]] = {}  # by address of the storage: who read and wrote it since a fork
        self.kept: list[Any] = []  # alive while streams are apart: memory of one is not given to another
        self.used: set[Stream] = set()
        self.late: list[tuple[int, Tensor, Tensor]] = []  # copies on their way to page-locked memory
        self.leaving: list[tuple[int, Tensor, Tensor]] = []  # and from there
        self.numbered = 0

    # ---- kernels --------------------------------------------------------------------------------

    def before(self, func, args: tuple, kwargs: dict, refuse: Refuse) -> None:
        """A kernel is about to run on the current stream."""
        changed = written(func, args, kwargs)
        targets = {id(t) for t in changed}
        for tensor in tensors((args, kwargs)):
            if id(tensor) not in targets:
                self.check_replayed(tensor, refuse)
        self.current.time += 1
        if self.current is not self.root or self.used:
            self._check_order(func, changed, tensors((args, kwargs)), refuse)
        if self.capture is not None:
            for tensor in changed:
                self.capture.save(tensor)

    def after(self, func, args: tuple, kwargs: dict, result: Any) -> None:
        """It ran."""
        if self.capture is not None:
            self.capture.add(func, args, kwargs, result)
        if self.used:
            self.kept.append((args, kwargs, result))
            for tensor in tensors(result):
                self._touch(tensor, wrote=True)

    def allocated(self, result: Any) -> None:
        """Memory was asked for."""
        if self.capture is not None:
            self.capture.allocated(tensors(result))

    def check_replayed(self, tensor: Tensor, refuse: Refuse) -> None:
        """Memory that a graph made holds something after its first replay."""
        if not self.graphs or tensor.layout != torch.strided or self.capture is not None:
            return
        graph = self.graphs.get(storage(tensor))
        if graph is not None and graph.replays == 0:
            refuse("what a graph computes was read before its first replay")

    def _check_order(self, func, changed: list[Tensor], all_tensors: list[Tensor], refuse: Refuse) -> None:
        if self.current is not self.root:
            self.used.add(self.current)
            if self.root not in self.current.seen:
                refuse(f"{func}: a kernel on a stream that has not waited for the one it was forked from")
        targets = {id(t) for t in changed}
        for tensor in all_tensors:
            wrote, (start, end) = id(tensor) in targets, span(tensor)
            for stream, time, other_start, other_end, other_wrote in self.touched.get(storage(tensor), ()):
                if start < other_end and other_start < end and (wrote or other_wrote) and stream is not self.current:
                    if self.current.seen.get(stream, 0) < time:
                        refuse(f"{func}: two streams touch the same memory and none waits for the other")
            self._touch(tensor, wrote)

    def _touch(self, tensor: Tensor, wrote: bool) -> None:
        record = (self.current, self.current.time, *span(tensor), wrote)
        records = self.touched.setdefault(storage(tensor), [])
        if not records or records[-1] != record:
            records.append(record)

    def forget_if_joined(self) -> None:
        """Once the root has waited for all streams there is one order again."""
        if all(self.root.seen.get(stream, 0) >= stream.time for stream in self.used):
            self._forget()

    def _forget(self) -> None:
        self.touched.clear()
        self.kept.clear()
        self.used.clear()

    # ---- the host ------------------------------------------------------------------------------

    def synchronize(self, until: int | None = None) -> None:
        """The host has waited for the device, or for an event after so many copies."""
        self.arrive(until)
        if until is None:
            for stream in list(self.used):
                self.root.wait_stream(stream)
            self._forget()

    def arrive(self, until: int | None = None) -> None:
        """Copies of page-locked memory, up to a number, are done."""
        until = self.numbered if until is None else until
        for number, target, value in self.late:
            if number <= until:
                target.copy_(value)
        for number, source, value in self.leaving:
            if number <= until and not torch.equal(source, value):
                raise RuntimeError("page-locked memory was overwritten before it was copied to the device")
        self.late = [entry for entry in self.late if entry[0] > until]
        self.leaving = [entry for entry in self.leaving if entry[0] > until]

    def copy_late(self, target: Tensor, value: Tensor) -> None:
        """A copy to page-locked memory has been asked for."""
        self.numbered += 1
        self.late.append((self.numbered, target, value.clone()))

    def copy_from(self, source: Tensor) -> None:
        """A copy from page-locked memory has been asked for."""
        self.numbered += 1
        self.leaving.append((self.numbered, source, source.clone()))

    @contextlib.contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def recording(self, graph: CUDAGraph, stream: Stream, refuse: Refuse) -> Iterator[None]:
        """``torch.cuda.graph``."""
        self.wait("torch.cuda.graph")
        self.capture, self.root = graph, stream
        try:
            with self.on(stream):
                try:
                    yield
                except BaseException:  # the end of the capture raises in its place, for streams were not joined
                    raise RuntimeError("capturing stream has unjoined work")  # noqa: B904
            if any(stream.seen.get(other, 0) < other.time for other in self.used):
                refuse("capturing ended with a stream that was not joined again")
        finally:
            self.capture, self.root = None, self.default
            self._forget()
            graph.undo()
        self.graphs.update(dict.fromkeys(graph.made, graph))


@contextlib.contextmanager
def patched_cuda(log: Any, streams: Streams, wait: Callable[[str], None], refuse: Refuse) -> Iterator[None]:
    """``torch.cuda`` with one device: the stand-in."""

    def launch_graph(graph: CUDAGraph) -> None:
        if streams.capture is not None:
            refuse("a graph was replayed inside a capture")
        log.kernels["graph"] += 1
        log.replayed += len(graph.tape)

    def wait_until(kind: str, until: int | None = None) -> None:
        wait(kind) if until is None else wait(kind, until)

    def autocast(device_type: str, *args: Any, **kwargs: Any):
        if device_type == "cuda":
            raise NotImplementedError("the stand-in accelerator has no autocast")
        return real_autocast(device_type, *args, **kwargs)

    def record(graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"):
        return streams.recording(graph, stream or Stream(), refuse)

    def set_device(device: Any) -> None:
        if torch.device(device).index not in (None, 0):
            refuse(f"there is no {device}")

    streams.wait, streams.launch_graph = wait_until, launch_graph
    Stream.streams = Event.streams = CUDAGraph.streams = streams
    real_autocast, warn = torch.autocast, lambda mode: warnings.warn(f"the stand-in ignores {mode}", stacklevel=2)
    functions = dict(
        _lazy_init=lambda: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=set_device,
        device=lambda device: contextlib.nullcontext(),
        synchronize=lambda device=None: wait("synchronize"),
        current_stream=lambda device=None: streams.current,
        default_stream=lambda device=None: streams.default,
        stream=streams.on,
        Stream=Stream,
        Event=Event,
        CUDAGraph=CUDAGraph,
        graph=record,
        graph_pool_handle=lambda: (0, 0),
        is_current_stream_capturing=lambda: streams.capture is not None,
        empty_cache=lambda: None,
        set_sync_debug_mode=warn,
        mem_get_info=lambda device=None: (1 << 34, 1 << 34),
        get_device_properties=lambda device=None: SimpleNamespace(
            name="stand-in", total_memory=1 << 34, major=9, minor=0, multi_processor_count=100
        ),
    )
    with mock.patch.multiple(torch.cuda, **functions), mock.patch.object(torch, "autocast", autocast):
        yield
