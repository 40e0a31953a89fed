"""Private steps (DP-SGD): what a step is, whose noise it has, what epsilon it comes to, and what it cannot go with."""

import copy
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import main
import valuation.__main__
import workers.private
from networks import load_model
from tests.command import load, metrics, refused, same_tensors, summary, train
from tests.helpers import run_steps, small_fleet, small_samples
from tests.runs import digits_job
from training import checkpoint
from training.build import build
from training.coalitions import all_coalitions, train_coalitions
from training.privacy import epsilon, spent, steps_made
from training.protocols import check_differentiable, load_protocol
from utils.args import Config
from utils.errors import UsageError
from utils.random import normals
from utils.records import privacy_said
from valuation.args import ValuationConfig
from valuation.methods import OF_SGD, add_noise, why_not
from workers.optimizers import SGD, Adam
from workers.private import Privacy, drawn
from workers.worker_vision import Fleet

ENGINES = ("loop", "threads", "vmap")
RAGGED = (15, 3, 9, 15)


def start(fleet, row=0) -> dict:
    """A worker's parameters by name."""
    return {e.name: e.view(fleet.rows_RD[row]).clone().requires_grad_() for e in fleet.layout.parameters}


def by_the_loop(model, tensors, samples, ids, weights, clip) -> tuple[dict, float]:
    """The sum of clipped gradients of samples, one after the other, and the largest norm among them."""
    total, largest = {name: torch.zeros_like(t) for name, t in tensors.items()}, 0.0
    for i, weight in zip(ids, weights, strict=True):
        images, labels = samples.plain(torch.tensor([i]))
        gradients = torch.autograd.grad(cross_entropy(functional_call(model, tensors, (images,)), labels),
                                        list(tensors.values()))  # fmt: skip
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        for name, gradient in zip(tensors, gradients, strict=True):
            total[name] += weight * gradient * min(1.0, clip / norm)
        largest = max(largest, norm)
    return total, largest


