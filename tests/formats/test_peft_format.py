"""PEFT's files, against PEFT itself: what it saves is read, what is written it loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastlora.formats import detect, files, lycoris, peft
from fastlora.formats.changes import (
    Change,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Packed,
    Target,
)
from fastlora.formats.files import FormatError
from tests.formats.nets import LAYERS, TOKENS, changed_output, net, random_lora, randomize

oracle = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),  # of lora_B.bias
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def saved(tmp_path: Path, config: Any, base: nn.Module) -> tuple[Any, Path]:
    """PEFT's model with random adapters, and the folder that it saved."""
    model = oracle.get_peft_model(copy.deepcopy(base), config).double().eval()
    randomize(model, ("lora_", "hada_", "lokr_"))
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def loaded(tmp_path: Path, packed: Packed, base: nn.Module) -> Any:
    folder = tmp_path / "written"
    folder.mkdir()
    files.write(folder / "adapter_model.safetensors", packed.tensors, packed.metadata)
    (folder / "adapter_config.json").write_text(json.dumps(packed.config))
    return oracle.PeftModel.from_pretrained(copy.deepcopy(base), folder).double().eval()


LORAS = {
    "every layer": {"target_modules": LAYERS, "r": 4, "lora_alpha": 3},
    "rank stabilised": {"target_modules": LAYERS, "r": 6, "lora_alpha": 3, "use_rslora": True},
    "DoRA": {"target_modules": LAYERS, "r": 4, "lora_alpha": 3, "use_dora": True},
    "bias": {"target_modules": LAYERS[1:], "r": 4, "lora_alpha": 3, "lora_bias": True},
    "patterns": {
        "target_modules": LAYERS,
        "r": 4,
        "lora_alpha": 3,
        # In the order in which PEFT writes them: it sorts, and would not read others itself.
        "rank_pattern": {"^proj": 8, "blocks.1": 6, r"blocks\.\d": 2, "conv": 3},
        "alpha_pattern": {"1": 7, r"blocks\..*": 5, "con.*": 0.5, "point": 1},
    },
    "a regular expression": {"target_modules": r"blocks\.[01]|proj", "r": 2, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_what_peft_saves_is_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = net()
    model, folder = saved(tmp_path, oracle.LoraConfig(**settings), base)
    file = detect.read(folder)
    assert file.format == "peft" and not file.unused
    targets = settings["target_modules"]
    wanted = LAYERS[-3:] if isinstance(targets, str) else targets
    assert sorted(t.path for t in file.changes) == sorted(wanted)
    keys = [key for change in file.changes.values() for key in change.keys]
    assert sorted(keys) == sorted(files.read(folder / "adapter_model.safetensors")[0])
    found = changed_output(base, file.changes, TOKENS)
    torch.testing.assert_close(found, model(TOKENS), **CLOSE)
    assert (found - base(TOKENS)).abs().max() > 0.1


LYCORIS_LAYERS = [*LAYERS[1:], "grouped"]
LYCORIS = {
    "LoHa": oracle.LoHaConfig(
        target_modules=LYCORIS_LAYERS, r=2, alpha=3, alpha_pattern={"proj": 5}
    ),
    "LoHa, Tucker": oracle.LoHaConfig(
        target_modules=LYCORIS_LAYERS, r=2, alpha=3, use_effective_conv2d=True
    ),
    "LoKr": oracle.LoKrConfig(target_modules=LYCORIS_LAYERS, r=1, alpha=3, decompose_both=True),
    "LoKr, Tucker": oracle.LoKrConfig(
        target_modules=LYCORIS_LAYERS, r=1, alpha=3, use_effective_conv2d=True
    ),
    "LoKr of whole factors": oracle.LoKrConfig(target_modules=LYCORIS_LAYERS, r=8, alpha=3),
}


@pytest.mark.parametrize("config", LYCORIS.values(), ids=LYCORIS)
def test_loha_and_lokr_of_peft(tmp_path: Path, config: Any) -> None:
    base = net()
    model, folder = saved(tmp_path, config, base)
    file = detect.read(folder)
    kind = Hadamard if isinstance(config, oracle.LoHaConfig) else Kronecker
    assert len(file.changes) == 6 and not file.unused
    assert all(isinstance(change.weight, kind) for change in file.changes.values())
    found = changed_output(base, file.changes, TOKENS)
    torch.testing.assert_close(found, model(TOKENS), **CLOSE)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_state_dict_with_the_adapters_name(prefix: str) -> None:
    base = net()
    config = oracle.LoraConfig(target_modules=LAYERS, r=4, lora_alpha=3, use_dora=True)
    model = oracle.get_peft_model(copy.deepcopy(base), config, adapter_name="mine").double()
    randomize(model, ("lora_",))
    own = {k: v for k, v in model.state_dict().items() if ".mine" in k}
    assert any(key.endswith("lora_A.mine.weight") for key in own)
    tensors = {prefix + key.removeprefix("base_model.model."): t for key, t in own.items()}
    file = peft.unpack(tensors, {}, config.to_dict())
    assert not file.unused
    torch.testing.assert_close(
        changed_output(base, file.changes, TOKENS), model.eval()(TOKENS), **CLOSE
    )


def test_what_is_no_update_is_unused_for_a_reason(tmp_path: Path) -> None:
    config = oracle.LoraConfig(
        target_modules=["conv"],
        r=2,
        bias="all",
        modules_to_save=["proj"],
        trainable_token_indices={"tokens": [3, 4]},
    )
    _, folder = saved(tmp_path, config, net())
    file = detect.read(folder)
    assert [str(t) for t in file.changes] == ["conv"]
    reasons = {key.removeprefix("base_model.model."): why for key, why in file.unused.items()}
    assert "trainable tokens" in reasons["tokens.token_adapter.trainable_tokens_delta"]
    assert "modules_to_save" in reasons["proj.weight"]
    assert "trained along" in reasons["conv.base_layer.bias"]
    assert "trained along" in reasons["blocks.0.bias"]


def changes_for(case: str, base: nn.Module) -> dict[Target, Change]:
    fields: dict[str, dict[str, Any]] = {path: {} for path in LAYERS}
    for i, own in enumerate(fields.values()):
        if case == "ranks and alphas":
            own.update(rank=2 + 2 * (i % 3), alpha=[None, 3.0, 0.5][i // 3])
        if case in ("rank stabilised", "some rank stabilised"):
            own.update(alpha=3.0, rank_stabilized=case == "rank stabilised" or i % 2 == 0)
    changes = {
        Target("", path): random_lora(base.get_submodule(path), dora=case == "DoRA", **own)
        for path, own in fields.items()
    }
    if case == "some biases":
        del changes[Target("", "tokens")]
        proj = changes[Target("", "proj")]
        low = LowRank(proj.weight.down, proj.weight.up, alpha=3.0)  # type: ignore[union-attr]
        changes[Target("", "proj")] = Change(low, bias=torch.randn(5).double())
    return changes


@pytest.mark.parametrize(
    "case",
    ["plain", "ranks and alphas", "rank stabilised", "some rank stabilised", "DoRA", "some biases"],
)
def test_what_is_written_peft_loads(tmp_path: Path, case: str) -> None:
    base = net()
    changes = changes_for(case, base)
    packed = peft.pack(changes)
    model = loaded(tmp_path, packed, base)  # warns, which is an error, of keys that are missing
    expected = changed_output(base, changes, TOKENS)
    torch.testing.assert_close(model(TOKENS), expected, **CLOSE)
    again = detect.read(tmp_path / "written").changes
    torch.testing.assert_close(changed_output(base, again, TOKENS), expected, **CLOSE)


def test_the_key_of_a_pattern_means_one_path_only(tmp_path: Path) -> None:
    """ "x" ends "a.x", and "." in "a.x" is any character for PEFT."""
    base = nn.ModuleDict({k: nn.ModuleDict({"x": nn.Linear(3, 3)}) for k in ("a", "b")})
    base["x"], base["a_x"] = nn.Linear(3, 3), nn.Linear(3, 3)
    ranks = {"x": 1, "a.x": 2, "b.x": 3, "a_x": 3}
    changes = {Target("", p): random_lora(base.get_submodule(p), rank=r) for p, r in ranks.items()}
    model = loaded(tmp_path, peft.pack(changes), base)
    found = {path: model.base_model.model.get_submodule(path).r["default"] for path in ranks}
    assert found == ranks


def lora(**fields: Any) -> Change:
    return Change(LowRank(torch.ones(2, 3), torch.ones(4, 2)), **fields)


A, B = Target("unet", "a"), Target("unet", "b")
NOT_WRITTEN = {
    "two components": ({A: lora(), Target("vae", "a"): lora()}, "write each of .*unet.*vae"),
    "nothing": ({}, "at least one change"),
    "a flat name": ({Target("", "a_b", True): lora()}, "a_b: .*load it into the model"),
    "full": ({A: Change(Dense(torch.ones(4, 3)))}, "unet.a: .*got full; write a lycoris file"),
    "some DoRA": ({A: lora(magnitude=torch.ones(4)), B: lora()}, "unet.b: .*two files"),
    "norms of inputs": (
        {A: lora(magnitude=torch.ones(3), axis="in")},
        "unet.a: .*magnitudes are of inputs",
    ),
    "DoRA with a bias": (
        {A: lora(magnitude=torch.ones(4), bias=torch.ones(4))},
        "unet.a: .*a bias beside DoRA",
    ),
}


@pytest.mark.parametrize(("changes", "message"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_peft_cannot_hold(changes: dict[Target, Change], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        peft.pack(changes)


def test_rows_and_tucker_are_written_as_a_plain_lora() -> None:
    low = LowRank(torch.randn(2, 3), torch.randn(6, 2))
    core = LowRank(torch.randn(2, 3, 1, 1), torch.randn(4, 2, 1, 1), mid=torch.randn(2, 2, 3, 3))
    changes = {A: Change(low, rows=(2, 4, 6)), B: Change(core)}
    packed = peft.pack(changes)
    read = peft.unpack(packed.tensors, {}, packed.config).changes
    for target, shape in ((A, (2, 3)), (B, (4, 3, 3, 3))):
        found = read[Target("", target.path)].delta(shape)
        torch.testing.assert_close(found, changes[target].delta(shape))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """PEFT's A sees the inputs of all groups, which no update of the grouped weight does."""
    base = net()
    _, folder = saved(tmp_path, oracle.LoraConfig(target_modules=["grouped"], r=4), base)
    with pytest.raises(FormatError, match=r"grouped: .*\[4, 8, 3, 3\] and \[8, 2, 1, 1\]"):
        detect.read(folder)
    with pytest.raises(FormatError, match="grouped: .*a grouped convolution"):
        peft.pack({Target("", "grouped"): random_lora(base.grouped)})


TENSORS = {"m.lora_A.weight": torch.ones(2, 3), "m.lora_B.weight": torch.ones(4, 2)}
ONE = torch.ones(1, 1)
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "no config": ({}, None, "adapter_config.json.*it has alpha"),
    "another method": ({}, {"peft_type": "VERA"}, "expected LORA, LOHA, LOKR, got 'VERA'"),
    "another rank": ({}, {"r": 4}, "m: the settings say rank 4, the tensors have 2"),
    "rank 0": ({}, {"r": 0}, "r: expected an integer >= 1, got 0"),
    "no method": ({}, {"peft_type": ["LORA"]}, "peft_type: expected LORA, LOHA, LOKR"),
    "a huge alpha": ({}, {"lora_alpha": 10**400}, "lora_alpha: expected a finite number"),
    "LoKr's shapes": (
        {"m.lora_A.weight": None, "m.lora_B.weight": None, "m.lokr_w1": ONE, "m.lokr_w2_a": ONE},
        {"peft_type": "LOKR"},
        "m: no lokr_w2_b",
    ),
    "LoHa's shapes": (
        {"m.lora_A.weight": None, "m.lora_B.weight": None, "m.hada_w1_a": ONE},
        {"peft_type": "LOHA"},
        "m: no hada_w1_b",
    ),
    "alpha": ({}, {"lora_alpha": "16"}, "lora_alpha: expected a finite number, got '16'"),
    "a pattern": ({}, {"alpha_pattern": {"(": 1}}, "alpha_pattern: '\\(' is no regular expr"),
    "a pattern's value": ({}, {"rank_pattern": {"m": None}}, "rank_pattern: 'm': expected"),
    "patterns": ({}, {"rank_pattern": [1]}, "rank_pattern: expected an object"),
    "PiSSA": ({}, {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conv"),
    "no B": ({"m.lora_B.weight": None}, {}, "m: expected lora_A, lora_B, got no lora_B"),
    "shapes": ({"m.lora_B.weight": torch.ones(4, 3)}, {}, r"got \[2, 3\] and \[4, 3\]"),
    "a shard": ({"m.lora_A.weight": torch.ones(0)}, {}, "m: expected matrices"),
    "two adapters": ({"n.lora_A.x.weight": ONE, "n.lora_B.y.weight": ONE}, {}, "got .'x', 'y'"),
    "twice": ({"m.lora_A.x.weight": ONE}, {}, "m.lora_A.x.weight and m.lora_A.weight"),
    "no magnitude": ({}, {"use_dora": True}, "m: use_dora is True, got none"),
    "a magnitude": ({"m.lora_magnitude_vector": torch.ones(4)}, {}, "use_dora is False, got one"),
    "its size": (
        {"m.lora_magnitude_vector": torch.ones(3)},
        {"use_dora": True},
        r"m: lora_magnitude_vector: expected 4 elements, got \[3\]",
    ),
    "its bias": (
        {"m.lora_magnitude_vector": torch.ones(4), "m.lora_B.bias": torch.ones(4)},
        {"use_dora": True},
        "m: DoRA with lora_bias",
    ),
    "a bias": ({"m.lora_B.bias": torch.ones(3)}, {}, r"m: lora_B.bias: expected \[4\], got \[3\]"),
    "two methods": ({"m.hada_w1_a": torch.ones(4, 2)}, {}, "m: expected tensors of one method"),
    "the other": ({}, {"peft_type": "LOHA"}, "m: expected tensors of LOHA, got .*lora_A"),
    "an embedding's kernel": (
        {"e.lora_embedding_A": torch.ones(2, 3, 1), "e.lora_embedding_B": torch.ones(4, 2)},
        {},
        r"e: lora_embedding_A and lora_embedding_B: expected matrices, got \[2, 3, 1\]",
    ),
    "both": ({"m.lora_embedding_A": torch.ones(2, 3)}, {}, "m: expected lora_embedding_A, lora_e"),
}  # fmt: skip


@pytest.mark.parametrize(("own", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(own: dict[str, Any], config: dict[str, Any] | None, message: str) -> None:
    tensors = {k: v for k, v in {**TENSORS, **own}.items() if v is not None}
    full = None if config is None else {**PLAIN, **config}
    with pytest.raises(FormatError, match=message):
        peft.unpack(tensors, {}, full)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_changes_the_base_for_what_is_refused(tmp_path: Path, start: str) -> None:
    """Without the refusal, such a file would be applied to weights that it is not meant for."""
    base = net().float()  # which the decompositions need
    config = oracle.LoraConfig(target_modules=["proj"], r=2, init_lora_weights=start)
    _, folder = saved(tmp_path, config, base)
    own = oracle.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    weight = own.base_model.model.proj.base_layer.weight
    assert (weight - base.proj.weight).abs().max() > 1e-3
    with pytest.raises(FormatError, match="meant for changed weights"):
        detect.read(folder)


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "LOKR"])
def test_alpha_zero_is_no_effect_also_in_other_formats(kind: str) -> None:
    """In PEFT it multiplies by 0, in kohya's files it would be the rank."""
    low = {"lora_A.weight": (2, 4), "lora_B.weight": (6, 2)}
    loha = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)}
    lokr = {"lokr_w1": (3, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 2)}
    shapes = {"LORA": low, "LOHA": loha, "LOKR": lokr}[kind]
    tensors = {f"{peft.PREFIX}proj.{k}": torch.randn(shape) for k, shape in shapes.items()}
    config = {"peft_type": kind, "r": 2, "lora_alpha": 0, "alpha": 0}
    (change,) = peft.unpack(tensors, {}, config).changes.values()
    assert change.weight.alpha is None
    assert not change.delta((6, 4)).any()
    target = Target("", "proj")
    packed = lycoris.pack({target: change})
    (written,) = lycoris.unpack(packed.tensors, packed.metadata).changes.values()
    assert not written.delta((6, 4)).any()


def test_errors_about_the_settings_name_their_file(tmp_path: Path) -> None:
    tensors = {f"{peft.PREFIX}a.lora_A.weight": torch.ones(2, 3)}
    files.write(tmp_path / "adapter_model.safetensors", tensors, {})
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT"}')
    with pytest.raises(FormatError, match="adapter_config.json: peft_type: expected LORA"):
        detect.read(tmp_path)


def test_the_way_on_without_the_settings_can_be_gone(tmp_path: Path) -> None:
    low = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}
    path = tmp_path / "adapter_model.safetensors"
    files.write(path, {peft.PREFIX + key: tensor for key, tensor in low.items()}, {})
    with pytest.raises(FormatError, match="write one there with .*peft_type"):
        detect.read(path)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert detect.read(path).changes[Target("", "a")].weight.ratio == 0.5
