"""`load_lora_weights` of accelerated pipelines: what the file says takes effect, or it raises."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from tests.integrations.adapter_samples import (
    changed,
    doubled,
    draw,
    factors,
    kohya,
    linears,
    update,
)
from tests.integrations.tiny_pipelines import FRAGILE, flux, run, sd3, sdxl, stable_diffusion

peft = pytest.importorskip("peft")
pytestmark = FRAGILE
ATTENTION = "to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "proj_in"
TEXT = "q_proj", "out_proj", "fc1"


@pytest.fixture(scope="module")
def sd():
    return stable_diffusion()


def accelerated(pipeline):
    """A copy in float64; with diffusers' scheduler, whose coefficients are float32's."""
    pipeline = doubled(pipeline)
    scheduler = pipeline.scheduler
    fastlora.accelerate(pipeline)
    pipeline.scheduler = scheduler
    return pipeline


def same_images(pipeline, plain, updates, kind="sd", scale=1.0):
    """As those of the plain pipeline with the updates in its weights, which are others than its."""
    wanted = run(changed(plain, updates, scale), kind, 2)
    torch.testing.assert_close(run(pipeline, kind, 2), wanted, rtol=0, atol=1e-9)
    assert (wanted - run(doubled(plain), kind, 2)).abs().max() > 1e-3


def untouched(pipeline):
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return not any(hasattr(part, "peft_config") for part in parts) and not any(
        "lora" in name for part in parts for name, _ in part.named_modules()
    )


def test_modules_with_their_own_alphas(sd, tmp_path):
    """Trap a: diffusers alone gives some of these modules another module's strength."""
    places = [*linears(sd, "unet", *ATTENTION), *linears(sd, "text_encoder", *TEXT)]
    tensors, updates = kohya(sd, places)
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    pipeline = accelerated(sd)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pipeline.load_lora_weights(str(path), adapter_name="style")
    assert pipeline.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
    same_images(pipeline, sd, updates)
    theirs = doubled(sd)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of newer PEFTs
        theirs.load_lora_weights(str(path), adapter_name="style")
    wrong = run(theirs, "sd", 2) - run(changed(sd, updates), "sd", 2)
    assert wrong.abs().max() > 1e-3  # what this test is for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_loaded_computes_fused(sd, dtype):
    """In every dtype of the model, at once, and so `fastlora.adapters` knows it."""
    tensors, _ = kohya(sd, [*linears(sd, "unet", "to_q"), *linears(sd, "text_encoder", "q_proj")])
    pipeline = accelerated(sd)
    pipeline.to(dtype)
    pipeline.load_lora_weights(tensors, adapter_name="x")
    assert fastlora.adapters(pipeline)["x"].rank == 4
    for component in ("unet", "text_encoder"):
        model = getattr(pipeline, component)
        layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert layers and all(layer._fastlora_plan.fused for layer in layers)


def test_sdxl_with_two_text_encoders(tmp_path):
    pipeline = sdxl()
    places = [
        *linears(pipeline, "unet", "to_q", "to_v"),
        *linears(pipeline, "text_encoder", *TEXT),
        *linears(pipeline, "text_encoder_2", *TEXT),
    ]
    tensors, updates = kohya(pipeline, places, te="lora_te1")
    fast = accelerated(pipeline)
    given = dict(tensors)
    fast.load_lora_weights(given, adapter_name="x")
    assert given.keys() == tensors.keys()
    same_images(fast, pipeline, updates, "sdxl")


@pytest.mark.parametrize(("make", "kind"), [(sd3, "sd3"), (flux, "flux")])
def test_transformers_in_peft_style(make, kind, tmp_path):
    pipeline = make()
    generator = torch.Generator().manual_seed(0)
    tensors, updates, patterns = {}, {}, {"rank_pattern": {}, "alpha_pattern": {}}
    for i, (_, path) in enumerate(linears(pipeline, "transformer", "to_q", "to_k", "proj_out")):
        rank, alpha = 1 + i % 2, 2 ** (i % 3)
        down, up = factors(pipeline.transformer.get_submodule(path).weight, rank, generator)
        tensors[f"transformer.{path}.lora_A.weight"] = down
        tensors[f"transformer.{path}.lora_B.weight"] = up
        patterns["rank_pattern"]["^" + path] = rank
        patterns["alpha_pattern"]["^" + path] = alpha
        updates["transformer", path] = alpha / rank * update(down, up)
    settings = {"r": 1, "lora_alpha": 1, "target_modules": ["to_q"]} | patterns
    settings = {f"transformer.{key}": value for key, value in settings.items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})
    fast = accelerated(pipeline)
    fast.load_lora_weights(tmp_path, adapter_name="x")
    same_images(fast, pipeline, updates, kind)


