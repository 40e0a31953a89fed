"""TinyImageNet on small files in its original layout: whole, half unpacked, damaged, and downloaded."""

import hashlib
import os
import shutil
import zipfile
from functools import partial

import pytest
from PIL import Image

from data import picture_folders
from data.dataset_loader import load_dataset
from utils.errors import UsageError
from utils.registry import DATASETS


@pytest.fixture
def load(tmp_path):
    return partial(load_dataset, cache_dir=tmp_path / "cache", progress=False)


def md5(file) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


WNIDS = ["n02", "n01", "n03"]  # wnids.txt is not sorted in the original either


@pytest.fixture
def tiny(tmp_path):
    """The original layout; the grey value of picture i of class number c is 40 c + i. One picture is grey."""
    root = tmp_path / "tiny-imagenet-200"
    for c, wnid in enumerate(sorted(WNIDS)):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in (2, 0, 1):
            mode, value = ("L", 40 * c + i) if i == 2 else ("RGB", (40 * c + i,) * 3)
            Image.new(mode, (64, 64), value).save(folder / f"{wnid}_{i}.JPEG", quality=100)
        (folder.parent / f"{wnid}_boxes.txt").write_text("".join(f"{wnid}_{i}.JPEG\t0\t0\t9\t9\n" for i in range(3)))
    (root / "val" / "images").mkdir(parents=True)
    for i in range(3):
        picture = Image.new("RGB", (64, 64), (100 + i,) * 3)
        picture.save(root / "val" / "images" / f"val_{i}.JPEG", quality=100)
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n" for i, wnid in enumerate(["n03", "n01", "n02"]))
    )
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn09\tother\n")
    return root


def assert_tiny(data):
    assert data.targets_n.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.inputs_n[:, :, 9, 9].tolist() == [[40 * c + i] * 3 for c in range(3) for i in range(3)]
    assert data.test_targets_m.tolist() == [2, 0, 1]
    assert data.test_inputs_m[:, 0, 0, 0].tolist() == [100, 101, 102]
    assert data.task.names == ("goldfish", "bullfrog", "n03")


def test_tinyimagenet(tiny, load):
    assert_tiny(load("tinyimagenet", tiny))
    assert_tiny(load("tinyimagenet", tiny.parent))


@pytest.mark.parametrize(
    "gone", ["wnids.txt", "train/n03/images", "train/n03/images/n03_1.JPEG", "val/images/val_2.JPEG"]
)
def test_half_unpacked_tinyimagenet(tiny, load, gone):
    shutil.rmtree(tiny / gone) if (tiny / gone).is_dir() else (tiny / gone).unlink()
    with pytest.raises(UsageError) as caught:
        load("tinyimagenet", tiny)
    assert str(tiny / gone) in one_line(caught) and "--download" in one_line(caught)


def test_tinyimagenet_with_an_unknown_class(tiny, load):
    with open(tiny / "val" / "val_annotations.txt", "a") as file:
        file.write("val_0.JPEG\tn77\n")
    with pytest.raises(UsageError, match="n77"):
        load("tinyimagenet", tiny)


@pytest.mark.parametrize("file", ["wnids.txt", "words.txt", "val/val_annotations.txt", "train/n02/n02_boxes.txt"])
def test_blank_lines_in_the_texts_of_tinyimagenet(tiny, load, file):
    text = (tiny / file).read_text()
    (tiny / file).write_text("\n  \n" + text.replace("\n", "\r\n\r\n"))
    assert_tiny(load("tinyimagenet", tiny))


@pytest.mark.parametrize(
    "file, content",
    [
        ("wnids.txt", b"\n"),
        ("wnids.txt", b"n01\nn02\nn01\nn03\n"),
        ("words.txt", b"n01\n"),
        ("val/val_annotations.txt", b"val_0.JPEG\n"),
        ("val/val_annotations.txt", b"\tn01\n"),
        *((f, b"n\xff\n") for f in ("wnids.txt", "words.txt", "val/val_annotations.txt", "train/n02/n02_boxes.txt")),
    ],
)
def test_damaged_texts_of_tinyimagenet_are_named(tiny, load, file, content):
    (tiny / file).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load("tinyimagenet", tiny)
    assert str(tiny / file) in one_line(caught)


def test_what_lies_among_the_pictures_of_tinyimagenet_is_said(tiny, load):
    (tiny / "train" / "n01" / "images" / "notes.txt").write_text("")
    os.mkfifo(tiny / "val" / "images" / "pipe.JPEG")
    data = load("tinyimagenet", tiny)
    assert_tiny(data)
    assert data.skipped == ("2 files that are no readable pictures of a class (notes.txt, pipe.JPEG)",)


@pytest.fixture
def tiny_archive(tiny, monkeypatch):
    archive = tiny.parent / "source.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in sorted(tiny.rglob("*")):
            zipped.write(file, file.relative_to(tiny.parent))
    monkeypatch.setattr(picture_folders, "TINY_IMAGENET_URL", archive.as_uri())
    monkeypatch.setattr(picture_folders, "TINY_IMAGENET_MD5", md5(archive))
    return archive


def test_tinyimagenet_download(tiny_archive, tmp_path, load, monkeypatch):
    target = tmp_path / "new" / "folder"
    (target / "tiny-imagenet-200" / "train").mkdir(parents=True)  # left by an earlier try
    assert_tiny(load("tinyimagenet", target, download=True))
    left = sorted(entry.name.partition("-")[0] for entry in target.iterdir())
    assert left == ["incomplete", "tiny"]  # nothing is deleted that was there, no archive stays
    tiny_archive.unlink()
    assert_tiny(load("tinyimagenet", target, download=True, image_size=64))  # nothing is fetched again

    def no_reading(*_):
        raise AssertionError("read again")

    monkeypatch.setitem(DATASETS, "tinyimagenet", no_reading)
    assert_tiny(load("tinyimagenet", target))  # what was downloaded is in the cache


def test_cut_off_tinyimagenet_download(tiny_archive, tmp_path, load):
    tiny_archive.write_bytes(tiny_archive.read_bytes()[:-50])
    with pytest.raises(UsageError, match="not complete"):
        load("tinyimagenet", tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_archive_that_would_write_elsewhere(tmp_path):
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("tiny-imagenet-200/../../escaped.txt", "!")
    with pytest.raises(UsageError, match="unexpected file"):
        picture_folders.fetch_tinyimagenet(tmp_path / "new", archive.as_uri(), md5(archive), progress=False)
    assert not list(tmp_path.rglob("escaped.txt"))
