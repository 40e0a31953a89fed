"""Jobs as recipes: the bits of here, wherever and in however many goes they are run; what is damaged or another's."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import arguments, load, refused
from hypothesis import given
from hypothesis import strategies as st

import main_pruned
import valuation.__main__ as room
from training import job
from training.execution import Execution
from training.recipe import Recipe, hand_out, parse_recipe, recipes_in, result_path
from training.retrain import masks_without
from utils.args import Config
from utils.awaited import AWAITS, ResultsMissing, each
from utils.digest import digest_json
from utils.errors import UsageError
from utils.records import write_json

ROOT = Path(main_pruned.__file__).parent
AUDIT = ("--audit", "--audit_groups", "3", "--methods", "random", "--engine", "threads", "--memory_gb", "1e-9")
WORTH = ("--quiet", "--threads", "1", "--epochs", "2", "--num_workers", "3", "--max_train", "300", "--no-plots",
         "--engine", "threads", "--valuations", "equal")  # fmt: skip


def audit(folder: Path, *flags: str) -> int:
    return main_pruned.main(arguments(folder, *AUDIT, *flags))


def value(folder: Path, *flags: str) -> int:
    return room.main([*WORTH, "--results_dir", str(folder), "--run_name", "run", *flags])


def figures(folder: Path) -> list:
    """coalitions.jsonl without the wall clock, in one order."""
    lines = [json.loads(line) for line in (folder / "run/valuation/coalitions.jsonl").read_text().splitlines()]
    return sorted((line["members"], line["utility"], line["by_test"], line["rounds"]) for line in lines)


def do(*words: object) -> int:
    return job.main(["--quiet", *map(str, words)])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Both commands, with all of their work done in this process."""
    folder = tmp_path_factory.mktemp("here")
    assert audit(folder) == value(folder / "worth") == 0
    return folder


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    """Both commands with --cluster recipes, once."""
    folder = tmp_path_factory.mktemp("there")
    assert audit(folder, "--cluster", "recipes") == value(folder / "worth", "--cluster", "recipes") == AWAITS
    return folder


@pytest.fixture
def there(handed_out, tmp_path):
    """A copy of that."""
    return Path(shutil.copytree(handed_out, tmp_path / "there"))


def jobs_of(folder: Path) -> tuple[Path, Path]:
    """Where the recipes are, of the audit's retrainings and of the coalitions."""
    [retrainings] = (folder / "run/jobs").glob("retrainings-*")
    return retrainings, folder / "worth/run/valuation/jobs"


def of_smoothness(folder: Path) -> Path:
    """Where those of the audit's metasmoothness are."""
    [jobs] = (folder / "run/jobs").glob("smoothness-*")
    return jobs


# ---- the same, done elsewhere -------------------------------------------------------------------------------


def test_recipes_come_to_the_bits_of_here(here, there):
    retrainings, coalitions = jobs_of(there)
    assert len(recipes_in(retrainings)) == 4 and len(recipes_in(coalitions)) == 7
    assert len(recipes_in(of_smoothness(there))) == 3
    assert do(retrainings, of_smoothness(there), coalitions) == 0
    assert audit(there, "--cluster", "recipes") == value(there / "worth", "--cluster", "recipes", "--resume") == 0
    assert load(there / "run/audit.json") == load(here / "run/audit.json")
    assert figures(there / "worth") == figures(here / "worth") and len(figures(here / "worth")) == 7


