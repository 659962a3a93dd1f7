"""`load` and `save` across formats: one model, several by component, a pipeline; strictly."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora
from fastlora.adapters import adapted_layers, loading, planning
from fastlora.adapters.deltas import tensors_of
from fastlora.adapters.fitting import slot_from
from fastlora.formats import detect
from tests.adapters.oracles import assert_unchanged, randomise, same_bits, snapshot

ALL = ["fastlora", "peft", "diffusers", "kohya", "lycoris"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)


class UNet(nn.Module):
    """A path of Stable Diffusion 1.5's UNet, so that kohya's files have names for it."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"attn1": Attention()})
        one = nn.ModuleDict({"transformer_blocks": nn.ModuleList([block])})
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attentions": nn.ModuleList([one])})])

    def forward(self, x: Tensor) -> Tensor:
        attn = self.down_blocks[0]["attentions"][0]["transformer_blocks"][0]["attn1"]  # type: ignore
        return attn.to_k(attn.to_q(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8)})


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        encoder = nn.ModuleDict({"layers": nn.ModuleList([Layer()])})
        self.text_model = nn.ModuleDict({"encoder": encoder})


class Pipeline:
    """As diffusers': parts by name, not all of them modules."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet, self.text_encoder = UNet(), TextEncoder()
        self.components = {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
            "scheduler": object(),
            "safety_checker": None,
        }


TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = TO_Q.replace("to_q", "to_k")
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"


def adapted(spec: Any = None) -> Pipeline:
    pipe = Pipeline()
    spec = spec or fastlora.LoRA(rank=4, alpha=3.0, ranks={TO_K: 2}, alphas={TO_K: 0.7})
    fastlora.inject(pipe.unet, spec, name="style", seed=1)
    fastlora.inject(pipe.text_encoder, fastlora.LoRA(rank=2, alpha=1.0), name="style", seed=2)
    for part in (pipe.unet, pipe.text_encoder):
        randomise(part, size=0.5)
    return pipe


def folded(module: nn.Module) -> dict[str, Tensor]:
    """The weights that the adapters make, by path."""
    fastlora.fold(module)
    found = {path: layer.folded().clone() for path, layer in adapted_layers(module).items()}
    fastlora.unfold(module)
    return found


@pytest.mark.parametrize("format", ALL)
def test_what_is_saved_in_any_format_is_loaded(tmp_path: Path, format: str) -> None:
    source = adapted()
    name = "folder" if format == "peft" else "file.safetensors"
    one_model = format in ("fastlora", "peft")
    parts = ["unet"] if one_model else ["unet", "text_encoder"]
    fastlora.save(source.unet if one_model else source, tmp_path / name, format=format)
    other = Pipeline()
    to: Any = other.unet if one_model else other
    report = fastlora.load(to, tmp_path / name, name="again")
    assert report.format in (format, "kohya") and not report.unused and not report.missing
    for part in parts:
        mine, theirs = folded(getattr(source, part)), folded(getattr(other, part))
        assert mine.keys() == theirs.keys()
        for path, weight in mine.items():
            torch.testing.assert_close(theirs[path], weight, rtol=1e-6, atol=1e-6)
    ratios = {a.module: a.ratio for a in report.applied if a.component in ("", "unet")}
    assert ratios == {TO_Q: pytest.approx(0.75), TO_K: pytest.approx(0.35)}


def test_a_dict_of_components_is_as_good_as_a_pipeline(tmp_path: Path) -> None:
    source, other = adapted(), Pipeline()
    parts = {"unet": source.unet, "text_encoder": source.text_encoder}
    fastlora.save(parts, tmp_path / "a.safetensors", format="kohya")
    fastlora.load(
        {"text_encoder": other.text_encoder, "unet": other.unet}, tmp_path / "a.safetensors"
    )
    for part in parts:
        for path, weight in folded(parts[part]).items():
            torch.testing.assert_close(folded(getattr(other, part))[path], weight)


def test_a_unet_s_file_for_a_transformer_is_found_by_the_other_name(tmp_path: Path) -> None:
    source, other = adapted(), Pipeline()
    fastlora.save({"unet": source.unet}, tmp_path / "a.safetensors", format="diffusers")
    report = fastlora.load({"transformer": other.unet}, tmp_path / "a.safetensors")
    assert {a.component for a in report.applied} == {"transformer"}


def test_one_model_of_a_file_for_several_is_refused_and_the_way_on_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fastlora.save(adapted(), path, format="kohya")
    other = Pipeline()
    with pytest.raises(fastlora.AdapterError) as error:
        fastlora.load(other.unet, path)
    said = str(error.value)
    assert "the file is for text_encoder and unet: give all of them, or the pipeline" in said
    assert "strict=False loads the 2 modules that do fit" in said
    assert not fastlora.adapters(other.unet)
    report = fastlora.load(other.unet, path, strict=False)
    assert set(report.modules) == {TO_Q, TO_K} and len(report.missing) == 2
    assert all(m.startswith("text_encoder.") for m in report.missing)
    assert len(report.unused) == 6  # down, up, alpha of two modules


@pytest.mark.parametrize("format", ["fastlora", "peft", "diffusers", "lycoris"])
def test_the_file_s_tensors_are_freed_one_by_one(
    tmp_path: Path, monkeypatch: Any, format: str
) -> None:
    """Where the model has its own copies: 16 bits become float32 beside float32 weights."""
    source, other = (nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]) for _ in range(2))
    fastlora.inject(source.half(), fastlora.LoRA(rank=2), dtype=torch.float16)
    fastlora.save(source, tmp_path / "a", format=format)
    read, refs, alive = detect.read, [], []

    def reading(path: Any) -> Any:
        file = read(path)
        refs.extend(weakref.ref(t) for c in file.changes.values() for t in tensors_of(c).values())
        return file

    def fitting(*args: Any) -> Any:
        alive.append(sum(ref() is not None for ref in refs))
        return slot_from(*args)

    monkeypatch.setattr(detect, "read", reading)
    monkeypatch.setattr(planning, "slot_from", fitting)
    fastlora.load(other, tmp_path / "a")
    assert alive == [12, 10, 8, 6, 4, 2] and not any(ref() is not None for ref in refs)
    assert {p.dtype for p in fastlora.parameters(other)} == {torch.float32}


def test_one_text_encoder_takes_nothing_of_a_file_for_several(tmp_path: Path) -> None:
    """Also not the layers that only one of them has: half of an adapter is none."""
    path, name = tmp_path / "a.safetensors", "text_model_encoder_layers_0_self_attn"
    tensors = {}
    for i, module in enumerate(("te1_{}_q_proj", "te2_{}_q_proj", "te2_{}_k_proj")):
        for part, shape in (("down", (1, 8)), ("up", (8, 1))):
            key = f"lora_{module.format(name)}.lora_{part}.weight"
            tensors[key] = torch.full(shape, float(i + 1))
    save_file(tensors, path)
    model = TextEncoder()
    said = "give models by component, {'text_encoder': ..., 'text_encoder_2': ...}"
    for strict in (True, False):
        with pytest.raises(fastlora.AdapterError, match="for text_encoder and text_encoder_2") as e:
            fastlora.load(model, path, strict=strict)
        assert said in str(e.value) and "same layer" not in str(e.value)
    assert not fastlora.adapters(model)
    fastlora.load({"text_encoder_2": model}, path, strict=False)
    taken = {p: layer.fastlora["default"].up for p, layer in adapted_layers(model).items()}
    assert {p: up[0, 0].item() for p, up in taken.items()} == {
        Q_PROJ: 2.0, Q_PROJ.replace("q_proj", "k_proj"): 3.0
    }  # fmt: skip


def test_a_name_of_the_hub_is_no_path() -> None:
    with pytest.raises(FileNotFoundError, match=r"^org/repo: no such file or folder; .*local ones"):
        fastlora.load(Pipeline(), "org/repo")


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fastlora.save(adapted(), path, format="diffusers")
    with pytest.raises(fastlora.AdapterError, match="it is for the text_encoder, and there are"):
        fastlora.load({"unet": Pipeline().unet}, path)


def test_the_second_model_s_failure_leaves_the_first_as_it_was(tmp_path: Path, monkeypatch) -> None:
    source, other = adapted(), Pipeline()
    fastlora.save(source, tmp_path / "a.safetensors", format="diffusers")
    real, calls = loading.attach, []

    def once(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(model)
        if len(calls) == 2:
            raise fastlora.AdapterError("no room")
        return real(model, *args, **kwargs)

    monkeypatch.setattr(loading, "attach", once)
    before = {k: v.clone() for k, v in other.unet.state_dict().items()}
    with pytest.raises(fastlora.AdapterError, match="no room"):
        fastlora.load(other, tmp_path / "a.safetensors")
    assert not fastlora.adapters(other.unet) and not fastlora.adapters(other.text_encoder)
    assert type(other.unet.get_submodule(TO_Q)) is nn.Linear
    after = other.unet.state_dict()
    assert after.keys() == before.keys() and all(same_bits(after[k], before[k]) for k in before)


def test_the_report_of_several_parts_has_no_one_adapter(tmp_path: Path) -> None:
    fastlora.save(adapted(), tmp_path / "a.safetensors", format="diffusers")
    report = fastlora.load(Pipeline(), tmp_path / "a.safetensors")
    with pytest.raises(fastlora.AdapterError, match=r"see report.adapters\['text_encoder'\]"):
        _ = report.adapter
    assert report.adapters["unet"].rank == 4


def test_strengths_per_sample_that_a_part_cannot_have_are_refused_first(tmp_path: Path) -> None:
    source, other = Pipeline(), Pipeline()
    fastlora.inject(source.unet, fastlora.LoRA(rank=2))
    fastlora.inject(source.text_encoder, fastlora.LoRA(rank=2, dora=True))
    fastlora.save(source, tmp_path / "a.safetensors", format="diffusers")
    before = [snapshot(other.unet), snapshot(other.text_encoder)]
    with pytest.raises(fastlora.AdapterError, match=r"_proj: 'default' \(dora\) has DoRA's norm"):
        fastlora.load(other, tmp_path / "a.safetensors", scale=torch.ones(3))
    assert_unchanged(other.unet, before[0])
    assert_unchanged(other.text_encoder, before[1])
    fastlora.load(other.unet, tmp_path / "a.safetensors", scale=torch.ones(3), strict=False)


def test_a_shape_that_does_not_fit_names_module_expected_and_got(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", Pipeline()
    fastlora.save(adapted(), path, format="diffusers")
    tensors = load_file(path)
    key = f"unet.{TO_K}.lora_B.weight"
    tensors[key] = torch.zeros(9, 2)
    save_file(tensors, path)
    with pytest.raises(
        fastlora.AdapterError, match=r"attn1.to_k: up: expected \[8, 2\], got \[9, 2\]"
    ):
        fastlora.load(other, path)
    report = fastlora.load(other, path, strict=False)
    assert set(report.unused) == {key, key.replace("lora_B", "lora_A")}


def test_a_model_of_peft_s_is_told_how_to_get_at_the_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    fastlora.save(adapted().unet, tmp_path / "a")
    model = peft.get_peft_model(Pipeline().unet, peft.LoraConfig(target_modules=["to_q", "to_k"]))
    said = r"to_q: a Linear cannot take it: it is PEFT's \(.*first fastlora.accelerate.*unload\(\)"
    for whole in (model, model.get_base_model()):
        with pytest.raises(fastlora.AdapterError, match=said):
            fastlora.load(whole, tmp_path / "a")
    fastlora.load(model.unload(), tmp_path / "a")


def test_one_reason_of_many_layers_is_given_once(tmp_path: Path) -> None:
    source, meta = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]), torch.device("meta")
    fastlora.inject(source, fastlora.LoRA(rank=2))
    fastlora.save(source, tmp_path / "a")
    nowhere = nn.Sequential(*[nn.Linear(4, 4, device=meta) for _ in range(5)], nn.Linear(4, 4))
    reason = "0, 1, 2 and 2 more: the model is on the meta device"
    for model, strict in ((nowhere, True), (nowhere[:5], False)):
        with pytest.raises(fastlora.AdapterError) as error:
            fastlora.load(model, tmp_path / "a", strict=strict)
        said = str(error.value)
        assert said.count("meta device") == 1 and reason in said
    report = fastlora.load(nowhere, tmp_path / "a", strict=False)
    assert report.modules == ("5",)
    assert [report.unused[f"{i}.down"][:2] for i in range(5)] == [f"{i}:" for i in range(5)]


def test_a_flat_name_that_two_modules_have_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    tensors = {
        "lora_unet_a_b.lora_down.weight": torch.ones(1, 4),
        "lora_unet_a_b.lora_up.weight": torch.ones(4, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(fastlora.AdapterError, match="several modules have this name: a.b, a_b"):
        fastlora.load(model, tmp_path / "a.safetensors")


def test_fused_projections_become_layers_that_train_apart(tmp_path: Path) -> None:
    block = nn.ModuleDict(
        {"attn": nn.ModuleDict({n: nn.Linear(6, 6) for n in ("to_q", "to_k", "to_v")})}
    )
    model = nn.ModuleDict({"transformer_blocks": nn.ModuleList([block])})
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*s, generator=generator) for s in ((2, 6), (18, 2)))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors"
    )
    fastlora.load(model, tmp_path / "a.safetensors", name="a")
    layers = [
        model.get_submodule(f"transformer_blocks.0.attn.{n}") for n in ("to_q", "to_k", "to_v")
    ]
    for i, layer in enumerate(layers):
        x = torch.randn(3, 6, generator=generator)
        rows = up[6 * i : 6 * i + 6].double() @ down.double()
        expected = x.double() @ (layer.weight.double() + rows).T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in layers[0].fastlora["a"].parameters():
            parameter.zero_()
    for layer in layers[1:]:
        assert all(p.abs().sum() > 0 for p in layer.fastlora["a"].parameters())


def test_the_report_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fastlora.save(adapted(), path, format="kohya")
    tensors = load_file(path)
    tensors["surprise"] = torch.ones(2)
    save_file(tensors, path)
    said = str(fastlora.load(Pipeline(), path, strict=False, name="s"))
    lines = said.splitlines()
    assert lines[0] == f"{path}: kohya, loaded as 's'"
    assert lines[1].split() == ["part", "kind", "rank", "scale", "layers", "for", "example"]
    example = Q_PROJ.replace("q_proj", "k_proj")  # the first in the file
    assert lines[2].split() == ["text_encoder", "lora", "2", "0.5", "2", example]
    assert (
        "unet          lora  4     0.75   1" in said
        and "unet          lora  2     0.35   1" in said
    )
    assert "keys not used: 1" in lines and lines[-1].startswith("  surprise: ")


def test_save_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    source = adapted()
    with pytest.raises(fastlora.AdapterError, match="format: expected one of fastlora, peft"):
        fastlora.save(source.unet, tmp_path / "a.safetensors", format="pickle")
    with pytest.raises(fastlora.FormatError, match="one model"):
        fastlora.save(source, tmp_path / "a.safetensors")
    with pytest.raises(fastlora.AdapterError, match="expected a module, a dict"):
        fastlora.save(3, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_peft_s_config_says_ranks_and_alphas(tmp_path: Path) -> None:
    fastlora.save(adapted().unet, tmp_path / "folder", format="peft")
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and sorted(config["target_modules"]) == sorted(
        [TO_Q, TO_K]
    )
