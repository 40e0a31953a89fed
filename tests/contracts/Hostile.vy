# pragma version >=0.4.3,<0.5
"""
@notice A token for tests that can be told to misbehave.
"""

interface Rewards:
    def is_claimed(run: bytes32, index: uint256) -> bool: view

flag Mode:
    HONEST
    RETURNS_FALSE
    MOVES_NOTHING
    KEEPS_A_FEE
    REENTERS

balanceOf: public(HashMap[address, uint256])
mode: Mode
calldata: Bytes[4096]
run: bytes32
index: uint256
entered: public(uint256)  # calls back that did not revert
attempts: public(uint256)
seen_claimed: public(bool)  # what the claim looked like from inside of its payment


@deploy
def __init__(supply: uint256):
    self.balanceOf[msg.sender] = supply
    self.mode = Mode.HONEST


@external
def behave(mode: Mode, calldata: Bytes[4096], run: bytes32, index: uint256):
    self.mode = mode
    self.calldata = calldata
    self.run = run
    self.index = index


@external
def approve(_spender: address, _value: uint256) -> bool:
    return True


@external
def transfer(_to: address, _value: uint256) -> bool:
    return self._move(msg.sender, _to, _value)


@external
def transferFrom(_from: address, _to: address, _value: uint256) -> bool:
    return self._move(_from, _to, _value)


@internal
def _move(sender: address, receiver: address, amount: uint256) -> bool:
    if self.mode == Mode.RETURNS_FALSE:
        return False
    if self.mode == Mode.MOVES_NOTHING:
        return True
    fee: uint256 = 1 if self.mode == Mode.KEEPS_A_FEE else 0
    self.balanceOf[sender] -= amount
    self.balanceOf[receiver] += amount - fee
    if self.mode == Mode.REENTERS:
        self.attempts += 1
        self.seen_claimed = staticcall Rewards(msg.sender).is_claimed(self.run, self.index)
        if raw_call(msg.sender, self.calldata, revert_on_failure=False):
            self.entered += 1
    return True