def test_an_interrupted_array_goes_on(here, there, monkeypatch, capsys):
    """Each task of it is interrupted after one result; what is there is not made again, and the command waits."""
    retrainings, _ = jobs_of(there)
    assert do(of_smoothness(there)) == 0
    done, result = [], Recipe.result

    def interrupted(self, *args):
        if len(done) % 2 == 1:
            done.append(None)
            raise KeyboardInterrupt
        done.append(self)
        return result(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Recipe, "result", interrupted)
        assert [do(retrainings, "--part", f"{k}/2") for k in range(2)] == [130, 130]
    first = {path: path.read_bytes() for path in retrainings.glob("*.result.json")}
    assert len(first) == 2 and "the same command goes on" in capsys.readouterr().err
    assert audit(there, "--cluster", "recipes") == AWAITS and not (there / "run/audit.json").exists()
    assert "2 of 4 results are missing" in capsys.readouterr().out
    assert [do(retrainings, "--part", f"{k}/2") for k in range(2)] == [0, 0]
    assert "1 was there" in capsys.readouterr().out
    assert do(retrainings) == 0 and "0 done, 4 were there" in capsys.readouterr().out
    assert first.items() <= {path: path.read_bytes() for path in retrainings.glob("*.result.json")}.items()
    assert audit(there, "--cluster", "recipes") == 0
    assert load(there / "run/audit.json") == load(here / "run/audit.json")


def test_what_has_ended_elsewhere_counts_here_too(here, there, monkeypatch):
    retrainings, coalitions = jobs_of(there)
    assert do(retrainings, "--part", "0/2") == do(coalitions, "--part", "0/2") == 0
    before = {tuple(line["members"]): line for path in coalitions.glob("*.result.json") for line in load(path)["value"]}
    assert len(before) == 4
    assert audit(there) == value(there / "worth", "--resume") == 0  # no --cluster
    lines = (there / "worth/run/valuation/coalitions.jsonl").read_text().splitlines()
    after = {tuple(line.pop("members")): line for line in map(json.loads, lines)}
    assert all(after[members]["seconds"] == line["seconds"] for members, line in before.items())
    assert load(there / "run/audit.json") == load(here / "run/audit.json")
    assert figures(there / "worth") == figures(here / "worth")


def test_seeds_hand_out_together(tmp_path, capsys):
    assert value(tmp_path, "--seeds", "2", "--cluster", "recipes") == AWAITS
    command = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m training.job")]
    folders = shlex.split(command[0])[3:]
    assert [len(recipes_in(Path(folder))) for folder in folders] == [7, 7]
    assert do(*folders) == 0 and value(tmp_path, "--seeds", "2", "--cluster", "recipes", "--resume") == 0
    assert (tmp_path / "run/valuation/summary.json").exists()


@pytest.mark.slow  # processes of their own
def test_the_lines_that_are_printed_work_as_they_are(here, there, capsys):
    assert value(there / "worth", "--cluster", "recipes", "--resume") == AWAITS
    alone, array = (line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    words = shlex.split(array)
    assert words[:2] == ["sbatch", "--array=0-6"] and words[3] == "--wrap"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path}
    for command, task in ((words[4], "6"), (alone, "")):
        subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=environment | {"SLURM_ARRAY_TASK_ID": task}, check=True
        )  # fmt: skip
        assert task == "" or len(list(jobs_of(there)[1].glob("*.result.json"))) == 1
    assert value(there / "worth", "--cluster", "recipes", "--resume") == 0
    assert figures(there / "worth") == figures(here / "worth")


# ---- what is damaged, or another's ---------------------------------------------------------------------------


