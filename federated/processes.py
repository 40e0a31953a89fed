"""Flower's processes on this machine: the commands of docs/federated.md, started and stopped together.

Nothing here listens on anything but 127.0.0.1, and every process that was started is gone when the
``with`` block ends, whatever ended it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from utils.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "federated" / "app"
HOST = "127.0.0.1"
SUPERLINK = "loopback"  # its name in Flower's config.toml
START_SECONDS = 60.0
STOP_SECONDS = 10.0


class Loopback:
    """A SuperLink and SuperNodes on this machine.

        with Loopback(folder) as flower:
            flower.start_node(0, 2)
            flower.start_node(1, 2)
            flower.run("--num_workers 2 --epochs 2")

    ``folder``: Flower's own files and the logs. ``keys``: a folder made by certificates.sh switches on
    TLS, node authentication and the allow-list. ``bin``: where flwr is installed (default: beside this Python).
    """

    def __init__(self, folder: Path, keys: Path | None = None, bin: Path | None = None):
        self.folder, self.keys = folder.resolve(), keys and keys.resolve()
        self.bin = bin or Path(sys.executable).parent
        if not (self.bin / "flower-superlink").exists():
            raise UsageError("Flower is not installed here: 'make federated', then use .venv-federated/bin/python.")
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Loopback:
        self.folder.mkdir(parents=True, exist_ok=True)
        trust = f'root-certificates = "{self.keys / "ca.crt"}"' if self.keys else "insecure = true"
        (self.folder / "config.toml").write_text(f'[superlink.{SUPERLINK}]\naddress = "{HOST}:{self.port}"\n{trust}\n')
        try:
            self.start_server()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Flower starts its app processes by name and in its own folders: PATH and PYTHONPATH find them."""
        return os.environ | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(self.folder),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def start_server(self) -> None:
        """The SuperLink; returns when it listens."""
        security = ["--insecure"]
        if self.keys:
            security = [
                "--ssl-ca-certfile",
                f"{self.keys}/ca.crt",
                "--ssl-certfile",
                f"{self.keys}/server.crt",
                "--ssl-keyfile",
                f"{self.keys}/server.key",
                "--enable-supernode-auth",
            ]
        self._start(
            "superlink",
            [
                "python",
                "-m",
                "federated.superlink",
                "--host",
                HOST,
                "--port",
                str(self.port),
                "--disable-runtime-dependency-installation",
                *security,
            ],
        )
        deadline = time.monotonic() + START_SECONDS
        while not listening(self.port):
            if self.processes["superlink"].poll() is not None or time.monotonic() > deadline:
                raise UsageError(f"the SuperLink did not start: {self.log('superlink')[-1]}")
            time.sleep(0.2)

    def start_node(
        self,
        worker: int,
        count: int,
        *,
        name: str | None = None,
        key: Path | None = None,
        authority: Path | None = None,
    ) -> subprocess.Popen:
        """A SuperNode that is one worker of ``count``. ``key``, ``authority``: instead of the right ones."""
        security, config = ["--insecure"], f"partition-id={worker} num-partitions={count}"
        if self.keys:
            key = key or self.keys / f"node-{worker}"
            config += f' key="{key}"'
            security = [
                "--root-certificates",
                str(authority or self.keys / "ca.crt"),
                "--auth-supernode-private-key",
                str(key),
            ]
        command = [
            "flower-supernode",
            "--superlink",
            f"{HOST}:{self.port}",
            "--host",
            HOST,
            "--port",
            str(free_port()),
            "--node-config",
            config,
            *security,
        ]
        return self._start(name or f"node-{worker}", command)

    def register(self, key: Path) -> None:
        """Tell the SuperLink the public key of a node, without which it refuses the node."""
        self._call(["flwr", "supernode", "register", f"{key}.pub", SUPERLINK], "register")

    def run(self, flags: str, timeout: float | None = None, **settings: float) -> None:
        """``flwr run`` with these flags of main.py, until it ends; the server's log comes with it,
        as log("run"). Raises :class:`UsageError` where the run failed."""
        values = {"flags": flags, "node-keys": str(self.keys or "")}
        values |= {name.replace("_", "-"): value for name, value in settings.items()}
        config = self.folder / "run-config.toml"  # JSON's strings and numbers are TOML's
        config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
        command = ["flwr", "run", str(APP), SUPERLINK, "--stream", "--run-config", str(config)]
        self._call(command, "run", timeout)

    def log(self, name: str) -> list[str]:
        """The lines of a process's log, empty ones left out."""
        lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        return [line for line in lines if line.strip()] or ["its log is empty"]

    def stop(self) -> None:
        """End everything that was started, with all that it started in turn."""
        family = [pid for process in self.processes.values() for pid in [process.pid, *descendants(process.pid)]]
        for process in self.processes.values():
            _send(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
        for pid in family:
            _send(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
        while running(family):
            time.sleep(0.05)
        self.processes.clear()

    def _start(self, name: str, command: list[str]) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "wb") as log:
            self.processes[name] = subprocess.Popen(
                self._absolute(command),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        return self.processes[name]

    def _call(self, command: list[str], name: str, timeout: float | None = None) -> None:
        process = self._start(name, command)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise UsageError(f"'flwr {name}' took over {timeout:.0f} s: see the logs in {self.folder}.") from None
        lines = self.log(name)
        told = [line for line in lines if line.startswith("error: ")]
        if told:
            raise UsageError(told[-1].removeprefix("error: "))
        if code or any("Exit Code:" in line for line in lines):  # flwr run ends with 0 whatever the server did
            raise UsageError(f"'flwr {name}' failed: {lines[-1]} (logs in {self.folder}).")

    def _absolute(self, command: list[str]) -> list[str]:
        return [str(self.bin / command[0]), *command[1:]]


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def descendants(pid: int) -> list[int]:
    """The children of a process, their children, and so on (Linux; elsewhere none are found, and Flower's
    processes notice within seconds that their parent has gone)."""
    found: list[int] = []
    for file in Path("/proc", str(pid), "task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:  # gone meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def running(pids: list[int]) -> list[int]:
    """Those that still run; a zombie, which nobody waited for, does not (Linux)."""
    return [pid for pid in pids if _state(pid) not in ("Z", "X", None)]


def _state(pid: int) -> str | None:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def listening(port: int) -> bool:
    """Whether something accepts connections on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
