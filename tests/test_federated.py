"""The Flower deployment equals the in-process fedavg, and lets only the right nodes in.

The fast tests run both sides of a round without Flower; the slow ones start its processes.
"""

import asyncio
import http.client
import os
import ssl
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from federated.processes import HOST, ROOT, Loopback, descendants, running
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
from federated.superlink import fenced
from training.build import build
from training.protocols.fedavg import FedAvg
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
    expected, found = list(FedAvg().run(here, job)), list(apart(job, flags).run(there, job))
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
    list(FedAvg().run(whole, job))
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
        ("--dp_noise 1", "all nodes know"),
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
    same.dataset.inputs_n[same.shards[0][0]] ^= 1
    assert fingerprint(job, 0) != fingerprint(same, 0)


@pytest.mark.parametrize(
    ("client", "path", "let_in"),
    [
        ("192.0.2.7", "/v1/fleet/pull-messages", True),
        ("192.0.2.7", "/v1/control/start-run", False),
        ("192.0.2.7", "/v1/control/register-node", False),
        ("192.0.2.7", "/v1/runtime/get-nodes", False),
        ("192.0.2.7", "/docs", False),
        ("127.0.0.1", "/v1/control/start-run", False),
        ("192.0.2.1", "/v1/control/start-run", True),
        (None, "/v1/control/start-run", False),
    ],
)
def test_the_fence_lets_other_machines_reach_what_nodes_use_only(client, path, let_in):
    """The server is 192.0.2.1."""
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["path"])

    async def send(event):
        seen.append(event.get("status"))

    scope = {"type": "http", "path": path, "server": ("192.0.2.1", 8000), "client": client and (client, 5)}
    asyncio.run(fenced(app)(scope, None, send))
    assert seen == ([path] if let_in else [403, None])


# ---- with Flower's processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def flower():
    """Where flwr is installed: an environment of its own, made if it is not there."""
    if not (ENVIRONMENT / "done").exists():
        subprocess.run(["make", "federated"], cwd=ROOT, check=True, timeout=1200, stdout=subprocess.DEVNULL)
    return ENVIRONMENT / "bin"


def assert_same_model(run, other):
    expected, found = load_file(other / "model.safetensors"), load_file(run / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.deployment
def test_attackers_against_the_servers_own_code(flower):
    """tests/test_federated_nodes.py, where Flower is installed."""
    command = [flower / "python", "-m", "pytest", "tests/test_federated_nodes.py"]
    done = subprocess.run(command, cwd=ROOT, timeout=500, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


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
    assert_same_model(run, here)
    assert read_summary(run)["test_accuracy"] == pytest.approx(read_summary(here)["test_accuracy"], abs=3e-3)
    keys = ("round", "messages", "bytes", "virtual_seconds")
    assert [[m[k] for k in keys] for m in read_metrics(run)] == [[m[k] for k in keys] for m in read_metrics(here)]
    rest = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in rest  # keys, logs: every process of a secure run names the folder


def make_keys(folder):
    command = [ROOT / "federated" / "certificates.sh", folder, HOST, "2"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.deployment
def test_a_node_with_a_wrong_key_or_certificate_is_refused(flower, tmp_path):
    """A right node stays; one whose key is not registered, one without a key, one without TLS, and one
    that trusts another authority (so cannot tell who the server is) are turned away."""
    keys, others = make_keys(tmp_path / "keys"), make_keys(tmp_path / "others")
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


@pytest.mark.deployment
def test_who_registers_a_key_of_his_own_does_not_become_a_worker(flower, tmp_path):
    """A stranger's registered node is online as worker 1: without the true node 1 the run ends with a line that
    says so, with it the run is the in-process run."""
    keys, others = make_keys(tmp_path / "keys"), make_keys(tmp_path / "others")
    flags = f"{FLAGS} --num_workers 2 --results_dir {tmp_path}"
    with Loopback(tmp_path / "flower", keys, flower) as federation:
        for key in (keys / "node-0", keys / "node-1", others / "node-1"):
            federation.register(key)
        federation.start_node(0, 2)
        stranger = federation.start_node(1, 2, name="stranger", key=others / "node-1")
        with pytest.raises(UsageError, match="no node came as worker 1 within 40 s .1 with keys that are not in the"):
            federation.run(f"{flags} --run_name without", timeout=300, nodes_seconds=40)
        federation.start_node(1, 2)
        federation.run(f"{flags} --run_name beside", timeout=300)
        assert stranger.poll() is None
        ignored = [line for line in federation.log("run") if line.startswith("ignored: ")]
        assert len(ignored) == 1 and "whose key is not in the allow-list" in ignored[0]
        got = {name: any(" message (ID" in line for line in federation.log(name)) for name in ("node-1", "stranger")}
        assert got == {"node-1": True, "stranger": False}
    train_run(configuration(f"{flags} --run_name here"), tmp_path / "here")
    assert_same_model(tmp_path / "beside" / "stage1", tmp_path / "here")


@pytest.mark.deployment
def test_other_machines_cannot_register_nodes_or_start_runs(flower, tmp_path):
    """127.0.0.2 stands for another machine: its connections do not come from the server's address."""
    keys = make_keys(tmp_path / "keys")
    trust = ssl.create_default_context(cafile=keys / "ca.crt")

    def status(path, source):
        connection = http.client.HTTPSConnection(HOST, federation.port, context=trust, source_address=(source, 0))
        connection.request("POST", path, headers={"X-Forwarded-For": HOST})
        return connection.getresponse().status

    with Loopback(tmp_path / "flower", keys, flower) as federation:
        for path in ("/v1/control/register-node", "/v1/control/start-run", "/v1/runtime/push-messages", "/docs"):
            assert status(path, "127.0.0.2") == 403
            assert status(path, HOST) not in (403, 404)
        assert status("/v1/fleet/register-node", "127.0.0.2") not in (200, 403, 404)  # Flower's own refusal
