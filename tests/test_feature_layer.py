"""Features of a named layer: the same as the default where it is the same layer; what is no such layer is refused."""

import dataclasses
import json

import pytest
import torch
from command import refused
from medical_files import nih
from test_valuation import SMALL, study_of
from torch import nn

import valuation.features
from data import index, resize
from networks import features, load_model
from training.build import build
from utils.errors import UsageError
from valuation.__main__ import main
from valuation.args import ValuationConfig
from valuation.features import check_layer, features_of
from valuation.methods import ddval


def test_the_layer_before_the_head_is_the_default(monkeypatch):
    study = study_of()  # an mlp: Flatten, Linear, ReLU, head
    ids = study.job.train_ids
    last = features_of(study.model, study.job.samples, ids)
    assert torch.equal(features_of(study.model, study.job.samples, ids, "2"), last) and last.shape == (300, 64)
    other = dataclasses.replace(study, layer="0", samples={})
    pixels_nF = other.features[0][0]
    assert torch.equal(pixels_nF, study.job.samples.plain(ids)[0].flatten(1))
    assert ddval(other).tolist() != ddval(study).tolist()
    monkeypatch.setattr(valuation.features, "PIECE", 7)
    torch.testing.assert_close(features_of(study.model, study.job.samples, ids), last)


def test_densenet_gives_its_unpooled_maps():
    """1,024 maps before the last ReLU, which changes them in place, and the mean over each, which enters the head."""
    model = load_model("densenet121", 3, (3, 32, 32), seed=0).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = features(model, images, "features")
        assert maps.shape == (2, 1024 * 4 * 4) and (maps < 0).any()
        torch.testing.assert_close(maps.view(2, 1024, -1).relu().mean(2), features(model, images))


class Odd(nn.Module):
    """A layer that is not run, one that gives a scalar a sample, one that mixes samples, one that gives a pair, and a
    head."""

    def __init__(self):
        super().__init__()
        self.unused, self.scalar, self.mixed = nn.Linear(2, 2), nn.Flatten(0), nn.Flatten(0)
        self.pair, self.head = nn.LSTM(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(x + self.scalar(x[:, :1])[:, None] + self.mixed(x).view(x.shape) + self.pair(x)[0])


def test_layers_without_features_are_refused():
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(features(Odd(), x, "scalar"), x[:, :1])
    no_rows = "no tensor with a row for each sample"
    for layer, words in (("mixed", no_rows), ("pair", no_rows), ("unused", "is not run")):
        with pytest.raises(UsageError, match=words):
            features(Odd(), x, layer)


def test_close_names_come_first():
    model = load_model("densenet121", 3, (1, 8, 8), seed=0)
    with pytest.raises(UsageError, match=r"there are: features\.denseblock3, .* and \d+ more") as raised:
        features(model, torch.zeros(2, 1, 8, 8), "features.densblock3")
    assert len(str(raised.value)) < 1500


def test_features_that_do_not_fit_are_refused(monkeypatch):
    job = build(ValuationConfig(quiet=True).training())
    check_layer(job, None)
    monkeypatch.setattr(valuation.features, "memory", lambda: 10**5)
    with pytest.raises(UsageError, match="64 features of 1,654 samples"):
        check_layer(job, "2")


def test_the_command_with_a_layer(tmp_path, capsys):
    flags = [*SMALL, "--results_dir", str(tmp_path), "--run_name", "v", "--no-truth", "--valuations", "ddval"]
    assert "there are: 0, 1, 2, 3." in refused(capsys, main([*flags, "--feature_layer", "relu"]))
    assert not (tmp_path / "v" / "valuation").exists()
    assert main([*flags, "--feature_layer", "1"]) == 0
    assert "--feature_layer" in refused(capsys, main([*flags, "--resume"]))


@pytest.mark.slow
def test_the_papers_study_in_small(tmp_path):
    """docs/valuation.md, without ImageNet's weights: a table of chest X-rays, smaller ones, DenseNet's maps."""
    findings = ("Mass", "Nodule", "Mass|Nodule", "No Finding")
    nih(tmp_path / "NIH", [(f"{i:08d}_000.png", findings[i % 4], str(i)) for i in range(96)])
    assert index.main([str(tmp_path / "NIH"), "--labels", "Mass", "Nodule", "--quiet"]) == 0
    assert resize.main([str(tmp_path / "NIH"), str(tmp_path / "small"), "--side", "8", "--quiet"]) == 0
    data = ["--dataset_name", "imagefolder", "--dataset_path", str(tmp_path / "small"), "--image_size", "8"]
    training = ["--model", "densenet121", "--partition", "iid", "--num_workers", "2", "--lr", "0.01", "--epochs", "1"]
    rest = ["--no-truth", "--valuations", "ddval", "--feature_layer", "features", "--quiet", "--no-plots"]
    assert main([*data, *training, *rest, "--results_dir", str(tmp_path), "--run_name", "v"]) == 0
    record = json.loads((tmp_path / "v/valuation/valuation.json").read_text())
    assert record["metric"] == "macro_auroc" and len(record["methods"]["ddval"]["values"]) == 2
