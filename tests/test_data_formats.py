"""Readers of the named data sets on small files in each original format, whole, cut off, and downloaded."""

import gzip
import hashlib
import http.client
import os
import pickle
import shutil
import struct
import tarfile
import urllib.error
import urllib.request
from functools import partial

import numpy as np
import pytest
import scipy.io
import torch

from data.dataset_loader import load_dataset
from utils.errors import UsageError


@pytest.fixture
def load(tmp_path):
    return partial(load_dataset, cache_dir=tmp_path / "cache", progress=False)


def md5(file) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def datasets():
    from utils.torchvision_shim import torchvision

    return torchvision.datasets


@pytest.fixture
def svhn(tmp_path, monkeypatch, datasets):
    """SVHN .mat files and what they hold; digit 0 is stored as label 10."""
    folder, content, listed = tmp_path / "svhn", {}, {}
    folder.mkdir()
    for part, count, seed in (("train", 12, 1), ("test", 5, 2)):
        images, labels = pixels(count, 3, 32, 32, seed=seed), np.arange(count) % 10
        file = folder / f"{part}_32x32.mat"
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": stored})
        content[part] = images, labels
        listed[part] = [datasets.SVHN.split_list[part][0], file.name, md5(file)]
    monkeypatch.setattr(datasets.SVHN, "split_list", {**datasets.SVHN.split_list, **listed})
    return folder, content


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch, datasets):
    """Pickled CIFAR batches and what they hold."""
    source = getattr(datasets, request.param.upper())
    fine = "fine_labels" if request.param == "cifar100" else "labels"
    folder, content = tmp_path / request.param, {}
    (folder / source.base_folder).mkdir(parents=True)

    def write(file_name, entry):
        file = folder / source.base_folder / file_name
        file.write_bytes(pickle.dumps(entry))
        return [file_name, md5(file)]

    for part in ("train", "test"):
        listed, images, labels = [], [], []
        for seed, (file_name, _) in enumerate(getattr(source, f"{part}_list")):
            images.append(pixels(4, 3, 32, 32, seed=seed + 10 * (part == "test")))
            labels.append([(seed + i) % 10 for i in range(4)])
            entry = {"data": images[-1].reshape(4, 3072), fine: labels[-1], "coarse_labels": [0] * 4}
            listed.append(write(file_name, entry))
        monkeypatch.setattr(source, f"{part}_list", listed)
        content[part] = np.concatenate(images), np.concatenate(labels)
    names = [f"class {i}" for i in range(10)]
    file_name, digest = write(source.meta["filename"], {source.meta["key"]: names})
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": digest})
    return request.param, folder, content, names


@pytest.fixture
def fashionmnist(tmp_path, monkeypatch, datasets):
    """Fashion-MNIST .gz idx files in torchvision's layout and what they hold."""
    raw, content, listed = tmp_path / "fashion" / "FashionMNIST" / "raw", {}, []
    raw.mkdir(parents=True)
    for part, stem, count in (("train", "train", 20), ("test", "t10k", 10)):
        images, labels = pixels(count, 28, 28, seed=count), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            file = raw / f"{stem}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(header + array.tobytes()))
            listed.append((file.name, md5(file)))
        content[part] = images[:, None], labels
    monkeypatch.setattr(datasets.FashionMNIST, "resources", listed)
    return raw, content


def assert_holds(data, content):
    for part, images, labels in (
        ("train", data.inputs_n, data.targets_n),
        ("test", data.test_inputs_m, data.test_targets_m),
    ):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), content[part][0])
        assert np.array_equal(labels.numpy(), content[part][1])


def test_svhn(svhn, load):
    folder, content = svhn
    data = load("svhn", folder)
    assert_holds(data, content)
    assert data.task.num_outputs == 10 and data.channels == 3


def test_cifar(cifar, load):
    name, folder, content, names = cifar
    data = load(name, folder)
    assert_holds(data, content)
    assert data.task.names == tuple(names)


@pytest.mark.parametrize("place", ["raw", "path itself"])
@pytest.mark.parametrize("packed", [True, False])
def test_fashionmnist(fashionmnist, load, tmp_path, place, packed):
    raw, content = fashionmnist
    if not packed:
        for file in list(raw.iterdir()):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
    path = raw.parent.parent if place == "raw" else raw
    before = sorted(raw.iterdir())
    data = load("fashionmnist", path)
    assert_holds(data, content)
    assert data.task.names[0] == "T-shirt/top"
    assert sorted(raw.iterdir()) == before  # the user's folder is left as it was


def test_image_size_resizes_arrays(svhn, load):
    data = load("svhn", svhn[0], image_size=16)
    assert data.inputs_n.shape == (12, 3, 16, 16) and data.test_inputs_m.shape == (5, 3, 16, 16)


def test_missing_files_are_named_with_the_way_out(tmp_path, load):
    for name, expected in (
        ("svhn", "train_32x32.mat, test_32x32.mat"),
        ("cifar10", "cifar-10-batches-py: data_batch_1, "),
        ("cifar100", "cifar-100-python: train, test, meta"),
        ("fashionmnist", "raw: train-images-idx3-ubyte.gz, "),
        ("tinyimagenet", "wnids.txt"),
    ):
        with pytest.raises(UsageError) as caught:
            load(name, tmp_path / "nowhere" / "at all")
        message = one_line(caught)
        assert expected in message and "--download" in message and str(tmp_path / "nowhere") in message


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000])
def test_paths_that_are_none(path, load):
    for name in ("imagefolder", "svhn", "fashionmnist", "tinyimagenet"):
        with pytest.raises((UsageError, OSError)) as caught:  # OSError: too long; the commands say it in one line
            load(name, path)
        one_line(caught)


