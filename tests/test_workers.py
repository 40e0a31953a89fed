"""The fleet against plain PyTorch, engines against each other, gossip against the matrix product."""

import copy
import os
import platform
import resource
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import nn

from data.batches import PADDING, Batches
from networks import load_model
from tests.helpers import run_steps, shards_of, small_fleet, small_samples
from tests.own_process import in_own_process
from training import checkpoint
from utils.errors import UsageError
from utils.topology import build_topology
from workers.engine import Engine
from workers.mixing import COLUMNS, mix_replicas, mix_rows, without_workers
from workers.optimizers import SGD, Adam
from workers.row_layout import RowLayout

torch.manual_seed(0)
NORMED = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4))


OPTIMIZERS = {
    "sgd": (SGD(0.9, 1e-3), partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "adam": (Adam(0.8, 0.01, 0.99, 1e-7), partial(torch.optim.Adam, lr=0.005, betas=(0.8, 0.99), weight_decay=0.01,
                                                  eps=1e-7)),
    "adamw": (Adam(0.9, 0.1, decoupled=True), partial(torch.optim.AdamW, lr=0.005, weight_decay=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "cnn", NORMED])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_worker_is_a_plain_pytorch_loop(model, channels_last, name):
    torch.manual_seed(0)
    ours, theirs = OPTIMIZERS[name]
    fleet = small_fleet(
        copy.deepcopy(model), lengths=(13,), channels_last=channels_last, dtype=torch.float64, optimizer=ours
    )
    samples, batches = fleet.samples, fleet.batches
    plain = copy.deepcopy(fleet.engine.model).double().train()
    for (_, parameter), entry in zip(plain.named_parameters(), fleet.layout.parameters, strict=True):
        parameter.data.copy_(entry.view(fleet.rows_RD[0]))
    optimizer = theirs(plain.parameters())
    losses = []
    for t in range(7):
        images, labels = samples.plain(batches.ids(torch.tensor([t]))[0])
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(images.contiguous()), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert fleet.step(torch.tensor([t]), theirs.keywords["lr"]).item() == pytest.approx(losses[-1], rel=1e-6)
    state = plain.state_dict()
    for name, tensor in fleet.layout.state_dict(fleet.rows_RD[0]).items():
        torch.testing.assert_close(tensor, state[name].double(), rtol=1e-9, atol=1e-9)  # Adam enlarges rounding
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("model", ["mlp", "cnn", NORMED])
@pytest.mark.parametrize(("engine", "threads"), [("threads", 2), ("graph", 1), ("vmap", 1), ("vmap", 2)])
def test_engines_agree(model, engine, threads, name):
    ring, fleets = build_topology("ring", 4).mixing(0), []
    for how in ({}, {"engine": engine, "threads": threads}):
        start = copy.deepcopy(model).double() if isinstance(model, nn.Module) else model
        fleets.append(run_steps(small_fleet(start, optimizer=OPTIMIZERS[name][0], **how), 6, 0.01, mixing=ring))
    reference, other = fleets
    if engine != "vmap":  # one worker's operators are the same: not even the last bit may differ
        assert torch.equal(other.rows_RD, reference.rows_RD)
    torch.testing.assert_close(other.rows_RD, reference.rows_RD, rtol=1e-8, atol=1e-10)
    measured = (fleet.evaluate(other.samples, torch.arange(50)) for fleet in (other, reference))
    torch.testing.assert_close(*measured, rtol=1e-7, atol=1e-9)


def test_a_recorded_step_follows_whatever_changes():
    """Ragged batches, augmentation, weights, the learning rate, and matrices that move: as the loop, to the bit."""
    options = {"lengths": (3, 20, 9), "weights_Mn": torch.rand(2, 60, dtype=torch.float64).round()}
    fleets = [small_fleet(copy.deepcopy(NORMED).double(), engine=engine, **options,
                          samples=small_samples(augmentation="crop_flip")) for engine in ("graph", "loop")]  # fmt: skip
    rings = [build_topology("ring", 3).mixing(0), None]
    for t in range(7):
        lr, steps_N = 0.05 / (t + 1), torch.tensor([t, 2 * t, t + 1])
        losses = [fleet.step(steps_N, lr) for fleet in fleets]
        assert torch.equal(*losses)
        for fleet in fleets:
            if rings[t % 2] is not None:
                fleet.mix(rings[t % 2], state=t == 2)
            if t == 4:
                fleet.step(steps_N, lr, workers=[1])
                fleet.rows_RD = fleet.rows_RD.clone()
                fleet.reset_state([0])
        assert torch.equal(fleets[0].rows_RD, fleets[1].rows_RD)


def test_a_step_is_recorded_once_for_each_of_two_matrices():
    fleet, ring = small_fleet(engine="graph"), build_topology("ring", 4).mixing(0)
    start = checkpoint.snapshot(fleet)
    for t in range(9):
        fleet.step(torch.full((4,), t), 0.05)
        fleet.mix_robustly(ring, "median", None, t) if t % 3 == 0 else fleet.mix(ring)
        if t == 4:
            checkpoint.restore(fleet, start)
    assert len(fleet._step_graph._recorded) == 2
    before = checkpoint.snapshot(fleet)
    fleet._step_graph._rehearse_row(fleet, 1)  # what precedes a capture leaves no trace
    assert all(torch.equal(before[name], tensor) for name, tensor in checkpoint.snapshot(fleet).items())


@pytest.mark.parametrize("engine", ["loop", "vmap", "graph"])
def test_rows_with_gaps_train_alike(engine):
    """Padding, as on a GPU, changes no number and is in no file."""
    ring = build_topology("ring", 4).mixing(0)

    def fleet(align: int):
        return small_fleet(copy.deepcopy(NORMED).double(), engine=engine, channels_last=True, align=align)

    dense, padded = (run_steps(fleet(align), 5, mixing=ring) for align in (1, 32))
    assert padded.layout.D % 32 == 0 and padded.layout.P % 32 == 0 and padded.layout.D > dense.layout.D
    assert all(e.offset % 32 == 0 for e in padded.layout.entries)
    assert (padded.layout.num_parameters, padded.layout.num_floats) == (dense.layout.P, dense.layout.D)
    one, other = checkpoint.snapshot(dense), checkpoint.snapshot(padded)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-14)
        assert engine == "vmap" or torch.equal(one[name], other[name])
    torch.testing.assert_close(dense.consensus_distance(), padded.consensus_distance(), rtol=1e-9, atol=1e-12)
    again = fleet(32)
    checkpoint.restore(again, one)
    assert all(torch.equal(one[name], tensor) for name, tensor in checkpoint.snapshot(again).items())


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_ragged_shards_and_partial_participation(engine):
    fleet = small_fleet(lengths=(3, 20, 9), engine=engine)
    reference = small_fleet(lengths=(3, 20, 9))
    before = fleet.rows_RD.clone()
    losses = fleet.step(torch.tensor([4, 4, 4]), 0.1, workers=[0, 2])
    assert torch.equal(fleet.rows_RD[1], before[1]) and losses[1] == 0
    reference.step(torch.tensor([4, 9, 4]), 0.1)
    torch.testing.assert_close(fleet.rows_RD[[0, 2]], reference.rows_RD[[0, 2]], rtol=1e-9, atol=1e-12)


def test_vmap_refuses_batchnorm_on_ragged_batches():
    with pytest.raises(UsageError, match="--engine threads"):
        small_fleet(copy.deepcopy(NORMED).double(), lengths=(3, 20), engine="vmap")


def test_weight_zero_is_the_gradient_without_the_sample():
    weights_Mn = torch.ones(2, 60)
    ids = small_fleet(lengths=(15,)).batches.ids(torch.tensor([0]))[0]
    weights_Mn[1, ids[2]] = 0
    fleet = small_fleet(lengths=(15,), momentum=0.0, weight_decay=0.0, weights_Mn=weights_Mn)
    start = fleet.rows_RD[0].clone()
    fleet.step(torch.tensor([0]), 1.0)
    alone = small_fleet(lengths=(15,), momentum=0.0, weight_decay=0.0)
    leaves = alone.engine.leaves(start[None])
    images, labels = alone.samples.plain(ids[2:3])
    loss = F.cross_entropy(alone.engine.outputs(leaves, start[None], images[None], train=True)[0], labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(fleet.rows_RD[1] - fleet.rows_RD[0], gradient / 5, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_replicas_train_as_if_alone(engine):
    ring = build_topology("ring", 4).mixing(0)
    weights_Mn = torch.ones(3, 60)
    weights_Mn[1, ::7] = 0
    weights_Mn[2, 3] = 0
    together = run_steps(small_fleet(weights_Mn=weights_Mn, engine=engine), 5, mixing=ring)
    for m in range(3):
        alone = run_steps(small_fleet(weights_Mn=weights_Mn[m : m + 1], engine=engine), 5, mixing=ring)
        torch.testing.assert_close(together.rows_RD[4 * m : 4 * m + 4], alone.rows_RD, rtol=1e-10, atol=1e-12)


def test_momentum_is_reset_of_those_who_are_here():
    fleet = small_fleet(copy.deepcopy(NORMED))
    fleet.state_RS.fill_(1.0)
    fleet.owned = range(1, 4)  # as in one of several processes
    fleet.reset_state([0])
    assert (fleet.state_RS == 1).all()
    fleet.reset_state([0, 2])
    assert (fleet.state_RS[1] == 0).all() and (fleet.state_RS[[0, 2]] == 1).all()


def test_a_module_holds_views_into_its_row():
    fleet = small_fleet("cnn")
    module = fleet.module(1, load_model("cnn", 4, (1, 8, 8)).double())
    fleet.rows_RD[1] = 0.25
    assert all((p == 0.25).all() for p in module.parameters())


@pytest.mark.parametrize("mode", ["ring", "all", "grid", "exponential", "exponential_one_peer", "random", "star"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [77, 2 * COLUMNS + 77])
def test_gossip_is_the_matrix_product(mode, threads, width):
    model = nn.Linear(4, 4)
    engine = Engine(model, RowLayout(model), "threads" if threads > 1 else "loop", threads)
    matrix = build_topology(mode, 12, 1).mixing(0)
    source = torch.randn(12, width, dtype=torch.float64)
    target = torch.empty_like(source)
    mix_rows(engine, matrix, source, target)
    torch.testing.assert_close(target, torch.from_numpy(matrix.toarray()) @ source, rtol=1e-12, atol=1e-13)
    # A process that owns some rows, with the others' rows in another order: the same bits.
    order = np.random.default_rng(0).permutation(12)
    part = torch.empty(3, width, dtype=torch.float64)
    mix_rows(engine, matrix, source[order], part, np.array([4, 5, 6]), np.argsort(order))
    if mode == "all":
        torch.testing.assert_close(part, target[4:7], rtol=1e-12, atol=1e-13)
    else:
        assert torch.equal(part, target[4:7])


def test_identity_matrix_changes_nothing_and_distance_shrinks():
    fleet = run_steps(small_fleet(lengths=(10, 10, 10, 10)), 4)
    before, distance = fleet.rows_RD.clone(), fleet.consensus_distance()
    fleet.mix(sparse.csr_array(np.eye(4)))
    assert torch.equal(fleet.rows_RD, before)
    direct = (before[:, : fleet.layout.P] - before[:, : fleet.layout.P].mean(0)).square().sum(1).mean().sqrt()
    torch.testing.assert_close(distance, direct[None])
    fleet.mix(build_topology("ring", 4).mixing(0))
    assert fleet.consensus_distance() < distance
    torch.testing.assert_close(fleet.consensus()[0], before.mean(0))


def test_layout_round_trip():
    model = load_model("cnn", 4, (1, 8, 8))
    nchw, nhwc = RowLayout(model), RowLayout(model, channels_last=True)
    a, b = torch.empty(nchw.D), torch.empty(nhwc.D)
    nchw.write(model, a)
    nhwc.write(model, b)
    assert not torch.equal(a, b)
    assert torch.equal(nhwc.canonical(b), a) and torch.equal(nhwc.from_canonical(a), b)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 2**40), st.data())
def test_batches_walk_through_permutations(lengths, batch_size, seed, data):
    samples = small_samples(sum(lengths))
    batches = Batches(shards_of(samples, lengths), batch_size, seed)
    worker = data.draw(st.integers(0, len(lengths) - 1))
    length, size = lengths[worker], min(batch_size, lengths[worker])
    steps = -(-2 * length // size)
    seen = torch.cat([batches.ids(torch.full((len(lengths),), t))[worker] for t in range(steps)])
    seen = seen[seen != PADDING]
    shard = set(shards_of(samples, lengths)[worker].tolist())
    for k in range(2):  # each pass is a permutation of the shard
        assert sorted(seen[k * length : (k + 1) * length].tolist()) == sorted(shard)
    t = data.draw(st.integers(0, steps - 1))  # any step again, from a fresh schedule, at other workers' other steps
    others = torch.tensor(data.draw(st.lists(st.integers(0, 50), min_size=len(lengths), max_size=len(lengths))))
    others[worker] = t
    again = Batches(shards_of(samples, lengths), batch_size, seed).ids(others)[worker]
    assert again[again != PADDING].tolist() == seen[t * size : (t + 1) * size].tolist()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("mode", ["ring", "all", "exponential"])
def test_what_an_isolated_worker_holds_reaches_nobody(mode, on_device):
    """0 x NaN is NaN: a product with the mixing matrix would spread it."""
    engine = Engine(load_model("mlp", 10, (1, 8, 8)), RowLayout(load_model("mlp", 10, (1, 8, 8))), "loop")
    matrix, x_ND = without_workers(build_topology(mode, 8).mixing(0), [2]), torch.randn(8, 40)
    expected_ND = torch.as_tensor(matrix.toarray(), dtype=torch.float32) @ x_ND
    x_ND[2] = torch.nan
    y_ND, honest = torch.empty_like(x_ND), [k for k in range(8) if k != 2]
    with mock.patch("utils.devices.is_accelerator", return_value=on_device):
        mix_rows(engine, matrix, x_ND, y_ND)
    torch.testing.assert_close(y_ND[honest], expected_ND[honest])
    assert y_ND[2].isnan().all()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_replica_that_diverged_reaches_no_other(on_device):
    engine = Engine(load_model("mlp", 10, (1, 8, 8)), RowLayout(load_model("mlp", 10, (1, 8, 8))), "loop")
    matrix, x_RD = build_topology("exponential", 8).mixing(0), torch.randn(24, 40)
    blocks = sparse.csr_array(sparse.kron(sparse.eye_array(3), matrix, format="csr"))
    expected_RD = torch.as_tensor(blocks.toarray(), dtype=torch.float32) @ x_RD
    x_RD[8] = torch.inf
    y_RD = torch.empty_like(x_RD)
    with mock.patch("utils.devices.is_accelerator", return_value=on_device):
        mix_replicas(engine, matrix, blocks, x_RD, y_RD)
    others = [*range(8), *range(16, 24)]
    torch.testing.assert_close(y_RD[others], expected_RD[others])
    assert not y_RD[8:16].isfinite().all()


@in_own_process
def test_freed_memory_is_used_again():
    """A step that got its memory from the system anew would fault on each of its pages."""
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or platform.libc_ver()[0] != "glibc":
        pytest.skip("the allocator is another, or told what to do")
    fleet = small_fleet("mlp", lengths=(512,) * 256, batch_size=512, engine="vmap", dtype=torch.float32,
                        samples=small_samples(n=512 * 256, dtype=torch.float32))  # fmt: skip
    run_steps(fleet, 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run_steps(fleet, 10, first=5)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    rows = 10 * fleet.rows_RD.numel() * 4 / resource.getpagesize()  # without: 14 times as many; with: a tenth, at most
    assert faults < rows, f"{faults} page faults in 10 steps; the rows of 10 steps are {rows:.0f} pages"
