"""Gradients of adapters against dense float64 weights and finite differences; autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from tests.adapters.nets import Net
from tests.adapters.oracles import (
    adapted_weight,
    assert_twofold,
    lora_delta,
    plain_low_rank,
    randomise,
    with_weight,
)

LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda d: nn.Linear(14, 9, dtype=d), lambda d: torch.randn(3, 5, 14, dtype=d)),
    "linear_1d": (lambda d: nn.Linear(14, 9, dtype=d), lambda d: torch.randn(14, dtype=d)),
    "conv": (
        lambda d: nn.Conv2d(6, 8, 3, padding=1, stride=2, dtype=d),
        lambda d: torch.randn(3, 6, 7, 8, dtype=d),
    ),
    "conv_groups": (
        lambda d: nn.Conv2d(6, 8, 3, groups=2, padding=1, padding_mode="circular", dtype=d),
        lambda d: torch.randn(3, 6, 7, 8, dtype=d),
    ),
    "conv_single": (lambda d: nn.Conv2d(6, 8, 3, dtype=d), lambda d: torch.randn(6, 5, 5, dtype=d)),
    "embedding": (
        lambda d: nn.Embedding(13, 6, dtype=d),
        lambda d: torch.tensor([[1, 12], [0, 5], [1, 1]]),
    ),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@layers
@pytest.mark.parametrize("adapters", [1, 3])
def test_gradients_of_the_dense_weight(layer: Any, adapters: int) -> None:
    """dL/dΔ of the plain layer on W + Δ, carried on to U and D by hand."""
    base, x = layer[0](torch.float64), layer[1](torch.float64)
    plain = copy.deepcopy(base)
    names = "abc"[:adapters]
    for name in names:
        fastlora.inject(base, fastlora.LoRA(rank=4, alpha=2), name=name)
    randomise(base)
    fastlora.set_scale(base, dict(zip(names, (0.5, -2.0, 0.25), strict=False)))
    slots = {n: (base.fastlora[n], s / 2) for n, s in zip(names, (0.5, -2.0, 0.25), strict=False)}
    x = x.requires_grad_() if x.is_floating_point() else x
    probe = torch.randn_like(base(x))
    own = fastlora.parameters(base)
    got = torch.autograd.grad((base(x) * probe).sum(), own + ([x] if x.requires_grad else []))

    weight = adapted_weight(plain, list(slots.values())).requires_grad_()
    y = torch.func.functional_call(plain, {"weight": weight}, (x,))
    wanted = [weight, *([x] if x.requires_grad else [])]
    d_weight, *d_x = torch.autograd.grad((y * probe).sum(), wanted)
    expected = []
    for slot, strength in slots.values():
        down, up = slot.down.detach(), slot.up.detach()
        if isinstance(plain, nn.Embedding):
            expected += [strength * up.t() @ d_weight.t(), strength * d_weight.t() @ down.t()]
            continue
        groups = getattr(plain, "groups", 1)
        parts = zip(
            *(t.flatten(1).chunk(groups) for t in (down, up, d_weight)),
            strict=True,
        )
        pairs = [(strength * u.t() @ dw, strength * dw @ d.t()) for d, u, dw in parts]
        expected += [
            torch.cat([p[0] for p in pairs]).view_as(down),
            torch.cat([p[1] for p in pairs]).view_as(up),
        ]
    for a, b in zip(got, expected + d_x, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@layers
@pytest.mark.parametrize("rows", [False, True], ids=["number", "rows"])
def test_gradients_against_finite_differences(layer: Any, rows: bool) -> None:
    base, x = layer[0](torch.float64), layer[1](torch.float64)
    if rows and (x.dim() in (1,) or len(x) != 3):
        x = x[None]
    if rows and x.dim() == 2 and x.is_floating_point():
        x = x.expand(3, 14).contiguous()
    if rows and isinstance(base, nn.Conv2d) and len(x) == 1:
        x = x.expand(3, -1, -1, -1).contiguous()
    fastlora.inject(base, fastlora.LoRA(rank=2), name="a")
    randomise(base)
    fastlora.set_scale(base, {"a": torch.tensor([0.5, -1.0, 2.0]) if rows else 0.7})
    slot = base.fastlora["a"]
    probe = torch.randn_like(base(x))
    got = torch.autograd.grad((base(x) * probe).sum(), [slot.down, slot.up])
    for p, grad in zip((slot.down, slot.up), got, strict=True):
        direction = torch.randn_like(p)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p.add_(direction, alpha=step)
                values.append((base(x) * probe).sum())
                p.sub_(direction, alpha=step)
        difference = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((grad * direction).sum(), difference, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_base_when_it_is_not_frozen() -> None:
    for bias in (True, False):
        base = nn.Linear(6, 4, bias=bias, dtype=torch.float64)
        plain = copy.deepcopy(base)
        fastlora.inject(base, fastlora.LoRA(rank=2), name="a", freeze=False)
        randomise(base)
        for shape in [(6,), (3, 6), (2, 3, 6)]:
            x, probe = torch.randn(shape).double(), torch.randn(*shape[:-1], 4).double()
            own = [p for k, p in base.named_parameters() if "fastlora" not in k]
            got = torch.autograd.grad((base(x) * probe).sum(), own)
            expected = torch.autograd.grad((plain(x) * probe).sum(), list(plain.parameters()))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_twice_differentiable() -> None:
    base = nn.Linear(5, 4, dtype=torch.float64)
    fastlora.inject(base, fastlora.LoRA(rank=2), name="a")
    randomise(base)
    slot, x = base.fastlora["a"], torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(base(x).square().sum(), x, create_graph=True)
    got = torch.autograd.grad(dx.square().sum(), slot.up)[0]
    up = slot.up.detach().clone().requires_grad_()
    y = x @ (base.weight + up @ slot.down.detach()).t() + base.bias
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(dx.square().sum(), up)[0])


def test_twice_differentiable_in_a_learned_strength() -> None:
    base = nn.Linear(5, 4, dtype=torch.float64)
    fastlora.inject(base, fastlora.LoRA(rank=2), name="a")
    randomise(base)
    slot, x = base.fastlora["a"], torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for own in (True, False):
        scale = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        fastlora.set_scale(base, {"a": scale})
        h = x @ slot.down.t() * scale[:, None]
        y = base(x) if own else x @ base.weight.t() + h @ slot.up.t() + base.bias
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), scale)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["lora", "dora", "spectral", "dropout", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_lowers_the_loss_and_leaves_the_base(kind: str, dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    specs: dict[str, Any] = {
        "lora": fastlora.LoRA(rank=4),
        "dora": fastlora.LoRA(rank=4, dora=True),
        "spectral": fastlora.Spectral(),
        "dropout": fastlora.LoRA(rank=4, dropout=0.1),
    }
    for name, spec in specs.items():
        if kind in (name, "all"):
            fastlora.inject(model, spec, name=name, seed=0)
    tokens, target = torch.randint(0, 12, (8, 4)), torch.randn(8, 16, 6)
    own = fastlora.parameters(model)
    assert {p for p in model.parameters() if p.requires_grad} == set(own)
    optimiser = torch.optim.AdamW(own, lr=3e-2 if kind == "spectral" else 1e-2)
    losses = []
    for _ in range(20):
        loss = (model(tokens).float() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.93 * losses[0]
    for key, value in base.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_gradient_checkpointing_and_accumulation() -> None:
    model = Net()
    fastlora.inject(model, fastlora.LoRA(rank=4, dora=True))
    randomise(model, size=0.3)
    x = torch.randint(0, 12, (6, 4))
    own = fastlora.parameters(model)
    whole = torch.autograd.grad(model(x).square().sum(), own)
    parts = [torch.autograd.grad(model(x[i : i + 2]).square().sum(), own) for i in (0, 2, 4)]
    saved = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), own)
    for a, *bs, c in zip(whole, *parts, saved, strict=True):
        torch.testing.assert_close(a, sum(bs), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a, c)


def test_scale_zero_gives_no_gradient_to_the_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fastlora.inject(model, fastlora.LoRA(rank=2), name="a")
    fastlora.set_scale(model, 0.0)
    x = torch.randn(2, 4, requires_grad=True)
    model(x).sum().backward()
    assert all(p.grad is None for p in fastlora.parameters(model)) and x.grad is not None


# --- autocast ---------------------------------------------------------------------------------


SPECS = {
    "lora": [fastlora.LoRA(rank=4)],
    "two": [fastlora.LoRA(rank=4), fastlora.LoRA(rank=2)],
    "dora": [fastlora.LoRA(rank=4, dora=True)],
    "dora_lora": [fastlora.LoRA(rank=4, dora=True), fastlora.LoRA(rank=2)],
    "spectral": [fastlora.Spectral()],
    "dropout": [fastlora.LoRA(rank=4, dropout=0.5)],
}


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("layer", ["linear", "conv", "conv_groups", "embedding"])
def test_autocast_gives_the_bases_dtype_and_bfloat16_accuracy(layer: str, specs: list[Any]) -> None:
    make, data = LAYERS[layer]
    base, x = make(torch.float32), data(torch.float32)
    plain = copy.deepcopy(base)
    for i, spec in enumerate(specs):
        fastlora.inject(base, spec, name="abc"[i])
    randomise(base)
    base.eval()
    exact = copy.deepcopy(base).double()(x.double() if x.is_floating_point() else x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x).dtype
        assert expected == (torch.float32 if layer == "embedding" else torch.bfloat16)
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                y = base(x)
            assert y.dtype == expected
            error = (y.double() - exact).abs().max()
            assert error <= 4 * 2**-8 * exact.abs().max()
        if specs[0] == SPECS["dropout"][0]:
            assert base.train()(x).dtype == expected
            base.eval()
        base(x).float().square().sum().backward()
    for p in fastlora.parameters(base):
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all()
    # what was computed about weights under autocast is not kept in its precision
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(base(x).double(), exact, rtol=2e-5, atol=2e-5)


def test_autocast_with_rows_and_on_16_bit_bases() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=2)])
    fastlora.inject(model, fastlora.LoRA(rank=4), name="a")
    randomise(model)
    fastlora.set_scale(model, torch.tensor([0.5, -1.0]))
    inputs = [torch.randn(2, 8), torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model.to(dtype)
        for layer, x in zip(model, inputs, strict=True):
            exact = copy.deepcopy(layer).double()(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                for x_dtype in (dtype, torch.float32):
                    y = layer(x.to(x_dtype))
                    assert y.dtype == torch.bfloat16
                    assert (y.double() - exact).abs().max() <= 2**-5 * exact.abs().max()


def test_autocast_trains() -> None:
    model = Net()
    fastlora.inject(model, fastlora.LoRA(rank=4, dora=True), name="a", seed=0)
    fastlora.inject(model, fastlora.Spectral(), name="s")
    tokens, target = torch.randint(0, 12, (8, 4)), torch.randn(8, 16, 6)
    optimiser = torch.optim.AdamW(fastlora.parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(tokens).float() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.93 * losses[0]


def test_low_precision_gradients_follow_the_twofold_rule() -> None:
    base = nn.Linear(64, 48, dtype=torch.bfloat16)
    plain = copy.deepcopy(base)
    fastlora.inject(base, fastlora.LoRA(rank=8), name="a")
    randomise(base)
    slot, x = base.fastlora["a"], torch.randn(40, 64, dtype=torch.bfloat16)
    probe = torch.randn(40, 48, dtype=torch.bfloat16)

    def plain_forward(down: Tensor, up: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x.to(down.dtype), down)
        return torch.nn.functional.linear(y, up)

    got = torch.autograd.grad((base(x) * probe).sum(), [slot.down, slot.up])
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [p.detach().to(dtype).requires_grad_() for p in (slot.down, slot.up)]
        results.append(
            torch.autograd.grad((plain_forward(*leaves) * probe.to(dtype)).sum(), leaves)
        )
    for a, exact, low in zip(got, *results, strict=True):
        assert a.dtype == torch.float32
        error = (a.double() - exact).abs().max()
        assert error <= 2 * (low.double() - exact).abs().max()
    slots = [(slot, 1.0)]
    exact = with_weight(plain, plain.weight.detach().double() + lora_delta(plain, slot, 1.0), x)
    assert_twofold(base(x), exact, plain_low_rank(plain, slots, x))
