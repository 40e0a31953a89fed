"""What the GPU path costs, on the stand-in accelerator: how often the host waits for the device, and how many
kernels it launches. The figures are those of the code as it is: lower them with the code, never raise them.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.device_runs import a_job, assert_within, measure
from tests.own_process import in_own_process
from tests.runs import recorded
from tests.stand_in import Log, stand_in
from training import checkpoint
from training.build import Job
from training.protocols import load_protocol
from training.trainer import Trainer
from utils.influence import Options, score
from workers.distributed import ShardedFleet
from workers.robust import ATTACKS, sent_rows
from workers.step_graph import GRAPHED_ROWS

# (network, engine, workers): (synchronizations, launches) at most, where a replayed graph is one launch, once graphs
# are recorded. step: Fleet.step; gossip: Fleet.mix on a ring; round: a local step, gossip, and the loss that the
# trainer logs; evaluation: the trainer's line of metrics, 128 and a few validation samples.
# A round waits once, for the losses of the round before it. What an evaluation launches still grows with the workers
# (a forward pass each, their sum, their distances): it happens once an epoch.
BUDGETS: dict[tuple[str, str, int], dict[str, tuple[int, int]]] = {
    ("mlp", "vmap", 8): {"step": (0, 40), "gossip": (0, 1), "round": (1, 47), "evaluation": (2, 100)},
    ("mlp", "vmap", 520): {"step": (0, 40), "gossip": (0, 48), "round": (1, 94), "evaluation": (2, 2660)},
    ("mlp", "graph", 8): {"step": (0, 14), "gossip": (0, 1), "round": (1, 21), "evaluation": (2, 203)},
    ("cnn", "graph", 8): {"step": (0, 14), "gossip": (0, 1), "round": (1, 21), "evaluation": (2, 257)},
    ("mlp", "graph", 520): {"step": (0, 16), "gossip": (0, 48), "round": (1, 70), "evaluation": (2, 11000)},
    ("cnn", "graph", 520): {"step": (0, 16), "gossip": (0, 48), "round": (1, 70), "evaluation": (2, 15000)},
}
# A step of 8 MLPs under other settings. A part of the workers is not recorded: it takes its turns.
STEP_BUDGETS: dict[str, tuple[dict, tuple[int, int]]] = {
    "augmented": (dict(engine="graph", augment="crop_flip"), (0, 45)),
    "weighted": (dict(engine="graph", weighted=True), (0, 14)),
    "ragged": (dict(engine="graph", batch_size=64), (0, 17)),
    "half of the workers": (dict(engine="graph", workers=[0, 1, 2, 3]), (0, 113)),
    "two threads": (dict(engine="vmap", threads=2), (0, 40)),
    "16 threads": (dict(engine="vmap", threads=16), (0, 40)),
}
# Scoring a run of 8 workers and 4 steps, the replay of its states included (2 scored steps, 2 checkpoints). cascade
# waits once, for its scores, dice and delete at every scored step, if in its eigendecompositions. Cascade's steps are
# recorded, as training's are.
SCORE_BUDGETS: dict[tuple[str, str], tuple[int, int]] = {
    ("mlp_smooth", "cascade"): (1, 558),
    ("mlp_smooth", "dice"): (2, 440),
    ("mlp_smooth", "delete"): (4, 295),
    ("cnn_smooth", "cascade"): (1, 536),
    ("cnn_smooth", "dice"): (2, 2380),
    ("cnn_smooth", "delete"): (4, 955),
    ("cnn_smooth", "if"): (18, 191),
}
FAST_SCORES = {case for case in SCORE_BUDGETS if case[0] == "mlp_smooth"} | {("cnn_smooth", "cascade")}
# Gossip of so many workers: one product up to 256 of them, whatever the topology.
GOSSIP_BUDGETS: dict[tuple[str, int], tuple[int, int]] = {
    ("ring", 520): (0, 48),
    ("exponential_one_peer", 8): (0, 1),
    ("exponential", 8): (0, 1),
    ("star", 8): (0, 1),
    ("all", 8): (0, 1),
    ("all", 64): (0, 1),
}
# Gossip of 8 workers that all hear each other, one of them bad, under a rule: one look at who sent what is not
# finite; clipped looks at every receiver's distances.
RULE_BUDGETS: dict[str, tuple[int, int]] = {
    "mean": (0, 65),
    "median": (1, 154),
    "trimmed_mean": (1, 154),
    "clipped": (9, 178),
}


def parts_of(log: Log, job: Job, folder) -> dict[str, tuple[tuple[int, int], str]]:
    """The figures of each part of a training whose graphs are recorded."""
    trainer = Trainer(job, folder)
    trainer.stopping.update, trainer.observers = lambda loss: False, []
    fleet, protocol = trainer.fleet, load_protocol(job.config.protocol)
    rounds = protocol.run(fleet, job)
    for _ in range(2):  # gossip takes turns between two matrices, each with its graph
        trainer._late.put(next(rounds))
    trainer.done = 2
    steps_N = torch.full((fleet.num_workers,), 2)
    return {
        "round": measure(log, lambda: trainer._late.put(next(rounds))),
        "gossip": measure(log, lambda: fleet.mix(job.topology.mixing(0))),
        "step": measure(log, lambda: fleet.step(steps_N, 0.0625)),
        "evaluation": measure(log, lambda: trainer._evaluate(0.0625)),
    }


def budgeted(workers_key: tuple[str, str, int]):
    """A test's parameters; steps that are not recorded take tens of thousands of launches."""
    slow = workers_key[1] == "graph" and workers_key[2] > GRAPHED_ROWS
    return pytest.param(*workers_key, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.slow
@pytest.mark.parametrize("model,engine,workers", map(budgeted, BUDGETS))
@in_own_process
def test_training_and_evaluation_are_in_the_budget(model, engine, workers, tmp_path):
    size = dict(num_workers=workers, dirichlet=False, batch_size=2, max_train=min(1280, 8 * workers))
    with stand_in() as log:
        figures = parts_of(log, a_job("cuda", model=model, engine=engine, **size, epochs=2), tmp_path)
    assert_within(BUDGETS[model, engine, workers], figures)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEP_BUDGETS)
