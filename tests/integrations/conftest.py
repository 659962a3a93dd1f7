"""Tiny tensors: threads would cost more than they bring."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(fixed_seed):
    torch.set_num_threads(1)  # fixed_seed puts back what it was
