"""The paper's world against what its code does, and the schedule against finite differences."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import homogeneous.paper
from homogeneous.__main__ import main
from homogeneous.agent import load_agent
from homogeneous.args import PaperConfig, WalkConfig
from homogeneous.paper import BATCH, GAMMA, PaperAgent, learn_from, main_class_shards, new_network, reward, seen
from homogeneous.policies import POLICIES, run
from homogeneous.schedule import Schedule, exchanged, improved, judged, unrolled, walk_as_run, worth
from homogeneous.world import World
from networks import load_model
from tests.command import refused
from training.protocols import load_protocol, train_step
from training.trajectory import RecordedRun
from utils.errors import UsageError
from utils.influence.targets import objective
from utils.progress import ignored

QUICK = ("--paper", "--quiet", "--threads", "1", "--max_hops", "6", "--seeds", "2", "--num_workers", "5", "--goal",
         "0.9", "--model", "mlp", "--image_size", "8", "--test_samples", "60")  # fmt: skip


def paper_world(**settings) -> World:
    small = dict(quiet=True, threads=1, max_hops=6, num_workers=5, model="mlp", image_size=8, test_samples=60)
    return World.of(PaperConfig(**small | settings))


def test_a_node_has_400_of_its_class_and_the_first_100_of_the_others():
    targets_n = torch.arange(10_000) % 10
    shards = main_class_shards(targets_n, 12)
    assert all(len(shard) == 500 for shard in shards)
    for k, shard in enumerate(shards):
        assert (targets_n[shard[:400]] == k % 10).all() and (targets_n[shard[400:]] != k % 10).all()
    assert shards[3][:400].tolist() == list(range(3, 4000, 10))
    assert shards[3][400:].tolist() == [n for n in range(112) if n % 10 != 3][:100]
    assert shards[11][:400].tolist() == list(range(4001, 8000, 10))  # the next ones of class 1
    assert not set(shards[11][400:].tolist()) & set(shards[1][400:].tolist())
    fewer = main_class_shards(torch.arange(500) % 10, 10)
    assert {len(shard) for shard in fewer} == {50 + 12}
    with pytest.raises(UsageError, match="samples of each class"):
        main_class_shards(torch.arange(30) % 10, 10)


def test_the_network_is_that_of_the_paper():
    network = load_model("cnn_20_50", 10, (1, 28, 28), seed=0)
    assert sum(p.numel() for p in network.parameters()) == 33_580
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    weight = network[0].weight.detach()
    assert 0.9 * math.sqrt(6 / (25 + 500)) < float(weight.abs().max()) <= math.sqrt(6 / (25 + 500))


def test_what_is_seen_is_the_principal_components_of_the_nodes_models():
    world = paper_world()
    walking = world.walks(2)
    walking.start([0, 1], [4, 5])
    assert not seen(walking, [0, 1]).any()
    for nodes in ([0, 0], [3, 1], [3, 4]):
        before_MD = walking.walks.fleet.rows_RD.clone()
        walking.go([0, 1], nodes)
        for m in (0, 1):
            models_ND = before_MD[m].repeat(5, 1)
            models_ND[nodes[m]] = walking.walks.fleet.rows_RD[m]
            theirs_NC = PCA(5).fit_transform(models_ND.double().numpy())
            ours_NC = seen(walking, [m]).view(5, 5).numpy()
            np.testing.assert_allclose(np.abs(ours_NC), np.abs(theirs_NC), atol=1e-5)
            assert ours_NC[nodes[m], 0] > 0 > ours_NC[(nodes[m] + 1) % 5, 0]
    figure = walking.measured[0][-1][0]
    assert reward(walking, 0.05) == pytest.approx(32 ** (figure - 0.8) - 1.05)


def test_nodes_keep_their_moments_and_the_model_begins_at_node_0():
    world = paper_world()
    walking = run(world, Schedule([0, 2, 2, 0, 1, 2]), [7], ignored)
    assert walking.nodes[0] == [0, 2, 2, 0, 1, 2]
    P, steps = walking.walks.engine.layout.P, walking.walks.steps_N
    assert walking.walks.fleet.state_RS[0, 2 * P] == 3 * steps[2]  # of node 2's moments, not of the model's
    assert run(world, POLICIES["random"], [7], ignored).nodes[0][0] == 0


def test_pixels_and_the_goal_are_the_papers():
    job = paper_world().job
    inputs, _ = job.samples.plain(torch.arange(50))
    assert 0 <= float(inputs.min()) and 0.9 < float(inputs.max()) <= 1
    data = job.dataset
    assert torch.equal(data.inputs_n[job.val_ids], data.test_inputs_m[:60])  # their leak
    with pytest.raises(UsageError, match="pictures of one class"):
        World.of(PaperConfig(quiet=True, dataset_name="air", model="lstm", image_size=None))


def test_targets_are_divided_by_their_norm(monkeypatch):
    network, wanted = new_network(3, 1), []
    original = torch.nn.functional.mse_loss
    monkeypatch.setattr(
        homogeneous.paper.nn.functional, "mse_loss", lambda a, b: wanted.append(b.clone()) or original(a, b)
    )
    draw = torch.Generator().manual_seed(0)
    visits = [(torch.randn(9, generator=draw), i % 3, 0.1 * i, torch.randn(9, generator=draw), i % 5 == 0)
              for i in range(32)]  # fmt: skip
    expected = network(torch.stack([v[0] for v in visits])).detach()
    for i, (_, node, value, after, last) in enumerate(visits):
        expected[i, node] = value + (0 if last else GAMMA * network(after).max().item())
    learn_from(visits, network, torch.optim.Adam(network.parameters()))
    assert [len(part) for part in wanted] == [BATCH, BATCH]
    torch.testing.assert_close(torch.cat(wanted), expected / expected.norm())


@pytest.mark.slow
def test_the_agent_of_the_paper_learns_again_what_it_learned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # it needs no further package
    flags = [*QUICK, "--results_dir", str(tmp_path), "--policies", "random", "--episodes", "27", "--run_name", "p"]
    assert main(flags) == 0
    folder = tmp_path / "p" / "homogeneous"
    out = capsys.readouterr().out
    assert re.search(r"the agent against a random policy: hops [-+]\d.*, distance [-+]\d", out)
    record = json.loads((folder / "policies.json").read_text())
    assert set(record["policies"]) == {"random", "agent", "agent_explores"}
    assert record["policies"]["agent"]["counted"] == record["policies"]["agent"]["hops"]
    agent, lines = (folder / "agent.safetensors").read_bytes(), (folder / "episodes.jsonl").read_text().splitlines(True)
    (folder / "agent.safetensors").unlink()
    (folder / "episodes.jsonl").write_text("".join(lines[:7]) + lines[7][:15])
    assert main([*flags, "--resume"]) == 0
    assert (folder / "agent.safetensors").read_bytes() == agent
    assert (folder / "episodes.jsonl").read_text() == "".join(lines)
    read = load_agent(folder / "agent.safetensors")
    assert isinstance(read, PaperAgent) and read.exploration == pytest.approx(math.exp(-0.02 * 27))
    walking = paper_world(num_workers=4).walks(1)
    with pytest.raises(UsageError, match="none of 4 nodes"):
        read(walking, [0])


@pytest.mark.parametrize("flags,words", [
    (["--paper", "--policies", "gradient"], "momentum"), (["--paper", "--partitions", "2"], "--partitions"),
    (["--paper", "--worker_flips", *["0.1"] * 10], "--worker_flips"), (["--paper", "--partition", "shards"], "paper's"),
    (["--paper", "--num_workers", "500"], "samples of each class"),
    (["--optimizer", "adam", "--policies", "gradient"], "sgd"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, capsys, flags, words):
    assert words in refused(capsys, main([*flags, "--agent", "none", "--quiet", "--results_dir", str(tmp_path)]))


# ---- the schedule ------------------------------------------------------------------------------------------------


def smooth_world(**settings) -> World:
    small = dict(quiet=True, threads=1, max_hops=6, num_workers=4, max_train=300, model="mlp_smooth", dtype="float64",
                 engine="loop")  # fmt: skip
    return World.of(WalkConfig(**small | settings))


def test_the_worth_of_visits_is_a_derivative():
    """A step on the mean gradient of node k's data, with a small weight, at the first step of a hop."""
    world, visits, seed = smooth_world(), [0, 2, 2, 1], 9
    worth_HN = worth(world, seed, visits)
    steps_N = world.walks(1).walks.steps_N
    for hop, node in ((0, 0), (1, 3), (3, 2), (3, 1)):
        ends = []
        for weight in (1e-4, -1e-4):
            job = walk_as_run(world.job, seed, visits)
            trajectory, fleet, protocol = RecordedRun(job, 4), job.make_fleet(), load_protocol("chained")
            for r in range(4):
                plan = protocol.plan(job, r)
                for s in range(plan.num_steps):
                    push_NP = weight * trajectory.shard_gradient(fleet.rows_RD) / trajectory.shard_sizes_N[:, None]
                    train_step(fleet, plan.step(s))
                    if (r, s) == (hop, 0):
                        fleet.state_RS[visits[hop]] += push_NP[node]
                        fleet.rows_RD[visits[hop]] -= plan.lr * push_NP[node]
                fleet.mix(plan.mixing, plan.mix_momentum)
            ends.append(objective(trajectory, fleet.rows_RD, "consensus")[0].item())
        derivative = (ends[0] - ends[1]) / 2e-4
        assert -worth_HN[hop, node] == pytest.approx(derivative * steps_N[visits[hop]].item(), rel=1e-5)


