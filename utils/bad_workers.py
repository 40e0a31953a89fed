"""Workers that are bad on purpose, as ``--bad_data`` and ``--byzantine`` ask for: COUNT:KIND."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from utils.errors import UsageError, unknown_name
from utils.random import permutations


def bad_workers(
    flag: str, text: str, kinds: Iterable[str], num_workers: int, *keys: int | str, least: int = 1
) -> tuple[list[int], str]:
    """'COUNT:KIND' as the workers, ascending, drawn by the keys, and the kind.

    Raises UsageError, with the flag's name, for other text, a kind that is not among ``kinds``, a COUNT below ``least``
    or one that leaves no honest worker.
    """
    kinds = list(kinds)
    match = re.fullmatch(r"([0-9]{1,9}):(.*)", text.strip())
    if match is None:
        raise UsageError(f"{flag} {text!r}: write COUNT:KIND, such as 2:{kinds[0]}; kinds: {', '.join(kinds)}.")
    count, kind = int(match[1]), match[2]
    if kind not in kinds:
        raise unknown_name(f"{flag} kind", kind, kinds)
    if count >= num_workers:
        raise UsageError(
            f"{flag} {text}: {count} of {num_workers} workers leaves none that is honest; use a COUNT below "
            f"{num_workers}."
        )
    if count < least:
        raise UsageError(f"{flag} {text}: COUNT must be {least} or more, as in 2:{kinds[0]}.")
    drawn = permutations(torch.tensor([num_workers]), *keys)[0, :count]
    return sorted(drawn.tolist()), kind
