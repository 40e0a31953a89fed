"""Started by torchrun from test_split_processes.py: several runs in stages in one start of processes.

The argument is a folder; each run gets one in it, with the bytes that its processes sent each other beside it.
"""

import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# (settings, processes that can run them)
CASES = {
    "cnn-gpipe-2": (dict(stages=2, schedule="gpipe", microbatches=4), 2),
    "cnn-1f1b-2": (dict(stages=2, schedule="1f1b", microbatches=4), 2),
    "cnn-uneven-2": (dict(stages=2, schedule="1f1b", microbatches=4, batch_size=27, split_at=("3",)), 2),
    "cnn-few-2": (dict(stages=2, microbatches=5, batch_size=3, max_train=60), 2),
    "cnn-float32-2": (dict(stages=2, microbatches=4, dtype="float32", channels_last=True), 2),
    "cnn-adam-2": (dict(stages=2, microbatches=2, optimizer="adam", lr=0.001), 2),
    "resnet-2": (dict(stages=2, microbatches=1, model="resnet18", max_train=60, batch_size=8, epochs=0.5), 2),
    "cnn-gpipe-3": (dict(stages=3, schedule="gpipe", microbatches=4), 3),
    "cnn-1f1b-3": (dict(stages=3, schedule="1f1b", microbatches=4), 3),
    "cnn-interleaved-2": (dict(stages=4, schedule="interleaved", microbatches=4), 2),
    "cnn-labels-first-2": (dict(stages=3, split_labels="first", microbatches=4), 2),
    "cnn-labels-first-3": (dict(stages=4, split_labels="first", microbatches=3), 3),
    "mesh-ring-4": (dict(stages=2, num_workers=2, protocol="gossip", microbatches=2), 4),
    "mesh-uneven-4": (dict(stages=2, num_workers=5, protocol="gossip", mode="exponential", microbatches=4,
                           schedule="1f1b", local_steps=2, optimizer="adam", lr=0.001), 4),
    "mesh-ragged-4": (dict(stages=2, num_workers=3, protocol="gossip", mode="all", microbatches=2, min_shard=5,
                           max_train=100), 4),
    "mesh-fedavg-4": (dict(stages=2, num_workers=4, protocol="fedavg", fraction_fit=0.5, microbatches=2), 4),
    "mesh-chained-4": (dict(stages=2, num_workers=4, protocol="chained", microbatches=2), 4),
    "mesh-interleaved-4": (dict(stages=4, num_workers=2, protocol="gossip", schedule="interleaved",
                                microbatches=4), 4),
    "mesh-resnet-4": (dict(stages=2, num_workers=2, protocol="gossip", microbatches=1, model="resnet18", max_train=60,
                           batch_size=8, epochs=0.5), 4),
    "cnn-patience-3": (dict(stages=3, schedule="1f1b", microbatches=3, patience=1, min_delta=9.0, epochs=4), 3),
}


def config_of(name, folder, **settings):
    """A run of that name; ``settings`` come last."""
    from utils.args import Config

    common = dict(
        model="cnn", num_workers=1, protocol="local", dtype="float64", max_train=200, epochs=1.5, batch_size=28,
        min_shard=20,
        quiet=True, plots=False, threads=1, results_dir=str(folder), run_name=name, channels_last=False,
    )  # fmt: skip
    return Config(**(common | CASES[name][0] | settings))


def counted(method, sent):
    """A method of a stage that returns messages, which are added up."""

    def wrapped(self, microbatch):
        operations = method(self, microbatch)
        sent[0] += sum(operation.tensor.nbytes for operation in operations)
        return operations

    return wrapped


if __name__ == "__main__":
    import torch
    from torch.distributed.pipelining import PipelineStage

    from training.run import run_folder, train_run
    from workers import distributed

    distributed.join(torch.device("cpu"))
    sent = [0]
    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        setattr(PipelineStage, name, counted(getattr(PipelineStage, name), sent))
    for name, (_, processes) in CASES.items():
        if processes == distributed.world():
            config, sent[0] = config_of(name, sys.argv[1]), 0
            train_run(config, run_folder(config) / "stage1")
            total = torch.tensor(sent)
            torch.distributed.all_reduce(total)
            if distributed.rank() == 0:
                Path(sys.argv[1], f"{name}.json").write_text(json.dumps(total.item()))
    distributed.leave()