def test_an_improved_schedule_needs_no_more_and_follows_links():
    world, attempts = smooth_world(mode="ring", dtype="float32", engine="vmap", goal=0.55), []
    schedule = improved(world, 3, attempts.append)
    totals = [attempt["total"] for attempt in attempts if attempt["kept"]]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
    assert [a["visits"] for a in attempts if a["kept"]][-1] == schedule.visits
    for attempt in attempts:
        path = [0, *attempt["visits"]]
        assert all(world.open_NN[a, b] for a, b in zip(path, path[1:], strict=False))


def test_visits_are_exchanged_where_that_promises_most():
    world = smooth_world(mode="all", max_hops=4)
    even = dataclasses.replace(world.rules, distance_NN=np.zeros((4, 4)))
    world.rules = even
    worth_HN = np.ones((4, 4))
    worth_HN[2, 3], worth_HN[1, 0] = 9.0, 5.0  # neighbours: only the better one is exchanged
    assert exchanged(world, [0, 1, 2, 1], worth_HN, 2) == [0, 1, 3, 1]
    world.rules = dataclasses.replace(even, distance_NN=10 * (1 - np.eye(4)), cost_weight=1.0)
    assert exchanged(world, [0, 0, 0, 0], worth_HN, 2) == [0, 0, 0, 0]  # too far


