"""What commands print is as long as it has to be."""

from __future__ import annotations

import pytest

from fastlora import cli
from fastlora.commands.terminal import percent


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0 %"), (1.23e-7, "1.2e-05 %"), (0.5, "50 %"), (0.9949, "99 %"), (0.996, "100 %"),
     (1.0, "100 %"), (12.345, "1234 %"), (1e8, "1e+10 %")],
)  # fmt: skip
def test_percents_have_no_exponent_where_they_need_none(value, expected):
    assert percent(value) == expected


@pytest.mark.parametrize("command", ["convert", "merge", "extract", "fold"])
@pytest.mark.parametrize("columns", [60, 120])
def test_descriptions_are_as_wide_as_the_terminal(capsys, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    description = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert columns - 20 < max(map(len, description)) <= columns - 2
