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
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.arrays import Arrays, Owners, ReadOptions
from data.regression import Regression
from utils.errors import UsageError
from utils.files import read_bytes

TEST_SHARE = 0.25  # of the time
MOST_GAPS = 2  # missing values in what a window shows
MOST_OFF = 0.25  # of a step, between a time and the grid: clocks are not exact
LARGEST = 1e18  # of what is measured: its square is a float32
MISSING = ("", "na", "nan")
COMPACT_DATE = re.compile(r"\d{8}(T.*)?")
EARTH_KM = 6371.0
SECONDS_OF = {"day": 86_400.0, "year": 365.2425 * 86_400.0}


def air(path: Path, options: ReadOptions) -> Arrays:
    """Daily PM10 at 70 rural stations in Germany, 1998 to 2009, half of it missing: the next days from the last ones.
    Source: AirBase of the European Environment Agency (examples/air/SOURCE.md)."""
    try:
        table = list(csv.reader(io.StringIO(lzma.decompress((path / "pm10.csv.xz").read_bytes()).decode())))
        places = list(csv.reader(io.StringIO((path / "stations.csv").read_text())))[1:]
        names, rows = table[0][1:], table[1:]
        values_DS = np.array([[float(cell or "nan") for cell in row[1:]] for row in rows], dtype=np.float32)
        seconds_D = np.array([_seconds(row[0]) for row in rows])
        at = {name: (float(longitude), float(latitude)) for name, longitude, latitude in places}
        positions = [at[name] for name in names]
    except OSError as error:
        raise UsageError(f"air: {error.strerror}: {error.filename}; it comes with the project's folder") from error
    except (lzma.LZMAError, EOFError, ValueError, LookupError) as error:
        raise UsageError(f"air: the files in {path} are damaged ({error}); they come with the project") from error
    return windows("air", names, values_DS[..., None], seconds_D, positions, True, options, "µg/m³")


def timeseries(path: Path, options: ReadOptions) -> Arrays:
    """Your own series: a CSV file a site in ``path``, with a line of names, the time in the first column (dates, or
    numbers) and one or more columns of numbers, empty or NA where they are missing; the first of them is predicted.
    Lines may be missing and in any order; the time between two of them that is most frequent is the step.
    ``positions.csv`` (site, and longitude, latitude or x, y) says where sites are."""
    files = sorted(file for file in path.glob("*.csv") if file.name != "positions.csv") if path.is_dir() else []
    if not files:
        raise UsageError(
            f"timeseries: no CSV files in {path}; expected is one a site: a line of names, then time and values "
            "(--dataset_path names the folder)"
        )
    tables = [_table(file) for file in files]
    for table in tables[1:]:
        if table.columns != tables[0].columns:
            raise UsageError(
                f"timeseries: {table.file} has the columns {', '.join(table.columns)}, and {files[0].name} has "
                f"{', '.join(tables[0].columns)}: give all files the same"
            )
        if table.dated != tables[0].dated:
            raise UsageError(f"timeseries: {table.file} and {files[0].name}: dates in one and numbers in the other")
    start, step, length = _grid(path, tables)
    F = len(tables[0].columns) - 1
    _check_memory("timeseries", length * len(tables) * F)
    values_DSF = np.full((length, len(tables), F), np.nan, dtype=np.float32)
    for s, table in enumerate(tables):
        values_DSF[_cells(table, start, step), s] = table.values_DF
    seconds_D = start + step * np.arange(length) if tables[0].dated else None
    sites = [file.stem for file in files]
    places, degrees = _positions(path / "positions.csv", sites)
    return windows("timeseries", sites, values_DSF, seconds_D, places, degrees, options)


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
    _check_memory(name, D * S * T * (values_DSF.shape[2] + 1 + calendar_DF.shape[1]))
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
    owners = Owners(owner_n, tuple(sites), positions_SX, test_owner_m=test[3])
    return Arrays(
        inputs_nTF, targets_n2H, test[0], test[1], Regression.of(horizons, targets_n2H, unit),
        sources=sources, owners=owners, order_n=now_n, gap=T + H,
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


@dataclass(frozen=True)
class _Table:
    """A site's file: names of the columns, times [D] ascending (dates in seconds since 1970), values [D, F], and the
    line of each."""

    file: Path
    columns: list[str]
    dated: bool
    times_D: np.ndarray
    values_DF: np.ndarray
    lines_D: np.ndarray


def _table(file: Path) -> _Table:
    lines = _lines(file)
    if len(lines) < 2 or len(lines[0][1]) < 2:
        raise UsageError(f"timeseries: {file} needs a line of names and lines of a time and one value or more")
    columns = [cell.strip() for cell in lines[0][1]]
    times, values = [], []
    for number, row in lines[1:]:
        try:
            if len(row) != len(columns):
                raise ValueError(f"{len(row)} columns; the first line has {len(columns)}")
            times.append(_time(row[0].strip()))
            values.append([_value(cell.strip()) for cell in row[1:]])
        except (ValueError, OverflowError) as error:
            raise UsageError(f"timeseries: {file}, line {number}: {error}") from error
    lines_D, times_D = np.array([number for number, _ in lines[1:]]), np.array([time for time, _ in times])
    dated_D = np.array([dated for _, dated in times])
    if (dated_D != dated_D[0]).any():
        odd = int(np.flatnonzero(dated_D != dated_D[0])[0])
        raise UsageError(f"timeseries: {file}, line {lines_D[odd]}: dates and numbers for times in one file")
    order_D = np.argsort(times_D, kind="stable")
    return _Table(
        file, columns, bool(dated_D[0]), times_D[order_D], np.array(values, dtype=np.float32)[order_D], lines_D[order_D]
    )


def _grid(path: Path, tables: list[_Table]) -> tuple[float, float, int]:
    """The first time of all, the step, and the number of steps."""
    steps = Counter(np.concatenate([np.diff(table.times_D) for table in tables]).round(6).tolist())
    steps.pop(0.0, None)
    if not steps:
        raise UsageError(f"timeseries: no file in {path} has two times")
    step = min(steps, key=lambda step: (-steps[step], step))
    start, end = min(table.times_D[0] for table in tables), max(table.times_D[-1] for table in tables)
    return float(start), step, round((end - start) / step) + 1


def _cells(table: _Table, start: float, step: float) -> np.ndarray:
    """The step of each line. Raises UsageError where a line lies between two, or two lines lie at one."""
    place_D = (table.times_D - start) / step
    cell_D = place_D.round().astype(np.int64)
    off = np.flatnonzero(np.abs(place_D - cell_D) > MOST_OFF)
    if len(off):
        unit = " seconds" if table.dated else ""
        raise UsageError(
            f"timeseries: {table.file}, line {table.lines_D[off[0]]}: the time lies between steps of {step:g}{unit}, "
            "the most frequent; times must be evenly spaced, alike in all files (number months and years: 1, 2, 3)"
        )
    twice = np.flatnonzero(np.diff(cell_D) == 0)
    if len(twice):
        first, second = table.lines_D[twice[0] : twice[0] + 2]
        raise UsageError(f"timeseries: {table.file}, line {second}: the same time as in line {first}")
    return cell_D


def _lines(file: Path) -> list[tuple[int, list[str]]]:
    """The lines of a CSV file that are not empty, each with its number."""
    try:
        reader = csv.reader(io.StringIO(read_bytes(file).decode("utf-8-sig"), newline=""))
        return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"timeseries: {file} is no CSV text in UTF-8: {error}") from error


