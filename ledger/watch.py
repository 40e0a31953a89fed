"""Which leaf of a posted list to challenge: whoever holds the values that count finds it, published or kept back.

The reference is the list that follows from the values under the totals that were posted. Its first leaf that was posted
otherwise cannot be proved: everything before it is right, and one leaf follows from that. If no leaf differs, but the
totals do not fit, the last leaf cannot be proved.

Of a list that is kept back only the root is known. An answer to a challenge shows the siblings of one leaf, so the
lowest one that differs from the reference's holds the first wrong leaf: the next challenge is of its first leaf. Each
is at least one level lower, so depth + 1 challenges suffice; a conviction pays for all of them.

Legend: N workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ledger.amounts import Split, share
from ledger.payout import Payout, Posting
from ledger.trees import Tree


def reference(payout: Payout, posted: Posting) -> Payout:
    """The list that follows from the right values under the posted totals, whether they are right or not."""
    header = (posted.total, posted.remainder, posted.last)
    amounts = [share(payout.run.budget, weight, *header, index) for index, weight in enumerate(payout.weights)]
    return replace(payout, split=Split(amounts, *header))


def wrong_leaf(payout: Payout, posted: Posting, published: Tree | None = None) -> int | None:
    """The index to challenge first; None where nothing is wrong.

    payout: the right list. published: the tree of the list that the poster published; None if it was kept back, or if
    what was published has another root.
    """
    expected = reference(payout, posted)
    last = len(payout.accounts) - 1
    if expected.tree.root == posted.root:
        owed = payout.run.budget if posted.total else 0
        fits = posted.total == payout.split.total and sum(expected.split.amounts) == owed
        return None if fits else last
    if published is None or published.root != posted.root:
        return 0
    mine, theirs = (tree.levels[0] for tree in (expected.tree, published))
    return min(int((mine != theirs).any(1).argmax()), last)


def next_leaf(payout: Payout, posted: Posting, index: int, proof: Sequence[bytes]) -> int | None:
    """The index to challenge after the challenge of ``index`` was answered with the siblings ``proof``; None where they
    do not differ from the reference's."""
    levels = reference(payout, posted).tree.levels
    for height, sibling in enumerate(proof):
        beside = index >> height ^ 1
        if beside > index >> height and sibling != bytes(levels[height][beside]):
            return min(beside << height, len(payout.accounts) - 1)  # what hangs beyond the last leaf is proved with it
    return None
