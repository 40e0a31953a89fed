"""Small folders of pictures that several tests read."""

from __future__ import annotations

import random

from PIL import Image


def picture_folder(root, sizes=((6, 6),), mode="L", suffix=".png", classes=("ant", "bee"), per_class=3):
    """train and test with solid pictures of value 50 c + 10 p + i (class c, part p, picture i), written in
    random order."""
    jobs = [(p, c, i) for p in range(2) for c in range(len(classes)) for i in range(per_class)]
    random.Random(0).shuffle(jobs)
    for p, c, i in jobs:
        folder = root / ("train", "test")[p] / classes[c]
        folder.mkdir(parents=True, exist_ok=True)
        value = 50 * c + 10 * p + i
        colour = value if mode == "L" else (value, 255 - value, 7)
        Image.new(mode, sizes[i % len(sizes)], colour).save(folder / f"{i}{suffix}")
    return root
