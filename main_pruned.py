"""Score every training sample of a decentralized run, prune, retrain, compare; prove the scores.

    python main_pruned.py --pruning_algorithm if --stage 2      stage 1 (if need be), scores, pruning, stage 2
    python main_pruned.py --pruning_algorithm cascade --audit   the same, and LDS against retraining
    python main_pruned.py --sweep 0.9 0.8 0.6 0.4 0.2           accuracy against share kept, several methods
    python main_pruned.py --flip_labels 0.1 --audit             do the scores find mislabelled samples?
    python main_pruned.py --smoothness                          can scores of this run be trusted?
    python main_pruned.py --edges                               which edges of the graph helped, and when?

Scores: positive = the sample lowers the validation loss. All flags of main.py say what stage 1 trains.
"""

from __future__ import annotations

from utils.command import STOPPED, begin, interrupted, ready

if __name__ == "__main__":
    begin()  # first, so that Ctrl-C and a missing package are a line from the first moment on

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.pruning import Stage1
    from utils.pruning_args import PruningConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: parallel over workers, not inside operators


def main(argv: list[str] | None = None) -> int:
    """Parse, then stage 1, scores, stage 2, comparison. Returns the exit code."""
    from utils.awaited import AWAITS, ResultsMissing, each
    from utils.errors import UsageError, refusal
    from utils.parser import parse
    from utils.pruning_args import PruningConfig

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    config = folder = None
    try:
        config = parse(PruningConfig, argv, __doc__)
        from training.pruning import stage1_config, stage1_folder
        from training.run import each_seed, own_folder

        ready()
        config = stage1_config(config)
        folder = stage1_folder(config)
        with own_folder(folder):
            results = each(run, each_seed(config))
            if len(results) > 1:
                summarize(folder, results, config.plots)
    except (UsageError, OSError) as error:  # OSError: a path that cannot be used
        return refusal(error)
    except ResultsMissing as awaited:
        print(awaited.what_to_do("The same command"))
        return AWAITS
    except KeyboardInterrupt:
        print(interrupted(config, folder), file=sys.stderr)
        return STOPPED
    return 0


def run(config: PruningConfig) -> dict[str, Any]:
    """One seed; returns what its audit.json, sweep.json and comparison.json hold, by name."""
    from training.audit import audit, report
    from training.comparison import comparison_said, prune
    from training.edges import edges_said
    from training.pruning import check_ratios, check_stage2, manner, node_view, open_stage1, run_stage1, stage2_dir
    from training.shares import share_to_keep
    from training.smoothness import smoothness_told
    from training.sweep import sweep, sweep_said
    from utils.records import figure_of, metric_of, shown, spelled

    if config.stage == 1:
        summary = run_stage1(config)
        metric = metric_of(summary)
        print(f"stage 1: test {spelled(metric['name'])} of the consensus model {shown(figure_of(summary), metric)}")
        return {}
    check_stage2(config)
    stage1, results = open_stage1(config), {}
    check_ratios(stage1)
    if config.audit:
        results["audit"] = audit(stage1)
        print(report(results["audit"], stage1.folder))
    elif config.smoothness:
        print(smoothness_told(stage1))
    if config.sweep:
        results["sweep"] = sweep(stage1)
        print(sweep_said(results["sweep"]))
    if config.edges:
        print(edges_said(stage1))
    method, run_dir = config.prunes_by, None
    if method:
        ratio, shares = share_to_keep(stage1, method) if config.chooses else (config.train_ratio, None)
        run_dir = stage2_dir(stage1.folder, method, ratio, **manner(config, method))
        record = results["comparison"] = prune(stage1, method, ratio, bool(results or shares), shares)
        if method != "noprune":
            node_view(stage1, method)
        print(comparison_said(record, stage1.folder))
    if config.plots:
        from visualization.report import write_report

        draw(stage1, results, method, run_dir)
        print(f"report: {write_report(stage1.folder, stage1.run_dir)}")
    else:
        (stage1.folder / "report.html").unlink(missing_ok=True)  # it knows nothing of this
    return results


def summarize(folder: Path, results: list[dict[str, Any]], plots: bool) -> None:
    """What several seeds have in common, in the folder above them."""
    from training.across_seeds import SUMMARIES

    there = [name for name in SUMMARIES if all(name in one for one in results)]
    for name in there:
        print(SUMMARIES[name](folder, [one[name] for one in results]))
    if plots:
        from visualization.plot_utils import plot_folder
        from visualization.report import write_report

        plot_folder(folder)
        print(f"report: {write_report(folder)}")


def draw(stage1: Stage1, results: dict[str, Any], method: str | None, run_dir: Path | None) -> None:
    """All pictures of a pruning (``run_dir``: stage 2), from records; the contact sheet needs the samples too."""
    from training.comparison import comparison_name
    from training.scores import sheet_of
    from visualization import influence_plots as plots
    from visualization.plot_utils import plot_run

    folder = stage1.folder
    plot_run(stage1.run_dir)
    if stage1.config.edges:
        plots.plot_edges(stage1.run_dir, folder / "influence" / "edges.zarr", folder / "edges.png")
    if "audit" in results:
        plots.plot_audit(folder, folder / "audit.png", stage1.run_dir)
    if "sweep" in results:
        plots.plot_sweep(folder, folder / "sweep.png")
    if run_dir is None:
        return
    plot_run(run_dir)
    plots.plot_comparison(folder / f"{comparison_name(run_dir)}.json")
    plots.plot_all_comparisons(folder)
    if method == "noprune":
        return
    scores_n, path = stage1.scores(method)
    plots.plot_scores(stage1.run_dir, path, folder / f"scores_{path.stem}.png")
    plots.plot_node_view(stage1.run_dir, folder / f"node_view_{method}.json", folder / f"node_view_{method}.png")
    job = stage1.job
    flipped, what = set(job.corruption.get("flipped", [])) or None, sheet_of(job, scores_n[job.train_ids].numpy())
    plots.plot_contact_sheet(*what, folder / f"extremes_{path.stem}.png", flipped, path.stem, job.dataset.sources)


if __name__ == "__main__":
    sys.exit(main())
