"""The cache of decoded data, and the fingerprint by which data are recognized."""

import dataclasses
import json
import os
from functools import partial

import pytest
import torch
from picture_files import picture_folder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data import cache, dataset_loader
from data.arrays import Arrays
from data.classification import Classification
from data.dataset_loader import data_differences, load_dataset
from utils.digest import digest_json, digest_tensors
from utils.errors import UsageError
from utils.registry import DATASETS


@pytest.fixture
def load(tmp_path):
    return partial(load_dataset, cache_dir=tmp_path / "cache", progress=False)


def assert_same(a, b):
    for key in ("name", "fingerprint", "skipped", "sources"):
        assert getattr(a, key) == getattr(b, key)
    for key in ("inputs_n", "targets_n", "test_inputs_m", "test_targets_m", "mean_C", "std_C"):
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
    assert load("imagefolder", root).inputs_n[0].unique().tolist() == [222]
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the old one is replaced, not kept


def test_files_that_change_places_are_noticed_whatever_their_times_say(tmp_path, load):
    """Archives and ``cp -p`` give many files one time, and pictures without compression have one size."""
    root = picture_folder(tmp_path / "pictures", suffix=".bmp")
    files = sorted((root / "train").rglob("*.bmp"))
    Image.new("L", (6, 6), 222).save(files[0])
    for file in files:
        os.utime(file, (10**9, 10**9))
    first = load("imagefolder", root)
    for source, target in ((files[0], root / "aside"), (files[-1], files[0]), (root / "aside", files[-1])):
        source.rename(target)
    again = load("imagefolder", root)
    assert torch.equal(again.inputs_n[0], first.inputs_n[-1])
    assert torch.equal(again.inputs_n[-1], first.inputs_n[0])
    assert not torch.equal(first.inputs_n[0], first.inputs_n[-1])


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def scribble(file):
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def rewrite(file, change):
    """Change the tensors of a cache and keep its metadata."""
    with safe_open(file, "pt") as cached:
        metadata = cached.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


def misfit(file):
    rewrite(file, lambda tensors: tensors.update(targets_n=tensors["targets_n"][:-1].clone()))


def other_type(file):
    rewrite(file, lambda tensors: tensors.update(inputs_n=tensors["inputs_n"].float()))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def rename_a_class(file):
    content = file.read_bytes()
    assert b'\\"bee\\"' in content  # in quotes: digests are hexadecimal, and one in 65 has a bee as well
    file.write_bytes(content.replace(b'\\"bee\\"', b'\\"wax\\"'))


def rename_a_file(file):
    file.write_bytes(file.read_bytes().replace(b"ant/1.png", b"ant/2.png"))


