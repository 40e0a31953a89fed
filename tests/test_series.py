"""Time series: windows, owners and places against plain loops; CSV files and what is wrong with them; the air data."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch
from command import load, same_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

import main
import main_pruned
from data.arrays import ReadOptions
from data.dataset_loader import load_dataset, validation_split
from data.series import EARTH_KM, MOST_GAPS, windows
from training.deal import with_workers
from utils.args import Config
from utils.errors import UsageError

DAY = 86_400.0
COLUMN = {"value": 0, "known": 1}  # of a window


def made(values_DS: np.ndarray, T: int, H: int, **settings):
    """Windows of sites without dates and places."""
    return windows("made", [f"s{s}" for s in range(values_DS.shape[1])], values_DS[..., None], None, None, False,
                   ReadOptions(history=T, horizon=H), **settings)  # fmt: skip


# ---- windows -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(60, 90), st.floats(0, 0.4),
    st.integers(0, 2**20), st.floats(0.05, 0.4),
)  # fmt: skip
def test_windows_are_those_of_a_loop_and_never_reach_over(T, H, S, D, missing, seed, fraction):
    """Every value is its site and time, so that a window tells what it has seen."""
    rng = np.random.default_rng(seed)
    values_DS = np.arange(D)[:, None] + 1000.0 * np.arange(S)
    values_DS = np.where(rng.random((D, S)) < missing, np.nan, values_DS).astype(np.float32)
    cut = int(0.75 * D)
    expected = {False: [], True: []}
    for s in range(S):
        for now in range(D):
            shown, ahead = range(now - T + 1, now + 1), range(now + 1, now + H + 1)
            parts = ((False, 0, cut), (True, cut, D))
            inside = [test for test, low, high in parts if low <= shown[0] < ahead[-1] < high]
            gaps = sum(math.isnan(values_DS[d, s]) for d in shown if 0 <= d < D)
            if inside and gaps <= min(MOST_GAPS, T - 1) and not any(math.isnan(values_DS[d, s]) for d in ahead):
                expected[inside[0]].append((s, now))
    if not expected[False] or not expected[True]:
        with pytest.raises(UsageError, match="no window"):
            made(values_DS, T, H)
        return
    arrays = made(values_DS, T, H)
    assert list(zip(arrays.owners.owner_n.tolist(), arrays.order_n.tolist(), strict=True)) == expected[False]
    assert arrays.owners.test_owner_m.tolist() == [s for s, _ in expected[True]]
    for pairs, inputs, targets in (
        (expected[False], arrays.inputs_n, arrays.targets_n),
        (expected[True], arrays.test_inputs_m, arrays.test_targets_m),
    ):
        for (s, now), shown_TF, (ahead_H, stays_H) in zip(pairs, inputs.numpy(), targets.numpy(), strict=True):
            np.testing.assert_array_equal(shown_TF[:, COLUMN["value"]], values_DS[now - T + 1 : now + 1, s])
            np.testing.assert_array_equal(shown_TF[:, COLUMN["known"]], np.isfinite(shown_TF[:, COLUMN["value"]]))
            np.testing.assert_array_equal(ahead_H, values_DS[now + 1 : now + H + 1, s])
            known = shown_TF[np.isfinite(shown_TF[:, 0]), 0]
            assert (stays_H == known[-1]).all()
    try:
        train_ids, val_ids = validation_split(arrays, fraction, seed)
    except UsageError:
        return
    order_n = arrays.order_n
    assert order_n[train_ids].max() + H < order_n[val_ids].min() - T + 1  # not one day is in both
    assert order_n[val_ids].max() + H < cut
    assert len(val_ids) >= int(fraction * len(order_n))


def test_too_short_a_series_is_refused():
    with pytest.raises(UsageError, match=r"20 steps of time are too few for windows of 5 \+ 3: lower --history"):
        made(np.ones((20, 1), np.float32), 5, 3)
    with pytest.raises(UsageError, match="no window of 5 . 3 steps for training has 2 gaps at most"):
        made(np.where(np.arange(80)[:, None] < 60, np.nan, 1).astype(np.float32), 5, 3)


@pytest.mark.parametrize(("step", "features"), [(DAY, 2), (3600.0, 4)])
def test_the_calendar_is_that_of_the_step(step, features):
    seconds_D = 1_000_000_000 + step * np.arange(60)
    arrays = windows("made", ["a"], np.arange(60, dtype=np.float32)[:, None, None], seconds_D, None, False,
                     ReadOptions(history=4, horizon=1))  # fmt: skip
    assert arrays.inputs_n.shape[2] == 2 + features
    for shown_TF, now in zip(arrays.inputs_n.numpy(), arrays.order_n.tolist(), strict=True):
        for k, period in enumerate([365.2425 * DAY, DAY][: features // 2]):
            angle_T = 2 * np.pi * (seconds_D[now - 3 : now + 1] % period) / period
            np.testing.assert_allclose(shown_TF[:, 2 + 2 * k], np.sin(angle_T), atol=1e-5)
            np.testing.assert_allclose(shown_TF[:, 3 + 2 * k], np.cos(angle_T), atol=1e-5)


def test_what_stays_has_skill_0():
    rng = np.random.default_rng(0)
    arrays = made(rng.normal(20, 5, (120, 3)).astype(np.float32), 5, 2)
    targets = arrays.task.encoded(arrays.test_targets_m)
    measured = arrays.task.of_outputs(targets[:, 1][None], targets)
    assert measured["skill"].item() == pytest.approx(0, abs=1e-6)
    error = arrays.test_targets_m[:, 1] - arrays.test_targets_m[:, 0]
    assert measured["rmse"].item() == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)


# ---- files -------------------------------------------------------------------------------------------------------


def site(folder, name: str, lines: list[str]) -> None:
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


def daily(count: int = 80, first: int = 0) -> list[str]:
    start = np.datetime64("2003-12-24")
    return [f"{start + d},{d},{d / 2}" for d in range(first, first + count)]


HEAD = "day,pm,wind"


def read(folder):
    return load_dataset("timeseries", folder, cache_dir=folder.parent / "cache", history=4, horizon=2)


def test_files_are_read_onto_one_grid(tmp_path):
    """A byte order mark, lines in any order, missing lines and values, and sites that begin later."""
    folder = tmp_path / "sites"
    folder.mkdir()
    lines = daily()
    del lines[30]
    lines[40] = lines[40].split(",")[0] + ",NA, 1"
    (folder / "b.csv").write_bytes("\ufeff".encode() + "\r\n".join([HEAD, "", *lines[::-1], ""]).encode())
    site(folder, "a", [HEAD, *daily(60, first=20)])
    arrays = read(folder)
    assert arrays.owners.names == ("a", "b") and arrays.inputs_n.shape[1:] == (4, 5)
    assert arrays.sources[0] == "a 2004-01-14"  # two gaps and the first two days that a has
    own = arrays.order_n[arrays.owners.owner_n == 1].tolist()
    assert own == [d for d in range(3, 58) if not {d + 1, d + 2} & {30, 41}]
    pm_T, wind_T, known_T = arrays.inputs_n[arrays.owners.owner_n == 1][own.index(31), :, :3].nan_to_num(-1).unbind(1)
    assert pm_T.tolist() == [28, 29, -1, 31] and wind_T.tolist() == [14, 14.5, -1, 15.5]
    assert known_T.tolist() == [1, 1, 0, 1]
    assert arrays.owners.positions_GX is None
    again = read(folder)  # from the cache
    for key in ("inputs_n", "targets_n", "test_inputs_m", "test_targets_m", "order_n"):
        torch.testing.assert_close(getattr(again, key), getattr(arrays, key), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again.owners.test_owner_m, arrays.owners.test_owner_m) and again.sources == arrays.sources
    assert again.fingerprint == arrays.fingerprint and again.gap == arrays.gap == 6


@pytest.mark.parametrize(
    ("times", "features", "first"),
    [
        ([f"{d}" for d in range(80)], 3, "a step 3"),  # numbers have no calendar
        ([f"{np.datetime64('2003-12-24') + d}".replace("-", "") for d in range(80)], 5, "a 2003-12-27"),
        ([f"{np.datetime64('2003-12-24T00:00') + 30 * d}Z" for d in range(80)], 7, "a 2003-12-24T01:30:00"),
        ([f"{np.datetime64('2003-12-24T00:00') + 1440 * d + d % 9 // 8}" for d in range(80)], 5, "a 2003-12-27"),
    ],
    ids=["numbers", "compact dates", "half hours", "a clock a minute off"],
)  # fmt: skip
def test_times(tmp_path, times, features, first):
    folder = tmp_path / "sites"
    folder.mkdir()
    site(folder, "a", [HEAD, *(f"{time},{d},1" for d, time in enumerate(times))])
    arrays = read(folder)
    assert arrays.inputs_n.shape[2] == features and arrays.sources[0].startswith(first)
    assert len(arrays.inputs_n) == 60 - 5 and len(arrays.test_inputs_m) == 20 - 5


def changed(number: int, line: str) -> list[str]:
    lines = [HEAD, *daily()]
    lines[number - 1] = line
    return lines


WRONG = {
    "no number": ({"b": changed(7, "2003-12-29,n/a,1")}, r"b\.csv, line 7: 'n/a' is no number"),
    "infinite": ({"b": changed(7, "2003-12-29,1e39,1")}, r"b\.csv, line 7: '1e39' is no number"),
    "no time": ({"b": changed(7, "24.12.2003,1,1")}, r"b\.csv, line 7: '24.12.2003' is no time: give dates as"),
    "no day": ({"b": changed(7, "2003-02-30,1,1")}, r"b\.csv, line 7: '2003-02-30' is no time"),
    "time that is none": ({"b": changed(7, "nan,1,1")}, r"b\.csv, line 7: 'nan' is no time"),
    "columns short": ({"b": changed(7, "2003-12-29,1")}, r"b\.csv, line 7: 2 columns; the first line has 3"),
    "time twice": ({"b": changed(7, "2003-12-28,1,1")}, r"b\.csv, line 7: the same time as in line 6"),
    "between steps": (
        {"b": changed(7, "2003-12-29T12:00,1,1")},
        r"b\.csv, line 7: the time lies between steps of 86400 s",
    ),
    "dates and numbers": ({"b": changed(7, "12,1,1")}, r"b\.csv, line 7: dates and numbers"),
    "a wrong century": ({"b": changed(81, "9999-12-29,1,1")}, "no window of 4 . 2 steps"),
    "months": (
        {"a": [HEAD, *(f"{np.datetime64('2001-01') + m}-01,1,1" for m in range(80))]},
        r"a\.csv, line \d+: .*number months",
    ),
    "other columns": (
        {"b": ["day,pm,rain", *daily()]},
        r"b\.csv has the columns day, pm, rain, and a\.csv has day, pm, wind",
    ),
    "numbers elsewhere": ({"b": [HEAD, *(f"{d},1,1" for d in range(80))]}, r"b\.csv and a\.csv: dates in one"),
    "empty": ({"b": []}, r"b\.csv needs a line of names"),
    "no values": ({"b": ["day", "2003-12-24"]}, r"b\.csv needs a line of names"),
    "bytes": ({"b": b"\xff\xfe\x00d"}, r"b\.csv is no CSV text in UTF-8"),
    "places without names": (
        {"positions": ["a,1,2"]},
        r"positions\.csv must begin with a line 'site,longitude,latitude'",
    ),
    "no place": ({"positions": ["site,x,y", "b,1,2"]}, r"positions\.csv does not say where a is"),
    "two places": ({"positions": ["site,x,y", "a,1,2", "a,1,3"]}, r"positions\.csv, line 3: a is there already"),
    "place of one number": ({"positions": ["site,x,y", "a,1"]}, r"positions\.csv, line 2: it must be a site and two"),
    "degrees": (
        {"positions": ["site,longitude,latitude", "a,1,91"]},
        r"positions\.csv, line 2: 1, 91 is no longitude and",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line_with_file_and_line(tmp_path, what):
    files, said = WRONG[what]
    folder = tmp_path / "sites"
    folder.mkdir()
    for name, lines in {"a": [HEAD, *daily()], **files}.items():
        content = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        (folder / f"{name}.csv").write_bytes(content)
    with pytest.raises(UsageError, match=said) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_files_says_what_is_expected(tmp_path):
    with pytest.raises(UsageError, match="no CSV files in .*expected is one a site"):
        load_dataset("timeseries", tmp_path / "nowhere", cache_dir=tmp_path)


def test_places_are_where_the_file_says(tmp_path):
    folder = tmp_path / "sites"
    folder.mkdir()
    for name in "ab":
        site(folder, name, [HEAD, *daily()])
    site(folder, "positions", ["Site,X,Y", "b, 3 ,4", "a,0,1", "elsewhere,5,5"])
    assert read(folder).owners.positions_GX.tolist() == [[0, 1], [3, 4]]


# ---- the air data ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def air(tmp_path_factory):
    return load_dataset("air", cache_dir=tmp_path_factory.mktemp("cache"))


def test_air_is_what_its_source_says(air):
    assert len(air.owners.names) == 70 and air.inputs_n.shape[1:] == (14, 4) and air.task.num_outputs == 3
    assert air.task.metric.unit == "µg/m³" and len(set(air.sources)) == len(air.inputs_n)
    assert re.fullmatch(r"DE\w{5} \d{4}-\d\d-\d\d", air.sources[0])
    targets = air.task.encoded(air.test_targets_m)
    persistence = air.task.of_outputs(targets[:, 1][None], targets)
    assert persistence["skill"].item() == pytest.approx(0, abs=1e-6)
    assert persistence["rmse"].item() == pytest.approx(9.6254, abs=1e-3)


def test_a_linear_autoregression_has_the_published_skill(air):
    """On the same windows, fitted on the training part; what gossip has to beat."""
    def design(inputs):
        known = inputs[..., 1]
        return torch.cat([inputs[..., 0].nan_to_num() * known, known, torch.ones(len(known), 1)], 1).double()

    weights = torch.linalg.lstsq(design(air.inputs_n), air.targets_n[:, 0].double(), driver="gelsd").solution
    predicted = design(air.test_inputs_m) @ weights
    stays, values = air.test_targets_m[:, 1], air.test_targets_m[:, 0]
    skill = 1 - (predicted - values).square().mean() / (stays - values).square().mean()
    assert skill.item() == pytest.approx(0.2755, abs=1e-3)


def test_places_of_stations_are_as_far_apart_as_the_haversine_formula_says(air):
    import csv

    from data.dataset_loader import EMBEDDED

    with open(EMBEDDED["air"] / "stations.csv") as file:
        at = {name: (float(x), float(y)) for name, x, y in list(csv.reader(file))[1:]}
    longitude, latitude = np.radians(np.array([at[name] for name in air.owners.names])).T
    half = np.sin((latitude[:, None] - latitude) / 2) ** 2
    half += np.cos(latitude[:, None]) * np.cos(latitude) * np.sin((longitude[:, None] - longitude) / 2) ** 2
    along = 2 * EARTH_KM * np.arcsin(np.sqrt(half))
    straight = torch.cdist(air.owners.positions_GX, air.owners.positions_GX).numpy()
    np.testing.assert_allclose(2 * EARTH_KM * np.arcsin(straight / 2 / EARTH_KM), along, atol=1e-3)
    assert 500 < along.max() < 1000  # of Germany


def test_a_station_without_training_windows_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="owners without training samples are left out: DEBB075$"):
        assert with_workers(Config(dataset_name="air", partition="natural")).num_workers == 69
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_workers(Config(dataset_name="air", partition="natural", num_workers=8)).num_workers == 8


def test_damaged_air_is_one_line(tmp_path):
    (tmp_path / "pm10.csv.xz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="air: the files in .* are damaged"):
        load_dataset("air", tmp_path, cache_dir=tmp_path / "cache")


# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """A run of four sites on a plane, of which one has no training windows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "sites"
    folder.mkdir()
    rng, days = np.random.default_rng(0), np.arange(160)
    for k, name in enumerate("abcde"):
        values = 20 + 5 * np.sin(days / 6 + k) + rng.normal(size=160)
        first = 125 if name == "e" else 0
        site(folder, name, ["day,pm", *(f"{np.datetime64('2003-01-01') + d},{values[d]:.2f}" for d in days[first:])])
    site(folder, "positions", ["site,x,y", "a,0,0", "b,1,0", "c,3,0", "d,9,0", "e,4,4"])
    return [
        *"--dataset_name timeseries --history 5 --horizon 2 --model lstm --partition natural --mode nearest".split(),
        *"--neighbors 1 --epochs 2 --batch_size 16 --no-plots --quiet --dataset_path".split(),
        *(str(folder), "--results_dir", str(tmp_path / "r")),
    ]


