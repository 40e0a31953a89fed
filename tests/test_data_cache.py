"""The cache of decoded data, and the fingerprint by which data are recognized."""

import os
from functools import partial

import pytest
import torch
from picture_files import picture_folder
from PIL import Image
from safetensors.torch import load_file, save_file

from data import dataset_loader
from data.dataset_loader import DATASETS, load_dataset


@pytest.fixture
def load(tmp_path):
    return partial(load_dataset, cache_dir=tmp_path / "cache", progress=False)


def assert_same(a, b):
    assert a.class_names == b.class_names and a.name == b.name
    for key in dataset_loader._TENSORS:
        assert torch.equal(getattr(a, key), getattr(b, key))


def no_reading(*_):
    raise AssertionError("read again")


def test_cache_is_used_until_a_file_changes(tmp_path, load, monkeypatch):
    root = picture_folder(tmp_path / "pictures", suffix=".bmp")
    first = load("imagefolder", root)
    with monkeypatch.context() as patch:
        patch.setitem(DATASETS, "imagefolder", no_reading)
        assert_same(load("imagefolder", root), first)
        assert_same(load("imagefolder", os.path.relpath(root)), first)
        with pytest.raises(AssertionError, match="read again"):
            load("imagefolder", root, image_size=3)
    # same name, same size, another time
    Image.new("L", (6, 6), 222).save(root / "train" / "ant" / "0.bmp")
    os.utime(root / "train" / "ant" / "0.bmp", ns=(1, 1))
    assert load("imagefolder", root).images_nCHW[0].unique().tolist() == [222]
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the old one is replaced, not kept


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def scribble(file):
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def misfit(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as cached:
        metadata = cached.metadata()
    tensors = load_file(file)
    tensors["labels_n"] = tensors["labels_n"][:-1].clone()
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("damage", [cut, scribble, misfit])
def test_damaged_cache_is_rebuilt_with_a_warning(tmp_path, load, recwarn, damage):
    root = picture_folder(tmp_path / "pictures")
    first = load("imagefolder", root)
    (file,) = (tmp_path / "cache").iterdir()
    damage(file)
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert_same(load("imagefolder", root), first)
    recwarn.clear()
    assert_same(load("imagefolder", root), first)
    assert not recwarn.list


def test_cache_that_cannot_be_written_only_warns(tmp_path, monkeypatch):
    root = picture_folder(tmp_path / "pictures")
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="not cached"):
        load_dataset("imagefolder", root, cache_dir=tmp_path / "file" / "cache", progress=False)

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(dataset_loader, "save_file", disk_full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        load_dataset("imagefolder", root, cache_dir=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_default_places(tmp_path, monkeypatch):
    picture_folder(tmp_path / "datasets" / "imagefolder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert len(load_dataset("imagefolder", progress=False).labels_n) == 6
    assert len(list((tmp_path / "xdg" / "decentralized-learning").glob("imagefolder-*.safetensors"))) == 1