@pytest.mark.parametrize("damage", [cut, scribble, misfit, other_type, flip_a_bit, rename_a_class, rename_a_file])
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

    monkeypatch.setattr(cache, "save_file", disk_full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        load_dataset("imagefolder", root, cache_dir=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_default_places(tmp_path, monkeypatch):
    picture_folder(tmp_path / "datasets" / "imagefolder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert len(load_dataset("imagefolder", progress=False).targets_n) == 6
    assert len(list((tmp_path / "xdg" / "decentralized-learning").glob("imagefolder-*.safetensors"))) == 1


def test_no_home_for_the_cache(tmp_path, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        load_dataset("imagefolder", picture_folder(tmp_path / "pictures"), progress=False)


def test_a_change_in_a_deep_folder_is_seen_and_circles_of_links_end(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", suffix=".bmp")
    deep = root / "train" / "ant" / "a" / "b" / "c" / "d" / "e"
    deep.mkdir(parents=True)
    (deep / "up").symlink_to(root)
    (deep / "itself").symlink_to("itself")
    picture = Image.new("L", (6, 6), 5)
    picture.save(deep / "0.bmp")
    assert load("imagefolder", root).inputs_n[:, 0, 0, 0].tolist()[:4] == [0, 1, 2, 5]
    Image.new("L", (6, 6), 6).save(deep / "0.bmp")
    os.utime(deep / "0.bmp", ns=(1, 1))
    assert load("imagefolder", root).inputs_n[:, 0, 0, 0].tolist()[:4] == [0, 1, 2, 6]


# --------------------------------------------------------------- sources


def test_each_training_sample_names_its_file_or_its_number(tmp_path, load, monkeypatch):
    root = picture_folder(tmp_path / "pictures")
    deep = root / "train" / "ant" / "zoo" / "two\nlines"
    deep.mkdir(parents=True)
    Image.new("L", (6, 6), 9).save(deep / "0.png")
    for _ in ("decoded", "from the cache"):
        sources = load("imagefolder", root).sources
        assert sources == (
            *(f"train/ant/{i}.png" for i in range(3)), "train/ant/zoo/two lines/0.png",
            *(f"train/bee/{i}.png" for i in range(3)),
        )  # fmt: skip
    monkeypatch.setitem(DATASETS, "imagefolder", no_reading)
    assert load("imagefolder", root).sources == sources
    digits = load_dataset("digits")
    from sklearn.datasets import load_digits

    numbers = [int(source.removeprefix("load_digits ")) for source in digits.sources]
    assert load_digits().target[numbers].tolist() == digits.targets_n.tolist()
    images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    arrays = Arrays(images, torch.tensor([0, 1, 0, 1]), images[:2].clone(), torch.tensor([0, 1]), Classification("ab"))
    monkeypatch.setitem(DATASETS, "svhn", lambda *_: arrays)
    assert load("svhn", tmp_path / "svhn").sources == ("train 0", "train 1", "train 2", "train 3")


def test_the_fingerprint_does_not_depend_on_names_of_files(tmp_path, load):
    root = picture_folder(tmp_path / "pictures")
    before = load("imagefolder", root)
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "00.png")
    after = load("imagefolder", root)
    assert after.fingerprint == before.fingerprint and after.sources != before.sources


# --------------------------------------------------------------- the fingerprint


def test_fingerprint_describes_what_was_loaded(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", mode="RGB", sizes=((8, 6),), per_class=4)
    data = load("imagefolder", root)
    assert data.fingerprint == {
        "samples": 8,
        "test_samples": 8,
        "shape": [3, 6, 8],
        "classes": 2,
        "inputs": digest_tensors({"inputs": data.inputs_n}),
        "labels": digest_tensors({"labels": data.targets_n}),
        "test_inputs": digest_tensors({"inputs": data.test_inputs_m}),
        "test_labels": digest_tensors({"labels": data.test_targets_m}),
        "class_names": digest_json(["ant", "bee"]),
    }
    assert json.loads(json.dumps(data.fingerprint)) == data.fingerprint
    assert load("imagefolder", root, image_size=4).fingerprint["shape"] == [3, 4, 4]


def test_each_tensor_is_hashed_once_a_load(tmp_path, load, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        dataset_loader, "digest_tensors", lambda tensors: (hashed.append(tuple(tensors)), digest_tensors(tensors))[1]
    )
    root = picture_folder(tmp_path / "pictures")
    for _ in ("decoded", "from the cache"):
        hashed.clear()
        dataclasses.replace(load("imagefolder", root))
        assert len(hashed) == 4


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("samples", 1387, "1,437 training samples then, 1,387 now"),
        ("test_samples", 300, "359 test samples then, 300 now"),
        ("classes", 9, "10 classes then, 9 now"),
        ("shape", [3, 8, 8], "samples of shape [1, 8, 8] then, [3, 8, 8] now"),
        ("inputs", "?", "other inputs"),
        ("labels", "?", "other labels"),
        ("class_names", "?", "other classes"),
        ("test_inputs", "?", "other test data"),
        ("test_labels", "?", "other test data"),
    ],
)
def test_differences_are_said(key, value, said):
    then = {**load_dataset("digits").fingerprint, "samples": 1437}
    assert data_differences(then, then) is None
    assert data_differences(then, {**then, key: value}) == said


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"targets_n": torch.tensor([0, 1, 1])}, "4 training samples and 3 labels"),
        ({"test_targets_m": torch.tensor([0, 2])}, "test labels go from 0 to 2, and there are 2 classes"),
        ({"targets_n": torch.tensor([0, 1, -1, 1])}, "labels go from -1 to 1"),
        ({"test_inputs_m": torch.zeros(2, 1, 4, 5, dtype=torch.uint8)}, "differ in size"),
        ({"inputs_n": torch.zeros(4, 1, 4, 4)}, "neither pictures of bytes"),
        ({"inputs_n": torch.zeros(0, 1, 4, 4, dtype=torch.uint8), "targets_n": torch.zeros(0).long()}, "are 0 tr"),
        ({"sources": ("a", "b")}, "4 training samples and 2 names"),
    ],
)
def test_what_a_reader_gives_must_fit_together(wrong, said, tmp_path, load, monkeypatch):
    images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    fitting = Arrays(images, torch.tensor([0, 1, 0, 1]), images[:2], torch.tensor([0, 1]), Classification("ab"))
    monkeypatch.setitem(DATASETS, "svhn", lambda *_: dataclasses.replace(fitting, **wrong))
    with pytest.raises(UsageError, match=said):
        load("svhn", tmp_path)
