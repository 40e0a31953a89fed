"""The Flower deployment equals the in-process fedavg, and lets only the right nodes in.

The fast tests run both sides of a round without Flower; the slow ones start its processes.
"""

import os
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from federated.processes import ROOT, Loopback, descendants, running
from federated.rounds import (
    DeployedFedAvg,
    check_worker,
    client_round,
    configuration,
    execution,
    fingerprint,
    read_row,
    write_row,
)
from training.build import build
from training.protocols import fedavg
from training.run import train_run
from utils.errors import UsageError
from utils.records import read_metrics, read_summary

FLAGS = "--model mlp --epochs 2 --quiet --no-plots"
ENVIRONMENT = ROOT / ".venv-federated"


def job_of(flags):
    config = configuration(f"{FLAGS} {flags}")
    return build(config, execution(config))


def apart(job, flags):
    """The protocol with each client's round in a job of the client's own, as another machine builds it."""
    return DeployedFedAvg(lambda r, workers, arrays: [client_round(job_of(flags), k, r, arrays) for k in workers])


@pytest.mark.parametrize("flags", ["--num_workers 2", "--num_workers 4 --fraction_fit 0.5 --local_epochs 2 --epochs 4"])
def test_rounds_made_elsewhere_are_the_rounds_of_fedavg(flags):
    """To the bit: the rows, the losses, the messages and the samples, with unequal shards and momentum."""
    job = job_of(flags)
    here, there = job.make_fleet(), job.make_fleet()
    expected, found = list(fedavg.run(here, job)), list(apart(job, flags).run(there, job))
    assert torch.equal(here.rows_RD, there.rows_RD)
    assert len(expected) == len(found) >= 2
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.train_loss_R.nan_to_num(-1), b.train_loss_R.nan_to_num(-1))
        assert (a.done, a.lr, a.messages, a.samples, a.seconds) == (
            b.done,
            b.lr,
            b.messages,
            b.samples,
            b.seconds,
        )


def test_a_deployment_goes_on_from_any_round():
    """Clients keep nothing, so the second half from a checkpointed row is the second half."""
    job = job_of("--num_workers 2 --epochs 3")
    whole, half = job.make_fleet(), job.make_fleet()
    list(fedavg.run(whole, job))
    protocol = apart(job, "--num_workers 2 --epochs 3")
    next(protocol.run(half, job))
    resumed = job.make_fleet()
    resumed.rows_RD.copy_(half.rows_RD)
    list(protocol.run(resumed, job, first=1))
    assert torch.equal(whole.rows_RD, resumed.rows_RD)


@pytest.mark.parametrize(("channels_last", "other"), [(False, True), (True, False)])
def test_models_travel_whatever_the_memory_layout(channels_last, other):
    sent = job_of(f"--num_workers 2 --model cnn --channels_last {channels_last}")
    received = job_of(f"--num_workers 2 --model cnn --channels_last {other}")
    row_D = torch.empty_like(received.initial_ND[0])
    read_row(received.engine.layout, write_row(sent.engine.layout, sent.initial_ND[0]), row_D, "the server")
    assert torch.equal(row_D, received.initial_ND[0])


def test_a_damaged_model_is_refused():
    job = job_of("--num_workers 2")
    layout, row_D = job.engine.layout, job.initial_ND[0]
    good = write_row(layout, row_D)
    name = next(iter(good))
    bad = {
        "of another network": {k: v for k, v in good.items() if k != name},
        "not finite": good | {name: np.full_like(good[name], np.nan)},
        "float64": good | {name: good[name].astype(np.float64)},
        r"\(1,\)": good | {name: good[name].reshape(-1)[:1]},
    }
    for message, arrays in bad.items():
        with pytest.raises(UsageError, match=f"node 7 sent .*{message}"):
            read_row(layout, arrays, row_D.clone(), "node 7")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--protocol gossip", "runs in one process"),
        ("--keep_momentum", "keep_momentum works in one process"),
        ("--server_momentum 0.5", "server_momentum works in one process"),
        ("--finetune 1", "finetune works in one process"),
        ("--init per_worker", "init per_worker works in one process"),
        ("--seeds 3", "one seed a run"),
    ],
)
def test_what_a_deployment_cannot_do_is_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        configuration(flags)


