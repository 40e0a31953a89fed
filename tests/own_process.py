"""Tests that leave PyTorch changed: each in a process of its own, forked from one that has imported what they need."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

import pytest

PROCESSES = multiprocessing.get_context("forkserver")
TESTS = Path(__file__).parent
SLOW_IMPORTS = ["torch._dynamo", "sklearn.datasets"]  # that these tests end up with: once for all of them


def in_own_process(test: Callable[..., None]) -> Callable[..., None]:
    """The test, run elsewhere; its arguments must be picklable. A failure there is a failure here."""

    @functools.wraps(test)
    def run(**arguments):
        PROCESSES.set_forkserver_preload(["tests.own_process", test.__module__, *SLOW_IMPORTS])
        with mock.patch.dict(os.environ, PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}"):
            ensure_running()  # the server knows nothing of sys.path
        here, there = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_child, args=(there, test.__module__, test.__qualname__, arguments))
        process.start()
        there.close()
        try:
            kind, text = here.recv()
        except EOFError:
            kind, text = "failed", "the process ended without a word"
        process.join()
        if kind == "skipped":
            pytest.skip(text)
        if kind == "failed":
            pytest.fail(text, pytrace=False)

    return run


def _child(answer: Connection, module: str, name: str, arguments: dict) -> None:
    try:
        getattr(importlib.import_module(module), name).__wrapped__(**arguments)
        answer.send(("passed", ""))
    except pytest.skip.Exception as error:
        answer.send(("skipped", str(error)))
    except BaseException:
        answer.send(("failed", traceback.format_exc()))