def test_dora(sd):
    """Trap b: diffusers alone drops dora_scale and warns."""
    places = linears(sd, "unet", "to_q", "conv1")
    tensors, updates = kohya(sd, places)
    generator = torch.Generator().manual_seed(9)
    dora = {}
    for (component, path), delta in updates.items():
        weight = sd.unet.get_submodule(path).weight.double()
        magnitude = 1 + draw((len(weight), *[1] * (weight.dim() - 1)), generator)
        tensors[f"lora_unet_{path.replace('.', '_')}.dora_scale"] = magnitude
        whole = weight + delta
        norm = whole.flatten(1).norm(dim=1).view_as(magnitude)
        dora[component, path] = (magnitude / norm * whole - weight).detach()
    pipeline = accelerated(sd)
    pipeline.load_lora_weights(tensors, adapter_name="d")
    assert pipeline.unet.peft_config["d"].use_dora
    same_images(pipeline, sd, dora)


def loha(sd):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.{part}": draw(shape, generator) for part, shape in parts.items()}


def test_what_pefts_lora_cannot_hold(sd, tmp_path):
    """Trap c. The error says what does load it, and that does."""
    path = tmp_path / "loha.safetensors"
    save_file(loha(sd), path)
    pipeline = accelerated(sd)
    with pytest.raises(fastlora.AdapterError, match="cannot hold it: it is loha") as caught:
        pipeline.load_lora_weights(path, adapter_name="h")
    assert f"fastlora.load(pipe, {str(path)!r}, name='h')" in str(caught.value)
    assert untouched(pipeline)
    fastlora.load(pipeline, path, name="h")
    assert fastlora.adapters(pipeline.unet)["h"].kind == "loha"


def test_keys_that_fit_nothing(sd):
    tensors, _ = kohya(sd, linears(sd, "unet", "to_q"))
    for extra, why in (
        ({"lora_unet_mid_block_nowhere.lora_down.weight": torch.ones(1, 4)}, "mid_block"),
        ({"something.else": torch.ones(1)}, "something.else"),
        ({"something.else": 1.0}, "expected tensors, got 'something.else': float"),
    ):
        pipeline = accelerated(sd)
        with pytest.raises(ValueError, match=why):
            pipeline.load_lora_weights(tensors | extra, adapter_name="x")
        assert untouched(pipeline)


def test_shapes_of_another_model(sd):
    tensors, _ = kohya(sd, linears(sd, "unet", "to_q"))
    key = next(key for key in tensors if key.endswith("down.weight"))
    tensors[key] = torch.ones(len(tensors[key]), 7)
    pipeline = accelerated(sd)
    with pytest.raises(fastlora.AdapterError, match=r"down: expected \[1, 16\], got \[1, 7\]"):
        pipeline.load_lora_weights(tensors, adapter_name="x")
    assert untouched(pipeline)


def test_a_name_that_one_component_has(sd):
    """Before the other one is changed."""
    pipeline = accelerated(sd)
    text, _ = kohya(sd, linears(sd, "text_encoder", "q_proj"))
    both, _ = kohya(sd, [*linears(sd, "unet", "to_q"), *linears(sd, "text_encoder", "q_proj")])
    pipeline.load_lora_weights(text, adapter_name="x")
    with pytest.raises(fastlora.AdapterError, match="text_encoder has an adapter 'x' already"):
        pipeline.load_lora_weights(both, adapter_name="x")
    assert not hasattr(pipeline.unet, "peft_config")


