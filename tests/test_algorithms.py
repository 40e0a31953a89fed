"""The field's algorithms: each equals a plain loop in the words of its paper, is what its paper says in special cases,
and is differentiated exactly."""

import numpy as np
import pytest
import torch
from algorithms import World
from runs import digits_job, final_objective, recorded
from scipy.sparse.csgraph import shortest_path

import tests.algorithms as plain
from training.finetune import finetune
from training.protocols import load_protocol, train_round
from training.protocols.relay import Relays
from utils.errors import UsageError
from utils.influence.cascade import cascade
from utils.linear import Line, LinearRound
from utils.topology import build_topology
from workers.rounds import begin_round, end_round

FEW = dict(model="mlp_tiny", max_train=250, batch_size=16, scheduler="cosine", partition="iid")
DIRECTED = "0 0 .6\n0 3 .4\n1 0 .5\n1 1 .5\n2 1 .3\n2 2 .7\n3 3 .2\n3 2 .4\n3 1 .4\n"

CASES = {
    "cta": dict(order="cta"),
    "cta over steps": dict(order="cta", local_steps=2, optimizer="nesterov"),
    "nesterov": dict(optimizer="nesterov"),
    "qg": dict(protocol="qg", qg_momentum=0.7),
    "qg nesterov": dict(protocol="qg", optimizer="nesterov", local_steps=2),
    "d2": dict(protocol="d2", momentum=0.0),
    "d2 with momentum": dict(protocol="d2", mode="line", optimizer="nesterov"),
    "tracking": dict(protocol="tracking", momentum=0.0),
    "tracking with momentum": dict(protocol="tracking", mode="exponential_one_peer"),
    "choco": dict(protocol="choco", compression="none", consensus_step=0.4),
    "relay": dict(protocol="relay", mode="tree", num_workers=7),
    "relay over steps": dict(protocol="relay", mode="line", local_steps=2),
    "pushsum": dict(protocol="pushsum", mode="exponential_one_peer"),
    "pushsum directed": dict(protocol="pushsum", mode="file", num_workers=4),
    "diloco": dict(protocol="diloco", local_steps=3),
    "server momentum": dict(protocol="fedavg", server_momentum=0.5, fraction_fit=0.5),
    "fedprox": dict(protocol="fedprox", prox=0.3, fraction_fit=0.5, local_epochs=2),
    "scaffold": dict(protocol="scaffold", momentum=0.0, fraction_fit=0.5, server_lr=0.8),
    "scaffold with momentum": dict(protocol="scaffold", optimizer="nesterov", local_epochs=2),
}
LOSSY = {
    "top_k": dict(protocol="choco", compression_share=0.2, local_steps=2),
    "random_k": dict(protocol="choco", compression="random_k"),
    "sign": dict(protocol="choco", compression="sign"),
    "quantize": dict(protocol="choco", compression="quantize", compression_bits=3),
}


@pytest.fixture(scope="module")
def directed(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "directed.txt"
    path.write_text(DIRECTED)
    return str(path)


def job_of(settings, directed=None, **more):
    extra = {"topology_file": directed} if settings.get("mode") == "file" else {}
    return digits_job(**(FEW | dict(epochs=5) | settings | extra | more))


def trained(job, rounds=None):
    fleet, events, protocol = job.make_fleet(), [], load_protocol(job.config.protocol)
    protocol.check(job)
    for event in protocol.run(fleet, job):
        events.append(event)
        if event.done == rounds:
            break
    return fleet, events


PLAIN = {name: settings for name, settings in (CASES | LOSSY).items() if name not in (
    "server momentum", "scaffold with momentum")}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.filterwarnings("ignore:--mode ring has a mixing matrix")
def test_it_is_its_papers_loop(name, directed):
    job = job_of(PLAIN[name], directed, epochs=7)
    total = load_protocol(job.config.protocol).rounds(job)
    rounds = min(10, total)
    fleet, _ = trained(job, rounds)
    rows = getattr(plain, job.config.protocol)(World(job), rounds, total)
    expected = torch.stack(list(rows))
    assert rounds >= 4 and (fleet.rows_RD - job.initial_ND).abs().max() > 0.01
    torch.testing.assert_close(fleet.rows_RD, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:--mode ring has a mixing matrix")
def test_cascade_is_exact(name, directed):
    """Against finite differences of the whole training."""
    job = job_of(CASES[name], directed, engine="loop", partition="dirichlet", max_train=200)
    scores_n = cascade(recorded(job, memory_limit=0))  # few states are held, so that rounds are replayed in pieces
    for i in torch.stack([shard[1] for shard in job.shards[:2]]).tolist():
        values = []
        for sign in (1, -1):
            weights_n = job.sample_weights_n.double()
            weights_n[i] += sign * 1e-4
            values.append(final_objective(job, weights_n))
        assert -scores_n[i].item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *LOSSY])
