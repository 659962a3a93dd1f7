"""`fastlora demo svdiff` in a few steps: its files, what its measures say of known pictures."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

pytest.importorskip("PIL", reason="the demo needs fastlora[demo]")
pytest.importorskip("sklearn", reason="the demo needs fastlora[demo]")
pytest.importorskip("transformers", reason="the demo needs fastlora[demo]")

from fastlora.demo import svdiff
from fastlora.demo.svdiff.pair import apart, placed, wide
from fastlora.demo.svdiff.settings import ShiftSettings
from fastlora.demo.world import World
from fastlora.models import digits_data
from tests.demo.test_demo import Page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo") / "made"
    said, aside = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(aside):
        assert svdiff.main(out, seed=1, settings=ShiftSettings.quick(), as_json=True) == 0
    numbers = json.loads(said.getvalue())  # the whole of it
    assert numbers.pop("output") == str(out) and "two subjects in one picture" in aside.getvalue()
    return out, numbers


@pytest.fixture(scope="module")
def world() -> World:
    return World.make(ShiftSettings.quick().world, 0, False)


@pytest.mark.slow
def test_files(finished):
    out, numbers = finished
    names = {path.name for path in out.iterdir()}
    assert names == {"svdiff.html", "svdiff.json"} == set(numbers["files"])
    assert json.loads((out / "svdiff.json").read_text()) == json.loads(json.dumps(numbers))
    text = (out / "svdiff.html").read_text()
    shown = Page(text)
    assert len(shown.headings) == 4 and {"svg", "table"} <= set(shown.tags)
    assert shown.links == [] and "prefers-color-scheme:dark" in text
    assert set(re.findall(r"https?://[^\"'\s)]*", text)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.slow
def test_numbers(finished):
    _, numbers = finished
    rows = {(r["method"], r["prior_weight"]): r for r in numbers["methods"]}
    assert set(rows) == {(m, w) for m in ("SVDiff", "LoRA", "all") for w in (0.0, 1.0)}
    counts = [rows[m, 0.0]["parameters"] for m in ("SVDiff", "LoRA", "all")]
    sizes = [rows[m, 0.0]["bytes"] for m in ("SVDiff", "LoRA", "all")]
    assert counts == sorted(counts) and sizes == sorted(sizes)
    # float32 and a header: of every module a path, and of weights that have shifts a fingerprint
    assert all(4 * n < size < 4 * n + 120_000 for n, size in zip(counts, sizes, strict=True))
    for row in rows.values():
        shares = [*row["shown"], *row["kept"], *row["leaked"], *row["classes"]]
        assert all(0 <= share <= 1 for share in shares) and len(row["distance"]) == 1
    pair = {k: v for k, v in numbers["pair"].items() if k != "ceiling"}
    assert len(pair) == 3
    assert all(w["placed"] <= w["present"] <= w["either"] for w in pair.values())


def test_what_counts_as_placed(world):
    """Collages of held-out pictures pass in their order alone; one subject in the middle never."""
    subjects = [digits_data.subject("mirrored", d) for d in (3, 7)]
    m = min(len(s.held_out) for s in subjects)
    halves = [s.held_out[:m] for s in subjects]
    assert placed(world, torch.cat(halves, 3), subjects).all()
    assert not placed(world, torch.cat(halves[::-1], 3), subjects).any()
    assert not placed(world, torch.cat([h.flip(3) for h in halves], 3), subjects).any()
    assert not placed(world, wide(halves[0]), subjects).any()


def test_what_counts_as_apart():
    subjects = [digits_data.subject("mirrored", d) for d in (3, 7)]
    m = min(len(s.held_out) for s in subjects)
    three, seven = (s.held_out[:m] for s in subjects)
    assert apart(torch.cat([three, seven], 3), subjects).float().mean() > 0.95
    assert not apart(wide(three), subjects).any()  # one, in the middle
    assert not apart(torch.cat([three, torch.full_like(three, -1)], 3), subjects).any()