def test_what_diffusers_does_with_adapters_afterwards(sd, tmp_path):
    places = [*linears(sd, "unet", "to_q", "to_v"), *linears(sd, "text_encoder", "q_proj")]
    (first, one), (second, two) = kohya(sd, places, seed=1), kohya(sd, places, seed=2)
    pipeline = accelerated(sd)
    plain = run(pipeline, "sd", 2)
    pipeline.load_lora_weights(first, adapter_name="one")
    pipeline.load_lora_weights(second, adapter_name="two")
    pipeline.set_adapters(["one", "two"], [0.5, {"unet": {"down": 2.0, "up": 0.0}}])
    blocks = {"down_blocks": 2.0, "up_blocks": 0.0, "mid_block": 1.0}
    total = {
        place: 0.5 * one[place] + blocks.get(place[1].split(".")[0], 1.0) * two[place]
        for place in one
    }
    same_images(pipeline, sd, total)
    before = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
    pipeline.fuse_lora()
    same_images(pipeline, sd, total)
    pipeline.unfuse_lora()
    after = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.equal(after, before)
    pipeline.delete_adapters("two")
    pipeline.set_adapters("one")
    same_images(pipeline, sd, one)
    for component in ("unet", "text_encoder"):
        model = getattr(pipeline, component)
        saved = peft.get_peft_model_state_dict(model, adapter_name="one")
        assert len(saved) == 2 * sum(place[0] == component for place in places)
    layers = {
        f"{c}_lora_layers": peft.get_peft_model_state_dict(getattr(pipeline, c), adapter_name="one")
        for c in ("unet", "text_encoder")
    }
    settings = {
        f"{c}_lora_adapter_metadata": getattr(pipeline, c).peft_config["one"].to_dict()
        for c in ("unet", "text_encoder")
    }
    pipeline.save_lora_weights(tmp_path, **layers, **settings)
    again = accelerated(sd)
    again.load_lora_weights(tmp_path)
    same_images(again, sd, one)
    pipeline.unload_lora_weights()
    assert torch.equal(run(pipeline, "sd", 2), plain)


def test_strengths_of_the_last_call_do_not_stay(sd):
    """diffusers remembers a call's scale, and multiplies text encoders that are loaded later."""
    tensors, updates = kohya(sd, linears(sd, "text_encoder", "q_proj"))
    pipeline = doubled(sd)
    run(pipeline, "sd", cross_attention_kwargs={"scale": 0.25})
    pipeline = accelerated(pipeline)
    pipeline.load_lora_weights(tensors, adapter_name="x")
    same_images(pipeline, sd, updates)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_hot_swap(sd, prepared, tmp_path):
    """Every module has the alpha / rank of its own, also after `set_adapters`: trap e."""
    places = linears(sd, "unet", "to_q", "to_k")
    first, _ = kohya(sd, places, seed=1)
    second, updates = kohya(sd, places[::-1], seed=2)
    pipeline = accelerated(sd)
    if prepared:
        pipeline.enable_lora_hotswap(target_rank=4)
    pipeline.load_lora_weights(first, adapter_name="x")
    pipeline.load_lora_weights(second, adapter_name="x", hotswap=True)
    config = pipeline.unet.peft_config["x"]
    assert config.alpha_pattern
    same_images(pipeline, sd, updates)
    tensors = peft.get_peft_model_state_dict(pipeline.unet, adapter_name="x")
    pipeline.save_lora_weights(tmp_path, tensors, unet_lora_adapter_metadata=config.to_dict())
    again = accelerated(sd)
    again.load_lora_weights(tmp_path)
    same_images(again, sd, updates)
    pipeline.set_adapters("x", 0.5)
    same_images(pipeline, sd, updates, scale=0.5)
    with pytest.raises(fastlora.AdapterError, match="no adapter 'y' to exchange; it has"):
        pipeline.load_lora_weights(second, adapter_name="y", hotswap=True)


def test_a_hot_swap_leaves_the_rest_alone(sd):
    """PEFT zeroes parameters of other adapters where the name occurs in their keys, and exchanges
    the tensors that it is given for those that it had."""
    places = linears(sd, "unet", "to_q", "to_k")
    files = [kohya(sd, places[::step], seed=seed) for seed, step in enumerate((1, -1, 1))]
    copies = [{key: tensor.clone() for key, tensor in tensors.items()} for tensors, _ in files]
    pipeline = accelerated(sd)
    pipeline.load_lora_weights(files[0][0], adapter_name="a")  # in every "lora_A"
    pipeline.load_lora_weights(files[1][0], adapter_name="b")
    for number in (1, 2, 0, 2):
        pipeline.load_lora_weights(files[number][0], adapter_name="a", hotswap=True)
    for (tensors, _), before in zip(files, copies, strict=True):
        assert all(torch.equal(tensors[key], before[key]) for key in before)
    same_images(pipeline, sd, files[1][1])  # as "b" is active
    pipeline.set_adapters("a")
    same_images(pipeline, sd, files[2][1])


