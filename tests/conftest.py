"""One intra-op thread everywhere, subprocesses included: two threads spin at OpenMP barriers. Hypothesis draws the
same examples each time, so that a change is what makes a test fail; HYPOTHESIS_PROFILE=random draws others."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
