"""A whole payout through one function, and what can go wrong before anything is sent."""

from __future__ import annotations

import secrets
import sys

import pytest
from ledger_game import BOND, PERIODS, TOKENS, anvil

from benchmarks import gas
from ledger.chain import Chain, Refused
from ledger.compiler import compiled
from ledger.payout import Payout, claim, claim_all, deploy, pay
from utils.errors import UsageError

CONFIG = bytes(range(32))
VALUES = [0.75, -0.5, 0.0, 0.25, 1.5]
ACCOUNTS = [f"0x{0xFACE + worker:040x}" for worker in range(5)]

MISTYPED = "0x52908400098527886E0F7030069857D2E4169Ee7"  # the case of one digit says that another is wrong


@pytest.fixture
def contracts(game):
    token, rewards, _ = deploy(game.chain, game.chain.accounts[0], BOND, PERIODS)
    return game.chain, rewards, token


def held(chain, token, account):
    return chain.call(token, "balanceOf", account)


def test_one_evaluator(contracts):
    chain, rewards, token = contracts
    paid = claim_all(chain, rewards, pay(chain, rewards, token, 10**6, VALUES, ACCOUNTS, CONFIG))
    assert [row["amount"] for row in paid.table()] == [300_000, 0, 0, 100_000, 600_000]
    assert [row["value"] for row in paid.table()] == VALUES
    assert [row["gas"] is not None for row in paid.table()] == [True, False, False, True, True]
    assert [held(chain, token, account) for account in ACCOUNTS] == paid.payout.split.amounts
    assert held(chain, token, rewards.address) == 0  # all bonds are back
    assert {"deposit", "commit", "reveal", "post", "claim"} <= set(paid.gas)
    with pytest.raises(Refused, match="claimed"):
        claim(chain, rewards, paid.payout, 0)


def test_several_evaluators_count_by_their_median(contracts):
    chain, rewards, token = contracts
    lists = [VALUES, [100.0, -0.5, 0.0, 0.25, -9.0], [0.75, 3.0, 0.0, -1.0, 1.5]]
    paid = pay(chain, rewards, token, 10**6, lists, ACCOUNTS, CONFIG)
    assert [row["value"] for row in paid.table()] == VALUES
    assert [row["amount"] for row in paid.table()] == [300_000, 0, 0, 100_000, 600_000]


def test_no_positive_value_is_a_refund(contracts):
    chain, rewards, token = contracts
    before = held(chain, token, chain.accounts[0])
    paid = claim_all(chain, rewards, pay(chain, rewards, token, 10**6, [-1.0, 0.0], ACCOUNTS[:2], CONFIG))
    assert [row["amount"] for row in paid.table()] == [0, 0] and "refund" in paid.gas
    assert held(chain, token, rewards.address) == 0
    assert held(chain, token, chain.accounts[0]) == before - BOND  # which the evaluator has


@pytest.mark.parametrize("killed_at", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3))])
def test_a_payout_that_was_killed_goes_on(contracts, killed_at):
    chain, rewards, token = contracts
    secret, puts = secrets.token_bytes(32), []

    def put(content: bytes) -> str:
        puts.append(content)
        if len(puts) == killed_at:
            raise KeyboardInterrupt
        return "cid"

    terms = (chain, rewards, token, 10**6, [VALUES, VALUES], ACCOUNTS, CONFIG)
    with pytest.raises(KeyboardInterrupt):
        pay(*terms, secret=secret, put=put)
    paid = pay(*terms, secret=secret, put=put)
    assert "deposit" not in paid.gas and "commit" not in paid.gas
    claim_all(chain, rewards, paid)
    assert [held(chain, token, account) for account in ACCOUNTS] == [300_000, 0, 0, 100_000, 600_000]
    assert pay(*terms, secret=secret, put=put).gas == {}  # there is nothing left to do
    assert held(chain, token, rewards.address) == 0


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"config": b"short"}, "that of config.json has 32"),
        ({"values": [1.0, 2.0]}, "5 addresses for"),
        ({"values": [1.0, float("nan"), 0, 0, 0]}, "worker 1 has the value nan"),
        ({"values": [VALUES] * 16}, "1 to 15"),
        ({"accounts": [*ACCOUNTS[:4], "0x12"]}, "is no address"),
        ({"accounts": [*ACCOUNTS[:4], MISTYPED]}, "is no address"),
        ({"accounts": [*ACCOUNTS[:4], "0x" + 40 * "0"]}, "worker 4 cannot be paid at the address 0"),
        ({"budget": 0}, "a budget of 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(contracts, changed, message):
    chain, rewards, token = contracts
    terms = {"budget": 10**6, "values": VALUES, "accounts": ACCOUNTS, "config": CONFIG} | changed
    block = chain.web3.eth.block_number
    with pytest.raises(UsageError, match=message):
        pay(chain, rewards, token, **terms)
    assert chain.web3.eth.block_number == block


def test_a_payout_list_in_a_file(game):
    payout = game.payout()
    again = Payout.from_json(payout.to_json())
    assert again == payout and again.tree.root == payout.tree.root
    for damage in (
        {"values": [["x"]]},
        {"values": [["1"], ["1", "2"]]},
        {"budget": None},
        {"run": "zz"},
        {"values": []},
    ):
        with pytest.raises(UsageError):
            Payout.from_json(payout.to_json() | damage)


def test_a_node_that_is_not_there():
    for url, message in {"localhost:1": "begins with http", "http://127.0.0.1:1": "no Ethereum node answers"}.items():
        with pytest.raises(UsageError, match=message):
            Chain.connect(url)


def test_a_contract_that_is_not_there(game):
    for address in (game.stranger, "0x12", "nonsense"):
        with pytest.raises(UsageError, match="no contract at"):
            game.chain.at("Rewards", address)
    assert game.chain.at("Rewards", game.rewards.address.lower()).address == game.rewards.address


def test_what_was_compiled_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled.__wrapped__("Hostile", TOKENS)
    (kept,) = (tmp_path / "decentralized-learning").iterdir()
    kept.write_text("damaged")
    assert compiled.__wrapped__("Hostile", TOKENS) == first
    monkeypatch.setattr("vyper.cli.vyper_compile.compile_files", None)
    assert compiled.__wrapped__("Hostile", TOKENS) == first


@pytest.mark.parametrize("package", ("web3", "eth_tester", "vyper"))
def test_a_package_that_is_missing(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=f"'{package}', which is missing: 'make ledger'"):
        compiled.__wrapped__("VNX") if package == "vyper" else Chain.embedded()


def test_gas_of_every_step(capsys):
    assert gas.main(["--workers", "3", "--evaluators", "1"]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    costs = {step.strip(" `"): int(cost.replace(",", "")) for _, step, cost, _ in (row.split("|") for row in rows)}
    assert tuple(costs) == gas.STEPS and costs["claim"] < 100_000 and costs["answer"] < 200_000
    assert gas.main(["--workers", "2"]) == gas.main(["--evaluators", "16"]) == 2


@pytest.mark.anvil
def test_a_key_of_ones_own():
    """Transactions signed here, for an account that the node does not know."""
    with anvil() as url:
        node = Chain.connect(url)
        key = "0x" + secrets.token_hex(32)
        mine = Chain.connect(url, [key])
        me = mine.accounts[0]
        assert me not in node.accounts
        node.web3.eth.send_transaction({"from": node.accounts[0], "to": me, "value": 10**18})
        token, _ = mine.deploy("VNX", 1000, sender=me)
        mine.send(token, "transfer", node.accounts[1], 10, sender=me)
        assert mine.call(token, "balanceOf", me) == 990
