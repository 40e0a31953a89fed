"""The benchmarks of the rooms run and print a line a network, at sizes that take seconds."""

import pytest

from benchmarks import coalitions, homogeneous, privacy


@pytest.mark.slow
def test_walks_side_by_side(capsys):
    flags = ["--side_by_side", "2", "--turns", "1", "--hops", "2", "--models", "mlp_smooth", "--threads", "1"]
    code = homogeneous.main(flags)
    assert code == 0 and capsys.readouterr().out.splitlines()[-1].startswith("| mlp_smooth |")  # no bar is missed


def test_coalitions_together_and_alone(capsys):
    flags = ["--institutions", "3", "--rounds", "1", "--turns", "1", "--models", "mlp", "--threads", "1"]
    assert coalitions.main(flags) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert cells[1].strip() == "mlp" and cells[2].strip() == "7" and float(cells[-2]) < 1e-4


def test_private_steps_beside_plain_ones(capsys):
    assert privacy.main(["--num_workers", "2", "--steps", "1", "--turns", "1", "--models", "mlp"]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert cells[1].strip() == "mlp" and float(cells[2]) > 0 and float(cells[3]) > 0 and float(cells[5]) > 0
