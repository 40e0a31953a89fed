"""What activations tell about inputs: the probe, and the command."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.leak import main, probed


def test_a_probe_rebuilds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    inputs_nX = torch.randn(400, 6, generator=generator)
    mixed_nA = inputs_nX @ torch.randn(6, 9, generator=generator)
    noise_nA = torch.randn(400, 9, generator=generator)
    half_nA = mixed_nA[:, :3]  # three equations for six unknowns
    shares = [probed(a[:200], inputs_nX[:200], a[200:], inputs_nX[200:])[0] for a in (mixed_nA, half_nA, noise_nA)]
    assert shares[0] > 0.999 and 0.3 < shares[1] < 0.7 and abs(shares[2]) < 0.1


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    out = tmp_path / "leak.json"
    assert main(["--seeds", "2", "--epochs", "1", "--max_train", "300", "--quiet", "--out", str(out)]) == 0
    cuts = json.loads(out.read_text())["cuts"]
    assert [cut["before"] for cut in cuts] == [str(k) for k in range(1, 10)]
    assert all(cut["bytes"] == 8 * cut["floats"] and len(cut["trained"]) == 2 for cut in cuts)
    shares = [sum(cut["trained"]) / 2 for cut in cuts]
    assert shares[0] > 0.99 > shares[-1] > 0
    assert (tmp_path / "leak.png").exists() and "| 9 (Linear) | 64 | 512 |" in capsys.readouterr().out


def test_a_network_that_is_no_sequence_is_refused(tmp_path, capsys):
    assert main(["--model", "densenet121", "--max_train", "50", "--quiet", "--out", str(tmp_path / "leak.json")]) == 2
    assert "cannot be cut" in capsys.readouterr().err
