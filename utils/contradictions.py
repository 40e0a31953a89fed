"""Settings of main.py that do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.errors import UsageError
from utils.flags import check_run_name

if TYPE_CHECKING:
    from utils.args import Config


LEDGERED = ("gossip", "local", "fedavg", "fedasync", "chained")


def check_together(config: Config) -> None:
    """Raises :class:`UsageError` where two settings of a configuration contradict each other."""
    if config.mode == "file" and not config.topology_file:
        raise UsageError("--mode file needs --topology_file FILE (an edge list or a matrix).")
    if config.protocol == "chained" and config.chain_order == "policy" and not config.policy:
        raise UsageError("--chain_order policy needs --policy FILE (agent.safetensors of python -m homogeneous).")
    if config.partition == "sizes" and not config.sizes:
        raise UsageError("--partition sizes needs --sizes: how much each worker has, as in --sizes 1 2 4.")
    for name in ("sizes",) * (config.partition == "sizes") + ("worker_flips",):
        given, wanted = len(getattr(config, name)), config.num_workers
        if given and wanted is not None and given != wanted:
            raise UsageError(f"--{name} has {given} numbers: it needs one for each of {wanted} workers.")
    if config.run_name is not None:
        check_run_name(config.run_name)
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite contradict each other: choose one.")
    if config.ledger is not None and config.seeds > 1:
        raise UsageError("--ledger is of one run: leave out --seeds.")
    if list(config.milestones) != sorted(config.milestones):
        raise UsageError("--milestones must be increasing epochs.")

    robust = config.aggregation != "mean" or config.byzantine is not None or config.on_bad_worker == "isolate"
    if robust and config.protocol != "gossip":
        raise UsageError(
            "--aggregation, --byzantine and --on_bad_worker isolate are about gossip: leave out "
            f"--protocol {config.protocol}."
        )

    if robust and config.order == "cta":
        raise UsageError("--order cta adds to averages: --aggregation, --byzantine and --on_bad_worker need atc.")
    if config.mode == "torus" and not config.torus:
        raise UsageError("--mode torus needs --torus: its sizes, as in --torus 4 4, whose product is the workers'.")
    if config.ledger is not None and config.protocol not in LEDGERED:
        raise UsageError(
            f"--ledger records rows that are sent and mixed, and --protocol {config.protocol} sends more than these: "
            f"it takes {', '.join(LEDGERED[:-1])} and {LEDGERED[-1]}."
        )
    if config.ledger is not None and config.order == "cta":
        raise UsageError("--ledger records rows that are sent after the local steps: leave out --order cta.")

    if config.stages > 1:
        check_stages(config)


def check_stages(config: Config) -> None:
    """Raises :class:`UsageError` of settings that do not fit a network in several stages."""
    if config.split_at and len(config.split_at) != config.stages - 1:
        raise UsageError(
            f"--split_at has {len(config.split_at)} names: --stages {config.stages} needs {config.stages - 1}, where "
            "each stage but the first begins."
        )
    if config.schedule == "1f1b" and config.microbatches < config.stages:
        raise UsageError(
            f"--schedule 1f1b needs --microbatches {config.stages} at least, one for each stage; --schedule gpipe "
            "takes any number."
        )
    if config.schedule == "interleaved":
        pipeline = config.stages // 2
        if config.stages % 2 or pipeline < 2:
            raise UsageError(
                f"--schedule interleaved needs an even --stages of 4 or more, two a process: it is {config.stages}."
            )
        rounds = max(1, config.microbatches // pipeline)
        if config.microbatches % rounds:
            raise UsageError(f"--schedule interleaved with {pipeline} processes needs a --microbatches that is a "
                             f"multiple of {rounds}: it is {config.microbatches}.")  # fmt: skip
    if config.split_labels == "first" and (config.stages < 3 or config.schedule != "gpipe"):
        raise UsageError(
            "--split_labels first needs --stages 3 at least (the first and the last of them are one owner's) and "
            "--schedule gpipe."
        )
    if config.protocol == "fedasync":
        raise UsageError("--stages: how long stages take would change who is first under --protocol fedasync.")
    if config.engine == "measure":
        raise UsageError("--stages run on --engine threads or loop, which nothing has to be measured for: give one.")
    for name, given in (("amp", config.amp), ("dp_noise", config.dp_noise is not None)):
        if given:
            raise UsageError(f"--stages and --{name} do not go together yet: leave one of them out.")
