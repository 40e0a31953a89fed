"""Time series: windows that show the last T steps of a site and ask for the next H.

Test is what comes last (a quarter of the time), validation the end of what is left (see ``validation_split``), and no
window reaches from one into another.

Legend: S sites, D steps of time, T steps of a window, H steps ahead, F features, n windows.
"""

from __future__ import annotations

import csv
import datetime
import io
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data.arrays import Arrays, Owners, ReadOptions
from data.regression import Regression
from utils.errors import UsageError
from utils.files import read_bytes

TEST_SHARE = 0.25  # of the time
MOST_GAPS = 2  # missing values in what a window shows
EARTH_KM = 6371.0
SECONDS_OF = {"day": 86_400.0, "year": 365.2425 * 86_400.0}


def air(path: Path, options: ReadOptions) -> Arrays:
    """Daily PM10 at 70 rural stations in Germany, 1998 to 2009, half of it missing: the next days from the last ones.
    Source: AirBase of the European Environment Agency (examples/air/SOURCE.md)."""
    try:
        table = list(csv.reader(io.StringIO(lzma.decompress((path / "pm10.csv.xz").read_bytes()).decode())))
        places = list(csv.reader(io.StringIO((path / "stations.csv").read_text())))[1:]
    except OSError as error:
        raise UsageError(f"air: {error.strerror}: {error.filename}; it comes with the project's folder") from error
    names, rows = table[0][1:], table[1:]
    values_DS1 = np.array([[float(cell or "nan") for cell in row[1:]] for row in rows], dtype=np.float32)[..., None]
    seconds_D = np.array([_seconds(row[0]) for row in rows])
    at = {name: (float(longitude), float(latitude)) for name, longitude, latitude in places}
    return windows("air", names, values_DS1, seconds_D, [at[name] for name in names], True, options, "µg/m³")


def timeseries(path: Path, options: ReadOptions) -> Arrays:
    """Your own series: a CSV file a site in ``path``, with a line of names, the time in the first column (dates, or
    numbers) and one or more columns of numbers, empty where they are missing; the first of them is predicted.
    ``positions.csv`` (site, and longitude, latitude or x, y) says where sites are."""
    files = sorted(file for file in path.glob("*.csv") if file.name != "positions.csv") if path.is_dir() else []
    if not files:
        raise UsageError(
            f"timeseries: no CSV files in {path}; expected is one a site: a line of names, then time and values "
            "(--dataset_path names the folder)"
        )
    tables = {file.stem: _table(file) for file in files}
    columns = {tuple(names) for names, _, _ in tables.values()}
    if len(columns) > 1:
        raise UsageError(f"timeseries: the files in {path} have different columns: {' and '.join(map(str, columns))}")
    every = np.concatenate([times for _, times, _ in tables.values()])
    steps = Counter(np.round(np.concatenate([np.diff(times) for _, times, _ in tables.values()]), 6).tolist())
    steps.pop(0.0, None)
    if not steps:
        raise UsageError(f"timeseries: no file in {path} has two times")
    step = steps.most_common(1)[0][0]
    start, length = every.min(), round((every.max() - every.min()) / step) + 1
    values_DSF = np.full((length, len(tables), len(next(iter(columns))) - 1), np.nan, dtype=np.float32)
    for s, (_, times, values) in enumerate(tables.values()):
        values_DSF[np.round((times - start) / step).astype(int), s] = values
    dated = bool(np.abs(every).max() > SECONDS_OF["year"])  # dates are seconds since 1970
    seconds_D = start + step * np.arange(length) if dated else None
    places, degrees = _positions(path / "positions.csv", list(tables))
    return windows("timeseries", list(tables), values_DSF, seconds_D, places, degrees, options)


def windows(
    name: str,
    sites: list[str],
    values_DSF: np.ndarray,
    seconds_D: np.ndarray | None,
    places: list[tuple[float, float]] | None,
    degrees: bool,
    options: ReadOptions,
    unit: str = "",
) -> Arrays:
    """All windows of all sites, site by site in the order of time, of which at most two steps of the first column are
    missing and what is to be predicted is known.

    A step shows the columns, whether the first one is known, and, where there are dates, the time of the year (and of
    the day, for shorter steps) as sine and cosine. The forecast to beat: the last known value stays.
    """
    T, H = options.history, options.horizon
    D, S, _ = values_DSF.shape
    first_test = int((1 - TEST_SHARE) * D)
    if D - first_test < T + H:
        raise UsageError(f"{name}: {D} steps of time are too few for windows of {T} + {H}: lower --history")
    calendar_DF = _calendar(seconds_D, D)
    known_DS = np.isfinite(values_DSF[:, :, 0])
    parts: dict[bool, list] = {False: [], True: []}
    for s in range(S):
        target_D = values_DSF[:, s, 0]
        gaps_D = np.convolve(~known_DS[:, s], np.ones(T))[: D]  # in the T steps that end here
        known_after_D = np.convolve(known_DS[:, s], np.ones(H))[H - 1 :]  # in the H steps that begin here
        last_D = np.maximum.accumulate(np.where(known_DS[:, s], np.arange(D), -1))
        for test, (low, high) in ((False, (0, first_test)), (True, (first_test, D))):
            now_n = np.arange(low + T - 1, high - H)
            now_n = now_n[(gaps_D[now_n] <= min(MOST_GAPS, T - 1)) & (known_after_D[now_n + 1] == H)]
            shown_nT = now_n[:, None] + np.arange(1 - T, 1)
            inputs_nTF = np.concatenate(
                [values_DSF[shown_nT, s], known_DS[shown_nT, s, None], calendar_DF[shown_nT]], -1, dtype=np.float32
            )
            ahead_nH = target_D[now_n[:, None] + np.arange(1, H + 1)]
            stays_nH = np.broadcast_to(target_D[last_D[now_n], None], ahead_nH.shape)
            parts[test].append((inputs_nTF, np.stack([ahead_nH, stays_nH], 1), now_n, np.full(len(now_n), s)))
    train, test = ([torch.from_numpy(np.concatenate(a)) for a in zip(*parts[t], strict=True)] for t in (False, True))
    for what, part in (("training", train), ("test", test)):
        if len(part[0]) == 0:
            raise UsageError(f"{name}: no window of {T} + {H} steps for {what} has {MOST_GAPS} gaps at most")
    inputs_nTF, targets_n2H, now_n, owner_n = train
    horizons = [f"{h} ahead" for h in range(1, H + 1)]
    positions_SX = None if places is None else torch.from_numpy(_straight(np.array(places), degrees))
    moments = [_moment(seconds_D, d) for d in range(D)]
    sources = tuple(f"{sites[s]} {moments[d]}" for s, d in zip(owner_n.tolist(), now_n.tolist(), strict=True))
    return Arrays(
        inputs_nTF, targets_n2H, test[0], test[1], Regression.of(horizons, targets_n2H, unit),
        sources=sources, owners=Owners(owner_n, tuple(sites), positions_SX), order_n=now_n, gap=T + H,
    )  # fmt: skip


