"""Which language is spoken? Gossip, fedavg, local and centralized training on telephone prompts, and whose data help.

    python examples/speech/compare.py SOUNDS [--seeds 0 1 2] [further flags of main.py]

SOUNDS is what sounds.py left. Everything is put below results/speech: the runs, table.md and speech.png.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # 'python examples/speech/compare.py' finds the rooms
os.environ.setdefault("OMP_NUM_THREADS", "1")

import main as train_command  # noqa: E402
from training.pruning import node_view, open_stage1, stage1_config  # noqa: E402
from utils.errors import UsageError, refusal  # noqa: E402
from utils.parser import parse  # noqa: E402
from utils.pruning_args import PruningConfig  # noqa: E402
from utils.records import read_confusion, read_json, read_labels, read_metrics, read_partition  # noqa: E402
from visualization.style import BLUE, GREY, RED, category, save, style  # noqa: E402

RESULTS = ROOT / "results" / "speech"
SETTINGS = (
    "--dataset_name audiofolder --sound_seconds 1 --max_train 1000 --val_fraction 0.2 --model lstm_mean "
    "--batch_size 16 --lr 0.5 --epochs 6 --engine threads --no-plots --quiet"
).split()
GOSSIP = "gossip on a ring"
METHODS = {
    "centralized": "--protocol local --num_workers 1 --partition iid",
    GOSSIP: "--protocol gossip --mode ring --alpha 0.5 --engine vmap",
    "fedavg": "--protocol fedavg --alpha 0.5",
    "local": "--protocol local --alpha 0.5",
}
SAME_VOICE = ("english", "spanish")


def main() -> int:
    """Train, score, leave owners out; print the table and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sounds", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reuse", action="store_true", help="take what an interrupted comparison has finished")
    parser.add_argument("--scored", type=int, default=1, help="seeds whose owners are scored: it takes the longest")
    args, further = parser.parse_known_args()
    flags = [*SETTINGS, "--dataset_path", str(args.sounds.resolve()), "--results_dir", str(RESULTS), *further]
    accuracy = {name: [] for name in METHODS}
    for name, own in METHODS.items():
        for seed in args.seeds:
            run_dir = train(flags, f"{slug(name)}_{seed}", seed, own, args.reuse)
            accuracy[name].append(measured(run_dir, each=name == "local"))
    owners = [helpers(flags, seed, args.reuse) for seed in args.seeds[: args.scored]]
    text = table(accuracy, [RESULTS / f"{slug(GOSSIP)}_{s}" / "stage1" for s in args.seeds], owners)
    (RESULTS / "table.md").write_text(text)
    print(text)
    print(f"the picture: {draw(accuracy, owners, RESULTS / 'speech.png')}")
    return 0


def slug(name: str) -> str:
    """The name of a method's runs."""
    return name.split()[0]


def train(flags: list[str], name: str, seed: int, own: str, reuse: bool) -> Path:
    """main.py, as a user would type it, but in this process: loading packages takes longer than the training. Returns
    the run directory. ``reuse``: take a finished run of this name."""
    run_dir = RESULTS / name / "stage1"
    if not (reuse and (run_dir / "summary.json").exists()):
        argv = [*flags, "--overwrite", "--run_name", name, "--seed", str(seed), *own.split()]
        print(f"python main.py {' '.join(argv)}", flush=True)
        if code := train_command.main(argv):
            sys.exit(code)
    return run_dir


def measured(run_dir: Path, each: bool) -> float:
    """Test accuracy of the consensus model, or of ``each`` worker's model on average."""
    summary = read_json(run_dir / "summary.json")
    return float(np.mean(summary["worker_test_accuracy"]) if each else summary["test_accuracy"])


def helpers(flags: list[str], seed: int, reuse: bool) -> dict:
    """What each owner's clips did to the gossip run's validation loss: the sums that ``cascade`` predicts, and what
    happens when those of the owner that helps least and most are left out."""
    name, gossip = f"{slug(GOSSIP)}_{seed}", METHODS[GOSSIP].split()
    run_dir = RESULTS / name / "stage1"
    argv = [*flags, *gossip, "--run_name", name, "--seed", str(seed), "--pruning_algorithm", "cascade"]
    stage1 = open_stage1(stage1_config(parse(PruningConfig, argv, __doc__)))
    influence_N = np.array(read_json(node_view(stage1, "cascade"))["worker_influence"])
    shards, before = read_partition(run_dir), loss_of_nodes(run_dir)
    labels_n, languages = read_labels(run_dir)
    changes = {}
    for k in (int(influence_N.argmin()), int(influence_N.argmax())):
        file = RESULTS / f"owner_{seed}_{k}.txt"
        file.write_text("\n".join(map(str, shards[k].tolist())))
        without = train(flags, f"without_{seed}_{k}", seed, f"{METHODS[GOSSIP]} --drop_samples {file}", reuse)
        changes[k] = loss_of_nodes(without) - before, measured(without, False) - measured(run_dir, False)
    mixes = [np.bincount(labels_n[shard], minlength=len(languages)) for shard in shards]
    return {"seed": seed, "influence": influence_N, "clips": mixes, "languages": languages, "changes": changes}