@pytest.mark.filterwarnings("ignore:--mode ring has a mixing matrix")
def test_replicas_are_runs_of_their_own(name, directed):
    """What an audit retrains side by side is what it would retrain one after the other."""
    job = job_of((CASES | LOSSY)[name], directed, epochs=3)
    weights_Mn = job.sample_weights_n.repeat(2, 1)
    weights_Mn[1, job.shards[1][:3]] = 0
    protocol, ends = load_protocol(job.config.protocol), []
    for weights in (weights_Mn, weights_Mn[:1], weights_Mn[1:]):
        fleet = job.make_fleet(weights)
        for _ in protocol.run(fleet, job):
            pass
        ends.append(fleet.rows_RD)
    torch.testing.assert_close(ends[0], torch.cat(ends[1:]), rtol=1e-12, atol=1e-13)
    assert not torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("engine", ["vmap", "threads", "graph"])
@pytest.mark.parametrize("name", ["d2", "scaffold", "fedprox", "relay"])
@pytest.mark.filterwarnings("ignore:--mode ring has a mixing matrix")
def test_on_every_engine(name, engine):
    """(On a CPU the recorded engine runs its code without a graph, on matrices that must not move.)"""
    settings = CASES[name] | ({"fraction_fit": 1.0} if "fraction_fit" in CASES[name] else {})
    one, other = job_of(settings, epochs=3), job_of(settings, epochs=3)
    other.engine.__dict__.update(name=engine, workers_a_chunk=128 if engine == "vmap" else 1)
    torch.testing.assert_close(trained(one)[0].rows_RD, trained(other)[0].rows_RD, rtol=1e-10, atol=1e-12)


# ---- what papers say of special cases ------------------------------------------------------------------


def test_choco_that_sends_all_is_gossip():
    one = trained(job_of(dict(protocol="choco", compression="none", consensus_step=1.0)))[0]
    torch.testing.assert_close(one.rows_RD, trained(job_of({}))[0].rows_RD, rtol=1e-12, atol=1e-13)


def test_pushsum_with_doubly_stochastic_weights_is_gossip():
    one = trained(job_of(dict(protocol="pushsum", mode="exponential")))[0]
    two = trained(job_of(dict(mode="exponential")))[0]
    torch.testing.assert_close(one.rows_RD, two.rows_RD, rtol=1e-11, atol=1e-13)


def test_pushsum_keeps_the_mean_where_gossip_does_not(directed):
    """Without steps, z goes to the mean of the starts; gossip with these weights ends elsewhere."""
    job = job_of(CASES["pushsum directed"], directed, init="per_worker", lr=1e-300, epochs=30, scheduler="constant")
    job.initial_ND = torch.randn(4, job.engine.layout.D, dtype=torch.float64, generator=torch.manual_seed(0))
    start_D = job.initial_ND.mean(0)
    torch.testing.assert_close(trained(job)[0].rows_RD, start_D.expand(4, -1), rtol=1e-6, atol=1e-7)
    other = job_of(dict(mode="file", num_workers=4), directed, init="per_worker", lr=1e-300, epochs=30)
    other.initial_ND = job.initial_ND
    assert (trained(other)[0].rows_RD - start_D).abs().max() > 0.05


def test_diloco_without_an_outer_optimizer_is_averaging():
    """alpha = 1 and mu = 0: local steps, then the mean; FedAvg with everybody and kept momentum."""
    one = trained(job_of(dict(protocol="diloco", outer_lr=1.0, outer_momentum=0.0, local_steps=2)))[0]
    two = trained(job_of(dict(mode="all", local_steps=2)))[0]
    torch.testing.assert_close(one.rows_RD, two.rows_RD, rtol=1e-11, atol=1e-13)


