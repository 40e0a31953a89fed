"""Everything that the command line can name, and where it is written: a line each, 'module:name'.

Nothing is imported before it is asked for, so that --help knows all names at once. To add something, write it where
its room says how, and add its line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from utils.errors import choose

DATASETS = {  # a reader (path, options) -> Arrays: data/dataset_loader.py
    "digits": "data.sources:digits",
    "svhn": "data.sources:svhn",
    "cifar10": "data.sources:cifar10",
    "cifar100": "data.sources:cifar100",
    "tinyimagenet": "data.picture_folders:tinyimagenet",
    "mnist": "data.sources:mnist",
    "fashionmnist": "data.sources:fashionmnist",
    "kmnist": "data.sources:kmnist",
    "imagefolder": "data.picture_folders:imagefolder",
    "audiofolder": "data.sound:audiofolder",
    "elpv": "data.elpv:elpv",
    "air": "data.series:air",
    "timeseries": "data.series:timeseries",
}

OBSERVERS = {  # a subclass of training.observers.Observer: of a room above training, or what --log names
    "ledger": "ledger.observer:LedgerObserver",
    "tensorboard": "training.logs:TensorBoard",
    "wandb": "training.logs:WeightsAndBiases",
}

PICTURES = {  # what a command of training draws when it has ended; its room is above training
    "run": "visualization.report:draw_run",
    "figures": "visualization.plot_utils:figures_of",
    "grid": "visualization.grid:sum_up",
}

TASKS = {  # a subclass of data.task.Task
    "classification": "data.classification:Classification",
    "multilabel": "data.multilabel:Multilabel",
    "regression": "data.regression:Regression",
}

NETWORKS = {  # (outputs, input shape) -> nn.Module: networks/__init__.py
    "squeezenet": "networks.squeezenet:squeezenet",
    "shufflenet": "networks.shufflenet:shufflenet",
    "resnet18": "networks.resnet:resnet18",
    "resnet34": "networks.resnet:resnet34",
    "resnet50": "networks.resnet:resnet50",
    "densenet121": "networks.densenet:densenet121",
    "cnn": "networks.cnn:cnn",
    "cnn_smooth": "networks.cnn:cnn_smooth",
    "cnn_smooth_group": "networks.cnn:cnn_smooth_group",
    "cnn_smooth_direct": "networks.cnn:cnn_smooth_direct",
    "cnn_smooth_stem": "networks.cnn:cnn_smooth_stem",
    "cnn_group": "networks.cnn:cnn_group",
    "cnn_20_50": "networks.cnn:cnn_20_50",
    "mlp": "networks.mlp:mlp",
    "mlp_smooth": "networks.mlp:mlp_smooth",
    "mlp_deep": "networks.mlp:mlp_deep",
    "lstm": "networks.recurrent:lstm",
    "lstm_mean": "networks.recurrent:lstm_mean",
    "gru": "networks.recurrent:gru",
}

PARTITIONS = {  # (strata, workers, seed, **options) -> shards: utils/partition.py
    "dirichlet": "utils.dirichlet:dirichlet_partition",
    "preference": "utils.partition:class_preference_partition",
    "shards": "utils.partition:label_shards_partition",
    "iid": "utils.partition:iid_partition",
    "sizes": "utils.partition:sizes_partition",
    "natural": "utils.partition:natural_partition",
}

TOPOLOGIES = {  # (num_workers, **options) -> mixing matrices: utils/topologies.py
    "ring": "utils.topologies:ring",
    "all": "utils.topologies:complete",
    "exponential": "utils.topologies:exponential",
    "exponential_one_peer": "utils.topologies:exponential_one_peer",
    "base": "utils.topologies:base",
    "grid": "utils.topologies:grid",
    "torus": "utils.topologies:torus",
    "line": "utils.topologies:line",
    "tree": "utils.topologies:tree",
    "star": "utils.topologies:star",
    "random": "utils.topologies:random",
    "nearest": "utils.topologies:nearest",
    "file": "utils.topologies:from_file",
}

CHAIN_ORDERS = {  # who trains a walking model next: training/protocols/chained.py
    "fixed": "training.protocols.chained:fixed",
    "random": "training.protocols.chained:random",
    "shortest": "training.protocols.chained:shortest",
    "policy": "homogeneous.order:decided",
}

OPTIMIZERS = {  # (**settings) -> Optimizer: workers/optimizers.py
    "sgd": "workers.optimizers:sgd",
    "nesterov": "workers.optimizers:nesterov",
    "adam": "workers.optimizers:adam",
    "adamw": "workers.optimizers:adamw",
}

PROTOCOLS = {  # a subclass of training.protocols.Protocol
    "gossip": "training.protocols.gossip:Gossip",
    "qg": "training.protocols.qg:QuasiGlobalMomentum",
    "d2": "training.protocols.d2:D2",
    "tracking": "training.protocols.tracking:GradientTracking",
    "choco": "training.protocols.choco:Choco",
    "relay": "training.protocols.relay:RelaySGD",
    "pushsum": "training.protocols.pushsum:PushSum",
    "local": "training.protocols.local:Local",
    "diloco": "training.protocols.diloco:DiLoCo",
    "fedavg": "training.protocols.fedavg:FedAvg",
    "fedprox": "training.protocols.fedprox:FedProx",
    "scaffold": "training.protocols.scaffold:Scaffold",
    "fedasync": "training.protocols.fedasync:FedAsync",
    "chained": "training.protocols.chained:Chained",
}

JOBS = {  # (Job, work) -> JSON: training/recipe.py
    "coalitions": "valuation.truth:coalitions",
    "retrainings": "training.retrain:retrainings",
    "smoothness": "training.smoothness:smoothness",
}

VALUATIONS = {  # (Study) -> a value for each institution: valuation/methods.py
    "ddval": "valuation.methods:ddval",
    "knn_game": "valuation.methods:knn_game",
    "heads": "valuation.methods:heads",
    "cascade": "valuation.methods:cascade",
    "delete": "valuation.methods:delete",
    "if": "valuation.methods:influence_functions",
    "leave_one_out": "valuation.methods:leave_one_out",
    "reconstruction": "valuation.methods:reconstruction",
    "equal": "valuation.methods:equal",
    "size": "valuation.methods:size",
}

INFLUENCE = {  # a utils.influence.method.Method; colours of plots and the default of --methods follow this order
    "cascade": "utils.influence.cascade:METHOD",
    "dice": "utils.influence.dice:METHOD",
    "delete": "utils.influence.delete:METHOD",
    "if": "utils.influence.last_layer:METHOD",
    "random": "utils.influence.method:RANDOM",
}


def load(registry: Mapping[str, Any], name: str, kind: str) -> Any:
    """What a registry has under a name. Raises :class:`UsageError` for an unknown one: ``kind`` says of what."""
    place = choose(registry, name, kind)
    if not isinstance(place, str):  # a test's own
        return place
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
