"""The Flower nodes of a run: found, asked who they are, and asked to train.

With an allow-list, only nodes that hold a listed key are sent anything, and only what the worker's key signed
is taken from them. Other nodes that are online are ignored. They do not even learn the run's number, without
which Flower 1.41 takes no message from a node; with it, it takes any, also in the name of the server.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from federated.identity import PublicKey, Question, introduction, is_listed, is_signed, training
from federated.rounds import Arrays, Reply, fingerprint
from training.build import Job
from utils.errors import UsageError

AGAIN = "then run again, with --resume among the flags if a round was done"
POLL_SECONDS = 1.0
REASON_LENGTH = 200

Asked = dict[str, Question]  # by the message's id


class Nodes:
    """The N nodes of a run, by worker: once made, each worker has a node with the right data.

    ``keys``: the public key of each worker. Without them a node is the worker that it says it is.
    Raises :class:`UsageError` where nodes stay away for ``patience`` seconds, two are the same worker, or one
    fails, has other data, or does not sign with its worker's key.
    """

    def __init__(
        self, grid: Grid, job: Job, run: int, keys: list[PublicKey] | None, patience: float, reply_seconds: float
    ):
        self.grid, self.job, self.run, self.keys = grid, job, run, keys
        self.reply_seconds = reply_seconds
        self.node_of: dict[int, int] = {}
        self.strangers: set[int] = set()
        self._gather(patience)

    def exchange(self, r: int, workers: list[int], arrays: Arrays) -> list[Reply]:
        """Send the global model to the nodes of these workers; their replies, in that order."""
        worker_of = {self.node_of[worker]: worker for worker in workers}
        model = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        asked = self._ask(list(worker_of), MessageType.TRAIN, {"model": model, "round": ConfigRecord({"r": r})})
        replies: dict[int, Reply] = {}
        left = set(worker_of) - {question.node for question in asked.values()}
        if left:
            raise UsageError(f"the node of worker {worker_of[left.pop()]} has left: start it, {AGAIN}.")
        deadline = time.monotonic() + self.reply_seconds
        while True:
            for question, message in self._answers(asked):
                worker = worker_of[question.node]
                replies[worker] = self._reply(worker, question, r, arrays, message)
            if len(replies) == len(workers):
                return [replies[worker] for worker in workers]
            if time.monotonic() > deadline:
                late = next(worker for worker in workers if worker not in replies)
                raise UsageError(
                    f"the node of worker {late} did not reply within {self.reply_seconds:.0f} s: see its log, {AGAIN}."
                )
            time.sleep(POLL_SECONDS)

    def _gather(self, patience: float) -> None:
        """Ask every node as it comes who it is, until each worker has one."""
        asked: Asked = {}
        known: set[int] = set()
        deadline = time.monotonic() + patience
        while True:
            present = {node.node_id: node.public_key for node in self.grid.get_nodes()}
            new = [node for node in present if node not in known and self._may_be_asked(node, present[node])]
            asked |= self._ask(new, MessageType.QUERY, {})
            known = set(present)  # so a node that left and came back is asked again
            for question, message in self._answers(asked):
                self._admit(question, message)
            missing = [worker for worker in range(self.job.config.num_workers) if worker not in self.node_of]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise UsageError(self._absent(missing[0], patience))
            time.sleep(POLL_SECONDS)

    def _may_be_asked(self, node: int, key: bytes) -> bool:
        """With an allow-list, whether the key that a node proved to Flower is in it; a stranger is named once."""
        if not self.keys or is_listed(self.keys, key):
            return True
        if node not in self.strangers:
            self.strangers.add(node)
            print(f"ignored: node {node}, whose key is not in the allow-list")
        return False

    def _absent(self, worker: int, patience: float) -> str:
        key = f" and the key of node-{worker}.pub" if self.keys else ""
        strangers = f" ({len(self.strangers)} with keys that are not in the allow-list)" if self.strangers else ""
        return (
            f"no node came as worker {worker} within {patience:.0f} s{strangers}: start one with partition-id={worker}"
            f"{key} in its --node-config, or give more time with nodes-seconds in the run config, then run again."
        )

    def _ask(self, nodes: list[int], kind: str, content: dict) -> Asked:
        """Send each node the same content and a challenge of its own."""
        questions = [Question(self.run, node) for node in nodes]
        messages = [
            Message(
                RecordDict(content | {"question": ConfigRecord({"challenge": question.challenge})}),
                dst_node_id=question.node,
                message_type=kind,
            )
            for question in questions
        ]
        ids = self.grid.push_messages(messages) if messages else []
        return {id: question for id, question in zip(ids, questions, strict=False) if id}  # none for one that left

    def _answers(self, asked: Asked) -> Iterator[tuple[Question, Message]]:
        """The answers that have come, and what they answer, which is then no longer ``asked``."""
        for message in self.grid.pull_messages(list(asked)) if asked else ():
            question = asked.pop(message.metadata.reply_to_message_id, None)
            if question:  # else it answers nothing
                yield question, message

    def _admit(self, question: Question, message: Message) -> None:
        """Make a node the worker that it is."""
        worker, found = self._introduction(question, message)
        if self.node_of.setdefault(worker, question.node) != question.node:
            raise UsageError(f"two nodes are worker {worker}: give each a partition-id of its own.")
        if found != fingerprint(self.job, worker):
            raise UsageError(
                f"the node of worker {worker} has other data than the server's copy of its "
                "shard: use the same code and data set everywhere."
            )

    def _introduction(self, question: Question, message: Message) -> tuple[int, str]:
        """The worker and the data of a node, proved where there are keys."""
        name = f"node {question.node}"
        content = _content(name, message)
        try:
            answer = content.config_records["node"]
            worker, found = int(answer["worker"]), str(answer["fingerprint"])
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{name} sent no introduction: use the same code everywhere, {AGAIN}.") from None
        if not 0 <= worker < self.job.config.num_workers:
            raise UsageError(f"{name} says that it is worker {worker} of {self.job.config.num_workers}: see its log.")
        self._check(f"{name}, as worker {worker},", worker, introduction(question, worker, found), content)
        return worker, found

    def _reply(self, worker: int, question: Question, r: int, asked: Arrays, message: Message) -> Reply:
        """What a node sent back, proved where there are keys."""
        name = f"the node of worker {worker}"
        content = _content(name, message)
        try:
            reply = Reply(
                {key: array.numpy() for key, array in content.array_records["model"].items()},
                float(content.metric_records["result"]["loss"]),
            )
            statement = training(question, worker, r, asked, reply)
        except (KeyError, TypeError, ValueError, RuntimeError):  # missing, or arrays that are none
            raise UsageError(f"{name} sent no proper reply: use the same code everywhere, {AGAIN}.") from None
        self._check(name, worker, statement, content)
        return reply

    def _check(self, name: str, worker: int, statement: dict, content: RecordDict) -> None:
        """Raise :class:`UsageError` unless the worker's key signed the statement, where there are keys."""
        if not self.keys:
            return
        signature = content.config_records.get("proof", {}).get("signature")
        if not isinstance(signature, bytes) or not is_signed(self.keys[worker], statement, signature):
            raise UsageError(
                f"{name} does not sign with the key of node-{worker}.pub: its --node-config needs the partition-id "
                f'and key="..." of one and the same worker; see its log, {AGAIN}.'
            )


def _content(name: str, message: Message) -> RecordDict:
    """The content of an answer. Raises :class:`UsageError` where the node failed."""
    if message.has_error():
        reason = " ".join((message.error.reason or "no reason given").split())[:REASON_LENGTH]
        raise UsageError(f"{name} failed ({reason}): see its log, {AGAIN}.")
    return message.content
