"""Folders of pictures: what is read, in which order, and what is refused."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from picture_files import picture_folder
from PIL import Image

from data.dataset_loader import load_dataset
from utils.errors import UsageError


@pytest.fixture
def load(tmp_path):
    return partial(load_dataset, cache_dir=tmp_path / "cache", progress=False)


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_imagefolder_order_is_class_then_file_name(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", classes=("bee", "ant", "Cat"))
    (root / "train" / "ant" / "notes.txt").write_text("not a picture")
    (root / "train" / "ant" / "._0.png").write_text("hidden")
    (root / "train" / ".hidden").mkdir()
    data = load("imagefolder", root)
    assert data.class_names == ("Cat", "ant", "bee")
    assert data.labels_n.tolist() == data.test_labels_m.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.channels == 1
    assert data.images_nCHW[:, 0, 3, 3].tolist() == [100, 101, 102, 50, 51, 52, 0, 1, 2]
    assert data.test_images_mCHW[:, 0, 3, 3].tolist() == [110, 111, 112, 60, 61, 62, 10, 11, 12]


@pytest.mark.parametrize("size", [6, 100])  # small files are decoded in one thread, large ones in several
def test_many_files_keep_their_order(tmp_path, load, monkeypatch, size):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    root = picture_folder(tmp_path / "pictures", sizes=((size, size),), suffix=".bmp", per_class=150, classes=("one",))
    data = load("imagefolder", root)
    names = sorted(f"{i}.bmp" for i in range(150))
    assert data.images_nCHW[:, 0, 0, 0].tolist() == [int(name[:-4]) for name in names]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".JPEG", ".webp"])
def test_colour_formats(tmp_path, load, suffix):
    data = load("imagefolder", picture_folder(tmp_path / "pictures", mode="RGB", suffix=suffix))
    expected = [[v, 255 - v, 7] for v in (0, 1, 2, 50, 51, 52)]
    seen = data.images_nCHW[:, :, 2, 2].int()
    assert (seen - torch.tensor(expected)).abs().max() <= (0 if suffix in (".png", ".bmp") else 4)


def test_picture_modes(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", sizes=((2, 3),))
    folder = root / "train" / "ant"
    Image.new("RGBA", (2, 3), (1, 2, 3, 0)).save(folder / "a.png")
    Image.new("RGB", (2, 3), (9, 8, 7)).quantize(4).save(folder / "b.png")
    Image.fromarray(np.full((3, 2), 0x1234, np.uint16)).save(folder / "c.png")
    upright = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(3, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to look at it"
    upright.rotate(90, expand=True).save(folder / "d.png", exif=exif)
    data = load("imagefolder", root)
    assert data.channels == 3  # any colour makes all of them colour
    assert data.images_nCHW[:6, :, 0, 0].tolist() == [
        [0] * 3,
        [1] * 3,
        [2] * 3,
        [1, 2, 3],
        [9, 8, 7],
        [0x12] * 3,
    ]
    assert np.array_equal(data.images_nCHW[6].permute(1, 2, 0), np.asarray(upright))


def test_mixed_sizes(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", sizes=((40, 20), (20, 30)), suffix=".jpg")
    with pytest.raises(UsageError, match="40x20.*20x30.*--image_size"):
        load("imagefolder", root)
    data = load("imagefolder", root, image_size=8)
    assert data.images_nCHW.shape == (6, 1, 8, 8)
    assert (data.images_nCHW[:, 0, 4, 4].int() - torch.tensor([0, 1, 2, 50, 51, 52])).abs().max() <= 1


def test_folder_pictures_are_cropped_to_the_centre(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", sizes=((24, 8),))
    stripes = np.repeat(np.array([0, 200, 90], np.uint8), 8)[None].repeat(8, 0)  # left, centre, right
    for file in root.rglob("*.png"):
        Image.fromarray(stripes).save(file)
    assert load("imagefolder", root, image_size=4).images_nCHW[..., 1:3].unique().tolist() == [200]


def test_imagefolder_errors_say_what_is_expected(tmp_path, load):
    with pytest.raises(UsageError, match="train/<class>/"):
        load("imagefolder", tmp_path / "nowhere", download=True)
    root = picture_folder(tmp_path / "pictures")
    (root / "test" / "bee").rename(root / "test" / "wasp")
    with pytest.raises(UsageError, match="bee, wasp"):
        load("imagefolder", root)
    (root / "test" / "wasp").rename(root / "test" / "bee")
    for file in (root / "train" / "bee").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match="'bee' in its train"):
        load("imagefolder", root)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_damaged_picture_is_named(tmp_path, load, suffix):
    root = picture_folder(tmp_path / "pictures", sizes=((40, 40),), mode="RGB", suffix=suffix)
    victim = root / "test" / "bee" / f"1{suffix}"
    content = victim.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<html>not found</html>"):
        victim.write_bytes(damaged)
        with pytest.raises(UsageError) as caught:
            load("imagefolder", root)
        assert str(victim) in one_line(caught)
