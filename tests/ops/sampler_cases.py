"""Arguments of `sampler_step` for its tests, and how exact a result has to be."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.sampler_step import COLUMNS

SHAPES = [(1,), (0, 4), (3,), (2, 0, 5), (1, 1, 1), (3, 5), (2, 3, 5, 7), (3, 1030), (2, 4, 64, 65)]
LOW = [torch.float32, torch.float16, torch.bfloat16]
STEPS = 5
Arguments = dict[str, Any]


def name_of(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@dataclass
class Case:
    """Arguments of the operator, reproducible from what is said here."""

    shape: tuple[int, ...] = (3, 5, 7)
    n: int = 2
    x_dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype = torch.float32
    input_dtype: torch.dtype = torch.float32
    history: int = 2
    noise: str = "seeds"  # or "tensor", "none"
    rescale: int = 0  # for so many samples
    mask: tuple[int, ...] | None = None
    quantile: float = 0.0
    threshold_max: float = 1.5
    copies: int = 2
    weight_steps: int = STEPS
    weight_batch: bool = True
    clip: float = 1.0
    columns: dict[str, float] = field(default_factory=dict)

    def arguments(self) -> Arguments:
        g = torch.Generator().manual_seed(1)
        wide = torch.float64 if self.x_dtype == torch.float64 else torch.float32

        def normal(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.randn(shape, generator=g, dtype=wide).to(dtype)

        batch = self.shape[0]
        table = normal(STEPS, len(COLUMNS))
        for column, value in {"clip": self.clip, **self.columns}.items():
            table[:, COLUMNS.index(column)] = value
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g)
        masked = self.mask is not None
        return {
            "x": normal(*self.shape, dtype=self.x_dtype),
            "outputs": [normal(*self.shape, dtype=self.output_dtype) for _ in range(self.n)],
            "weights": normal(self.weight_steps, self.n, batch if self.weight_batch else 1),
            "table": table,
            "step": torch.tensor(3),
            "history": normal(self.history, *self.shape) if self.history else None,
            "seeds": seeds if self.noise == "seeds" or masked else None,
            "noise": normal(*self.shape) if self.noise == "tensor" else None,
            "rescale": torch.rand(self.rescale, generator=g, dtype=wide) if self.rescale else None,
            "mask": torch.rand(self.mask, generator=g, dtype=wide) if self.mask else None,
            "known": normal(*self.shape) if masked else None,
            "quantile": self.quantile,
            "threshold_max": self.threshold_max,
            "copies": self.copies,
            "input_dtype": self.input_dtype,
        }


def alone(arguments: Arguments, b: int) -> Arguments:
    """The same for sample b alone, with one model input."""
    one = slice(b, b + 1)

    def of(name: str, value: Any) -> Any:
        if name == "outputs":
            return [output[one] for output in value]
        if name == "history" and value is not None:
            return value[:, one]
        if name == "weights" and value.shape[2] > 1:
            return value[:, :, one]
        each = name in ("x", "seeds", "noise", "rescale", "mask", "known") and value is not None
        return value[one] if each and len(value) > 1 else value

    return {name: of(name, value) for name, value in arguments.items()} | {"copies": 1}


def mapped(function: Any, value: Any) -> Any:
    """`function` of every floating tensor."""
    if isinstance(value, dict):
        return {name: mapped(function, v) for name, v in value.items()}
    if isinstance(value, list):
        return [mapped(function, v) for v in value]
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return function(value) if floating else value


def widened(arguments: Arguments) -> Arguments:
    """The same in float64: what the reference makes of it is the oracle."""
    return mapped(Tensor.double, arguments) | {"input_dtype": torch.float64}


def magnitudes(arguments: Arguments) -> Arguments:
    """The same with every term positive: how large the sums are before their terms cancel."""
    positive = mapped(Tensor.abs, widened(arguments)) | {"rescale": None, "quantile": 0.0}
    if arguments["quantile"] > 0:
        positive["table"][:, COLUMNS.index("clip")] = 1.0
    if arguments["rescale"] is not None:
        positive["weights"] = positive["weights"] * rescaling(arguments).abs()
    return positive


def rescaling(arguments: Arguments) -> Tensor:
    """What the guided output of each sample [B] is multiplied by, from the formula."""
    double = widened(arguments)
    outputs, weights = double["outputs"], double["weights"]
    w = weights[arguments["step"] if len(weights) > 1 else 0]  # [n, B or 1]
    guided = sum(w_j[:, None] * e.flatten(1) for w_j, e in zip(w, outputs, strict=True))
    ratio = outputs[0].flatten(1).var(1).sqrt() / guided.var(1).sqrt()
    return double["rescale"] * ratio + 1 - double["rescale"]


def check(operator: Any, arguments: Arguments) -> Any:
    """Error at most twice that of PyTorch's evaluation, or of one rounding (a single element's own
    error may happen to be 0). Returns the results."""
    results = operator(**arguments)
    low, exact = operator.reference(**arguments), operator.reference(**widened(arguments))
    sizes = operator.reference(**magnitudes(arguments))
    for ours, theirs, right, size in zip(results, low, exact, sizes, strict=True):
        assert ours.shape == right.shape and ours.dtype == theirs.dtype
        if right.numel():
            error = (ours.double() - right).abs().max()
            rounding = torch.finfo(ours.dtype).eps / 2 * right.abs().max()
            rounding += torch.finfo(torch.float32).eps / 2 * size.abs().max()
            assert error <= 2 * max((theirs.double() - right).abs().max(), rounding)
    return results


def same_bits(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
