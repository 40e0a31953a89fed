"""Records of a run: exact round trips, torn lines, and writes that fail without harm."""

from __future__ import annotations

import ast
import errno
import json
import os
import resource
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import records
from utils.records import MetricsLog, Run, UsageError, read_json, write_json

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@contextmanager
def files_limited_to(size: int):
    """The kernel refuses to let a file grow past ``size`` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- JSON ---------------------------------------------------------------------------------------


@given(json_values)
@settings(max_examples=40, deadline=None)
def test_json_round_trip_is_exact(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    with mock.patch.object(os, "fsync"):  # slow, and nothing here depends on it
        write_json(path, {"value": value})
    assert repr(read_json(path)["value"]) == repr(value)  # repr: -0.0 is not 0.0, 1 is not 1.0


def test_json_takes_arrays_tensors_and_paths_and_writes_nan_as_null(tmp_path):
    path = tmp_path / "new" / "folder" / "x.json"
    third = np.float32(1) / 3
    write_json(path, {
        "nan": [float("nan"), float("inf"), np.float32("nan"), (1, -np.inf)],
        "array": np.array([[0.1, np.nan]]), "scalar": np.float64(0.1), "third": third, "flag": np.bool_(True),
        "tensor": torch.tensor([1, 2]), "path": Path("a/b"),
    })  # fmt: skip

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not strict JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "nan": [None, None, None, [1, None]], "array": [[0.1, None]], "scalar": 0.1, "third": float(third),
        "flag": True, "tensor": [1, 2], "path": "a/b",
    }  # fmt: skip


def test_json_has_a_line_for_each_key(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2], "b": {"c": None}})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [1, 2],\n  "b": {"c": null}\n}\n'


def test_missing_and_damaged_json_say_what_to_do(tmp_path):
    with pytest.raises(UsageError) as error:
        read_json(tmp_path / "config.json")
    assert "config.json" in one_line(error) and "check the path" in one_line(error)
    deep, twice = b"[" * 100_000, b'{"a": 1, "a": 2}'
    for content in (b'{"a": 1', b"", b"\xff\xfe\x00garbage", b'"config"', b"[1]", deep, twice, b'{"a": NaN}'):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UsageError) as error:
            read_json(tmp_path / "config.json")
        assert "is damaged" in one_line(error) and "--overwrite" in one_line(error)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")  # nobody writes to it
    with pytest.raises(UsageError, match="not a regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_write_leaves_the_previous_content(tmp_path, monkeypatch, broken):
    path = tmp_path / "summary.json"
    write_json(path, {"round": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(UsageError) as error:
        write_json(path, {"round": 2})
    expected = f"cannot write {path}: No space left on device; free some space or choose --results_dir"
    assert one_line(error) == expected
    assert read_json(path) == {"round": 1} and os.listdir(tmp_path) == ["summary.json"]


def test_a_disk_that_fills_up_midway_leaves_the_previous_partition(tmp_path):
    before = [np.arange(5), np.arange(5, 9)]
    records.write_partition(tmp_path, before)
    with (
        files_limited_to(4096),
        pytest.raises(UsageError, match="cannot write .*partition.npz: File too large"),
    ):
        records.write_partition(tmp_path, [np.arange(100_000)])
    for old, new in zip(before, records.read_partition(tmp_path), strict=True):
        np.testing.assert_array_equal(old, new)
    assert os.listdir(tmp_path) == ["partition.npz"]


def test_an_error_of_the_writer_itself_is_not_disguised(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"bad": object()})
    with pytest.raises(KeyboardInterrupt):
        records.write_atomically(tmp_path / "x.json", lambda file: (file.write(b"2"), interrupt()))
    assert read_json(tmp_path / "x.json") == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_results_folder_that_is_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "results").write_text("")
    target = tmp_path / "results" / "run"
    for write in (
        lambda: write_json(target / "config.json", {}),
        lambda: MetricsLog(target / "metrics.jsonl").append({"round": 0}),
        lambda: records.write_partition(target, []),
    ):
        with pytest.raises(UsageError) as error:
            write()
        assert "choose --results_dir" in one_line(error)


# ---- metrics lines ------------------------------------------------------------------------------


def test_metrics_round_trip(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    lines = [{"round": k, "loss": 0.1 * k, "worker_val_loss": [1 / 3, k / 7]} for k in range(3)]
    for line in lines:
        log.append(line)
        assert log.read()[-1] == line, "a line can be read as soon as it is appended"
    log.append({"round": 3, "loss": float("nan"), "worker_val_loss": np.array([np.nan, 1.0])})
    lines.append({"round": 3, "loss": None, "worker_val_loss": [None, 1.0]})
    assert log.read() == records.read_metrics(tmp_path / "run") == lines


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_torn_at_any_byte_is_read_cut_and_continued(tmp_path_factory, data):
    """Kill at any byte, resume from any round: the file is the one of a run that was never killed."""
    path = tmp_path_factory.getbasetemp() / "torn.jsonl"
    path.unlink(missing_ok=True)
    log = MetricsLog(path)
    rounds = data.draw(st.lists(st.integers(0, 30), unique=True, max_size=6).map(sorted))
    lines = [{"round": r, "loss": r / 3, "name": "\u2028é"} for r in rounds]
    for line in lines:
        log.append(line)
    content = path.read_bytes() if rounds else b""
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
    torn_at = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:torn_at])
    whole = lines[: int((ends <= torn_at).sum())]
    assert log.read() == whole

    if data.draw(st.booleans()):
        checkpoint = data.draw(st.integers(-1, 31))
        log.cut_after(checkpoint)
        whole = [line for line in whole if line["round"] <= checkpoint]
        assert path.read_bytes() == content[: ([0, *ends])[len(whole)]], "the kept lines keep their bytes"
        assert log.read() == whole
    log.append({"round": 99})
    assert log.read() == [*whole, {"round": 99}]


def test_cut_after_needs_no_file_and_leaves_an_uncut_file_alone(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.cut_after(3)
    assert not log.path.exists()
    log.append({"round": 3})
    inode = log.path.stat().st_ino
    log.cut_after(3)
    assert log.path.stat().st_ino == inode


def test_a_failing_cut_leaves_the_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for k in range(4):
        log.append({"round": k})
    before = log.path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
    with pytest.raises(UsageError, match="cannot write"):
        log.cut_after(1)
    assert log.path.read_bytes() == before


def test_a_full_disk_during_append_leaves_whole_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"round": 0, "text": "x" * 50})
    before = log.path.read_bytes()
    with (
        files_limited_to(len(before) + 10),
        pytest.raises(UsageError, match="cannot write .*free some space"),
    ):
        log.append({"round": 1, "text": "x" * 50})
    assert log.path.read_bytes() == before
    log.append({"round": 1})
    assert [line["round"] for line in log.read()] == [0, 1]


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = (b'{"round": null}', b'{"round": "1"}', b'{"round": true}', b'{"round": 1, "round": 2}', b"[" * 100_000)
    for middle in (b'{"round": 1, "lo', b"\x00\x00", b"[]", b'{"epoch": 1}', *odd):
        path.write_bytes(b'{"round": 0}\n' + middle + b'\n{"round": 2}\n')
        for use in (MetricsLog(path).read, lambda: MetricsLog(path).cut_after(0)):
            with pytest.raises(UsageError) as error:
                use()
            assert "line 2" in one_line(error)
    path.write_bytes(b'{"round": 0}\n\x00\x00\x00\n')
    assert MetricsLog(path).read() == [{"round": 0}]
    with pytest.raises(UsageError, match="cannot read"):
        MetricsLog(tmp_path / "nothing.jsonl").read()


# ---- partition, labels, Run ---------------------------------------------------------------------


def test_partition_and_labels_round_trip(tmp_path):
    shards = [np.array([5, 3, 9]), np.array([], dtype=int), *(np.array([k]) for k in range(10, 22))]
    records.write_partition(tmp_path, shards)
    read = records.read_partition(tmp_path)
    assert [ids.tolist() for ids in read] == [ids.tolist() for ids in shards]
    assert all(ids.dtype == np.int64 for ids in read)
    with np.load(tmp_path / "partition.npz", allow_pickle=False) as arrays:
        assert arrays.files[:2] == ["worker_0000", "worker_0001"]
    records.write_labels(tmp_path, np.array([1, 0, 1]), ["cat", "été"])
    labels_n, names = records.read_labels(tmp_path)
    assert labels_n.tolist() == [1, 0, 1] and names == ["cat", "été"]


def test_sources_round_trip_and_old_runs_have_none(tmp_path):
    assert records.read_sources(tmp_path) is None
    names = ["train/é/0.png", "train 1", "", "  x \x85\u2028y"]
    records.write_sources(tmp_path, names)
    assert records.read_sources(tmp_path) == names
    (tmp_path / "sources.txt").write_bytes(b"\xff\n")
    with pytest.raises(UsageError, match="sources.txt is damaged"):
        records.read_sources(tmp_path)


def test_damaged_or_pickled_arrays_are_refused(tmp_path):
    path = tmp_path / "partition.npz"
    with pytest.raises(UsageError, match="cannot read"):
        records.read_partition(tmp_path)
    records.write_partition(tmp_path, [np.arange(100)])
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 1
    for content in (b"", b"not a zip", intact[: len(intact) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UsageError) as error:
            records.read_partition(tmp_path)
        assert "is damaged" in one_line(error)
    np.savez(path, worker_0000=np.array([print], dtype=object))
    with pytest.raises(UsageError, match="damaged .*pickle"):
        records.read_partition(tmp_path)
    np.savez(path, worker_0001=np.arange(3))
    with pytest.raises(UsageError, match="'worker_0000' is missing"):
        records.read_partition(tmp_path)


def test_arrays_of_another_kind_or_size_are_refused(tmp_path):
    path = tmp_path / "partition.npz"
    for odd in (np.arange(3.0), np.arange(4).reshape(2, 2), np.array(["a"]), np.array([(1, 2)], "i8, i8"), np.array(1)):
        np.savez(path, worker_0000=np.arange(2), worker_0001=odd)
        with pytest.raises(UsageError, match="damaged .'worker_0001' is missing or is no list of int64"):
            records.read_partition(tmp_path)
    np.savez_compressed(path, worker_0000=np.zeros(10**6, np.int64))  # a bomb would unpack to terabytes
    with pytest.raises(UsageError, match="damaged .*compressed"):
        records.read_partition(tmp_path)
    np.save(tmp_path / "ids.npy", np.arange(30))
    ids = (tmp_path / "ids.npy").read_bytes()
    claims_terabytes = ids.replace(b"(30,), }" + b" " * 12, b"(30" + b"0" * 12 + b",), }")
    assert claims_terabytes != ids
    for name, content in ("worker_0000", b"text"), ("worker_0000.npy", b"text"), ("worker_0000.npy", claims_terabytes):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(UsageError, match="damaged") as error:
            records.read_partition(tmp_path)
        one_line(error)
    for labels in ({"labels": np.arange(3)}, {"labels": np.arange(3.0), "class_names": ["a"]},
                   {"labels": np.arange(3), "class_names": [1, 2]}):  # fmt: skip
        np.savez(tmp_path / "labels.npz", **labels)
        with pytest.raises(UsageError, match="damaged .'(labels|class_names)' is missing or"):
            records.read_labels(tmp_path)


def test_run_reads_each_record_when_asked(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null", "a\0b", "\ud800"):
        with pytest.raises(UsageError, match="results/NAME/stage1"):
            Run(path)
    MetricsLog(tmp_path / "metrics.jsonl").append({"round": 0})
    run = Run(tmp_path)
    assert run.metrics == [{"round": 0}] and run.labels is None and not run.has("summary.json")
    with pytest.raises(UsageError, match="summary.json"):
        _ = run.summary
    for name in ("config", "summary"):
        write_json(tmp_path / f"{name}.json", {"name": name})
        assert getattr(run, name) == {"name": name}
    write_json(tmp_path / "topology.json", {"mode": "ring", "num_workers": 1})
    with pytest.raises(UsageError, match="topology.json is damaged .*no 'matrices'"):
        _ = run.topology
    write_json(tmp_path / "topology.json", {"mode": "ring", "num_workers": 1, "matrices": []})
    assert run.topology["num_workers"] == 1
    records.write_partition(tmp_path, [np.arange(2)])
    records.write_labels(tmp_path, np.arange(2), "ab")
    assert run.partition[0].tolist() == [0, 1]
    assert Run(tmp_path).labels[1] == ["a", "b"]


def test_records_is_a_leaf():
    def imported(nodes) -> set[str]:
        nodes = list(nodes)
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}

    tree = ast.parse(Path(records.__file__).read_text())
    assert imported(ast.walk(tree)) == {"numpy", "utils.errors", "utils.files"}
