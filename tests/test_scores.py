"""Scores: on disk, back to the bit or refused in one line, whatever happened to their files; and what they keep."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.scores import keep_best
from utils.errors import UsageError
from utils.scores import read_scores, write_scores

RNG = np.random.default_rng(0)
ARRAYS = {"scores": RNG.standard_normal(40), "sample_id": np.arange(40) * 3, "worker": np.arange(40) % 4}
SETTINGS = {"method": "dice", "options": {"dice_hops": 2}, "run": {"lr": 0.1 + 0.2, "run_name": None}, "rounds": 6}


@pytest.fixture
def path(tmp_path):
    """Sound scores."""
    write_scores(tmp_path / "dice.zarr", ARRAYS, SETTINGS)
    return tmp_path / "dice.zarr"


def refusal(path) -> str:
    """The line that damaged scores are refused with."""
    with pytest.raises(UsageError, match="damaged") as error:
        read_scores(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def files_of(path):
    files = sorted(p for p in path.rglob("*") if p.is_file())
    assert len(files) == 7  # zarr.json of the group; of each array zarr.json and a chunk
    return files


def test_scores_come_back_as_written(path):
    np.testing.assert_equal(read_scores(path), {**ARRAYS, "settings": SETTINGS})
    np.testing.assert_equal(read_scores(str(path)), read_scores(path))
    assert [read_scores(path)[k].dtype for k in ("scores", "sample_id", "worker")] == [np.float64, np.int64, np.int64]


def test_new_scores_take_the_place_of_old_ones(path):
    write_scores(path, {name: array[:5] for name, array in ARRAYS.items()}, {"method": "if"})
    assert read_scores(path)["settings"] == {"method": "if"} and len(read_scores(path)["worker"]) == 5
    assert list(path.parent.iterdir()) == [path]


def test_missing_scores(tmp_path):
    (tmp_path / "file.zarr").write_text("")
    for name in ("none.zarr", "file.zarr"):
        with pytest.raises(UsageError, match="no scores at .*--stage 2"):
            read_scores(tmp_path / name)


def test_a_file_that_is_gone_or_cut_off_is_noticed(path):
    """zarr itself reads a missing chunk as zeros."""
    for file in files_of(path):
        content = file.read_bytes()
        file.unlink()
        refusal(path)
        for length in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            refusal(path)
        file.write_bytes(content)
    read_scores(path)


def test_a_flipped_bit_is_noticed_or_harmless(path):
    noticed = 0
    for file in RNG.choice(files_of(path), 300):
        content = bytearray(file.read_bytes())
        bit = int(RNG.integers(8 * len(content)))
        content[bit // 8] ^= 1 << bit % 8
        sound = file.read_bytes()
        file.write_bytes(content)
        try:
            np.testing.assert_equal(read_scores(path), {**ARRAYS, "settings": SETTINGS})
        except UsageError as error:
            noticed += 1
            assert "\n" not in str(error)
        file.write_bytes(sound)
    assert noticed > 150  # the rest hits names and blanks that zarr does not read


def test_changed_settings_and_foreign_arrays_are_noticed(path):
    group = path / "zarr.json"
    group.write_text(group.read_text().replace('"dice_hops": 2', '"dice_hops": 3'))
    assert "digest" in refusal(path)
    write_scores(path, ARRAYS, SETTINGS)
    shutil.rmtree(path / "worker")
    shutil.copytree(path / "sample_id", path / "worker")
    assert "digest" in refusal(path)


# ---- what is kept ---------------------------------------------------------------------------------------------


@st.composite
def scored(draw):
    """Scores of samples, some tied, and their workers (-1: not in training)."""
    n = draw(st.integers(4, 60))
    workers = draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n).filter(lambda w: max(w) >= 0))
    scores = draw(st.lists(st.integers(-5, 5).map(lambda v: v / 3), min_size=n, max_size=n))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(workers), draw(st.floats(0.01, 1.0))


@settings(max_examples=150, deadline=None)
@given(scored(), st.sampled_from(["worker", "global"]))
def test_keep_best(case, scope):
    scores_n, worker_n, ratio = case
    held = set((worker_n >= 0).nonzero()[:, 0].tolist())
    counts = {k: int((worker_n == k).sum()) for k in worker_n.unique().tolist() if k >= 0}
    try:
        kept = keep_best(scores_n, worker_n, ratio, scope).tolist()
    except UsageError:
        assert scope == "worker" and any(round(ratio * c) == 0 for c in counts.values())
        return
    assert kept == sorted(set(kept)) and set(kept) <= held
    left = {k: sum(worker_n[kept] == k).item() for k in counts}
    assert all(left.values())  # no worker is emptied
    if scope == "worker":
        assert left == {k: round(ratio * c) for k, c in counts.items()}
        groups = [[i for i in held if worker_n[i] == k] for k in counts]
    else:
        assert len(kept) == max(round(ratio * len(held)), len(counts))
        # A worker's one sample that must stay may be worse than what others lose.
        groups = [[i for i in held if i not in kept or left[worker_n[i].item()] > 1]]
    for group in groups:
        inside = [scores_n[i].item() for i in group if i in kept]
        outside = [scores_n[i].item() for i in group if i not in kept]
        assert not inside or not outside or min(inside) >= max(outside)


def test_keep_best_stored_values():
    scores_n = torch.tensor([0.5, 0.1, 0.9, 0.1, 0.7, -1.0, 0.2, 0.3], dtype=torch.float64)
    worker_n = torch.tensor([0, 0, 0, 0, 1, 1, 1, -1])
    assert keep_best(scores_n, worker_n, 0.5).tolist() == [0, 2, 4, 6]
    assert keep_best(scores_n, worker_n, 0.75).tolist() == [0, 1, 2, 4, 6]  # of equals the first
    assert keep_best(scores_n, worker_n, 0.3, "global").tolist() == [2, 4]
    assert keep_best(scores_n, worker_n, 1.0).tolist() == [0, 1, 2, 3, 4, 5, 6]
