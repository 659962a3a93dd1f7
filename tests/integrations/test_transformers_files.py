"""Adapter files for models of transformers: PEFT's own logits are the oracle for its folders, and
diffusers' for those of text encoders; kohya's are written out by hand."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastlora
from tests.adapters.oracles import randomise, same_bits
from tests.integrations.transformers_cases import fresh, inputs, linear_paths, output

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the imports of others warn about
    peft = pytest.importorskip("peft")

CASES: dict[str, dict[str, Any]] = {
    "lora": dict(r=4, lora_alpha=6),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True),
    "dora": dict(r=4, lora_alpha=6, use_dora=True),
    "bias": dict(r=4, lora_alpha=6, lora_bias=True),
}
NAMES = ("LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "Phi3ForCausalLM")


def of_peft(name: str, targets: Any = "all-linear", **config: Any) -> Any:
    """PEFT's model with random adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it finds out about Conv1D
        model = peft.get_peft_model(
            fresh(name), peft.LoraConfig(target_modules=targets, lora_dropout=0.0, **config)
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def save(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a bias has one dimension
        model.save_pretrained(folder, save_embedding_layers=False)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_peft(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = of_peft(name, **case), fresh(name)
    base = output(ours, name).detach()
    save(theirs, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (name == "GPT2LMHeadModel")
    report = fastlora.load(ours, tmp_path)
    assert not report.unused
    with torch.no_grad():
        torch.testing.assert_close(output(ours, name), output(theirs, name), rtol=1e-4, atol=1e-5)
        assert (output(ours, name) - base).abs().max() > 0.01
        assert fastlora.verify(ours, **inputs(name))
        if "lora_bias" in case and name != "GPT2LMHeadModel":
            return  # PEFT does not merge it into layers without a bias
        # PEFT's own merge says the same of what the file means.
        fastlora.fold(ours)
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(output(ours, name), output(merged, name), rtol=1e-4, atol=1e-5)


def test_conv1d_and_linear_layers_in_one_file(tmp_path: Path) -> None:
    """`fan_in_fan_out` is one setting for all of them and says what PEFT saw last: layers tell."""
    name, targets = "GPT2LMHeadModel", ["c_attn", "lm_head"]
    theirs, ours = of_peft(name, targets, r=4, lora_alpha=6), fresh(name)
    save(theirs, tmp_path)
    for setting in (True, False):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": setting}))
        model = copy.deepcopy(ours)
        fastlora.load(model, tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(
                output(model, name), output(theirs, name), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", NAMES[:2])
def test_peft_reads_what_is_saved(name: str, dora: bool, tmp_path: Path) -> None:
    """Without a warning: of Conv1D, for one."""
    model = fresh(name)
    paths = [path for path in linear_paths(model) if path != "lm_head"]
    fastlora.inject(model, fastlora.LoRA(rank=4, alpha=6, dora=dora), where=paths, seed=0)
    randomise(model, size=0.5)
    fastlora.save(model, tmp_path, format="peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # transformers', of PEFT
        theirs = peft.PeftModel.from_pretrained(fresh(name), str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(output(model, name), output(theirs, name), rtol=1e-4, atol=1e-5)


# --- text encoders --------------------------------------------------------------------------------

CLIP = "CLIPTextModel"


def factors(paths: list[str], model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    return {p: (draw(4, m.in_features), draw(m.out_features, 4)) for p, m in layers.items()}


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["text_model", "bare"])
def test_kohya_names_of_a_text_encoder(prefix: str, tmp_path: Path) -> None:
    """Files have CLIP's `text_model`, which models of transformers 5 have no more."""
    model = fresh(CLIP)
    paths = [p for p in linear_paths(model) if "encoder.layers" in p]
    found = factors(paths, model)
    tensors: dict[str, Tensor] = {}
    for i, (path, (down, up)) in enumerate(found.items()):
        bare = path.removeprefix("text_model.")
        flat = f"lora_te_{prefix}{bare}".replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(1.0 + i % 3)
    save_file(tensors, tmp_path / "te.safetensors")
    assert not fastlora.load(model, tmp_path / "te.safetensors").unused
    exact: Any = fresh(CLIP).double()
    with torch.no_grad():
        for i, (path, (down, up)) in enumerate(found.items()):
            exact.get_submodule(path).weight += (1 + i % 3) / 4 * (up.double() @ down.double())
        expected = output(exact, CLIP, torch.float64).float()
        torch.testing.assert_close(output(model, CLIP), expected, rtol=1e-4, atol=1e-5)


def test_diffusers_names_of_a_text_encoder(tmp_path: Path) -> None:
    """Against diffusers' own loader."""
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = fresh(CLIP), fresh(CLIP)
    paths = [p for p in linear_paths(ours) if p.endswith(("_proj", "fc1", "fc2"))]
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in factors(paths, ours).items():
        tensors |= {
            f"text_encoder.{path}.lora_A.weight": down,
            f"text_encoder.{path}.lora_B.weight": up,
        }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", {"format": "pt"})
    assert not fastlora.load({"text_encoder": ours}, tmp_path).unused
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    loader.load_lora_into_text_encoder(tensors, None, theirs, prefix="text_encoder")
    with torch.no_grad():
        torch.testing.assert_close(output(ours, CLIP), output(theirs, CLIP), rtol=1e-4, atol=1e-5)
        assert (output(ours, CLIP) - output(fresh(CLIP), CLIP)).abs().max() > 0.01


def test_a_text_encoder_goes_out_and_in_again(tmp_path: Path) -> None:
    model = fresh(CLIP)
    paths = [p for p in linear_paths(model) if "encoder.layers" in p]
    fastlora.inject(model, fastlora.LoRA(rank=4, alpha=2), where=paths, seed=0)
    randomise(model, size=0.5)
    for format in ("kohya", "diffusers", "peft", "fastlora"):
        target = tmp_path / f"{format}.safetensors"
        parts: Any = model if format in ("peft", "fastlora") else {"text_encoder": model}
        fastlora.save(parts, target, format=format)
        other = fresh(CLIP)
        fastlora.load(other, target)
        assert same_bits(output(other, CLIP), output(model, CLIP)), format


# --- PEFT's live layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "dispatched"])
@pytest.mark.parametrize("name", NAMES[:2])
def test_peft_accelerated_on_a_model_with_hooks(name: str, hooked: bool) -> None:
    """accelerate's hooks on PEFT's layers keep the forward of the class that these had."""
    dispatching = pytest.importorskip("accelerate")
    model = of_peft(name, r=4, lora_alpha=6)
    if hooked:
        model = dispatching.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with torch.no_grad():
        theirs = output(model, name)
        fastlora.accelerate(model)
        torch.testing.assert_close(output(model, name), theirs, rtol=1e-4, atol=1e-5)
        fastlora.set_scale(model, {"default": 0.0})
        torch.testing.assert_close(output(model, name), output(fresh(name), name))
        fastlora.set_scale(model, {"default": 1.0})
        fastlora.restore(model)
        assert same_bits(output(model, name), theirs)
