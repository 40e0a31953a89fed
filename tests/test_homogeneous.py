"""Homogeneous Learning: walks against chained training, policies, what is counted, the agent and its files."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import main as main_py
from homogeneous.__main__ import main
from homogeneous.args import WalkConfig, config_class
from homogeneous.evaluation import record, reduction, verdict
from homogeneous.policies import ORACLES, POLICIES, run
from homogeneous.world import Rules, World, distances
from tests import command
from tests.command import refused
from tests.runs import digits_job
from training.build import build
from training.protocols import load_protocol
from training.walk import Walks
from utils.args import Config
from utils.errors import UsageError
from utils.parser import parse
from utils.progress import ignored

SMALL = ("--quiet", "--threads", "1", "--max_hops", "8", "--seeds", "2", "--max_train", "400", "--num_workers", "5",
         "--partitions", "0")  # fmt: skip


def world(**settings) -> World:
    small = {"quiet": True, "threads": 1, "max_hops": 8, "max_train": 400, "num_workers": 5}
    return World.of(WalkConfig(**small | settings))


@pytest.fixture(scope="module")
def small() -> World:
    return world()


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_walk_is_a_chained_run(scheduler, augment):
    job = digits_job(protocol="chained", model="cnn", engine="threads", num_workers=4, epochs=2, dtype="float32",
                     scheduler=scheduler, augment=augment)  # fmt: skip
    fleet, protocol = job.make_fleet(), load_protocol("chained")
    rounds = protocol.rounds(job)
    list(protocol.run(fleet, job))
    walks = Walks(job, 3, rounds)
    walks.start([0, 1, 2], [5, job.config.seed, 6])
    for r in range(rounds):
        walks.visit([0, 1, 2], [r * 2 % 4, r % 4, 3])
    assert torch.equal(walks.fleet.rows_RD[1], fleet.rows_RD[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_of_a_walk_do_not_depend_on_the_others(threads):
    job = digits_job(protocol="chained", model="mlp", engine="vmap", num_workers=5, dtype="float32", threads=threads,
                     alpha=0.3, partition="dirichlet")  # fmt: skip
    assert job.batches.ragged
    rows, values = [], []
    for count in (1, 2, 5, 9):
        walks = Walks(job, count, 9)
        walks.start(range(count), range(count))
        for hop in range(4):
            walks.visit(range(count), [hop * (m + 1) % 5 for m in range(count)])
        rows.append(walks.fleet.rows_RD[0].clone())
        values.append(walks.measure(range(count))[0])
    assert all(torch.equal(row_D, rows[0]) for row_D in rows) and len(set(values)) == 1


def test_distances_are_those_of_the_paper(tmp_path):
    distance_NN = distances("random", 10)
    off = distance_NN[~np.eye(10, dtype=bool)]
    assert (distance_NN == distance_NN.T).all() and not distance_NN.diagonal().any()
    assert [round(distance_NN[pair], 4) for pair in ((0, 1), (3, 4), (2, 7))] == [0.0753, 0.0040, 0.0961]
    assert off.min() == distance_NN[3, 4] and off.max() == distance_NN[2, 7] and round(off.mean(), 5) == 0.04758
    file = tmp_path / "d.txt"
    file.write_text("0 1\n2.5 0\n")
    assert distances(str(file), 2).tolist() == [[0, 1], [2.5, 0]]
    for text in ("0 1\n2 nan", "0 1\n-2 0", "0 1", "0 1 2\n0 1 2"):
        file.write_text(text)
        with pytest.raises(UsageError):
            distances(str(file), 2)


def test_tours_stay_and_turn(small):
    walked = {name: run(small, POLICIES[name], [1], ignored).nodes[0] for name in ("round_robin", "tour", "stay_3")}
    assert walked["round_robin"] == [0, 1, 2, 3, 4, 0, 1, 2][: len(walked["round_robin"])]
    assert sorted(walked["tour"][:5]) == [0, 1, 2, 3, 4]
    assert walked["stay_3"][:8] == [k for k in walked["tour"][:3] for _ in range(3)][:8]


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(sorted(POLICIES.keys() - ORACLES.keys())), mode=st.sampled_from(["ring", "star", "grid"]))
def test_every_policy_follows_links(name, mode):
    there = world(mode=mode, max_hops=6, num_workers=6, goal=1.1)
    walking = run(there, POLICIES[name], [3, 4], ignored)
    for nodes in walking.nodes:
        assert len(nodes) == 6 and all(there.open_NN[a, b] for a, b in zip([0, *nodes], nodes, strict=False))
    for closed in np.flatnonzero(~there.open_NN[walking.at_M[0]])[:1].tolist():
        with pytest.raises(UsageError, match="no link"):
            walking.go([0], [closed])


def test_the_look_ahead_goes_where_the_loss_is_lowest(small):
    walking = small.walks(2)
    walking.start([0, 1], [7, 7])
    [best, _] = POLICIES["look_ahead"](walking, [0, 1])
    losses = []
    for node in range(5):
        trial = small.walks(1)
        trial.start([0], [7])
        trial.go([0], [node])
        losses.append(trial.loss_M[0])
    assert best == int(np.argmin(losses))
    assert walking.looked_ahead(0, range(5)).tolist() == losses


def test_walks_that_are_known_are_not_trained_again(small):
    seeds = [11, 12, 13]
    first = run(small, POLICIES["random"], seeds, ignored)
    again = small.walks(3)
    for seed, nodes, measured in zip(seeds, first.nodes, first.measured, strict=True):
        again.known |= {(seed, *nodes[:hops]): values for hops, values in enumerate(measured[:5])}
    again.start(range(3), seeds)
    for hop in range(4):
        again.go(range(3), [nodes[hop] for nodes in first.nodes])
    assert again._trained == [-1] * 3  # nothing was
    going = [m for m in range(3) if len(first.nodes[m]) > 4]
    again.go(going, [first.nodes[m][4] for m in going])
    assert [again.measured[m][5] for m in going] == [first.measured[m][5] for m in going]


def test_not_arriving_counts_twice(small):
    walking = run(small, POLICIES["stay_6"], [1, 2], ignored)
    found = record(walking)
    assert not any(found["reached"]) and found["hops"] == [8, 8] and found["counted"] == [16, 16]
    assert found["total"] == [16 + 10 * cost for cost in found["cost"]]
    half = {key: [value / 2 for value in found[key]] for key in ("hops", "counted", "cost", "total")}
    less = reduction(half, found, 0)
    assert less["hops"] == less["total"] == 0.5 and less["hops_interval"] == [0.5, 0.5]
    assert "needs less than stay" in verdict({"stay": less})


def test_the_policies_alone_need_no_further_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = [*SMALL, "--results_dir", str(tmp_path), "--run_name", "r", "--policies", "random", "tour"]
    assert "requirements-homogeneous.txt" in refused(capsys, main(flags))
    assert main([*flags, "--agent", "none"]) == 0
    found = json.loads((tmp_path / "r/homogeneous/policies.json").read_text())
    assert set(found["policies"]) == {"random", "tour"} and set(found["reduction"]) == {"tour"}
    assert {path.name for path in (tmp_path / "r/homogeneous/plots").iterdir()} == {"policies.png", "walk.png"}
    assert "2 walks each" in capsys.readouterr().out
    assert "--resume" in refused(capsys, main([*flags, "--agent", "none"]))
    assert "--goal" in refused(capsys, main([*flags, "--agent", "none", "--resume", "--goal", "0.5"]))


@pytest.mark.parametrize("flags,words", [
    (["--policies", "tuor"], "tour"), (["--num_workers", "1"], "two nodes"), (["--distances", "nowhere"], "nowhere"),
    (["--protocol", "gossip"], "chained"),
])  # fmt: skip
def test_bad_values_are_refused(tmp_path, capsys, flags, words):
    argv = [*SMALL, "--results_dir", str(tmp_path), "--agent", "none", *flags]
    assert words in refused(capsys, main(argv))


def test_an_environment_passes_both_checks(small):
    gymnasium_check = pytest.importorskip("gymnasium.utils.env_checker").check_env
    other_check = pytest.importorskip("stable_baselines3.common.env_checker").check_env
    from homogeneous.environment import WalkEnv

    env = WalkEnv(small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(env, skip_render_check=True)
        other_check(env)
    first = [env.reset(seed=3)[0], *(env.step(k)[0] for k in (1, 2, 2))]
    second = [env.reset(seed=3)[0], *(env.step(k)[0] for k in (1, 2, 2))]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert env.action_masks().all()


def test_the_agent_learns_again_what_it_learned(tmp_path, capsys):
    pytest.importorskip("stable_baselines3")
    flags = [*SMALL, "--results_dir", str(tmp_path), "--policies", "random", "--episodes", "9", "--side_by_side", "3"]
    assert main([*flags, "--run_name", "a"]) == 0
    folder = tmp_path / "a" / "homogeneous"
    agent, lines = (folder / "agent.safetensors").read_bytes(), (folder / "episodes.jsonl").read_text().splitlines(True)
    assert len(lines) == 9 and (folder / "plots" / "learning.png").exists()
    (folder / "agent.safetensors").unlink()
    (folder / "episodes.jsonl").write_text("".join(lines[:4]) + lines[4][:20])  # killed in the middle of a line
    assert main([*flags, "--run_name", "a", "--resume"]) == 0
    assert (folder / "agent.safetensors").read_bytes() == agent
    assert (folder / "episodes.jsonl").read_text() == "".join(lines)


def test_an_agent_of_another_world_is_refused(tmp_path, small):
    pytest.importorskip("stable_baselines3")
    from homogeneous.agent import Agent, Values, load_agent

    path = tmp_path / "agent.safetensors"
    walking = small.walks(1)
    walking.start([0], [0])
    Agent(Values(5, walking.features), small.rules).save(path)
    assert POLICIES["random"](walking, [0]) and load_agent(path)(walking, [0])[0] in range(5)
    Agent(Values(6, walking.features + 6), small.rules).save(path)
    with pytest.raises(UsageError, match="6 nodes"):
        load_agent(path)(walking, [0])
    for data in (b"", b"garbage", path.read_bytes()[:-9]):
        path.write_bytes(data)
        with pytest.raises(UsageError, match="is no agent"):
            load_agent(path)


@pytest.fixture
def agent_file(tmp_path, small) -> str:
    """An agent that has learned nothing, but has opinions."""
    from homogeneous.agent import Agent, Values

    torch.manual_seed(2)
    walking = small.walks(1)
    walking.start([0], [0])
    path = tmp_path / "agent.safetensors"
    Agent(Values(5, walking.features), Rules(2.0, 10, 1.0, distances("random", 5))).save(path)
    return str(path)


FOLLOWED = ("--protocol", "chained", "--chain_order", "policy", "--num_workers", "5", "--max_train", "400", "--engine",
            "threads", "--mode", "all", "--epochs", "2", "--checkpoint_every", "3")  # fmt: skip


def test_a_real_run_follows_the_agent(tmp_path, agent_file, capsys):
    from homogeneous.agent import load_agent

    run_dir = command.train(tmp_path, *FOLLOWED, "--policy", agent_file)
    visits, seen = (command.load(run_dir / "summary.json")[key] for key in ("visits", "seen"))
    assert len(visits) == len(seen) == 10 and len(set(visits)) > 1
    agent = load_agent(Path(agent_file))
    flags = command.arguments(tmp_path, *FOLLOWED, "--policy", agent_file)
    walking = run(World(build(parse(Config, flags, "")), agent.rules), agent, [0], ignored)
    assert walking.nodes == [visits] and [list(values) for values in walking.measured[0][:10]] == seen

    model = (run_dir / "model.safetensors").read_bytes()
    (run_dir / "summary.json").unlink()
    max((run_dir / "checkpoints").iterdir()).unlink()
    command.train(tmp_path, *FOLLOWED, "--policy", agent_file, "--resume")
    again = command.load(run_dir / "summary.json")
    assert (again["visits"], again["seen"]) == (visits, seen) and (run_dir / "model.safetensors").read_bytes() == model
    Path(agent_file).write_bytes(b"another")
    assert "--policy" in refused(capsys, main_py.main([*flags, "--resume"]))


@pytest.mark.slow
def test_a_run_that_follows_the_agent_is_scored_and_audited(tmp_path, agent_file):
    flags = (*FOLLOWED, "--policy", agent_file, "--model", "mlp_smooth", "--dtype", "float64")
    scoring = ("--pruning_algorithm", "cascade", "--no-control", "--audit", "--audit_groups", "8")
    scoring = (*scoring, "--methods", "cascade")
    folder = command.prune(tmp_path, *flags, *scoring)
    visits = command.load(folder / "stage1" / "summary.json")["visits"]
    [stage2] = folder.glob("stage2_*")
    assert len(visits) == len(command.load(stage2 / "summary.json")["visits"]) == 10
    assert command.load(folder / "audit.json")["methods"]["cascade"]["lds"] > 0.7


def test_the_agent_of_a_run_must_fit(tmp_path, agent_file, capsys):
    flags = ("--protocol", "chained", "--chain_order", "policy")
    assert "--policy FILE" in refused(capsys, main_py.main(command.arguments(tmp_path, *flags)))
    argv = command.arguments(tmp_path, *flags, "--policy", agent_file, "--num_workers", "4", name="four")
    assert "5 nodes" in refused(capsys, main_py.main(argv))


def test_one_walk_is_enough_and_other_data_are_refused(tmp_path, capsys):
    flags = [*SMALL, "--results_dir", str(tmp_path), "--run_name", "r", "--agent", "none", "--policies", "random"]
    assert main([*flags, "--seeds", "1"]) == 0
    path = tmp_path / "r" / "homogeneous" / "config.json"
    record = json.loads(path.read_text())
    record["identity"]["digest"] = record["identity"]["data"]["inputs"] = "0"
    path.write_text(json.dumps(record))
    assert "the data are not those" in refused(capsys, main([*flags, "--seeds", "1", "--resume"]))
    path.write_text("{}")
    assert "config.json" in refused(capsys, main([*flags, "--seeds", "1", "--resume"]))


def test_the_commands_of_its_page_are_understood():
    page = (Path(__file__).parent.parent / "docs" / "homogeneous.md").read_text()
    commands = re.findall(r"python -m homogeneous\b([^`#\n]*)", page)
    assert len(commands) >= 4
    for words in commands:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parse(config_class(words.split()), words.split(), "")
