"""Prunings of several seeds, summed up in the folder above them: means, deviations and a sheet.

Legend: S seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.records import write_json


def spread(values_S: Sequence[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves; figures that are missing are left out."""
    there = [v for v in values_S if v is not None]
    return {
        "mean": statistics.mean(there) if there else None,
        "std": statistics.stdev(there) if len(there) > 1 else None,
        "values": list(values_S),
    }


def summarize_comparisons(folder: Path, records: list[dict[str, Any]]) -> str:
    """comparison.json over seeds; returns it as a line."""
    columns = {f"{stage}_test_accuracy": [r[stage]["test_accuracy"] for r in records] for stage in ("stage1", "stage2")}
    columns["difference"] = [r["difference"]["test_accuracy"] for r in records]
    means = {name: spread(values) for name, values in columns.items()}
    write_json(folder / "comparison.json", {"seeds": len(records), **means})
    gain = means["difference"]
    return f"stage 2 - stage 1 over {len(records)} seeds: {gain['mean']:+.4f} +- {gain['std']:.4f}; {folder}"


def summarize_sweeps(folder: Path, records: list[dict[str, Any]]) -> str:
    """sweep.json over seeds (means and deviations in the place of one seed's accuracies); returns it as lines."""
    methods, lines = {}, []
    for name in records[0]["methods"]:
        by_ratio = [spread(v) for v in zip(*(r["methods"][name]["test_accuracy"] for r in records), strict=True)]
        methods[name] = {
            "test_accuracy": [s["mean"] for s in by_ratio],
            "test_accuracy_std": [s["std"] for s in by_ratio],
        }
        pairs = zip(records[0]["ratios"], by_ratio, strict=True)
        lines.append(f"{name:8s} " + "  ".join(f"{r:g}: {s['mean']:.4f} +- {s['std']:.4f}" for r, s in pairs))
    stage1 = spread([r["stage1"]["test_accuracy"] for r in records])
    record = {
        "seeds": len(records),
        "ratios": records[0]["ratios"],
        "methods": methods,
        "stage1": {"test_accuracy": stage1["mean"], "test_accuracy_std": stage1["std"]},
    }
    write_json(folder / "sweep.json", record)
    return "\n".join([f"accuracy by share kept, {len(records)} seeds:", *lines])


def summarize_audits(folder: Path, records: list[dict[str, Any]]) -> str:
    """audit.json over seeds: the LDS of each; returns it as lines."""
    methods = {name: {"lds": spread([r["methods"][name]["lds"] for r in records])} for name in records[0]["methods"]}
    write_json(folder / "audit.json", {"seeds": len(records), "methods": methods})
    lines = [f"{n:8s} {m['lds']['mean']:.3f} +- {m['lds']['std']:.3f}" for n, m in methods.items()]
    return "\n".join([f"LDS over {len(records)} seeds ({folder / 'audit.json'}):", *lines])


SUMMARIES = {"audit": summarize_audits, "sweep": summarize_sweeps, "comparison": summarize_comparisons}
