"""The equivalences between protocols, and what they count."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scipy import sparse

import main_pruned
from tests.runs import digits_job, final_objective, recorded
from training.protocols import load_protocol
from training.protocols.chained import shortest_tour, worker_at
from utils.errors import UsageError
from utils.influence.cascade import cascade
from utils.topology import build_topology

EQUAL = dict(
    partition="preference",
    node_datasize=32,
    max_train=None,
    num_workers=8,
    batch_size=16,
    scheduler="constant",
    engine="vmap",
)


def trained(job, rounds=None):
    fleet = job.make_fleet()
    events = []
    for event in load_protocol(job.config.protocol).run(fleet, job):
        events.append(event)
        if event.done == rounds:
            break
    return fleet, events


@pytest.mark.parametrize("extra", [dict(momentum=0.0), dict(keep_momentum=True)])
@pytest.mark.parametrize("local_epochs", [1, 2])
def test_fedavg_with_everybody_is_gossip_on_the_complete_graph(extra, local_epochs):
    """Shards of 32 at batch 16: an epoch is two steps. Averaged from a common start, workers stay equal
    between rounds either way."""
    fedavg = digits_job(**EQUAL, protocol="fedavg", local_epochs=local_epochs, epochs=4, **extra)
    gossip = digits_job(**EQUAL, protocol="gossip", mode="all", local_steps=2 * local_epochs, epochs=4, **extra)
    left, right = trained(fedavg)[0], trained(gossip)[0]
    torch.testing.assert_close(left.rows_RD, right.rows_RD, rtol=1e-10, atol=1e-12)
    assert not torch.equal(left.rows_RD[0], left.rows_RD[0] * 0 + fedavg.initial_ND[0])


def test_fedasync_with_equal_speeds_and_a_full_buffer_is_fedavg():
    fedavg = digits_job(**EQUAL, protocol="fedavg", epochs=4)
    fedasync_job = digits_job(
        **EQUAL, protocol="fedasync", epochs=4, async_alpha=1.0, staleness_exponent=0.0, buffer_size=8
    )
    left, right = trained(fedavg)[0], trained(fedasync_job)[0]
    torch.testing.assert_close(left.rows_RD, right.rows_RD, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("protocol", ["chained", "local"])
def test_one_worker_alone_is_a_plain_pytorch_loop(protocol):
    job = digits_job(protocol=protocol, num_workers=1, partition="iid", max_train=96, epochs=4, model="cnn")
    fleet, events = trained(job)
    model = copy.deepcopy(job.model).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=job.config.momentum, weight_decay=job.config.wd)
    total = load_protocol(protocol).rounds(job)
    steps_a_round = job.total_steps // total
    for t in range(job.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate(t // steps_a_round, total)
        images, labels = job.samples.plain(job.batches.ids(torch.tensor([t]))[0])
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    state = model.state_dict()
    for name, tensor in fleet.layout.state_dict(fleet.rows_RD[0]).items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-8, atol=1e-10)


def test_gossip_with_the_identity_is_local():
    gossip, local = digits_job(engine="vmap"), digits_job(protocol="local", engine="vmap")
    identity = dataclasses.replace(gossip.topology, matrices=(sparse.csr_array(sparse.eye_array(8)),))
    gossip.topology = identity
    assert torch.equal(trained(gossip)[0].rows_RD, trained(local)[0].rows_RD)


def test_messages_and_bytes():
    ring = trained(digits_job(engine="vmap"), 1)[1][0]
    assert ring.messages == 2 * 8
    job = digits_job(engine="vmap", protocol="fedavg", fraction_fit=0.5)
    assert trained(job, 1)[1][0].messages == 2 * 4
    assert trained(digits_job(engine="vmap", protocol="chained"), 1)[1][0].messages == 1
    assert trained(digits_job(engine="vmap", protocol="local"), 1)[1][0].messages == 0
    assert job.virtual_time.row_bytes == 8 * 4810


def test_virtual_time_follows_the_slowest_and_the_links():
    slow = dict(engine="vmap", speed_spread=1.0, latency_ms=100.0, bandwidth_mbps=1.0)
    job = digits_job(**slow)
    clock = job.virtual_time
    row = 0.1 + 2 * 8 * 4810 / (1e6 / 8)
    assert trained(job, 1)[1][0].seconds == pytest.approx(clock.step_seconds_N.max() + row)
    assert clock.step_seconds_N.max() / clock.step_seconds_N.min() > 2
    asynchronous = digits_job(**slow, protocol="fedasync")
    times = [u.time for u in load_protocol("fedasync").schedule(asynchronous)]
    assert times == sorted(times)
    visits = [sum(k in u.workers for u in load_protocol("fedasync").schedule(asynchronous)) for k in range(8)]
    fast, slowest = clock.step_seconds_N.argmin(), clock.step_seconds_N.argmax()
    assert visits[fast] >= visits[slowest]
    assert any(s > 0 for u in load_protocol("fedasync").schedule(asynchronous) for s in u.staleness)


def test_sampling_is_a_mask_and_idle_workers_hold_the_global_row():
    job = digits_job(engine="vmap", protocol="fedavg", fraction_fit=0.25, epochs=4)
    fleet, events = trained(job)
    assert all(int(e.trained_R.sum()) == 2 for e in events)
    assert len({tuple(e.trained_R.tolist()) for e in events}) > 3
    assert torch.equal(fleet.rows_RD, fleet.rows_RD[:1].expand_as(fleet.rows_RD))


def test_server_momentum_is_its_formula():
    plain = digits_job(**EQUAL, protocol="fedavg", epochs=2)
    heavy = digits_job(**EQUAL, protocol="fedavg", epochs=2, server_momentum=0.5)
    start = plain.initial_ND[0]
    one_plain, one_heavy = trained(plain, 1)[0].rows_RD[0], trained(heavy, 1)[0].rows_RD[0]
    torch.testing.assert_close(one_plain, one_heavy)  # the first move has no past
    fleet = trained(heavy)[0]
    second = heavy.make_fleet()
    second.rows_RD.copy_(one_heavy.expand_as(second.rows_RD))
    step = load_protocol("fedavg").plan(heavy, 1)
    from training.protocols import train_round

    train_round(second, step)
    second.mix(step.mixing)
    velocity = 0.5 * (start - one_heavy) + (one_heavy - second.rows_RD[0])
    torch.testing.assert_close(fleet.rows_RD[0], one_heavy - velocity, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        dict(protocol="fedavg", fraction_fit=0.5, epochs=3),
        dict(protocol="fedavg", fraction_fit=0.5, epochs=3, keep_momentum=True),
        dict(protocol="chained", chain_order="random", epochs=2, num_workers=4, mode="ring"),
        dict(protocol="local"),
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_cascade_is_exact_through_every_linear_protocol(settings):
    job = digits_job(engine="vmap", max_train=250, **settings)
    scores_n = cascade(recorded(job))
    for i in torch.stack([shard[1] for shard in job.shards[:3]]).tolist():
        values = []
        for sign in (1, -1):
            weights_n = job.sample_weights_n.double()
            weights_n[i] += sign * 1e-4
            values.append(final_objective(job, weights_n))
        assert -scores_n[i].item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5, abs=1e-13)


def test_what_is_not_linear_is_refused():
    with pytest.raises(UsageError, match="linear"):
        recorded(digits_job(engine="vmap", protocol="fedasync"))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_runs_of_other_optimizers_are_not_scored(optimizer, tmp_path, capsys):
    with pytest.raises(UsageError, match=f"--optimizer sgd.*{optimizer}"):
        recorded(digits_job(engine="vmap", optimizer=optimizer))
    words = ["--optimizer", optimizer, "--pruning_algorithm", "cascade", "--results_dir", str(tmp_path)]
    assert main_pruned.main(words) == 2 and "--optimizer sgd" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())  # said before anything is trained


def test_chain_orders():
    job = digits_job(protocol="chained", chain_order="random", num_workers=5)
    cycles = [[worker_at(job, 5 * c + h) for h in range(5)] for c in range(4)]
    assert all(sorted(cycle) == list(range(5)) for cycle in cycles) and len(set(map(tuple, cycles))) > 1
    tour = shortest_tour(build_topology("grid", 12).matrices[0])
    assert sorted(tour) == list(range(12))
    adjacency = build_topology("grid", 12).matrices[0].toarray() > 0
    assert all(adjacency[a, b] for a, b in zip(tour, tour[1:], strict=False))  # a 3 x 4 torus has a Hamiltonian path


def test_buffer_larger_than_the_fleet_is_refused():
    with pytest.raises(UsageError, match="--buffer_size"):
        load_protocol("fedasync").schedule(digits_job(protocol="fedasync", buffer_size=9))
