"""The demo from end to end in a few steps: its files, its page, its program, its refusals."""

from __future__ import annotations

import html
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL", reason="the demo needs fastlora[demo]")
pytest.importorskip("sklearn", reason="the demo needs fastlora[demo]")
pytest.importorskip("transformers", reason="the demo needs fastlora[demo]")

import fastlora
from fastlora import cli, demo
from fastlora.demo import Settings, images, page, slider, words
from fastlora.demo.world import World, fastest_threads

PICTURES = {"slider.png", "pairs.png", "subject.png", "together.png"}
ADAPTERS = {"thickness.safetensors", "mirrored.safetensors"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, str]:
    """One quick run (everything once, nothing well) with --json: the folder, the exit code and what
    was written to stdout and stderr."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo") / "made" / "by it"
    said, aside = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(aside):
        code = demo.main(out, seed=3, settings=Settings.quick(), as_json=True)
    return out, code, said.getvalue(), aside.getvalue()


@pytest.fixture(scope="module")
def finished(printed: tuple[Path, int, str, str]) -> tuple[Path, dict[str, Any]]:
    """The folder, and what the run found."""
    out, _, said, _ = printed
    return out, {key: value for key, value in json.loads(said).items() if key != "output"}


class Page(HTMLParser):
    """What a page refers to, its headings, and whether its tags are closed in order."""

    VOID = frozenset(["meta", "input", "br"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_json_is_alone_on_stdout(printed):
    out, code, said, aside = printed
    report = json.loads(said)  # the whole of it
    assert code == 0 and report["verify"]["passed"]
    assert all((Path(report["output"]) / name).is_file() for name in report["files"])
    slider = report["slider"]
    told = (
        f"{slider['parameters']:,} numbers in {slider['modules']} layers",
        f"stroke {slider['thickness_mean'][0]:.2f} to {slider['thickness_mean'][-1]:.2f} pixels",
        f"distance {report['subject']['svdiff']['distance']:5.2f}",
        str(out / "report.html"),
    )
    assert [words for words in told if words not in aside] == []


def test_writes_all_files_and_nothing_else(finished):
    out, numbers = finished
    expected = PICTURES | ADAPTERS | {"report.html", "report.json", "curve.svg"}
    assert {path.name for path in out.iterdir()} == expected == set(numbers["files"])
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(numbers))


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_pictures_are_pictures(finished, name):
    from PIL import Image

    with Image.open(finished[0] / name) as picture:
        picture.load()
        low, high = picture.convert("L").getextrema()
        assert min(picture.size) >= 90 and high - low > 100  # something is drawn


def test_page_is_whole_and_needs_nothing_from_elsewhere(finished):
    text = (finished[0] / "report.html").read_text()
    shown = Page(text)
    assert {"svg", "table", "input", "script", "style"} <= set(shown.tags)
    assert not {"link", "img", "iframe", "object"} & set(shown.tags)
    assert shown.links == []
    # Addresses: the name of SVG's namespace alone, which nobody fetches.
    assert set(re.findall(r"https?://[^\"'\s)]*", text)) == {"http://www.w3.org/2000/svg"}
    assert all(u.startswith("data:image/png") for u in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text and "nan" not in re.sub(r"base64,[^)\"']*", "", text)
    assert "prefers-color-scheme:dark" in text


def test_page_says_what_was_found(finished):
    out, numbers = finished
    text = html.unescape((out / "report.html").read_text())
    assert len(Page((out / "report.html").read_text()).headings) == 8
    found = [f"{value:.2f}" for value in numbers["slider"]["thickness_mean"]]
    found += [f"{numbers['subject']['svdiff']['distance']:.2f}", f"seed {numbers['seed']}"]
    found += [numbers["machine"]["PyTorch"], numbers["machine"]["processor"]]
    found += [c["what"] for c in numbers["speed"]]
    assert [f for f in found if f not in text] == []


def test_numbers(finished):
    _, numbers = finished
    thin, subject = numbers["slider"], numbers["subject"]
    assert numbers["seed"] == 3 and numbers["fastlora"] == fastlora.__version__
    assert len(thin["thickness"]) == len(thin["rows"]) == 10
    assert thin["thickness_mean"] == pytest.approx(
        [sum(column) / 10 for column in zip(*thin["thickness"], strict=True)], rel=1e-6
    )
    assert all(0 < value < 10 for row in thin["thickness"] for value in row)
    assert thin["modules"] > 60 and subject["svdiff"]["parameters"] < thin["parameters"] / 5
    for scores in (subject["before"], subject["svdiff"], subject["lora"]):
        assert all(0 <= scores[share] <= 1 for share in ("shown", "leaked", "classes"))
    assert numbers["verify"]["passed"] is True
    titles = [model["title"] for model in numbers["verify"]["models"]]
    assert len(titles) == 4 and any("folded" in title for title in titles)
    assert sum(numbers["seconds"].values()) <= 2.01 * numbers["seconds"]["total"]


def test_every_contestant_is_in_the_comparisons(finished):
    comparisons = finished[1]["speed"]
    assert len(comparisons) == 8
    for found in comparisons:
        rows = {row["name"]: row for row in found["rows"]}
        first, *others = found["rows"]
        assert first["ratio"] == 1.0 and any(name.startswith("fastlora") for name in rows)
        assert any(name.startswith(("PEFT", "diffusers")) for name in rows)
        for row in others:
            assert row["seconds"] is None or (row["seconds"] > 0 and row["ratio"] > 0)


def test_program_runs_as_it_stands(finished, tmp_path):
    program = finished[1]["commands"] + "\nassert pictures.shape == (5, 1, 32, 32)\n"
    program += "assert bool(pictures.isfinite().all()) and pictures.std() > 0.1\n"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_saved_adapters_load_and_do_something(finished, name):
    from fastlora.models import digits

    model = digits.load()
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([300, 700])
    with torch.no_grad():
        before = model(x, t, model.encode(["a three"] * 2))
        info = fastlora.load(model, finished[0] / name, name="it")
        after = model(x, t, model.encode(["a three"] * 2))
    assert info.adapter.kind == ("lora" if name.startswith("thick") else "spectral")
    assert not torch.equal(before, after)


# --- refusals, before anything is trained ---------------------------------------------------------


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that comes as far as the model fails the test."""

    def reached(*args: Any) -> None:
        raise AssertionError("the demo went on")

    monkeypatch.setattr(World, "make", reached)


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_directory_that_cannot_be_written(untouched, tmp_path, capsys, kind):
    file = tmp_path / "file"
    file.write_text("mine")
    out = file if kind == "a file" else file / "out"
    assert cli.main(["demo", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlora demo: ") and error.count("\n") == 1 and str(file) in error
    assert file.read_text() == "mine"


def test_read_only_directory(untouched, tmp_path, monkeypatch, capsys):
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "writable directory, got: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modules", "packages"),
    [
        (["sklearn"], "scikit-learn"),
        (["PIL"], "pillow"),
        (["transformers", "sklearn", "PIL"], "pillow scikit-learn transformers"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_missing_packages_are_named_at_once(
    untouched, tmp_path, monkeypatch, capsys, modules, packages
):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    assert cli.main(["demo", "--out", str(tmp_path / "made")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith(f"try: pip install {packages}\n")
    assert not (tmp_path / "made").exists()


def test_a_broken_package_is_found_before_the_folder_is_made(untouched, tmp_path, monkeypatch):
    broken = tmp_path / "packages" / "sklearn"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(broken.parent)
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    with pytest.raises(RuntimeError, match="broken"):
        demo.run(tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_exit_code_says_whether_verification_passed(monkeypatch, as_json):
    for passed, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(demo, "run", lambda *_, p=passed: {"verify": {"passed": p}})
        assert demo.main("nowhere", as_json=as_json) == code


# --- parts ----------------------------------------------------------------------------------------


def test_threads_are_put_back():
    torch.set_num_threads(2)
    world = World.make(Settings.quick(), 0, progress=False)
    world.device = torch.device("cpu")
    with pytest.raises(KeyboardInterrupt), fastest_threads(world):
        assert torch.get_num_threads() in (1, 2)
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2


def test_seeds_of_one_run_differ_and_are_valid():
    world = World.make(Settings.quick(), 2**63 - 1, progress=False)
    seeds = [seed for stream in range(5) for seed in world.seeds(stream, 200)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    fastlora.samplers.noise(seeds[:3], (2,))


def test_a_seed_decides_the_slider():
    torch.set_num_threads(1)

    def made(seed: int) -> slider.Slider:
        return slider.make_slider(World.make(Settings.quick(), seed, progress=False))

    first, again, other = made(5), made(5), made(6)
    assert torch.equal(first.images, again.images) and first.loss == again.loss
    assert not torch.equal(first.images, other.images)


def test_enlarged_tiles_do_not_bleed():
    pictures = torch.full((1, 2, 1, 8, 8), -1.0)
    pictures[0, 1] = 1.0
    sheet = images.enlarged(pictures, 4)
    assert sheet.size == (64, 32)
    assert sheet.crop((0, 0, 32, 32)).getextrema() == (0, 0)
    assert sheet.crop((32, 0, 64, 32)).getextrema() == (255, 255)


@pytest.mark.parametrize(
    ("seconds", "said"), [(2.5e-6, "2.5 µs"), (0.0123, "12.3 ms"), (3.21, "3.2 s")], ids=str
)
def test_durations(seconds, said):
    assert words.duration(seconds) == said


def test_strengths_have_real_signs():
    assert [images.signed(x) for x in (-1.5, 0.0, 2.0)] == ["−1.5", "0", "+2"]


def drawn(text: str) -> Any:
    from PIL import ImageFont

    return bytes(ImageFont.load_default(17).getmask(text))


@pytest.mark.parametrize("strength", Settings().strengths)
def test_labels_of_pictures_are_in_the_font(strength):
    label = images.drawable(images.signed(strength))
    empty_box = drawn("\ufffe")  # a character that no font has
    assert empty_box not in [drawn(character) for character in label]


@pytest.mark.parametrize(
    "rows", [["seven"], ["the five pictures", "after"], ["−2", "VAT"]], ids=str
)
def test_labels_of_rows_end_before_the_edge(rows):
    tiles = torch.zeros(len(rows), 2, 1, 32, 32)
    alpha = images.sheet(tiles, rows, ["−1", "+1"]).getchannel("A")
    left, _, right, _ = alpha.getbbox()
    assert 2 <= left <= 8 and right == alpha.width  # labels keep off the edge, tiles fill up to it


def test_labels_without_a_minus_sign_in_the_font_are_drawn_with_a_hyphen():
    tiles = torch.zeros(1, 1, 1, 32, 32)
    minus, hyphen = (images.sheet(tiles, [f"{sign}2"], [f"{sign}1"]) for sign in "−-")
    assert images.png(minus) == images.png(hyphen)


def test_page_escapes_what_it_is_told():
    shown = Page(page.facts({"seed": 1, "files": ["<a>"], "seconds": {"total": 1.0},
                             "machine": {"processor": "<b>&"}}))  # fmt: skip
    assert not {"a", "b"} & set(shown.tags)
