"""Ten minutes that certify a GPU for this project.

    python -m benchmarks.gpu                          everything, on the first GPU
    python -m benchmarks.gpu --only correctness speed-gossip
    python -m benchmarks.gpu --quick --device cuda:1  small sizes: does it run at all
    python -m benchmarks.gpu --quick --device cpu     no certificate: tries the command itself, without a GPU

In this order: what a GPU computes is what a CPU computes; steps do not wait; speed against its bars; how busy
main.py keeps it; scores; kill and resume. Each check has processes of its own and a limit in seconds, so that
one that fails, crashes or hangs leaves the others alone. The record is written after every figure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; the measuring processes inherit it

import torch

from benchmarks.bars import judged
from benchmarks.common import machine, machine_memory
from benchmarks.gpu_checks import CHECKS, Check, Task, reason
from training.execution import find_device
from utils.errors import UsageError, unknown_name
from utils.records import write_json


def run_check(check: Check, args: argparse.Namespace, write: Callable[[], None], result: dict[str, Any]) -> None:
    """Fill ``result`` with the check's figures, and print and write each as it comes. Whatever goes wrong is a
    result too."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder, time_limit(check.seconds) as expired:
        task = Task(args.device, args.quick, Path(folder), start + check.seconds)
        try:
            for figure in check.measure(task):
                result["figures"].append(figure)
                print(judged(figure, check.name, figure["what"]), flush=True)
                write()
        except Exception as error:
            late = f"not done after {check.seconds:g} s: " if expired.is_set() else ""
            result |= {"failure": late + reason(str(error)), "traceback": traceback.format_exc()}
            print(f"failed  {check.name}: {result['failure']}", flush=True)
    result["seconds"] = time.monotonic() - start
    result["ok"] = result["failure"] is None and all(figure["ok"] for figure in result["figures"])


@contextmanager
def time_limit(seconds: float) -> Iterator[threading.Event]:
    """After so many seconds the measuring processes of this one are killed, which fails whoever waits for them; the
    event says that it was for this reason."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        for process in multiprocessing.active_children():
            process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on, and in which precision float32 is multiplied."""
    record = {**machine(device), "memory_mib": machine_memory(device)}
    if device.type == "cuda":
        record |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        record["capability"] = torch.cuda.get_device_capability(device)
    record["tf32_convolutions"] = torch.backends.cudnn.allow_tf32
    record["tf32_products"] = torch.backends.cuda.matmul.allow_tf32
    return record


def chosen_checks(only: Sequence[str], device: str) -> list[Check]:
    """The checks whose names begin with one of ``only`` (none: all) and that this device can do."""
    for name in only:
        if not any(check.name.startswith(name) for check in CHECKS):
            raise unknown_name("check (--only)", name, [check.name for check in CHECKS])
    chosen = [c for c in CHECKS if c.name.startswith(tuple(only)) or not only]
    possible = [c for c in chosen if c.on_cpu or device != "cpu"]
    if not possible:
        raise UsageError(f"{', '.join(c.name for c in chosen)}: there is nothing to check without a GPU.")
    return possible


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:K, or cpu with --quick (default: cuda)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks whose names begin so")
    parser.add_argument("--quick", action="store_true", help="small sizes; the figures of speed mean little")
    parser.add_argument("--list", action="store_true", help="print the names of the checks, and stop")
    parser.add_argument("--out", help="JSON file to write (default: results/benchmarks/gpu-DEVICE.json)")
    args = parser.parse_args(argv)
    if args.list:
        return args
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no GPU here to certify; --quick --device cpu tries the command itself.")
    device = find_device(args.device)
    args.device = str(device)
    args.checks = chosen_checks(args.only, args.device)
    if device.type == "cpu" and not args.quick:
        raise UsageError("--device cpu only tries this command: add --quick.")
    if args.out is None:
        name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
        args.out = f"results/benchmarks/gpu-{re.sub(r'[^A-Za-z0-9]+', '-', name)}{'-quick' * args.quick}.json"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print, write. Returns 0 where everything is met, 1 where something is not, 2 where nothing could be
    checked."""
    try:
        args = parse(argv)
        if args.list:
            print("\n".join(check.name for check in CHECKS))
            return 0
        settings = {k: v for k, v in vars(args).items() if k != "checks"}
        record: dict[str, Any] = {"machine": describe_machine(torch.device(args.device)), "settings": settings}
        record |= {"ok": False, "complete": False, "checks": {}}
        write_json(args.out, record)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("  ".join(f"{key}: {value}" for key, value in record["machine"].items() if key != "versions"), flush=True)
    for check in args.checks:
        result = record["checks"][check.name] = {"ok": False, "failure": None, "seconds": None, "figures": []}
        run_check(check, args, lambda: write_json(args.out, record), result)
        write_json(args.out, record)
    missed = [name for name, result in record["checks"].items() if not result["ok"]]
    record |= {"ok": not missed, "complete": True, "seconds": sum(r["seconds"] for r in record["checks"].values())}
    write_json(args.out, record)
    verdict = f"not met: {', '.join(missed)}" if missed else "all met"
    print(f"\n{verdict}; {record['seconds']:.0f} s; {args.out}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
