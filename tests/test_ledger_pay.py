"""Nothing is paid on values that were not held against retraining, or of a run whose ledger does not hold."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

# Not by importing them, which would raise the recursion limit of this process.
if not all(map(find_spec, ("securesystemslib", "multiformats", "web3", "vyper", "eth_tester", "eth"))):
    pytest.skip("pip install -r requirements-ledger.txt", allow_module_level=True)

from command import prune, refused  # noqa: E402

from ledger.__main__ import main as ledger_main  # noqa: E402
from ledger.audited import NotAudited, audited  # noqa: E402
from utils.errors import UsageError  # noqa: E402
from utils.records import write_json  # noqa: E402
from utils.scores import read_scores, write_scores  # noqa: E402


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a ledger, one worker of wrong labels, scores and their audit."""
    folder = tmp_path_factory.mktemp("pay")
    flags = ("--ledger", folder / "ledger", "--worker_flips", "0", "0", "0", "0.6", "--epochs", "6")
    prune(folder, "--stage", "1", *flags)
    prune(folder, "--stage", "2", "--audit", "--methods", "cascade", "if", "--audit_groups", "10", *flags)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy that a test may change (its ledger is that of the first one)."""
    shutil.copytree(whole, tmp_path / "pay")
    return tmp_path / "pay" / "run"


def change(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def test_a_chain_in_this_process_leaves_the_recursion_limit_as_it_is():
    """Where it is raised, JSON that is nested 100,000 deep ends the process instead of being refused."""
    from ledger.chain import Chain
    from utils.files import parse_json

    limit = sys.getrecursionlimit()
    Chain.embedded(1)
    assert sys.getrecursionlimit() == limit
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000 + "]" * 100_000)


def test_values_are_scores_summed_by_worker(run, whole):
    found = audited(run, "cascade")
    scores = read_scores(run / "influence" / "cascade.zarr")
    for k in range(4):
        assert found.values_N[k] == pytest.approx(scores["scores"][scores["worker"] == k].sum(), abs=1e-12)
    assert not found.doubts and found.evidence["interval"][0] > 0.3
    assert found.values_N[3] < min(found.values_N[:3])


def test_pay_prints_a_table_whose_sum_is_the_budget(run, capsys):
    assert ledger_main(["pay", str(run), "--budget", "1000003"]) == 0
    said = capsys.readouterr().out
    record = json.loads((run / "payout.json").read_text())
    amounts = [row["amount"] for row in record["workers"]]
    assert sum(amounts) == 1000003 and min(amounts) == amounts[3] and record["simulated"] and not record["forced"]
    assert all((row["gas"] is not None) == (row["amount"] > 0) for row in record["workers"])
    assert "1,000,003" in said and "a simulation" in said and (run / "payout.png").exists()
    values = np.maximum([row["value"] for row in record["workers"]], 0)
    assert amounts == pytest.approx(1000003 * values / values.sum(), abs=1)


def not_paid(run: Path, match: str, **options) -> None:
    with pytest.raises(NotAudited, match=match):
        audited(run, "cascade", **options)
    forced = audited(run, "cascade", force=True, **options)
    assert len(forced.doubts) == 1 and len(forced.values_N) == 4


def test_scores_without_an_audit(run):
    (run / "audit.json").unlink()
    not_paid(run, "there is no audit of cascade on this run")


def test_an_audit_that_does_not_say_enough(run):
    not_paid(run, r"its lower end must be above 0.99 \(--min_lds\)", min_lds=0.99)


def test_an_audit_of_another_run(run):
    change(run / "audit.json", run="ab" * 32)
    not_paid(run, "is not the audit of these scores of this run")


def test_scores_that_were_changed_after_the_audit(run):
    path = run / "influence" / "cascade.zarr"
    kept = read_scores(path)
    raised = kept["scores"] + (kept["worker"] == 3)  # with a digest that is right
    write_scores(path, {"scores": raised, "sample_id": kept["sample_id"], "worker": kept["worker"]}, kept["settings"])
    not_paid(run, "is not the audit of these scores of this run")


def test_scores_that_were_given_to_another_worker(run):
    path = run / "influence" / "cascade.zarr"
    kept = read_scores(path)
    mine = kept["worker"] * 0 + 3
    write_scores(path, {"scores": kept["scores"], "sample_id": kept["sample_id"], "worker": mine}, kept["settings"])
    with pytest.raises(NotAudited, match="is not the audit of these scores"):
        audited(run, "cascade")


def test_a_run_without_a_ledger(run):
    record = json.loads((run / "stage1" / "config.json").read_text())
    record["config"]["ledger"] = None
    write_json(run / "stage1" / "config.json", record)
    not_paid(run, "the run has no ledger")


def test_a_ledger_that_does_not_hold(run):
    ledger = run.parent / "ledger"
    text = (ledger / "records-0.jsonl").read_text()
    (ledger / "records-0.jsonl").write_text("".join(text.splitlines(keepends=True)[:-9]))
    not_paid(run, "its ledger does not hold: .* is missing", ledger=ledger)


def test_a_ledger_that_is_not_closed(run):
    ledger = run.parent / "ledger"
    for name, last in (("records-0.jsonl", 4), ("rounds.jsonl", 1)):
        text = (ledger / name).read_text()
        (ledger / name).write_text("".join(text.splitlines(keepends=True)[:-last]))
    not_paid(run, "is not closed", ledger=ledger)


def test_the_ledger_of_another_run(run, whole, tmp_path):
    other = tmp_path / "other"
    prune(other, "--stage", "1", "--ledger", other / "ledger", "--lr", "0.01")
    not_paid(run, "is the ledger of another run", ledger=other / "ledger")


def test_a_ledger_of_other_keys_than_those_that_are_known(run):
    not_paid(run, "its ledger does not hold: the key of worker 0 is not", keys=["ab" * 32] * 4)


def test_a_damaged_audit(run):
    change(run / "audit.json", methods={"cascade": [1]})
    with pytest.raises(UsageError, match="audit.json is damaged"):
        audited(run, "cascade", force=True)


def test_scores_of_another_run_are_never_paid(run):
    path = run / "influence" / "cascade.zarr"
    kept = read_scores(path)
    settings = kept["settings"] | {"run": "ab" * 32}
    write_scores(path, {name: kept[name] for name in ("scores", "sample_id", "worker")}, settings)
    with pytest.raises(UsageError, match="are of another run"):
        audited(run, "cascade", force=True)


def test_a_forced_payment_says_so(run, capsys):
    (run / "audit.json").unlink()
    assert ledger_main(["pay", str(run), "--budget", "10", "--force"]) == 0
    record = json.loads((run / "payout.json").read_text())
    assert record["forced"] and "there is no audit of cascade" in record["doubts"][0]
    assert "forced, though there is no audit" in capsys.readouterr().err


def valuation_of(run: Path, interval: list[float], digest: str | None = None) -> None:
    """What python -m valuation --seeds would leave."""
    identity = json.loads((run / "stage1" / "config.json").read_text())["identity"]
    place = run / "valuation" / "seed-0"
    place.mkdir(parents=True)
    write_json(place / "config.json", {"identity": identity | ({"digest": digest} if digest else {})})
    write_json(place / "valuation.json", {"methods": {"ddval": {"values": [0.4, 0.3, 0.2, 0.1]}}})
    write_json(run / "valuation" / "summary.json", {"methods": {"ddval": {"relative_l1": interval}}})


def test_ddval_is_paid_where_it_comes_near_retrained_coalitions(run):
    valuation_of(run, [0.1, 0.05, 0.15])
    found = audited(run, "ddval")
    assert found.values_N.tolist() == [0.4, 0.3, 0.2, 0.1] and found.evidence["relative_l1"] == 0.1


def test_ddval_is_not_paid_where_it_does_not(run):
    valuation_of(run, [0.18, 0.02, 0.34])
    with pytest.raises(NotAudited, match=r"off by 0.180 \[0.020, 0.340\] in relative L1"):
        audited(run, "ddval")


def test_ddval_of_another_run_is_never_paid(run):
    valuation_of(run, [0.1, 0.05, 0.15], digest="ab" * 32)
    with pytest.raises(UsageError, match="has no values of this run"):
        audited(run, "ddval", force=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "0"], "--budget 0"),
        (["--budget", str(2**96 + 1)], "it must be from 1 to"),
        (["--budget", "many"], "invalid int"),
        (["--budget", "10", "--method", "cascad"], "Did you mean 'cascade'"),
        (["--budget", "10", "--method", "dice"], "no scores at"),
        (["--budget", "10", "--min_lds", "1.1"], "nothing is paid"),
        (["--budget", "10", "--addresses", *["0x12"] * 4], "is no address"),
        (["--budget", "10", "--rpc", "http://127.0.0.1:9"], "no Ethereum node answers"),
        (["--budget", "10", "--rpc", "file:///etc/passwd"], "begins with http"),
    ],
)
def test_what_pay_refuses(run, capsys, words, said):
    assert said in refused(capsys, ledger_main(["pay", str(run), *words]))
    assert not (run / "payout.json").exists()


def test_a_simulated_payment_cannot_be_claimed_elsewhere(run, capsys):
    assert ledger_main(["pay", str(run), "--budget", "10"]) == 0
    words = ["claim", str(run), "--worker", "0", "--rpc", "http://127.0.0.1:9"]
    assert "which is gone" in refused(capsys, ledger_main(words))


@pytest.mark.slow
def test_the_demonstration(tmp_path, capsys):
    assert ledger_main(["demo", "--results_dir", str(tmp_path), "--quiet"]) == 0
    record = json.loads((tmp_path / "ledger-demo" / "payout.json").read_text())
    amounts = [row["amount"] for row in record["workers"]]
    assert sum(amounts) == 1_000_000 and amounts[7] == 0 and max(amounts[6:]) < min(amounts[:6])
    assert "computed again" in capsys.readouterr().out and (tmp_path / "ledger-demo" / "payout.png").exists()
    page = (tmp_path / "ledger-demo" / "report.html").read_text()
    assert "Who is paid" in page and all(row["account"] in page for row in record["workers"])
    assert ledger_main(["verify", str(tmp_path / "ledger-demo" / "ledger"), "--replay", "sample:2", "--quiet"]) == 0


def test_keys_of_accounts_that_are_none():
    from ledger.chain import Chain, _account

    web3 = Chain.embedded(1).web3
    for key in ("0x12", "no key", "0" * 64):
        with pytest.raises(UsageError, match="private key 2 is none") as found:
            _account(web3, 2, key)
        assert key not in str(found.value)


def test_time_that_nobody_can_move_is_waited_for(monkeypatch, capsys):
    from ledger.chain import Chain

    chain = Chain.embedded(1)
    travel, moment = chain._travel, chain.now + 100
    monkeypatch.setattr(chain, "_travel", lambda moment: False)
    monkeypatch.setattr(chain, "_test_call", lambda method, *arguments: None)

    def sleep(seconds):
        travel(min(chain.now + 60, moment))
        chain.web3.provider.ethereum_tester.mine_block()

    monkeypatch.setattr("ledger.chain.time.sleep", sleep)
    chain.wait_until(moment)
    assert chain.now >= moment and capsys.readouterr().err == "waiting 100 s for the chain's time\n"
