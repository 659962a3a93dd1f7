"""What changes compute of a weight refuses shapes that do not fit."""

import pytest
import torch

from fastlora.formats.changes import Change, LowRank
from fastlora.formats.files import FormatError


@pytest.mark.parametrize(("axis", "length"), [("out", 4), ("in", 3)])
def test_a_magnitude_has_the_length_of_its_axis(axis: str, length: int) -> None:
    torch.manual_seed(0)
    weight, low = torch.randn(4, 3).double(), LowRank(torch.randn(2, 3), torch.randn(4, 2))
    changed = Change(low, magnitude=torch.ones(length), axis=axis).changed(weight)  # type: ignore
    norms = changed.norm(dim=1 if axis == "out" else 0)
    torch.testing.assert_close(norms, torch.ones(length).double())
    for wrong in (1, length + 1):
        change = Change(low, magnitude=torch.ones(wrong), axis=axis)  # type: ignore[arg-type]
        with pytest.raises(FormatError, match=rf"a magnitude of {length}, got \[{wrong}\]"):
            change.changed(weight)
