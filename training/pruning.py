"""Stage 1, scores, pruning, stage 2: the flow of ``main_pruned.py``.

    results/<run_name>/stage1/                    the trained run, with the states that scoring replays from
    results/<run_name>/influence/<method>.zarr    scores
    results/<run_name>/stage2_<method>_<ratio>/   the run on what was kept
    results/<run_name>/comparison_<...>.json      what it was worth (training/comparison.py)

Legend: n samples of the data set, N workers.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import checkpoint
from training.build import Job, build
from training.deal import with_workers
from training.identity import check_identity
from training.protocols import check_differentiable, load_protocol
from training.run import check_packages, claim, clear, prepare, recorded_execution, run_folder
from training.scores import choosing_folds, folds_of, keep_best, pruning_scores, scores_for
from training.trainer import train
from training.trajectory import RecordedRun
from utils.digest import digest_tensors
from utils.errors import UsageError
from utils.progress import bar, within
from utils.pruning_args import PruningConfig
from utils.records import read_json, read_result, write_atomically, write_json


@dataclass
class Stage1:
    """A finished stage 1, opened for scoring."""

    config: PruningConfig
    folder: Path
    run_dir: Path
    job: Job
    run: RecordedRun
    summary: dict[str, Any]
    final_state: str  # digest of the final checkpoint's tensors

    def job_on(self, kept_ids: Tensor) -> Job:
        """The run on these training samples only."""
        job = build(dataclasses.replace(self.config, quiet=True, config=None), self.job.execution, kept_ids)
        job.decisions.update(self.job.decisions)
        return job

    def scores(self, method: str) -> tuple[Tensor, Path]:
        """Scores [n] of a method and where they are kept."""
        return scores_for(method, self.run, self.config, self.folder / "influence", self.final_state)

    def scores_on(self, kept_ids: Tensor, method: str) -> Tensor:
        """Scores [n] of a method in the run on these training samples only; -inf of the others."""
        job = self.job_on(kept_ids)
        run = RecordedRun(job, self.run.rounds, memory_limit=self.config.memory_gb * 1e9)
        with bar(run.num_steps, "training on what is kept", "step", self.config.quiet) as ticks:
            state = digest_tensors({"rows": run.final(ticks.update)})
        found_n = pruning_scores(method, run, self.config, self.folder / "influence", state)
        scores_n = torch.full_like(found_n, -torch.inf)
        scores_n[job.train_ids] = found_n[job.train_ids]
        return scores_n


def say(text: str) -> None:
    """A line for the user, apart from progress bars and results."""
    print(text, file=sys.stderr)


def stage1_config(config: PruningConfig) -> PruningConfig:
    """The configuration that trains and scores: ``--model_A`` in the place of ``--model``, and all workers counted."""
    return with_workers(dataclasses.replace(config, model=config.model_A or config.model))


def stage1_folder(config: PruningConfig) -> Path:
    """Where stage 1, its scores and stage 2 are."""
    if config.stage1_dir is None:
        return run_folder(config)
    path = Path(config.stage1_dir)
    return (path.resolve() if path.name in ("", "..") else path).parent  # '.' is its own parent


def check_scorable(config: PruningConfig) -> None:
    """Raises :class:`UsageError` where no influence method could score the run, before it is trained."""
    check_differentiable(config)
    if config.edges and not load_protocol(config.protocol).has_edges:
        raise UsageError(
            f"--edges is about the averages of neighbours, and --protocol {config.protocol} has none that a matrix of "
            "weights tells: gossip, qg, d2, tracking and choco have."
        )


def run_stage1(config: PruningConfig, run_dir: Path | None = None) -> dict[str, Any]:
    """``--stage 1``: train, keeping the states that scoring replays from."""
    config = stage1_config(config)
    check_scorable(config)
    run_dir = run_dir or run_folder(config) / "stage1"
    job = prepare(config, run_dir)
    if job is None:
        return read_result(run_dir)
    with within("stage 1"):
        return train(job, run_dir, snapshots=room_for_states(job, run_dir))


def room_for_states(job: Job, run_dir: Path) -> bool:
    """Whether the disk has room for sqrt(T) states; says what they need where that is much."""
    steps = max(1, round(job.total_steps**0.5))
    state = job.config.num_workers * (job.engine.layout.D + job.engine.layout.P) * job.initial_ND.element_size()
    existing = next(p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if steps * state > 1e9:
        say(
            f"scoring will replay from {steps} states of {state / 1e9:.2f} GB on disk ({steps * state / 1e9:.1f} GB; "
            f"{free / 1e9:.0f} GB are free)"
        )
    if steps * state > 0.8 * free:
        say("that does not fit: no states are kept, and scoring replays from the start (up to one more training)")
        return False
    return True


def open_stage1(config: PruningConfig) -> Stage1:
    """The finished stage 1 of this configuration; trained first (and said so) where there is none.

    Raises :class:`UsageError` where it is half finished, of another configuration, or, with
    ``--stage1_dir``, missing.
    """
    config = stage1_config(config)
    check_scorable(config)
    check_packages(config)
    folder = stage1_folder(config)
    run_dir = folder / "stage1"
    if config.stage1_dir is not None:
        run_dir = Path(config.stage1_dir)
        if not (run_dir / "config.json").exists():
            raise UsageError(
                f"--stage1_dir {run_dir}: there is no run (no config.json). Leave the flag out to train one."
            )
    if not (run_dir / "config.json").exists():
        say(f"no stage 1 of this configuration yet: training it first, in {run_dir}")
        run_stage1(dataclasses.replace(config, overwrite=False))
    try:
        execution = recorded_execution(config, run_dir)
    except UsageError as error:
        hint = f" (--config {run_dir / 'config.json'} takes them from there.)" if config.stage1_dir else ""
        raise UsageError(f"{error}{hint}") from error
    if not (run_dir / "summary.json").exists():
        if not config.resume:
            raise UsageError(f"stage 1 in {run_dir} is half finished: add --resume to finish it first.")
        say(f"finishing stage 1 in {run_dir}")
        run_stage1(config, run_dir)
    summary = read_result(run_dir)
    if summary.get("isolated"):
        raise UsageError(
            f"workers {summary['isolated']} of {run_dir} were isolated on the way: such a run cannot be scored."
        )
    job = build(config, execution)
    check_identity(run_dir, job.identity)
    final = checkpoint.latest(run_dir / "checkpoints", job.identity["digest"])
    if final is None or final.round != summary["rounds"]:
        raise UsageError(
            f"the final checkpoint of {run_dir} is missing or damaged: --stage 1 --overwrite trains it again."
        )
    job.decisions.update(final.state.get("decisions", {}))
    run = RecordedRun(job, summary["rounds"], run_dir, config.memory_gb * 1e9)
    run.set_final(final.tensors)
    return Stage1(config, folder, run_dir, job, run, summary, digest_tensors(final.tensors))


def kept_ids(stage1: Stage1, method: str, ratio: float) -> Tensor:
    """Ids of the samples that stage 2 trains on; with ``--prune_steps`` K after K scorings, each of which leaves the
    same share of what the one before it left."""
    if method == "noprune" or ratio == 1:
        return stage1.job.train_ids
    config, worker_n = stage1.config, stage1.run.worker_of_n.cpu()
    scores_n = pruning_scores(method, stage1.run, config, stage1.folder / "influence", stage1.final_state)
    steps = manner(config, method)["steps"]
    for step in range(1, steps):
        with within(f"pruning step {step + 1} of {steps}"):
            kept = keep_best(scores_n, worker_n, ratio ** (step / steps), config.prune_scope)
            scores_n = stage1.scores_on(kept, method)
    return keep_best(scores_n, worker_n, ratio, config.prune_scope)


def manner(config: PruningConfig, method: str) -> dict[str, int]:
    """How a method prunes: in how many steps, and by how many folds; controls have no scores to look at again."""
    plain = method in ("random", "noprune")
    return {"steps": 1 if plain else config.prune_steps, "folds": 1 if plain else config.val_folds}


def check_ratios(stage1: Stage1) -> None:
    """Raises :class:`UsageError` where a share to keep would leave a worker with nothing, or folds would be too small:
    before anything is scored."""
    config, worker_n = stage1.config, stage1.run.worker_of_n.cpu()
    pruned = config.prunes_by not in (None, "noprune")
    if pruned or config.sweep:
        folds_of(stage1.run, 0, config.val_folds)
    if config.chooses and len(stage1.job.val_ids) < 2 * (F := choosing_folds(config)):
        raise UsageError(f"--choose_ratio needs {2 * F} validation samples: {len(stage1.job.val_ids)} are too few.")
    one = config.choose_ratio if config.chooses else [config.train_ratio] if pruned else []
    for flag, ratios in (("--sweep", config.sweep), ("--choose_ratio" if config.chooses else "--train_ratio", one)):
        for ratio in ratios:
            try:
                keep_best(torch.zeros(len(worker_n)), worker_n, ratio, config.prune_scope)
            except UsageError as error:
                raise UsageError(str(error).replace("--train_ratio", flag, 1)) from error


def stage2_dir(folder: Path, method: str, ratio: float, steps: int = 1, folds: int = 1) -> Path:
    """Where stage 2 of a method, ratio and :func:`manner` goes."""
    how = (f"_steps{steps}" if steps > 1 else "") + (f"_folds{folds}" if folds > 1 else "")
    return folder / ("stage2_noprune" if method == "noprune" else f"stage2_{method}_{ratio:g}{how}")


def check_stage2(config: PruningConfig) -> None:
    """Raises :class:`UsageError` where stage 2 is there already and no flag says what is to become of it: before
    anything is trained or scored."""
    asked = config.resume or config.overwrite or config.audit or config.sweep or config.chooses
    if config.prunes_by and not asked:
        how = manner(config, config.prunes_by)
        claim(config, stage2_dir(stage1_folder(config), config.prunes_by, config.train_ratio, **how))


def run_stage2(stage1: Stage1, method: str, ratio: float, reuse: bool = False) -> tuple[dict[str, Any], Path]:
    """Train on what the method keeps, for as many steps as stage 1; returns the summary and directory.

    Stage 2 is an ordinary run with ``--keep_samples``: its config.json replays it. ``reuse``: take a finished
    stage 2 made under the same settings without asking (the sweep does).
    """
    ids, how = kept_ids(stage1, method, ratio), manner(stage1.config, method)
    run_dir = stage2_dir(stage1.folder, method, ratio, **how)
    pruning = {
        "algorithm": method,
        "ratio": ratio,
        **{name: count for name, count in how.items() if count > 1},
        "scope": stage1.config.prune_scope,
        "kept": len(ids),
        "kept_digest": digest_tensors({"ids": ids}),
        "stage1": stage1.final_state,
    }
    kept, unfinished = run_dir / "kept_samples.txt", run_dir.with_name(f"{run_dir.name}.kept_samples.tmp")
    config = stage2_config(stage1, None if method == "noprune" else unfinished)
    if config.chooses:
        config = dataclasses.replace(config, choose_ratio=(), train_ratio=ratio)  # what it was made with
    there = (run_dir / "config.json").exists()
    same = there and read_json(run_dir / "config.json").get("pruning") == pruning
    if same and reuse and not config.overwrite:
        config = dataclasses.replace(config, resume=True)
    if there and not same and config.resume and not config.overwrite:
        raise UsageError(f"{run_dir} was pruned under other settings: --overwrite replaces it.")
    try:
        if config.keep_samples:
            text = f"# {len(ids)} samples that {method} keeps\n" + "\n".join(map(str, ids.tolist())) + "\n"
            write_atomically(unfinished, lambda file: file.write(text.encode()))
        execution = claim(config, run_dir)
        begins = execution is None
        if not begins and (run_dir / "summary.json").exists():
            return read_result(run_dir), run_dir
        if begins and config.model == stage1.config.model:
            execution = stage1.job.execution
        job = build(config, execution)
        if begins:
            clear(run_dir)
        if config.keep_samples:
            run_dir.mkdir(exist_ok=True)
            unfinished.replace(kept)
            job.config = dataclasses.replace(config, keep_samples=str(kept))
    finally:
        unfinished.unlink(missing_ok=True)
    return train(job, run_dir, notes={"pruning": pruning}), run_dir


def stage2_config(stage1: Stage1, kept: Path | None) -> PruningConfig:
    """Stage 1's configuration with ``--model_B``, on the kept samples: as many rounds as stage 1 made, or
    ``--stage2_epochs``."""
    config = stage1.config
    length = {"max_rounds": stage1.summary["rounds"]} if stage1.summary["stopped_early"] else {}
    if config.stage2_epochs is not None:
        length = {"epochs": config.stage2_epochs, "max_rounds": None}
    return dataclasses.replace(
        config, model=config.model_B or config.model, patience=0, keep_samples=kept and str(kept), ledger=None, **length
    )


def node_view(stage1: Stage1, method: str) -> Path:
    """Write node_view_<method>.json: influence summed by worker and, for ``dice`` where plots are drawn, the N x N
    table of how much worker j's data helped worker k within r hops (it costs as much as the scores)."""
    scores_n, _ = stage1.scores(method)
    worker_n = stage1.run.worker_of_n.cpu()
    held = worker_n >= 0
    by_worker_N = torch.zeros(stage1.run.num_workers, dtype=torch.float64)
    by_worker_N.index_add_(0, worker_n[held], scores_n[held])
    table = None
    if method == "dice" and stage1.config.plots:
        from utils.influence.dice import scored_steps
        from utils.influence.ripples import ripples

        hops, rounds = stage1.config.dice_hops, stage1.config.dice_rounds
        steps = len(scored_steps(stage1.run.num_steps, hops, rounds))
        with bar(steps, "ripples of dice, worker by worker", "step", stage1.config.quiet) as ticks:
            table = ripples(stage1.run, hops, rounds, ticks.update).tolist()
    path = stage1.folder / f"node_view_{method}.json"
    write_json(
        path,
        {
            "algorithm": method,
            "worker_influence": by_worker_N.tolist(),
            "table": table,
            "hops": None if table is None else stage1.config.dice_hops,
            "bad_workers": stage1.job.corruption.get("bad_workers", []),
        },
    )
    return path
