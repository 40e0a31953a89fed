"""The benchmarks of algorithms, on little."""

import json

import pytest

from benchmarks import algorithms, algorithms_lds, rounds

LITTLE = ["--num_workers", "4", "--max_train", "120", "--model", "mlp"]


@pytest.mark.slow
def test_the_table_of_algorithms(tmp_path, capsys):
    words = ["--algorithms", "D2", "DiLoCo, 10 steps", "--alphas", "1", "--rates", "0.01", "0.1", "--repeats", "2",
             "--jobs", "1", "--quiet", "--target", "0.2", *LITTLE, "--epochs", "8",
             "--results_dir", str(tmp_path)]  # fmt: skip
    assert algorithms.main(words) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and all(line.count("|") == 8 for line in lines)
    assert "| 1 | D2 |" in lines[2] and "±" in lines[2] and "DiLoCo" in lines[3]
    folder = tmp_path / "algorithms_digits"
    assert (folder / "table.md").read_text().splitlines() == lines
    summaries = sorted(folder.rglob("summary.json"))
    seeds = {json.loads((path.parent / "config.json").read_text())["config"]["seed"] for path in summaries}
    assert len(summaries) == 2 * (2 + 2) and seeds == {0, 1, algorithms.TUNED_ON}  # rates are chosen on other seeds
    before = [path.stat().st_mtime_ns for path in summaries]
    assert algorithms.main(words) == 0 and capsys.readouterr().out.strip().splitlines() == lines
    assert [path.stat().st_mtime_ns for path in summaries] == before  # nothing is trained twice


@pytest.mark.slow
def test_a_rate_at_which_training_diverges_is_not_chosen(tmp_path, capsys):
    words = ["--algorithms", "gossip", "--alphas", "1", "--rates", "0.05", "1e12", "--repeats", "1", "--jobs", "1",
             "--quiet", *LITTLE, "--epochs", "3", "--results_dir", str(tmp_path)]  # fmt: skip
    assert algorithms.main(words) == 0 and "| 0.05*" in capsys.readouterr().out


@pytest.mark.slow
def test_what_rounds_cost(capsys):
    assert rounds.main(["--turns", "1", "--rounds", "1", *LITTLE[:2], "--model", "mlp"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + len(algorithms.ALGORITHMS) + len(rounds.MORE) - len(rounds.LEFT_OUT)


@pytest.mark.slow
def test_lds_by_algorithm(tmp_path, capsys):
    words = ["--algorithms", "D2", "SCAFFOLD", "--results_dir", str(tmp_path), *LITTLE, "--epochs", "2",
             "--audit_groups", "4"]  # fmt: skip
    assert algorithms_lds.main(words) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and all(line.count("[") == 4 for line in lines[2:])


@pytest.mark.parametrize("module", [algorithms, rounds])
def test_bad_flags_are_a_line(module, capsys):
    assert module.main(["--model", "no-such-thing"]) == 2
    assert "error: " in capsys.readouterr().err
