"""The GPU path on the stand-in accelerator (:mod:`tests.stand_in`): the CPU's numbers to the bit, nothing mixed, and
mistakes planted on purpose are noticed. What it costs: test_device_budget.py.

In float32: a recorded step reads its learning rate as that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.device_runs import a_job, assert_within, measure, same_on_both, trained
from tests.own_process import in_own_process
from tests.runs import recorded
from tests.stand_in import DeviceError, stand_in
from training.build import Job
from training.retrain import retrain
from training.trainer import train
from utils.errors import UsageError
from utils.influence import Options, score
from utils.influence.ripples import ripples
from utils.records import read_json
from workers.batch import Batch
from workers.derivatives import Derivatives
from workers.engine import Engine
from workers.step_graph import STREAMS, StepGraph, Streams, streams_of
from workers.worker_vision import Fleet

# ---- the same numbers ----------------------------------------------------------------------------

TRAININGS = {
    "cnn": dict(model="cnn", engine="graph"),
    "cnn-channels_last": dict(model="cnn", engine="graph", channels_last=True),
    "mlp-vmap-threads": dict(model="mlp", engine="vmap", num_workers=8, threads=2),
    "mlp-loop-one_peer": dict(model="mlp", engine="loop", mode="exponential_one_peer", init="per_worker"),
    "mlp-graph-local_steps": dict(model="mlp", engine="graph", local_steps=2, epochs=2, scheduler="multistep"),
    "normed-graph": dict(model="normed", engine="graph"),
    "normed-loop": dict(model="normed", engine="loop", augment="crop"),
    "normed-vmap": dict(model="normed", engine="vmap"),
    "graph-ragged-augmented": dict(model="normed", engine="graph", batch_size=64, epochs=4, augment="crop_flip"),
    "vmap-ragged": dict(model="mlp", engine="vmap", batch_size=64, epochs=4),
    "fedavg": dict(model="mlp", engine="graph", protocol="fedavg", fraction_fit=0.5, epochs=2),
    "fedavg-momentum": dict(model="mlp", engine="vmap", protocol="fedavg", server_momentum=0.5, epochs=2),
    "fedasync": dict(model="mlp", engine="loop", protocol="fedasync"),
    "chained": dict(model="mlp", engine="graph", protocol="chained", epochs=2),
    "local": dict(model="mlp", engine="graph", protocol="local"),
    "all": dict(model="mlp", engine="vmap", mode="all", num_workers=6),
    "median": dict(model="mlp", engine="graph", mode="all", aggregation="median", byzantine="1:sign_flip"),
    "trimmed_mean": dict(model="normed", engine="loop", mode="all", aggregation="trimmed_mean", byzantine="1:noise"),
    "clipped": dict(model="normed", engine="graph", mode="all", aggregation="clipped", byzantine="1:noise"),
    "isolate": dict(model="mlp", engine="graph", mode="all", aggregation="median", byzantine="1:nan",
                    on_bad_worker="isolate"),
    "private-cnn": dict(model="cnn", engine="loop", channels_last=True, dp_noise=1.0),
    "private-vmap-ragged": dict(model="mlp", engine="vmap", batch_size=64, dp_noise=1.0, augment="crop"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
@in_own_process
def test_training_gives_the_bits_of_the_cpu(name):
    same_on_both(trained, **TRAININGS[name])


@pytest.mark.parametrize("name", ["cnn-channels_last", "mlp-vmap-threads", "all", "fedavg", "median", "clipped",
                                  "private-cnn"])  # fmt: skip
def test_the_way_of_devices_leads_to_the_same_place(name):
    """Rows with gaps, one product instead of neighbour by neighbour, larger pieces: on the CPU, in float64."""
    settings = TRAININGS[name] | dict(dtype="float64")
    job = a_job("cpu", **settings)
    expected = trained(job)
    with mock.patch("utils.devices.is_accelerator", return_value=True):
        padded = a_job("cpu", **settings)
        result = trained(padded)
    assert padded.engine.layout.D % 32 == 0 or settings["model"] == "normed"  # made by hand
    for part in ("rows", "momentum", "consensus"):
        result[part] = padded.engine.layout.canonical(result[part])
        expected[part] = job.engine.layout.canonical(expected[part])
    for part, tensor in expected.items():
        torch.testing.assert_close(result[part], tensor, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "vmap", "graph"])
@in_own_process
def test_replicas_with_weights_give_the_bits_of_the_cpu(engine):
    def retrained(job: Job) -> dict[str, Tensor]:
        weights_Mn = torch.ones(3, len(job.dataset.targets_n))
        weights_Mn[1, job.train_ids[::3]] = 0.0
        weights_Mn[2, job.train_ids[::2]] = 0.5
        return {target: retrain(job, 3, weights_Mn, target) for target in ("nodes", "consensus", "worker:1")}

    same_on_both(retrained, model="mlp", engine=engine)


SCORED = {
    "mlp-vmap": dict(model="mlp_smooth", engine="vmap"),
    "mlp-graph-ragged": dict(model="mlp_smooth", engine="graph", batch_size=64, epochs=3, local_steps=2),
    "cnn-graph": dict(model="cnn_smooth", engine="graph", mode="exponential_one_peer"),
    "normed-loop": dict(model="normed", engine="loop"),
    "fedavg": dict(model="mlp_smooth", engine="graph", protocol="fedavg", fraction_fit=0.5, epochs=2),
    "chained": dict(model="mlp_smooth", engine="graph", protocol="chained"),
}
SLOWLY_SCORED = SCORED.keys() - {"mlp-vmap", "chained"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOWLY_SCORED else n for n in SCORED])
@in_own_process
def test_scores_are_the_bits_of_the_cpu(name):
    def scored(job: Job) -> dict[str, Tensor]:
        methods = ["cascade", "dice", "delete", *(["if"] if name in ("cnn-graph", "normed-loop") else [])]
        run, options = recorded(job, memory_limit=1e5), Options(dice_hops=2, dice_rounds=2, delete_checkpoints=2)
        scores = {method: score(method, run, options) for method in methods}
        return scores | {"ripples": ripples(run, hops=1, rounds=1)}

    same_on_both(scored, **SCORED[name])


@pytest.mark.slow
@in_own_process
def test_a_whole_run_leaves_the_files_of_the_cpu(tmp_path):
    """The command's path: 'auto' tries a recorded step, the trainer evaluates, checkpoints, resumes and tests."""
    settings = dict(model="cnn", engine="auto", epochs=2, checkpoint_every=2, threads=2)
    train(a_job("cpu", **settings | dict(engine="loop")), tmp_path / "cpu")
    with stand_in() as log:
        job = a_job("cuda", **settings)
        assert job.execution.engine == "graph"
        for max_rounds in (4, None):  # killed after four rounds, resumed
            stopped = dataclasses.replace(job, config=dataclasses.replace(job.config, max_rounds=max_rounds))
            train(stopped, tmp_path / "cuda")
    assert log.errors == [], log.errors
    models = [load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    summaries = [read_json(tmp_path / device / "summary.json") for device in ("cpu", "cuda")]
    for summary in summaries:
        del summary["seconds"], summary["samples_per_second"]
    assert summaries[0] == summaries[1], summaries


# ---- planted mistakes ---------------------------------------------------------------------------------


def a_fleet(engine: str = "graph", **settings) -> Fleet:
    return a_job("cuda", model="mlp", engine=engine, **settings).make_fleet()


def a_step(fleet: Fleet) -> None:
    fleet.step(torch.zeros(fleet.num_workers, dtype=torch.int64), 0.0625)


def loss_that(looks: Callable[[Tensor], object]):
    """A step whose loss is also looked at."""
    plain = Batch.mean

    def mean(batch: Batch, losses_nB: Tensor) -> Tensor:
        loss_n = plain(batch, losses_nB)
        looks(loss_n.detach())
        return loss_n

    return mock.patch.object(Batch, "mean", mean)


def on_branches(fork: bool, join: bool):
    """Steps whose streams do not wait for each other."""

    def run(device: torch.device, streams: Streams, rows: range, step: Callable[[int], None]) -> None:
        own = torch.cuda.current_stream()
        for row, stream in zip(rows, streams.branches, strict=False):
            if fork:
                stream.wait_stream(own)
            with torch.cuda.stream(stream):
                step(row)
            if join:
                own.wait_stream(stream)

    return mock.patch("workers.step_graph._on_branches", run)


def a_cpu_tensor_in_an_operator():
    a_fleet().rows_RD.add_(torch.ones(4, 1))


def weights_that_stayed_on_the_cpu():
    fleet = a_fleet("vmap")
    fleet.weights_Mn, fleet._all_count = fleet.weights_Mn.cpu(), False
    a_step(fleet)


def numpy_of_a_device_tensor():
    a_fleet().rows_RD.numpy()


def item_in_a_recorded_step():
    with loss_that(lambda loss_n: loss_n.sum().item()):
        a_step(a_fleet())


def a_mask_in_a_recorded_step():
    with loss_that(lambda loss_n: loss_n[loss_n > 0]):
        a_step(a_fleet())


def a_copy_in_a_recorded_step():
    with loss_that(lambda loss_n: loss_n.add(torch.ones(1).to("cuda", non_blocking=True))):
        a_step(a_fleet())


def no_memory_in_a_recorded_step():
    def look(loss_n: Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")

    with loss_that(look):
        a_step(a_fleet())


def a_failed_recording_among_timed_candidates():
    with loss_that(lambda loss_n: loss_n.sum().item()):
        a_job("cuda", model="cnn", engine="measure")


def a_measured_recording_that_does_something_else():
    def baked(graph: StepGraph, fleet: Fleet, row: int) -> None:
        with mock.patch.object(graph, "_lr", 0.0625):
            plain(graph, fleet, row)

    plain, fastest = StepGraph._step_row, mock.patch("workers.tuning.fastest", return_value=("graph", True))
    with mock.patch.object(StepGraph, "_step_row", baked), fastest:
        a_job("cuda", model="cnn", engine="measure")


def an_extra_step_of_one_row_in_the_second_matrix():
    plain = StepGraph._step_row

    def twice(graph: StepGraph, fleet: Fleet, row: int) -> None:
        for _ in range(2 if row == 2 and graph._recorded else 1):
            plain(graph, fleet, row)

    with mock.patch.object(StepGraph, "_step_row", twice):
        a_job("cuda", model="mlp", engine="graph")


def no_memory_for_a_timed_candidate():
    plain = Engine.outputs

    def outputs(engine: Engine, *arguments, **options) -> Tensor:
        if engine.batched:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(engine, *arguments, **options)

    with mock.patch.object(Engine, "outputs", outputs):
        a_job("cuda", model="mlp", engine="measure")


def no_memory_for_a_derivative():
    error = torch.OutOfMemoryError("CUDA out of memory")
    with mock.patch.object(Derivatives, "_by_forward_mode", side_effect=error):
        score("cascade", recorded(a_job("cuda", model="mlp_smooth", engine="loop")), Options())


def streams_that_do_not_wait_for_the_first():
    with on_branches(fork=False, join=True):
        a_step(a_fleet())


def streams_that_are_not_joined():
    with on_branches(fork=True, join=False):
        a_step(a_fleet())


def streams_that_share_memory():
    shared = torch.zeros(1, device="cuda")
    with loss_that(lambda loss_n: shared.add_(loss_n)):
        a_step(a_fleet())


def a_graphs_output_before_its_replay():
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x
    (y + 1).tolist()


def page_locked_memory_used_again_too_early():
    ids = torch.zeros(3).pin_memory()
    torch.zeros(3, device="cuda").copy_(ids, non_blocking=True)
    ids.fill_(1)
    torch.cuda.synchronize()


def a_step_that_waits():
    with loss_that(lambda loss_n: loss_n.tolist()), stand_in() as log:
        fleet = a_fleet("loop")
        assert_within({"step": (0, 1000)}, {"step": measure(log, lambda: a_step(fleet))})


def a_learning_rate_baked_into_the_graph():
    plain = StepGraph._step_row

    def baked(graph: StepGraph, fleet: Fleet, row: int) -> None:
        with mock.patch.object(graph, "_lr", 0.0625):
            plain(graph, fleet, row)

    with mock.patch.object(StepGraph, "_step_row", baked):
        same_on_both(trained, **TRAININGS["mlp-graph-local_steps"])


def a_batch_that_the_graph_does_not_see():
    with mock.patch("workers.step_graph.dataclasses.fields", lambda batch: []):
        same_on_both(trained, **TRAININGS["cnn"])


def page_locked_memory_read_too_early():
    losses = torch.full((3,), 7.0).pin_memory()
    losses.copy_(torch.zeros(3, device="cuda"), non_blocking=True)
    assert losses.tolist() == [0.0, 0.0, 0.0], losses


FAULTS = {
    a_cpu_tensor_in_an_operator: (DeviceError, "a device tensor and a CPU tensor"),
    weights_that_stayed_on_the_cpu: (DeviceError, "a CPU tensor and indices on the device"),
    numpy_of_a_device_tensor: (RuntimeError, "numpy"),
    item_in_a_recorded_step: (UsageError, "cannot be recorded.*capturing: item at tests/test_device.py"),
    a_mask_in_a_recorded_step: (UsageError, "cannot be recorded.*capturing: index by a mask"),
    a_copy_in_a_recorded_step: (UsageError, "cannot be recorded.*pageable memory"),
    no_memory_in_a_recorded_step: (torch.OutOfMemoryError, "out of memory"),
    a_failed_recording_among_timed_candidates: (UsageError, "cannot be recorded.*capturing: item"),
    a_measured_recording_that_does_something_else: (UsageError, "recorded steps of this network differ"),
    an_extra_step_of_one_row_in_the_second_matrix: (UsageError, "recorded steps of this network differ"),
    no_memory_for_a_timed_candidate: (torch.OutOfMemoryError, "out of memory"),
    no_memory_for_a_derivative: (torch.OutOfMemoryError, "out of memory"),
    streams_that_do_not_wait_for_the_first: (UsageError, "cannot be recorded.*has not waited"),
    streams_that_are_not_joined: (UsageError, "cannot be recorded.*not joined"),
    streams_that_share_memory: (UsageError, "cannot be recorded.*two streams touch the same memory"),
    a_graphs_output_before_its_replay: (DeviceError, "before its first replay"),
    page_locked_memory_used_again_too_early: (RuntimeError, "overwritten before it was copied"),
    page_locked_memory_read_too_early: (AssertionError, "7., 7., 7."),
    a_step_that_waits: (AssertionError, "(?s)synchronizations.*copy to the host at tests/test_device.py"),
    a_learning_rate_baked_into_the_graph: (UsageError, "recorded steps of this network differ"),
    a_batch_that_the_graph_does_not_see: (UsageError, "recorded steps of this network differ"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@in_own_process
def test_a_planted_mistake_is_noticed(fault):
    error, reason = FAULTS[fault]
    with pytest.raises(error, match=reason), stand_in():
        fault()


@pytest.mark.slow
@in_own_process
def test_all_fleets_share_the_streams_of_a_device():
    streams_of.cache_clear()
    with stand_in(), mock.patch("torch.cuda.Stream", mock.Mock(wraps=torch.cuda.Stream)) as made:
        for _ in range(3):
            a_step(a_fleet())
    assert made.call_count == 1 + STREAMS
