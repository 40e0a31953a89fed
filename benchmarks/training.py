"""How fast the fleet trains, against the limit of the machine.

    python -m benchmarks.training                         everything, a quarter of an hour on 2 cores
    python -m benchmarks.training --quick                 a glance
    python -m benchmarks.training --models cnn --workers 16 --seconds 10
    python -m benchmarks.training --whole                 main.py as a user calls it, five minutes of it
    python -m benchmarks.training --device cuda           16 workers against one model at 16 times the batch

The limit on a CPU: bare PyTorch loops of one model (data ready in memory, ``torch.optim.SGD``), a process
a core, one thread each. The fleet: rounds of one local step of all workers and one gossip on a ring, from
IID shards. Limit and fleet take turns in one run; ratios are medians over the turns. On a GPU the fleet is
compared with one model at the joint batch, and with a plain loop over N models.

A node-step is one SGD step of one worker on 32 samples.

Legend: N workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; the measuring processes inherit it

import torch

from benchmarks.bars import BARS, GPU_BARS, check_bars, describe
from benchmarks.common import (
    MIB,
    Probe,
    line,
    machine,
    machine_memory,
    median_ratio,
    spread,
    take_turns,
    together,
)
from benchmarks.training_probes import (
    BATCH,
    IMAGE_SHAPES,
    Setting,
    automatic,
    bare_loop,
    build_model,
    fleet_rounds,
)
from benchmarks.whole import BAR, QUICK, Size, describe_whole, measure_whole
from utils.errors import UsageError, choose
from utils.records import write_json
from workers.row_layout import RowLayout

WORKERS = (4, 16, 64, 256, 1024)
MOST_WORKERS = {"mlp": 1024, "mlp_wide": 256, "cnn": 1024, "resnet18": 16}  # but for --workers
LAYOUTS = ("nchw", "channels_last")
ENGINES = ("threads", "loop", "graph")
EXECUTIONS = ("auto", "vmap/nchw", *(f"{engine}/{layout}" for engine in ENGINES for layout in LAYOUTS))
MATRICES = 4.5  # parameters, their mix, momentum, the copy that gossip is compared with; and gradients


# ---- comparing ---------------------------------------------------------------------------------------


def measure_row(
    setting: Setting,
    num_workers: int,
    threads: int,
    limits: dict[str, list[Probe]],
    seconds: float,
    repeats: int,
) -> dict[str, Any]:
    """One line of the table: a fleet and its limits, taking turns. ``limits``: processes that run side by
    side, by the name of the ratio that they are the denominator of."""
    turn = seconds / repeats
    with Probe(fleet_rounds, setting, num_workers, threads) as fleet:
        fleet.wait()
        sides = {
            name: lambda probes=tuple(probes): sum(a["rate"] for a in together(probes, turn))
            for name, probes in limits.items()
        }
        turns = take_turns({**sides, "fleet": lambda: fleet(turn)}, repeats, enough=4 * seconds)
    answers = turns["fleet"]
    rates = [a["rate"] for a in answers]

    def middle(value: Callable[[dict], float]) -> float:
        return statistics.median(value(a) for a in answers)

    return {
        "model": setting.model,
        "workers": num_workers,
        "execution": f"{setting.engine} {setting.layout}",
        "channels_last": setting.channels_last,
        "amp": setting.amp,
        "node_steps_per_second": statistics.median(rates),
        **{f"ratio_{name}": median_ratio(rates, turns[name]) for name in limits},
        "gossip_share": middle(lambda a: a["gossip_seconds"] / a["round_seconds"]),
        "gossip_us_per_worker": 1e6 * middle(lambda a: a["gossip_seconds"]) / num_workers,
        "gossip_gb_per_second": 1e-9 * middle(lambda a: a["gossip_bytes"] / a["gossip_seconds"]),
        "copy_gb_per_second": 1e-9 * middle(lambda a: a["copy_bytes"] / a["copy_seconds"]),
        "gossip_in_copies": middle(lambda a: a["gossip_seconds"] / a["copy_seconds"]),
        "matrix_mib": answers[0]["copy_bytes"] / 2 / MIB,
        "peak_memory_mib": answers[0]["peak_memory"],
        "memory_before_fleet_mib": answers[0]["memory_before"],
        "spread": spread(rates),
        "turns": {**{name: turns[name] for name in limits}, "fleet": rates},
    }


def compare_on_cpu(args: argparse.Namespace, model: str, record: dict[str, Any]) -> None:
    """All rows of one model against bare processes, one a core; fills ``record`` and prints as it goes."""
    base = Setting(model, "cpu", augmentation=args.augment)
    layouts = (False, True) if has_convolutions(model) else (False,)
    limits: dict[Setting, list[Probe]] = {
        Setting(model, "cpu", channels_last=channels_last, amp=amp): []
        for amp in ((False, True) if args.amp else (False,))
        for channels_last in layouts
    }
    plain = Setting(model, "cpu")
    try:
        for setting, probes in limits.items():
            probes += [Probe(bare_loop, setting) for _ in range(args.threads)]
        for setting, probes in limits.items():
            record["limits"].append(measure_limit(setting, probes, args.seconds, args.repeats))
        for num_workers in worker_counts(args, model):
            for setting in executions(args, base, num_workers):
                sides = {"limit": limits[setting.bare()]}
                if setting.bare() != plain:
                    sides["plain"] = limits[plain]
                row = measure_row(setting, num_workers, args.threads, sides, args.seconds, args.repeats)
                row.setdefault("ratio_plain", row["ratio_limit"])
                record["rows"].append(row)
                print_row(row)
    finally:
        for probe in sum(limits.values(), []):
            probe.close()


def compare_on_gpu(args: argparse.Namespace, model: str, record: dict[str, Any]) -> None:
    """All rows of one model against one model at batch 32 N, and against a plain loop over N models."""
    base = Setting(model, args.device, augmentation=args.augment)
    for num_workers in worker_counts(args, model):
        for setting in executions(args, base, num_workers):
            bare = setting.bare()
            with (
                Probe(bare_loop, bare, 1, BATCH * num_workers) as joint,
                Probe(bare_loop, bare, num_workers) as loop,
            ):
                sides = {"limit": [joint], "plain": [loop]}
                row = measure_row(setting, num_workers, args.threads, sides, args.seconds, args.repeats)
                row["peak_memory_joint_mib"] = joint(0.0)["peak_memory"]
                row["peak_memory_loop_mib"] = loop(0.0)["peak_memory"]
            record["rows"].append(row)
            print_row(row)


def measure_limit(setting: Setting, probes: list[Probe], seconds: float, repeats: int) -> dict[str, Any]:
    """The machine's limit: one bare process alone, and one a core side by side, taking turns."""
    turn = seconds / repeats
    turns = take_turns(
        {
            "alone": lambda: probes[0](turn)["rate"],
            "together": lambda: sum(a["rate"] for a in together(probes, turn)),
        },
        repeats,
    )
    alone, side_by_side = (statistics.median(turns[name]) for name in ("alone", "together"))
    print(
        f"limit of {setting.model}, {setting.layout}: {alone:.1f} node-steps/s in one process, "
        f"{side_by_side:.1f} in {len(probes)} side by side",
        flush=True,
    )
    return {
        "model": setting.model,
        "layout": setting.layout,
        "processes": len(probes),
        "one_process": alone,
        "limit": side_by_side,
    }


