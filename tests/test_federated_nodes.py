"""Who may be a worker of a deployment: keys and signatures, and the server's part with attackers online.

Flower's processes are not started: nodes are functions that answer the server's messages, the true ones by
the client's own code. Needs requirements-federated.txt; 'make test-federated' runs this file there.
"""

import secrets
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr")

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from federated import client, nodes
from federated.identity import Question, introduction, is_signed, read_allow_list, read_private_key, sign, training
from federated.nodes import Nodes
from federated.rounds import Reply, client_round, configuration, execution, write_row
from federated.server import allow_list
from training.build import build
from utils.errors import UsageError

RUN = 7
FLAGS = "--model mlp --epochs 2 --num_workers 2"


def write_key(file, key=None):
    """An OpenSSH key pair, as ssh-keygen writes it."""
    key = key or ec.generate_private_key(ec.SECP384R1())
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    file.with_suffix(".pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return file


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder with the keys of workers 0 and 1, and a stranger's."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("node-0", "node-1", "stranger"):
        write_key(folder / name)
    return folder


@pytest.fixture(scope="module")
def job():
    config = configuration(FLAGS)
    return build(config, execution(config))


# ---- signatures -----------------------------------------------------------------------------------


def test_only_the_whole_statement_verifies(keys):
    """Nothing of it can be swapped: not the challenge, the round, the worker, an array's bit or the loss."""
    arrays = {"weight": np.arange(4, dtype=np.float32)}
    other = {"weight": np.nextafter(arrays["weight"], 9)}
    renamed = {"bias": arrays["weight"]}
    said = (Question(1, 2, "challenge"), 1, 3, arrays, Reply(arrays, 0.5))
    statement = training(*said)
    public, signature = read_allow_list(keys, 2), sign(read_private_key(keys / "node-1"), statement)
    assert is_signed(public[1], statement, signature)
    altered = {
        "run": (Question(9, 2, "challenge"), *said[1:]),
        "node": (Question(1, 9, "challenge"), *said[1:]),
        "challenge": (Question(1, 2, "another"), *said[1:]),
        "worker": (said[0], 0, *said[2:]),
        "round": (*said[:2], 2, *said[3:]),
        "asked": (*said[:3], other, said[4]),
        "arrays": (*said[:4], Reply(other, 0.5)),
        "names": (*said[:4], Reply(renamed, 0.5)),
        "loss": (*said[:4], Reply(arrays, np.nextafter(0.5, 1))),
    }
    for name, values in altered.items():
        assert not is_signed(public[1], training(*values), signature), name
    assert not is_signed(public[1], introduction(said[0], 1, "data"), signature)
    for wrong in (b"", b"nonsense", signature[:-1], sign(read_private_key(keys / "stranger"), statement)):
        assert not is_signed(public[1], statement, wrong)
    assert not is_signed(public[0], statement, signature)


def test_challenges_are_fresh():
    assert len({Question(1, 2).challenge for _ in range(100)}) == 100


def test_bad_allow_lists_are_refused(keys, tmp_path):
    assert len(read_allow_list(keys, 2)) == 2
    with pytest.raises(UsageError, match=r"cannot read the key .*node-2.pub"):
        read_allow_list(keys, 3)
    write_key(tmp_path / "node-0")
    for content, message in (
        ((tmp_path / "node-0.pub").read_bytes(), "workers 0 and 1 share a key"),
        (b"ssh-rsa nonsense", "no OpenSSH public key"),
        (b"", "no OpenSSH public key"),
        ((tmp_path / "node-0").read_bytes(), "no OpenSSH public key"),
    ):
        (tmp_path / "node-1.pub").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_allow_list(tmp_path, 2)
    write_key(tmp_path / "node-1", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(UsageError, match="no elliptic-curve key"):
        read_allow_list(tmp_path, 2)


def test_bad_private_keys_are_refused(tmp_path):
    write_key(tmp_path / "other kind", ed25519.Ed25519PrivateKey.generate())
    (tmp_path / "nonsense").write_text("nonsense")
    for name, message in (
        ("absent", "cannot read"),
        ("other kind", "no elliptic-curve key"),
        ("nonsense", "no OpenSSH private key"),
    ):
        with pytest.raises(UsageError, match=message):
            read_private_key(tmp_path / name)
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", tmp_path / "locked"]
    subprocess.run(command, check=True)
    with pytest.raises(UsageError, match="without a passphrase"):
        read_private_key(tmp_path / "locked")


def test_a_run_without_an_allow_list_warns(capsys):
    assert allow_list("", 2) is None
    assert capsys.readouterr().out.startswith("warning: no node-keys")


# ---- nodes ----------------------------------------------------------------------------------------


@dataclass
class FakeNode:
    """A node that proved to Flower that it has ``key``, and answers messages."""

    key: Path
    answer: Callable[[Message], Message | None]


class FakeGrid:
    """What Nodes uses of Flower's grid. A node's answer may be None: none yet."""

    def __init__(self, nodes):
        self.nodes, self.answers, self.asked = dict(nodes), {}, []

    def get_nodes(self):
        return [NodeInfo(node_id=id, public_key=pem(node.key)) for id, node in self.nodes.items()]

    def push_messages(self, messages):
        ids = [secrets.token_hex(8) for _ in messages]
        for id, message in zip(ids, messages, strict=True):
            message.metadata.__dict__["_message_id"] = id
            self.asked.append(message.metadata.dst_node_id)
            self.answers[id] = self.nodes[message.metadata.dst_node_id].answer(message)
        return ids

    def pull_messages(self, ids):
        return [self.answers[id] for id in ids if self.answers[id] is not None]


def pem(key):
    public = read_private_key(key).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def client_of(id, worker, key=None, flags=FLAGS):
    """The answers of the client's own code."""
    own = {"partition-id": worker} | ({"key": str(key)} if key else {})
    context = Context(RUN, id, own, RecordDict(), {"flags": flags})

    def answer(message):
        handle = client.introduce if message.metadata.message_type == "query" else client.train
        return handle(message, context)

    return answer


def altered(answer, change):
    """Answers that are changed before they are sent."""

    def changed(message):
        reply = answer(message)
        change(reply.content)
        return reply

    return changed


def unsigned(content):
    content.config_records["proof"]["signature"] = b""


def failing(reason):
    return lambda message: Message(Error(1, reason), reply_to=message)


@pytest.fixture(autouse=True)
def server_process(monkeypatch):
    """What Flower sets in the server's process, and no waiting."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
    monkeypatch.setattr(nodes, "POLL_SECONDS", 0.01)


@pytest.fixture
def honest(keys):
    """Nodes 100 and 101 are workers 0 and 1."""
    files = [keys / f"node-{k}" for k in range(2)]
    return {100 + k: FakeNode(file, client_of(100 + k, k, file)) for k, file in enumerate(files)}


def find(job, present, keys=None):
    return Nodes(FakeGrid(present), job, RUN, read_allow_list(keys, 2) if keys else None, 0.3, 0.3)


@pytest.fixture
def strangers(keys):
    """Two registered nodes with a key that is not listed. Whatever they would answer, they must not be asked."""

    def asked(message):
        raise AssertionError("a stranger was asked")

    return {99: FakeNode(keys / "stranger", asked), 200: FakeNode(keys / "stranger", asked)}


def test_strangers_beside_the_true_nodes_are_ignored(job, keys, honest, strangers, capsys):
    found = find(job, strangers | honest, keys)
    assert found.node_of == {0: 100, 1: 101} and set(found.grid.asked) == {100, 101}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"ignored: node {id}, whose key is not in the allow-list" for id in strangers]


def test_strangers_instead_of_a_true_node_end_the_run_with_a_line(job, keys, honest, strangers):
    with pytest.raises(UsageError, match=r"no node came as worker 1 .*2 with keys that are not .* key of node-1.pub"):
        find(job, strangers | {100: honest[100]}, keys)


# What a listed node may do wrong, as node 101, made from the folder of keys; what the server says then.
FAULTS = {
    "another worker's key": (lambda keys: client_of(101, 1, keys / "node-0"), "as worker 1, does not sign with"),
    "another worker's number": (lambda keys: client_of(101, 0, keys / "node-1"), "as worker 0, does not sign with"),
    "no key": (lambda keys: client_of(101, 1), "does not sign with the key of node-1.pub"),
    "no signature": (lambda keys: altered(client_of(101, 1, keys / "node-1"), unsigned), "does not sign with"),
    "an answer to another node": (lambda keys: client_of(55, 1, keys / "node-1"), "does not sign with"),
    "other data": (lambda keys: client_of(101, 1, keys / "node-1", f"{FLAGS} --seed 5"), "has other data"),
    "a worker that there is not": (
        lambda keys: altered(client_of(101, 1), lambda c: c.config_records["node"].update(worker=2)),
        "says that it is worker 2 of 2",
    ),
    "an empty answer": (lambda keys: lambda m: Message(RecordDict(), reply_to=m), "sent no introduction"),
    "an error that forges a line": (lambda keys: failing("oh\nerror: forged"), r"failed \(oh error: forged\)"),
    "no answer": (lambda keys: lambda m: None, "no node came as worker 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_listed_node_that_proves_nothing_ends_the_run_with_a_line(job, keys, honest, name):
    make, message = FAULTS[name]
    honest[101].answer = make(keys)
    with pytest.raises(UsageError, match=message) as error:
        find(job, honest, keys)
    assert "\n" not in str(error.value)


def test_an_introduction_cannot_be_replayed(job, keys, honest):
    """Recorded when node 101 was asked before, it answers another challenge."""
    kept = []
    true = honest[101].answer
    honest[101].answer = lambda message: kept.append(true(message)) or kept[-1]
    find(job, honest, keys)
    honest[101].answer = lambda message: Message(kept[0].content, reply_to=message)
    with pytest.raises(UsageError, match="as worker 1, does not sign with the key of node-1.pub"):
        find(job, honest, keys)


def test_without_an_allow_list_a_node_is_who_it_says(job, honest, strangers):
    unlisted = {99: FakeNode(strangers[99].key, client_of(99, 1)), 100: honest[100]}
    assert find(job, unlisted).node_of == {1: 99, 0: 100}
    with pytest.raises(UsageError, match="two nodes are worker 1"):
        find(job, unlisted | honest)


def test_a_node_that_comes_late_or_comes_back_is_asked(job, keys, honest):
    class Changing(FakeGrid):
        """Node 101 comes, leaves, and comes back; then node 100 comes too."""

        steps = [{101}, set(), {101}, {100, 101}]

        def get_nodes(self):
            step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
            return [node for node in super().get_nodes() if node.node_id in step]

    found = Nodes(Changing(honest), job, RUN, read_allow_list(keys, 2), 5, 5)
    assert found.node_of == {0: 100, 1: 101} and found.grid.asked == [101, 101, 100]


# ---- rounds ---------------------------------------------------------------------------------------


@pytest.fixture
def model(job):
    return write_row(job.engine.layout, job.initial_ND[0])


@pytest.mark.parametrize("listed", [True, False])
def test_honest_replies_are_the_rounds_of_the_clients(job, keys, honest, model, listed):
    replies = find(job, honest, keys if listed else None).exchange(0, [1, 0], model)
    for worker, reply in zip([1, 0], replies, strict=True):
        expected = client_round(job, worker, 0, model)
        assert reply.loss == expected.loss and reply.arrays.keys() == expected.arrays.keys()
        assert all(np.array_equal(reply.arrays[name], expected.arrays[name]) for name in expected.arrays)


def change_an_array(content):
    name, array = next(iter(content.array_records["model"].items()))
    content.array_records["model"][name] = Array(np.nextafter(array.numpy(), 9))


def objects_instead(content):
    content.array_records["model"] = ArrayRecord({"x": Array("float32", (1,), "numpy.ndarray", b"nonsense")})


CHANGES = {
    "an array": (change_an_array, "does not sign with the key of node-1.pub"),
    "the loss": (lambda c: c.metric_records["result"].update(loss=0.0), "does not sign with the key of node-1.pub"),
    "an empty signature": (unsigned, "does not sign"),
    "no signature": (lambda c: c.pop("proof"), "does not sign"),
    "a signature that is text": (lambda c: c.config_records["proof"].update(signature="x"), "does not sign"),
    "no arrays": (lambda c: c.pop("model"), "sent no proper reply"),
    "arrays that are none": (objects_instead, "sent no proper reply"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_altered_reply_is_refused(job, keys, honest, model, name):
    change, message = CHANGES[name]
    found = find(job, honest, keys)
    honest[101].answer = altered(honest[101].answer, change)
    with pytest.raises(UsageError, match=f"the node of worker 1 {message}.*run again"):
        found.exchange(0, [0, 1], model)


def test_a_reply_of_another_round_model_or_node_is_refused(job, keys, honest, model):
    """Everything here was signed by a listed key, for something else."""
    found = find(job, honest, keys)
    true, kept = honest[101].answer, []
    honest[101].answer = lambda message: kept.append(true(message)) or kept[-1]
    found.exchange(0, [0, 1], model)

    def replay(message):
        return Message(kept[0].content, reply_to=message)

    for r, answer in ((1, replay), (0, replay), (0, client_of(101, 1, keys / "node-0")), (0, honest[100].answer)):
        honest[101].answer = answer
        with pytest.raises(UsageError, match="the node of worker 1 does not sign with the key of node-1.pub"):
            found.exchange(r, [0, 1], model)


def test_a_message_that_answers_nothing_is_dropped(job, keys, honest, model):
    """Flower hands over what nodes send in the server's name: to nobody's question, or to an old one."""
    found = find(job, honest, keys)
    true, old = found.grid.pull_messages, list(found.grid.answers)
    found.grid.pull_messages = lambda ids: true(old) + true(ids)
    assert len(found.exchange(0, [0, 1], model)) == 2


def test_a_node_that_fails_leaves_or_is_silent_ends_the_round_with_a_line(job, keys, honest, model):
    found = find(job, honest, keys)
    honest[101].answer = failing("out of memory")
    with pytest.raises(UsageError, match=r"worker 1 failed \(out of memory\): see its log, then run again"):
        found.exchange(0, [0, 1], model)
    honest[101].answer = lambda m: None
    with pytest.raises(UsageError, match="worker 1 did not reply within 0 s"):
        found.exchange(0, [0, 1], model)
    found.grid.push_messages = lambda messages: ["id", None]
    with pytest.raises(UsageError, match="worker 1 has left"):
        found.exchange(0, [0, 1], model)
