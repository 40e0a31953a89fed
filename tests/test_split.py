"""A network in stages: the numbers of the whole network, in one process; and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from command import arguments, load, metrics, prune, refused, same_tensors, summary, train
from torch import nn

import main
from networks import load_model
from networks.blocks import blocks_of
from tests.helpers import run_steps, small_fleet
from training.split import bubble, speedup
from utils.args import Config
from utils.errors import UsageError
from visualization.plot_utils import plot_run
from workers import distributed
from workers.engine import Engine
from workers.row_layout import RowLayout
from workers.stages import StagedFleet, balanced, cut

SPLIT = ("--model", "cnn", "--engine", "auto", "--num_workers", "1", "--protocol", "local", "--dtype", "float64",
         "--batch_size", "30")  # fmt: skip
EXACT = dict(rtol=0, atol=1e-9)


def with_norm() -> nn.Sequential:
    """Convolutions with BatchNorm, whose activations work in place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 4),
    ).double()


# ---- where a network is cut ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp", "mlp_smooth", "cnn", "cnn_smooth", "cnn_20_50", "resnet18", "resnet50", "squeezenet"]
)
def test_a_network_is_the_composition_of_its_blocks(name):
    model, inputs = load_model(name, 10, (3, 16, 16), seed=0).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        composed = inputs
        for _, block in blocks_of(model):
            composed = block(composed)
        assert torch.equal(composed, model(inputs))


@pytest.mark.parametrize("name", ["lstm", "densenet121"])
def test_what_cannot_be_cut_is_said(name):
    shape = (14, 5) if name == "lstm" else (3, 16, 16)
    with pytest.raises(UsageError, match="nn.Sequential.*'blocks'"):
        blocks_of(load_model(name, 3, shape, seed=0))


def test_cuts_balance_and_then_send_the_least():
    """Against all cuts there are."""
    generator = torch.Generator().manual_seed(0)
    for K, count in [(4, 2), (6, 2), (7, 3), (8, 4)] * 5:
        draw = torch.randint(0, 5, (4, K), generator=generator).tolist()
        costs, crossing, weights, starts = draw[0], draw[1], [w > 0 for w in draw[2]], [s > 0 for s in draw[3]]

        def worth(cuts, costs=costs, crossing=crossing, K=K):
            edges = [0, *cuts, K]
            return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges)), sum(crossing[a] for a in cuts)

        possible = [
            cuts
            for cuts in itertools.combinations(range(1, K), count - 1)
            if all(starts[a] for a in cuts)
            and all(any(weights[a:b]) for a, b in itertools.pairwise([0, *cuts, K]))
        ]  # fmt: skip
        if possible:
            found = balanced(costs, crossing, weights, starts, count)
            assert tuple(found) in possible and worth(found) == min(map(worth, possible))
        else:
            with pytest.raises(UsageError, match="--stages"):
                balanced(costs, crossing, weights, starts, count)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_stages_share_out_the_row(count):
    model = with_norm()
    layout = RowLayout(model, channels_last=True, align=8)
    stages = cut(model, layout, (1, 8, 8), count)
    entries = [e for stage in stages for e in (*stage.parameters, *stage.buffers)]
    assert sorted(e.offset for e in entries) == [e.offset for e in layout.entries]
    state = model.state_dict(keep_vars=True)
    for stage in stages:
        own = dict(stage.module.named_parameters())
        for entry in stage.parameters:
            place = next(e for e in layout.parameters if e.offset == entry.offset)
            assert own[entry.name] is state[place.name] and entry.shape == place.shape
    assert not any(getattr(stage.module[0], "inplace", False) for stage in stages)
    assert [name for stage in stages for name in stage.names] == [name for name, _ in blocks_of(model)]


def test_the_cnn_is_cut_where_it_is_said():
    model = load_model("cnn", 10, (1, 8, 8), seed=0)
    stages = cut(model, RowLayout(model), (1, 8, 8), 3, ("3", "7"))
    assert [stage.names[0] for stage in stages] == ["0", "3", "7"] and stages[1].shape == (32, 4, 4)
    assert [stage.products for stage in stages] == [64 * 32 * 9, 16 * 64 * 32 * 9, 256 * 64 + 64 * 10]
    automatic = cut(model, RowLayout(model), (1, 8, 8), 2)
    assert [stage.names[0] for stage in automatic] == ["0", "3"]  # after the pooling: the fewest floats cross


@pytest.mark.parametrize(
    ("at", "words"),
    [(("7",), "choose from"), (("0",), "choose from"), (("0.2",), "overwrites"), (("1", "0.1"), "order")],
)
def test_places_that_are_none(at, words):
    model = with_norm()
    with pytest.raises(UsageError, match=words):
        cut(model, RowLayout(model), (1, 8, 8), len(at) + 1, at)


def test_parameters_in_two_stages_are_refused():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)
    with pytest.raises(UsageError, match="two of them"):
        cut(model, RowLayout(model), (1, 8, 8), 2)


# ---- one process: the same numbers ----------------------------------------------------------------------------


