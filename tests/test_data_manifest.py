"""manifest.csv in a folder of pictures: labels, owners and split from a table; what is refused, and whole runs."""

import os
import random
from functools import partial

import pytest
import torch
from command import load as read_json
from command import refused, train
from PIL import Image

import main
from data.dataset_loader import data_differences, load_dataset, validation_split
from data.multilabel import UNKNOWN
from utils.errors import UsageError

CATS = ("file,labels,group,split", "a/1.png,cat,anna,train", "b/2.png,dog,ben,train", "3.png,dog,anna,train",
        "a/4.png,cat,,test", "b/5.png,dog,,test")  # fmt: skip
FINDINGS = ("file,labels,split", "a/1.png,cat|dog,train", "b/2.png,,train", "3.png,?cat|dog|eel,train",
            "a/4.png,?eel,test", "b/5.png,eel|?dog|cat,test")  # fmt: skip


@pytest.fixture
def load(tmp_path):
    return partial(load_dataset, "imagefolder", tmp_path / "pictures", cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def write(tmp_path):
    """A function that writes a manifest (lines, or bytes), beside five pictures whose value is their number."""
    root = tmp_path / "pictures"
    for file in ("a/1.png", "b/2.png", "3.png", "a/4.png", "b/5.png"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 6), int(file[-5])).save(root / file)

    def manifest(lines):
        content = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        (root / "manifest.csv").write_bytes(content)
        return root

    return manifest


