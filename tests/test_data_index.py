"""python -m data.index: what it makes of class folders and of the tables of three collections of chest X-rays."""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import random
import re
from functools import partial
from pathlib import Path

import pytest
from command import load as read_json
from command import refused
from hypothesis import given
from hypothesis import strategies as st
from medical_files import CHEXPERT_HEADER, chexpert, mimic, nih, picture
from PIL import Image

import main
from data import index
from data.dataset_loader import load_dataset
from data.manifest_table import COLUMNS
from data.medical_tables import Entry
from data.multilabel import UNKNOWN
from data.picture_work import LeftOut
from data.splits import draw, split

NIH = [
    ("00000001_000.png", "Mass", "1"), ("00000001_001.png", "Mass|Nodule", "1"),
    ("00000002_000.png", "No Finding", "2"), ("00000003_000.png", "Nodule", "3"),
    ("00000004_000.png", "No Finding", "4"), ("00000005_000.png", "Mass", "5"),
]  # fmt: skip
LISTS = {"train_val_list.txt": NIH[:4], "test_list.txt": NIH[4:]}


def indexed(folder: Path, *flags: object) -> list[dict[str, str]]:
    """The table that the command writes, by columns."""
    assert index.main([str(folder), "--quiet", *map(str, flags)]) == 0
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_file(rows: list[dict[str, str]], *columns: str) -> dict[str, tuple[str, ...]]:
    return {os.path.basename(row["file"]): tuple(row[column] for column in columns) for row in rows}


def parts(rows: list[dict[str, str]]) -> dict[str, str]:
    return {file: one for file, (one,) in by_file(rows, "split").items()}


def with_lists(root: Path) -> Path:
    nih(root, NIH)
    for name, rows in LISTS.items():
        (root / name).write_text("".join(f"{file}\n" for file, _, _ in rows))
    return root


@pytest.fixture
def load(tmp_path):
    return partial(load_dataset, "imagefolder", cache_dir=tmp_path / "cache", progress=False)


# ---- NIH ChestX-ray14 --------------------------------------------------------------------------------------------


def test_nih_with_its_lists(tmp_path, load):
    root = with_lists(tmp_path / "nih")
    rows = indexed(root, "--val_fraction", "0")
    assert tuple(rows[0]) == COLUMNS
    first = root / "images_001" / "images" / "00000001_000.png"
    assert rows[0] == {
        "file": "images_001/images/00000001_000.png", "labels": "Mass", "group": "", "split": "train",
        "sha256": hashlib.sha256(first.read_bytes()).hexdigest(), "width": "8", "height": "8",
    }  # fmt: skip
    assert by_file(rows, "labels", "split") == {
        name: ("" if findings == "No Finding" else findings, "train" if i < 4 else "test")
        for i, (name, findings, _) in enumerate(NIH)
    }
    data = load(root)
    assert data.task.kind == "multilabel" and data.task.names == ("Mass", "Nodule")
    assert data.targets_n.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    assert data.test_targets_m.tolist() == [[0, 0], [1, 0]]
    assert data.owners is None and data.skipped == ()


def test_nih_draws_validation_from_its_list_for_training(tmp_path):
    root = with_lists(tmp_path / "nih")
    found = parts(indexed(root, "--val_fraction", "0.5"))
    assert all(found[name] == "test" for name, _, _ in NIH[4:])
    assert "val" in found.values() and found[NIH[0][0]] == found[NIH[1][0]]  # one patient


def test_one_list_says_what_the_other_would(tmp_path):
    for name in LISTS:
        root = with_lists(tmp_path / name)
        (root / name).unlink()
        found = parts(indexed(root, "--val_fraction", "0"))
        assert [found[file] for file, _, _ in NIH] == ["train"] * 4 + ["test"] * 2


def test_what_cannot_be_taken_is_listed(tmp_path, capsys):
    root = with_lists(tmp_path / "nih")
    images = {file.name: file for file in root.rglob("*.png")}
    images["00000001_000.png"].unlink()
    images["00000003_000.png"].write_bytes(images["00000003_000.png"].read_bytes()[:50])
    table = root / "Data_Entry_2017.csv"
    picture(root / "images_001" / "images" / "00000006_000.png")
    picture(root / "images_001" / "images" / "00000007_000.png")
    more = [("00000002_000.png", "Mass", "2"), ("00000006_000.png", "Mess", "6"), ("00000007_000.png", "Mass", "7")]
    table.write_text(table.read_text() + "".join(f"{n},{f},0,{p},1,M,PA,1,1,1,1,\n" for n, f, p in more))
    rows = indexed(root, "--val_fraction", "0")
    assert sorted(by_file(rows, "file")) == [NIH[i][0] for i in (1, 2, 4, 5)]
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "warning: left out 1 picture: a table names them, and they are not in the folder (00000001_000.png)",
        "warning: left out 1 picture: a label that the data set does not have (00000006_000.png: Mess)",
        "warning: left out 1 picture: they are neither in train_val_list.txt nor in test_list.txt (00000007_000.png)",
        "warning: left out 1 picture: the table names them again (images_001/images/00000002_000.png)",
        "warning: left out 1 picture: they are damaged, or too large to decode (images_002/images/00000003_000.png)",
    ]
    assert said.out == f"{root}/manifest.csv: 4 pictures (train 2, test 2), 2 labels, 4 patients\n"