def staged(fleet, count: int, parts: int = 1, threads: int = 1) -> StagedFleet:
    """The same fleet, its network in stages."""
    old, shape = fleet.engine, tuple(fleet.samples.inputs_n.shape[1:])
    engine = Engine(old.model, old.layout, "threads", threads, parts=parts)
    return StagedFleet(
        engine, fleet.rows_RD.clone(), fleet.samples, fleet.batches, optimizer=fleet.optimizer, seed=fleet.seed,
        weights_Mn=fleet.weights_Mn, stages=cut(old.model, old.layout, shape, count),
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("count", "parts", "threads"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (2, 3, 1), (3, 3, 2)])
def test_stages_are_the_whole_network(count, parts, threads, channels_last, dtype, tolerance):
    weights_Mn = torch.linspace(0, 2, 60)[None]
    options = dict(model="cnn", lengths=(13, 5, 20), batch_size=7, dtype=dtype, channels_last=channels_last)
    whole = small_fleet(**options, weights_Mn=weights_Mn)
    split = staged(whole, count, parts, threads)
    rows, batch = whole.rows_RD[:1], whole.batch([0], *whole.schedule(torch.zeros(3, dtype=torch.int64)))
    for left, right in zip(whole._gradients(rows, batch)[1], split._gradients(rows, batch)[1], strict=True):
        torch.testing.assert_close(right, left, rtol=0, atol=tolerance)
    run_steps(whole, 4), run_steps(split, 4)
    torch.testing.assert_close(split.rows_RD, whole.rows_RD, rtol=0, atol=tolerance)
    losses = [fleet.step(torch.tensor([4, 4, 4]), 0.1) for fleet in (whole, split)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [2, 3])