@in_own_process
def test_steps_under_other_settings_are_in_the_budget(name):
    settings, budget = STEP_BUDGETS[name]
    settings = dict(settings)
    workers, weighted = settings.pop("workers", None), settings.pop("weighted", False)
    with stand_in() as log:
        job = a_job("cuda", model="mlp", num_workers=8, **settings)
        weights_Mn = torch.ones(1, len(job.dataset.targets_n))
        weights_Mn[:, job.train_ids[0]] = 0.5 if weighted else 1.0
        fleet, steps_N = job.make_fleet(weights_Mn), torch.zeros(8, dtype=torch.int64)
        fleet.step(steps_N, 0.0625, workers)
        figure = measure(log, lambda: fleet.step(steps_N, 0.0625, workers))
    assert_within({name: budget}, {name: figure})


SCORED = [case if case in FAST_SCORES else pytest.param(*case, marks=pytest.mark.slow) for case in SCORE_BUDGETS]


@pytest.mark.slow
@pytest.mark.parametrize("model,method", SCORED)
@in_own_process
def test_scores_are_in_the_budget(model, method):
    engine = "vmap" if model == "mlp_smooth" else "graph"
    with stand_in() as log:
        run = recorded(a_job("cuda", model=model, engine=engine, num_workers=8, batch_size=8))
        score("cascade", run, Options())  # records the graphs, and finds out which derivative to trust
        figure = measure(log, lambda: score(method, run, Options(dice_rounds=2, delete_checkpoints=2)))
    assert_within({method: SCORE_BUDGETS[model, method]}, {method: figure})


@pytest.mark.parametrize("mode,workers", GOSSIP_BUDGETS)
@in_own_process
def test_gossip_is_in_the_budget(mode, workers):
    with stand_in() as log:
        job = a_job("cuda", model="mlp", num_workers=workers, mode=mode, dirichlet=False, max_train=None)
        fleet = job.make_fleet()
        fleet.mix(job.topology.mixing(0))  # weights and places are sent once a matrix
        figure = measure(log, lambda: fleet.mix(job.topology.mixing(0)))
        copies = dict(log.copies)
    assert_within({mode: GOSSIP_BUDGETS[mode, workers]}, {mode: figure})
    assert copies == {}, copies


@pytest.mark.parametrize("rule", RULE_BUDGETS)
@in_own_process
def test_robust_gossip_is_in_the_budget(rule):
    with stand_in() as log:
        job = a_job("cuda", model="mlp", num_workers=8, mode="all", aggregation=rule, byzantine="1:sign_flip")
        fleet, matrix = job.make_fleet(), job.topology.mixing(0)
        figure = measure(log, lambda: fleet.mix_robustly(matrix, rule, job.byzantine, 0))
    assert_within({rule: RULE_BUDGETS[rule]}, {rule: figure})


@pytest.mark.parametrize("attack", ATTACKS)
@in_own_process
def test_bad_workers_do_not_wait(attack):
    with stand_in() as log:
        job = a_job("cuda", model="mlp", byzantine=f"1:{attack}")
        fleet = job.make_fleet()
        (waits, _), where = measure(log, lambda: sent_rows(job.byzantine, fleet.rows_RD, 0, 0))
    assert waits == 0, where


@pytest.mark.parametrize("mode", ["ring", "exponential", "star"])
@in_own_process
def test_an_exchange_between_processes_does_not_wait(mode):
    """Half of the workers are another process's; what it sends does not arrive."""
    processes = mock.patch.multiple("workers.distributed", rank=lambda: 0, world=lambda: 2)
    network = mock.patch.multiple("torch.distributed", P2POp=mock.Mock(), batch_isend_irecv=lambda operations: [])
    with stand_in() as log, processes, network:
        job = a_job("cuda", model="mlp", num_workers=16, mode=mode, dirichlet=False)
        fleet = ShardedFleet(job.engine, job.initial_ND, job.samples, job.batches)
        fleet.mix(job.topology.mixing(0))  # places are found once a matrix
        (waits, _), where = measure(log, lambda: fleet.mix(job.topology.mixing(0)))
        assert fleet.crossed_bytes > 0
    assert waits == 0, where


@in_own_process
def test_a_checkpoint_takes_no_memory_of_the_device():
    """Rows have gaps there, and none in a file: whoever closes them there needs room for as many rows again."""
    with stand_in() as log:
        fleet = a_job("cuda", model="cnn", engine="loop").make_fleet()
        (waits, launches), where = measure(log, lambda: checkpoint.snapshot(fleet))
    assert (waits, launches) == (2, 0), where


@pytest.mark.parametrize("engine", ["vmap", pytest.param("graph", marks=pytest.mark.slow)])
@in_own_process
def test_launches_of_step_and_gossip_do_not_depend_on_the_number_of_workers(engine, tmp_path):
    figures = {}
    for workers in (8, 24):
        with stand_in() as log:
            size = dict(num_workers=workers, dirichlet=False, batch_size=2, epochs=2)
            job = a_job("cuda", model="mlp", engine=engine, **size)
            parts = parts_of(log, job, tmp_path / str(workers))
            figures[workers] = {part: parts[part][0] for part in ("step", "gossip", "round")}
    assert figures[8] == figures[24], figures