def test_strict_writes_nothing_if_anything_is_left_out(tmp_path, capsys):
    root = with_lists(tmp_path / "nih")
    next(root.rglob("00000002_000.png")).unlink()
    assert "--strict" in refused(capsys, index.main([str(root), "--quiet", "--strict"]))
    assert not (root / "manifest.csv").exists()
    picture(root / "images_001" / "images" / "00000002_000.png")
    assert len(indexed(root, "--strict", "--val_fraction", "0")) == 6


def test_findings_that_nobody_can_learn_are_left_out(tmp_path, capsys, load):
    rows = [*NIH[:4], ("00000005_000.png", "Mass|Hernia", "5")]
    root = nih(tmp_path / "nih", rows)
    (root / "test_list.txt").write_text("00000005_000.png\n")
    found = by_file(indexed(root, "--val_fraction", "0"), "labels")
    assert found["00000005_000.png"] == ("Mass",)
    assert "left out the finding 'Hernia' (1 in all): no training picture has it" in capsys.readouterr().err
    assert load(root).task.names == ("Mass", "Nodule")


def test_labels_and_groups_are_chosen(tmp_path, capsys):
    root = with_lists(tmp_path / "nih")
    run = partial(indexed, root, "--overwrite", "--val_fraction", "0")
    assert {labels for (labels,) in by_file(run("--labels", "Mass"), "labels").values()} == {"Mass", ""}
    groups = {
        "patient": ["1", "1", "2", "3", "4", "5"],
        "folder": ["images_001", "images_002"] * 3,
        "column:View Position": ["PA", "AP"] * 3,
    }
    for group, expected in groups.items():
        found = by_file(run("--group", group), "group")
        assert [found[name] for name, _, _ in NIH] == [(g,) for g in expected]
    capsys.readouterr()
    for flags, message in ((("--labels", "mass"), "Did you mean 'Mass'"), (("--group", "column:View"), "View Position"),
                           (("--group", "patients"), "Did you mean 'patient'")):  # fmt: skip
        assert message in refused(capsys, index.main([str(root), "--quiet", "--overwrite", *flags]))


# ---- CheXpert ----------------------------------------------------------------------------------------------------

TRAIN = [
    ("patient00001", "study1/view1_frontal.jpg", {"No Finding": "1.0", "Support Devices": "1.0"}),
    ("patient00002", "study1/view1_frontal.jpg", {"Edema": "1.0", "Cardiomegaly": "-1.0", "Pneumonia": "0.0"}),
    ("patient00002", "study2/view1_frontal.jpg", {"Cardiomegaly": "1.0", "Edema": "-1.0"}),
]  # fmt: skip
VALID = [("patient64541", "study1/view1_frontal.jpg", {"Cardiomegaly": "1.0", "Edema": "0.0"})]


@pytest.mark.parametrize("above", [False, True])
def test_chexpert(tmp_path, capsys, load, above):
    """In the folder of the data set, whatever it is called now, or in the one above it."""
    chexpert(tmp_path / "x" / "small", TRAIN, VALID)
    root = tmp_path / "x" if above else tmp_path / "x" / "small"
    rows = indexed(root, "--val_fraction", "0")
    prefix = "small/" if above else ""
    assert {row["file"]: (row["labels"], row["split"]) for row in rows} == {
        f"{prefix}train/patient00001/study1/view1_frontal.jpg": ("No Finding|Support Devices", "train"),
        f"{prefix}train/patient00002/study1/view1_frontal.jpg": ("Edema|?Cardiomegaly", "train"),
        f"{prefix}train/patient00002/study2/view1_frontal.jpg": ("Cardiomegaly|?Edema", "train"),
        f"{prefix}valid/patient64541/study1/view1_frontal.jpg": ("Cardiomegaly", "test"),
    }
    assert "those for validation are the test part" in capsys.readouterr().err
    data = load(root)
    assert data.task.names == ("Cardiomegaly", "Edema", "No Finding", "Support Devices")
    assert data.targets_n.tolist() == [[0, 0, 1, 1], [UNKNOWN, 1, 0, 0], [1, UNKNOWN, 0, 0]]


