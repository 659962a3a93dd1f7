"""The sampling loop: one model call and one `sampler_step` a step, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import ops
from fastlora.samplers.arguments import describe
from fastlora.samplers.noise import as_seeds
from fastlora.samplers.table import Table

Model = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Step:
    """`x` [B, ...] after step `index` of 0..S-1, at which the model saw `timestep`."""

    index: int
    timestep: int
    x: Tensor


def sample(
    model: Model,
    table: Table,
    x: Tensor,
    cond: Any = None,
    uncond: Any = None,
    guidance_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    progress: bool = True,
    start: Mapping[str, float] | None = None,
) -> Tensor:
    """Samples [B, ...] from noise `x` [B, ...] by a solver's table; `sample_steps` has every step.

    `model(x, t, cond) -> prediction`, of x's shape, is all that is asked of a model; t is int64
    [batch]. It is called without gradients. Where it is an nn.Module, x reaches it in the dtype of
    its first parameter, otherwise in the dtype of the x given here; between steps x is float32
    (float64 if it came so, or if that parameter is float64), and so is the result.

    With `uncond` (classifier-free guidance) the model is called once on twice the batch, all of
    `cond`, then all of `uncond`: tensors [B, ...], or tuples, lists and dicts of them. Then the
    prediction is `e_u + g (e_c - e_u)`, g = `guidance_scale`, a number or a tensor [B]. Per-sample
    strengths of adapters inside `model` follow the doubling; for a function around a module use
    `tiled` in it (`from fastlora.adapters import tiled`).

    `start`: timesteps by adapter name. Such an adapter is off at steps whose timestep is above its,
    so that a slider leaves the layout alone (Concept Sliders, Gandikota et al. 2023, arXiv
    2311.12092); afterwards strengths and switches are what they were. A model that was folded
    before is folded again at such a step where the cost model says that this takes less time than
    the adapters in the steps that follow, and runs unmerged else; it is folded at the end.

    `seeds`, one int per sample, decide the noise of a stochastic table; None draws them from
    torch's generator. A sample does not depend on the rest of its batch. Raises TypeError for a
    model that cannot be called, a table that is no Table and seeds that are no sequence, ValueError
    for all else that does not fit together; AdapterError for a `start` that the model does not fit.
    """
    copies, arguments = _checked(model, table, x, cond, uncond, guidance_scale, seeds)
    # Once: nobody looks at the model between steps.
    phases = _phases(model, start, table.timesteps.tolist())
    with _steady(model), _tiled(model, copies), phases as switch:

        def around(timestep: int) -> AbstractContextManager[Any]:
            switch(timestep)
            return nullcontext()

        steps: Any = _steps(model, table, *arguments, around=around)
        if progress:
            from tqdm import tqdm

            steps = tqdm(steps, total=len(table), desc="sampling", unit="step")
        for step in steps:
            x = step.x
    return x


def sample_steps(
    model: Model,
    table: Table,
    x: Tensor,
    cond: Any = None,
    uncond: Any = None,
    guidance_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    start: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """`sample` as an iterator: the model runs only as far as one looks, and is as it was between
    steps. Raises at once what `sample` raises before its first step."""
    copies, arguments = _checked(model, table, x, cond, uncond, guidance_scale, seeds)
    with _phases(model, start, []):
        pass  # what does not fit is said now

    @contextmanager
    def around(timestep: int) -> Iterator[None]:
        with _tiled(model, copies), _phases(model, start, [timestep]) as switch:
            switch(timestep)
            yield

    return _steps(model, table, *arguments, around=around)


sample.steps = sample_steps  # type: ignore[attr-defined]


def _checked(
    model: Model,
    table: Table,
    x: Tensor,
    cond: Any,
    uncond: Any,
    guidance_scale: float | Tensor,
    seeds: Sequence[int] | Tensor | None,
) -> tuple[int, tuple[Any, ...]]:
    """Copies of the batch that a model call sees, and what `_steps` takes from x on."""
    if not callable(model):
        raise TypeError(f"sample: model: expected a module or a function, got {describe(model)}")
    if not isinstance(table, Table):
        raise TypeError(
            f"sample: table: expected a Table, as ddim(...) makes, got {describe(table)}"
        )
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"sample: x: expected a floating-point tensor [B, ...], got {describe(x)}")
    batch = x.shape[0]
    input_dtype = x.dtype
    if isinstance(model, nn.Module):
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        input_dtype = next(floating, x.dtype)
    x = x.double() if torch.float64 in (x.dtype, input_dtype) else x.float()
    weights = _guidance(guidance_scale, uncond is not None, batch).to(x.device, x.dtype)
    if uncond is not None:
        cond = _concatenated(cond, uncond, batch, "")
    if seeds is not None or table.stochastic:
        seeds = as_seeds(seeds, batch, x.device, "sample")
    return weights.shape[1], (x, cond, weights, seeds, input_dtype)


@torch.no_grad()
def _steps(
    model: Model,
    table: Table,
    x: Tensor,  # [B, ...]
    cond: Any,  # for copies * B samples
    weights: Tensor,  # [1, copies, B or 1]
    seeds: Tensor | None,  # [B]
    input_dtype: torch.dtype,
    *,
    around: Callable[[int], AbstractContextManager[Any]],  # each call of the model, by timestep
) -> Iterator[Step]:
    copies, steps = weights.shape[1], len(table)
    coefficients = table.coefficients.to(x.device, x.dtype)
    rows = torch.arange(steps, device=x.device).unbind()
    times = table.timesteps.to(x.device)[:, None].repeat(1, copies * x.shape[0]).unbind()
    history = x.new_zeros(table.histories, *x.shape) if table.histories else None
    quantile, threshold_max = table.threshold or (0.0, 1.0)
    x = x * table.init_noise_sigma
    model_input = (x * table.input_scale).to(input_dtype).repeat(copies, *[1] * (x.dim() - 1))
    for index, timestep in enumerate(table.timesteps.tolist()):
        with around(timestep):
            prediction = model(model_input, times[index], cond)
        if not isinstance(prediction, Tensor) or prediction.shape != model_input.shape:
            raise ValueError(
                f"sample: model: expected a prediction {list(model_input.shape)}, got"
                f" {describe(prediction)}"
            )
        x, history_next, model_input = ops.sampler_step(
            x,
            [prediction],  # all of cond, then all of uncond
            weights,
            coefficients,
            rows[index],
            history,
            seeds,
            quantile=quantile,
            threshold_max=threshold_max,
            copies=copies,
            input_dtype=input_dtype,
        )
        history = None if history is None else history_next
        yield Step(index, timestep, x)


def _tiled(model: Model, copies: int) -> AbstractContextManager[Any]:
    """Per-sample strengths of the model's adapters, repeated as the batch is."""
    if copies == 1 or not isinstance(model, nn.Module):
        return nullcontext()
    from fastlora.adapters import tiled  # a sibling: samplers do not need adapters until here

    return tiled(model, copies)