def test_hot_swaps_that_peft_cannot_do(sd):
    """Before it finds out, and the adapter that was there is lost."""
    place = linears(sd, "unet", "to_q")
    old, _ = kohya(sd, place)
    text, _ = kohya(sd, [*place, *linears(sd, "text_encoder", "q_proj")])
    more, _ = kohya(sd, [*place, *linears(sd, "unet", "to_k")])
    dora = dict(old)
    for key in old:
        if key.endswith("up.weight"):
            name = key.removesuffix(".lora_up.weight")
            dora[f"{name}.dora_scale"] = torch.ones(len(old[key]), 1, dtype=torch.float64)
    pipeline = accelerated(sd)
    pipeline.load_lora_weights(old, adapter_name="x")
    before = run(pipeline, "sd")
    for new, why in (
        (text, "diffusers exchanges no adapters of a text_encoder"),
        (more, "to_k has no adapter 'x' to exchange"),
        (dora, "PEFT exchanges plain LoRAs alone"),
    ):
        with pytest.raises(fastlora.AdapterError, match=why):
            pipeline.load_lora_weights(new, adapter_name="x", hotswap=True)
        assert torch.equal(run(pipeline, "sd"), before)
    pipeline.fuse_lora()
    with pytest.raises(fastlora.AdapterError, match="is fused; unfuse_lora first"):
        pipeline.load_lora_weights(old, adapter_name="x", hotswap=True)