def rewritten(path: Path, signed: bool = True, **changes: object) -> None:
    """A recipe with changes; ``signed``: with the digest that then is its own."""
    record = load(path) | changes
    if signed:
        names = ("kind", "run", "execution", "decisions", "work")
        record["digest"] = digest_json({name: record[name] for name in names})
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("signed,changes,words", [
    (False, {"work": {"members": [[0]], "more": 1}}, "damaged"),
    (False, {"run": "0" * 64}, "damaged"),
    (True, {"run": "0" * 64}, "data, files or settings"),
    (True, {"kind": "os.system"}, "unknown kind of job"), (True, {"kind": ["x"]}, "damaged"),
    (True, {"execution": {"device": "cpu"}}, "damaged"), (True, {"work": []}, "damaged"),
    (True, {"config": {"lr": 1.0}}, "data, files or settings"), (True, {"config": {"lr": "fast"}}, "--lr"),
    (True, {"config": {"lr": -1.0}}, "--lr"), (True, {"config": {"colour": 1}}, "colour"),
    (True, {"config": 3}, "damaged"),
    (True, {"work": {"members": [[0, 7]]}}, "members"), (True, {"work": {"members": [[1, 0]]}}, "members"),
    (True, {"work": {"members": []}}, "members"), (True, {"work": {}}, "members"),
    (True, {"kind": "retrainings"}, "removed"),
    (True, {"kind": "retrainings", "work": {"rounds": 1, "target": "nodes", "removed": [[10**6]]}}, "removed"),
    (True, {"kind": "retrainings", "work": {"rounds": 1, "target": "me", "removed": [[1]]}}, "target"),
    (True, {"kind": "smoothness"}, "side_by_side"),
    (True, {"kind": "smoothness", "work": {"rounds": 1, "side_by_side": 0, "removed": [[1]]}}, "side_by_side"),
])  # fmt: skip
def test_a_recipe_that_is_none_of_ours_is_refused(there, capsys, signed, changes, words):
    path = recipes_in(jobs_of(there)[1])[3]
    rewritten(path, signed, **changes)
    line = refused(capsys, do(path))
    assert words in line and str(path) in line and not result_path(path).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"kind": NaN}', "\0"])
def test_a_file_that_is_no_recipe_is_refused_before_any_is_run(there, capsys, text):
    folder = jobs_of(there)[1]
    recipes_in(folder)[-1].write_text(text)
    assert "recipe" in refused(capsys, do(folder)) and not list(folder.glob("*.result.json"))


def test_a_recipe_of_other_data_is_refused(tmp_path, capsys):
    """Written with one set of pictures, run with another."""
    from PIL import Image

    for name, shade in (("one", 0), ("other", 90)):
        for part in ("train", "test"):
            for c in range(2):
                for i in range(20):
                    path = tmp_path / name / part / f"c{c}" / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("L", (8, 8), shade + 5 * i + 3 * c).save(path)
    data = ("--dataset_name", "imagefolder", "--image_size", "8", "--partition", "iid", "--batch_size", "4")
    assert value(tmp_path, *data, "--dataset_path", str(tmp_path / "one"), "--cluster", "recipes") == AWAITS
    folder = tmp_path / "run/valuation/jobs"
    moved, foreign, *_ = recipes_in(folder)
    (tmp_path / "one").rename(tmp_path / "moved")
    rewritten(moved, False, config=load(moved)["config"] | {"dataset_path": str(tmp_path / "moved")})
    assert do(moved) == 0
    rewritten(foreign, False, config=load(foreign)["config"] | {"dataset_path": str(tmp_path / "other")})
    assert "data, files or settings" in refused(capsys, do(foreign))


@pytest.mark.parametrize("damage,words", [
    (lambda text, other: text.replace('"utility": 0.', '"utility": 0.1'), "damaged"), (lambda text, other: text[:-9],
    "damaged"), (lambda text, other: other, "another recipe"), (lambda text, other: "{}", "damaged"),
])  # fmt: skip
def test_a_result_that_is_another_is_refused_on_both_sides(there, capsys, damage, words):
    folder = jobs_of(there)[1]
    mine, other = recipes_in(folder)[:2]
    assert do(mine, other) == 0
    result = result_path(mine)
    result.write_text(damage(result.read_text(), result_path(other).read_text()))
    for command in (lambda: do(folder), lambda: value(there / "worth", "--cluster", "recipes", "--resume")):
        line = refused(capsys, command())
        assert words in line and str(result) in line and "delete it" in line
    result.unlink()
    assert do(folder) == 0


