"""One intra-op thread everywhere, subprocesses included: two threads spin at OpenMP barriers. Hypothesis draws the
same examples each time, so that a change is what makes a test fail; HYPOTHESIS_PROFILE=random draws others."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# --- games of rewards on a chain (ledger_game.py), which need packages of their own

CHAINS = ("embedded", pytest.param("anvil", marks=pytest.mark.anvil))


@pytest.fixture(scope="module", params=CHAINS)
def new_chain(request):
    """Makes chains of one kind: those who meet a game in another part of it have a chain of their own."""
    from ledger_game import anvil

    from ledger.chain import Chain

    with contextlib.ExitStack() as running:
        yield lambda: Chain.embedded() if request.param == "embedded" else Chain.connect(running.enter_context(anvil()))


@pytest.fixture(scope="module")
def games(new_chain):
    """Games by how far they are, each with its right list: "new", before the deposit; "evaluated", a list can be
    posted; "final", workers can claim."""
    from ledger_game import Game

    made: dict = {}

    def game_at(part: str):
        if part not in made:
            game = Game(new_chain())
            payout = game.payout()
            if part != "new":
                getattr(game, part)(payout)
            made[part] = (game, payout)
        return made[part]

    return game_at


@contextlib.contextmanager
def _undone(chain):
    """What happens inside has not happened afterwards."""
    before = chain.snapshot()
    yield
    chain.revert(before)


@pytest.fixture
def game(games):
    with _undone(games("new")[0].chain):
        yield games("new")[0]


@pytest.fixture
def evaluated(games):
    with _undone(games("evaluated")[0].chain):
        yield games("evaluated")


@pytest.fixture
def final(games):
    with _undone(games("final")[0].chain):
        yield games("final")


@pytest.fixture
def hostile(games):
    """A game in a token that can be told to misbehave."""
    from ledger_game import Game

    chain = games("new")[0].chain
    with _undone(chain):
        yield Game(chain, "Hostile")

# --- small runs with a ledger (ledger_runs.py)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The ledger of an honest run of ten rounds; its keys lie beside it."""
    from ledger_runs import signed_run

    return signed_run(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def copied(honest, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(honest, tmp_path / "ledger"))
