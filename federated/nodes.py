"""The Flower nodes of a run: found, asked who they are, and asked to train.

With an allow-list, only a node that proves to have a worker's key becomes that worker, and only what this key
signed is taken from it. Anybody else who is online is ignored, and can neither stop the run nor make it wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from federated.identity import PublicKey, Question, introduction, is_signed, training
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
    Raises :class:`UsageError` where nodes stay away for ``patience`` seconds, two are the same worker, or
    one has other data; without keys, also where one fails.
    """

    def __init__(
        self, grid: Grid, job: Job, run: int, keys: list[PublicKey] | None, patience: float, reply_seconds: float
    ):
        self.grid, self.job, self.run, self.keys = grid, job, run, keys
        self.reply_seconds = reply_seconds
        self.node_of: dict[int, int] = {}
        self.ignored: list[str] = []
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
            present = set(self.grid.get_node_ids())
            asked |= self._ask(sorted(present - known), MessageType.QUERY, {})
            known = present  # so a node that left and came back is asked again
            for question, message in self._answers(asked):
                self._admit(question, message)
            missing = [worker for worker in range(self.job.config.num_workers) if worker not in self.node_of]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise UsageError(self._absent(missing[0], patience))
            time.sleep(POLL_SECONDS)

    def _absent(self, worker: int, patience: float) -> str:
        key = f" and the key of node-{worker}.pub" if self.keys else ""
        ignored = f" Ignored: {'; '.join(self.ignored[:3])}." if self.ignored else ""
        return (
            f"no node came as worker {worker} within {patience:.0f} s: start one with partition-id={worker}{key} in "
            f"its --node-config (or give more time with nodes-seconds in the run config), then run again.{ignored}"
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

    def _answers(self, asked: Asked) -> Iterator[tuple[Question, Message | None]]:
        """The answers that have come, and what they answer, which is then no longer ``asked``. None stands
        for one that Flower cannot decode."""
        for id in list(asked):
            try:
                messages = list(self.grid.pull_messages([id]))
            except Exception:  # whatever a stranger made of it: it must not stop the run
                messages = [None]
            if messages:
                yield asked.pop(id), messages[0]

    def _admit(self, question: Question, message: Message | None) -> None:
        """Make a node the worker that it proves to be; ignore it where it does not."""
        try:
            worker, found = self._introduction(question, message)
        except UsageError as error:
            if self.keys is None:
                raise UsageError(f"{error}: see its log, {AGAIN}.") from None
            self.ignored.append(str(error))
            print(f"ignored: {error}")
            return
        if worker in self.node_of:
            raise UsageError(f"two nodes are worker {worker}: give each a partition-id of its own.")
        if found != fingerprint(self.job, worker):
            raise UsageError(
                f"the node of worker {worker} has other data than the server's copy of its "
                "shard: use the same code and data set everywhere."
            )
        self.node_of[worker] = question.node

    def _introduction(self, question: Question, message: Message | None) -> tuple[int, str]:
        """The worker and the data of a node, proved where there are keys. Raises :class:`UsageError`."""
        name = f"node {question.node}"
        content = _content(name, message)
        try:
            answer, signature = content.config_records["node"], content.config_records["proof"]["signature"]
            worker, found = answer["worker"], answer["fingerprint"]
        except KeyError:
            raise UsageError(f"{name} sent no introduction: use the same code everywhere") from None
        if type(worker) is not int or not 0 <= worker < self.job.config.num_workers:
            raise UsageError(f"{name} says that it is worker {_plain(worker)}, which there is not")
        if self.keys:
            self._check(worker, introduction(question, worker, str(found)), signature, f"{name}, as worker {worker},")
        return worker, str(found)

    def _reply(self, worker: int, question: Question, r: int, asked: Arrays, message: Message | None) -> Reply:
        """What a node sent back, proved where there are keys. Raises :class:`UsageError`."""
        name = f"the node of worker {worker}"
        try:
            content = _content(name, message)
            reply = Reply(
                {key: array.numpy() for key, array in content.array_records["model"].items()},
                float(content.metric_records["result"]["loss"]),
            )
            if self.keys:
                signature = content.config_records["proof"]["signature"]
                self._check(worker, training(question, worker, r, asked, reply), signature, name)
        except UsageError as error:
            raise UsageError(f"{error}: see its log, {AGAIN}.") from None
        except (KeyError, TypeError, ValueError, RuntimeError):  # missing, or arrays that are none
            raise UsageError(f"{name} sent no proper reply: use the same code everywhere, {AGAIN}.") from None
        return reply

    def _check(self, worker: int, statement: dict, signature: object, name: str) -> None:
        """Raise :class:`UsageError` unless the worker's key signed the statement."""
        if not signature:
            raise UsageError(f'{name} signs nothing (its --node-config needs key="...")')
        if not isinstance(signature, bytes) or not is_signed(self.keys[worker], statement, signature):
            raise UsageError(f"{name} does not sign with the key of node-{worker}.pub")


def _content(name: str, message: Message | None) -> RecordDict:
    """The content of an answer. Raises :class:`UsageError` where it has none."""
    if message is None:
        raise UsageError(f"{name} sent what cannot be read")
    if message.has_error():
        raise UsageError(f"{name} failed ({_plain(message.error.reason or 'no reason given')})")
    return message.content


def _plain(text: object) -> str:
    """Foreign text as a part of one line, so that it cannot pass for a line of the server's."""
    printable = "".join(c if c.isprintable() else " " for c in str(text)[:REASON_LENGTH])
    return " ".join(printable.split())
