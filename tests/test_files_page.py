"""docs/files.md: its Python and its commands run as they stand, and do what the page says."""

from __future__ import annotations

import copy
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file

import fastlora
from fastlora import cli
from tests.commands import adapter_files, pipelines

PAGE = Path(__file__).resolve().parent.parent / "docs" / "files.md"
ADAPTED = r".*(attn\d\.to_[qv]|conv1)"
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (16, 16)}
TUNED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # diffusers'
]


class Page(NamedTuple):
    """What running the page gave."""

    names: dict[str, Any]  # of its Python
    commands: dict[str, list[str]]  # a command's words, by its line
    said: dict[str, str]  # what a command printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder."""
    made = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield made


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    """Runs all of it, one block after the other, in a folder with what it takes for granted."""
    pipe = pipelines.stable_diffusion(folder)
    make_files(pipe)
    found = Page({"pipe": pipe}, {}, {})
    for kind, block in re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if kind == "python":
            exec(compile(block, f"docs/files.md: {block.splitlines()[0]}", "exec"), found.names)
            continue
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "fastlora"
            found.commands[line] = words[1:]
            code, found.said[line] = called(*words[1:])
            assert code == 0, line
    return found


def make_files(pipe: Any) -> None:
    torch.manual_seed(0)
    layers = {p: m for p, m in pipe.unet.named_modules() if re.fullmatch(ADAPTED, p)}
    shapes = {path: tuple(layer.weight.shape) for path, layer in layers.items()}
    for name in ("adapter", "pickled", "kohya", "style", "subject"):
        path = Path(f"{name}.safetensors")
        adapter_files.kohya(path, shapes, TEXT, alpha=lambda i: 1.0 + i, dtype=torch.float32)
    shutil.copy("adapter.safetensors", "loaded.safetensors")  # the page replaces it by the pickle
    torch.save(load_file("pickled.safetensors"), "adapter.pt")
    adapter_files.lycoris(Path("loha.safetensors"))
    for name in ("stable-diffusion", "base"):
        pipe.save_pretrained(name)
    tuned = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        tuned.get_parameter(TUNED).add_(torch.randn(16, 16))
    shutil.copytree("base", "tuned")
    tuned.save_pretrained("tuned/unet")


def called(*words: str) -> tuple[int, str]:
    """A command's exit code and what it wrote to stdout."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(io.StringIO()):
        code = cli.main(words)
    return code, said.getvalue()


def updates(path: str | Path) -> dict[str, Tensor]:
    """`alpha / rank · up down` of every module of a file with kohya's names, in float64."""
    own = {key: tensor.double() for key, tensor in load_file(path).items()}
    found = {}
    for name in sorted({key.partition(".")[0] for key in own}):
        down, up = (own[f"{name}.lora_{part}.weight"].flatten(1) for part in ("down", "up"))
        found[name] = own[f"{name}.alpha"] / len(down) * (up @ down)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 5
    for name, update in found.items():
        torch.testing.assert_close(update, expected[name], rtol=1e-5, atol=1e-6)


def said_by(page: Page, command: str) -> str:
    """What the one command that begins like this printed."""
    (found,) = (said for line, said in page.said.items() if line.startswith(f"fastlora {command}"))
    return found


# --- its Python -----------------------------------------------------------------------------------


def test_load_and_save(page: Page) -> None:
    pipe, loaded = page.names["pipe"], updates("loaded.safetensors")
    own = [fastlora.adapters(model)["style"] for model in (pipe.unet, pipe.text_encoder)]
    assert sum(len(adapter.modules) for adapter in own) == len(loaded)
    assert [adapter.scale for adapter in own] == [0.8, 0.8]
    assert_same(updates("out.safetensors"), loaded)


def test_a_pickle_is_converted(page: Page) -> None:
    converted, pickled = load_file("adapter.safetensors"), load_file("pickled.safetensors")
    assert converted.keys() == pickled.keys()
    assert all(torch.equal(tensor, pickled[key]) for key, tensor in converted.items())


# --- its commands ---------------------------------------------------------------------------------


def test_every_command_is_shown(page: Page) -> None:
    assert {words[0] for words in page.commands.values()} == set(cli.FILE_COMMANDS)


def test_inspect(page: Page) -> None:
    said = said_by(page, "inspect")
    assert all(word in said for word in ("kohya", "alpha", "unet", "text_encoder"))


def test_convert(page: Page) -> None:
    config = json.loads(Path("folder/adapter_config.json").read_text())
    keys = load_file("folder/adapter_model.safetensors")
    count = sum(name.startswith("lora_unet_") for name in updates("kohya.safetensors"))
    assert len(keys) == 2 * count and config["peft_type"] == "LORA"  # --only unet
    assert len(updates("lora.safetensors")) == len(adapter_files.UNET)
    assert "relative error" in said_by(page, "convert loha")  # says what is lost


def test_merge(page: Page) -> None:
    style, subject = updates("style.safetensors"), updates("subject.safetensors")
    expected = {name: 0.8 * update + 0.5 * subject[name] for name, update in style.items()}
    assert_same(updates("both.safetensors"), expected)


def test_extract(page: Page) -> None:
    base, tuned = (load_file(Path(name) / UNET_FILE) for name in ("base", "tuned"))
    changed = [key for key, tensor in base.items() if not torch.equal(tensor, tuned[key])]
    assert changed == [TUNED]
    found = load_file("difference.safetensors")
    down, up = (found[f"unet.{TUNED[:-7]}.lora_{part}.weight"].double() for part in "AB")
    assert len(found) == 2
    difference = tuned[TUNED].double() - base[TUNED].double()
    torch.testing.assert_close(up @ down, difference, rtol=1e-4, atol=1e-5)


def test_fold(page: Page) -> None:
    left = updates("adapter.safetensors")
    prefixes = {UNET_FILE: "lora_unet", "text_encoder/model.safetensors": "lora_te_text_model"}
    for file, prefix in prefixes.items():
        base, new = (load_file(Path(name) / file) for name in ("stable-diffusion", "with-adapter"))
        assert base.keys() == new.keys()
        for key, tensor in base.items():
            path = key.removeprefix("text_model.").removesuffix(".weight")  # as transformers has it
            update = left.pop(f"{prefix}_{path.replace('.', '_')}", None)
            if update is None:
                assert torch.equal(new[key], tensor)
                continue
            expected = tensor.double() + 0.8 * update.view(tensor.shape)
            torch.testing.assert_close(new[key].double(), expected, rtol=1e-6, atol=1e-6)
    assert left == {}


def test_verify(page: Page) -> None:
    layers = len(updates("adapter.safetensors"))
    assert said_by(page, "verify").splitlines()[-1].startswith(f"right: {layers} layers, ")


def test_nothing_is_replaced_without_force_and_all_take_json(page: Page) -> None:
    for line, words in page.commands.items():
        force = [] if words[0] in ("inspect", "verify") else ["--force"]
        if force:
            assert called(*words) == (2, ""), line
        code, said = called(*words, *force, "--json")
        assert code == 0 and isinstance(json.loads(said), dict), line
