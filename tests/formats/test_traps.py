"""The nine wrong results that loaders of adapter files are known for, each against float64.

A file is written by hand, key by key; what a layer is to compute is written out here in float64.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import fastlora

MODULES = [f"blocks.{i}.attn.{n}" for i in range(5) for n in ("to_q", "to_k", "to_v", "to_out.0")]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8)])


class Model(nn.Module):
    """Named like the blocks of a diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()}) for _ in range(5)])
        self.conv = nn.Conv2d(6, 4, 3, padding=2, dilation=2, padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2)


def model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype).eval()


def kohya(modules: list[str], alphas: list[float], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, alpha in zip(modules, alphas, strict=True):
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 8, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(8, 4, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def written(tmp_path: Path, tensors: dict[str, Tensor], name: str = "file") -> Path:
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path)
    return path


def delta(tensors: dict[str, Tensor], module: str) -> Tensor:
    """`alpha / rank · up down`, in float64."""
    name = "lora_unet_" + module.replace(".", "_")
    down, up = (tensors[f"{name}.lora_{k}.weight"].double() for k in ("down", "up"))
    return tensors[f"{name}.alpha"].item() / down.shape[0] * (up @ down)


def layer(net: nn.Module, module: str) -> nn.Linear:
    found = net.get_submodule(module)
    assert isinstance(found, nn.Linear)
    return found


def check(net: nn.Module, module: str, update: Tensor, scale: float = 1.0) -> None:
    x, one = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), layer(net, module)
    expected = x.double() @ (one.weight.double() + scale * update).T
    if one.bias is not None:
        expected = expected + one.bias.double()
    torch.testing.assert_close(one(x).double(), expected, rtol=2e-5, atol=2e-5)


def test_a_every_module_has_its_own_alpha(tmp_path: Path) -> None:
    alphas = [1.0 if i % 5 < 2 else 4.0 for i in range(len(MODULES))]
    tensors, net = kohya(MODULES, alphas), model()
    report = fastlora.load(net, written(tmp_path, tensors))
    assert {a.ratio for a in report.applied} == {0.25, 1.0}
    for module in MODULES:
        check(net, module, delta(tensors, module))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_b_dora_scale_is_applied(tmp_path: Path, axis: str) -> None:
    module = MODULES[0]
    tensors, net = kohya([module], [2.0]), model()
    m = torch.rand(8, generator=torch.Generator().manual_seed(3)) + 0.5
    shape, dim = ((8, 1), 1) if axis == "out" else ((1, 8), 0)
    key = f"lora_unet_{module.replace('.', '_')}.dora_scale"
    tensors[key] = m.view(shape)
    plain = layer(net, module).weight.detach().double()
    fastlora.load(net, written(tmp_path, tensors))
    v = plain + delta(tensors, module)
    whole = v * m.double().view(shape) / v.norm(dim=dim, keepdim=True)
    check(net, module, whole - plain)


def test_c_loha_lokr_and_tucker_are_applied(tmp_path: Path) -> None:
    generator, net = torch.Generator().manual_seed(4), model()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 2

    loha = {k: drawn(*s) for k, s in
            {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)}.items()}  # fmt: skip
    lokr = {"w1": drawn(2, 4), "w2_a": drawn(4, 2), "w2_b": drawn(2, 2)}
    tucker = {"down": drawn(2, 6, 1, 1), "mid": drawn(2, 2, 3, 3), "up": drawn(4, 2, 1, 1)}
    prefix = "lora_unet_blocks_0_attn_to_"
    tensors = {f"{prefix}q.hada_{k}": v for k, v in loha.items()}
    tensors |= {f"{prefix}k.lokr_{k}": v for k, v in lokr.items()}
    tensors |= {f"lora_unet_conv.lora_{k}.weight": v for k, v in tucker.items()}
    for name in (f"{prefix}q", f"{prefix}k", "lora_unet_conv"):
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    conv = net.conv.weight.detach().double()
    fastlora.load(net, written(tmp_path, tensors))
    a = {k: v.double() for k, v in loha.items()}
    check(net, MODULES[0], 0.5 * (a["w1_a"] @ a["w1_b"]) * (a["w2_a"] @ a["w2_b"]))
    b = {k: v.double() for k, v in lokr.items()}
    check(net, MODULES[1], 0.5 * torch.kron(b["w1"], b["w2_a"] @ b["w2_b"]))
    c = {k: v.double() for k, v in tucker.items()}
    update = 0.5 * torch.einsum(
        "or,rskl,si->oikl", c["up"][..., 0, 0], c["mid"], c["down"][..., 0, 0]
    )
    x = torch.randn(1, 6, 7, 7, generator=generator)
    padded = F.pad(x.double(), (2, 2, 2, 2), mode="reflect")
    bias = net.conv.bias.detach().double() if net.conv.bias is not None else None
    expected = F.conv2d(padded, conv + update, bias, dilation=2)
    torch.testing.assert_close(net.conv(x).double(), expected, rtol=2e-5, atol=2e-5)


def test_c_a_file_without_effect_is_an_error_that_names_its_keys(tmp_path: Path) -> None:
    net, path = model(), written(tmp_path, kohya(["nowhere.to_q"], [1.0]))
    for strict in (True, False):
        with pytest.raises(fastlora.AdapterError, match="nowhere"):
            fastlora.load(net, path, strict=strict)
    assert not fastlora.adapters(net)


