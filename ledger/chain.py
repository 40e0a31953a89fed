"""An Ethereum chain, behind the few things that the ledger does with one.

``Chain.embedded()`` is one in this process (eth-tester on py-evm): it ends with the process, and its time is moved at
will. ``Chain.connect(url)`` is any node that speaks JSON-RPC: anvil, or a real one, on which time passes by itself.
Nothing else in the project knows of either.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledger.compiler import CONTRACTS, INSTALL, compiled, same_recursion_limit
from utils.errors import UsageError

if TYPE_CHECKING:
    from web3 import Web3
    from web3.contract import Contract

EMBEDDED_GAS = 15_000_000  # the limit of each transaction on the embedded chain: nobody pays for it
MNEMONIC = "test test test test test test test test test test test junk"  # of the accounts of test chains, anvil's too
POLL = 2.0  # seconds between two looks at a real chain's time


class Refused(UsageError):
    """A transaction or call that the contract refused; ``reason`` is the contract's word for it."""

    def __init__(self, action: str, reason: str) -> None:
        super().__init__(f"the contract refused {action}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Receipt:
    """What became of a transaction: the gas that it used, and the events of its contract as (name, arguments)."""

    gas: int
    events: list[tuple[str, dict[str, Any]]]


class Chain:
    """One chain, and the accounts that transactions can be sent from here.

    accounts: addresses; those of ``keys`` come first, then those that the node signs for.
    """

    def __init__(self, web3: Web3, keys: Sequence[str] = (), gas: int | None = None) -> None:
        self.web3, self.gas = web3, gas
        self.accounts = list(web3.eth.accounts)
        if keys:
            from web3.middleware import SignAndSendRawMiddlewareBuilder

            own = [_account(web3, number, key) for number, key in enumerate(keys, start=1)]
            web3.middleware_onion.inject(SignAndSendRawMiddlewareBuilder.build(own), layer=0)
            self.accounts = [account.address for account in own] + self.accounts
        self.chain_id = web3.eth.chain_id

    @classmethod
    @same_recursion_limit()
    def embedded(cls, accounts: int = 24) -> Chain:
        """A new chain in this process, with that many rich accounts. Raises UsageError where a package is missing."""
        try:
            from eth_tester import EthereumTester, PyEVMBackend
            from web3 import EthereumTesterProvider, Web3
        except ImportError as error:
            raise UsageError(f"a chain needs the package '{error.name}', which is missing: {INSTALL}.") from None
        for name in ("eth", "eth_tester"):
            logging.getLogger(name).setLevel(logging.ERROR)
        backend = PyEVMBackend.from_mnemonic(MNEMONIC, num_accounts=accounts)
        return cls(Web3(EthereumTesterProvider(EthereumTester(backend))), gas=EMBEDDED_GAS)

    @classmethod
    @same_recursion_limit()
    def connect(cls, url: str, keys: Sequence[str] = ()) -> Chain:
        """The chain of the node at ``url`` (http, https); ``keys``: private keys, in hexadecimal, to sign with here.

        Raises UsageError where a package is missing or nothing answers.
        """
        try:
            from web3 import HTTPProvider, Web3
        except ImportError as error:
            raise UsageError(f"a chain needs the package '{error.name}', which is missing: {INSTALL}.") from None
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--rpc {url}: the address of a node begins with http:// or https://.")
        web3 = Web3(HTTPProvider(url))
        if not web3.is_connected():
            raise UsageError(f"--rpc {url}: no Ethereum node answers there.")
        return cls(web3, keys)

    def deploy(self, name: str, *arguments: Any, sender: str, folder: Path = CONTRACTS) -> tuple[Contract, Receipt]:
        """A new contract of ``folder/NAME.vy``."""
        code = compiled(name, folder)
        factory = self.web3.eth.contract(abi=code["abi"], bytecode=code["bytecode"])
        address, receipt = self._transact(f"deploying {name}", factory.constructor(*arguments), factory, sender)
        return self.web3.eth.contract(address, abi=code["abi"]), receipt

    def at(self, name: str, address: str) -> Contract:
        """The contract NAME that is already on the chain at ``address``. Raises UsageError where none is."""
        if not self.web3.is_address(address) or not self.web3.eth.get_code(self.web3.to_checksum_address(address)):
            raise UsageError(f"there is no contract at {address} on this chain.")
        return self.web3.eth.contract(self.web3.to_checksum_address(address), abi=compiled(name)["abi"])

    def send(self, contract: Contract, function: str, *arguments: Any, sender: str) -> Receipt:
        """Calls a function in a transaction. Raises Refused, with the contract's reason, where it reverts."""
        call = contract.functions[function](*self._arguments(arguments))
        return self._transact(function, call, contract, sender)[1]

    def call(self, contract: Contract, function: str, *arguments: Any) -> Any:
        """What a function returns, as of the last block. Raises Refused where it reverts."""
        with _refusals(function):
            return contract.functions[function](*self._arguments(arguments)).call()

    def address(self, text: str) -> str:
        """The address in the mixed case that carries its checksum (EIP-55). Raises UsageError for what is no address,
        and for
        mixed case whose checksum is another's: a digit is wrong."""
        digits = text[2:] if self.web3.is_address(text) else ""
        if not digits or (digits not in (digits.lower(), digits.upper()) and not self.web3.is_checksum_address(text)):
            raise UsageError(
                f"{text!r} is no address: that is 0x and 40 hexadecimal digits, in one case or with a checksum."
            )
        return self.web3.to_checksum_address(text)

    def _arguments(self, arguments: Sequence[Any]) -> list[Any]:
        """Arguments with every address as the library wants it."""
        return [
            self._arguments(value) if isinstance(value, list | tuple)
            else self.address(value) if isinstance(value, str) and value.startswith("0x") and len(value) == 42
            else value
            for value in arguments
        ]  # fmt: skip

    def _transact(self, action: str, call: Any, contract: Any, sender: str) -> tuple[str, Receipt]:
        options = {"from": sender} | ({"gas": self.gas} if self.gas else {})
        with _refusals(action):  # without a limit of gas the node tries it first, and refuses what reverts
            receipt = self.web3.eth.wait_for_transaction_receipt(call.transact(options))
            if not receipt["status"]:
                getattr(call, "call", call.estimate_gas)(options)  # to hear why; a constructor has no call
                raise Refused(action, "")
        return receipt["contractAddress"], Receipt(receipt["gasUsed"], _events(contract, receipt))

    @property
    def now(self) -> int:
        """The time of the last block, in seconds since 1970."""
        return self.web3.eth.get_block("latest")["timestamp"]

    def wait_until(self, moment: int) -> None:
        """Returns when a block's time is ``moment`` or later: at once on a chain for tests, whose time is moved."""
        if self.now >= moment:
            return
        if self._test_call("evm_increaseTime", moment - self.now) or self._travel(moment):
            self._test_call("evm_mine")
        if self.now < moment:
            print(f"waiting {moment - self.now:,} s for the chain's time", file=sys.stderr)
        while self.now < moment:
            time.sleep(POLL)

    def _travel(self, moment: int) -> bool:
        tester = getattr(self.web3.provider, "ethereum_tester", None)
        if tester is not None:
            tester.time_travel(moment)
        return tester is not None

    def snapshot(self) -> Any:
        """The state of a chain for tests, for ``revert``."""
        return self._test_call("evm_snapshot")

    def revert(self, snapshot: Any) -> None:
        self._test_call("evm_revert", snapshot)

    def _test_call(self, method: str, *arguments: Any) -> Any:
        """What a chain for tests answers; None where the chain knows no such method."""
        with contextlib.suppress(NotImplementedError):
            return self.web3.provider.make_request(method, list(arguments)).get("result")
        return None


def _account(web3: Web3, number: int, key: str) -> Any:
    """The account of a private key; the key itself is in no message."""
    try:
        return web3.eth.account.from_key(key)
    except Exception as error:  # ValueError, binascii.Error, a ValidationError of eth-keys
        raise UsageError(f"private key {number} is none: 64 hexadecimal digits each, with spaces between.") from error


@contextlib.contextmanager
def _refusals(action: str):
    """Turns the errors by which libraries and nodes say 'reverted' into Refused."""
    from web3.exceptions import ContractLogicError, Web3RPCError

    try:
        yield
    except ContractLogicError as error:
        raise Refused(action, _reason(error)) from None
    except Web3RPCError as error:
        raise Refused(action, _reason(error)) from None
    except Refused:
        raise
    except Exception as error:
        if type(error).__name__ != "TransactionFailed":  # eth-tester's, which need not be installed
            raise
        raise Refused(action, _reason(error)) from None


def _reason(error: Exception) -> str:
    text = str(getattr(error, "message", None) or error).removeprefix("execution reverted").strip(": ")
    return text if text and text != "b''" else "no reason given"


def _events(contract: Any, receipt: Any) -> list[tuple[str, dict[str, Any]]]:
    from web3.logs import DISCARD

    address = receipt["contractAddress"] or contract.address
    logs = receipt["logs"] if any(log["address"] == address for log in receipt["logs"]) else []
    found = []
    for event in contract.events if logs else ():
        found += event().process_receipt(receipt, errors=DISCARD)
    ordered = sorted((entry for entry in found if entry["address"] == address), key=lambda entry: entry["logIndex"])
    return [(entry["event"], dict(entry["args"])) for entry in ordered]
