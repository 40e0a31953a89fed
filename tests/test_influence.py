"""Every claim of the influence methods against ground truth: finite differences of the whole training,
path enumeration, loops of per-sample gradients, and each other."""

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

from tests.runs import digits_job, final_objective, recorded, torch_gradient
from training.trajectory import RecordedRun
from utils.influence import Options, score
from utils.influence.cascade import cascade
from utils.influence.delete import delete
from utils.influence.dice import dice, direction, states_from
from utils.influence.recursion import Adjoint, step_back
from utils.influence.ripples import ripples
from utils.influence.targets import objective

EXACT = [
    dict(model="mlp_smooth", engine="vmap", local_steps=2),
    dict(model="mlp_smooth", engine="vmap", mode="exponential_one_peer", init="per_worker", scheduler="multistep"),
    dict(model="cnn_smooth", engine="threads", local_steps=2, augment="crop"),
    dict(model="mlp_smooth", engine="loop", mode="file", num_workers=4, local_steps=2),
]


@pytest.fixture
def directed(tmp_path):
    """A directed, strongly connected, row-stochastic graph of 4 nodes."""
    path = tmp_path / "directed.txt"
    path.write_text("0.5 0.5 0 0\n0 0.6 0.4 0\n0 0 0.3 0.7\n0.2 0.1 0 0.7\n")
    return str(path)


@pytest.mark.parametrize("settings", EXACT, ids=lambda s: f"{s['model']}-{s.get('mode', 'ring')}")
@pytest.mark.parametrize("target", ["nodes", "consensus", "worker:2"])
def test_cascade_is_the_derivative_of_the_whole_training(settings, target, directed):
    if settings.get("mode") == "file":
        settings = settings | {"topology_file": directed}
    if target != "nodes" and settings["model"] != "mlp_smooth":
        pytest.skip("the target does not depend on the network")
    job = digits_job(**settings)
    scores_n = cascade(recorded(job), target)
    for i in torch.stack([shard[1] for shard in job.shards[:2]]).tolist():
        h, values = 1e-4, []
        for sign in (1, -1):
            weights_n = job.sample_weights_n.double()
            weights_n[i] += sign * h
            values.append(final_objective(job, weights_n, target))
        difference = (values[0] - values[1]) / (2 * h)
        assert difference != 0
        assert -scores_n[i].item() == pytest.approx(difference, rel=1e-5, abs=1e-13)


@pytest.mark.parametrize("engine", ["threads", "vmap"])
def test_cascade_is_exact_through_batchnorm_and_its_statistics(engine):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 10)).double()
    job = digits_job(network=model, engine=engine, partition="iid", num_workers=3, mode="ring", max_train=240)
    scores_n = cascade(recorded(job))
    for i in torch.stack([shard[0] for shard in job.shards[:2]]).tolist():
        values = []
        for sign in (1, -1):
            weights_n = job.sample_weights_n.double()
            weights_n[i] += sign * 1e-4
            values.append(final_objective(job, weights_n, "nodes"))
        assert -scores_n[i].item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5, abs=1e-13)


def test_cascade_warns_where_it_foretells_the_impossible(monkeypatch):
    """That a loss falls by more than itself: here by a gradient far too large, as a chaotic training makes it."""
    run = recorded(digits_job(model="mlp_tiny", num_workers=4, max_train=120))

    def chaotic(*where):
        value, gradient_ND = objective(*where)
        return value, gradient_ND * 1e6

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual_n = cascade(run)
    monkeypatch.setattr("utils.influence.cascade.objective", chaotic)
    with pytest.warns(UserWarning, match="a random 5% of the samples moves the validation loss"):
        torch.testing.assert_close(cascade(run), 1e6 * usual_n)


def test_dice_is_the_sum_over_paths():
    """Theorem 2 enumerated: every path of r hops, with dense Hessians from autograd."""
    job = digits_job(model="mlp_tiny", momentum=0.0, wd=0.0, mode="ring", num_workers=4, max_train=120, epochs=6)
    run = recorded(job)
    t = 1
    for hops in (1, 2, 3):
        states = states_from(run, t, hops)
        gradients = [objective(run, rows, "nodes")[1] for rows in states]
        rho_NP = direction(run, t, states, gradients)
        W = torch.from_numpy(job.topology.mixing(0).toarray())
        P, N = run.P, run.num_workers

        def hessian_of(k, rows_ND, step, N=N, P=P):
            ids = job.batches.ids(torch.full((N,), step))[k]
            ids = ids[ids >= 0]
            images, labels = job.samples.plain(ids)

            def loss(row_P):
                tensors = {e.name: e.view(row_P) for e in run.fleet.layout.parameters}
                return F.cross_entropy(functional_call(job.model, tensors, (images,)), labels)

            return hessian(loss)(rows_ND[k, :P])

        lr = [run.step(t + s).lr for s in range(hops)]
        steps = {
            (k, s): torch.eye(P) - lr[s] * hessian_of(k, states[s], t + s) for k in range(N) for s in range(1, hops)
        }
        for j in range(N):
            total_P = gradients[0][j, :P].clone()
            paths = [((j,), torch.eye(P, dtype=torch.float64))]
            for s in range(1, hops + 1):  # a path that has arrived at step t + s
                longer = []
                for nodes, transport in paths:
                    if s > 1:
                        transport = steps[nodes[-1], s - 1] @ transport
                    for k in range(N):
                        if W[k, nodes[-1]] != 0:
                            longer.append(((*nodes, k), W[k, nodes[-1]] * transport))
                paths = longer
                for nodes, transport in paths:
                    total_P += transport.T @ gradients[s][nodes[-1], :P]
            torch.testing.assert_close(rho_NP[j], -lr[0] * total_P, rtol=1e-9, atol=1e-13)