# ---- the command -------------------------------------------------------------------------------------


def has_convolutions(model: str) -> bool:
    """Whether the memory layout matters."""
    return any(p.dim() == 4 for p in build_model(model).parameters())


def executions(args: argparse.Namespace, base: Setting, num_workers: int) -> list[Setting]:
    """The settings to time: those of --executions, or those that make sense for the model."""
    engines = ["threads"] if base.device == "cpu" else ["graph", "loop"]
    layouts = LAYOUTS if has_convolutions(base.model) else LAYOUTS[:1]
    names = args.executions or [f"{engine}/{layout}" for engine in engines for layout in layouts]
    if not args.executions and (base.device != "cpu" or len(layouts) == 1):
        names.insert(0, "vmap/nchw")
    settings = []
    for amp in (False, True) if args.amp else (False,):
        for name in names:
            engine, _, layout = name.partition("/")
            setting = dataclasses.replace(
                base, engine=engine, channels_last=layout == "channels_last", amp=amp
            )
            if engine == "auto":
                with Probe(automatic, setting, num_workers, args.threads) as probe:
                    setting = probe()
            settings.append(setting)
    return settings


def worker_counts(args: argparse.Namespace, model: str) -> list[int]:
    """The fleet sizes to time: those that were asked for, or the usual ones; what does not fit is skipped."""
    if args.workers:
        counts = args.workers
    elif args.device != "cpu":
        counts = [16]
    else:
        counts = [n for n in WORKERS if n <= MOST_WORKERS[model]]
    row_mib = 4 * RowLayout(build_model(model)).D / MIB
    room = 0.7 * machine_memory(torch.device(args.device))
    for n in counts:
        if MATRICES * n * row_mib > room:
            print(f"{model}, N = {n}: skipped, {MATRICES * n * row_mib:.0f} MiB do not fit in this machine")
    return [n for n in counts if MATRICES * n * row_mib <= room]