def test_normalization_over_whole_batches_is_the_same(count):
    whole = small_fleet(with_norm(), lengths=(20, 20), batch_size=6)
    split = staged(whole, count)
    run_steps(whole, 3), run_steps(split, 3)
    torch.testing.assert_close(split.rows_RD, whole.rows_RD, **EXACT)  # running statistics too


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The unsplit run, its batches cut alike, so that all bits are the same."""
    return train(tmp_path_factory.mktemp("whole"), *SPLIT, "--batch_parts", "4", "--patience", "50")


def without_costs(run_dir: Path) -> tuple:
    """Its records but for traffic and time, which stages change."""
    costs = ("bytes", "virtual_seconds", "processes", "crossed_bytes")
    lines = [*metrics(run_dir), summary(run_dir)]
    *lines, end = [{k: v for k, v in line.items() if k not in costs} for line in lines]
    return lines, end


def test_a_split_run_is_any_run(tmp_path, whole):
    """Its metrics, summary and model; what is between stages is counted, and what they are is recorded."""
    run = train(tmp_path, *SPLIT, "--stages", "3", "--microbatches", "4", "--patience", "50")
    assert without_costs(run) == without_costs(whole)
    assert same_tensors(run / "model.safetensors", whole / "model.safetensors")
    [picture] = [path for path in plot_run(run) if path.name == "stages.png"]
    assert picture.exists() and all(path.name != "stages.png" for path in plot_run(whole))
    stages = load(run / "config.json")["stages"]
    assert sum(stage["parameters"] for stage in stages) == sum(p.numel() for p in load_model(
        "cnn", 10, (1, 8, 8), seed=0).parameters())  # fmt: skip
    assert sum(stage["share"] for stage in stages) == pytest.approx(1)
    floats = {"3": 32 * 16, "6": 64 * 4, "7": 256}  # that enter the stages
    crossing = sum(floats[stage["blocks"][0]] for stage in stages[1:])
    assert [line["bytes"] for line in metrics(run)] == [2 * 8 * crossing * 30 * line["round"] for line in metrics(run)]
    assert summary(whole)["bytes"] == 0 and summary(run)["bytes"] > 0


@pytest.mark.parametrize("stages", ["1", "2"])
def test_a_split_run_goes_on_in_other_stages(tmp_path, whole, stages, monkeypatch):
    first = ("--stages", "3", "--microbatches", "4", "--checkpoint_every", "5", "--patience", "50")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("training.round_losses.mean_loss", lambda event: 1 / (event.done < 7) and 0.0)
        main.main(arguments(tmp_path, *SPLIT, *first))
    run = train(tmp_path, *SPLIT, "--patience", "50", "--stages", stages, "--resume")
    assert same_tensors(run / "model.safetensors", whole / "model.safetensors")
    sent = [line["bytes"] for line in metrics(run)]
    assert sent == sorted(sent) and sent[-1] > 0  # what had been sent before the kill stays
    again = tmp_path / "again"
    replay = ["--config", str(run / "config.json"), "--results_dir", str(tmp_path), "--run_name", "again"]
    assert main.main(replay) == 0
    assert len(load(again / "stage1" / "config.json")["stages"]) == 3
    assert same_tensors(again / "stage1" / "model.safetensors", whole / "model.safetensors")


@pytest.mark.slow
def test_scores_of_a_split_run_are_those_of_the_whole(tmp_path):
    """Methods replay it unsplit."""
    flags = ("--engine", "threads", "--dtype", "float64", "--pruning_algorithm", "cascade", "--train_ratio", "0.8")
    folders = [
        prune(tmp_path, *flags, name="whole"),
        prune(tmp_path, *flags, "--stages", "2", "--microbatches", "1", name="split"),
    ]
    for name in ("over_stage1", "over_random"):
        assert len({tuple(load(folder / "comparison.json")[name]) for folder in folders}) == 1
    assert len({(folder / "influence/cascade.zarr/scores/c/0").read_bytes() for folder in folders}) == 1


@pytest.mark.slow
def test_a_thousand_layers_learn_in_two_stages(tmp_path):
    flags = ("--model", "mlp_deep", "--engine", "auto", "--num_workers", "1", "--protocol", "local",
             "--partition", "iid")  # fmt: skip
    run = train(tmp_path, *flags, "--stages", "2", "--microbatches", "2", "--max_train", "400", "--epochs", "2")
    assert [stage["share"] for stage in load(run / "config.json")["stages"]] == pytest.approx([0.5, 0.5], abs=0.01)
    assert summary(run)["test_accuracy"] > 0.5


# ---- what is refused, and said ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--stages", "2", "--schedule", "1f1b"), "--microbatches 2"),
        (("--stages", "3", "--schedule", "interleaved"), "an even --stages of 4 or more"),
        (("--stages", "4", "--schedule", "interleaved", "--microbatches", "5"), "a multiple of 2"),
        (("--stages", "2", "--split_labels", "first"), "--stages 3 at least"),
        (("--stages", "2", "--protocol", "fedasync"), "who is first"),
        (("--stages", "2", "--engine", "measure"), "nothing has to be measured"),
        (("--stages", "3", "--split_at", "1"), "--split_at has 1 names"),
        (("--stages", "2", "--amp"), "--amp"),
        (("--stages", "2", "--dp_noise", "1"), "--dp_noise"),
        (("--stages", "2", "--engine", "vmap"), "--engine threads or loop"),
        (("--stages", "2", "--model", "resnet18", "--microbatches", "2"), "statistics would be those of microbatches"),
    ],
)
def test_what_does_not_go_together(flags, words, tmp_path, capsys):
    assert words in refused(capsys, main.main(arguments(tmp_path, *SPLIT, "--dtype", "float32", *flags)))


@pytest.mark.parametrize(
    ("settings", "world", "words"),
    [
        (dict(stages=2), 3, "--nproc-per-node 2:"),
        (dict(num_workers=2), 6, "a multiple of it and at most 4"),
        (dict(num_workers=4, protocol="gossip", aggregation="median"), 2, "needs whole rows"),
        (dict(num_workers=4, protocol="gossip", on_bad_worker="isolate"), 2, "needs whole rows"),
        (dict(stages=4, schedule="interleaved", microbatches=4, batch_parts=5), 2, "a multiple of 2"),
        (dict(ledger="x"), 2, "--ledger"),
        (dict(finetune=1), 2, "--finetune"),
    ],
)
def test_what_processes_cannot_do_yet(settings, world, words, monkeypatch):
    from training.build import build

    config = Config(**(dict(model="cnn", num_workers=1, protocol="local", stages=2, max_train=200) | settings))
    execution = build(config).execution
    if "batch_parts" in settings:  # of a record
        execution = dataclasses.replace(execution, batch_parts=settings["batch_parts"])
    monkeypatch.setattr(distributed, "started", lambda: True)
    monkeypatch.setattr(distributed, "world", lambda: world)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "agree", lambda parts, what: None)
    with pytest.raises(UsageError, match=words):
        build(config, execution)


def test_virtual_time_counts_the_pipeline(tmp_path):
    """A step of 10 ms: M parts in turn, of the dearest stage, and the way there and back of the messages."""
    clock = ("--latency_ms", "1", "--bandwidth_mbps", "0.8", "--step_ms", "10")
    run = train(tmp_path, *SPLIT, *clock, "--stages", "2", "--microbatches", "5", "--split_at", "7")
    before, after = (stage["products"] for stage in load(run / "config.json")["stages"])
    step = 10e-3 * (4 * before + before + after) / (5 * (before + after)) + 2 * (1e-3 + 6 * 256 * 8 / 1e5)
    end = summary(run)
    assert end["virtual_seconds"] == pytest.approx(step * end["rounds"])


def test_fewer_microbatches_than_stages_are_said(tmp_path, capsys):
    train(tmp_path, *SPLIT, "--stages", "3", "--microbatches", "2")
    assert "50% of the time" in capsys.readouterr().err
    assert bubble(3, 2) == 0.5 and bubble(1, 4) == 0 and bubble(2, 4) == 0.2
    assert speedup([7, 7, 7], 2) == pytest.approx(3 * (1 - bubble(3, 2))) and speedup([1, 3], 2) == 8 / 7
