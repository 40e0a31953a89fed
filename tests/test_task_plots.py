"""Pictures of other tasks than classification: no figure is called accuracy, units and directions are respected."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

import main_pruned
from tests.task_data import findings, series
from tests.test_influence_plots import audit_of
from tests.test_plots import assert_legible
from training.across_seeds import summarize_sweeps
from utils.records import MetricsLog, UsageError, write_json, write_labels, write_partition, write_predictions
from utils.registry import DATASETS
from utils.topology import build_topology
from visualization import checked, plot_utils
from visualization.comparison_plots import Stage, draw_all_comparisons, draw_comparison, plot_comparison, prunings
from visualization.contact_sheet import draw_contact_sheet
from visualization.finals import Final, load_final
from visualization.influence_plots import draw_audit, draw_sweep, plot_sweep
from visualization.measures import ACCURACY, LOSSES, Measure, Shown, shown_of
from visualization.prediction_plots import draw_areas, draw_predicted
from visualization.several_runs import draw_compare, draw_seeds, plot_compare, plot_seeds

N = 4  # workers
RMSE = {"name": "rmse", "higher_is_better": False, "unit": "µg/m³"}
AUROC = {"name": "macro_auroc", "higher_is_better": True, "unit": ""}
KINDS = {"regression": RMSE, "multilabel": AUROC}
WORDS = {"regression": "RMSE", "multilabel": "macro AUROC"}


def make_stage(path, kind="regression", final=0.8, config=True):
    """A finished synthetic stage of a task, with predictions, strata and a graph."""
    rng, metric = np.random.default_rng(0), KINDS[kind]
    name = metric["name"]
    for round in range(6):
        values_N = final + rng.random(N) / (round + 1)
        row = {"round": round, "epoch": round / 2, "train_loss": 1.0, "val_loss": 0.9, "consensus_val_loss": 0.8}
        row |= {f"val_{name}": values_N.mean(), f"worker_val_{name}": values_N.tolist()}
        row |= {f"consensus_val_{name}": values_N.min(), "worker_val_loss": [0.9] * N, "consensus_distance": 0.1}
        MetricsLog(path / "metrics.jsonl").append(row)
    task = {"kind": kind, "names": ["a", "b"], "metrics": [metric, {"name": "x", "higher_is_better": True, "unit": ""}]}
    if config:
        write_json(path / "config.json", {"task": task})
    summary = {f"test_{name}": final, "test_loss": 0.5, f"worker_test_{name}": [final + k for k in range(N)]}
    if kind == "multilabel":
        summary["test_auroc_by_class"] = {"a": 0.75, "b": None}
    write_json(path / "summary.json", {**summary, "metric": metric})
    write_labels(path, np.arange(40) % 2, ["below 3.2", "from 3.2"])
    write_partition(path, np.arange(40).reshape(N, 10))
    write_json(path / "topology.json", build_topology("ring", N).to_json())
    if kind == "regression":
        targets_m2C = rng.normal(size=(30, 2, 2))
        write_predictions(path, targets_m2C, targets_m2C[:, 0] + 0.1)
    else:
        write_predictions(path, rng.integers(0, 2, (30, 2)), rng.random((30, 2)))
    return path


def words_of(figure) -> str:
    """Everything that stands on a sheet."""
    texts = [figure.get_suptitle()]
    for axes in figure.axes:
        texts += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel(), *(t.get_text() for t in axes.texts)]
        texts += [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    texts += [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    return "\n".join(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_another_task_is_called_accuracy_and_axes_name_metric_and_unit(tmp_path, kind):
    stage = make_stage(tmp_path / "stage1", kind)
    shown, lines, metric = checked.load_shown(stage), checked.load_lines(stage), KINDS[kind]
    unit = f" ({metric['unit']})" if metric["unit"] else ""
    assert (shown.metric.name, shown.metric.unit, shown.outputs) == (metric["name"], metric["unit"], ("a", "b"))
    final = load_final([stage], shown.metric)
    assert final == Final(np.array([0.8]), None), "no interval but that of an accuracy"
    figures = [
        plot_utils.draw_training(lines, shown=shown),
        draw_compare({"one": [lines], "two": [lines]}, {"one": final, "two": final}, shown.metric),
        draw_seeds([lines, lines], Final(np.array([0.8, 0.9])), shown),
        draw_comparison([Stage("stage 1", [lines], final, {"color": "C0"})], shown=shown),
    ]
    for figure in figures:
        said = words_of(figure)
        assert "ccuracy" not in said and "%" not in said and f"{WORDS[kind]}{unit}" in said
        assert ("lower is better" in said) == (kind == "regression") or figure is figures[2]
        assert_legible(figure)
    assert f"Test {WORDS[kind]} at the end: 0.85 ± 0.07071{unit}" == figures[2].get_suptitle()
    assert figures[0].axes[0].get_ylabel() == f"{LOSSES[kind].long} ({LOSSES[kind].unit})"
    curve = figures[0].axes[1].lines[0]
    np.testing.assert_allclose(curve.get_ydata(), [row[f"val_{metric['name']}"] for row in lines])


def test_the_better_worker_is_the_brighter_one(tmp_path):
    for kind, best in ("regression", 0), ("multilabel", N - 1):
        stage = make_stage(tmp_path / kind, kind)
        shown = checked.load_shown(stage)
        figure_N, what = plot_utils.worker_figures(checked.load_lines(stage), checked.load_summary(stage), shown.metric)
        figure = plot_utils.draw_topology(checked.load_topology(stage), figure_N, what, shown.metric)
        bright_N = figure.axes[0].collections[-1].get_facecolors()[:, :3] @ (0.3, 0.59, 0.11)
        assert bright_N.argmax() == best
        assert figure.axes[1].get_ylabel().startswith(f"test {WORDS[kind]} of the worker")
        assert "lower is better" in words_of(figure) or kind == "multilabel"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_drawn_with_the_picture_of_its_task(tmp_path, kind, capsys):
    stage = make_stage(tmp_path / "run" / "stage1", kind)
    assert plot_utils.main([str(tmp_path / "run")]) == 0
    own = {"regression": "predictions", "multilabel": "auroc"}[kind]
    names = {path.stem for path in (stage / "plots").iterdir()}
    assert names == {"training", "consensus_distance", "class_mix", "topology", own}
    assert str(stage / "plots" / f"{own}.png") in capsys.readouterr().out


def test_the_metric_is_that_of_the_summary_where_config_does_not_say_and_else_accuracy(tmp_path):
    stage = make_stage(tmp_path / "a", config=False)
    assert checked.load_shown(stage).metric == Measure(**RMSE)
    assert checked.load_shown(tmp_path / "nowhere") == Shown() and Shown().metric == ACCURACY
    for path, record, said in (
        (stage / "summary.json", {"metric": {"name": "rmse"}}, "metric is no name"),
        (stage / "config.json", {"task": {"kind": "regression", "names": [], "metrics": []}}, "task.metrics is empty"),
        (stage / "config.json", {"task": {"kind": "regression", "names": [], "metrics": [{**RMSE, "unit": 1}]}},
         "unit is no text"),
        (stage / "config.json", {"task": {"kind": "regression", "metrics": [RMSE]}}, "task has no 'names'"),
    ):  # fmt: skip
        write_json(path, record)
        with pytest.raises(UsageError, match=said):
            checked.load_shown(stage)


def test_runs_of_different_tasks_share_no_sheet(tmp_path):
    stages = [make_stage(tmp_path / kind / "stage1", kind) for kind in KINDS]
    for plot in plot_compare, plot_seeds:
        with pytest.raises(UsageError, match=r"measured alike \(.*RMSE \(µg/m³\).*macro AUROC\)"):
            plot(stages, tmp_path / "x.png")
    again = make_stage(tmp_path / "again" / "stage1")
    assert plot_compare([stages[0], again], tmp_path / "x.png", loss=True).exists()


# ---- prunings and sweeps ---------------------------------------------------------------------------------


def comparison(several: bool) -> dict:
    runs = {"stage1": ["stage1"], "stage2": ["stage2_if_0.8"], "control": None}
    record = {"algorithm": "if", "ratio": 0.8, "runs": runs, "over_stage1": [-0.3, -0.4, -0.2], "over_random": None,
              "verdict": "stage 2 is better than stage 1 (-0.300 µg/m³ [-0.400, -0.200])"}  # fmt: skip
    if several:
        figures = {f"{stage}_test_rmse": {"values": [8.5]} for stage in ("stage1", "stage2")}
        return {**record, "seeds": 1, "metric": RMSE, **figures, "control_test_rmse": None}
    return {**record, "stage1": {"test_rmse": 8.5, "metric": RMSE}, "stage2": {"test_rmse": 8.2}, "control": None}


@pytest.mark.parametrize("several", [False, True])
def test_prunings_are_compared_in_the_unit_of_the_metric(tmp_path, several):
    for stage in "stage1", "stage2_if_0.8":
        make_stage(tmp_path / stage, final=8.5)
    path = tmp_path / "comparison_if_0.8.json"
    write_json(path, comparison(several))
    record = checked.load_comparison(path)
    assert record["metric"] == Measure(**RMSE) and record["figures"]["stage1"].tolist() == [8.5]
    figure = draw_all_comparisons(prunings([record]))
    said = words_of(figure)
    assert "points" not in said and "ccuracy" not in said and "test RMSE (µg/m³), lower is better" in said
    assert figure.axes[0].texts[0].get_text() == "8.5"
    marks = [line.get_xdata()[0] for line in figure.axes[2].lines if line.get_marker() not in ("None", "")]
    assert marks == [-0.3], "in the unit, not in hundredths"
    assert_legible(figure)
    assert imread(plot_comparison(path)).shape[1] > 1000
    write_json(path, {**comparison(several), "stage1": {"test_accuracy": 0.9, "metric": RMSE}, "seeds": None})
    with pytest.raises(UsageError, match="damaged"):
        checked.load_comparison(path)


def test_a_sweep_is_drawn_in_the_unit_of_its_metric(tmp_path):
    methods = {"dice": {"test_rmse": [8.2, 8.9], "test_rmse_std": [0.1, 0.2]}}
    stage1 = {"test_rmse": 8.0, "test_rmse_std": 0.05}
    write_json(tmp_path / "sweep.json", {"ratios": [0.9, 0.5], "methods": methods, "stage1": stage1, "metric": RMSE})
    figure = draw_sweep(checked.load_sweep(tmp_path))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "test RMSE (µg/m³), lower is better"
    assert axes.get_title(loc="left").startswith("RMSE after pruning")
    assert "no pruning\n(8 ± 0.05)" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert plot_sweep(tmp_path, tmp_path / "s.png").exists()


def test_an_audit_names_the_unit_of_the_loss():
    audit = audit_of({"dice": {"lds": 0.5, "interval": None, "predicted": [0.1, 0.2]}}, [0.1, 0.3])
    said = words_of(draw_audit(audit, LOSSES["regression"]))
    assert "(standardized)" in said and "nats" not in said and "nats" in words_of(draw_audit(audit))


# ---- predictions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [50, 3000])
def test_values_are_drawn_against_what_came_with_the_forecast_to_beat(samples):
    rng = np.random.default_rng(0)
    actual_mC = rng.normal(20, 5, (samples, 2))
    actual_mC[0, 0] = np.nan
    targets_m2C = np.stack([actual_mC, actual_mC + 4], 1)
    predicted_mC = np.nan_to_num(actual_mC) + np.array([1.0, -3.0])
    shown = shown_of("regression", Measure(**RMSE), ("1 day", "2 days"))
    figure = draw_predicted(targets_m2C, predicted_mC, shown)
    one, two = figure.axes[:2]
    assert one.get_title(loc="left") == "1 day\nRMSE 1, to beat 4"
    assert two.get_title(loc="left") == "2 days\nRMSE 3, to beat 4"
    assert one.get_xlabel() == "actual (µg/m³)" and one.get_ylabel() == "predicted (µg/m³)"
    if samples == 50:
        np.testing.assert_allclose(one.collections[0].get_offsets(), np.stack([actual_mC, predicted_mC], 2)[1:, 0])
    else:
        assert 2500 < one.collections[0].get_array().sum() <= samples - 1, "some lie out of view"
    errors = next(axes for axes in figure.axes if axes.get_title(loc="left") == "By output")
    forecast, model = (curve.get_ydata() for curve in errors.lines)
    np.testing.assert_allclose(forecast, [4, 4])
    np.testing.assert_allclose(model, [1, 3])
    rmse = np.sqrt((1 * (samples - 1) + 9 * samples) / (2 * samples - 1))
    said = f"RMSE {rmse:.4g} µg/m³; the forecast to beat 4 µg/m³ (skill {1 - rmse**2 / 16:.3f})"
    assert said in figure.get_suptitle()
    assert_legible(figure)


def test_many_outputs_and_unknown_values_still_give_a_picture():
    rng = np.random.default_rng(0)
    targets_m2C = rng.normal(size=(60, 2, 24))
    assert_legible(draw_predicted(targets_m2C, rng.normal(size=(60, 24))))
    targets_m2C[:] = np.nan
    figure = draw_predicted(targets_m2C[..., :1], np.zeros((60, 1)))
    assert_legible(figure)
    assert "RMSE unknown" in figure.get_suptitle() and "skill" not in figure.get_suptitle()


def test_predictions_of_another_shape_are_damaged(tmp_path):
    stage = make_stage(tmp_path / "stage1")
    write_predictions(stage, np.zeros((3, 2, 2)), np.zeros((3, 1)))
    with pytest.raises(UsageError, match="predictions.npz is damaged"):
        plot_utils.plot_run(stage)


def test_areas_stand_by_size_and_say_what_is_not_known():
    figure = draw_areas({"low": 0.6, "none": float("nan"), "high": 0.9})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "low", "none"]
    assert [text.get_text() for text in axes.texts] == ["0.900", "0.600", "one kind only"]
    assert axes.lines[1].get_xdata()[0] == pytest.approx(0.75)
    assert_legible(figure)
    assert_legible(draw_areas({f"finding {k}": k / 200 for k in range(200)}))


# ---- the samples themselves ------------------------------------------------------------------------------


def test_series_are_lines_without_what_is_unknown():
    inputs_nTF = np.random.default_rng(0).normal(size=(20, 6, 3))
    inputs_nTF[:, 4:] = np.nan
    inputs_nTF[3, 1, 0] = np.nan
    figure = draw_contact_sheet(inputs_nTF, np.zeros(20, int), np.arange(20.0), np.arange(20), ["a"], {19}, "dice")
    assert len(figure.axes) == 20
    lowest = figure.axes[10:]
    assert [axes.get_title().split()[1] for axes in lowest[:4]] == ["#0", "#1", "#2", "#3"]
    np.testing.assert_array_equal(lowest[3].lines[0].get_xdata(), [0, 2, 3])
    np.testing.assert_array_equal(lowest[3].lines[0].get_ydata(), inputs_nTF[3, [0, 2, 3], 0])
    assert len({axes.get_ylim() for axes in figure.axes}) == 1, "one scale for all"
    assert len(figure.axes[0].patches) == 1 and not lowest[0].patches
    assert "first feature over 6 steps" in figure.texts[0].get_text()
    assert_legible(figure)


def test_many_features_are_an_image():
    inputs_nTF = np.random.default_rng(0).normal(size=(8, 12, 20))
    inputs_nTF[:, 9:] = np.nan
    figure = draw_contact_sheet(inputs_nTF, np.zeros(8, int), np.arange(8.0), np.arange(8), ["a"])
    image = figure.axes[4].images[0]
    np.testing.assert_array_equal(image.get_array().filled(np.nan), inputs_nTF[0].T)
    assert image.origin == "lower" and len({axes.images[0].get_clim() for axes in figure.axes}) == 1


def test_series_of_which_nothing_is_known_are_drawn():
    assert_legible(draw_contact_sheet(np.full((4, 5, 1), np.nan), np.zeros(4, int), np.ones(4), np.arange(4), ["a"]))


def test_a_sweep_over_seeds_spells_its_metric(tmp_path):
    one = {"methods": {"if": {"test_rmse": [2.0]}}, "ratios": [0.5], "stage1": {"test_rmse": 1.0}, "metric": RMSE}
    assert summarize_sweeps(tmp_path, [one, one]).startswith("test RMSE by share kept")


# ---- whole runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, data, model",
    [
        pytest.param("timeseries", series, "lstm", marks=pytest.mark.slow),
        ("imagefolder", findings, "cnn_smooth"),
    ],
)
def test_a_pruning_of_every_task_leaves_its_pictures(tmp_path, monkeypatch, capsys, name, data, model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(DATASETS, name, lambda path, options: data())
    flags = ["--dataset_name", name, "--model", model, "--max_train", "40", "--num_workers", "2", "--batch_size", "8",
             "--epochs", "1", "--min_shard", "2", "--pruning_algorithm", "random", "--train_ratio", "0.8",
             "--no-control", "--quiet", "--results_dir", str(tmp_path), "--run_name", "run"]  # fmt: skip
    assert main_pruned.main(flags) == 0
    assert {"timeseries": "test RMSE ", "imagefolder": "test macro AUROC "}[name] in capsys.readouterr().out
    folder = tmp_path / "run"
    names = {"comparison", "comparison_random_0.8", "extremes_random", "node_view_random", "scores_random"}
    assert {path.stem for path in folder.glob("*.png")} == names
    own = {"timeseries": "predictions.png", "imagefolder": "auroc.png"}[name]
    assert (folder / "stage1" / "plots" / own).is_file()