def test_fedprox_without_its_penalty_is_fedavg():
    one, two = (trained(job_of(dict(protocol=name, **extra)))[0] for name, extra in (
        ("fedprox", dict(prox=0.0)), ("fedavg", {})))  # fmt: skip
    torch.testing.assert_close(one.rows_RD, two.rows_RD, rtol=1e-12, atol=1e-14)


def test_fine_tuning_knows_no_penalty():
    """It begins after the training, from the server's model, with the weight decay that the user asked for."""
    ends = []
    for name, extra in (("fedprox", dict(prox=5.0)), ("fedavg", {})):
        job = job_of(dict(protocol=name, finetune=2, **extra))
        ends.append(finetune(job, job.initial_ND)["after"])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("mode", ["line", "tree", "star"])
@pytest.mark.parametrize("N", [2, 3, 9, 16])
def test_relay_is_the_exact_average_after_the_diameter(mode, N):
    """With what workers send held fixed."""
    W = build_topology(mode, N).matrices[0]
    relays, diameter = Relays.of(W), int(shortest_path(W != 0, unweighted=True).max())
    x_NP = np.random.default_rng(0).standard_normal((N, 5))
    message = np.zeros((len(relays.receiver_E), 5))
    for r in range(diameter):
        message = relays.own_EN @ x_NP + relays.relayed_EE @ message
        count_N = relays.counts(r)
    np.testing.assert_allclose((relays.got_NE @ message + (N - count_N)[:, None] * x_NP) / N, np.tile(
        x_NP.mean(0), (N, 1)), atol=1e-12)  # fmt: skip
    assert (count_N == N - 1).all() and (relays.counts(0) < N - 1).any() == (diameter > 1)


@pytest.mark.parametrize("mode", ["ring", "exponential_one_peer"])
def test_the_mean_of_what_is_tracked_is_the_mean_gradient(mode):
    """At every step, for doubly stochastic averages: mean Y = mean G, seen as the move of the mean row."""
    job = job_of(dict(protocol="tracking", momentum=0.0, mode=mode))
    fleet, protocol = job.make_fleet(), load_protocol("tracking")
    protocol.start(fleet, job)
    for r in range(6):
        plan = protocol.plan(job, r)
        before_D = fleet.rows_RD.mean(0)
        train_round(fleet, plan)
        step_D = fleet.rows_RD.mean(0) - before_D  # - lr times the mean gradient
        end_round(fleet, plan.linear)
        torch.testing.assert_close(fleet.rows_RD.mean(0) - before_D, step_D, rtol=0, atol=1e-14)
        assert fleet.extra["tracked"].mean(0).abs().max() < 1e-12 and fleet.extra["tracked"].abs().max() > 1e-3


@pytest.mark.slow
def test_d2_and_tracking_end_where_gossip_does_not():
    """Full gradients of different shards and a constant rate: gossip stops at a distance from the minimum that grows
    with the rate; these reach it (D2's Theorem 2)."""
    ends = {}
    for name in ("gossip", "d2", "tracking"):
        job = digits_job(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double(), protocol=name,
                         max_train=160, num_workers=4, mode="line", partition="shards", batch_size=64, epochs=1200,
                         scheduler="constant", momentum=0.0, wd=0.1, lr=0.05, engine="vmap")  # fmt: skip
        fleet, _ = trained(job)
        gradients = [plain.World(job).gradient(k, fleet.rows_RD.mean(0), 0) for k in range(4)]
        ends[name] = torch.stack(gradients).mean(0).norm().item(), fleet.consensus_distance().item()
    assert ends["gossip"][0] > 0.1 and ends["gossip"][1] > 0.05, ends
    for name in ("d2", "tracking"):
        assert ends[name][0] < 1e-3 and ends[name][1] < 1e-5, ends


def test_scaffolds_common_variate_is_the_mean_of_all():
    job = job_of(CASES["scaffold with momentum"] | dict(fraction_fit=0.5))
    fleet, _ = trained(job)
    torch.testing.assert_close(fleet.extra["common"], fleet.extra["own"].mean(0).expand(8, -1), rtol=1e-9, atol=1e-12)
    assert fleet.extra["common"].abs().max() > 1e-3


