"""python -m data.resize: smaller pictures, and what is left of the work after a kill."""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command import refused
from medical_files import picture
from PIL import Image

from data import index, pictures, resize
from data.dataset_loader import load_dataset
from utils.files import replaced
from utils.lock import locked

ROOT = Path(__file__).parent.parent


def resized(folder: Path, out: Path, *flags: object) -> None:
    assert resize.main([str(folder), str(out), "--quiet", *map(str, flags)]) == 0


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but hidden ones."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")
    }  # fmt: skip


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    """Two classes in train and test, of many sizes."""
    root = tmp_path / "pictures"
    for part in ("train", "test"):
        for i, size in enumerate(((40, 60), (60, 40), (16, 16), (7, 9), (100, 20))):
            picture(root / part / ("cat", "dog")[i % 2] / f"{i}.png", 20 * i, size)
    return root


def test_the_shorter_side_is_the_side_and_nothing_grows(folder, tmp_path, capsys):
    out = tmp_path / "small"
    resized(folder, out, "--side", "16")
    assert capsys.readouterr().out == f"{out}: 6 pictures made, 4 copied\n"
    sizes = {f"{i}.png": size for i, size in enumerate(((16, 24), (24, 16), (16, 16), (7, 9), (80, 16)))}
    for file in out.rglob("*.png"):
        with Image.open(file) as small:
            assert small.size == sizes[file.name] and small.mode == "L"
            assert np.ptp(np.asarray(small)) == 0 and small.getpixel((0, 0)) == 20 * int(file.stem)
    before, after = files_of(folder), files_of(out)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] == after[name]] == [n for n in before if n[-5] in "23"]


def test_what_is_stored_is_what_a_run_reads(tmp_path):
    """Upright, of 16 bits the upper 8, without transparency: as data.pictures has it."""
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(root / "side.jpg", exif=exif, quality=100)
    Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16)).save(root / "deep.png")
    colour.convert("RGBA").save(root / "clear.webp", lossless=True)
    colour.quantize(16).save(root / "palette.gif")
    out = tmp_path / "small"
    resized(root, out, "--side", "20", "--format", "png")
    assert sorted(files_of(out)) == ["clear.png", "deep.png", "palette.png", "side.png"]
    for source in root.iterdir():
        whole = pictures.read_picture(str(source))
        size = (20, 30) if source.name == "side.jpg" else (30, 20)
        expected = np.asarray(whole.image.resize(size, Image.Resampling.BILINEAR)).astype(int)
        stored = pictures.read_picture(str(out / f"{source.stem}.png"))
        assert stored.size == size and stored.image.mode == whole.image.mode and not stored.image.getexif()
        assert np.abs(np.asarray(stored.image) - expected).max() <= (40 if source.suffix == ".jpg" else 0)


def test_formats(folder, tmp_path, capsys):
    Image.new("RGB", (50, 50), (200, 10, 10)).save(folder / "train" / "cat" / "x.JPEG")
    Image.new("RGB", (50, 50), (200, 10, 10)).save(folder / "train" / "cat" / "y.gif")
    for form, names in (("same", ("x.JPEG", "y.png")), ("png", ("x.png", "y.png")), ("jpg", ("x.JPEG", "y.jpg"))):
        resized(folder, tmp_path / form, "--side", "16", "--format", form)
        found = {file.name for file in (tmp_path / form / "train" / "cat").iterdir()}
        assert found == {*names, *(f"{i}.{'jpg' if form == 'jpg' else 'png'}" for i in (0, 2, 4))}
        for file in (tmp_path / form).rglob("*.*g"):
            with Image.open(file) as small:
                assert small.format == ("PNG" if file.suffix == ".png" else "JPEG")
    picture(folder / "train" / "cat" / "x.png")
    line = refused(capsys, resize.main([str(folder), str(tmp_path / "new"), "--format", "png", "--quiet"]))
    assert "x.JPEG and train/cat/x.png would both become" in line and not (tmp_path / "new").exists()


# ---- again, after a kill -----------------------------------------------------------------------------------------