def test_half_downloaded_files_are_named(svhn, fashionmnist, load):
    folder, _ = svhn
    half = folder / "test_32x32.mat"
    half.write_bytes(half.read_bytes()[:1000])
    with pytest.raises(UsageError) as caught:
        load("svhn", folder)
    assert ": test_32x32.mat;" in one_line(caught)

    raw, _ = fashionmnist
    half = raw / "t10k-images-idx3-ubyte.gz"
    unpacked = gzip.decompress(half.read_bytes())
    half.write_bytes(half.read_bytes()[:-20])
    for file in raw.glob("*.gz"):
        file.with_suffix("").write_bytes(unpacked[:500])  # unpacking was cut off as well
    with pytest.raises(UsageError) as caught:
        load("fashionmnist", raw.parent.parent)
    assert ": t10k-images-idx3-ubyte.gz;" in one_line(caught)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "name, content, said",
    [
        ("train-labels-idx1", idx(np.zeros(20, np.uint8), kind=0), "train-labels-idx1"),
        ("train-labels-idx1", idx(np.zeros(20, ">i4"), kind=12), "train-labels-idx1"),
        ("t10k-images-idx3", idx(np.zeros((10, 28, 28), ">f4"), kind=13), "t10k-images-idx3"),
        ("t10k-images-idx3", idx(np.zeros((10, 28), np.uint8)), "t10k-images-idx3"),
        ("t10k-images-idx3", idx(np.zeros((10, 14, 14), np.uint8)), "differ in size"),
        ("t10k-images-idx3", struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 4), "t10k-images-idx3"),  # 0 mod 2**64
        ("train-labels-idx1", idx(np.zeros(21, np.uint8)), "20 training samples and 21 labels"),
        ("train-labels-idx1", idx(np.zeros(19, np.uint8)), "20 training samples and 19 labels"),
        ("t10k-labels-idx1", idx(np.full(10, 77, np.uint8)), "labels go from 77 to 77"),
        ("t10k-labels-idx1", b"", "t10k-labels-idx1"),
    ],
    ids=["type 0", "int", "float", "flat", "small", "overflow", "more labels", "fewer labels", "label 77", "empty"],
)
def test_damaged_idx_files(fashionmnist, load, packed, name, content, said):
    raw, _ = fashionmnist
    for file in list(raw.iterdir()):
        whole = content if file.name.startswith(name) else gzip.decompress(file.read_bytes())
        file.unlink()
        target = file if packed else file.with_suffix("")
        target.write_bytes(gzip.compress(whole) if packed else whole)
    with pytest.raises(UsageError) as caught:
        load("fashionmnist", raw)
    message = one_line(caught)
    assert said in message
    if said == name:
        assert message.count("-ubyte.gz") == 1  # only the damaged one is named


def test_pipes_in_the_place_of_files(fashionmnist, svhn, cifar, load, tmp_path):
    """Opened, a pipe would wait for a writer for ever."""
    raw, _ = fashionmnist
    for suffix in ("", ".gz"):
        file = raw / f"train-labels-idx1-ubyte{suffix}"
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    cifar_name, folder, _, _ = cifar
    for file in (svhn[0] / "test_32x32.mat", next(folder.rglob("test*"))):
        file.unlink()
        os.mkfifo(file)
    for name, path in (("fashionmnist", raw), ("svhn", svhn[0]), (cifar_name, folder)):
        with pytest.raises(UsageError, match="missing or damaged"):
            load(name, path)


def test_half_downloaded_cifar(cifar, load):
    name, folder, _, _ = cifar
    half = next(folder.rglob("test*"))
    half.write_bytes(half.read_bytes()[:100])
    with pytest.raises(UsageError, match=f": {half.name};"):
        load(name, folder)


def serve(monkeypatch, datasets, files):
    """torchvision's downloads come from these local files."""

    def retrieve(url, target, **_):
        shutil.copy(files[url.rsplit("/", 1)[1]], target)

    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(datasets.utils, "_urlretrieve", retrieve)


def test_download_goes_through_torchvision(svhn, cifar, fashionmnist, datasets, monkeypatch, tmp_path, load):
    svhn_folder, svhn_content = svhn
    name, cifar_folder, cifar_content, _ = cifar
    raw, fashion_content = fashionmnist
    source = getattr(datasets, name.upper())
    archive = tmp_path / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar_folder / source.base_folder, source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", md5(archive))
    files = [*svhn_folder.iterdir(), archive, *raw.iterdir()]
    serve(monkeypatch, datasets, {file.name: file for file in files})

    target = tmp_path / "new"
    assert_holds(load("svhn", target, download=True), svhn_content)
    assert_holds(load(name, target, download=True), cifar_content)
    broken = target / "FashionMNIST" / "raw"  # what an unpacking that was cut off leaves behind
    broken.mkdir(parents=True)
    for file in raw.iterdir():
        (broken / file.stem).write_bytes(gzip.decompress(file.read_bytes())[:-1])
    assert_holds(load("fashionmnist", target, download=True), fashion_content)


@pytest.mark.parametrize("error", [urllib.error.URLError("Name not known"), http.client.IncompleteRead(b"not known")])
def test_download_without_network(monkeypatch, tmp_path, load, error):
    def urlopen(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for name in ("svhn", "cifar10", "cifar100", "fashionmnist", "tinyimagenet"):
        with pytest.raises(UsageError) as caught:
            load(name, tmp_path / name, download=True)
        message = one_line(caught)
        assert f"could not download {name}" in message and str(error) in message and str(tmp_path) in message
