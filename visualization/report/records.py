"""The records of a run, each read once, and its pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from utils.effects import asks_graph
from utils.records import read_json, read_partition
from visualization.checked import (
    load_audit,
    load_comparison,
    load_corruption,
    load_lines,
    load_node_view,
    load_shown,
    load_summary,
)
from visualization.comparison_plots import comparisons_of
from visualization.measures import Measure, Shown
from visualization.report.parts import Picture
from visualization.samples import owners_of


class Records:
    """What lies in the folder of a run, results/NAME. Raises UsageError where a record is damaged."""

    def __init__(self, folder: Path, stage: Path) -> None:
        self.folder, self.stage = folder, stage
        self.shown: Shown = load_shown(stage)
        self.metric: Measure = self.shown.metric
        self.lines = load_lines(stage)
        self.summary = json(stage / "summary.json")
        self.figures = load_summary(stage) if self.summary else {}
        self.config_file = json(stage / "config.json")
        self.config: dict[str, Any] = self.config_file.get("config") or {}
        self.bad = load_corruption(stage)
        self.audit = load_audit(folder) if (folder / "audit.json").is_file() else None
        self.audit_file = json(folder / "audit.json")
        self.comparisons = [load_comparison(path) for path in comparisons_of(folder)]
        views = map(load_node_view, sorted(folder.glob("node_view_*.json")))
        self.node_views = {view["algorithm"]: view for view in views}
        self.owners = owners_of(stage, self.workers)

    @property
    def workers(self) -> int:
        """How many train."""
        found = [len(line[key]) for line in self.lines for key in line if key.startswith("worker_val")]
        return int(self.config.get("num_workers") or (found[0] if found else 1))

    @property
    def size(self) -> int | None:
        """How many samples are trained on; None where no record says it."""
        return sum(map(len, read_partition(self.stage))) if (self.stage / "partition.npz").is_file() else None

    @property
    def has_graph(self) -> bool:
        """Whether workers have neighbours: a server's clients have none."""
        known = {"protocol", "chain_order"} <= self.config.keys()
        return self.workers > 1 and (not known or asks_graph(SimpleNamespace(**self.config)))

    @property
    def scored(self) -> list[str]:
        """The methods whose scores lie here."""
        return sorted({path.stem for path in self.folder.glob("influence/*.zarr")} - {"edges"})


def json(path: Path) -> dict[str, Any]:
    """A record; empty where there is none."""
    return read_json(path) if path.is_file() else {}


def pictures(folder: Path, *names: str) -> list[Picture]:
    """Those of these pictures that were drawn."""
    files = [folder / f"{name}.png" for name in names]
    return [Picture(file, _alt(file.stem)) for file in files if file.is_file()]


ALTS = {
    "class_mix": "Share of each class in each worker's samples",
    "topology": "The graph of the workers, coloured by how good each is",
    "confusion": "Which class the model takes for which on the test set",
    "predictions": "Predicted against true values of the test samples",
    "auroc": "Area under the ROC curve of each finding",
    "stages": "How the network is cut into stages",
    "finetune": "Each worker before and after fine-tuning on its own data",
    "edges": "The graph with what each edge did: which helped, which harmed, and when",
    "audit": "Predicted against actual change of the validation loss, for each method",
    "sweep": "How good models are by the share of samples kept",
    "comparison": "All prunings of this run side by side",
    "values": "What each institution's data are worth, by each method and by the truth",
    "costs": "How near each method is to the truth, and how long it takes",
    "samples": "The samples of the highest and lowest value",
    "payout": "What each worker's data did to the models, and what it is paid",
    "policies": "How many hops each way to choose the next node needs",
    "walk": "One walk of the model from node to node",
    "learning": "How the agent learned, walk by walk",
    "seeds": "Curves of all seeds, their mean and standard deviation",
}


def _alt(stem: str) -> str:
    """A picture in words."""
    for start, text in (
        ("scores_", "How the scores of {} are spread, by class and worker"),
        ("extremes_", "The samples that helped and harmed most by {}"),
        ("node_view_", "What each worker's data did by {}, and whom they reached"),
        ("comparison_", "Stage 1, random control and stage 2: {}"),
    ):
        if stem.startswith(start):
            return text.format(stem.removeprefix(start).replace("_", ", "))
    return ALTS.get(stem, stem)