def _calendar(seconds_D: np.ndarray | None, D: int) -> np.ndarray:
    """Sine and cosine [D, F] of the time of the year, and of the day where steps are shorter than one."""
    if seconds_D is None:
        return np.zeros((D, 0), dtype=np.float32)
    periods = ["year"] + (["day"] if np.diff(seconds_D).min() < SECONDS_OF["day"] else [])
    angles = [2 * math.pi * seconds_D / SECONDS_OF[period] for period in periods]
    return np.stack([wave(angle) for angle in angles for wave in (np.sin, np.cos)], 1).astype(np.float32)


def _straight(places_S2: np.ndarray, degrees: bool) -> np.ndarray:
    """Places [S, X] whose straight distances say who is near: longitude and latitude as points of the sphere, in km."""
    if not degrees:
        return places_S2.astype(np.float64)
    longitude_S, latitude_S = np.radians(places_S2.astype(np.float64)).T
    across_S = np.cos(latitude_S)
    return EARTH_KM * np.stack([across_S * np.cos(longitude_S), across_S * np.sin(longitude_S), np.sin(latitude_S)], 1)


def _seconds(text: str) -> float:
    """A date or time as seconds since 1970 (UTC where nothing else is said)."""
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _moment(seconds_D: np.ndarray | None, d: int) -> str:
    if seconds_D is None:
        return f"step {d}"
    text = datetime.datetime.fromtimestamp(float(seconds_D[d]), datetime.UTC).isoformat()
    return text.removesuffix("+00:00").removesuffix("T00:00:00")


def _table(file: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The names of the columns, times [D] (dates in seconds since 1970) ascending, and values [D, F]."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_bytes(file).decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"timeseries: {file} is no CSV text: {error}") from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise UsageError(f"timeseries: {file} needs a line of names and lines of a time and one value or more")
    times, values = [], []
    for number, row in enumerate(rows[1:], start=2):
        try:
            times.append(_time(row[0]))
            values.append([float(cell) if cell.strip() else math.nan for cell in row[1:]])
            if len(row) != len(rows[0]) or not all(math.isnan(v) or math.isfinite(v) for v in values[-1]):
                raise ValueError(f"it must have {len(rows[0])} columns of finite numbers")
        except ValueError as error:
            raise UsageError(f"timeseries: line {number} of {file}: {error}") from error
    order = np.argsort(times, kind="stable")
    ordered = np.array(times, dtype=np.float64)[order]
    if (np.diff(ordered) == 0).any():
        raise UsageError(f"timeseries: {file} has a time twice")
    return rows[0], ordered, np.array(values, dtype=np.float32)[order]


def _time(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return _seconds(text.strip())
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no time")
    return value


def _positions(file: Path, sites: list[str]) -> tuple[list[tuple[float, float]] | None, bool]:
    """Where the sites are, and whether in degrees; None where there is no file."""
    if not file.is_file():
        return None, False
    rows = [row for row in csv.reader(io.StringIO(read_bytes(file).decode("utf-8-sig", "replace"))) if row]
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    if names[1:] not in (["longitude", "latitude"], ["x", "y"]):
        raise UsageError(f"timeseries: {file} must begin with a line 'site,longitude,latitude' or 'site,x,y'")
    try:
        at = {row[0]: (float(row[1]), float(row[2])) for row in rows[1:]}
    except (ValueError, IndexError) as error:
        raise UsageError(f"timeseries: {file}: a line is no site and two numbers ({error})") from error
    missing = [site for site in sites if site not in at]
    if missing or not all(math.isfinite(v) for place in at.values() for v in place):
        raise UsageError(f"timeseries: {file} does not say where {missing[0] if missing else 'a site'} is")
    return [at[site] for site in sites], names[1] == "longitude"
