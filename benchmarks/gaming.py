"""What does an owner of data gain by cheating, where rewards follow a value? From real runs.

    python -m benchmarks.gaming                              digits, 6 owners, 5 seeds
    python -m benchmarks.gaming --methods cascade size equal

Pictures of the digits are dealt to owners (Dirichlet 0.5), written as files with a manifest, and trained on by
federated averaging, once honestly and once for each way in which the first owner may cheat; all else is the same. A
method's values become shares of a budget as ``python -m ledger pay`` makes them (values below 0 count 0). Printed is
what the cheat changes: the first owner's share (of all its names together) minus its honest one, in percent of the
budget, mean over seeds with its 95 % interval.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    import numpy as np

METHODS = ("truth", "cascade", "delete", "ddval", "knn_game", "size", "equal")


@dataclass
class Pictures:
    """Pictures [n, 8, 8] with 16 levels, their labels [n], owners (by name) and splits."""

    pixels_n: list
    labels_n: list[int]
    owners_n: list[str]
    splits_n: list[str]
    rng: np.random.Generator = field(repr=False)

    def of(self, owner: str) -> list[int]:
        """An owner's training pictures."""
        rows = zip(self.owners_n, self.splits_n, strict=True)
        return [i for i, (name, split) in enumerate(rows) if name == owner and split == "train"]

    def add(self, i: int, owner: str) -> None:
        """A copy of a training picture."""
        self.pixels_n.append(self.pixels_n[i])
        self.labels_n.append(self.labels_n[i])
        self.owners_n.append(owner)
        self.splits_n.append("train")

    def write(self, folder: Path) -> None:
        """As files with a manifest."""
        from PIL import Image

        (folder / "pictures").mkdir(parents=True)
        with open(folder / "manifest.csv", "w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("file", "labels", "group", "split"))
            told = zip(self.pixels_n, self.labels_n, self.owners_n, self.splits_n, strict=True)
            for i, (pixels, label, owner, split) in enumerate(told):
                Image.fromarray(pixels).save(folder / "pictures" / f"{i:06d}.png")
                rows.writerow((f"pictures/{i:06d}.png", f"digit {label}", owner, split))


def duplicates(pictures: Pictures) -> None:
    """Every picture twice."""
    for i in pictures.of("a"):
        pictures.add(i, "a")


def sybils(pictures: Pictures) -> None:
    """Half of its pictures under another name."""
    seen = {"train": 0, "test": 0}
    for i, (owner, split) in enumerate(zip(pictures.owners_n, pictures.splits_n, strict=True)):
        if owner == "a" and split in seen:
            seen[split] += 1
            pictures.owners_n[i] = "a" if seen[split] % 2 else "a2"


def copies(pictures: Pictures) -> None:
    """All that a neighbour has as well."""
    for i in pictures.of("b"):
        pictures.add(i, "a")


def noise(pictures: Pictures) -> None:
    """Its pictures with noise (half of the range)."""
    import numpy as np

    for i in pictures.of("a"):
        noisy = pictures.pixels_n[i] + pictures.rng.normal(0, 127, pictures.pixels_n[i].shape)
        pictures.pixels_n[i] = noisy.clip(0, 255).astype(np.uint8)


def flips(pictures: Pictures) -> None:
    """Three of ten of its labels are wrong."""
    ids = pictures.of("a")
    for i in pictures.rng.permutation(ids)[: round(0.3 * len(ids))]:
        pictures.labels_n[i] = int((pictures.labels_n[i] + pictures.rng.integers(1, 10)) % 10)


CHEATS: dict[str, Callable[[Pictures], None]] = {
    "every picture twice": duplicates, "two names": sybils, "a neighbour's pictures too": copies, "noise": noise,
    "30 % wrong labels": flips,
}  # fmt: skip


def dealt(seed: int, owners: int) -> Pictures:
    """The digits: a fifth for the test and a tenth for validation, of all owners alike; the rest dealt."""
    import numpy as np
    from sklearn.datasets import load_digits

    found, rng = load_digits(), np.random.default_rng(seed)
    names = [chr(ord("a") + k) for k in range(owners)]
    order = rng.permutation(len(found.target))
    splits, of = np.full(len(order), "train", object), np.full(len(order), "", object)
    splits[order[: len(order) // 5]], splits[order[len(order) // 5 : 3 * len(order) // 10]] = "test", "val"
    for c in range(10):
        ids = rng.permutation(np.flatnonzero((found.target == c) & (splits == "train")))
        cuts = (np.cumsum(rng.dirichlet([0.5] * owners))[:-1] * len(ids)).astype(int)
        for name, part in zip(names, np.split(ids, cuts), strict=True):
            of[part] = name
    held_out = np.flatnonzero(splits != "train")
    of[held_out] = [names[i % owners] for i in range(len(held_out))]
    for name in names:  # too few to train on
        mine = np.flatnonzero((of == name) & (splits == "train"))
        if len(mine) < 20:
            largest = max(names, key=lambda other: int(((of == other) & (splits == "train")).sum()))
            of[np.flatnonzero((of == largest) & (splits == "train"))[: 20 - len(mine)]] = name
    pixels = [(image * 15.9).astype(np.uint8) for image in found.images]
    return Pictures(pixels, found.target.tolist(), of.tolist(), splits.tolist(), rng)


def shares(pictures: Pictures, folder: Path, methods: tuple[str, ...], seed: int) -> dict[str, float]:
    """The first owner's share of a budget by each method."""
    import numpy as np

    from training.coalitions import all_coalitions
    from valuation.__main__ import built, grand_study, valued
    from valuation.args import ValuationConfig
    from valuation.institutions import empty_utility, institution_tests
    from valuation.truth import shapley, trained

    pictures.write(folder)
    config = ValuationConfig(
        dataset_name="imagefolder", dataset_path=str(folder), partition="natural", quiet=True, seed=seed, epochs=40.0,
        augment="none", run_name="gaming",
    )  # fmt: skip
    from training.deal import with_workers

    job = built(with_workers(config))
    tests, empty = institution_tests(job), empty_utility(job)
    study = grand_study(config, job, tests, empty)
    found = {name: values_N for name, (values_N, _) in valued([m for m in methods if m != "truth"], study).items()}
    if "truth" in methods:
        lines = trained(job, all_coalitions(study.count), tests, folder / "coalitions.jsonl", lambda _: None)
        worth = {(): empty, **{members: line["utility"] for members, line in lines.items()}}
        found["truth"] = shapley(worth, study.count)
    mine = np.array([job.dataset.owners.names[g].startswith("a") for g in job.owners])
    paid = {name: np.maximum(values_N, 0) for name, values_N in found.items()}
    return {name: float(paid_N[mine].sum() / paid_N.sum()) if paid_N.any() else 0.0 for name, paid_N in paid.items()}


def main(argv: list[str] | None = None) -> int:
    """Parse, train, print."""
    import numpy as np

    from utils.influence.statistics import mean_interval

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, default=6, help="N (default: 6)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--seed", type=int, default=10, help="the first one (default: 10)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="(default: all)")
    asked = parser.parse_args(argv)
    gains: dict[str, dict[str, list[float]]] = {cheat: {} for cheat in CHEATS}
    honest: dict[str, list[float]] = {}
    for seed in range(asked.seed, asked.seed + asked.seeds):
        with tempfile.TemporaryDirectory() as folder:
            was = shares(dealt(seed, asked.owners), Path(folder, "honest"), tuple(asked.methods), seed)
            for name, share in was.items():
                honest.setdefault(name, []).append(share)
            for number, (cheat, play) in enumerate(CHEATS.items()):
                pictures = dealt(seed, asked.owners)
                play(pictures)
                now = shares(pictures, Path(folder, str(number)), tuple(asked.methods), seed)
                for name, share in now.items():
                    gains[cheat].setdefault(name, []).append(share - was[name])
        print(f"seed {seed} is done", file=sys.stderr)
    print("| what the first owner does | " + " | ".join(asked.methods) + " |")
    print("| --- |" + " --- |" * len(asked.methods))
    print("| honest: its share | " + " | ".join(f"{100 * np.mean(honest[m]):.0f} %" for m in asked.methods) + " |")
    for cheat, found in gains.items():
        cells = []
        for method in asked.methods:
            mean, low, high = mean_interval([100 * gain for gain in found[method]])
            cells.append(f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]" if asked.seeds > 1 else f"{mean:+.0f}")
        print(f"| {cheat} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