def test_odd_values_of_chexpert_are_listed(tmp_path, capsys):
    odd = [("patient00003", "study1/view1_frontal.jpg", {"Edema": value}) for value in ("2.0", "yes", "nan")]
    odd = [(f"{patient}{i}", view, findings) for i, (patient, view, findings) in enumerate(odd)]
    rows = indexed(chexpert(tmp_path / "x", TRAIN + odd, VALID), "--val_fraction", "0")
    assert len(rows) == 4
    assert "left out 3 pictures: a finding that is none of 1, 0, -1 and empty" in capsys.readouterr().err


# ---- MIMIC-CXR-JPG -----------------------------------------------------------------------------------------------

STUDIES = [
    ("10000032", "50414267", {"No Finding": "1.0"}), ("10000764", "57375967", {"Edema": "1.0", "Fracture": "-1.0"}),
    ("11000898", "50771383", {"Fracture": "1.0"}), ("11000935", "50578979", {"Edema": "1.0"}),
]  # fmt: skip
PICTURES = [
    ("02aa804e-bde0afdd", "50414267", "10000032", "train"), ("174413ec-4ec4c1f7", "50414267", "10000032", "train"),
    ("096052b7-d256dc40", "57375967", "10000764", "train"), ("8959e402-2175d68d", "50771383", "11000898", "validate"),
    ("2b8fe0ad-2a25ee25", "50578979", "11000935", "test"), ("d0b71acc-b5a62046", "59999999", "11000935", "test"),
    ("aaaaaaaa-bbbbbbbb", "57375967", "10000764", "train"), ("cccccccc-dddddddd", "50414267", "10000032", "else"),
]  # fmt: skip


def test_mimic(tmp_path, capsys):
    root = mimic(tmp_path / "mimic", STUDIES, PICTURES)
    next(root.rglob("aaaaaaaa*")).unlink()
    rows = indexed(root, "--group", "folder")
    assert {row["file"]: (row["labels"], row["split"], row["group"]) for row in rows} == {
        "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg": ("No Finding", "train", "p10"),
        "files/p10/p10000032/s50414267/174413ec-4ec4c1f7.jpg": ("No Finding", "train", "p10"),
        "files/p10/p10000764/s57375967/096052b7-d256dc40.jpg": ("Edema", "train", "p10"),
        "files/p11/p11000898/s50771383/8959e402-2175d68d.jpg": ("", "val", "p11"),  # nothing to learn of a fracture
        "files/p11/p11000935/s50578979/2b8fe0ad-2a25ee25.jpg": ("Edema", "test", "p11"),
    }
    said = capsys.readouterr().err
    assert "left out 1 picture: the table of findings does not have their study (files/p11" in said
    assert "left out 1 picture: a table names them, and they are not in the folder (files/p10" in said
    assert "a split that is none of train, validate and test (files/p10/p10000032/s50414267/cccccccc-" in said
    assert "the finding 'Fracture' (2 in all)" in said