def test_c_one_unknown_key_is_an_error_and_not_a_warning(tmp_path: Path) -> None:
    tensors, net = kohya(MODULES[:1], [1.0]), model()
    tensors["lora_unet_blocks_0_attn_to_q.surprise"] = torch.ones(1)
    path = written(tmp_path, tensors)
    with pytest.raises(ValueError, match="surprise"):
        fastlora.load(net, path)
    assert not fastlora.adapters(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fastlora.load(net, path, strict=False)
    assert list(report.unused) == ["lora_unet_blocks_0_attn_to_q.surprise"]
    assert "surprise" in str(report)
    check(net, MODULES[0], delta(tensors, MODULES[0]))


def test_d_scales_of_zero_and_folds_leave_nothing_behind(tmp_path: Path) -> None:
    tensors, net = kohya(MODULES[:1], [2.0]), model()
    update = delta(tensors, MODULES[0])
    fastlora.load(net, written(tmp_path, tensors), name="a", scale=0.5)
    with fastlora.scaled(net, {"a": 0.0}):
        check(net, MODULES[0], update, 0.0)
    check(net, MODULES[0], update, 0.5)
    with fastlora.scaled(net, {"a": 0.7}):
        fastlora.fold(net)
        check(net, MODULES[0], update, 0.7)
        fastlora.unfold(net)
    check(net, MODULES[0], update, 0.5)


def test_e_after_a_swap_the_new_adapter_s_alpha_counts(tmp_path: Path) -> None:
    old, new = kohya(MODULES[:1], [4.0]), kohya(MODULES[:1], [16.0], seed=5)
    net = model()
    fastlora.reserve(net, rank=4, where=["to_q"])
    fastlora.load(net, written(tmp_path, old, "old"), name="a")
    check(net, MODULES[0], delta(old, MODULES[0]))
    fastlora.remove(net, "a")
    fastlora.load(net, written(tmp_path, new, "new"), name="a")
    fastlora.set_scale(net, {"a": 1.0})
    check(net, MODULES[0], delta(new, MODULES[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_f_unfolding_is_exact_after_any_number_of_cycles(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    net = model(dtype)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fastlora.load(net, written(tmp_path, kohya(MODULES, [4.0] * len(MODULES))), name="a")
    for _ in range(20):
        fastlora.fold(net)
        fastlora.unfold(net)
    fastlora.remove(net, "a")
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_g_convolutions_keep_dilation_padding_mode_and_groups(tmp_path: Path) -> None:
    generator, net = torch.Generator().manual_seed(6), model()
    down, up = (torch.randn(s, generator=generator) for s in ((2, 6, 3, 3), (4, 2, 1, 1)))
    grouped = torch.randn(4, 3, 3, 3, generator=generator)
    tensors = {
        "lora_unet_conv.lora_down.weight": down,
        "lora_unet_conv.lora_up.weight": up,
        "lora_unet_grouped.diff": grouped,
    }
    weights = {n: getattr(net, n).weight.detach().double() for n in ("conv", "grouped")}
    biases = {n: getattr(net, n).bias.detach().double() for n in ("conv", "grouped")}
    fastlora.load(net, written(tmp_path, tensors))
    x = torch.randn(2, 6, 7, 7, generator=generator)
    update = torch.einsum("or,rikl->oikl", up[..., 0, 0].double(), down.double())
    padded = F.pad(x.double(), (2, 2, 2, 2), mode="reflect")
    expected = {
        "conv": F.conv2d(padded, weights["conv"] + update, biases["conv"], dilation=2),
        "grouped": F.conv2d(
            x.double(),
            weights["grouped"] + grouped.double(),
            biases["grouped"],
            padding=1,
            groups=2,
        ),
    }
    for folded in (False, True):
        if folded:
            fastlora.fold(net)
        for name, values in expected.items():
            y = getattr(net, name)(x).double()
            torch.testing.assert_close(y, values, rtol=3e-5, atol=3e-5)


def test_h_samples_of_a_batch_have_strengths_of_their_own(tmp_path: Path) -> None:
    first, second = kohya(MODULES[:1], [4.0]), kohya(MODULES[:1], [2.0], seed=7)
    net = model()
    scales = {"a": torch.tensor([0.0, 1.0, -0.5]), "b": torch.tensor([0.25, 0.0, 2.0])}
    for name, tensors in (("a", first), ("b", second)):
        path = written(tmp_path, tensors, name)
        fastlora.load(net, path, name=name, scale=scales[name])
    one, x = layer(net, MODULES[0]), torch.randn(3, 5, 8)
    for i in range(3):
        weight = one.weight.double()
        for tensors, scale in zip((first, second), scales.values(), strict=True):
            weight = weight + scale[i].double() * delta(tensors, MODULES[0])
        expected = x[i].double() @ weight.T
        torch.testing.assert_close(one(x)[i].double(), expected, rtol=2e-5, atol=2e-5)


def test_i_a_swap_may_bring_other_modules_and_ranks(tmp_path: Path) -> None:
    net = model()
    first, second = kohya(MODULES[:4], [4.0] * 4), kohya(MODULES[2:9], [1.0] * 7, seed=8)
    fastlora.load(net, written(tmp_path, first, "first"), name="a")
    fastlora.remove(net, "a")
    fastlora.load(net, written(tmp_path, second, "second"), name="a")
    for module in MODULES:
        update = delta(second, module) if module in MODULES[2:9] else torch.zeros(8, 8).double()
        check(net, module, update)