def test_quasi_global_momentum_stays_within_its_bound():
    """Dividing by a rate that falls to nothing, without gradients: all that is remembered comes of averaging. The next
    step stays below the sum over past rounds of beta (1 - mu) nu^s (rate now over rate then) times their disagreement,
    nu = mu + (1 - mu) beta."""
    job = job_of(dict(protocol="qg", init="per_worker", epochs=20, qg_momentum=0.8, wd=0.0))
    job.initial_ND = torch.randn(8, job.engine.layout.D, dtype=torch.float64, generator=torch.manual_seed(0))
    fleet, protocol = job.make_fleet(torch.zeros_like(job.sample_weights_n)[None]), load_protocol("qg")
    beta, mu, past, rounds = 0.9, 0.8, [], protocol.rounds(job)
    nu = mu + (1 - mu) * beta
    for r in range(rounds):
        plan = protocol.plan(job, r)
        bound = sum(beta * (1 - mu) * nu ** (r - 1 - q) * plan.lr / rate * size for q, (rate, size) in enumerate(past))
        before_NP = fleet.rows_RD.clone()
        train_round(fleet, plan)
        step = (fleet.rows_RD - before_NP).norm().item()
        assert step == pytest.approx(plan.lr * fleet.state_RS.norm().item(), abs=1e-15) and step <= bound + 1e-12
        half_NP = fleet.rows_RD.clone()
        end_round(fleet, plan.linear)
        past.append((plan.lr, (half_NP - fleet.rows_RD).norm().item()))
    assert past[-1][0] < 0.01 * past[0][0] and past[0][1] > 1


# ---- bytes, statistics, compression --------------------------------------------------------------------


P, WIDTH = 16 * 3 + 3 + 3 * 10 + 10, 8