def _steady(model: Model) -> AbstractContextManager[Any]:
    if not isinstance(model, nn.Module):
        return nullcontext()
    from fastlora.adapters import steady

    return steady(model)


def _phases(
    model: Model, start: Mapping[str, float] | None, timesteps: Sequence[int]
) -> AbstractContextManager[Callable[[int], None]]:
    """A function that switches the adapters in `start` for a timestep."""
    if start is None:
        return nullcontext(lambda timestep: None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"sample: start: expected a module with adapters as the model, got {describe(model)}"
        )
    from fastlora.adapters import phases

    return phases(model, start, timesteps)


def _guidance(scale: float | Tensor, guided: bool, batch: int) -> Tensor:
    """Weights [1, n, B or 1] of the model's outputs: (g, 1 - g), or 1 for a single one."""
    try:
        g = torch.as_tensor(scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):  # torch's own, which do not name the argument
        raise ValueError(
            f"sample: guidance_scale: expected a number or a tensor [{batch}], got"
            f" {describe(scale)}"
        ) from None
    if not guided:
        if g.numel() != 1 or g.item() != 1:
            raise ValueError(
                f"sample: guidance_scale: expected 1.0 where uncond is not given, got {scale}"
                " (guidance needs the unconditional prediction: pass uncond)"
            )
        return torch.ones(1, 1, 1)
    if g.dim() > 1 or g.numel() not in (1, batch):
        raise ValueError(
            f"sample: guidance_scale: expected a number or a tensor [{batch}], got {list(g.shape)}"
        )
    g = g.reshape(-1)
    return torch.stack((g, 1 - g))[None]


def _concatenated(cond: Any, uncond: Any, batch: int, where: str) -> Any:
    """cond above uncond along the batch, in every tensor of the two equal structures."""
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if cond.shape != uncond.shape or cond.dim() < 1 or cond.shape[0] != batch:
            raise ValueError(
                f"sample: uncond{where}: expected the shape of cond, [{batch}, ...], got"
                f" {list(uncond.shape)} beside {list(cond.shape)}"
            )
        return torch.cat((cond, uncond))
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping) and cond.keys() == uncond.keys():
        return {k: _concatenated(cond[k], uncond[k], batch, f"{where}[{k!r}]") for k in cond}
    if (
        isinstance(cond, (tuple, list))
        and isinstance(uncond, (tuple, list))
        and len(cond) == len(uncond)
    ):
        pairs = enumerate(zip(cond, uncond, strict=True))
        return tuple(_concatenated(c, u, batch, f"{where}[{i}]") for i, (c, u) in pairs)
    if cond is None and uncond is None:  # an optional part that neither uses
        return None
    raise ValueError(
        f"sample: uncond{where}: expected tensors in the same tuples and dicts as cond, got"
        f" {describe(uncond)} beside {describe(cond)}"
    )
