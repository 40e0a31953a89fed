"""What the activations at a cut tell about inputs: how much of them a linear probe rebuilds, by the depth of the cut.

    python -m benchmarks.leak                        digits, CNN, 5 seeds; a table, and a picture beside the record
    python -m benchmarks.leak --model mlp --seeds 3
    python -m benchmarks.leak --dataset_path FOLDER --max_train 2000

Whoever trains the stage behind the cut sees them (split learning: Vepakomma et al. 2018), and has pairs of inputs and
activations, say: here the training set. A ridge regression, whose strength leave-one-out chooses, learns from those to
rebuild inputs, and is measured on the test set: 1 - (sum of squared errors) / (sum of squares about the mean), over all
values of all inputs. 1: the inputs go over the wire; 0: no more than the mean input. What a probe does not rebuild may
still be there: this is a lower bound of the leak. Further flags are those of main.py. The table is markdown.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads

import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from benchmarks.common import table
from networks.blocks import blocks_of
from training.build import Job, build
from training.protocols import load_protocol
from utils.args import Config
from utils.errors import UsageError, refusal
from utils.influence.statistics import mean_interval
from utils.parser import parse
from utils.progress import bar
from utils.records import write_json
from visualization.leak import plot_leak
from workers.stages import can_begin

DEFAULTS = ("--model", "cnn", "--num_workers", "1", "--protocol", "local", "--partition", "iid", "--epochs", "20")
STRENGTHS = [10.0**k for k in range(-2, 6)]
SHOWN = 8  # inputs that the picture rebuilds


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print, draw."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--out", default="results/benchmarks/leak.json", help="record; a picture goes beside it")
    asked, rest = own.parse_known_args(argv)
    try:
        config = parse(Config, [*DEFAULTS, "--seeds", "5", *rest], __doc__, varied=True)
        if config.seeds < 2:
            raise UsageError("--seeds 1: intervals over seeds need two at least.")
        record, shown = measured(config)
        rows = [
            [f"{c['before']} ({c['layer']})", f"{c['floats']:,}", f"{c['bytes']:,}",
             *(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in c["intervals"].values())]
            for c in record["cuts"]
        ]
        table(["cut before", "floats", "bytes a sample, both ways", "rebuilt, untrained", "rebuilt, trained"], rows)
        write_json(asked.out, record)
        if config.plots:
            print(plot_leak(record, shown, Path(asked.out).with_suffix(".png")))
    except UsageError as error:
        return refusal(error)
    return 0


def measured(config: Config) -> tuple[dict[str, Any], list[Tensor]]:
    """The record, and some inputs as they are and as each cut of the first seed's trained network gives them back."""
    cuts: list[dict[str, Any]] = []
    shown: list[Tensor] = []
    with bar(2 * config.seeds, "networks", "network", config.quiet) as ticks:
        for seed in range(config.seed, config.seed + config.seeds):
            job = build(dataclasses.replace(config, seed=seed, seeds=1))
            blocks_of(job.model)  # one that cannot be cut is refused before it is trained
            for name, model in (("untrained", job.model), ("trained", trained(job))):
                for k, cut in enumerate(at_cuts(job, model)):
                    share, rebuilt_mX = probed(*cut["train"], *cut["test"])
                    if k == len(cuts):
                        about = {key: cut[key] for key in ("before", "layer", "floats", "bytes")}
                        cuts.append({**about, "untrained": [], "trained": []})
                    cuts[k][name].append(share)
                    if seed == config.seed and name == "trained":
                        inputs_mX = cut["test"][1]
                        shown = shown or [inputs_mX[:SHOWN].reshape(-1, *job.samples.shape)]
                        shown.append(rebuilt_mX[:SHOWN].reshape(-1, *job.samples.shape))
                ticks.update(1)
    for cut in cuts:
        cut["intervals"] = {name: mean_interval(cut[name]) for name in ("untrained", "trained")}
    return {"settings": config.changing_results(), "model": config.model, "cuts": cuts}, shown


def trained(job: Job) -> nn.Module:
    """The run's model."""
    fleet, protocol = job.make_fleet(), load_protocol(job.config.protocol)
    for _ in protocol.run(fleet, job):
        pass
    return job.engine.layout.attach(copy.deepcopy(job.model), protocol.model(fleet)[0].detach().clone())


def at_cuts(job: Job, model: nn.Module) -> list[dict[str, Any]]:
    """At every place where a stage can begin: what it begins with, the floats that enter it, and (activations, inputs)
    of the training and of the test set, flat."""
    ids = torch.arange(len(job.test_samples.targets_n))
    sets = {"train": job.samples.plain(job.train_ids)[0], "test": job.test_samples.plain(ids)[0]}
    now, found = dict(sets), []
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, block in blocks_of(model):
            if found and can_begin(block):
                floats = now["test"][0].numel()
                cut = {"before": name, "layer": type(block).__name__, "floats": floats}
                cut["bytes"] = 2 * floats * now["test"].element_size()
                found.append(cut | {k: (x.flatten(1), sets[k].flatten(1)) for k, x in now.items()})
            elif not found:
                found = [{}]  # before the first block there are the inputs
            now = {k: block(x).clone() for k, x in now.items()}
    return found[1:]


def probed(known_nA: Tensor, wanted_nX: Tensor, seen_mA: Tensor, truth_mX: Tensor) -> tuple[float, Tensor]:
    """The share of the inputs' variance that a linear probe of activations rebuilds, and what it rebuilds [m, X]."""
    scale = known_nA.std().clamp(min=1e-12)  # one for all: a unit that hardly ever fires would be blown up
    probe = RidgeCV(alphas=STRENGTHS).fit((known_nA / scale).double().numpy(), wanted_nX.double().numpy())
    rebuilt_mX = torch.from_numpy(probe.predict((seen_mA / scale).double().numpy()))
    truth_mX = truth_mX.double()
    return float(1 - (rebuilt_mX - truth_mX).square().sum() / (truth_mX - truth_mX.mean(0)).square().sum()), rebuilt_mX


if __name__ == "__main__":
    sys.exit(main())
