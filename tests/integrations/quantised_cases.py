"""Models whose linear layers keep their weight quantised: by libraries, where they are installed,
and by stand-ins that do it in the same ways."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and the float32 scale [out, 1] of every row."""
    scale = weight.detach().float().abs().amax(1, keepdim=True) / 127
    return (weight.detach().float() / scale).round().to(torch.int8), scale


class PackedLinear(nn.Linear):
    """An int8 weight in one column, whose shape tells nothing, and a forward of its own: the way of
    bitsandbytes and GGUF. Computes in the dtype of its input."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        values, scale = rounded(plain.weight)
        self.weight = nn.Parameter(values.view(-1, 1), requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("scale", scale)

    def dense(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features) * self.scale

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.dense().to(input.dtype), bias)


class Int8Weight(Tensor):
    """A tensor around others that knows few operators, none of them ours: the way of torchao, which
    leaves the layer an nn.Linear."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, dtype: Any, size: Any, stride: Any) -> Int8Weight:
        return cls(inner["codes"], inner["scale"], dtype)

    def dense(self) -> Tensor:
        return self.codes * self.scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight({list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            return F.linear(x, weight.dense().to(x.dtype), bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self, kwargs = args[0], kwargs or {}
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::detach", "aten::alias"):
            return cls(self.codes, self.scale, self.dtype)
        if name == "aten::clone":
            return cls(self.codes.clone(), self.scale.clone(), self.dtype)
        if name == "aten::_to_copy":
            return cls(self.codes.clone(), self.scale.clone(), kwargs.get("dtype") or self.dtype)
        if name == "aten::copy_":
            self.codes.copy_(args[1].codes)
            self.scale.copy_(args[1].scale)
            return self
        raise NotImplementedError(f"Int8Weight: {func}")


# --- how to quantise a model, and what a layer multiplies by then ---------------------------------


class Kind(NamedTuple):
    quantise: Callable[[nn.Sequential], None]
    dense: Callable[[Any], Tensor]


def replaced(model: nn.Sequential, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in list(model.named_children()):
        if type(layer) is nn.Linear:
            setattr(model, name, make(layer))


def wrap(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = Int8Weight(*rounded(layer.weight), layer.weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=False)


def torchao(config: str) -> Kind:
    quantisation = pytest.importorskip("torchao.quantization")
    return Kind(
        lambda model: quantisation.quantize_(model, getattr(quantisation, config)()),
        lambda layer: layer.weight.dequantize(),
    )


def bitsandbytes(kind: str, **settings: Any) -> Kind:
    library = pytest.importorskip("bitsandbytes")

    def make(plain: nn.Linear) -> nn.Module:
        made = getattr(library.nn, kind)
        layer = made(plain.in_features, plain.out_features, plain.bias is not None, **settings)
        layer.load_state_dict(plain.state_dict())
        return layer.to(plain.weight.dtype).to("cpu")  # which quantises

    def dense(layer: Any) -> Tensor:
        if kind == "Linear8bitLt":
            return layer.weight * layer.state.SCB[:, None] / 127
        return library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    return Kind(lambda model: replaced(model, make), dense)


def gguf() -> Kind:
    library = pytest.importorskip("gguf")
    diffusers = pytest.importorskip("diffusers.quantizers.gguf.utils")
    q8 = library.GGMLQuantizationType.Q8_0

    def make(plain: nn.Linear) -> nn.Module:
        dtype = plain.weight.dtype
        layer = diffusers.GGUFLinear(plain.in_features, plain.out_features, True, dtype)
        values = library.quants.quantize(plain.weight.detach().float().numpy(), q8)
        layer.weight = diffusers.GGUFParameter(torch.from_numpy(values), quant_type=q8)
        layer.bias = plain.bias
        return layer

    def dense(layer: Any) -> Tensor:
        return diffusers.dequantize_gguf_tensor(layer.weight).as_subclass(Tensor)

    return Kind(lambda model: replaced(model, make), dense)


KINDS: dict[str, Callable[[], Kind]] = {
    "packed": lambda: Kind(lambda model: replaced(model, PackedLinear), PackedLinear.dense),
    "wrapped": lambda: Kind(wrap, lambda layer: layer.weight.dense()),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
    "torchao intx": lambda: torchao("IntxWeightOnlyConfig"),
    "bitsandbytes int8": lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes nf4": lambda: bitsandbytes("LinearNF4"),
    "bitsandbytes nf4 stored as bf16": lambda: bitsandbytes(
        "LinearNF4", quant_storage=torch.bfloat16
    ),
    "bitsandbytes fp4": lambda: bitsandbytes("LinearFP4"),
    "bitsandbytes nf4 in bf16": lambda: bitsandbytes(
        "Linear4bit", quant_type="nf4", compute_dtype=torch.bfloat16
    ),
    "gguf": gguf,
}
LIBRARIES = ("torchao", "bitsandbytes", "gguf")
MISSING = tuple(name for name in LIBRARIES if find_spec(name) is None)


# --- models and what they compute -----------------------------------------------------------------

IN, HIDDEN, OUT = 128, 64, 128  # what blocks of 4 bits ask for


def plain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, OUT)).to(dtype)


def quantised(kind: Kind, dtype: torch.dtype = torch.float32) -> Any:
    model = plain(dtype)
    kind.quantise(model)
    return model.requires_grad_(False)


def low_rank(layer: Any, strengths: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """`Σ ((x Dᵀ) g) Uᵀ` in plain PyTorch in `dtype`, each strength [] or [batch, 1]."""
    total = torch.zeros((), dtype=dtype)
    for name, strength in strengths.items():
        slot = layer.fastlora[name]
        h = F.linear(x.to(dtype), slot.down.to(dtype)) * (strength * slot.ratio).to(dtype)
        total = total + F.linear(h, slot.up.to(dtype))
    return total