COLUMNS = {
    "model": (9, lambda r: r["model"]),
    "N": (5, lambda r: r["workers"]),
    "execution": (26, lambda r: r["execution"]),
    "steps/s": (8, lambda r: f"{r['node_steps_per_second']:.1f}"),
    "/limit": (7, lambda r: f"{r['ratio_limit']:.2f}"),
    "/plain": (7, lambda r: f"{r['ratio_plain']:.2f}"),
    "spread": (6, lambda r: f"{r['spread']:.0%}"),
    "gossip": (7, lambda r: f"{r['gossip_share']:.1%}"),
    "us/worker": (9, lambda r: f"{r['gossip_us_per_worker']:.1f}"),
    "GB/s": (6, lambda r: f"{r['gossip_gb_per_second']:.1f}"),
    "copy GB/s": (9, lambda r: f"{r['copy_gb_per_second']:.1f}"),
    "copies": (6, lambda r: f"{r['gossip_in_copies']:.1f}"),
    "peak MiB": (8, lambda r: f"{r['peak_memory_mib']:.0f}"),
}
LEGEND = """
steps/s    node-steps a second, gossip included; spread: (largest - smallest) / median of the turns
/limit     over {limit}
/plain     over {plain}
gossip     share of a round; us/worker: its time over N; GB/s: bytes it reads and writes a second
copies     gossip's time over that of a plain copy of the fleet's matrix on as many threads
peak MiB   {peak}
"""
MEANING = {
    "cpu": {
        "limit": "bare processes, one a thread of the fleet, in the same layout and precision",
        "plain": "the same processes in nchw and float32",
        "peak": "resident in the fleet's process, PyTorch itself included",
    },
    "cuda": {
        "limit": "one bare model at batch 32 N, in the same layout and precision",
        "plain": "a bare loop over N models, in the same layout and precision",
        "peak": "allocated on the GPU by the fleet's process",
    },
}


def print_row(row: dict[str, Any] | None) -> None:
    """One line of the table (None: the names of the columns)."""
    widths = [width for width, _ in COLUMNS.values()]
    print(
        line([name if row is None else text(row) for name, (_, text) in COLUMNS.items()], widths), flush=True
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:K (default: cpu)")
    parser.add_argument(
        "--models", nargs="+", default=None, help=f"of {', '.join(IMAGE_SHAPES)} (default: all)"
    )
    parser.add_argument(
        "--workers", nargs="+", type=int, help="fleet sizes (default: 4 to 1024, less for large models)"
    )
    parser.add_argument(
        "--executions", nargs="+", help="ENGINE/LAYOUT, as threads/channels_last or vmap/nchw; or auto"
    )
    parser.add_argument(
        "--whole", action="store_true", help="main.py from start to plots, against bare loops (default: of the cnn)"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="that bare loops take for --whole (default: 5)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core"
    )
    parser.add_argument("--amp", action="store_true", help="time bfloat16 as well")
    parser.add_argument(
        "--augment", default="none", choices=("none", "crop", "crop_flip"), help="the fleet's data"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="that each side of a row is timed (default: 3)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns that they are split into (default: 5)")
    parser.add_argument("--quick", action="store_true", help="small fleets, a fraction of a second each")
    parser.add_argument("--out", default="results/benchmarks/training.json", help="JSON file to write")
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds, args.repeats, args.workers = 0.2, 2, args.workers or [2 if args.whole else 4]
    if min(args.threads, args.repeats, *(args.workers or [1])) < 1 or args.seconds <= 0:
        raise UsageError("--threads, --repeats, --workers and --seconds must be positive.")
    if args.minutes <= 0:
        raise UsageError("--minutes must be positive.")
    if args.whole and (args.device != "cpu" or set(args.models or []) & {"mlp", "mlp_wide"}):
        raise UsageError("--whole trains a network for colour pictures on a CPU: leave out --device, --models mlp.")
    args.models = args.models or (["cnn"] if args.whole else list(IMAGE_SHAPES))
    for model in args.models:
        choose(IMAGE_SHAPES, model, "model (--models)")
    for name in args.executions or []:
        choose(dict.fromkeys(EXECUTIONS), name, "execution (--executions)")
    if args.device.partition(":")[0] not in MEANING:
        raise UsageError(f"unknown device '{args.device}': use cpu, cuda or cuda:K.")
    if args.device != "cpu" and (torch.device(args.device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device '{args.device}' is not there: use --device cpu.")
    return args


def whole(args: argparse.Namespace) -> int:
    """``--whole``: measure, print, write. Returns the exit code."""
    size = QUICK if args.quick else Size(args.minutes)
    if args.workers:
        size = dataclasses.replace(size, workers=args.workers[0])
    rows = []
    for model in args.models:
        for amp in (False, True) if args.amp else (False,):
            rows.append(measure_whole(model, size, args.threads, amp))
            print(describe_whole(rows[-1]), flush=True)
    write_json(args.out, {"machine": machine(torch.device("cpu")), "settings": vars(args), "bar": BAR, "rows": rows})
    print(args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    try:
        args = parse(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.whole:
        return whole(args)
    device = torch.device(args.device)
    compare = compare_on_cpu if device.type == "cpu" else compare_on_gpu
    record: dict[str, Any] = {"machine": machine(device), "settings": vars(args), "limits": [], "rows": []}
    print("  ".join(f"{key}: {value}" for key, value in record["machine"].items() if key != "versions"))
    print(LEGEND.format(**MEANING[device.type]))
    print_row(None)
    for model in args.models:
        compare(args, model, record)
    record["bars"] = check_bars(record["rows"], BARS if device.type == "cpu" else GPU_BARS)
    if args.amp and device.type == "cpu" and not record["machine"]["fast_bf16"]:
        print("\nthis processor has no bf16 instructions: the bar of --amp does not apply")
        record["bars"] = [c for c in record["bars"] if "bf16" not in c["execution"]]
    print("\n" + "\n".join(describe(check) for check in record["bars"]))
    write_json(args.out, record)
    print(f"\n{args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