def test_mimic_without_its_split_goes_by_the_pictures(tmp_path, capsys):
    root = mimic(tmp_path / "mimic", STUDIES, PICTURES)
    (root / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    table = root / "mimic-cxr-2.0.0-chexpert.csv.gz"
    table.with_suffix("").write_bytes(gzip.decompress(table.read_bytes()))
    table.unlink()  # unpacked is as good
    rows = indexed(root, "--val_fraction", "0", "--test_fraction", "0.5")
    assert len(rows) == 7 and {row["split"] for row in rows} == {"train", "test"}
    assert len({row["split"] for row in rows if "p10000032" in row["file"]}) == 1


# ---- class folders -----------------------------------------------------------------------------------------------


def test_class_folders(tmp_path, capsys, load):
    root = tmp_path / "pictures"
    for i in range(20):
        picture(root / ("cat", "dog")[i % 2] / ("anna", "ben")[i % 3 % 2] / f"{i}.png", i)
    picture(root / "beside.png")
    rows = indexed(root, "--group", "folder", "--test_fraction", "0.4", "--seed", "1")
    assert len(rows) == 20 and {row["split"] for row in rows} == {"train", "test"}
    assert all(row["file"].split("/")[:2] == [row["labels"], row["group"]] for row in rows)
    assert "left out 1 picture: they lie in no class folder (beside.png)" in capsys.readouterr().err
    data = load(root)
    assert data.task.kind == "classification" and data.task.names == ("cat", "dog") and data.val_n is None
    assert data.owners.names == ("anna", "ben")
    assert parts(indexed(root, "--overwrite", "--seed", "2")) != parts(rows)


def test_class_folders_in_parts(tmp_path, capsys, load):
    root = tmp_path / "pictures"
    for i, part in enumerate(("train", "Val", "test")):
        for name in ("cat", "dog"):
            picture(root / part / name / "1.png", 50 * i)
    picture(root / "test" / "eel" / "1.png")
    picture(root / "more" / "cat" / "1.png")
    rows = indexed(root, "--test_fraction", "0.3")
    assert {row["file"]: (row["labels"], row["split"]) for row in rows} == {
        f"{folder}/{name}/1.png": (name, part)
        for folder, part in (("train", "train"), ("Val", "val"), ("test", "test")) for name in ("cat", "dog")
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "left out 1 picture: they lie in no class folder (more/cat/1.png)" in said
    assert "left out pictures of the class 'eel' (1 in all)" in said and "--test_fraction has no effect" in said
    assert load(root).val_n.tolist() == [True, True, False, False]


def test_sizes_are_those_of_upright_pictures_and_copies_in_two_parts_are_said(tmp_path, capsys):
    root = tmp_path / "pictures"
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "test"):
        (root / part / "cat").mkdir(parents=True)
        Image.new("RGB", (300, 200)).save(root / part / "cat" / "1.jpg", exif=exif)
        Image.new("RGB", (301, 203)).save(root / part / "cat" / f"{part}.jpg", comment=part)
    found = by_file(indexed(root), "width", "height")
    assert found == {"1.jpg": ("200", "300"), "train.jpg": ("301", "203"), "test.jpg": ("301", "203")}
    assert "byte for byte in several of train, val and test: 1 picture" in capsys.readouterr().err


def test_names_that_a_table_cannot_hold_are_listed(tmp_path, capsys, load):
    root = tmp_path / "pictures"
    for part in ("train", "test"):
        for name in ("cat", "?dog", "e|l", "two, \"quoted\""):  # fmt: skip
            picture(root / part / name / "1.png")
        picture(root / part / "cat" / "line\nbreak.png")
        picture(root / part / "cat" / os.fsdecode(b"\xff.png"))
        picture(root / part / "cat" / " 1.png")
    rows = indexed(root)
    assert len(rows) == 6 and {row["labels"] for row in rows} == {"cat", 'two, "quoted"'}
    assert "left out 8 pictures: names that no table can hold" in capsys.readouterr().err
    assert len(load(root).targets_n) == 3


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_table_that_is_there_is_kept(tmp_path, capsys):
    root = with_lists(tmp_path / "nih")
    (root / "manifest.csv").write_text("by hand")
    assert "--overwrite" in refused(capsys, index.main([str(root), "--quiet"]))
    assert (root / "manifest.csv").read_text() == "by hand"
    assert index.main([str(root), "--quiet", "--out", str(tmp_path / "new" / "x.csv"), "--val_fraction", "0"]) == 0
    assert (tmp_path / "new" / "x.csv").read_text().startswith("file,labels")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "no pictures that can be indexed as folders"),
        (("--layout", "nih"), "no tables of --layout nih"),
        (("--layout", "nhi"), "invalid choice"),
        (("--sede", "3"), "Did you mean --seed"),
        (("--val_fraction", "1"), "below 1"),
        (("--val_fraction", "nan"), "below 1"),
        (("--val_fraction", "0.5", "--test_fraction", "0.5"), "leave nothing"),
        (("--workers", "0"), "--workers 0"),
        (("--seed", "9" * 30), "63 bits"),
    ],
)
def test_bad_input_is_a_line(tmp_path, capsys, flags, message):
    (tmp_path / "x").mkdir()
    assert message in refused(capsys, index.main([str(tmp_path / "x"), "--quiet", *flags]))
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Data_Entry_2017.csv", b"Image Index,Finding Labels\n", "no column 'Patient ID'"),
        ("Data_Entry_2017.csv", b"Image Index,Finding Labels,Patient ID\na.png,Mass\n", "line 2 .* 2 cells"),
        ("Data_Entry_2017.csv", b"Image Index,Finding Labels,Patient ID\n\xff\n", "UTF-8"),
        ("Data_Entry_2017.csv", b"", "no column 'Image Index'"),
        ("Data_Entry_2017.csv", b"Image Index,Finding Labels,Patient ID\na.png,Mass,1\n", "left out 1 picture"),
        ("train.csv", b"Path,Sex\n", "no column 'No Finding'"),
        ("mimic-cxr-2.0.0-chexpert.csv.gz", b"no gzip", "damaged"),
        ("mimic-cxr-2.0.0-chexpert.csv.gz", gzip.compress(b"subject_id\n" * 99, mtime=0)[:-12], "damaged"),
    ],
)
def test_damaged_tables_are_a_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        line = refused(capsys, index.main([".", "--quiet"]))
    assert re.search(message, line), line


