"""Golden training losses: a change that is meant to keep the numbers must keep these.

Ten steps on the digits, eight workers on a ring, seed 0, float64, the plain loop. Where a change of the
numbers is intended, run ``python tests/test_golden.py`` and say in the commit why they moved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.build import build  # noqa: E402
from training.protocols import load_protocol  # noqa: E402
from utils.args import Config  # noqa: E402

STEPS = 10
GOLDEN = {
    "mlp": [
        2.222882777, 2.212779552, 2.159580171, 2.0451819, 1.943957448, 1.853990719, 1.750253394,
        1.570695177, 1.499586105, 1.281423688, 0.005862313152, 0.4468163591,
    ],
    "cnn": [
        2.298565894, 2.2888484, 2.28399843, 2.217749625, 2.194571137, 2.16786401, 2.133675948,
        2.065050885, 2.073856831, 1.964251369, 0.001671561275, 0.3562906173,
    ],
    "cnn_smooth": [
        2.331397772, 2.327055275, 2.278625041, 2.201368958, 2.170039952, 2.125763759, 2.097508207,
        2.02735889, 2.055322334, 1.913851783, 0.007826886656, 0.3989634,
    ],
}  # fmt: skip


def losses(model: str) -> list[float]:
    """Mean training loss of the first ten rounds, then the mean and the spread of the final rows."""
    config = Config(model=model, dtype="float64", engine="loop", threads=1, channels_last=False, quiet=True, epochs=40)
    job = build(config)
    fleet = job.make_fleet()
    values = []
    for event in load_protocol("gossip").run(fleet, job):
        values.append(event.train_loss_R.double().mean().item())
        if event.done == STEPS:
            break
    return [*values, fleet.rows_RD.square().mean().item(), fleet.consensus_distance().item()]


@pytest.mark.parametrize("model", ["mlp", "cnn", "cnn_smooth"])
def test_ten_steps(model):
    assert losses(model) == pytest.approx(GOLDEN[model], rel=1e-6)


if __name__ == "__main__":
    for name in ("mlp", "cnn", "cnn_smooth"):
        print(f'    "{name}": [{", ".join(f"{value:.10g}" for value in losses(name))}],')
