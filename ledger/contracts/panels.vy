# pragma version >=0.4.3,<0.5
"""
@title Panels
@license Apache-2.0
@notice The evaluators of each run: who they are, the lists of values that they commit to and reveal, and which lists count.
        Part of Rewards.
"""

import proofs

event Evaluator:
    account: indexed(address)
    granted: bool

event Committed:
    run: indexed(bytes32)
    seat: uint256

event Revealed:
    run: indexed(bytes32)
    seat: uint256
    root: bytes32
    cid: String[96]

event Struck:
    run: indexed(bytes32)
    seat: uint256
    by: uint256

struct Panel:
    seats: DynArray[address, proofs.MAX_PANEL]
    quorum: uint256
    commit_by: uint256  # the times at which each period ends
    reveal_by: uint256
    check_by: uint256

struct Values:  # an evaluator's list
    commitment: bytes32
    root: bytes32
    strikes: uint256  # bit s: seat s says that the list cannot be had
    released: bool  # the bond is back

OWNER: public(immutable(address))

is_evaluator: public(HashMap[address, bool])
values: public(HashMap[bytes32, HashMap[uint256, Values]])  # run, seat
panels: HashMap[bytes32, Panel]


@deploy
def __init__():
    OWNER = msg.sender


@external
def set_evaluator(account: address, granted: bool):
    """
    @notice The owner grants or takes the role. Runs keep the panel that they were deposited with.
    """
    assert msg.sender == OWNER, "owner"
    self.is_evaluator[account] = granted
    log Evaluator(account=account, granted=granted)


@internal
def convene(run: bytes32, panel: Panel):
    """
    @notice Seats evaluators in ascending order; more than half of them are the quorum.
    """
    assert panel.quorum <= len(panel.seats) and 2 * panel.quorum > len(panel.seats), "quorum"
    previous: uint160 = 0
    for account: address in panel.seats:
        assert convert(account, uint160) > previous, "panel"
        assert self.is_evaluator[account], "evaluator"
        previous = convert(account, uint160)
    self.panels[run] = panel


@internal
def commit(run: bytes32, seat: uint256, commitment: bytes32):
    self._seated(run, seat)
    assert block.timestamp < self.panels[run].commit_by, "late"
    assert self.values[run][seat].commitment == empty(bytes32) and commitment != empty(bytes32), "committed"
    self.values[run][seat].commitment = commitment
    log Committed(run=run, seat=seat)


@external
def reveal(run: bytes32, seat: uint256, root: bytes32, salt: bytes32, cid: String[96]):
    """
    @notice Opens the commitment. Who does not has lost the bond.
    @param cid Where the whole list is.
    """
    self._seated(run, seat)
    assert block.timestamp >= self.panels[run].commit_by, "early"
    assert block.timestamp < self.panels[run].reveal_by, "late"
    assert self.values[run][seat].root == empty(bytes32) and root != empty(bytes32), "revealed"
    commitment: bytes32 = keccak256(abi_encode(chain.id, self, run, msg.sender, root, salt))
    assert self.values[run][seat].commitment == commitment, "commitment"
    self.values[run][seat].root = root
    log Revealed(run=run, seat=seat, root=root, cid=cid)


@external
def strike(run: bytes32, seat: uint256, struck: uint256):
    """
    @notice An evaluator says that the list of seat `struck` cannot be had, or is not what its root says. A list that more
            than half of those who revealed have struck does not count, and its bond is lost.
    """
    self._seated(run, seat)
    assert block.timestamp >= self.panels[run].reveal_by, "early"
    assert block.timestamp < self.panels[run].check_by, "late"
    assert self.values[run][seat].root != empty(bytes32), "revealed"
    assert self.values[run][struck].root != empty(bytes32), "revealed"
    self.values[run][struck].strikes |= 1 << seat
    log Struck(run=run, seat=struck, by=seat)


@external
@view
def panel(run: bytes32) -> Panel:
    return self.panels[run]


@external
@view
def counted(run: bytes32) -> DynArray[uint256, proofs.MAX_PANEL]:
    """
    @return The seats whose lists count, ascending; settled when the time to check them has passed.
    """
    return self._counted(run)


@internal
@view
def _counted(run: bytes32) -> DynArray[uint256, proofs.MAX_PANEL]:
    seats: uint256 = len(self.panels[run].seats)
    revealed: uint256 = 0
    for seat: uint256 in range(seats, bound=proofs.MAX_PANEL):
        if self.values[run][seat].root != empty(bytes32):
            revealed += 1
    found: DynArray[uint256, proofs.MAX_PANEL] = []
    for seat: uint256 in range(seats, bound=proofs.MAX_PANEL):
        if self.values[run][seat].root == empty(bytes32):
            continue
        marks: uint256 = self.values[run][seat].strikes
        strikes: uint256 = 0
        for by: uint256 in range(seats, bound=proofs.MAX_PANEL):
            strikes += (marks >> by) & 1
        if 2 * strikes <= revealed:
            found.append(seat)
    return found


@internal
@view
def _quorate(run: bytes32) -> bool:
    return len(self._counted(run)) >= self.panels[run].quorum


@internal
@view
def _seated(run: bytes32, seat: uint256):
    assert seat < len(self.panels[run].seats) and self.panels[run].seats[seat] == msg.sender, "seat"
