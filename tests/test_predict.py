"""A trained model is applied to pictures with nothing but its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from command import refused, summary, train
from PIL import Image

from data.dataset_loader import load_dataset
from networks import load_model, model_metadata, save_model
from training import predict
from training.predict import open_model
from utils.errors import UsageError

ROOT = Path(predict.__file__).parent.parent


def test_the_five_lines_of_the_readme_give_the_accuracy_of_the_summary(tmp_path):
    run_dir = train(tmp_path, "--model", "cnn", "--epochs", "3")
    text = (ROOT / "README.md").read_text()
    code = text[text.index("from data.dataset_loader import load_dataset") :].partition("```")[0]
    code = code.replace("results/NAME/stage1", str(run_dir))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(summary(run_dir)["test_accuracy"], abs=1e-6)
    assert len(code.strip().splitlines()) <= 5


def save_pictures(folder: Path, images_kCHW: torch.Tensor) -> list[str]:
    folder.mkdir()
    files = []
    for i, picture in enumerate(images_kCHW):
        array = picture[0].numpy() if len(picture) == 1 else picture.movedim(0, -1).numpy()
        files.append(str(folder / f"{i:02d}.png"))
        Image.fromarray(array).save(files[-1])
    return files


def test_pictures_are_named(tmp_path, capsys):
    run_dir = train(tmp_path, "--epochs", "3")
    digits, model = load_dataset("digits"), open_model(run_dir / "model.safetensors")
    files = save_pictures(tmp_path / "pictures", digits.test_inputs_m[:20])
    expected = model.probabilities(digits.test_inputs_m[:20])
    capsys.readouterr()
    assert predict.main([str(run_dir / "model.safetensors"), str(tmp_path / "pictures"), "--top", "2"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == files
    assert [row[1] for row in rows] == [digits.task.names[c] for c in expected.argmax(1)]
    assert [float(row[2]) for row in rows] == pytest.approx(expected.max(1).values.tolist(), abs=1e-4)
    assert all(float(row[2]) >= float(row[4]) for row in rows)

    coloured = digits.test_inputs_m[:20].expand(-1, 3, -1, -1)  # the same pictures in a file of colours
    assert torch.equal(model.probabilities(model.decode(save_pictures(tmp_path / "coloured", coloured))), expected)


def test_grey_pictures_for_a_model_of_colours_and_the_other_way_round(tmp_path):
    def saved(channels: int, size: tuple[int, int]) -> predict.TrainedModel:
        shape = (channels, *size)
        notes = {"mean": [0.5] * channels, "std": [0.25] * channels, "class_names": ["a", "b"]}
        path = tmp_path / f"{channels}-{size}.safetensors"
        save_model(load_model("mlp", 2, shape).state_dict(), path, model_metadata("mlp", 2, shape, **notes))
        return open_model(path)

    draw = np.random.default_rng(0)
    [grey] = save_pictures(tmp_path / "grey", torch.from_numpy(draw.integers(0, 256, (1, 1, 8, 8), dtype=np.uint8)))
    colour = torch.from_numpy(draw.integers(0, 256, (1, 3, 8, 8), dtype=np.uint8))
    [coloured] = save_pictures(tmp_path / "coloured", colour)
    assert saved(3, (8, 8)).decode([grey]).shape == (1, 3, 8, 8)
    as_grey = np.asarray(Image.open(coloured).convert("L")).astype(int)
    assert np.abs(saved(1, (8, 8)).decode([coloured])[0, 0].numpy().astype(int) - as_grey).max() <= 1
    with pytest.raises(UsageError, match="12x8 pixels"):
        saved(3, (8, 12)).decode([coloured])
    with pytest.raises(UsageError, match="uint8 samples of shape"):
        saved(3, (8, 8)).probabilities(colour.float())


def test_what_cannot_be_applied_is_refused(tmp_path, capsys):
    shape = (1, 8, 8)
    path, picture = tmp_path / "model.safetensors", tmp_path / "picture.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    state = load_model("mlp", 2, shape).state_dict()
    good = {"mean": [0.5], "std": [0.25], "class_names": ["a", "b"]}
    for odd in ({"mean": None}, {"std": [0.0]}, {"mean": [0.1, 0.2]}, {"class_names": ["a"]}, {"std": "x"}):
        save_model(state, path, model_metadata("mlp", 2, shape, **(good | odd)))
        assert "train it again" in refused(capsys, predict.main([str(path), str(picture)]))
    safetensors.torch.save_file(state, path, {"network": json.dumps(model_metadata("mlp", 2, shape))})
    assert "train it again" in refused(capsys, predict.main([str(path), str(picture)]))
    save_model(state, path, model_metadata("mlp", 2, shape, **good))
    assert "no picture" in refused(capsys, predict.main([str(path), str(tmp_path / "missing.png")]))
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(capsys, predict.main([str(path), str(tmp_path / "empty")]))
    picture.write_bytes(b"no picture")
    assert "picture.png" in refused(capsys, predict.main([str(path), str(picture)]))
    assert "--top" in refused(capsys, predict.main([str(path), str(picture), "--top", "0"]))
    assert "no model file" in refused(capsys, predict.main([str(tmp_path / "nothing"), str(picture)]))
