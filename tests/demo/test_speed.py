"""How the demo times and what it says about it."""

from __future__ import annotations

import sys
import time
import xml.etree.ElementTree as ET

import pytest
import torch

from fastlora.demo import charts, speed, words
from fastlora.demo.speed import Comparison, Row

CPU = torch.device("cpu")


def test_ratios_are_to_the_first_contestant_and_absent_ones_stay_in_their_place():
    calls = {"no adapter": lambda: time.sleep(2e-3), "PEFT": None, "fastlora": lambda: None}
    calls["plain PyTorch"] = lambda: time.sleep(8e-3)
    found = speed.compare("title", "what", calls, 0.05, CPU)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == list(calls)
    assert rows["no adapter"].ratio == 1.0 and rows["no adapter"].seconds >= 2e-3
    assert rows["PEFT"] == Row("PEFT", None, None)
    assert rows["fastlora"].ratio < 0.5 < 1.5 < rows["plain PyTorch"].ratio
    assert [row.ours for row in found.rows] == [False, False, True, False]


def test_contestants_take_turns():
    order: list[str] = []
    calls = {name: (lambda n=name: (order.append(n), time.sleep(3e-3))) for name in "abc"}
    speed.compare("title", "what", calls, 0.0, CPU)
    turns = order[-15:]  # after the warm-up; 3 ms: one call a sample
    assert all(sorted(turns[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))
    assert len({turns[i] for i in range(0, 15, 3)}) == 3  # not always the same one first


@pytest.mark.parametrize("module", ["peft", "diffusers.schedulers.scheduling_ddim"])
def test_peers_that_are_not_installed(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "peft":
        assert speed.with_peft(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["0"], 2) is None
    else:
        assert speed.diffusers_ddim() is None


def test_absent_peers_are_shown_as_such():
    row = Row("PEFT", None, None)
    assert words.label(row) == "not installed"
    chart = charts.bars([("PEFT", None, words.label(row), False)])
    assert "not installed" in chart
    assert words.losses([Comparison("t", "w", [Row("fastlora", 1e-3, 1.0), row])]) == []


def test_where_a_peer_is_faster_it_is_said():
    rows = [
        Row("no adapter", 1e-3, 1.0),  # not a way of doing the same
        Row("fastlora, unmerged", 2e-3, 2.0),
        Row("fastlora, folded", 1e-3, 1.0),
        Row("PEFT, unmerged", 1.5e-3, 1.5),
        Row("plain PyTorch", 3e-3, 3.0),
    ]
    (said,) = words.losses([Comparison("Model", "batch 8", rows)])
    assert said == "model, batch 8 (PEFT, unmerged, 1.50× against 2.00×)"


@pytest.mark.parametrize(
    "chart",
    [
        charts.curve([-1, 0, 1], [[1.0, 2, 3], [1.5, 2, 2.5]], [1.2, 2, 2.8], [1, 0.5, 0], (1, 3)),
        charts.bars([("<a & b>", 1.0, "1×", False), ("fastlora", 0.0, "0×", True)]),
        charts.bars([("none", None, "", False)]),
        charts.histogram([0.0, 0.5, 0.999]),
        charts.histogram([1.0, 30.0, float("inf")]),
    ],
    ids=["curve", "bars", "bars_absent", "histogram", "histogram_failed"],
)
def test_charts_are_well_formed(chart):
    for text in (chart, charts.standalone(chart)):
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter("{http://www.w3.org/2000/svg}rect"):
            x, y, w, h = (float(element.attrib[name]) for name in ("x", "y", "width", "height"))
            assert x >= 0 and y >= 0 and w > 0 and h > 0
            assert x + w <= width + 0.1 and y + h <= height + 0.1
    assert "nan" not in chart


def test_histogram_marks_what_is_beyond_the_limit():
    assert "var(--accent)" not in charts.histogram([0.2, 0.99])
    assert charts.histogram([0.2, 1.6]).count('fill="var(--accent)"') == 1
