"""How commands begin and end early: without the environment, on Ctrl-C, for --help."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_architecture import ROOMS

ROOT = Path(__file__).parent.parent
SCRIPTS = ("main.py", "main_pruned.py", "commands:train", "commands:predict")
MODULES = ("training.predict", "training.job", "visualization.plot_utils", "data.index", "benchmarks.training",
           "benchmarks.mislabel")  # fmt: skip
ONE_WORD = ("data.index", "training.job")
HEAVY = ("torch", "numpy", "scipy", "matplotlib", "sklearn")


def start(command: str, *flags: str, python: tuple[str, ...] = (), path: Path | None = None) -> subprocess.Popen:
    """A command in a process of its own, with further ``path`` before the installed packages."""
    words = [command]
    if ":" in command:  # as an installed command does
        module, function = command.split(":")
        words = ["-c", f"import sys, {module}; sys.exit({module}.{function}())"]
    elif not command.endswith(".py"):
        words = ["-m", command]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.Popen(
        [sys.executable, *python, *words, *flags],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["main.py", "main_pruned.py"])
def test_help_loads_nothing_heavy(command):
    code = f"""
import json, runpy, sys
sys.argv = [{command!r}, "--help"]
try:
    runpy.run_path({command!r}, run_name="__main__")
except SystemExit as stopped:
    print()
    print(json.dumps([stopped.code, sorted(set({HEAVY!r}) & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    assert "--dataset_name" in done.stdout and "--no-plots" in done.stdout


@pytest.mark.parametrize("command", [*SCRIPTS, *MODULES])
def test_without_the_environment_a_line_says_what_to_do(command):
    flags = ["x", "y"] if command.endswith((":predict", "plot_utils")) else ["x"] if command in ONE_WORD else []
    output, errors = (process := start(command, *flags, python=("-S",))).communicate()
    assert process.returncode == 2 and output == ""
    [line] = errors.splitlines()
    assert line.startswith("error: ") and "no package '" in line and "requirements.txt" in line


def test_a_missing_file_of_the_project_is_no_missing_package():
    code = "from utils.command import begin; begin(); import utils.nothing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "utils.nothing" in done.stderr


@pytest.mark.parametrize("command", [*SCRIPTS, *MODULES])
def test_an_interrupt_while_packages_are_loaded_is_a_line(command, tmp_path):
    """The packages stand in for those that take seconds, and for libraries that take an interrupt for another error."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(
            "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    [None for _ in range(10**5)]\n"
            "except BaseException as error:\n    raise ImportError('half loaded') from error\n"
        )
    output, errors = (process := start(command, "x", path=tmp_path)).communicate()
    if command.endswith((".py", ":train")):  # these look at the words first
        output, errors = (process := start(command, path=tmp_path)).communicate()
    assert process.returncode == 130
    assert errors.splitlines() == ["interrupted before it began"] and output == ""


def test_an_interrupt_of_a_training(tmp_path):
    flags = ["--max_train", "300", "--epochs", "9999", "--checkpoint_every", "1", "--results_dir", str(tmp_path)]
    process = start("main.py", *flags, "--run_name", "run")
    while "cnn with" not in process.stderr.readline():  # the headline: training begins
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors and "ignored" not in errors
    assert errors.splitlines()[-1].startswith("interrupted; ") and str(tmp_path / "run" / "stage1") in errors
    assert "--resume" in errors.splitlines()[-1] and output == ""


# ---- an installation -------------------------------------------------------------------------------------


def test_installed_commands_are_functions_of_commands():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert {"decentralized-train", "decentralized-prune", "decentralized-predict"} <= project["scripts"].keys()
    for target in project["scripts"].values():
        module, function = target.removeprefix("decentralized.").split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_installed_commands_set_threads_before_torch_loads():
    code = "import os, sys; os.environ.pop('OMP_NUM_THREADS', None); import commands; " \
           "print(os.environ['OMP_NUM_THREADS'], 'torch' in sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


def test_all_rooms_but_those_of_a_checkout_are_installed():
    with open(ROOT / "pyproject.toml", "rb") as file:
        packages = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    rooms = {p.parent for room in set(ROOMS) - {"benchmarks", "federated"} for p in (ROOT / room).rglob("*.py")}
    assert packages == {"decentralized", *(".".join(("decentralized", *r.relative_to(ROOT).parts)) for r in rooms)}
