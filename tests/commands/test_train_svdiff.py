"""`fastlora train svdiff` from pictures to a file that loads, on both kinds of model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("transformers")

from PIL import Image
from safetensors.torch import load_file

import fastlora
from fastlora import cli
from fastlora.commands import CommandError, train_svdiff
from fastlora.commands.targets import find_pictures, load_target, pictures
from fastlora.methods import personalise
from fastlora.models import digits
from fastlora.samplers import Schedule
from fastlora.training import save_checkpoint
from tests.commands import pipelines

QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them wide and in colour, and something else."""
    made = tmp_path / "pictures"
    made.mkdir()
    random = np.random.default_rng(0)
    for name, shape in {"b.png": (32, 32), "a.jpg": (40, 60, 3), "c.PNG": (32, 32, 4)}.items():
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(made / name)
    (made / "notes.txt").write_text("no picture")
    return made


def arguments(folder: Path, out: Path, **options: str | int | None) -> list[str]:
    given: dict[str, object] = {
        "model": "digits",
        "images": folder,
        "caption": "a v1 three",
        "steps": 2,
        "out": out,
        **options,
    }
    words = ["train", "svdiff"]
    for key, value in given.items():
        flag = f"--{key.replace('_', '-')}"
        words += [flag] if value is None else [flag, str(value)]
    return words


def test_the_file_loads_and_holds_what_the_recipe_trains(folder, tmp_path, capsys):
    """Against `personalise` itself, called as the command says it does."""
    out = tmp_path / "new" / "subject.safetensors"
    assert cli.main(arguments(folder, out)) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 pictures, loss ") and str(out) in said
    model, other = digits.load(), digits.load()
    fastlora.load(model, out, name="subject")
    info = fastlora.adapters(model)["subject"]
    assert f"{info.parameters:,} shifts" in said
    assert info.kind == "spectral" and all(m.startswith("unet.") for m in info.modules)
    with torch.no_grad():
        cond = other.encode(["a v1 three"])
    personalise(
        other,
        pictures(find_pictures(folder), 32, "L"),
        cond,
        Schedule.cosine(1000),
        prediction="v",
        where=lambda path, m: path.startswith("unet."),
        steps=2,
        lr=2e-2,
        norm_lr=3e-3,
        progress=False,
    )
    own, theirs = (
        {k: v for k, v in m.state_dict().items() if "fastlora" in k} for m in (model, other)
    )
    assert own.keys() == theirs.keys() and len(own) > 50
    for key, value in own.items():
        torch.testing.assert_close(value, theirs[key])
    assert [p.name for p in out.parent.iterdir()] == ["subject.safetensors"]


