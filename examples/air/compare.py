"""PM10 at 69 stations: gossip between stations against a server, each alone, all data in one place, and two forecasts
that need no network.

    python examples/air/compare.py                 3 seeds; a second call takes up what is there

Figures are on the same windows of the last quarter of the years. 'Own' is each station's model on that station's
windows; 'one model' is the one that a run leaves (the mean of the stations', or the server's) on all windows.

Legend: N stations that train, m test windows, H days ahead.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: parallel over workers, not inside operators
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from data.dataset_loader import Dataset
from training.pruning import Stage1, open_stage1
from utils.parser import parse
from utils.pruning_args import PruningConfig
from utils.records import write_json
from workers.evaluation import predictions

# Rates and epochs were chosen for each way by the validation windows of seed 10, which is none of those reported.
COMMON = "--dataset_name air --model lstm --target consensus --resume --quiet --no-plots".split()
STATIONS = "--partition natural --batch_size 8 --epochs 6".split()
WAYS = {
    "gossip, 8 nearest": [*STATIONS, *"--lr 0.2 --mode nearest --neighbors 8".split()],
    "fedavg, 6 rounds": [*STATIONS, *"--lr 0.1 --protocol fedavg".split()],  # a round is an epoch
    "local": [*STATIONS, *"--lr 0.02 --protocol local".split()],
    "centralized": "--protocol local --num_workers 1 --partition iid --batch_size 128 --epochs 3 --lr 0.1".split(),
}


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--results", type=Path, default=Path("results/air"), help="where runs, figures and picture go")
    asked = parser.parse_args()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    figures, gained, last = {}, [], None
    for seed in range(asked.seeds):
        own = {}
        for way, flags in WAYS.items():
            stage1 = trained(asked.results, way, flags, seed)
            figures[f"{way}, seed {seed}"], own[way] = measured(stage1)
            print(f"{way}, seed {seed}:", *(f"{k} {v:.3f}" for k, v in figures[f"{way}, seed {seed}"].items()))
            if seed == 0 and way.startswith("gossip"):
                last = stage1
        gained.append(own["gossip, 8 nearest"] - own["local"])
        data = last.job.dataset
        figures[f"linear autoregression, seed {seed}"] = against(data, linear(last))
        figures[f"the last value stays, seed {seed}"] = against(data, data.test_targets_m[:, 1])
    influence_N = by_owner(last)
    write_json(asked.results / "figures.json", {"figures": figures, "influence": influence_N.tolist()})
    print(table(figures, asked.seeds))
    names = [last.job.dataset.owners.names[g] for g in last.job.owners]
    order = np.argsort(influence_N)
    print("most helpful:", *(f"{names[k]} {influence_N[k]:+.2g}" for k in order[:-6:-1]))
    print("least helpful:", *(f"{names[k]} {influence_N[k]:+.2g}" for k in order[:5]))
    draw(last, np.mean(gained, 0), influence_N, asked.results / "stations.png")


def trained(results: Path, way: str, flags: list[str], seed: int) -> Stage1:
    """The finished run, trained now where there is none."""
    name = f"{way.partition(',')[0]}-{seed}"
    where = ["--results_dir", str(results), "--run_name", name, "--seed", str(seed)]
    return open_stage1(parse(PruningConfig, [*COMMON, *flags, *where], __doc__))


def measured(stage1: Stage1) -> tuple[dict[str, float], np.ndarray]:
    """RMSE and skill of the run's one model (none, where everybody stays alone) and of each station's own; and the
    skill of each station's own [N]."""
    job, data, rows_ND = stage1.job, stage1.job.dataset, stage1.run.final()
    found = {} if job.owners and job.config.protocol == "local" else {
        "rmse": stage1.summary["test_rmse"], "skill": stage1.summary["test_skill"]
    }  # fmt: skip
    if job.owners is None:
        return found, np.zeros(0)
    errors, skills = [], []
    for k, owner in enumerate(job.owners):
        ids = (data.owners.test_owner_m == owner).nonzero()[:, 0]
        if len(ids):
            forecast_mH = predictions(job.engine, rows_ND[k : k + 1], job.test_samples, ids)[0]
            errors.append(squares(data, forecast_mH, ids))
        skills.append(1 - float(np.divide(*errors[-1].mean(1))) if len(ids) else np.nan)
    model, persistence = np.concatenate(errors, 1)
    found |= {"own rmse": float(model.mean() ** 0.5), "own skill": float(1 - model.mean() / persistence.mean())}
    return found, np.array(skills)


