"""What the benchmarks share: processes that measure when told to, taking turns, memory, machine, tables.

Single figures vary by tens of per cent on a shared machine, so the sides of a comparison take turns
(A B A B ...) within one run, and what is reported is the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from utils.influence.statistics import mean_interval
from utils.provenance import provenance

T = TypeVar("T")
MIB = 2**20


class Probe:
    """A fresh process, with one intra-op thread, that builds something once and measures it on demand.

    ``build(*arguments)`` runs in the process and returns the function that every later call runs there.
    The process starts at once; construct several before asking the first and they build side by side.
    """

    def __init__(self, build: Callable[..., Callable[..., Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def wait(self) -> None:
        """Until it has built."""
        if not self._ready:
            self._receive()
            self._ready = True

    def ask(self, *request: Any) -> None:
        """Start a measurement."""
        self.wait()
        self._connection.send(request)

    def answer(self) -> Any:
        """What the measurement returned. RuntimeError, with the traceback, where it failed."""
        return self._receive()

    def __call__(self, *request: Any) -> Any:
        self.ask(*request)
        return self.answer()

    def _receive(self) -> Any:
        try:
            failure, answer = self._connection.recv()
        except EOFError as error:
            self._process.join()
            raise RuntimeError(
                f"a measuring process ended with code {self._process.exitcode} (-9: out of memory)"
            ) from error
        if failure:
            raise RuntimeError(f"a measuring process failed:\n{failure}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection: Any, build: Callable[..., Callable[..., Any]], arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        measure = build(*arguments)
        connection.send((None, None))
        while True:
            connection.send((None, measure(*connection.recv())))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass
    except Exception:
        connection.send((traceback.format_exc(), None))


def together(probes: Sequence[Probe], *request: Any) -> list[Any]:
    """The same measurement in all of them at once."""
    for probe in probes:
        probe.wait()
    for probe in probes:
        probe.ask(*request)
    return [probe.answer() for probe in probes]


def take_turns(
    sides: dict[str, Callable[[], T]], repeats: int, enough: float = float("inf"), at_least: int = 3
) -> dict[str, list[T]]:
    """``{side: [its measurements]}`` of ``repeats`` turns of all sides, A B A B ...

    Ends early, after ``at_least`` turns, once ``enough`` seconds have passed.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    start = time.perf_counter()
    for turn in range(repeats):
        if turn >= at_least and time.perf_counter() - start > enough:
            break
        for name, measure in sides.items():
            results[name].append(measure())
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over turns of the ratio within a turn: what both sides suffer alike cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how noisy the machine was."""
    return (max(values) - min(values)) / statistics.median(values)


def repeat_for(
    seconds: float, function: Callable[[], object], device: torch.device, at_once: int = 1
) -> tuple[int, float]:
    """Call ``function`` until ``seconds`` have passed: (calls, seconds they took). At least ``at_once``
    calls, and the clock is read after every ``at_once`` of them: a GPU is waited for only then."""
    synchronize(device)
    calls, start = 0, time.perf_counter()
    while True:
        for _ in range(at_once):
            function()
        calls += at_once
        synchronize(device)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return calls, elapsed


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told to; a CPU has already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds spent inside ``with stopwatch:`` blocks, summed. On a GPU it records events around the work
    instead of waiting for it, so that timing a part does not slow the whole."""

    def __init__(self, device: torch.device):
        self.device, self._seconds = device, 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self._events.append(tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)))
            self._events[-1][0].record(torch.cuda.current_stream(self.device))
        else:
            self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._events[-1][1].record(torch.cuda.current_stream(self.device))
        else:
            self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """The sum so far."""
        synchronize(self.device)
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000


def peak_memory(device: torch.device) -> float:
    """MiB that this process has held at most: on a GPU what PyTorch allocated there, on a CPU resident
    memory, libraries included. (On Linux ``ru_maxrss`` starts with the size of the process that started
    this one, so its own high-water mark is read where there is one.)"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine_memory(device: torch.device) -> float:
    """MiB of memory of the machine, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / MIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on: processor, cores, load before the run, versions."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    record = {
        "processor": capabilities.get("cpu_name") or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "fast_bf16": bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")),
        **provenance(),
    }
    if device.type == "cuda":
        record |= {"gpu": torch.cuda.get_device_name(device), "fast_bf16": torch.cuda.is_bf16_supported()}
    return record


def line(cells: Sequence[object], widths: Sequence[int]) -> str:
    """One line of a table: the first column to the left, figures to the right, None as a dash."""
    texts = ["-" if cell is None else str(cell) for cell in cells]
    pairs = list(zip(texts, widths, strict=True))
    return "  ".join([pairs[0][0].ljust(pairs[0][1]), *(text.rjust(width) for text, width in pairs[1:])])


def cell(values: list[float], scale: float = 1.0, digits: int = 3, share: bool = False) -> str:
    """Mean and 95 % interval as text. ``share``: values from 0 to 1, where the interval ends too."""
    mean, low, high = (scale * (min(max(v, 0.0), 1.0) if share else v) for v in mean_interval(values))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")
