"""Small tensors throughout: more threads would only wait for each other."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(fixed_seed: None) -> None:
    torch.set_num_threads(1)  # `fixed_seed` puts the number back