def test_a_finished_picture_is_not_made_again(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "small"
    resized(folder, out, "--side", "16")
    first = {file: file.stat().st_ctime_ns for file in out.rglob("*.png")}
    new, older = folder / "train" / "cat" / "0.png", folder / "train" / "dog" / "1.png"
    picture(new, 99, (30, 30))
    picture(older, 98, (30, 30))
    os.utime(older, (10**9, 10**9))  # out of an archive
    (out / "test" / "dog" / "3.png").unlink()
    seen, read = [], pictures.read_picture
    monkeypatch.setattr(pictures, "read_picture", lambda file, enough: seen.append(file) or read(file, enough))
    capsys.readouterr()
    resized(folder, out, "--side", "16")
    assert capsys.readouterr().out == f"{out}: 2 pictures made, 1 copied, 7 there already\n"
    assert sorted(seen) == sorted(map(str, (new, older, folder / "test" / "dog" / "3.png")))
    assert sum(file.stat().st_ctime_ns == first[file] for file in first) == 7
    with Image.open(out / "train" / "dog" / "1.png") as small:
        assert small.getpixel((0, 0)) == 98


def test_a_kill_loses_what_is_in_flight(tmp_path, capsys):
    root, out, whole = tmp_path / "pictures", tmp_path / "small", tmp_path / "whole"
    noise = np.random.default_rng(0).integers(0, 256, (400, 500), dtype=np.uint8)
    for i in range(120):
        (root / f"class {i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(noise, i)).save(root / f"class {i % 3}" / f"{i}.png", compress_level=1)
    words = [sys.executable, "-m", "data.resize", str(root), str(out), "--side", "256", "--quiet"]
    for signals in (signal.SIGKILL, signal.SIGINT):
        before = len(files_of(out)) if out.exists() else 0
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while len(list(out.glob("class*/[!.]*"))) < before + 8:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signals)
        errors = process.communicate()[1]
        if signals == signal.SIGINT:
            assert process.returncode == 130 and errors.splitlines() == [
                "interrupted; the same command goes on with the pictures that are not finished"
            ]
    done = files_of(out)
    assert 16 <= len(done) < 120
    kept = {name: (out / name).stat().st_ctime_ns for name in done}
    resized(root, out, "--side", "256")
    resized(root, whole, "--side", "256")
    assert files_of(out) == files_of(whole) and len(files_of(out)) == 120
    assert all((out / name).stat().st_ctime_ns == when for name, when in kept.items())
    assert not [file for file in out.rglob(".*") if file.name != resize.SETTINGS]  # nothing half written is left


def test_a_folder_is_bound_to_its_command(folder, tmp_path, capsys):
    out = tmp_path / "small"
    resized(folder, out, "--side", "16")
    before = files_of(out)
    for flags in (("--side", "8"), ("--side", "16", "--format", "jpg")):
        assert "was made with another" in refused(capsys, resize.main([str(folder), str(out), "--quiet", *flags]))
    assert "another folder" in refused(
        capsys, resize.main([str(folder / "train"), str(out), "--quiet", "--side", "16"])
    )
    with locked(out):
        line = refused(capsys, resize.main([str(folder), str(out), "--quiet", "--side", "16"]))
        assert "in use by process" in line and "run_name" not in line
    assert files_of(out) == before


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_is_carried_over(folder, tmp_path, capsys):
    Image.new("RGB", (50, 50), (200, 10, 10)).save(folder / "train" / "cat" / "y.gif")
    picture(folder / "train" / "cat" / "unnamed.png")
    assert index.main([str(folder), "--quiet"]) == 0
    rows = table(folder)
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join(line for line in lines if "unnamed" not in line))
    gone, broken = folder / "train" / "dog" / "1.png", folder / "test" / "cat" / "4.png"
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:40])
    out = tmp_path / "small"
    for already in (False, True):
        capsys.readouterr()
        resized(folder, out, "--side", "16")
        said = capsys.readouterr()
        assert said.err.splitlines() == [
            "warning: left out 1 picture: they are damaged, or too large to decode (test/cat/4.png)",
            "warning: left out 1 picture: manifest.csv names them, and they are not in the folder (train/dog/1.png)",
        ]
        assert said.out.endswith("10 there already\n" if already else "5 pictures made, 5 copied\n")
        found = {row["file"]: row for row in table(out)}
        expected = {row["file"].replace(".gif", ".png"): row for row in rows if "unnamed" not in row["file"]}
        assert found.keys() == expected.keys() - {"train/dog/1.png", "test/cat/4.png"}
        for file, row in found.items():
            with Image.open(out / file) as small:
                assert (row["width"], row["height"]) == tuple(map(str, small.size))
            assert row["sha256"] == hashlib.sha256((out / file).read_bytes()).hexdigest()
            assert all(row[name] == expected[file][name] for name in ("labels", "group", "split"))
    data = load_dataset("imagefolder", out, cache_dir=tmp_path / "cache", image_size=16, progress=False)
    assert data.task.names == ("cat", "dog") and "unnamed.png" in data.skipped[0]


