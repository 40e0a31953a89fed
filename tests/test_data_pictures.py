"""Folders of pictures: what is read, in which order, and what is refused."""

import inspect
import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
from picture_files import picture_folder
from PIL import Image

from data import pictures
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
    assert data.task.names == ("Cat", "ant", "bee")
    assert data.targets_n.tolist() == data.test_targets_m.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.channels == 1
    assert data.inputs_n[:, 0, 3, 3].tolist() == [100, 101, 102, 50, 51, 52, 0, 1, 2]
    assert data.test_inputs_m[:, 0, 3, 3].tolist() == [110, 111, 112, 60, 61, 62, 10, 11, 12]


@pytest.mark.parametrize("size", [6, 100])  # small files are decoded in one thread, large ones in several
def test_many_files_keep_their_order(tmp_path, load, monkeypatch, size):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    root = picture_folder(tmp_path / "pictures", sizes=((size, size),), suffix=".bmp", per_class=150, classes=("one",))
    data = load("imagefolder", root)
    names = sorted(f"{i}.bmp" for i in range(150))
    assert data.inputs_n[:, 0, 0, 0].tolist() == [int(name[:-4]) for name in names]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".JPEG", ".webp"])
def test_colour_formats(tmp_path, load, suffix):
    data = load("imagefolder", picture_folder(tmp_path / "pictures", mode="RGB", suffix=suffix))
    expected = [[v, 255 - v, 7] for v in (0, 1, 2, 50, 51, 52)]
    seen = data.inputs_n[:, :, 2, 2].int()
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
    assert data.inputs_n[:6, :, 0, 0].tolist() == [
        [0] * 3,
        [1] * 3,
        [2] * 3,
        [1, 2, 3],
        [9, 8, 7],
        [0x12] * 3,
    ]
    assert np.array_equal(data.inputs_n[6].permute(1, 2, 0), np.asarray(upright))


def test_mixed_sizes(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", sizes=((40, 20), (20, 30)), suffix=".jpg")
    with pytest.raises(UsageError, match="40x20.*20x30.*--image_size"):
        load("imagefolder", root)
    data = load("imagefolder", root, image_size=8)
    assert data.inputs_n.shape == (6, 1, 8, 8)
    assert (data.inputs_n[:, 0, 4, 4].int() - torch.tensor([0, 1, 2, 50, 51, 52])).abs().max() <= 1


def test_folder_pictures_are_cropped_to_the_centre(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", sizes=((24, 8),))
    stripes = np.repeat(np.array([0, 200, 90], np.uint8), 8)[None].repeat(8, 0)  # left, centre, right
    for file in root.rglob("*.png"):
        Image.fromarray(stripes).save(file)
    assert load("imagefolder", root, image_size=4).inputs_n[..., 1:3].unique().tolist() == [200]


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


# --------------------------------------------------------------- what is read


def test_pictures_in_subfolders_are_read_in_the_order_of_their_paths(tmp_path, load):
    root = picture_folder(tmp_path / "pictures")
    for name, value in (("b/9.png", 201), ("a/z/1.png", 202), ("a/2.png", 203), ("x.png/0.png", 204), (".h/0.png", 9)):
        file = root / "train" / "ant" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 6), value).save(file)
    data = load("imagefolder", root)
    assert data.inputs_n[data.targets_n == 0, 0, 0, 0].tolist() == [0, 1, 2, 203, 202, 201, 204]
    assert data.skipped == ()


def test_linked_folders_are_read_and_circles_end(tmp_path, load):
    root = picture_folder(tmp_path / "pictures")
    picture_folder(tmp_path / "more", classes=("bug",))
    ant = root / "train" / "ant"
    (ant / "more").symlink_to(tmp_path / "more" / "test" / "bug")
    for i in range(12):  # each leads to all the others: 12! ways through, were folders read twice
        (ant / f"folder {i}").mkdir()
        for k in range(12):
            (ant / f"folder {i}" / f"link {k}").symlink_to(ant / f"folder {k}")
    (ant / "around").symlink_to(root)
    (ant / "itself").symlink_to("itself")
    data = load("imagefolder", root)
    assert data.inputs_n[data.targets_n == 0, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]