def test_dice_with_the_last_source_only_is_cascades_contribution_of_the_step():
    job = digits_job(model="mlp_smooth", engine="vmap")
    run = recorded(job)
    t, T = run.num_steps - 3, run.num_steps
    states = states_from(run, t, T - t)
    gradients = [torch.zeros_like(s) for s in states[:-1]] + [objective(run, states[-1], "nodes")[1]]
    rho_NP = direction(run, t, states, gradients)
    products_n = run.sample_products(states[0], rho_NP)
    adjoint = Adjoint.of_rows(gradients[-1], run.P)
    for u in range(T - 1, t - 1, -1):
        adjoint, back = step_back(run, u, states[u - t], adjoint)
    real_NB = back.ids_NB >= 0
    sizes_N1 = job.batches.sizes_N[:, None].expand_as(back.ids_NB)
    torch.testing.assert_close(
        products_n[back.ids_NB[real_NB]], (back.products_NB * sizes_N1)[real_NB], rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.0), ("nesterov", 0.9)])
def test_one_hop_dice_tends_to_its_ground_truth_as_the_rate_falls(optimizer, momentum):
    """DICE-GT by really leaving a sample out of one step; the relative error falls in proportion to lr."""
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        settings = dict(optimizer=optimizer, momentum=momentum, wd=0.0, lr=lr, scheduler="constant")
        job = digits_job(model="mlp_smooth", engine="vmap", **settings)
        run = recorded(job)
        t = 2
        states = states_from(run, t, 1)
        gradients = [objective(run, rows, "nodes")[1] for rows in states]
        rho_NP = direction(run, t, states, gradients)
        i = int(job.batches.ids(torch.full((8,), t))[3, 0])
        estimate = -run.sample_products(states[0], rho_NP)[i].item() / job.batches.sizes_N[3].item()
        truth = 0.0
        for sign, weight in ((1, 0.0), (-1, 1.0)):
            weights_n = job.sample_weights_n.double()
            weights_n[i] = weight
            fleet = job.make_fleet(weights_n[None])
            fleet.rows_RD = states[0].clone()
            fleet.step(torch.full((8,), t), lr)
            own = fleet.evaluate(job.samples, job.val_ids)["loss"][3].item() / 8
            fleet.mix(job.topology.mixing(t))
            truth += sign * (own + fleet.evaluate(job.samples, job.val_ids)["loss"].mean().item())
        errors.append(abs(estimate - truth) / abs(truth))
    assert errors[0] < 0.2 and errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4


