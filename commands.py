"""The commands of an installation (pyproject.toml gives them their names): main.py, main_pruned.py and the modules that
are started with ``python -m`` in a checkout.

Each puts the folder that it lies in first on the path, as ``python main.py`` does: there lie the rooms.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: parallel over workers, not inside operators
sys.path.insert(0, str(Path(__file__).resolve().parent))

from utils.command import begin  # noqa: E402, it lies in the folder above


def train() -> int:
    """``decentralized-train``: main.py."""
    begin()
    from main import main

    return main()


def prune() -> int:
    """``decentralized-prune``: main_pruned.py."""
    begin()
    from main_pruned import main

    return main()


def predict() -> int:
    """``decentralized-predict``: python -m training.predict."""
    begin()
    import torch

    from training.predict import main

    torch.set_num_threads(1)
    return main()


def job() -> int:
    """``decentralized-job``: python -m training.job."""
    begin()
    from training.job import main

    return main()


def homogeneous() -> int:
    """``decentralized-homogeneous``: python -m homogeneous."""
    begin()
    from homogeneous.__main__ import main

    return main()


def valuation() -> int:
    """``decentralized-valuation``: python -m valuation."""
    begin()
    from valuation.__main__ import main

    return main()


def ledger() -> int:
    """``decentralized-ledger``: python -m ledger."""
    begin()
    from ledger.__main__ import main

    return main()


def index() -> int:
    """``decentralized-index``: python -m data.index."""
    begin()
    from data.index import main

    return main()


def resize() -> int:
    """``decentralized-resize``: python -m data.resize."""
    begin()
    from data.resize import main

    return main()


def plot() -> int:
    """``decentralized-plot``: python -m visualization.plot_utils."""
    begin()
    from visualization.plot_utils import main

    return main()


def report() -> int:
    """``decentralized-report``: python -m visualization.report."""
    begin()
    from visualization.report.__main__ import main

    return main()


def runs() -> int:
    """``decentralized-runs``: python -m visualization.runs."""
    begin()
    from visualization.runs import main

    return main()


def grid() -> int:
    """``decentralized-grid``: python -m training.grid."""
    begin()
    from training.grid import main

    return main()