# ---- what a step is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model,lengths", [("mlp", (15, 15, 15, 15)), ("mlp", RAGGED), ("cnn", RAGGED)])
def test_without_noise_and_clipping_it_is_plain_sgd(engine, model, lengths):
    weights_1n = torch.ones(1, 60)
    weights_1n[0, ::4] = 0
    plain = run_steps(small_fleet(model, lengths, engine=engine, weights_Mn=weights_1n), 4)
    private = small_fleet(model, lengths, engine=engine, weights_Mn=weights_1n, privacy=Privacy(0.0, 1e9))
    losses = [f.step(torch.full((4,), 4), 0.05) for f in (plain, run_steps(private, 4))]
    torch.testing.assert_close(private.rows_RD, plain.rows_RD, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("floats", [1, 1 << 12, 1 << 30])
@pytest.mark.parametrize("model,channels_last", [("mlp", False), ("cnn", True)])
def test_a_step_is_that_of_a_loop_over_samples(monkeypatch, model, channels_last, floats):
    monkeypatch.setattr(workers.private, "FLOATS", floats)
    weights_1n = torch.ones(1, 60)
    weights_1n[0, 1::3] = 0
    network = load_model(model, 4, (1, 8, 8), seed=3).double()
    for engine in ("loop", "vmap"):
        fleet = small_fleet(copy.deepcopy(network), RAGGED, engine=engine, channels_last=channels_last,
                            weights_Mn=weights_1n, optimizer=SGD(), privacy=Privacy(0.0, 0.7))  # fmt: skip
        before, rows_RD = start(fleet), fleet.rows_RD.clone()
        ids_NB, _ = fleet.schedule(torch.zeros(4, dtype=torch.int64))
        fleet.step(torch.zeros(4, dtype=torch.int64), 1.0)
        for k, ids in enumerate(ids_NB.tolist()):
            ids = [i for i in ids if i >= 0]
            expected, largest = by_the_loop(network, before, fleet.samples, ids, weights_1n[0, ids].tolist(), 0.7)
            assert largest > 0.7
            for entry in fleet.layout.parameters:
                moved = entry.view(rows_RD[k]) - entry.view(fleet.rows_RD[k])
                torch.testing.assert_close(moved, expected[entry.name] / len(ids), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("model", ["mlp", "cnn", "squeezenet"])
def test_a_step_is_that_of_opacus(model):
    opacus = pytest.importorskip("opacus")
    optimizers = pytest.importorskip("opacus.optimizers")
    shape = (3, 32, 32) if model == "squeezenet" else (1, 8, 8)
    samples = small_samples(12, shape, dtype=torch.float64)
    network = load_model(model, 4, shape, seed=1).double()
    fleet = small_fleet(copy.deepcopy(network), (12,), 6, samples=samples, momentum=0.9, weight_decay=1e-2,
                        privacy=Privacy(0.0, 0.5))  # fmt: skip
    theirs = opacus.GradSampleModule(network)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    optimizer = optimizers.DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=6)
    for t in range(3):
        steps_N = torch.tensor([t])
        images, labels = samples.plain(fleet.schedule(steps_N)[0][0])
        optimizer.zero_grad()
        cross_entropy(theirs(images), labels).backward()
        optimizer.step()
        fleet.step(steps_N, 0.1)
    for entry, parameter in zip(fleet.layout.parameters, theirs.parameters(), strict=True):
        torch.testing.assert_close(entry.view(fleet.rows_RD[0]), parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", [SGD(0.9, 1e-3), Adam(0.9, 1e-3)])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_engines_agree(model, optimizer):
    ends = [
        run_steps(small_fleet(model, RAGGED, engine=engine, threads=2 if engine == "threads" else 1,
                              optimizer=optimizer, privacy=Privacy(1.1, 0.5)), 4).rows_RD
        for engine in ENGINES
    ]  # fmt: skip
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("model", ["lstm", "gru"])
def test_sequences_have_private_steps_too(model):
    common = dict(dataset_name="air", model=model, num_workers=3, max_train=60, batch_size=8, quiet=True, threads=1,
                  dtype="float64", engine="threads", partition="iid", val_fraction=0.02)  # fmt: skip
    ends = []
    for settings in ({}, {"dp_noise": 0.0, "dp_clip": 1e9}):
        fleet = build(Config(**common, **settings)).make_fleet()
        ends.append(run_steps(fleet, 3).rows_RD)
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


def test_mixed_precision_is_near():
    ends = [run_steps(digits_job(model="mlp", dtype="float32", amp=amp, engine=engine, dp_noise=0.5).make_fleet(), 2)
            for amp, engine in ((False, "loop"), (True, "loop"), (True, "vmap"))]  # fmt: skip
    for other in ends[1:]:
        assert 0 < float((ends[0].rows_RD - other.rows_RD).abs().max()) < 0.01


def test_one_sample_moves_a_step_by_no_more_than_the_clip():
    """Whatever the sample is, and whether it is there: a weight of 0 is as good as absence."""
    clip, everybody = 0.3, torch.ones(1, 60)
    fleet = small_fleet(optimizer=SGD(), weights_Mn=everybody, privacy=Privacy(0.8, clip))
    ids = fleet.schedule(torch.zeros(4, dtype=torch.int64))[0][0]
    one = int(ids[2])
    ends = []
    for there, image in ((1.0, None), (0.0, None), (0.0, 255), (1.0, 255)):
        weights_1n, samples = everybody.clone(), small_samples()
        weights_1n[0, one] = there
        if image is not None:
            samples.inputs_n[one] = image
        other = small_fleet(optimizer=SGD(), weights_Mn=weights_1n, samples=samples, privacy=Privacy(0.8, clip))
        ends.append(run_steps(other, 1, lr=1.0).rows_RD[0])
    assert torch.equal(ends[1], ends[2]) and not torch.equal(ends[0], ends[3])
    for end in (ends[0], ends[3]):
        assert 0 < float((end - ends[1]).norm()) <= clip / 5 * (1 + 1e-9)


# ---- whose noise it has -------------------------------------------------------------------------------------


def test_normal_numbers_are_normal_and_of_their_place_alone():
    key_n1 = torch.arange(40)[:, None]
    found_nc = normals(5001, 3, "noise", key_n1)
    assert found_nc.dtype == torch.float64 and found_nc.shape == (40, 5001)
    assert stats.kstest(found_nc.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(found_nc[:, :2500].flatten(), found_nc[:, 2501:].flatten()[: 40 * 2500])[0, 1]) < 0.01
    assert abs(np.corrcoef(found_nc[0], found_nc[1])[0, 1]) < 0.06 and 4 < float(found_nc.abs().max()) < 6.5
    torch.testing.assert_close(normals(5001, 3, "noise", key_n1[7:9]), found_nc[7:9], rtol=0, atol=1e-12)
    few, more = drawn(key_n1[:2, 0], 3 * workers.private.PIECE), drawn(key_n1[:2, 0], 3 * workers.private.PIECE + 5)
    assert torch.equal(few[:, : 2 * workers.private.PIECE], more[:, : 2 * workers.private.PIECE])


def noise_of(fleet, step=0, lr=1.0) -> torch.Tensor:
    """The noise in a step's gradients: what moves rows where every sample has weight 0, in canonical order."""
    before_RD = fleet.layout.canonical(fleet.rows_RD).clone()
    fleet.step(torch.full((fleet.num_workers,), step), lr)
    return before_RD - fleet.layout.canonical(fleet.rows_RD)


def nobody(model="mlp", lengths=(10, 10, 10, 10), **options) -> Fleet:
    options = {"optimizer": SGD(), "privacy": Privacy(1.5, 0.2), "weights_Mn": torch.zeros(1, 60)} | options
    return small_fleet(model, lengths, **options)


def test_noise_has_its_deviation_and_belongs_to_worker_and_step():
    noise_RP = noise_of(nobody("cnn")) * 5 / (1.5 * 0.2)  # 5 samples a batch
    assert abs(float(noise_RP.std()) - 1) < 0.01 and abs(float(noise_RP.mean())) < 0.01
    others = [noise_of(nobody("cnn"), step=1) * 5 / 0.3, noise_of(nobody("cnn", seed=4)) * 5 / 0.3]
    for a, b in [(noise_RP[0], noise_RP[1]), *((noise_RP[0], other[0]) for other in others)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    louder_RP = noise_of(nobody("cnn", privacy=Privacy(3.0, 0.2)))
    torch.testing.assert_close(louder_RP * 5 / 0.6, noise_RP, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_noise_is_the_same_wherever_a_row_is(engine):
    expected = noise_of(nobody("cnn"))
    for options in (dict(channels_last=True), dict(align=32), dict(weights_Mn=torch.zeros(3, 60))):
        found = noise_of(nobody("cnn", engine=engine, **options))
        for replica in found.split(4):
            torch.testing.assert_close(replica, expected, rtol=0, atol=1e-12)
    part = nobody("cnn", engine=engine, owned=range(1, 3))  # as in one of several processes
    torch.testing.assert_close(noise_of(part), expected[1:3], rtol=0, atol=1e-12)
    some = nobody("cnn", engine=engine)
    before_RD = some.rows_RD.clone()
    some.step(torch.zeros(4, dtype=torch.int64), 1.0, [0, 3])
    moved_RD = before_RD - some.rows_RD
    torch.testing.assert_close(moved_RD[[0, 3]], expected[[0, 3]], rtol=0, atol=1e-12)
    assert not moved_RD[[1, 2]].any()


def test_noise_is_of_the_institution_whichever_the_coalition():
    settings = dict(protocol="fedavg", server_weights="equal", num_workers=3, model="mlp", dtype="float32", epochs=4,
                    scheduler="constant", engine="threads", dp_noise=1.1, patience=2, lr=0.3, max_train=120,
                    min_shard=5)  # fmt: skip
    job = digits_job(**settings)
    together = train_coalitions(job, all_coalitions(3))
    for c, members in enumerate(all_coalitions(3)):
        alone = train_coalitions(job, [members])
        assert torch.equal(alone.rows_CD[0], together.rows_CD[c])
        assert alone.rounds == [together.rounds[c]] and alone.trained == [together.trained[c]]
        assert together.trained[c] == min(4, together.rounds[c] + 2)
    fleet, protocol = job.make_fleet(), load_protocol("fedavg")
    ends = [fleet.rows_RD[0].clone() for _ in protocol.run(fleet, job)]
    assert torch.equal(together.rows_CD[-1], ends[together.rounds[-1] - 1])  # as main.py trains all of them


@pytest.mark.parametrize("protocol", ["gossip", "fedavg", "fedasync", "chained", "local"])
def test_a_run_goes_on_to_the_bit_from_any_round(protocol):
    job = digits_job(protocol=protocol, num_workers=4, epochs=2, engine="threads", dp_noise=0.8, local_steps=2)
    whole, rounds = job.make_fleet(), load_protocol(protocol).rounds(job)
    for event in load_protocol(protocol).run(whole, job):
        if event.done == rounds // 2:
            kept = copy.deepcopy(checkpoint.snapshot(whole))
    again = job.make_fleet()
    checkpoint.restore(again, kept)
    list(load_protocol(protocol).run(again, job, rounds // 2))
    assert torch.equal(again.rows_RD, whole.rows_RD)


# ---- what it comes to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(local_steps=3), dict(protocol="local"), dict(protocol="fedavg", fraction_fit=0.5, local_epochs=2),
    dict(protocol="fedasync", speed_spread=0.5), dict(protocol="chained", chain_order="random"),
])  # fmt: skip
def test_steps_are_those_that_were_made(monkeypatch, settings):
    job, counted_N = digits_job(**{"num_workers": 4, "epochs": 2, "dp_noise": 0.0} | settings), torch.zeros(4)
    original = Fleet.step

    def step(fleet, steps_N, lr, workers=None):
        counted_N[list(range(4)) if workers is None else workers] += 1
        return original(fleet, steps_N, lr, workers)

    monkeypatch.setattr(Fleet, "step", step)
    rounds = load_protocol(job.config.protocol).rounds(job)
    list(load_protocol(job.config.protocol).run(job.make_fleet(), job))
    assert steps_made(job, rounds).tolist() == counted_N.tolist() and counted_N.any()


def test_epsilon_is_that_of_the_accountant():
    accountants = pytest.importorskip("opacus.accountants")
    cases = [(1.1, 0.1, 50, 1e-3), (0.3, 0.13, 7, 1e-3), (1.1, 1.0, 50, 1e-3), (20.0, 0.01, 5, 0.05),
             (3.0, 0.9, 900, 1e-6)]  # fmt: skip
    for noise, rate, steps, delta in cases:
        theirs = accountants.RDPAccountant()
        for _ in range(steps):
            theirs.step(noise_multiplier=noise, sample_rate=rate)
        assert epsilon(noise, rate, steps, delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-9)
    # TensorFlow Privacy's example: MNIST, 60 epochs; 2.92 by an older conversion, which is an upper bound.
    assert 2.2 < epsilon(1.12, 256 / 60000, 14063, 1e-5) < 2.92
    assert epsilon(1.1, 0.1, 0, 1e-3) == 0 and epsilon(2.0, 0.1, 50, 1e-3) < epsilon(1.1, 0.1, 50, 1e-3)


def test_each_worker_has_its_own_epsilon():
    pytest.importorskip("opacus")
    job = digits_job(partition="sizes", sizes=(1, 2, 4), num_workers=3, dp_noise=1.1, dp_clip=0.5)
    found = spent(job, torch.tensor([10, 10, 10]))
    for k, n in enumerate(map(len, job.shards)):
        assert found["worker_delta"][k] == 1 / (10 * n)
        assert found["worker_epsilon"][k] == epsilon(1.1, min(32, n) / n, 10, 1 / (10 * n))
    assert found["worker"] == 0 and found["epsilon"] == max(found["worker_epsilon"]) and found["clip"] == 0.5
    other = dataclasses.replace(job, config=dataclasses.replace(job.config, dp_delta=0.001))
    assert spent(other, torch.tensor([10, 10, 10]))["worker_delta"] == [0.001] * 3
    assert f"epsilon {found['epsilon']:.3g}" in privacy_said(found) and "worker 0" in privacy_said(found)


def test_clipping_alone_protects_nothing(tmp_path, capsys):
    run_dir = train(tmp_path, "--dp_noise", "0")
    assert summary(run_dir)["privacy"] == {"noise": 0, "clip": 1, "epsilon": None}
    assert "privacy: none" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_says_epsilon_and_resumes(tmp_path, capsys):
    pytest.importorskip("opacus")
    flags = ("--dp_noise", "1.1", "--engine", "threads", "--checkpoint_every", "1")
    whole = train(tmp_path, *flags, name="whole")
    found = summary(whole)["privacy"]
    assert f"epsilon {found['epsilon']:.3g} at delta {found['delta']:.2g}" in capsys.readouterr().out
    half = train(tmp_path, *flags, "--max_rounds", "3", name="half")  # learning rates are planned for all rounds
    assert summary(half)["privacy"]["epsilon"] < found["epsilon"]
    run_dir = train(tmp_path, *flags)
    for file in [run_dir / "summary.json", *sorted((run_dir / "checkpoints").iterdir())[1:]]:
        file.unlink()
    run_dir = train(tmp_path, *flags, "--resume")
    assert metrics(run_dir) == metrics(whole) and summary(run_dir) == summary(whole)
    assert same_tensors(run_dir / "model.safetensors", whole / "model.safetensors")
    several = train(tmp_path, *flags, "--seeds", "2", name="seeds").parent
    epsilons = [load(several / f"seed-{s}/stage1/summary.json")["privacy"]["epsilon"] for s in (0, 1)]
    assert load(several / "summary.json")["privacy"]["epsilon"] == max(epsilons)


# ---- what it cannot go with ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,words", [
    (["--model", "resnet18"], "BatchNorm"), (["--finetune", "1"], "--finetune"),
    (["--batch_parts", "2"], "--batch_parts"), (["--engine", "graph"], "--engine graph"),
    (["--engine", "measure"], "--engine measure"), (["--dp_clip", "0"], "--dp_clip"),
    (["--dp_delta", "1"], "--dp_delta"), (["--ledger", "ledger"], "--ledger"),
])  # fmt: skip
def test_what_it_cannot_go_with_is_refused(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr("training.run.check_packages", lambda config: None)
    small = ["--model", "mlp", "--max_train", "100", "--min_shard", "2", "--quiet", "--results_dir", str(tmp_path)]
    assert words in refused(capsys, main.main([*small, "--dp_noise", "1", *flags]))
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"]


def test_without_the_accountant_a_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    flags = ["--dp_noise", "1", "--quiet", "--results_dir", str(tmp_path)]
    for command in (main.main, valuation.__main__.main):
        assert "pip install -r requirements-privacy.txt" in refused(capsys, command(flags))
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"]


def test_influence_methods_say_why_not():
    with pytest.raises(UsageError, match="what a sample did, which is what clipping and noise hide"):
        check_differentiable(Config(dp_noise=1.0))
    job = digits_job(dp_noise=1.0)
    assert all("hide" in why_not(name, job, True) for name in OF_SGD) and why_not("ddval", job, True) is None


# ---- valuation ----------------------------------------------------------------------------------------------

SMALL = dict(quiet=True, threads=1, epochs=2, num_workers=3, max_train=150, engine="threads")


def test_shared_features_get_noise_in_units_of_their_deviation():
    from tests.test_valuation import study_of

    plain, noised = study_of(max_train=150), study_of(max_train=150, feature_noise=2.0)
    (clean_nF, labels_n), tests = plain.features
    (shared_nF, same_n), same_tests = noised.features
    assert torch.equal(labels_n, same_n)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(tests, same_tests, strict=True))  # they stay at home
    deviation_F = clean_nF.std(0)
    moving = deviation_F > 0
    unit_nF = (shared_nF - clean_nF)[:, moving] / (2 * deviation_F[moving])
    assert abs(float(unit_nF.std()) - 1) < 0.03 and torch.equal(shared_nF[:, ~moving], clean_nF[:, ~moving])
    few, ones_nF = dataclasses.replace(plain.job, train_ids=plain.job.train_ids[3::5]), torch.eye(150)
    own_nF = ones_nF[3::5].clone()
    scale_F = [features_nF.std(0) for features_nF in (ones_nF, own_nF)]
    add_noise(ones_nF, 1.0, plain.job)  # one's noise does not depend on who else is there
    add_noise(own_nF, 1.0, few)
    seen = scale_F[1] > 0
    drawn = [(t_nF - torch.eye(150)[3::5])[:, seen] / s_F[seen] for t_nF, s_F in ((ones_nF[3::5], scale_F[0]),
                                                                                  (own_nF, scale_F[1]))]  # fmt: skip
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def test_valuation_says_epsilon(tmp_path, capsys):
    pytest.importorskip("opacus")
    flags = ["--quiet", "--threads", "1", "--epochs", "3", "--num_workers", "3", "--max_train", "200", "--no-plots",
             "--results_dir", str(tmp_path), "--run_name", "v", "--dp_noise", "1.1", "--patience", "1"]  # fmt: skip
    code = valuation.__main__.main([*flags, "--feature_noise", "1", "--valuations", "ddval", "equal"])
    record = json.loads((tmp_path / "v/valuation/valuation.json").read_text())
    assert code == 0 and set(record["methods"]) == {"ddval", "equal"}
    job = build(ValuationConfig(num_workers=3, max_train=200, quiet=True, dp_noise=1.1).training())
    rounds = min(3, record["rounds"] + 1)
    for n, found in zip(map(len, job.shards), record["privacy"]["worker_epsilon"], strict=True):
        assert found == pytest.approx(epsilon(1.1, min(32, n) / n, -(-n // min(32, n)) * rounds, 1 / (10 * n)))
    assert privacy_said(record["privacy"]) in capsys.readouterr().out
    assert "hide" in refused(capsys, valuation.__main__.main([*flags, "--overwrite", "--valuations", "cascade"]))
