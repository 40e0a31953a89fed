"""Which classes are taken for which: the counts as a file and as a picture."""

from __future__ import annotations

import numpy as np
import pytest

from tests.test_plots import assert_legible
from utils.records import read_confusion, write_confusion
from visualization.class_plots import draw_confusion


def confusion(classes: int, each: int = 40, seed: int = 0) -> np.ndarray:
    """Counts [C, C] of a model that is mostly right."""
    rng = np.random.default_rng(seed)
    share_CC = 0.7 * np.eye(classes) + 0.3 * rng.dirichlet(np.full(classes, 0.2), classes)
    return np.stack([rng.multinomial(each, share_C) for share_C in share_CC])


def test_confusion_comes_back_as_written(tmp_path):
    counts_CC, names = confusion(3), ["a", "$\\frac{$", "half \ud800 a pair"]
    write_confusion(tmp_path, counts_CC.tolist(), names)
    read_CC, read_names = read_confusion(tmp_path)
    np.testing.assert_array_equal(read_CC, counts_CC)
    assert read_CC.dtype == np.int64 and read_names == names


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 2, 10, 12, 13, 100, 200])
def test_confusion_is_legible_and_shows_the_accuracy_of_each_class(classes):
    counts_CC = confusion(classes)
    figure = draw_confusion(counts_CC, [f"n{c:08d} with a long name" for c in range(classes)])
    assert_legible(figure)
    heat, bars, *worst, _ = figure.axes
    share_CC = counts_CC / counts_CC.sum(1, keepdims=True)
    np.testing.assert_allclose(heat.images[0].get_array(), share_CC)
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], share_CC.diagonal())
    assert f"{counts_CC.trace() / counts_CC.sum():.1%} of {counts_CC.sum():,}" in heat.get_title(loc="left")
    assert heat.get_xlabel() == "predicted class" and heat.get_ylabel() == "true class"
    numbers = sorted(int(text.get_text()) for text in heat.texts)
    assert numbers == (sorted(counts_CC[counts_CC > 0].tolist()) if classes <= 12 else [])
    assert len(heat.get_xticks()) <= 25 and bool(worst) == (classes > 12)
    if worst:
        (listed,) = worst[0].texts
        wrong_CC = counts_CC * (1 - np.eye(classes, dtype=int))
        true, taken = np.unravel_index(wrong_CC.argmax(), wrong_CC.shape)
        first, figures, *others = listed.get_text().split("\n")
        assert f"n{true:08d}" in first.split("→")[0] and f"n{taken:08d}" in first.split("→")[1]
        assert figures.strip() == f"{wrong_CC.max()} of 40 ({wrong_CC.max() / 40:.0%})" and len(others) == 22


def test_confusion_with_nothing_to_show():
    counts_CC = np.diag([5, 0, 3])
    figure = draw_confusion(counts_CC, "abc")
    assert_legible(figure)
    heat, bars, _ = figure.axes
    assert heat.images[0].get_array().mask.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert [text.get_text() for text in bars.texts] == ["100%", "n/a", "100%"]
    assert_legible(draw_confusion(np.zeros((2, 2), int), "ab"))
    right = draw_confusion(np.diag(np.full(20, 7)), [str(c) for c in range(20)])
    assert right.axes[2].texts[0].get_text() == "nothing"
