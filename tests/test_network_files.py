"""Networks as files: trained ones come back, pretrained ones are found; nothing is unpickled."""

import json
import re
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from networks import (
    PRETRAINED,
    load_model,
    load_trained,
    model_metadata,
    save_model,
)
from tests.test_networks import states_equal
from utils.errors import UsageError
from utils.torchvision_shim import torchvision

# Trained networks as files -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A network with lived-in BatchNorm statistics, and its file."""
    model = load_model("shufflenet", 5, (3, 16, 16), seed=0)
    model(torch.rand(4, 3, 16, 16))
    path = tmp_path / "stage1" / "model.safetensors"
    save_model(model.state_dict(), path, model_metadata("shufflenet", 5, (3, 16, 16), seed=7))
    return model.eval(), path


def test_save_and_load_round_trip(saved):
    model, path = saved
    images = torch.rand(3, 3, 16, 16)
    before = torch.get_rng_state()
    for loaded in (load_trained(path), load_model(path), load_model(str(path), 5, [3, 16, 16])):
        assert not loaded.training and states_equal(model, loaded)
        with torch.no_grad():
            assert torch.equal(model(images), loaded(images))
    assert torch.equal(torch.get_rng_state(), before)
    with safetensors.safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["network"])
    assert len(said.pop("digest")) == 64
    assert said == {"model": "shufflenet", "num_outputs": 5, "input_shape": [3, 16, 16], "seed": 7}
    again = path.with_name("again.safetensors")
    save_model(dict(reversed(model.state_dict().items())), again, dict(reversed(said.items())))
    assert again.read_bytes() == path.read_bytes()
    again.unlink()
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_a_state_of_views_without_counters_in_channels_last_can_be_saved(saved):
    """As the fleet holds it: float tensors that are views into one row, integer counters elsewhere."""
    model, path = saved
    state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    row = torch.cat([value.permute(0, 2, 3, 1).reshape(-1) if value.dim() == 4 else value.reshape(-1)
                     for value in state.values()])  # fmt: skip
    views, start = {}, 0
    for key, value in state.items():
        part, start = row[start : start + value.numel()], start + value.numel()
        if value.dim() == 4:
            o, i, h, w = value.shape
            views[key] = part.view(o, h, w, i).permute(0, 3, 1, 2)
        else:
            views[key] = part.view(value.shape)
    save_model(views, path, model_metadata("shufflenet", 5, (3, 16, 16)))
    loaded = load_model(path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.slow
def test_files_that_do_not_fit_are_refused_in_one_line(saved, tmp_path):
    model, path = saved
    good = path.read_bytes()
    state, right = model.state_dict(), model_metadata("shufflenet", 5, (3, 16, 16))

    def message(file, *args):
        with pytest.raises(UsageError) as caught:
            load_model(file, *args)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
        return str(caught.value)

    assert "no model file" in message(tmp_path / "missing.safetensors")
    for place in range(9, len(good), len(good) // 50):  # one bit, of the header or of a weight
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        message(path)
    path.write_bytes(good)
    assert "5 outputs" in message(path, 6)
    assert "--image_size 16" in message(path, 5, (3, 32, 32))
    for cut in (0, 4, 100, len(good) - 1):
        path.write_bytes(good[:cut])
        assert "damaged" in message(path)
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    assert "damaged" in message(path)
    odd = [json.dumps(right | part) for part in ({"num_outputs": "five"}, {"input_shape": 3})]
    for said in (None, "", "[", "[]", "{}", *odd):
        safetensors.torch.save_file(state, path, metadata=said if said is None else {"network": said})
        assert "which network" in message(path)
    for metadata in (right | {"num_outputs": 6}, right | {"model": "cnn"}):
        save_model(state, path, metadata)
        assert "does not fit" in message(path)
    save_model({key: value for key, value in state.items() if key != "fc.bias"}, path, right)
    assert "does not fit" in message(path)
    save_model(state, path, right | {"model": "shuflenet"})
    with pytest.raises(UsageError, match="Did you mean 'shufflenet'"):
        load_trained(path)
    with pytest.raises(ValueError, match="model_metadata"):
        save_model(state, path, {"model": "shufflenet"})


# Pretrained weights ------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of weights, and no network."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def _weights_file(hub: Path, name: str) -> Path:
    url = torchvision.models.get_model_weights(PRETRAINED[name]).DEFAULT.url
    return hub / url.rpartition("/")[2]


@pytest.mark.parametrize(
    ("name", "shape", "fresh"),
    [
        ("squeezenet", (3, 32, 32), {"classifier.2"}),
        ("shufflenet", (3, 32, 32), {"fc"}),
        ("shufflenet", (1, 32, 32), {"fc", "conv1.0"}),
        ("resnet18", (3, 32, 32), {"fc", "conv1"}),
        ("resnet18", (3, 96, 96), {"fc"}),
    ],
)
def test_pretrained_loads_all_but_the_head_and_an_unlike_stem(hub, name, shape, fresh):
    published = torchvision.models.get_model(PRETRAINED[name]).state_dict()
    torch.save({key: torch.full_like(value, 2) for key, value in published.items()}, _weights_file(hub, name))
    model = load_model(name, 1000, shape, pretrained=True, seed=0)  # as many classes as ImageNet has
    plain = load_model(name, 1000, shape, seed=0)
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] in fresh:
            assert torch.equal(value, plain.state_dict()[key]), key
        else:
            assert (value == 2).all(), key


@pytest.mark.parametrize(("shape", "fresh"), [((1, 32, 32), {"classifier", "features.conv0"}),
                                              ((3, 96, 96), {"classifier"})])  # fmt: skip
def test_pretrained_densenet_knows_the_old_names_in_torchvisions_file(hub, shape, fresh):
    """The published file says 'denselayer1.norm.1.weight' and has no counters; modules say 'denselayer1.norm1'."""
    published = torchvision.models.densenet121().state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): torch.full_like(value, 2)
        for key, value in published.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.running_mean" in old and not set(old) <= set(published)
    torch.save(old, _weights_file(hub, "densenet121"))
    model = load_model("densenet121", 1000, shape, pretrained=True, seed=0)
    plain = load_model("densenet121", 1000, shape, seed=0).state_dict()
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] in fresh or key.endswith("num_batches_tracked"):
            assert torch.equal(value, plain[key]), key
        else:
            assert (value == 2).all(), key
    odd = {key.replace("norm.1", "norm.3"): value for key, value in old.items()}
    torch.save(odd, _weights_file(hub, "densenet121"))
    with pytest.raises(UsageError, match="does not hold weights of densenet121"):
        load_model("densenet121", 1000, shape, pretrained=True)


def test_pretrained_weights_that_cannot_be_had(hub):
    file = _weights_file(hub, "squeezenet")

    def message():
        with pytest.raises(UsageError) as caught:
            load_model("squeezenet", 10, (3, 32, 32), pretrained=True)
        assert str(file) in str(caught.value) or (file.name in str(caught.value) and str(hub) in str(caught.value))
        return str(caught.value)

    assert "place squeezenet1_1" in message()
    file.write_bytes(b"half a download")
    assert "delete the file" in message()
    torch.save(torchvision.models.shufflenet_v2_x1_0().state_dict(), file)
    assert "does not hold weights of squeezenet1_1" in message()
    for name in ("cnn", "mlp"):
        with pytest.raises(UsageError, match=f"no pretrained weights for '{name}'"):
            load_model(name, 10, (3, 32, 32), pretrained=True)


class _Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_weights_file_is_never_unpickled(hub):
    torch.save({"fc.weight": _Bomb(hub / "boom")}, _weights_file(hub, "resnet18"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_model("resnet18", 10, (3, 32, 32), pretrained=True)
    assert not (hub / "boom").exists()
