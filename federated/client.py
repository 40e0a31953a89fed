"""The Flower ClientApp: one node is one worker of the fleet, the one its ``partition-id`` says.

Flower starts a process for each message, so nothing is kept here between two of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federated.identity import Question, introduction, read_private_key, sign, training
from federated.rounds import check_worker, client_round, configuration, execution, fingerprint
from training.build import Job, build

app = ClientApp()


def prepare(context: Context) -> tuple[Job, int]:
    """The job that the run's flags describe, and this node's worker."""
    config = configuration(str(context.run_config["flags"]), str(context.node_config.get("flags", "")))
    worker = check_worker(config, context.node_config)
    job = build(config, execution(config))
    torch.set_num_threads(config.threads or 1)  # a single model: threads can only go inside its operators
    return job, worker


def question_of(message: Message, context: Context) -> Question:
    """What this message asks, as this node knows it: run and node are not taken from the message."""
    return Question(context.run_id, context.node_id, str(message.content.config_records["question"]["challenge"]))


def proof(context: Context, statement: dict[str, Any]) -> ConfigRecord:
    """The statement, signed with this node's key where it has one."""
    file = str(context.node_config.get("key", ""))
    return ConfigRecord({"signature": sign(read_private_key(Path(file)), statement) if file else b""})


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Who this node is, and what data it has."""
    job, worker = prepare(context)
    answer = {"worker": worker, "fingerprint": fingerprint(job, worker)}
    signed = proof(context, introduction(question_of(message, context), **answer))
    return Message(RecordDict({"node": ConfigRecord(answer), "proof": signed}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """This node's part of one round."""
    job, worker = prepare(context)
    arrays = {name: array.numpy() for name, array in message.content.array_records["model"].items()}
    r = int(message.content.config_records["round"]["r"])
    reply = client_round(job, worker, r, arrays)
    content = {
        "model": ArrayRecord({name: Array(array) for name, array in reply.arrays.items()}),
        "result": MetricRecord({"loss": reply.loss}),
        "proof": proof(context, training(question_of(message, context), worker, r, arrays, reply)),
    }
    return Message(RecordDict(content), reply_to=message)
