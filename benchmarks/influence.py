"""What influence scores cost, against training and against the work that cannot be avoided.

    python -m benchmarks.influence                       some minutes on 2 cores
    python -m benchmarks.influence --quick               smaller runs, two turns
    python -m benchmarks.influence --models mlp cnn
    python -m benchmarks.influence --device cuda         the same on a GPU

Every part of scoring a short run is timed in one process, on the fleet that trained it (same layout and
threads); the parts take turns, and every ratio is the median over the turns. With N workers, r hops:

    dice       all n scores at one scored step, over (r+1) N validation gradients + one pass over the training
               data at a training step's price + (r-1) N Hessian-vector products
    delete     one checkpoint, over one such pass
    cascade    the backward walk with all states kept, over the whole training; and what replaying the states
               from the snapshots of stage 1 adds to it
    if         over one forward pass + pyDVL on features; and against pyDVL on the frozen ResNet18
    naive      1-hop dice with validation gradients anew and a gradient of its own for every sample (one sample
               timed and counted for all)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; the measuring processes inherit it

import torch

from benchmarks.common import Probe, line, machine, median_ratio, spread, take_turns
from benchmarks.influence_probes import HOPS, Case, last_layer_alone, scored_run
from training.execution import find_device
from utils.errors import UsageError, choose
from utils.records import write_json

CASES = {
    "mlp": [Case("mlp", "digits", 8, 32, 1294, 4, 0.1, "vmap", False)],
    "cnn": [
        Case("cnn", "digits", 8, 32, 1294, 2, 0.1, "threads", True),
        Case("cnn", "3x32x32", 8, 32, 768, 2, 0.1, "threads", True),
    ],
    "resnet18": [Case("resnet18", "3x32x32", 2, 8, 64, 1, 0.01, "threads", True)],
}
PARTS = ["training", "pass", "validation", "product", *(f"dice_{r}" for r in HOPS), "delete"]
PARTS += ["cascade", "cascade_replayed", "if", "if_forward", "if_pydvl", "dice_naive"]
MEANING = {
    "training": "the whole training",
    "pass": "one pass over the training data, in training steps",
    "validation": "validation gradients of all workers",
    "product": "Hessian-vector products of all workers",
    **{f"dice_{r}": f"dice, {r} hop{'s' * (r > 1)}, a scored step" for r in HOPS},
    "delete": "delete, a checkpoint",
    "cascade": "cascade, states kept",
    "cascade_replayed": "cascade, states replayed",
    "if": "if",
    "if_forward": "one forward pass over train and validation",
    "if_pydvl": "pyDVL on features",
    "dice_naive": "dice, 1 hop, naive",
}
NOISE = 1.1  # the bar of `if` is an identity, and single timings of its parts vary by 20 %


def ratios(turns: dict[str, list[float]], convolutional: bool) -> list[dict[str, Any]]:
    """Each figure of the module documentation, from the seconds of all turns, with its bar."""
    columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in turns.items()}

    def check(part: str, figure: str, value: Any, limit: Any, bound: float) -> dict[str, Any]:
        ratio = median_ratio(value.tolist(), limit.tolist())
        return {"part": part, "figure": figure, "value": ratio, "bound": bound, "ok": ratio <= bound}

    def unavoidable(hops: int) -> Any:
        return (hops + 1) * columns["validation"] + columns["pass"] + (hops - 1) * columns["product"]

    added = columns["cascade_replayed"] - columns["cascade"]
    forward = columns["if_forward"] + columns["if_pydvl"]
    return [
        *(check(f"dice_{r}", "of the unavoidable work", columns[f"dice_{r}"], unavoidable(r), 1.3) for r in HOPS),
        check("delete", "of a pass", columns["delete"], columns["pass"], 1.5),
        check("cascade", "of training", columns["cascade"], columns["training"], 4.5 if convolutional else 2.5),
        check("cascade_replayed", "of training, added by replay", added, columns["training"], 1.0),
        check("if", "of forward pass + pyDVL", columns["if"], forward, NOISE),
    ]


def measure_case(
    case: Case, threads: int, seconds: float, repeats: int, enough: float, device: str
) -> dict[str, Any]:
    """One run: the medians of all its parts, and the ratios with their bars."""
    with Probe(scored_run, case, threads, seconds, device) as probe:
        row = probe()
        answers = take_turns({part: lambda part=part: probe(part) for part in PARTS}, repeats, enough)
    turns = {part: [answer["seconds"] for answer in values] for part, values in answers.items()}
    return {
        **row,
        "model": case.model,
        "threads": threads,
        "seconds": {part: statistics.median(values) for part, values in turns.items()},
        "peak_mib": {part: min(answer["peak_mib"] for answer in values) for part, values in answers.items()},
        "spread": {part: spread(values) for part, values in turns.items()},
        "naive_over_dice": median_ratio(turns["dice_naive"], turns["dice_1"]),
        "checks": ratios(turns, convolutional=not case.model.startswith("mlp")),
        "turns": turns,
    }


def measure_last_layer(quick: bool) -> dict[str, Any]:
    """``if`` on features against pyDVL on the frozen ResNet18, with its bars."""
    with Probe(last_layer_alone, "resnet18", 64 if quick else 512, 32 if quick else 256) as probe:
        record = probe()
    bars = {"speedup": ("times as fast as pyDVL on the frozen network", 10.0), "spearman": ("with its scores", 0.999)}
    checks = [
        {"part": "if", "figure": figure, "value": record[name], "bound": bound, "ok": record[name] >= bound}
        for name, (figure, bound) in bars.items()
    ]
    return {**record, "case": "resnet18 3x32x32", "checks": checks}


def describe(case: str, check: dict[str, Any], sign: str = "<=") -> str:
    """A ratio beside its bar, as one line."""
    verdict = "ok" if check["ok"] else "missed"
    values = f"{check['value']:.4g} {sign} {check['bound']:g}"
    return f"{verdict:6}  {case}: {MEANING[check['part']]}: {values} {check['figure']}"


def print_row(row: dict[str, Any]) -> None:
    """The table of one run."""
    sizes = ", ".join(f"{row[name]} {name}" for name in ("samples", "validation", "steps", "floats"))
    widths = (52, 12, 12, 8, 9)
    print(f"\n{row['case']}, {row['threads']} threads: {sizes}")
    print(line(["", "seconds", "of training", "spread", "peak MiB"], widths))
    for part, seconds in row["seconds"].items():
        share, noise = seconds / row["seconds"]["training"], row["spread"][part]
        cells = [MEANING[part], f"{seconds:.4g}", f"{share:.3g}", f"{noise:.0%}", f"{row['peak_mib'][part]:.0f}"]
        print(line(cells, widths))
    print(f"naive dice costs {row['naive_over_dice']:.0f} times as much as dice\n")
    print("\n".join(describe(row["case"], check) for check in row["checks"]), flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.influence", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:K (default: cpu)")
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: 7)")
    parser.add_argument("--seconds", type=float, default=0.2, help="a part is repeated so long (default: 0.2)")
    parser.add_argument("--quick", action="store_true", help="smaller runs, two turns")
    parser.add_argument("--out", default="results/benchmarks/influence.json", help="JSON file to write")
    args = parser.parse_args(argv)
    for model in args.models:
        choose(CASES, model, "model (--models)")
    args.device = str(find_device(args.device))
    if min(args.threads, args.repeats) < 1 or args.seconds <= 0:
        raise UsageError("--threads, --repeats and --seconds must be positive.")
    if args.quick:
        args.repeats, args.seconds = 2, 0.02
    return args


def smaller(case: Case) -> Case:
    """The case for --quick: three steps."""
    return replace(case, samples=3 * case.workers * case.batch_size, epochs=1, val_fraction=case.val_fraction / 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    try:
        args = parse(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record: dict[str, Any] = {"machine": machine(torch.device(args.device)), "settings": vars(args), "rows": []}
    print("  ".join(f"{key}: {value}" for key, value in record["machine"].items() if key != "versions"))
    for model in args.models:
        for case in CASES[model]:
            case = smaller(case) if args.quick else case
            row = measure_case(case, args.threads, args.seconds, args.repeats, enough=240.0, device=args.device)
            record["rows"].append(row)
            print_row(row)
    if "resnet18" in args.models and args.device == "cpu":
        record["last_layer"] = last = measure_last_layer(args.quick)
        print("\n".join(describe(last["case"], check, ">=") for check in last["checks"]))
    record["load_average_after"] = os.getloadavg()[0]
    write_json(args.out, record)
    print(f"\n{args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
