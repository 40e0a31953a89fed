# pragma version >=0.4.3,<0.5
"""
@title Proofs
@license Apache-2.0
@notice What a leaf of a tree is, where it hangs, and which amount follows from values: pure functions.

        Trees are binary and positional: leaf i hangs at position i of depth ceil(log2(workers)), empty leaves are zero,
        leaves are hashed twice. So an index has one leaf, and an inner node is no leaf.
"""

MAX_PANEL: constant(uint256) = 15
MAX_DEPTH: constant(uint256) = 17  # 131,072 workers
MAX_WEIGHT: constant(uint256) = 2**112  # times a budget of 2**96 it stays far below 2**256


struct Leaf:  # of the payout list
    account: address
    amount: uint256
    weights: uint256  # sum of the weights up to this worker,
    amounts: uint256  # of the amounts


@internal
@pure
def depth(workers: uint256) -> uint256:
    found: uint256 = 0
    for level: uint256 in range(MAX_DEPTH):
        if 2**level < workers:
            found = level + 1
    return found


@internal
@view
def payout_leaf(run: bytes32, index: uint256, leaf: Leaf) -> bytes32:
    return self._twice(
        abi_encode(chain.id, self, run, index, leaf.account, leaf.amount, leaf.weights, leaf.amounts)
    )


@internal
@pure
def roster_leaf(index: uint256, account: address) -> bytes32:
    return self._twice(abi_encode(index, account))


@internal
@pure
def value_leaf(run: bytes32, index: uint256, opened: int256) -> bytes32:
    return self._twice(abi_encode(run, index, opened))


@internal
@pure
def _twice(encoded: Bytes[256]) -> bytes32:
    return keccak256(keccak256(encoded))


@internal
@pure
def check(root: bytes32, depth: uint256, index: uint256, leaf: bytes32, proof: DynArray[bytes32, MAX_DEPTH]):
    """
    @notice Reverts unless `leaf` hangs at position `index` of the tree.
    """
    assert len(proof) == depth, "proof"
    node: bytes32 = leaf
    at: uint256 = index
    for sibling: bytes32 in proof:
        if at % 2 == 0:
            node = keccak256(concat(node, sibling))
        else:
            node = keccak256(concat(sibling, node))
        at //= 2
    assert node == root, "proof"


@internal
@pure
def check_end(index: uint256, proof: DynArray[bytes32, MAX_DEPTH]):
    """
    @notice Reverts unless nothing but zeros hangs to the right of position `index`.
    """
    zeros: bytes32 = empty(bytes32)
    at: uint256 = index
    for sibling: bytes32 in proof:
        assert at % 2 == 1 or sibling == zeros, "end"
        zeros = keccak256(concat(zeros, zeros))
        at //= 2


@internal
@pure
def share(
    budget: uint256, weight: uint256, total: uint256, remainder: uint256, last: uint256, index: uint256
) -> uint256:
    """
    @notice The amount of one worker under the largest-remainder split of `budget`, given the sum of weights, and the
            smallest remainder that is rounded up with the last worker that has it.
    """
    if weight == 0:
        return 0
    left: uint256 = budget * weight % total
    rounded_up: bool = left > remainder or (left == remainder and index <= last)
    return budget * weight // total + (1 if rounded_up else 0)


@internal
@pure
def weight(opened: DynArray[int256, MAX_PANEL]) -> uint256:
    """
    @return The lower median, not less than 0 and not more than MAX_WEIGHT.
    """
    ordered: DynArray[int256, MAX_PANEL] = opened
    for i: uint256 in range(len(ordered), bound=MAX_PANEL):  # insertion sort
        at: uint256 = i
        for _: uint256 in range(MAX_PANEL):
            if at == 0 or ordered[at - 1] <= ordered[at]:
                break
            larger: int256 = ordered[at - 1]
            ordered[at - 1] = ordered[at]
            ordered[at] = larger
            at -= 1
    median: int256 = ordered[(len(ordered) - 1) // 2]
    return min(convert(max(median, 0), uint256), MAX_WEIGHT)
