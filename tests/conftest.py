import os

import hypothesis
import numpy as np
import pytest
import torch

# deadline: the machine may be busy. derandomize: the same examples on every run of CI, new ones elsewhere.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# The tensors are small: more threads cost more than they give, and one thread always adds in the same order.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds():
    """The same random numbers for a test, whichever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # for libraries that use the global generator
