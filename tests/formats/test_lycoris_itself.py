"""Files of LyCORIS' own layers do here what they do there (`pip install lycoris-lora==3.2.*`)."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.formats import lycoris
from fastlora.formats.changes import Target

pytest.importorskip("lycoris", reason="LyCORIS is not installed")

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY = Target("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
CONV_NAME = "lora_unet_down_blocks_0_resnets_0_conv1"
CONV = Target("unet", "down_blocks.0.resnets.0.conv1")

LINEAR, KERNEL = (lambda: nn.Linear(12, 20)), (lambda: nn.Conv2d(12, 20, 3))
NORM, GROUPS = (lambda: nn.LayerNorm(12)), (lambda: nn.GroupNorm(3, 12))
MODULES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "locon": ("locon.LoConModule", LINEAR, {}),
    "locon, rs": ("locon.LoConModule", LINEAR, {"rs_lora": True}),
    "locon, convolution": ("locon.LoConModule", KERNEL, {}),
    "locon, tucker": ("locon.LoConModule", KERNEL, {"use_tucker": True}),
    "locon, scalar": ("locon.LoConModule", LINEAR, {"use_scalar": True}),
    "loha": ("loha.LohaModule", LINEAR, {}),
    "loha, convolution": ("loha.LohaModule", KERNEL, {}),
    "loha, tucker": ("loha.LohaModule", KERNEL, {"use_tucker": True}),
    "lokr": ("lokr.LokrModule", LINEAR, {"lora_dim": 1}),
    "lokr, both": ("lokr.LokrModule", LINEAR, {"lora_dim": 1, "decompose_both": True}),
    "lokr, whole": ("lokr.LokrModule", LINEAR, {"full_matrix": True}),
    "lokr, convolution": ("lokr.LokrModule", KERNEL, {"lora_dim": 1}),
    "lokr, convolution, whole": ("lokr.LokrModule", KERNEL, {"full_matrix": True}),
    "lokr, tucker": ("lokr.LokrModule", KERNEL, {"lora_dim": 1, "use_tucker": True}),
    "lokr, factor": ("lokr.LokrModule", LINEAR, {"lora_dim": 1, "factor": 2}),
    "lokr, unbalanced": (
        "lokr.LokrModule",
        LINEAR,
        {"lora_dim": 1, "decompose_both": True, "unbalanced_factorization": True},
    ),
    "full": ("full.FullModule", LINEAR, {}),
    "full, convolution": ("full.FullModule", KERNEL, {}),
    "layer norm": ("norms.NormModule", NORM, {}),
    "group norm": ("norms.NormModule", GROUPS, {}),
}


def build(kind: str, base: nn.Module, **more: Any) -> Any:
    """A LyCORIS module with random parameters in float64."""
    path, _, options = MODULES[kind]
    file, _, name = path.partition(".")
    made = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
    adapter = made(NAME, base, **{"lora_dim": 2, "alpha": 1.0, **options, **more}).double()
    for parameter in adapter.parameters():
        parameter.data.normal_()
    adapter.apply_to()
    return adapter.eval()


def computed(adapter: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias with which LyCORIS computes a layer's output, read off its forward."""
    used: dict[str, Any] = {}

    def record(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        used.update(weight=weight, bias=bias)
        return x

    adapter.op = record
    adapter(torch.zeros(1, 12, 5, 5, dtype=torch.float64))
    return used["weight"], used["bias"]


def cases() -> list[Any]:
    """All kinds, and with DoRA along both axes those that LyCORIS has it for."""
    ids = {None: "", True: ", dora out", False: ", dora in"}
    return [
        pytest.param(kind, dora, id=kind + text)
        for kind, (name, *_) in MODULES.items()
        for dora, text in ids.items()
        if dora is None or name.startswith("lo")
    ]


@pytest.mark.parametrize(("kind", "dora"), cases())
def test_a_file_of_lycoris_changes_layers_as_lycoris_does(kind: str, dora: bool | None) -> None:
    base = MODULES[kind][1]().double()
    more = {} if dora is None else {"weight_decompose": True, "wd_on_out": dora}
    base_weight, base_bias = base.weight.detach(), base.bias.detach()
    adapter = build(kind, base, **more)
    name, target = (CONV_NAME, CONV) if MODULES[kind][1] is KERNEL else (NAME, QUERY)
    tensors = {f"{name}.{key}": t.detach() for key, t in adapter.state_dict().items()}
    weight, bias = computed(adapter)
    file = lycoris.unpack(tensors, {})
    change = file.changes[target]
    assert not file.unused and change.axis == ("in" if dora is False else "out")
    torch.testing.assert_close(change.changed(base_weight), weight)
    assert (change.bias is not None) == (not MODULES[kind][0].startswith("lo"))
    if change.bias is not None:
        torch.testing.assert_close(base_bias + change.bias, bias)
    written = lycoris.pack(file.changes, "sd").tensors
    torch.testing.assert_close(written, tensors, check_dtype=False)  # alpha was made float64 here
