"""What every edge of every round did: against finite differences, on disk, and as a user asks for it."""

import json
import shutil

import numpy as np
import pytest
import torch
from command import refused
from runs import recorded
from scipy import sparse

import main_pruned
from tests.test_algorithms import CASES, job_of
from training.protocols import load_protocol
from training.retrain import objective_values
from utils.influence.edges import edges
from utils.scores import EDGES, read_scores
from visualization.plot_utils import plot_folder
from visualization.samples import find_scores

MIXED = {
    "adapt, then combine": dict(local_steps=2),
    **{name: CASES[name] for name in ("cta", "cta over steps", "qg nesterov", "d2 with momentum",
                                      "tracking with momentum", "choco")},
    "BatchNorm": dict(mode="grid"),
}  # fmt: skip


def job_with(settings, changed=None):
    """The job and its protocol. ``changed``: (round, receiver, sender, change): weight that the receiver gives the
    sender and takes from itself."""
    network = {}
    if settings is MIXED["BatchNorm"]:
        layers = [torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh()]
        network = dict(model="mlp_smooth", network=torch.nn.Sequential(*layers, torch.nn.Linear(6, 10)).double())
        torch.manual_seed(3)
    job = job_of(settings | network, epochs=3)
    protocol = load_protocol(job.config.protocol)
    original = protocol.mixing

    def mixing(job, r):
        W = original(job, r)
        if changed is None or r != changed[0]:
            return W
        _, k, l, change = changed
        W = W.tolil(copy=True)
        W[k, l] += change
        W[k, k] -= change
        return sparse.csr_array(W)

    protocol.mixing = mixing
    return job, protocol


@pytest.mark.parametrize(
    "name", [name if name in ("d2 with momentum", "BatchNorm") else pytest.param(name, marks=pytest.mark.slow)
             for name in MIXED]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:--mode ring has a mixing matrix")
def test_edges_are_finite_differences(name):
    torch.manual_seed(3)
    job, protocol = job_with(MIXED[name])
    found = edges(recorded(job, memory_limit=0))
    T, E = found.helped_TE.shape
    assert T == protocol.rounds(job) and E == len(job.topology.edges()) * (1 if job.topology.directed else 2)
    for r in (1, T // 2, T - 1):  # in the first round all rows may be equal
        used = found.helped_TE[r].nonzero()[0]
        for e in used[[0, len(used) // 2]]:
            k, l = int(found.receiver_E[e]), int(found.sender_E[e])
            weight, ends = protocol.mixing(job, r)[k, l], []
            for sign in (1, -1):
                torch.manual_seed(3)
                other, changed = job_with(MIXED[name], (r, k, l, sign * 1e-4 * weight))
                fleet = other.make_fleet()
                for _ in changed.run(fleet, other):
                    pass
                ends.append(objective_values(other, fleet, "nodes")[0].item())
            # The weight of an edge that helped, moved to the receiver itself, would raise the loss.
            assert found.helped_TE[r, e] == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-5, abs=1e-11)


def test_what_was_sent_is_held_within_the_memory():
    job, protocol = job_with(CASES["tracking with momentum"])
    run = recorded(job, memory_limit=0)
    for t, _, _ in run.backwards_with_sent():
        assert len(run._sent) <= 2, t


FLAGS = ("--edges", "--num_workers", "6", "--model", "mlp", "--max_train", "200", "--epochs", "3", "--quiet")


def test_the_command_writes_keeps_and_draws_them(tmp_path, capsys):
    words = [*FLAGS, "--results_dir", str(tmp_path), "--run_name", "r", "--protocol", "d2", "--mode", "line"]
    assert main_pruned.main(words) == 0
    said, folder = capsys.readouterr().out, tmp_path / "r"
    record = read_scores(folder / "influence/edges.zarr", ("helped",), EDGES)
    rounds = json.loads((folder / "stage1/summary.json").read_text())["rounds"]
    assert record["helped"].shape == (rounds, 10) and np.isfinite(record["helped"]).all()
    assert "most:" in said and (folder / "edges.png").stat().st_size > 10_000
    assert not (folder / "comparison.json").exists()  # nothing was pruned unasked
    before = (folder / "influence/edges.zarr").stat().st_mtime_ns
    words.append("--no-plots")
    assert main_pruned.main(words) == 0 and (folder / "influence/edges.zarr").stat().st_mtime_ns == before
    next(p for p in (folder / "influence/edges.zarr/helped/c").rglob("*") if p.is_file()).unlink()  # a chunk is lost
    assert main_pruned.main(words) == 0
    again = read_scores(folder / "influence/edges.zarr", ("helped",), EDGES)
    np.testing.assert_array_equal(again["helped"], record["helped"])
    (folder / "edges.png").unlink()
    assert folder / "edges.png" in plot_folder(folder) and (folder / "edges.png").exists()
    assert main_pruned.main([*words, "--pruning_algorithm", "cascade", "--no-control"]) == 0
    assert find_scores(folder / "stage1", None).stem == "cascade"  # edges are not taken for samples' scores
    shutil.rmtree(folder / "influence")
    assert main_pruned.main([*words, "--target", "worker:2"]) == 0
    other = read_scores(folder / "influence/edges.zarr", ("helped",), EDGES)
    assert other["settings"]["target"] == "worker:2" and not np.array_equal(other["helped"], record["helped"])


@pytest.mark.parametrize("protocol", ["fedavg", "relay", "pushsum", "local", "diloco", "chained"])
def test_protocols_without_such_edges_are_refused(tmp_path, capsys, protocol):
    words = [*FLAGS, "--protocol", protocol, "--mode", "tree", "--results_dir", str(tmp_path)]
    assert "averages of neighbours" in refused(capsys, main_pruned.main(words))
    assert not any(tmp_path.iterdir())  # said before anything is trained