def test_a_node_may_say_where_its_data_is_but_not_what_is_trained():
    config = configuration("--lr 0.1", "--dataset_path /elsewhere --threads 2")
    assert (config.dataset_path, config.threads, config.lr) == ("/elsewhere", 2, 0.1)
    with pytest.raises(UsageError, match="take --lr out"):
        configuration("--lr 0.1", "--lr 0.2")


def test_a_node_is_the_worker_that_its_partition_says():
    config = configuration("--num_workers 3")
    assert check_worker(config, {"partition-id": 2, "num-partitions": 3}) == 2
    for node in ({}, {"partition-id": 3}, {"partition-id": "1"}, {"partition-id": 1, "num-partitions": 2}):
        with pytest.raises(UsageError, match="partition"):
            check_worker(config, node)


def test_the_fingerprint_tells_shards_and_pixels_apart():
    job, same, seed = (job_of(f"--num_workers 2 --seed {s}") for s in (0, 0, 1))
    assert fingerprint(job, 0) == fingerprint(same, 0)
    assert len({fingerprint(job, 0), fingerprint(job, 1), fingerprint(seed, 0)}) == 3
    same.dataset.images_nCHW[same.shards[0][0]] ^= 1
    assert fingerprint(job, 0) != fingerprint(same, 0)


# ---- with Flower's processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def flower():
    """Where flwr is installed: an environment of its own, made if it is not there."""
    if not (ENVIRONMENT / "done").exists():
        subprocess.run(["make", "federated"], cwd=ROOT, check=True, timeout=1200, stdout=subprocess.DEVNULL)
    return ENVIRONMENT / "bin"


@pytest.mark.deployment
@pytest.mark.parametrize("secure", [False, True])
def test_two_nodes_on_loopback_equal_the_in_process_run(flower, tmp_path, secure):
    """The demonstration as a user starts it; with --secure it uses TLS and node authentication."""
    flags = ["--num_workers", "2", "--model", "mlp", "--epochs", "2", "--no-plots"]
    command = [
        flower / "python",
        "-m",
        "federated.demo",
        *flags,
        "--results_dir",
        tmp_path,
        "--run_name",
        "two nodes",
    ]
    environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [*command, *(["--secure"] if secure else [])],
        cwd=ROOT,
        env=environment,
        timeout=500,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    run, here = tmp_path / "two nodes" / "stage1", tmp_path / "here"
    train_run(configuration(f"{FLAGS} --num_workers 2 --results_dir {tmp_path}"), here)
    expected, found = load_file(here / "model.safetensors"), load_file(run / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    assert read_summary(run)["test_accuracy"] == pytest.approx(read_summary(here)["test_accuracy"], abs=3e-3)
    keys = ("round", "messages", "bytes", "virtual_seconds")
    assert [[m[k] for k in keys] for m in read_metrics(run)] == [[m[k] for k in keys] for m in read_metrics(here)]
    rest = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in rest  # keys, logs: every process of a secure run names the folder


@pytest.mark.deployment
def test_a_node_with_a_wrong_key_or_certificate_is_refused(flower, tmp_path):
    """A right node stays; one whose key is not registered, one without a key, one without TLS, and one
    that trusts another authority (so cannot tell who the server is) are turned away."""
    keys, others = tmp_path / "keys", tmp_path / "others"
    for folder in (keys, others):
        subprocess.run(
            [ROOT / "federated" / "certificates.sh", folder, "127.0.0.1", "2"],
            check=True,
            capture_output=True,
        )
    with Loopback(tmp_path / "flower", keys, flower) as federation:
        federation.register(keys / "node-0")
        right = federation.start_node(0, 2)
        wrong = {
            "unregistered": federation.start_node(1, 2, name="unregistered"),
            "stolen name": federation.start_node(0, 2, name="stolen name", key=others / "node-0"),
            "authority": federation.start_node(0, 2, name="authority", authority=others / "ca.crt"),
        }
        deadline = time.monotonic() + 120
        while any(p.poll() is None for p in wrong.values()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert {name: p.poll() for name, p in wrong.items()} == dict.fromkeys(wrong, 1)
        assert right.poll() is None
        assert any("SuperNode ID" in line for line in federation.log("node-0"))
        for name, reason in (
            ("unregistered", "Failed to activate"),
            ("stolen name", "Failed to activate"),
            ("authority", "certificate verify failed"),
        ):
            assert any(reason in line for line in federation.log(name)), name
        started = [p.pid for p in federation.processes.values()]
        started += [child for pid in started for child in descendants(pid)]
    assert len(started) >= 6 and running(started) == []