def test_folders_in_folders_are_no_recursion(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    (deep / "file").write_text("")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert list(pictures.files_under(tmp_path)) == [str(deep / "file")]
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    "suffix", [".tif", ".tiff", ".jp2", ".tga", ".pcx", ".sgi", ".dib", ".ico", ".dds", ".qoi", ".avif", ".pbm", ".mpo"]
)
def test_formats_that_pil_reads(tmp_path, load, suffix):
    if suffix not in pictures.picture_suffixes():
        pytest.skip("this PIL is built without it")
    root = picture_folder(tmp_path / "pictures", mode="RGB", sizes=((16, 16),))
    colour = Image.new("1" if suffix == ".pbm" else "RGB", (16, 16), "white")
    colour.save(root / "train" / "ant" / f"3{suffix}")
    data = load("imagefolder", root)
    assert len(data.targets_n) == 7 and (data.inputs_n[3] >= 253).all()


def test_of_several_pages_the_first_is_read_and_a_tiff_is_turned_upright(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", sizes=((2, 3),))
    pages = [Image.new("L", (2, 3), value) for value in (70, 80)]
    pages[0].save(root / "train" / "ant" / "3.tif", save_all=True, append_images=pages[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to look at it"
    upright = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(3, 2))
    upright.rotate(90, expand=True).save(root / "train" / "ant" / "4.tif", exif=exif)
    data = load("imagefolder", root)
    assert data.inputs_n[3].unique().tolist() == [70]
    assert data.inputs_n[4].flatten().tolist() == list(range(6))


@pytest.mark.parametrize("name", ["eps", "wmf", "fits", "pdf"])
def test_formats_that_start_programs_are_not_opened(tmp_path, load, name):
    root = picture_folder(tmp_path / "pictures")
    content = {"eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n", "pdf": b"%PDF-1.4\n"}
    content |= {"wmf": b"\xd7\xcd\xc6\x9a\x00\x00" + b"\x01" * 60, "fits": b"SIMPLE  =" + b" " * 80}
    (root / "train" / "ant" / f"3.{name}").write_bytes(content[name])
    assert load("imagefolder", root).skipped == (f"1 file that is no readable picture of a class (3.{name})",)
    (root / "train" / "ant" / "3.png").write_bytes(content[name])
    with pytest.raises(UsageError, match="3.png"):
        load("imagefolder", root)


def test_what_is_left_out_is_said_at_every_start(tmp_path, load):
    root = picture_folder(tmp_path / "pictures")
    for name in ("train/0.png", "train/ant/Thumbs.db", "train/ant/a.csv", "test/bee/.DS_Store", "test/desktop.ini"):
        (root / name).write_text("")
    os.mkfifo(root / "test" / "bee" / "pipe.png")  # opened, it would wait for a writer for ever
    (root / "test" / "bee" / "broken.png").symlink_to("nowhere")
    for _ in ("decoded", "from the cache"):
        data = load("imagefolder", root)
        assert data.skipped == ("4 files that are no readable pictures of a class (0.png, a.csv, ...)",)
        assert len(data.targets_n) == len(data.test_targets_m) == 6


def test_a_file_that_is_no_picture_is_told_in_words(tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(b"no picture at all")
    with pytest.raises(UsageError) as caught:
        pictures.decode_pictures([str(file)])
    assert str(file) in one_line(caught) and "PNG" in one_line(caught) and "object at" not in one_line(caught)


def test_what_lies_beside_train_and_test_is_said(tmp_path, load):
    """Data sets often come with a third folder, whose pictures nobody reads here."""
    root = picture_folder(tmp_path / "pictures")
    (root / "val" / "ant").mkdir(parents=True)
    (root / "README.txt").write_text("")
    assert load("imagefolder", root).skipped == (
        "2 files that are no readable pictures of a class (val, README.txt)",
    )


def test_a_folder_that_cannot_be_read_is_named(tmp_path, load, monkeypatch):
    root, scandir = picture_folder(tmp_path / "pictures"), os.scandir
    (root / "train" / "ant" / "private").mkdir()

    def refuse(folder):
        if os.path.basename(folder) == "private":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(UsageError, match="private: Permission denied"):
        load("imagefolder", root)
    (root / "train" / "ant" / "private").rename(root / "private")
    assert len(load("imagefolder", root).targets_n) == 6  # not a folder of pictures: lost+found, say


# --------------------------------------------------------------- pixels


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif", ".bmp"])
def test_a_grey_palette_is_grey(tmp_path, load, suffix):
    root = picture_folder(tmp_path / "pictures", sizes=((4, 4),))
    picture = Image.new("P", (4, 4), 2)
    picture.putpalette([0, 0, 0, 200, 200, 200, 90, 90, 90])
    picture.save(root / "train" / "ant" / f"3{suffix}")
    data = load("imagefolder", root)
    assert data.channels == 1 and data.inputs_n[3].unique().tolist() == [90]


def test_32_bit_grey_is_clipped_to_16_bits_and_floats_are_refused(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", sizes=((4, 1),))
    wide = np.array([[-5, 0x1234, 65535, 70000]], np.int32)
    Image.fromarray(wide).save(root / "train" / "ant" / "3.tif")
    assert load("imagefolder", root).inputs_n[3].flatten().tolist() == [0, 0x12, 255, 255]
    Image.fromarray(wide.astype(np.float32)).save(root / "train" / "ant" / "4.tif")
    with pytest.raises(UsageError, match="4.tif: its pixels are floating point"):
        load("imagefolder", root)


@pytest.mark.parametrize("size", [(1, 1), (1, 300)])
def test_tiny_and_narrow_pictures(tmp_path, load, size):
    root = picture_folder(tmp_path / "pictures", sizes=(size,))
    assert load("imagefolder", root).inputs_n.shape == (6, 1, *size[::-1])
    assert load("imagefolder", root, image_size=5).inputs_n.shape == (6, 1, 5, 5)


def test_more_than_fits_into_memory(tmp_path, load, monkeypatch):
    root = picture_folder(tmp_path / "pictures")
    monkeypatch.setattr(os, "sysconf", lambda name: 40)  # 1,600 bytes
    with pytest.raises(UsageError, match="1,797 pictures of 4096x4096 pixels do not fit"):
        load_dataset("digits", image_size=4096)
    assert load("imagefolder", root).inputs_n.shape[2:] == (6, 6)
    with pytest.raises(UsageError, match="12 pictures of 7x7 pixels.*--image_size"):
        load("imagefolder", root, image_size=7)


# --------------------------------------------------------------- names


def test_names_that_are_no_utf_8(tmp_path, load):
    root = picture_folder(tmp_path / "pictures", classes=("ant", "caf\udce9", "two\nlines $x$ \u00e9"))
    (root / "train" / "ant" / "\udcff\n.txt").write_text("")
    for _ in ("decoded", "from the cache"):
        data = load("imagefolder", root)
        assert data.task.names == ("ant", "caf\ufffd", "two lines $x$ \u00e9")
        assert data.skipped == ("1 file that is no readable picture of a class (\ufffd .txt)",)
    victim = root / "train" / "caf\udce9" / "a\nb$\udcff.png"
    Image.new("L", (7, 7)).save(victim)
    for content in (victim.read_bytes(), b""):
        victim.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            load("imagefolder", root)
        one_line(caught).encode()  # all of it is valid text
    (root / "test" / "caf\udce9").rename(root / "test" / "other")
    with pytest.raises(UsageError) as caught:
        load("imagefolder", root)
    one_line(caught).encode()


def test_many_odd_classes_are_not_all_listed(tmp_path, load):
    root = picture_folder(tmp_path / "pictures")
    for i in range(100):
        (root / "train" / f"class {i:03}").mkdir()
    with pytest.raises(UsageError, match="class 009, ...$"):
        load("imagefolder", root)
