"""Started by torchrun from test_distributed.py: several runs in one start of processes."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

MODES = ("ring", "exponential_one_peer", "random", "grid", "all", "star")


def config_of(mode, folder, **settings):
    """A short run of one topology, on the engine whose bits do not depend on how rows are grouped."""
    from utils.args import Config

    defaults = dict(
        model="mlp", epochs=2, engine="threads", quiet=True, plots=False, max_train=500, threads=1, momentum=0.9
    )
    return Config(mode=mode, results_dir=str(folder), run_name=mode, **(defaults | settings))


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
    distributed.leave()