def test_two_collections_in_a_folder_are_told_apart(tmp_path, capsys):
    root = with_lists(tmp_path / "x")
    (root / "train.csv").write_text(CHEXPERT_HEADER + "\n")
    assert "nih and chexpert: choose with --layout" in refused(capsys, index.main([str(root), "--quiet"]))
    assert len(indexed(root, "--layout", "nih", "--val_fraction", "0")) == 6


# ---- by patient --------------------------------------------------------------------------------------------------

PATIENTS = st.lists(
    st.tuples(st.integers(0, 30).map(str), st.sampled_from([None, "train", "val", "test"])), min_size=1, max_size=60
)
SHARES = st.tuples(st.floats(0, 0.5), st.floats(0, 0.49))


@given(PATIENTS, st.integers(0, 2**40), SHARES)
def test_a_patient_is_in_one_part(patients, seed, shares):
    entries = [Entry(f"{i}.png", (), (), patient, given) for i, (patient, given) in enumerate(patients)]
    left_out = LeftOut()
    kept = split(entries, seed, *shares, left_out)
    part_of = {}
    for entry, part in kept:
        assert part_of.setdefault(entry.patient, part) == part
    assert len(kept) + sum(map(len, left_out.names.values())) == len(entries)
    assert part_of.keys() == {patient for patient, _ in patients}  # nobody is lost
    if any(given == "test" for _, given in patients):  # what the source says is kept
        assert {entry.file for entry, part in kept if part == "test"} == {e.file for e in entries if e.split == "test"}


@given(st.lists(st.text(max_size=5), unique=True, min_size=1), st.integers(0, 2**62), SHARES, st.randoms())
def test_a_draw_is_a_function_of_the_patient_and_the_seed(patients, seed, shares, rng):
    parts_of = dict(zip(patients, draw(patients, seed, *shares), strict=True))
    some = rng.sample(patients, rng.randint(1, len(patients)))
    assert draw(some, seed, *shares) == [parts_of[patient] for patient in some]
    more = draw(patients, seed, shares[0] + 0.01, shares[1])
    assert all((part == "test") == (parts_of[p] == "test") for p, part in zip(patients, more, strict=True))


def test_the_shares_are_those_asked_for():
    found = draw([f"patient {i}" for i in range(20_000)], 0, 0.1, 0.2)
    assert abs(found.count("val") / 20_000 - 0.1) < 0.01 and abs(found.count("test") / 20_000 - 0.2) < 0.01
    assert draw(["patient 1", "patient 2", "patient 3"], 5, 0.3, 0.3) == ["test", "train", "train"]  # for ever the same


# ---- a whole run -------------------------------------------------------------------------------------------------


def test_a_run_on_an_indexed_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = random.Random(0)
    kinds = ("No Finding", "Mass", "Nodule", "Mass|Nodule")
    rows = [(f"{i // 2:08d}_{i % 2:03d}.png", rng.choice(kinds), str(i // 2)) for i in range(160)]
    root = nih(tmp_path / "nih", rows)
    found = by_file(indexed(root, "--val_fraction", "0.2", "--group", "column:View Position"), "split")
    assert len({part for part, in found.values()}) == 3
    words = ["--dataset_name", "imagefolder", "--dataset_path", root, "--partition", "natural", "--model", "mlp",
             "--epochs", "8", "--batch_size", "8", "--lr", "0.05", "--results_dir", tmp_path, "--run_name", "all",
             "--no-plots"]  # fmt: skip
    assert main.main([str(word) for word in words]) == 0
    record, summary = (read_json(tmp_path / "all" / "stage1" / f"{name}.json") for name in ("config", "summary"))
    assert record["owners"] == ["AP", "PA"] and summary["test_macro_auroc"] > 0.9
    assert list(summary["test_auroc_by_class"]) == ["Mass", "Nodule"]
    output = capsys.readouterr()
    assert "validation is on the rows that manifest.csv calls val" in output.out + output.err