def test_a_run_of_sites(flags, tmp_path, capsys):
    """Natural partition, nearest neighbours, measures against persistence; a replay gives the same bits."""
    assert main.main([*flags, "--run_name", "one"]) == 0
    output = capsys.readouterr()
    assert "test RMSE of the consensus model" in output.out
    assert "owners without training samples are left out: e" in output.err
    run = tmp_path / "r" / "one" / "stage1"
    config, summary, topology = (load(run / f"{name}.json") for name in ("config", "summary", "topology"))
    assert config["owners"] == list("abcd") and config["config"]["num_workers"] == 4
    assert topology["connected"] and topology["doubly_stochastic"]
    (matrix,) = topology["matrices"]
    links = {(i, j) for i, j in zip(matrix["receiver"], matrix["sender"], strict=True) if i < j}
    assert links == {(0, 1), (1, 2), (2, 3)}
    assert {"test_rmse", "test_mae", "test_skill"} <= set(summary) and "test_accuracy" not in summary
    assert list(summary["test_rmse_by_output"]) == ["1 ahead", "2 ahead"]
    assert main.main(["--config", str(run / "config.json"), "--run_name", "two"]) == 0
    assert main.main([*flags, "--run_name", "three", "--num_workers", "3"]) == 0
    assert same_tensors(run / "model.safetensors", tmp_path / "r" / "two" / "stage1" / "model.safetensors")
    assert len(load(tmp_path / "r" / "three" / "stage1" / "config.json")["owners"]) == 3


@pytest.mark.slow
def test_an_audit_of_sites_over_seeds(flags, tmp_path, capsys):
    audit = "--audit --audit_groups 4 --methods cascade if --pruning_algorithm cascade --train_ratio 0.8 --seeds 2"
    assert main_pruned.main([*flags, "--run_name", "audit", *audit.split()]) == 0
    output = capsys.readouterr().out
    assert "LDS over 4 groups of 5%" in output and "in stage 1" in output and "RMSE" in output