def loss_of_nodes(run_dir: Path) -> float:
    """The mean validation loss of the workers' models at the end."""
    return float(read_metrics(run_dir)[-1]["val_loss"])


def table(accuracy: dict[str, list[float]], gossip: list[Path], owners: list[dict]) -> str:
    """What the README shows, as markdown."""
    counts = sum(read_confusion(run_dir)[0] for run_dir in gossip)
    names = read_confusion(gossip[0])[1]
    lines = ["| training | test accuracy | each seed |", "| --- | --- | --- |"]
    for name, values in accuracy.items():
        each = ", ".join(f"{v:.3f}" for v in values)
        deviation = np.std(values, ddof=min(1, len(values) - 1))
        lines.append(f"| {name} | {np.mean(values):.3f} ± {deviation:.3f} | {each} |")
    lines.append(f"| chance (the most frequent language) | {counts.sum(1).max() / counts.sum():.3f} | |")
    pair = [names.index(name) for name in SAME_VOICE]
    of_pair = counts[pair]
    lines += [
        "",
        f"Gossip, clips in {' and '.join(SAME_VOICE)} (one voice): {of_pair[:, pair].trace() / of_pair.sum():.3f} told "
        f"right, {(of_pair[0, pair[1]] + of_pair[1, pair[0]]) / of_pair.sum():.3f} taken for the other of the two.",
    ]
    if owners:
        lines += [
            "",
            "| seed | owner left out | clips | influence: predicted rise | validation loss | test accuracy |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    for one in owners:
        for what, (k, (loss, points)) in zip(("least", "most"), one["changes"].items(), strict=False):
            cells = f"{one['clips'][k].sum()} | {one['influence'][k]:+.3f} | {loss:+.3f} | {points:+.3f}"
            lines.append(f"| {one['seed']} | {k}, which helps {what} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(accuracy: dict[str, list[float]], owners: list[dict], out: Path) -> Path:
    """Accuracy by method, and for the first seed that is scored whose data help: languages and influence by owner."""
    with style():
        figure = Figure(figsize=(10, 3.6) if owners else (5, 3.2))
        left, *others = figure.subplots(1, 3, width_ratios=(1.1, 1, 1)) if owners else [figure.subplots()]
        for i, (name, values) in enumerate(accuracy.items()):
            left.barh(i, np.mean(values), color=BLUE, alpha=0.35)
            left.plot(values, [i] * len(values), "o", color=BLUE, markersize=5)
            left.text(0.02, i, f"{name}  {np.mean(values):.3f}", va="center")
        left.axvline(0.2, color=GREY, linestyle="--")
        left.text(0.21, -0.62, "chance", color="#555555", fontsize=8, va="center")
        left.set(title="Which language?", xlabel="test accuracy, 3 seeds" if len(values) == 3 else "test accuracy",
                 xlim=(0, 1), ylim=(len(accuracy) - 0.4, -0.8), yticks=[])  # fmt: skip
        if owners:
            draw_owners(*others, owners[0])
        return save(figure, out)


def draw_owners(middle: Axes, right: Axes, one: dict) -> None:
    """The languages of each owner's clips, and what they did to the validation loss."""
    order = one["influence"].argsort()[::-1]
    place = np.arange(len(order))
    begin = np.zeros(len(order))
    for c, language in enumerate(one["languages"]):
        count = np.array([one["clips"][k][c] for k in order])
        middle.barh(place, count, left=begin, color=category(c)["color"], label=language)
        begin += count
    middle.set(title=f"What owners have (seed {one['seed']})", xlabel="clips", ylabel="owner",
               yticks=place, yticklabels=[str(k) for k in order], xlim=(0, begin.max() * 1.05))  # fmt: skip
    middle.invert_yaxis()
    middle.legend(fontsize=7, loc="lower right", frameon=True, framealpha=0.9)
    values = one["influence"][order]
    right.barh(place, values, color=[BLUE if v > 0 else RED for v in values])
    right.axvline(0, color="#666666", linewidth=0.8)
    right.set(title="Whose data help (cascade)", xlabel="influence: helps where positive",
              yticks=place, yticklabels=[str(k) for k in order])  # fmt: skip
    right.invert_yaxis()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        sys.exit(refusal(error))