@pytest.mark.parametrize(
    ("settings", "messages", "size"),
    [
        (dict(), 16, P * WIDTH),
        (dict(protocol="qg"), 16, P * WIDTH),
        (dict(protocol="d2"), 16, P * WIDTH),
        (dict(protocol="tracking"), 32, P * WIDTH),
        (dict(protocol="choco", compression_share=0.1), 16, 9 * (WIDTH + 4)),
        (dict(protocol="choco", compression="random_k", compression_share=0.1), 16, 9 * WIDTH),
        (dict(protocol="choco", compression="sign"), 16, 12 + WIDTH),
        (dict(protocol="choco", compression="quantize", compression_bits=5), 16, 57 + WIDTH),
        (dict(protocol="relay", mode="tree"), 14, P * WIDTH),
        (dict(protocol="pushsum"), 16, P * WIDTH + WIDTH),
        (dict(protocol="diloco", local_steps=2), 16, P * WIDTH),
        (dict(protocol="scaffold", fraction_fit=0.5), 16, P * WIDTH),
        (dict(protocol="fedprox", fraction_fit=0.5), 8, P * WIDTH),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:--mode ring has a mixing matrix")
def test_messages_and_bytes_are_exact(settings, messages, size):
    job = job_of(settings)
    event = trained(job, 1)[1][0]
    row = job.virtual_time.row_bytes
    sent = event.messages * row if event.sent_bytes is None else event.sent_bytes
    assert row == P * WIDTH and (event.messages, sent) == (messages, messages * size)


@pytest.mark.parametrize("name", [*CASES, "top_k"])
@pytest.mark.filterwarnings("ignore:--mode ring has a mixing matrix")
def test_statistics_are_only_ever_averaged(name, directed):
    """Variances stay positive and every worker's statistics inside the range of those that were sent."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(),
                                  torch.nn.Linear(6, 10)).double()  # fmt: skip
    job = job_of((CASES | LOSSY)[name] | dict(model="mlp_smooth"), directed, network=network, lr=0.5)
    fleet, protocol = job.make_fleet(), load_protocol(job.config.protocol)
    protocol.start(fleet, job)
    for r in range(min(5, protocol.rounds(job))):
        plan = protocol.plan(job, r)
        train_round(fleet, plan)
        sent_NS = fleet.rows_RD[:, fleet.layout.P :].clone()
        end_round(fleet, plan.linear)
        got_NS = fleet.rows_RD[:, fleet.layout.P :]
        torch.testing.assert_close(got_NS, torch.tensor(plan.mixing.toarray()) @ sent_NS, rtol=1e-12, atol=1e-13)
        assert (got_NS >= sent_NS.amin(0) - 1e-12).all() and (got_NS <= sent_NS.amax(0) + 1e-12).all()
    assert sent_NS.std(0).max() > 0


def test_a_line_is_what_it_says():
    """Numbers, a number a row, and a matrix; sources are what they were before the line."""
    fleet = trained(job_of(dict(num_workers=4, mode="line")), 1)[0]
    x_NP, scale_N = fleet.rows_RD.clone(), np.array([1.0, 0.0, -2.0, 3.0])
    W = build_topology("line", 4).matrices[0]
    fleet.extra["other"] = fleet.zeros() + 0.25
    around = LinearRound(W, begin=(Line("drift", other=-1),), end=(
        Line("half", rows=1), Line("rows", rows=scale_N, before=-0.5, half=W), Line("other", rows=1, half=2),
        Line("other", other=W),
    ))  # fmt: skip
    begin_round(fleet, around)
    fleet.rows_RD += 1
    end_round(fleet, around)
    half_NP, W_NN = x_NP + 1, torch.tensor(W.toarray())
    rows_NP = torch.tensor(scale_N)[:, None] * half_NP - 0.5 * x_NP + W_NN @ half_NP
    torch.testing.assert_close(fleet.rows_RD, rows_NP, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(fleet.extra["other"], W_NN @ (rows_NP + 2 * half_NP), rtol=1e-12, atol=1e-13)
    assert torch.equal(fleet.of_round["drift"], torch.full_like(x_NP, -0.25)) and set(fleet.extra) == {"other"}


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(protocol="qg", momentum=0.0), "--momentum above 0"),
        (dict(protocol="qg", optimizer="adam"), "--optimizer sgd or nesterov"),
        (dict(protocol="d2", local_steps=2), "one local step a round"),
        (dict(protocol="tracking", local_steps=2), "one local step a round"),
        (dict(protocol="pushsum", local_steps=2), "one local step a round"),
        (dict(protocol="d2", mode="exponential"), "links in both directions"),
        (dict(protocol="d2", mode="exponential_one_peer"), "stay the same"),
        (dict(protocol="tracking", mode="file", num_workers=4), "keep the mean"),
        (dict(protocol="choco", mode="file", num_workers=4), "keep the mean"),
        (dict(protocol="choco", mode="exponential_one_peer"), "neighbours that stay the same"),
        (dict(protocol="relay"), "needs a tree"),
        (dict(protocol="relay", mode="file", num_workers=4), "needs a tree"),
        (dict(protocol="fedprox", optimizer="adamw"), "adamw"),
        (dict(protocol="scaffold", optimizer="adam"), "--optimizer sgd"),
        (dict(protocol="scaffold", keep_momentum=True), "keep_momentum"),
        (dict(protocol="diloco", init="per_worker"), "one common model"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(settings, words, directed):
    job = job_of(settings, directed)
    with pytest.raises(UsageError, match=words):
        load_protocol(job.config.protocol).check(job)


@pytest.mark.parametrize("settings", [dict(protocol="tracking"), dict(protocol="qg"), dict(protocol="scaffold")])
def test_a_rate_that_falls_to_nothing(settings):
    """1e-40 is no float32 that could be divided by."""
    job = job_of(settings | dict(dtype="float32", scheduler="exponential", gamma=1e-10, epochs=6), network=None)
    fleet, events = trained(job)
    assert events[-1].lr < 1e-38 and fleet.rows_RD.isfinite().all()


def test_a_matrix_printed_with_six_digits_is_symmetric_enough(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text(".666667 .333333 0\n.333333 .333333 .333333\n0 .333333 .666667\n")
    job = job_of(dict(protocol="d2", mode="file", num_workers=3), str(path))
    load_protocol("d2").check(job)
    with pytest.warns(UserWarning, match="same weight"):
        other = tmp_path / "other.txt"
        other.write_text(".8 .2 0\n.2 .6 .2\n0 .2 .8\n")
        job = job_of(dict(protocol="relay", mode="file", num_workers=3), str(other))
        load_protocol("relay").check(job)


@pytest.mark.parametrize("compression", ["top_k", "random_k", "quantize"])
def test_compression_does_not_depend_on_how_rows_lie_in_memory(compression):
    ends = []
    for channels_last in (False, True):
        job = digits_job(model="cnn", protocol="choco", compression=compression, channels_last=channels_last, epochs=1)
        ends.append(job.engine.layout.canonical(trained(job, 3)[0].rows_RD))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LOSSY)
def test_compressed_runs_are_not_differentiated(name):
    with pytest.raises(UsageError, match="no derivative"):
        recorded(job_of(LOSSY[name]))