@pytest.mark.parametrize(("model", "engine"), [("mlp", "vmap"), ("cnn", "threads"), ("cnn", "loop")])
def test_one_pass_products_are_the_loop_of_per_sample_gradients(model, engine):
    job = digits_job(model=model, engine=engine, num_workers=3, max_train=120)
    run = recorded(job)
    rows_ND = run.final()
    direction_NP = torch.randn(3, run.P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products_n = run.sample_products(rows_ND, direction_NP)
    torch.testing.assert_close(
        run.sample_products(rows_ND, direction_NP, batch_size=7), products_n, rtol=1e-6, atol=1e-9
    )
    for k in range(3):
        total_P = torch.zeros(run.P, dtype=torch.float64)
        for i in job.shards[k].tolist():
            gradient_P = torch_gradient(job, rows_ND[k], torch.tensor([i]))
            total_P += gradient_P
            torch.testing.assert_close(products_n[i], gradient_P @ direction_NP[k], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(run.shard_gradient(rows_ND)[k], total_P, rtol=1e-8, atol=1e-10)


def test_validation_gradient_and_hessian_products_are_autograds():
    job = digits_job(model="mlp_tiny", num_workers=3, max_train=120, engine="vmap")
    run = recorded(job)
    rows_ND = run.final()
    value_R, gradient_RD = run.validation_gradient(rows_ND)
    torch.testing.assert_close(value_R.double(), run.fleet.evaluate(job.samples, job.val_ids, rows_ND)["loss"])
    torch.testing.assert_close(gradient_RD[1], torch_gradient(job, rows_ND[1], job.val_ids), rtol=1e-9, atol=1e-12)


def test_ripples_sum_to_the_scores_of_dice():
    job = digits_job(model="mlp_smooth", engine="vmap", num_workers=5)
    run = recorded(job)
    for hops in (1, 2):
        table_NN = ripples(run, hops, rounds=2)
        scores_n = dice(run, hops, rounds=2)
        by_worker_N = torch.stack([scores_n[shard].sum() for shard in job.shards])
        torch.testing.assert_close(table_NN.sum(1), by_worker_N, rtol=1e-8, atol=1e-12)
        ring_distance = torch.tensor([[min((j - k) % 5, (k - j) % 5) for k in range(5)] for j in range(5)])
        assert (table_NN[ring_distance > hops] == 0).all() and (table_NN[ring_distance <= hops] != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["if", "dice", "delete", "cascade"])
def test_positive_means_helpful(method):
    """Mislabelled samples score below clean ones, and removing the most helpful hurts."""
    job = digits_job(
        model="mlp",
        flip_labels=0.15,
        epochs=25,
        lr=0.05,
        dtype="float32",
        engine="vmap",
        max_train=None,
        partition="iid",
    )
    run = recorded(job)
    scores_n = score(method, run, Options())
    flipped = torch.tensor(job.corruption["flipped"])
    clean = job.train_ids[~torch.isin(job.train_ids, flipped)]
    assert scores_n[flipped].mean() < scores_n[clean].mean()
    assert scores_n[flipped].median() < scores_n[clean].median()
    best = job.train_ids[scores_n[job.train_ids].argsort(descending=True)[: len(job.train_ids) // 4]]
    full = final_objective(job, job.sample_weights_n)
    weights_n = job.sample_weights_n.clone()
    weights_n[best] = 0
    assert final_objective(job, weights_n) > full


@pytest.mark.slow
def test_scores_are_reproducible_to_the_bit():
    settings = dict(model="cnn", engine="threads", threads=2, dtype="float32", max_train=160)
    for method in ("cascade", "dice", "delete", "if", "random"):
        first, second = (score(method, recorded(digits_job(**settings)), Options()) for _ in range(2))
        assert torch.equal(first, second) and bool(first.abs().sum() > 0)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "allowed"), [(32, 32), (12, 18)])
def test_replay_needs_few_states_and_gives_the_same_scores(limit, allowed):
    job = digits_job(model="mlp_smooth", engine="vmap", epochs=120, max_train=200)
    run = recorded(job)
    everything = cascade(run)
    state_bytes = run.fleet.rows_RD.numel() * 8
    small = RecordedRun(job, run.rounds, memory_limit=limit * state_bytes)
    assert small.states_in_memory == limit < run.num_steps == 120  # the whole trajectory does not fit
    shape, alive, advance = run.fleet.rows_RD.shape, [], small._advance

    def counting():  # looking through all objects is slow: every few steps
        if small._now % 10 == 0 or not alive:
            tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
            alive.append(sum(t.shape == shape for t in tensors))
        advance()

    small._advance = counting
    assert torch.equal(cascade(small), everything)
    assert 5 < max(alive) - alive[0] <= allowed + 5  # the adjoints and the fleet's own matrices come on top


def test_delete_is_its_formula():
    job = digits_job(model="mlp_tiny", num_workers=3, max_train=120)
    run = recorded(job)
    steps = run.checkpoints(2)
    scores_n = delete(run, 2)
    expected = 0.0
    i = int(job.shards[1][4])
    for t, rows_ND in run.forwards(steps):
        g_P = torch_gradient(job, rows_ND.mean(0), job.val_ids)
        own_P = torch_gradient(job, rows_ND[1], torch.tensor([i]))
        expected += run.num_steps / 2 * run.step(t).lr * (g_P @ own_P).item()
    assert scores_n[i].item() == pytest.approx(expected / 3 / len(job.shards[1]), rel=1e-8)


def test_dropping_samples_by_flag_is_the_masked_run(tmp_path):
    job = digits_job(model="mlp", engine="vmap")
    ids = job.train_ids[:5]
    (tmp_path / "drop.txt").write_text("# five samples\n" + " ".join(map(str, ids.tolist())))
    dropped = digits_job(model="mlp", engine="vmap", drop_samples=str(tmp_path / "drop.txt"))
    weights_n = job.sample_weights_n.clone()
    weights_n[ids] = 0
    assert final_objective(dropped, dropped.sample_weights_n) == final_objective(job, weights_n)