def test_a_schedule_of_a_fixed_policy_is_where_it_goes():
    world = smooth_world(goal=0.99, dtype="float32")
    for name in ("tour", "stay_2", "round_robin"):
        walking = run(world, POLICIES[name], [3], ignored)
        assert unrolled(world, POLICIES[name]) == walking.nodes[0]
    found = judged(world, walking.nodes[0], [3])
    assert found["hops"] == 6 and found["cost"] == walking.cost_M[0]


def test_all_data_at_one_node_cost_nothing():
    world = smooth_world(dtype="float32")
    walking = run(world, POLICIES["centralized"], [3, 4], ignored)
    assert set(walking.nodes[0]) == {0} and not walking.cost_M.any() and walking.N == 1
    assert walking.walks.steps_N.tolist() == [round(world.walks(1).walks.steps_N.float().mean().item())]
    assert len(walking.walks.fleet.batches.lengths_N) == 2 and int(walking.walks.fleet.batches.lengths_N[0]) == 300


@pytest.mark.slow
def test_a_whole_run_measures_other_partitions_too(tmp_path, capsys):
    flags = ["--quiet", "--threads", "1", "--max_hops", "4", "--seeds", "2", "--max_train", "300", "--num_workers", "4",
             "--agent", "none", "--results_dir", str(tmp_path), "--run_name", "r", "--partitions", "2"]  # fmt: skip
    assert main([*flags, "--policies", "random", "gradient", "centralized"]) == 0
    record = json.loads((tmp_path / "r/homogeneous/policies.json").read_text())
    assert set(record["policies"]) == {"random", "gradient", "centralized"}
    assert set(record["other_partitions"]["policies"]) == {"random", "gradient"}
    assert len(record["other_partitions"]["policies"]["random"]["hops"]) == 4
    assert "2 other partitions" in capsys.readouterr().out
    schedule = (tmp_path / "r/homogeneous/schedule.json").read_bytes()
    assert main([*flags, "--policies", "gradient", "--resume"]) == 0
    assert (tmp_path / "r/homogeneous/schedule.json").read_bytes() == schedule
