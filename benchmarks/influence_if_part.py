"""What method ``if`` saves: pyDVL on features that are computed once, against pyDVL on the frozen network.

Legend: n training samples, v validation samples, B batch, F features, P parameters of the head.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from networks import features, head, load_model
from utils.influence.last_layer import DAMPING, last_layer_influence

CLASSES, SHAPE = 10, (3, 32, 32)
Data = tuple[Tensor, Tensor]  # images, labels


def batches(data: Data, batch_size: int) -> list[Data]:
    """Views of the data, ``batch_size`` samples each."""
    return list(zip(*(part.split(batch_size) for part in data), strict=True))


def features_of(model: nn.Module, data: Data, batch_size: int) -> Tensor:
    """The head's inputs [n, F], in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([features(model, images) for images, _ in batches(data, batch_size)])


class FrozenNetwork:
    """The slow way: pyDVL's EKFAC on the whole network, all of it frozen but the head.

    In the default dtype, as pyDVL must. Float32 costs it digits: its scores for ResNet18 had a rank
    correlation with those in float64 of 0.9998 at the default regularization and of 0.985 at a thousandth of
    the mean eigenvalue.
    """

    def __init__(self, model: nn.Module, train: Data, val: Data, batch_size: int) -> None:
        from pydvl.influence.torch import EkfacInfluence

        model.eval().requires_grad_(False)
        head(model).requires_grad_(True)
        self.n, self.v = len(train[1]), len(val[1])
        self.train, self.val = batches(train, batch_size), batches(val, batch_size)
        self.ekfac = EkfacInfluence(model, update_diagonal=True).fit(self.train)
        ((_, (_, _, _, diagonal)),) = self.ekfac.ekfac_representation
        self.ekfac.hessian_regularization = DAMPING * diagonal.mean().item()

    def averaged(self) -> Tensor:
        """Scores [n] with validation averaged into one factor, which pyDVL offers the parts for."""
        factor_1P = sum(self.ekfac.influence_factors(*batch).sum(0, keepdim=True) for batch in self.val)
        factor_1P /= self.v
        rows = [self.ekfac.influences_from_factors(factor_1P, *batch) for batch in self.train]
        return torch.cat(rows, 1)[0] / self.n

    def columns(self) -> Iterator[Tensor]:
        """For each validation batch its influences [B, n]: pyDVL's sequential calculator."""
        from pydvl.influence import SequentialInfluenceCalculator

        for batch in self.val:
            blocks = SequentialInfluenceCalculator(self.ekfac).influences([batch], self.train)
            yield torch.cat([block for row in blocks.generator_factory() for block in row], 1)


def compare_if(
    model_name: str = "resnet18", n: int = 512, v: int = 256, *, batch_size: int = 32, repeats: int = 1
) -> dict[str, float]:
    """Times ``if`` for ``n`` training and ``v`` validation images of 3 x 32 x 32, the network on both sides
    in NCHW and float32, in batches of ``batch_size``, with the threads that torch is set to.

    Returns, in seconds (medians of ``repeats`` interleaved runs):

    - ``features``: one forward pass over both sets (n + v images), then :func:`last_layer_influence`;
      ``features_pydvl``: the latter alone;
    - ``frozen``: ``SequentialInfluenceCalculator.influences`` on the frozen network, as pyDVL documents it.
      Every validation batch passes the training set through the network again, and itself beside every
      training batch: 2 n (1 + v / B) images. One validation batch is timed and counted for all;
    - ``frozen_averaged``: the least that the frozen network can cost, with one averaged validation factor:
      3 n + v images, hence at most 3 times ``features``;

    the ratios ``speedup`` and ``speedup_averaged`` of these two to ``features``, and ``spearman``: the rank
    correlation of the scores of the two sides.
    """
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # pyDVL's, of every batch
    model, train, val = _task(model_name, n, v, batch_size)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def both_features() -> list[Tensor]:
        return [features_of(model, data, batch_size) for data in (train, val)]

    def influence(train_nF: Tensor, val_vF: Tensor) -> Tensor:
        return last_layer_influence(head(model), train_nF, train[1], val_vF, val[1])

    def first_column(frozen: FrozenNetwork) -> Tensor:
        return next(frozen.columns())

    F = head(model).in_features  # warm up: the first run pays for memory and imports
    influence(torch.randn(n, F), torch.randn(v, F))
    for _ in range(repeats):
        scores_n = timed("features_pydvl", influence, *timed("pass", both_features))
        frozen = timed("fit", FrozenNetwork, model, train, val, batch_size)
        frozen_n = timed("averaged", frozen.averaged)
        timed("column", first_column, frozen)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "features": median["pass"] + median["features_pydvl"],
        "features_pydvl": median["features_pydvl"],
        "frozen": median["fit"] + median["column"] * v / min(batch_size, v),
        "frozen_averaged": median["fit"] + median["averaged"],
    }
    result["speedup"] = result["frozen"] / result["features"]
    result["speedup_averaged"] = result["frozen_averaged"] / result["features"]
    result["spearman"] = float(spearmanr(scores_n, frozen_n).statistic)
    return result


def _task(model_name: str, n: int, v: int, batch_size: int) -> tuple[nn.Module, Data, Data]:
    """A network with a trained head (pyDVL's Fisher vanishes on an untrained one) on noisy class patterns."""
    generator = torch.Generator().manual_seed(0)
    model = load_model(model_name, CLASSES, SHAPE, seed=0).eval()
    labels = torch.randint(0, CLASSES, (n + v,), generator=generator)
    patterns = torch.randn(CLASSES, *SHAPE, generator=generator)
    images = patterns[labels] + 2 * torch.randn(n + v, *SHAPE, generator=generator)
    train, val = (images[:n], labels[:n]), (images[n:], labels[n:])
    fit_head(model, train, batch_size)
    return model, train, val


def fit_head(model: nn.Module, data: Data, batch_size: int, weight_decay: float = 1e-3) -> None:
    """Train the head alone to the optimum of cross entropy and weight decay."""
    inputs_nF, layer = features_of(model, data, batch_size), head(model)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        decay = sum(parameter.square().sum() for parameter in layer.parameters())
        value = nn.functional.cross_entropy(layer(inputs_nF), data[1]) + weight_decay / 2 * decay
        value.backward()
        return value

    optimizer.step(loss)