def test_pefts_folder(sd, tmp_path):
    """adapter_config.json has the alpha, which diffusers alone does not read."""
    place = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    generator = torch.Generator().manual_seed(0)
    down, up = factors(sd.unet.get_submodule(place[1]).weight, 2, generator)
    start = f"base_model.model.{place[1]}"
    tensors = {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [place[1]]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pipeline = accelerated(sd)
    pipeline.load_lora_weights(tmp_path, adapter_name="x")
    same_images(pipeline, sd, {place: 3 * update(down, up)})


@pytest.mark.parametrize("pickled", [False, True])
def test_the_hub_is_asked_by_diffusers(sd, tmp_path, pickled):
    """Its cache, as the Hub's client lays it out."""
    tensors, updates = kohya(sd, linears(sd, "unet", "to_q"))
    snapshot = tmp_path / "models--someone--style" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--style" / "refs").mkdir()
    (tmp_path / "models--someone--style" / "refs" / "main").write_text("0" * 40)
    name = "style.bin" if pickled else "style.safetensors"
    (torch.save if pickled else save_file)(tensors, snapshot / name)
    pipeline = accelerated(sd)
    pipeline.load_lora_weights(
        "someone/style", weight_name=name, cache_dir=tmp_path, local_files_only=True
    )
    assert pipeline.get_list_adapters() == {"unet": ["default_0"]}
    same_images(pipeline, sd, updates)


def test_fused_projections_of_flux():
    """kohya's qkv is three modules in diffusers, which share `down` and not memory."""
    pipeline = flux()
    block = "transformer_blocks.0.attn"
    generator = torch.Generator().manual_seed(0)
    down, up = draw((2, 32), generator), draw((96, 2), generator)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    parts = [("transformer", f"{block}.{part}") for part in ("to_q", "to_k", "to_v")]
    updates = {p: 0.5 * rows @ down for p, rows in zip(parts, up.chunk(3), strict=True)}
    fast = accelerated(pipeline)
    fast.load_lora_weights(tensors, adapter_name="x")
    same_images(fast, pipeline, updates, "flux")
    loaded = peft.get_peft_model_state_dict(fast.transformer, adapter_name="x").values()
    assert len({tensor.data_ptr() for tensor in loaded}) == 6


def test_names_that_diffusers_alone_knows():
    """Its conversion of XLabs' files, and everything has to fit as ever."""
    pipeline = flux()
    generator = torch.Generator().manual_seed(0)
    name = "double_blocks.0.processor.proj_lora1"
    down, up = draw((2, 32), generator), draw((32, 2), generator)
    tensors = {f"{name}.down.weight": down, f"{name}.up.weight": up}
    fast = accelerated(pipeline)
    fast.load_lora_weights(tensors, adapter_name="x")
    place = ("transformer", "transformer_blocks.0.attn.to_out.0")
    same_images(fast, pipeline, {place: up @ down}, "flux")
    wrong = {key.replace("blocks.0", "blocks.7"): value for key, value in tensors.items()}
    with pytest.raises(fastlora.AdapterError, match="do not fit"):
        accelerated(pipeline).load_lora_weights(wrong, adapter_name="x")


def test_control_loras_of_flux_are_diffusers_own_matter():
    """They widen the transformer's input."""
    tensors = {}
    for name, shape in {"lora_A": (2, 8), "lora_B": (32, 2)}.items():
        tensors[f"transformer.x_embedder.{name}.weight"] = torch.ones(shape)
    both = flux(), flux()
    fastlora.accelerate(both[1])
    for pipeline in both:
        pipeline.load_lora_weights(dict(tensors), adapter_name="x")
        assert pipeline.transformer.config.in_channels == 8


def test_what_fits_is_said_to_load_without_the_rest(sd):
    tensors, _ = kohya(sd, linears(sd, "unet", "to_q"))
    tensors["something.else"] = torch.ones(1)
    with pytest.raises(fastlora.AdapterError) as caught:
        accelerated(sd).load_lora_weights(tensors, adapter_name="x")
    assert "fastlora.load(pipe, path, name='x', strict=False) loads" in str(caught.value)


def test_pefts_adapters_come_to_layers_that_have_native_ones(sd, tmp_path):
    """PEFT makes the parts of its convolutions of the class that it finds there."""
    places = [*linears(sd, "unet", "to_q", "conv1"), *linears(sd, "text_encoder", "q_proj")]
    (native, one), (tensors, two) = kohya(sd, places, seed=1), kohya(sd, places[::-1], seed=2)
    save_file(native, tmp_path / "native.safetensors")
    pipeline = accelerated(sd)
    fastlora.load(pipeline, tmp_path / "native.safetensors", name="n")
    pipeline.load_lora_weights(tensors, adapter_name="p")
    same_images(pipeline, sd, {place: one[place] + two[place] for place in one})
    fastlora.remove(pipeline, "n")
    same_images(pipeline, sd, two)
    pipeline.unload_lora_weights()
    assert untouched(pipeline)


def test_text_encoders_without_attention_in_a_file(sd):
    """diffusers tells the style of a text encoder's file by its attention; of PEFT's keys for
    other layers alone it says that it cannot."""
    for ends in (["fc1"], ["fc1", "q_proj"]):
        places = [*linears(sd, "unet", "to_q"), *linears(sd, "text_encoder", *ends)]
        tensors, updates = kohya(sd, places)
        pipeline = accelerated(sd)
        pipeline.load_lora_weights(tensors, adapter_name="x")
        same_images(pipeline, sd, updates)


def test_a_load_that_fails_half_way_is_taken_back(sd, monkeypatch):
    """With the second component, after the UNet has its adapter: nothing is left of it, and what
    was active before is."""
    places = [*linears(sd, "unet", "to_q"), *linears(sd, "text_encoder", "q_proj")]
    tensors, _ = kohya(sd, places)
    pipeline = accelerated(sd)
    plain = run(pipeline, "sd")

    def fail(*_, **__):
        raise MemoryError("stop")

    def failing():
        with monkeypatch.context() as patch, pytest.raises(MemoryError, match="stop"):
            patch.setattr(pipeline.__class__, "load_lora_into_text_encoder", fail, raising=False)
            pipeline.load_lora_weights(tensors, adapter_name="x")

    failing()
    assert untouched(pipeline)
    assert torch.equal(run(pipeline, "sd"), plain)
    for seed, name in enumerate("ab"):
        other, _ = kohya(sd, linears(sd, "unet", "to_k"), seed)
        pipeline.load_lora_weights(other, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.5, 2.0])
    before = run(pipeline, "sd")
    failing()
    assert torch.equal(run(pipeline, "sd"), before)
    assert pipeline.get_list_adapters() == {"unet": ["a", "b"]}
    assert pipeline.get_active_adapters() == ["a", "b"]
    assert not any("lora" in name for name, _ in pipeline.unet.named_modules() if "to_q" in name)
    pipeline.load_lora_weights(tensors, adapter_name="x")
    assert pipeline.get_active_adapters() == ["x"]
