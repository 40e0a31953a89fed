"""Started by torchrun from test_distributed.py: several runs in one start of processes."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

ALGORITHMS = {  # (most of them over links that cross processes)
    "qg": dict(protocol="qg"),
    "d2": dict(protocol="d2"),
    "tracking": dict(protocol="tracking", mode="exponential_one_peer"),
    "choco": dict(protocol="choco"),
    "quantized": dict(protocol="choco", compression="quantize"),
    "relay": dict(protocol="relay", mode="tree"),
    "hub": dict(protocol="relay", mode="star", num_workers=3),
    "base": dict(protocol="tracking", mode="base", num_workers=5),
    "pushsum": dict(protocol="pushsum", mode="exponential"),
    "cta": dict(order="cta", optimizer="nesterov"),
    "diloco": dict(protocol="diloco", optimizer="adamw", local_steps=3, lr=0.01),
    "scaffold": dict(protocol="scaffold", fraction_fit=0.5),
    "fedprox": dict(protocol="fedprox", server_momentum=0.5),
}
MEAN = ("diloco", "scaffold", "fedprox")  # of which processes add up their parts
MODES = ("ring", "exponential_one_peer", "random", "grid", "all", "star")


def config_of(name, folder, **settings):
    """A short run of one topology (by default that of its name), on the engine whose bits do not depend on how rows
    are grouped."""
    from utils.args import Config

    defaults = dict(
        model="mlp", epochs=2, engine="threads", quiet=True, plots=False, max_train=500, threads=1, momentum=0.9
    )
    mode = {"mode": name if name in MODES else "ring"}
    return Config(results_dir=str(folder), run_name=name, **(mode | defaults | settings))


if __name__ == "__main__":
    import torch

    from training.run import run_folder, train_run
    from workers import distributed

    distributed.join(torch.device("cpu"))
    for mode in MODES:
        config = config_of(mode, sys.argv[1])
        train_run(config, run_folder(config) / "stage1")
    config = config_of("ring", sys.argv[1], protocol="fedavg", fraction_fit=0.5)
    train_run(config, run_folder(config).with_name("fedavg") / "stage1")
    for name, settings in ALGORITHMS.items():
        config = config_of(name, sys.argv[1], **settings)
        train_run(config, run_folder(config) / "stage1")
    distributed.leave()