def squares(data: Dataset, forecast_mH: Tensor, ids: Tensor) -> np.ndarray:
    """Mean squared errors of test windows [2, m]: of a forecast, and of the last value."""
    values_mH, stays_mH = data.test_targets_m[ids].double().unbind(1)
    return np.stack([(f - values_mH).square().mean(1).numpy() for f in (forecast_mH.double(), stays_mH)])


def against(data: Dataset, forecast_mH: Tensor) -> dict[str, float]:
    """RMSE and skill of a forecast of all test windows."""
    model, persistence = squares(data, forecast_mH, torch.arange(len(forecast_mH))).mean(1)
    return {"rmse": float(model**0.5), "skill": float(1 - model / persistence)}


def linear(stage1: Stage1) -> Tensor:
    """Least squares on what the training windows of all stations show, the calendar left out: forecasts [m, H]."""
    data, ids = stage1.job.dataset, stage1.job.train_ids

    def design(inputs_nTF: Tensor) -> Tensor:
        values_nT, known_nT = inputs_nTF[..., 0].nan_to_num(), inputs_nTF[..., 1]
        return torch.cat([values_nT, known_nT, torch.ones(len(known_nT), 1)], 1).double()

    weights = torch.linalg.lstsq(design(data.inputs_n[ids]), data.targets_n[ids, 0].double(), driver="gelsd").solution
    return design(data.test_inputs_m) @ weights


def by_owner(stage1: Stage1) -> np.ndarray:
    """What each station's data did [N], by cascade: by how much the validation loss of the mean model would rise
    without them."""
    scores_n, _ = stage1.scores("cascade")
    return np.array([float(scores_n[shard].sum()) for shard in stage1.job.shards])


def table(figures: dict[str, dict[str, float]], seeds: int) -> str:
    """Markdown: means over the seeds, with the ends."""
    columns = ("rmse", "skill", "own rmse", "own skill")
    lines = ["| | RMSE, one model | skill | RMSE, own | skill, own |", "| --- | --- | --- | --- | --- |"]
    for way in dict.fromkeys(name.rpartition(", seed")[0] for name in figures):
        runs = [figures[f"{way}, seed {seed}"] for seed in range(seeds)]
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            digits = 2 if "rmse" in column else 3
            spread = f" [{min(values):.{digits}f}, {max(values):.{digits}f}]" if values and np.ptp(values) > 0 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}" if values else "")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(stage1: Stage1, gained_N: np.ndarray, influence_N: np.ndarray, path: Path) -> None:
    """The map of stations and links twice: skill gained over being alone, and what the data of each did."""
    lines = [line.split(",") for line in (Path(__file__).parent / "stations.csv").read_text().split()[1:]]
    at = {name: (float(x), float(y)) for name, x, y in lines}
    x_N, y_N = np.array([at[stage1.job.dataset.owners.names[g]] for g in stage1.job.owners]).T
    sizes_N = 15 + 120 * np.sqrt(np.array([len(shard) for shard in stage1.job.shards]) / 2500)
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.6), constrained_layout=True)
    panels = (
        (gained_N, "Skill on own days, gained over training alone", 0.9),
        (influence_N, "Influence of the station's data\n(rise of the loss without them)", 0.95),
    )
    for axis, (values_N, title, quantile) in zip(axes, panels, strict=True):
        for i, j in stage1.job.topology.edges():
            axis.plot(x_N[[i, j]], y_N[[i, j]], color="0.85", linewidth=0.5, zorder=1)
        most = np.nanquantile(np.abs(values_N), quantile)
        dots = axis.scatter(x_N, y_N, sizes_N, values_N, cmap="RdBu", vmin=-most, vmax=most, edgecolors="0.3",
                            linewidths=0.6, zorder=2)  # fmt: skip
        figure.colorbar(dots, ax=axis, shrink=0.7, extend="both")
        axis.set(title=title, xlabel="longitude", ylabel="latitude", aspect=1 / np.cos(np.radians(51)))
    figure.suptitle("69 stations, links to the 8 nearest; larger: more training days")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
