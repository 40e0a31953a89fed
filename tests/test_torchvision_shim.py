"""The shim works (in a fresh interpreter, where no other test has imported torchvision) and hides nothing."""

import builtins
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_models_datasets_and_transforms_work_and_compiled_operators_do_not_pretend():
    code = (
        "import torch\n"
        "from utils.torchvision_shim import torchvision\n"
        "import torchvision as plain\n"
        "assert plain is torchvision\n"
        "x = torch.rand(1, 3, 64, 64)\n"
        "assert torchvision.models.squeezenet1_1(num_classes=7)(x).shape == (1, 7)\n"
        "assert torchvision.transforms.CenterCrop(32)(x).shape == (1, 3, 32, 32)\n"
        "assert torchvision.datasets.CIFAR10 and torchvision.datasets.SVHN\n"
        "boxes = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 2.]])\n"
        "try:\n"
        "    kept = torchvision.ops.nms(boxes, torch.tensor([.5, .9]), .5)\n"
        "except (RuntimeError, NotImplementedError) as error:\n"
        "    assert 'torch' in str(error)\n"
        "else:\n"  # a wheel that fits its torch: the real operator
        "    assert kept.tolist() == [1]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_import_failures_are_not_hidden(monkeypatch: pytest.MonkeyPatch):
    plain = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torchvision":
            raise RuntimeError("something else is wrong")
        return plain(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "utils.torchvision_shim", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(RuntimeError, match="something else is wrong"):
        importlib.import_module("utils.torchvision_shim")