def test_json_says_what_the_text_says(folder, tmp_path, capsys):
    out = tmp_path / "subject.safetensors"
    assert cli.main(arguments(folder, out)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert cli.main(arguments(folder, out, json=None)) == 0
    report = json.loads(capsys.readouterr().out)  # the whole of it
    (own,) = report["files"]
    loss = "loss {first:.4f} -> {last:.4f}".format(**report["loss"])
    assert first.startswith(f"{report['pictures']} pictures, {loss}, ") and report["seconds"] > 0
    assert own["file"] == str(out) and own["bytes"] == out.stat().st_size
    assert f"{own['shifts']:,} shifts" in second and f"({own['into']}, " in second


def test_a_prior_norms_and_the_text_encoder(folder, tmp_path):
    out = tmp_path / "subject.safetensors"
    options = {"class_caption": "a three", "prior": 2, "cache": tmp_path / "cache"}
    options |= {"norms": "skip", "text_encoder": None}
    assert cli.main(arguments(folder, out, **options)) == 0
    model = digits.load()
    fastlora.load(model, out, name="subject")
    info = fastlora.adapters(model)["subject"]
    assert any(m.startswith("text_encoder.") for m in info.modules)
    assert not any("norm" in m for m in info.modules)

    def cached():
        files = (p for p in (tmp_path / "cache").rglob("*") if p.is_file())
        return {p.relative_to(tmp_path / "cache"): p.stat().st_mtime_ns for p in files}

    before = cached()
    factors = [p for p in before if p.parts[0] == "factors"]
    assert len(factors) > 100 and len(before) == len(factors) + 1  # and the class pictures
    assert cli.main(arguments(folder, out, **options)) == 0
    assert cached() == before  # read, and nothing made anew


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    assert cli.main(arguments(folder, whole, steps=4)) == 0
    from fastlora.training import loop

    def save(path, state):
        original(path, state)
        raise KeyboardInterrupt

    original = loop.save_checkpoint
    monkeypatch.setattr(train_svdiff, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(loop, "save_checkpoint", save)  # stopped behind the second of four steps
    assert cli.main(arguments(folder, out, steps=4)) == 130
    monkeypatch.setattr(loop, "save_checkpoint", original)
    assert not out.exists() and (tmp_path / "stopped.safetensors.checkpoint").exists()
    capsys.readouterr()
    assert cli.main(arguments(folder, out, steps=4)) == 2  # not by accident
    assert "--resume goes on from it" in capsys.readouterr().err
    assert cli.main(arguments(folder, out, steps=4, resume=None)) == 0
    assert not (tmp_path / "stopped.safetensors.checkpoint").exists()
    expected, found = (load_file(path) for path in (whole, out))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": "nowhere"}, "--model: expected digits or a folder with model_index.json"),
        ({"caption": "a v1 dog"}, "expected words of the vocabulary, got ['dog']"),
        ({"out": "x.pt"}, "--out: expected a name that ends with .safetensors, got x.pt"),
        ({"prior": 5}, "--prior: expected --class-caption with it, got none"),
        ({"class_caption": "a three", "prior_weight": 0}, "expected one of them, got both"),
        ({"size": 64}, "--size: the digits model draws 32 pixels, got 64"),
        ({"dtype": "float16"}, "--dtype: the digits model is trained in float32"),
        ({"resume": None}, "--resume: there is no checkpoint"),
        ({"images": "nothing"}, "--images: nothing: no such folder"),
        ({"device": "foo"}, "--device: expected one that is there, got 'foo': Expected one of cpu"),
        ({"device": "cuda:99"}, "--device: expected one that is there, got 'cuda:99': "),
        ({"device": "meta"}, "--device: expected one that computes, got 'meta'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_are_one_line(folder, tmp_path, capsys, change, line):
    options = {**change}
    out = options.pop("out", tmp_path / "out.safetensors")
    images = options.pop("images", folder)
    assert cli.main(arguments(Path(images), Path(out), **options)) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastlora train: ") and line in said and said.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_a_cache_that_cannot_be_written_is_one_line(folder, tmp_path, capsys):
    options = {"cache": folder / "notes.txt", "class_caption": "a three"}
    assert cli.main(arguments(folder, tmp_path / "out.safetensors", **options)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastlora train: --cache {folder / 'notes.txt'}: expected a writable")
    assert said.count("\n") == 1


def test_a_loss_that_is_not_finite_is_one_line_with_one_prefix(folder, tmp_path, capsys):
    options = {"lr": 1e38, "norm_lr": 1e38, "steps": 20}
    assert cli.main(arguments(folder, tmp_path / "out.safetensors", **options)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastlora train: loss: expected a finite number, got ")


def out_of_memory() -> None:
    torch.empty(2**61, dtype=torch.uint8)  # more than there are addresses


def out_of_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def other_error() -> None:
    torch.randn(2, 3) @ torch.randn(2, 3)


@pytest.mark.parametrize("fails", [out_of_memory, out_of_gpu_memory, other_error])
def test_memory_that_ends_is_one_line(folder, tmp_path, capsys, monkeypatch, fails):
    monkeypatch.setattr("fastlora.methods.personalise", lambda *args, **options: fails())
    given = arguments(folder, tmp_path / "out.safetensors", batch=1000)
    if fails is other_error:  # nobody's mistake but ours
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            cli.main(given)
        return
    assert cli.main(given) == 2
    line = "fastlora train: there is not enough memory for --batch 1000 at this --size"
    assert capsys.readouterr().err.splitlines()[-1].endswith(line)  # behind a bar, on slow machines


def test_resuming_behind_the_last_step_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    checkpoint = tmp_path / "out.safetensors.checkpoint"
    save_checkpoint(checkpoint, {"step": 100, "signature": {}})
    assert cli.main(arguments(folder, out, steps=50, resume=None)) == 2
    said = capsys.readouterr().err
    assert f"--resume: {checkpoint} is at step 100, which is beyond --steps 50" in said
    assert said.count("\n") == 1 and not out.exists() and checkpoint.exists()


@pytest.mark.parametrize(
    ("flag", "value"), [("--seed", "-1"), ("--seed", "9" * 23), ("--batch", "9" * 23)]
)
def test_numbers_that_are_too_large(folder, tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments(folder, tmp_path / "x.safetensors"), flag, value])
    assert stop.value.code == 2
    assert f"argument {flag}: expected an integer from" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--steps", "--batch", "--prior"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_numbers_are_checked(folder, tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments(folder, tmp_path / "x.safetensors"), flag, value])
    assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_a_picture_beyond_pillows_limit_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # pictures of twice as many are refused
    assert cli.main(arguments(folder, tmp_path / "x.safetensors")) == 2
    said = capsys.readouterr().err
    assert "a.jpg: not a picture that reads" in said and "decompression bomb" in said
    assert said.count("\n") == 1


def test_a_file_that_is_no_picture(folder, tmp_path, capsys):
    (folder / "d.png").write_text("no picture")
    assert cli.main(arguments(folder, tmp_path / "x.safetensors")) == 2
    assert "d.png: not a picture that reads" in capsys.readouterr().err


def test_an_empty_folder_and_a_single_file(folder, tmp_path):
    with pytest.raises(CommandError, match="no pictures in it"):
        find_pictures(tmp_path / "pictures" / "..")
    assert [p.name for p in find_pictures(folder)] == ["a.jpg", "b.png", "c.PNG"]
    assert find_pictures(folder / "b.png") == [folder / "b.png"]


# --- Stable Diffusion -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("sd")
    pipelines.stable_diffusion(folder).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@QUIET
def test_stable_diffusion_to_files_that_load(folder, tmp_path, stable_diffusion, capsys):
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "dog.safetensors"
    options = {"model": stable_diffusion, "caption": "a photo of v1 dog", "prior": 2}
    options |= {"class_caption": "a photo of a dog", "text_encoder": None}
    assert cli.main(arguments(folder, out, **options, json=None)) == 0
    report = json.loads(capsys.readouterr().out)
    assert {own["into"]: Path(own["file"]).name for own in report["files"]} == {
        "pipe.unet": "dog.safetensors",
        "pipe.text_encoder": "dog.text_encoder.safetensors",
    }
    pipe = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    for module, name in ((pipe.unet, "dog"), (pipe.text_encoder, "dog.text_encoder")):
        fastlora.load(module, tmp_path / f"{name}.safetensors", name="dog")
        assert fastlora.adapters(module)["dog"].kind == "spectral"
        shifts = [v for k, v in module.state_dict().items() if k.endswith("dog.shift")]
        moved = sum(bool(v.abs().max() > 0) for v in shifts)
        assert moved > 0.7 * len(shifts) > 5
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "dog.safetensors",
        "dog.text_encoder.safetensors",
    ]


@QUIET
def test_the_parts_of_stable_diffusion_do_what_the_pipelines_do(folder, stable_diffusion):
    from diffusers import StableDiffusionPipeline

    target = load_target(str(stable_diffusion), None, "cpu", "float32")
    pipe = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    ours = target.encode(["a photo of v1 dog"])
    theirs, _ = pipe.encode_prompt("a photo of v1 dog", torch.device("cpu"), 1, False)
    torch.testing.assert_close(ours, theirs)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    cond = ours.expand(2, -1, -1)
    with torch.no_grad():
        expected = pipe.unet(x, t, encoder_hidden_states=cond).sample
        torch.testing.assert_close(target.model(x, t, cond), expected)
        x0 = target.read(find_pictures(folder))
        pixels = pictures(find_pictures(folder), 16, "RGB")
        encoded = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    assert x0.shape == (3, *target.shape) == (3, 4, 8, 8)
    torch.testing.assert_close(x0, encoded, rtol=1e-4, atol=1e-5)


@QUIET
def test_a_caption_that_is_cut_off_is_a_warning(stable_diffusion):
    target = load_target(str(stable_diffusion), None, "cpu", "float32")
    fits = "a photo of dog"
    with torch.no_grad():
        target.encode([fits])
        with pytest.warns(UserWarning, match=r"has \d+ tokens, of which .* takes 16: the rest"):
            cut = target.encode([fits + " of a photo of a dog"])
        with pytest.warns(UserWarning, match="cut off"):
            same = target.encode([fits + " of a photo of a cup"])
    assert torch.equal(cut, same)  # what was cut off


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_a_package_that_is_missing_is_one_line(missing, folder, tmp_path, monkeypatch, capsys):
    if missing == "transformers":
        pipeline = pytest.importorskip("diffusers").StableDiffusionPipeline

        def refuse(*arguments, **options):  # as diffusers' stand-in does
            raise ImportError("\nIt requires the transformers library.\nTry pip.\n")

        monkeypatch.setattr(pipeline, "from_pretrained", refuse)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "model_index.json").write_text("{}")
    assert cli.main(arguments(folder, tmp_path / "x.safetensors", model=tmp_path)) == 2
    said = capsys.readouterr().err
    assert missing in said and said.count("\n") == 1


@QUIET
def test_stable_diffusion_refusals(folder, tmp_path, stable_diffusion, capsys):
    out = tmp_path / "x.safetensors"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "Nothing"}')
    for options, line in (
        ({"model": stable_diffusion, "size": 17}, "--size: expected a multiple of 2, got 17"),
        ({"model": broken}, f"--model: {broken}: "),
    ):
        assert cli.main(arguments(folder, out, caption="a dog", **options)) == 2
        said = capsys.readouterr().err.splitlines()[-1]  # behind diffusers' own progress bar
        assert said.startswith("fastlora train: ") and line in said
    assert not out.exists()