def said(load) -> str:
    with pytest.raises(UsageError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_label_in_every_row_is_a_classification(write, load):
    write(CATS)
    for _ in ("decoded", "from the cache"):
        data = load()
        assert data.task.kind == "classification" and data.task.names == ("cat", "dog")
        assert data.inputs_n[:, 0, 0, 0].tolist() == [1, 2, 3] and data.test_inputs_m[:, 0, 0, 0].tolist() == [4, 5]
        assert data.targets_n.tolist() == [0, 1, 1] and data.test_targets_m.tolist() == [0, 1]
        assert data.sources == ("a/1.png", "b/2.png", "3.png")
        assert data.owners.names == ("anna", "ben") and data.owners.owner_n.tolist() == [0, 1, 0]
        assert data.skipped == data.notes == ()


def test_owners_of_test_rows_are_known_where_all_of_them_train(write, load):
    write((*CATS[:4], "a/4.png,cat,ben,test", "b/5.png,dog,anna,test"))
    for _ in ("decoded", "from the cache"):
        assert load().owners.test_owner_m.tolist() == [1, 0]
    for other in ("", "eve"):
        write((*CATS[:4], "a/4.png,cat,ben,test", f"b/5.png,dog,{other},test"))
        assert load().owners.test_owner_m is None


def test_anything_else_is_findings(write, load):
    write(FINDINGS)
    data = load()
    assert data.task.kind == "multilabel" and data.task.names == ("cat", "dog", "eel")
    assert data.targets_n.tolist() == [[1, 1, 0], [0, 0, 0], [UNKNOWN, 1, 1]] and data.targets_n.dtype == torch.uint8
    assert data.test_targets_m.tolist() == [[0, 0, UNKNOWN], [1, UNKNOWN, 1]]
    assert data.owners is None


@pytest.mark.parametrize(("labels", "target"), [("?cat", UNKNOWN), ("", 0)])
def test_one_row_without_its_one_label_makes_them_findings(write, load, labels, target):
    write((CATS[0], f"a/1.png,{labels},anna,train", CATS[2], "3.png,cat,anna,train", *CATS[4:]))
    data = load()
    assert data.task.kind == "multilabel"
    assert data.targets_n.tolist() == [[target, 0], [0, 1], [1, 0]]


def test_spreadsheets_write_it_in_many_ways(write, load):
    """A byte order mark, quotes, spaces, other line ends, capitals, another order of columns, lines left empty."""
    write(b'\xef\xbb\xbfSplit, Group ,file,labels\r\n\r\n"Train",anna,./a/1.png, cat | dog \r\n'
          b'train,"ben, jr.",b//2.png,"two\nlines"\r\n,,,\r\ntest,,a/4.png,cat\r\n')  # fmt: skip
    data = load()
    assert data.task.names == ("cat", "dog", "two lines")
    assert data.targets_n.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert data.owners.names == ("anna", "ben, jr.")
    assert data.sources == ("a/1.png", "b/2.png")


def test_what_a_run_should_know_is_said_at_every_start(write, load):
    write((*CATS[:3], CATS[4], "b/5.png,dog,ben,test"))
    for _ in ("decoded", "from the cache"):
        data = load()
        assert data.skipped == ("1 picture that manifest.csv does not name (3.png)",)
        assert data.notes == (
            "1 owner has pictures in train and in test, which may flatter the test figures (ben)",
        )


def test_rows_for_validation_are_those_that_the_table_names(write, load):
    write((*CATS[:3], "3.png,dog,anna,val", *CATS[4:]))
    for _ in ("decoded", "from the cache"):
        data = load()
        assert data.inputs_n[:, 0, 0, 0].tolist() == [1, 2, 3] and data.val_n.tolist() == [False, False, True]
        assert [ids.tolist() for ids in validation_split(data, 0.5, seed=3)] == [[0, 1], [2]]
        assert data.notes == ("validation is on the rows that manifest.csv calls val (1), whatever --val_fraction is",)
    first = data.fingerprint
    write((CATS[0], "a/1.png,cat,anna,train", "b/2.png,dog,ben,val", "3.png,dog,anna,train", *CATS[4:]))
    assert data_differences(first, load().fingerprint) == "another validation"


def test_what_data_index_adds_is_not_read(write, load):
    write(CATS)
    plain = load()
    write((f"width,{CATS[0]},sha256,height", *(f"6,{row},0,6" for row in CATS[1:])))
    assert load().fingerprint == plain.fingerprint and "validation" not in plain.fingerprint


def test_the_cache_notices_another_manifest(write, load):
    root = write(CATS)
    file = root / "manifest.csv"
    assert load().targets_n.tolist() == [0, 1, 1]
    times = os.stat(file)
    write((*CATS[:3], "3.png,cat,anna,train", *CATS[4:]))  # as long, and written at the same time
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load().targets_n.tolist() == [0, 1, 0]
    first = load().fingerprint
    write((*CATS[:3], "3.png,cat,ben,train", *CATS[4:]))
    again = load()
    assert again.owners.owner_n.tolist() == [0, 1, 1] and again.fingerprint != first  # other owners are other data


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "'file' is missing"),
        (("file,split", "3.png,train"), "'labels' is missing"),
        (("file;labels;split",), "'file;labels;split' is unknown"),
        (("file,labels,split,weight",), "'weight' is unknown"),
        (("file,labels,split,file",), "'file' is unknown or there twice"),
        (CATS[:4], "no row with 'test'"),
        ((CATS[0], *CATS[4:]), "no row with 'train'"),
        ((*CATS, "6.png,cat,anna,train", "7.png,cat,anna,train"), r"line 7 .*'6.png' in the folder \(2 of 7"),
        ((*CATS, "a,cat,anna,train"), "no regular file 'a'"),
        ((*CATS, "a/pipe.png,cat,anna,train"), "no regular file 'a/pipe.png'"),
        ((*CATS, "a\0.png,cat,anna,train"), "no regular file"),
        ((*CATS, "a/1.png,cat,anna,train"), "line 7 .*'a/1.png' is in line 2 already"),
        ((*CATS, "./a//1.png,dog,anna,test"), "'a/1.png' is in line 2 already"),
        ((*CATS, "/etc/passwd,cat,anna,train"), "no path inside the folder"),
        ((*CATS, "a/../../1.png,cat,anna,train"), "no path inside the folder"),
        ((*CATS, ",cat,anna,train"), "'' is no path"),
        ((*CATS, ".git/1.png,cat,anna,train"), "hidden"),
        ((*CATS, "a/1.png,cat,train"), "3 cells, and there are 4 columns"),
        ((*CATS, "a/1.png,cat,anna,valid"), "split is 'valid'"),
        ((CATS[0], "a/1.png,cat,anna,val", "b/2.png,dog,ben,val", *CATS[4:]), "no row with 'train'"),
        ((*CATS[:3], "3.png,eel,anna,val", *CATS[4:]), "no training row has the label 'eel'"),
        ((*CATS[:3], "3.png,dog,,val", *CATS[4:]), "line 4 .* has no group"),
        ((*CATS, "a/1.png,cat||dog,anna,train"), "an empty label in 'cat||dog'"),
        ((*CATS, "a/1.png,?,anna,train"), "an empty label"),
        ((*CATS, "a/1.png,cat|?cat,anna,train"), "twice in"),
        ((*CATS[:-1], "b/5.png,eel,,test"), "no training row has the label 'eel'"),
        ((*CATS[:3], "3.png,dog|?eel,anna,train", *CATS[4:]), "no training row has the label 'eel'"),
        (("file,labels,split", "3.png,,train", "a/4.png,,test"), "no row has a label"),
        ((*CATS[:3], "3.png,dog,,train", *CATS[4:]), "line 4 .* has no group"),
        ("file,labels,split\n3.png,chât,train\n".encode("latin-1"), "UTF-8"),
        ("file,labels,split\n3.png,cat,train\n".encode("utf-16"), "UTF-8"),
        (b'file,labels,split\n3.png,"cat,train\n', "no CSV text"),
        (b"file,labels,split\n3.png," + b"x" * 200_000 + b",train\n", "no CSV text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_right_is_refused_in_one_line(write, load, lines, message):
    root = write(lines)
    os.mkfifo(root / "a" / "pipe.png")  # opened, it would wait for a writer for ever
    with pytest.raises(UsageError, match=message):
        load()
    assert str(root / "manifest.csv") in said(load)


def test_a_manifest_that_is_no_file_is_refused(write, load):
    root = write(CATS)
    (root / "manifest.csv").unlink()
    os.mkfifo(root / "manifest.csv")
    assert "not a regular file" in said(load)
    (root / "manifest.csv").unlink()
    (root / "manifest.csv").symlink_to("nowhere")
    assert "manifest.csv" in said(load)


def test_any_bytes_are_read_or_refused(write, load):
    whole = "\n".join(CATS).encode()
    rng = random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.choice(b'\x00\n\r",|?./\xff\xc3a')
        write(bytes(content[: rng.choice((len(content), rng.randrange(len(content))))]))
        try:
            load()
        except UsageError as error:
            assert "\n" not in str(error)


# ---- whole runs --------------------------------------------------------------------------------------------------


def owned_pictures(root, count=160):
    """Pictures that are bright or not, and brighter on the left or not, of three owners; some findings unknown."""
    rng, lines = random.Random(0), ["file,labels,group,split"]
    root.mkdir()
    for i in range(count):
        bright, left = rng.random() < 0.5, rng.random() < 0.5
        picture = Image.new("L", (8, 8), 40 + 90 * bright)
        picture.paste(90 + 100 * bright if left else 30, (0, 0, 4, 8))
        picture.save(root / f"{i}.png")
        names = ("?" * (rng.random() < 0.1) + name for name, there in (("bright", bright), ("left", left)) if there)
        lines.append(f"{i}.png,{'|'.join(names)},owner {i % 3},{'test' if i % 4 == 3 else 'train'}")
    (root / "manifest.csv").write_text("\n".join(lines))
    return root


RUN = ("--dataset_name", "imagefolder", "--epochs", "6", "--batch_size", "8", "--lr", "0.05")


def test_a_run_over_owners_prints_macro_auroc(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = owned_pictures(tmp_path / "pictures")
    flags = (*RUN, "--dataset_path", root, "--partition", "natural")
    words = [str(word) for word in (*flags, "--model", "mlp", "--results_dir", tmp_path, "--run_name", "all")]
    assert main.main([*words, "--no-plots"]) == 0  # as many workers as owners
    output = capsys.readouterr()
    assert "3 owners have pictures in train and in test" in output.out + output.err
    record, summary = (read_json(tmp_path / "all" / "stage1" / f"{name}.json") for name in ("config", "summary"))
    assert record["owners"] == ["owner 0", "owner 1", "owner 2"]
    assert summary["test_macro_auroc"] > 0.9
    assert f"test macro AUROC of the consensus model {summary['test_macro_auroc']:.4f}" in output.out
    assert list(summary["test_auroc_by_class"]) == ["bright", "left"]
    two = read_json(train(tmp_path, *flags, "--num_workers", "2", name="two") / "config.json")
    assert two["owners"] == ["owner 0", "owner 1"] and two["task"]["metrics"][0]["name"] == "macro_auroc"


def test_natural_shards_without_owners_are_refused(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write(FINDINGS)
    words = ["--dataset_name", "imagefolder", "--dataset_path", str(root), "--partition", "natural"]
    assert "does not say who owns" in refused(capsys, main.main([*words, "--results_dir", str(tmp_path / "results")]))
