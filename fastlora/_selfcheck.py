"""Every operator against its reference, on small made-up data: for `fastlora doctor`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import Operator, emulated, operators

DRAWS = 20  # of random data: the largest error of a few numbers alone says little


@dataclass(frozen=True)
class Check:
    """The worst error of one operator's outputs, or what went wrong instead."""

    operator: str
    device: str
    dtype: str
    error: float  # max |compiled - reference in float64|
    allowed: float  # four times the error of the reference in `dtype`
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.error <= self.allowed


def self_check(device: str, dtype: torch.dtype = torch.float32) -> list[Check]:
    """Runs all operators; what fails is reported, not raised. The device "emulated" means CUDA's
    kernels on the CPU."""
    if device != "emulated":
        return [check(name, operator, device, dtype) for name, operator in operators.items()]
    with emulated():
        found = [check(name, operator, "cpu", dtype) for name, operator in operators.items()]
    return [replace(one, device=device) for one in found]


@torch.no_grad()
def check(name: str, operator: Operator, device: str, dtype: torch.dtype) -> Check:
    short = str(dtype).removeprefix("torch.")
    if name not in EXAMPLES:
        return Check(
            name, device, short, float("inf"), 0.0, "fastlora/_selfcheck.py has no example"
        )
    generator = torch.Generator().manual_seed(0)

    def data(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def control(*shape: int) -> Tensor:  # gates, weights, tables: float32 beside low precision
        return torch.rand(shape, generator=generator).to(device)

    error = plain_error = largest = 0.0
    try:
        for _ in range(DRAWS):
            arguments = EXAMPLES[name](data, control, device)
            exact = outputs(operator, operator.reference, widened(arguments))
            error = max(error, worst(outputs(operator, operator, arguments), exact))
            plain = outputs(operator, operator.reference, arguments)
            plain_error = max(plain_error, worst(plain, exact))
            largest = max(largest, *(e.abs().max().item() for e in exact))
    except Exception as failure:  # a report of what is broken must not break
        problem = f"{type(failure).__name__}: {failure}"
        return Check(name, device, short, float("inf"), 0.0, problem)
    # Twice as much as in the tests: here a few unlucky roundings must not raise an alarm.
    allowed = 2 * max(2 * plain_error, largest * torch.finfo(dtype).eps)
    return Check(name, device, short, error, allowed)


def outputs(
    operator: Operator, run: Callable[..., Any], arguments: tuple[Any, ...]
) -> list[Tensor]:
    """What `run` returns or, for an operator that works in place, what it wrote."""
    arguments = mapped(Tensor.clone, arguments)
    result = run(*arguments)
    schema = operator.overload._schema.arguments  # type: ignore[attr-defined]
    written = [
        a
        for a, s in zip(arguments, schema, strict=False)
        if s.alias_info is not None and s.alias_info.is_write
    ]
    return [t for t in flat(written or result) if t.numel()]


def widened(value: Any) -> Any:
    return mapped(lambda t: t.double() if t.is_floating_point() else t, value)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(function, v) for v in value)
    return value


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


def worst(results: list[Tensor], exact: list[Tensor]) -> float:
    differences = [
        (a.double() - b.double()).abs().max().item() for a, b in zip(results, exact, strict=True)
    ]
    return max(d if d == d else float("inf") for d in differences)  # NaN is infinitely wrong


# The arguments of one call: data(...) has the dtype under test, control(...) is float32.
EXAMPLES: dict[str, Callable[[Any, Any, str], tuple[Any, ...]]] = {
    "lora_linear": lambda data, control, device: (
        data(2, 5, 19),
        data(23, 19),
        data(23),
        data(4, 19),
        data(23, 4),
        control(2, 4),
        None,
    ),
    "lora_add_": lambda data, control, device: (
        data(2, 5, 23),
        data(2, 5, 19),
        data(4, 19),
        data(23, 4),
        control(2, 4),
    ),
    "fold": lambda data, control, device: (
        [data(23, 19), data(7, 5)],
        [data(4, 19), data(2, 5)],
        [data(23, 4), data(7, 2)],
        [control(4), control(2)],
        [data(23, 19), data(7, 5)],
    ),
    "spectral_weight": lambda data, control, device: (
        data(23, 19),
        data(23, 19),
        data(19).abs(),
        data(19, 19),
        data(19),
        control(),
    ),
    "spectral_linear": lambda data, control, device: (
        data(2, 5, 19),
        data(23, 19),
        data(23),
        data(23, 19),
        data(19).abs(),
        data(19, 19),
        data(19),
        control(),
    ),
    "spectral_weights": lambda data, control, device: (
        [data(23, 19), data(7, 5)],
        [data(23, 19), data(7, 5)],
        [data(19).abs(), data(5).abs()],
        [data(19, 19), data(5, 5)],
        [data(19), data(5)],
        [control(), control()],
        [data(23, 19), data(7, 5)],
    ),
    "spectral_dots": lambda data, control, device: (
        [data(23, 19), data(7, 5)],
        [data(23, 19), data(7, 5)],
        [data(19, 19), data(5, 5)],
    ),
    "sampler_step": lambda data, control, device: (
        data(2, 3, 5),
        [data(2, 3, 5), data(2, 3, 5)],
        control(1, 2, 2),
        control(4, 22),
        torch.tensor(2, device=device),
        control(2, 2, 3, 5),
        torch.tensor([3, -4], device=device),
        None,
        control(2),
        control(1, 1, 5),
        control(2, 3, 5),
        0.9,
        1.5,
        2,
        torch.float32,
    ),
    "add_noise": lambda data, control, device: (
        data(2, 3, 5),
        None,
        torch.tensor([3, -4], device=device),
        torch.tensor([7, 2], device=device),
        control(10, 4),
    ),
}
