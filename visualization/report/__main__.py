"""Write the report of a run again: ``python -m visualization.report results/NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from utils.errors import UsageError, refusal


def main(argv: Sequence[str] | None = None) -> int:
    """Write the reports that are asked for; returns the exit code (2 for bad input, told in one line)."""
    parser = argparse.ArgumentParser(prog="python -m visualization.report", description=__doc__)
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help says more\n")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as results/NAME")
    arguments = parser.parse_args(argv)
    from visualization.report import write_report

    try:
        for run in arguments.runs:
            print(write_report(run))
    except (UsageError, OSError) as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