def test_a_table_by_hand_keeps_its_columns(folder, tmp_path):
    (folder / "manifest.csv").write_text("Split,file,labels\ntrain,./train/cat/0.png,a\ntest,test/cat//0.png,b\n")
    resized(folder, tmp_path / "small", "--side", "16", "--format", "jpg")
    lines = (tmp_path / "small" / "manifest.csv").read_text()
    assert lines == "split,file,labels\ntrain,train/cat/0.jpg,a\ntest,test/cat/0.jpg,b\n"


def test_a_table_that_leads_out_of_the_folder_is_refused(folder, tmp_path, capsys):
    picture(tmp_path / "elsewhere.png", 1, (50, 50))
    (folder / "manifest.csv").write_text("file,labels,split\n../elsewhere.png,a,train\n")
    line = refused(capsys, resize.main([str(folder), str(tmp_path / "deep" / "small"), "--quiet"]))
    assert "no path inside the folder" in line and not (tmp_path / "deep").exists()


# ---- what is left out, and refused -------------------------------------------------------------------------------


def test_damaged_pictures_and_bombs_are_listed(folder, tmp_path, monkeypatch, capsys):
    for name, content in (("a.png", b""), ("b.jpg", b"<html>not found</html>")):
        (folder / "train" / "cat" / name).write_bytes(content)
    picture(folder / "train" / "cat" / "bomb.png", 0, (400, 400))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # PIL refuses from twice as many on
    out = tmp_path / "small"
    resized(folder, out, "--side", "16")
    assert "left out 3 pictures: they are damaged, or too large to decode (train/cat/a.png, train/cat/b.jpg, " \
           "train/cat/bomb.png)" in capsys.readouterr().err  # fmt: skip
    assert len(files_of(out)) == 10
    damaged = folder / "train" / "cat" / "0.png"
    damaged.write_bytes(b"damaged since")
    resized(folder, out, "--side", "16")
    assert not (out / "train" / "cat" / "0.png").exists()  # it would be of an earlier version


def test_nothing_to_store_is_a_line(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    run = partial(resize.main, [str(tmp_path / "x"), str(tmp_path / "y"), "--quiet"])
    assert "holds no pictures" in refused(capsys, run())
    (tmp_path / "x" / "1.png").write_bytes(b"damaged")
    assert "none of the pictures" in refused(capsys, run())


@pytest.mark.parametrize("out", [".", "pictures", "pictures/small", "link", "link/small", "pictures/../pictures/train"])
def test_folders_that_lie_in_each_other_are_refused(folder, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("pictures")
    before = files_of(tmp_path)
    line = refused(capsys, resize.main(["pictures", out, "--quiet"]))
    assert "name a folder beside it" in line and files_of(tmp_path) == before


def test_other_files_are_never_touched(folder, tmp_path, capsys):
    picture(tmp_path / "mine" / "train" / "cat" / "0.png", 1)
    (tmp_path / "file").touch()
    before = files_of(tmp_path)
    assert "has not made" in refused(capsys, resize.main([str(folder), str(tmp_path / "mine"), "--quiet"]))
    assert "is no folder" in refused(capsys, resize.main([str(folder), str(tmp_path / "file"), "--quiet"]))
    (folder / "back").symlink_to(tmp_path / "made")
    (tmp_path / "made").mkdir()
    resized(tmp_path / "mine", tmp_path / "made", "--side", "16")
    assert "a link in" in refused(capsys, resize.main([str(folder), str(tmp_path / "made"), "--quiet"]))
    assert before.items() <= files_of(tmp_path).items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--side", "0"), "--side 0"),
        (("--side", "x"), "invalid int"),
        (("--format", "bmp"), "invalid choice"),
        (("--sied", "4"), "Did you mean --side"),
        (("--workers", "-1"), "--workers -1"),
    ],
)
def test_bad_input_is_a_line(folder, tmp_path, capsys, words, message):
    assert message in refused(capsys, resize.main([str(folder), str(tmp_path / "y"), "--quiet", *words]))
    assert not (tmp_path / "y").exists()


def test_a_full_disk_is_a_line_and_no_half_picture(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "small"

    def full(path, content):
        if path.suffix == ".tmp":
            path.touch()
            raise OSError(28, "No space left on device")
        return len(content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused(capsys, resize.main([str(folder), str(out), "--quiet"]))
    assert files_of(out) == {} and [file.name for file in out.rglob(".*")] == [resize.SETTINGS]


def test_half_written_files_are_told_by_their_names(tmp_path):
    with replaced(tmp_path / "a b.png") as temporary:
        temporary.touch()
        assert resize.HALF_WRITTEN.fullmatch(temporary.name)
    assert not resize.HALF_WRITTEN.fullmatch("a b.png")