@pytest.mark.parametrize("words,said", [
    (["nowhere.json"], "nowhere.json"), ([], "RECIPE"), (["--part", "2/2", "x"], "--part"), (["--part", "x", "x"],
    "--part"), (["--part", "0/0", "x"], "--part"), (["--parts", "0/2", "x"], "--part"), (["."], "no recipes"),
    (["x.result.json"], "results alone"),
])  # fmt: skip
def test_words_that_name_no_recipes_are_refused(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("x.result.json").write_text("{}")
    assert said in refused(capsys, do(*words))


# ---- what a recipe is ----------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 40), unique=True, max_size=9)


def recipe(kind: str = "retrainings", **work: object) -> Recipe:
    execution, config = Execution("cpu", "threads", 1, True), Config(milestones=(1, 2.5))
    return Recipe(kind, "0" * 64, execution, {"nodes": [1, [2, 0]]}, work, config)


@given(st.lists(IDS, min_size=1, max_size=4), st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_masks_and_numbers_survive_the_text(removed, number):
    one = recipe(rounds=3, target="worker:1", removed=removed)
    read = parse_recipe(json.dumps(one.to_json()), "it")
    assert read == one and read.digest == one.digest and read.name == one.name
    weights_n = torch.ones(41)
    weights_n[7] = 0.0  # switched off in the run itself
    masks_Mn = masks_without(weights_n, read.work["removed"])
    for mask_n, ids in zip(masks_Mn, removed, strict=True):
        assert set((mask_n == 0).nonzero()[:, 0].tolist()) == {7, *ids} and set(mask_n.tolist()) <= {0.0, 1.0}
    value = [number, number / 3, "nan"]
    result = {"recipe": one.digest, "value": value, "digest": digest_json([one.digest, value])}
    assert one.value_of(json.dumps(result), "it") == value
    with pytest.raises(UsageError, match="another recipe"):
        recipe(rounds=4, target="worker:1", removed=removed).value_of(json.dumps(result), "it")


@given(st.lists(st.sets(st.integers(0, 30), min_size=1, max_size=9).map(sorted), min_size=1, max_size=4))
def test_members_survive_the_text(members):
    one = recipe("coalitions", members=members)
    assert parse_recipe(json.dumps(one.to_json()), "it").work == {"members": members}


def test_paths_are_no_part_of_what_a_recipe_is():
    one, record = recipe(removed=[]), recipe(removed=[]).to_json()
    record["config"]["dataset_path"] = "/elsewhere"
    assert parse_recipe(json.dumps(record), "it").digest == one.digest
    assert not {"results_dir", "run_name", "overwrite", "threads", "quiet"} & record["config"].keys()


def test_a_folder_holds_what_is_to_do_and_what_is_done(tmp_path):
    a, b, c = (recipe(removed=[[i]]) for i in range(3))

    def names(*wanted: Recipe) -> set[str]:
        with pytest.raises(ResultsMissing) as found:
            hand_out(wanted, tmp_path)
        assert found.value.missing == {tmp_path: (len(wanted), len(recipes_in(tmp_path)))}
        return {path.name for path in recipes_in(tmp_path)}

    assert names(a, b) == {a.name, b.name}
    write_json(result_path(tmp_path / a.name), {})
    edited = (tmp_path / b.name).read_text().replace('"dataset_path": null', '"dataset_path": "/elsewhere"')
    (tmp_path / b.name).write_text(edited)
    assert names(b) == {a.name, b.name} and (tmp_path / b.name).read_text() == edited
    (tmp_path / b.name).write_text("damaged")
    assert names(b, c) == {a.name, b.name, c.name} and parse_recipe((tmp_path / b.name).read_text(), "it") == b
    assert names(c) == {a.name, c.name}


def test_all_is_tried_before_what_is_missing_is_told():
    def work(i: int) -> int:
        if i % 2:
            raise ResultsMissing({Path(f"it's {i}"): (i, 5)})
        return i

    assert each(work, [0, 2]) == [0, 2]
    with pytest.raises(ResultsMissing) as found:
        each(work, [0, 1, 2, 3])
    text = found.value.what_to_do("The same command")
    alone, array = (shlex.split(line) for line in text.splitlines() if line.startswith("  "))
    assert "4 of 10 results" in text and alone == ["python", "-m", "training.job", "it's 1", "it's 3"]
    assert array[:3] == ["sbatch", "--array=0-9", "--output=it's 1/part-%a.log"]
    assert shlex.split(array[4]) == [*alone, "--part", "$SLURM_ARRAY_TASK_ID/10"]
