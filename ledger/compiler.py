"""The contracts of ledger/contracts, compiled when they are needed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.cache import default_cache_dir
from utils.errors import UsageError
from utils.files import replaced

CONTRACTS = Path(__file__).parent / "contracts"
INSTALL = "'make ledger' installs it, or 'pip install -r requirements-ledger.txt'"
PARTS = ("abi", "bytecode")


@contextlib.contextmanager
def same_recursion_limit() -> Iterator[None]:
    """Vyper, web3 and py-evm raise Python's recursion limit when they are imported, to 100,000: then JSON that is
    nested too deeply ends the process instead of being refused. In the block they may; then all is as before."""
    limit = sys.getrecursionlimit()
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@functools.cache
def compiled(name: str, folder: Path = CONTRACTS) -> dict[str, Any]:
    """``abi`` and ``bytecode`` of the contract ``folder/NAME.vy``.

    That of Rewards takes the compiler seconds, so what came out is kept in the house's cache, under a digest of the
    folder's sources and the compiler's version. Raises UsageError where there is no compiler.
    """
    with same_recursion_limit():
        return _compiled(name, folder)


def _compiled(name: str, folder: Path) -> dict[str, Any]:
    try:
        import vyper
        from vyper.cli.vyper_compile import compile_files
    except ImportError:
        raise UsageError(f"contracts are compiled by the package 'vyper', which is missing: {INSTALL}.") from None
    sources = "".join(f"{path.name}\n{path.read_text()}\n" for path in sorted(folder.glob("*.vy")))
    digest = hashlib.sha256(f"{vyper.__version__}\n{sources}".encode()).hexdigest()
    kept = default_cache_dir() / f"contract-{name}-{digest[:32]}.json"
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):  # not there, or damaged
        pass
    (output,) = compile_files([str(folder / f"{name}.vy")], PARTS).values()
    output = {part: output[part] for part in PARTS}
    try:
        with replaced(kept) as file:
            file.write_text(json.dumps(output))
    except OSError:  # a cache that cannot be written costs seconds, no more
        pass
    return output