def _time(text: str) -> tuple[float, bool]:
    """A time, and whether it is a date (then in seconds since 1970). 20031224 is one, 2003 is a number."""
    if not COMPACT_DATE.fullmatch(text):
        try:
            value = float(text)
        except ValueError:
            pass
        else:
            if not math.isfinite(value):
                raise ValueError(f"{text!r} is no time")
            return value, False
    try:
        return _seconds(text), True
    except ValueError as error:
        raise ValueError(f"{text!r} is no time: give dates as 2003-12-24 or 2003-12-24T18:00, or numbers") from error


def _value(text: str) -> float:
    if text.lower() in MISSING:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not abs(value) <= LARGEST:
        raise ValueError(f"{text!r} is no number; leave it empty where there is none")
    return value


def _check_memory(name: str, count: int) -> None:
    """Raises UsageError where so many floats are more than the machine has: it would kill the process instead."""
    if 4 * count > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UsageError(
            f"{name}: {count:,} numbers do not fit into memory; lower --history, or look for a time that is wrong"
        )


def _positions(file: Path, sites: list[str]) -> tuple[list[tuple[float, float]] | None, bool]:
    """Where the sites are, and whether in degrees; None where there is no file."""
    if not file.is_file():
        return None, False
    lines = _lines(file)
    names = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    degrees = names[1:] == ["longitude", "latitude"]
    if not degrees and names[1:] != ["x", "y"]:
        raise UsageError(f"timeseries: {file} must begin with a line 'site,longitude,latitude' or 'site,x,y'")
    at = {}
    for number, row in lines[1:]:
        try:
            site, x, y = row[0].strip(), float(row[1]), float(row[2])
        except (ValueError, IndexError) as error:
            raise UsageError(f"timeseries: {file}, line {number}: it must be a site and two numbers") from error
        if not math.isfinite(x + y) or (degrees and not (abs(x) <= 360 and abs(y) <= 90)):
            raise UsageError(f"timeseries: {file}, line {number}: {x:g}, {y:g} is no {' and '.join(names[1:])}")
        if site in at:
            raise UsageError(f"timeseries: {file}, line {number}: {site} is there already")
        at[site] = x, y
    missing = [site for site in sites if site not in at]
    if missing:
        raise UsageError(f"timeseries: {file} does not say where {missing[0]} is")
    return [at[site] for site in sites], degrees
