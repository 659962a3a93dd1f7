"""`sampler_step`: guidance, one row of a solver's table and the next model input in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import _philox
from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype
from fastlora.ops._device import device_type, kernels_of

COLUMNS = (
    *("k_x", "k_e"),  # x̂0 from x and ê
    *("c_x", "c_0", "c_e", "c_h", "c_r", "c_n"),  # x'
    *("g_x", "g_0", "g_e", "g_h", "g_r"),  # h'
    *("r_x", "r_0", "r_e", "r_h", "r_r"),  # r'
    *("p_0", "p_e"),  # where x' stands between data and noise: what is known goes there
    *("m", "clip"),  # the model sees m x'; x̂0 is within ±clip
)
MAX_OUTPUTS = 16  # kMaxOutputs of csrc/sampler_step.h
MAX_HISTORY = 2


def sampler_step(
    x: Tensor,  # [B, ...]
    outputs: list[Tensor],  # n of [B, ...], or one of [n * B, ...]
    weights: Tensor,  # [S or 1, n, B or 1]
    table: Tensor,  # [S, 22], columns in the order of COLUMNS
    step: Tensor,  # [] int64, the row of the table, read where x is
    history: Tensor | None = None,  # [1 or 2, B, ...]: h, or h and r
    seeds: Tensor | None = None,  # [B] int64
    noise: Tensor | None = None,  # [B, ...], instead of seeds
    rescale: Tensor | None = None,  # [B or 1]
    mask: Tensor | None = None,  # [B or 1, ...], 1 in its second dimension for all channels
    known: Tensor | None = None,  # [B, ...], beside mask
    quantile: float = 0.0,
    threshold_max: float = 1.0,
    copies: int = 1,
    input_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, ...], as history or [0], [copies * B, ...]
    """`x' = c_x x + c_0 x̂0 + c_e ê + c_h h + c_r r + c_n z`, histories likewise, input `m x'`.

    - `ê = Σ_j w_j e_j` is the guided output (one tensor may hold all e_j, one batch after the
      other). `rescale` φ makes it `ê (φ std(e_0)/std(ê) + 1 - φ)`, unbiased standard deviations
      over all of a sample (Lin et al., 2023, section 3.4; e_0 is the conditional output).
    - `x̂0 = clip(k_x x + k_e ê)` to ±clip. With `quantile` > 0 clip to ±s and divide by s instead:
      s is that quantile of |k_x x + k_e ê| over the sample, interpolated between its neighbours,
      within [1, threshold_max] (dynamic thresholding, Saharia et al., 2022, section 2.3).
    - `h' = g_x x + g_0 x̂0 + g_e ê + g_h h + g_r r`, and r' by the columns r_; r is 0 and r' is not
      kept where the history has one part, and both where there is none.
    - z is standard normal, a function of (seed, step, element) alone (see `_philox.py`), or
      `noise`, or 0.
    - With `mask` (1: as above, 0: known, between: a mixture) x' becomes
      `mask x' + (1 - mask)(p_0 known + p_e z0)`, z0 the start noise of the seeds, `noise(seeds)`.

    All arithmetic is float32, float64 where x is. x' has x's dtype, any floating one; history,
    noise, known, mask and rescale are float32 (float64); weights and table that or float32; the
    outputs and `input_dtype` any of 32 and 16 bits, and float64 where x is. The model input holds
    `copies` times the batch, tiled. A column of 0 may leave out what it would multiply, so that NaN
    and infinities do not show there; elsewhere they do, and one NaN makes a threshold or a standard
    deviation, so all of a sample, NaN. A sample has the same bits in any batch. Differentiable in
    every floating argument, twice, by way of this reference.

    Raises ContractError (a ValueError) naming argument, expected, got; a step outside 0..S-1 raises
    on the CPU and gives NaN on CUDA.
    """
    wide = gate_dtype(x.dtype)
    column = dict(zip(COLUMNS, _row(table, step, wide), strict=True))
    n, batch = weights.shape[1], x.shape[0]
    ones = [1] * (x.dim() - 1)
    each = outputs if len(outputs) == n else outputs[0].reshape(n, *x.shape).unbind()
    row = step if weights.shape[0] > 1 else torch.zeros_like(step)
    w = _row(weights, row, wide).view(n, -1, *ones)
    xw, e = x.to(wide), w[0] * each[0].to(wide)
    for w_j, e_j in zip(w[1:], each[1:], strict=True):
        e = e + w_j * e_j.to(wide)
    if rescale is not None:
        phi = rescale.view(-1, *ones)
        ratio = _deviation(each[0].to(wide)) / _deviation(e)
        e = e * (phi * ratio.view(batch, *ones) + (1 - phi))
    x0 = column["k_x"] * xw + column["k_e"] * e
    if quantile > 0:
        s = _quantile(x0.abs(), quantile).clamp(1, threshold_max).view(batch, *ones)
        x0 = torch.minimum(torch.maximum(x0, -s), s) / s
    else:
        x0 = x0.clamp(-column["clip"], column["clip"])
    past = () if history is None else history.unbind()

    def combined(target: str) -> Tensor:
        result = column[f"{target}_x"] * xw + column[f"{target}_0"] * x0 + column[f"{target}_e"] * e
        for letter, part in zip("hr", past, strict=False):
            result = result + column[f"{target}_{letter}"] * part
        return result

    x_next = combined("c")
    if noise is not None:
        x_next = x_next + column["c_n"] * noise
    elif seeds is not None:
        z = _philox.normal(seeds, step, x.shape[1:].numel(), wide)
        x_next = x_next + column["c_n"] * z.view(x.shape)
    if mask is not None and known is not None and seeds is not None:
        z = _philox.normal(seeds, _philox.START, x.shape[1:].numel(), wide).view(x.shape)
        x_next = mask * x_next + (1 - mask) * (column["p_0"] * known + column["p_e"] * z)
    history_next = (
        torch.stack([combined(t) for t in "gr"[: len(past)]]) if past else xw.new_empty(0)
    )
    model_input = (column["m"] * x_next).to(input_dtype)
    return x_next.to(x.dtype), history_next, model_input.repeat(copies, *ones)


def _row(table: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    return table.index_select(0, step.view(1))[0].to(dtype)


def _deviation(e: Tensor) -> Tensor:
    """Unbiased standard deviation [B] over all of a sample."""
    return e.flatten(1).std(1) if e.dim() > 1 else torch.full_like(e, torch.nan)


def _quantile(values: Tensor, quantile: float) -> Tensor:
    """[B], of all of a sample, linear between the two nearest. NaN where there is one."""
    if not values.numel():
        return values.new_ones(len(values))
    values = values.reshape(len(values), -1)
    at = quantile * (values.shape[1] - 1)
    ordered = values.sort(1).values
    low, high = ordered[:, int(at)], ordered[:, min(int(at) + 1, values.shape[1] - 1)]
    nan = values.isnan().any(1)
    return torch.where(nan, torch.nan, low + (at - int(at)) * (high - low))


def _fake(
    x: Tensor,
    outputs: list[Tensor],
    weights: Tensor,
    table: Tensor,
    step: Tensor,
    history: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    rescale: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    quantile: float = 0.0,
    threshold_max: float = 1.0,
    copies: int = 1,
    input_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "sampler_step"
    for name, value in (("x", x), ("weights", weights), ("table", table), ("step", step)):
        expect_tensor(op, name, value)
    optional = {"history": history, "seeds": seeds, "noise": noise, "rescale": rescale}
    optional |= {"mask": mask, "known": known}
    for name, value in optional.items():
        expect_tensor(op, name, value, optional=True)
    floats = FLOATS if x.dtype == torch.float64 else FLOATS[:3]
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in floats)
    expect(x.dtype in FLOATS, op, "x", "a floating dtype", x)
    expect(x.dim() >= 1, op, "x", "at least one dimension [B, ...]", x)
    wide, batch, shape = gate_dtype(x.dtype), x.shape[0], list(x.shape)
    wide_name = str(wide).removeprefix("torch.")
    rows = table.dim() == 2 and table.shape[0] >= 1 and table.shape[1] == len(COLUMNS)
    expect(rows, op, "table", f"[S, {len(COLUMNS)}] with S >= 1", table)
    expect(table.dtype in (torch.float32, wide), op, "table", f"float32 or {wide_name}", table)
    steps = table.shape[0]
    right = weights.dim() == 3 and weights.shape[0] in (1, steps) and weights.shape[2] in (1, batch)
    right = right and 1 <= weights.shape[1] <= MAX_OUTPUTS
    expected = f"[{steps} or 1, n, {batch} or 1] with n from 1 to {MAX_OUTPUTS}"
    expect(right, op, "weights", expected, weights)
    expect(
        weights.dtype in (torch.float32, wide), op, "weights", f"float32 or {wide_name}", weights
    )
    n = weights.shape[1]
    count = f"{n} tensors, as weights has, or all of them in one"
    expect(len(outputs) in (1, n), op, "outputs", count, f"{len(outputs)} tensors")
    each = (n // len(outputs) * batch, *x.shape[1:])
    for j, output in enumerate(outputs):
        name = f"outputs[{j}]"
        expect_tensor(op, name, output)
        expect(tuple(output.shape) == each, op, name, str(list(each)), output)
        expect(output.dtype in floats, op, name, f"one of {allowed}", output)
        expect(output.dtype == outputs[0].dtype, op, name, f"{outputs[0].dtype} as others", output)
    expect(step.dim() == 0 and step.dtype == torch.int64, op, "step", "int64 []", step)
    history_next = x.new_empty(0, dtype=wide)
    if history is not None:
        parts = history.dim() == x.dim() + 1 and 1 <= history.shape[0] <= MAX_HISTORY
        right = parts and history.shape[1:] == x.shape and history.dtype == wide
        expect(right, op, "history", f"{wide_name} [1 or {MAX_HISTORY}, *{shape}]", history)
        history_next = x.new_empty(history.shape, dtype=wide)
    if seeds is not None:
        right = seeds.dtype == torch.int64 and tuple(seeds.shape) == (batch,)
        expect(right, op, "seeds", f"int64 [{batch}]", seeds)
    if noise is not None:
        right = noise.shape == x.shape and noise.dtype == wide
        expect(right, op, "noise", f"{wide_name} {shape}", noise)
        expect(seeds is None, op, "noise", "none beside seeds", noise)
    if rescale is not None:
        right = rescale.dtype == wide and tuple(rescale.shape) in ((1,), (batch,))
        expect(right, op, "rescale", f"{wide_name} [{batch} or 1]", rescale)
    if mask is not None or known is not None:
        both = mask is not None and known is not None
        expect(both, op, "mask" if mask is None else "known", "both mask and known", "one of them")
        assert mask is not None and known is not None
        expect(mask_fits(mask.shape, x.shape), op, "mask", f"[{batch} or 1, ...] of {shape}", mask)
        expect(mask.dtype == wide, op, "mask", wide_name, mask)
        right = known.shape == x.shape and known.dtype == wide
        expect(right, op, "known", f"{wide_name} {shape}", known)
        expect(seeds is not None, op, "seeds", f"int64 [{batch}] beside mask", "None")
    _check_numbers(quantile, threshold_max)
    expect(copies >= 0, op, "copies", "0 or more", copies)
    expect(input_dtype in floats, op, "input_dtype", f"one of {allowed}", input_dtype)
    model_input = x.new_empty((copies * batch, *x.shape[1:]), dtype=input_dtype)
    return x.new_empty(x.shape), history_next, model_input


def mask_fits(mask: Sequence[int], x: Sequence[int]) -> bool:
    """Whether a mask's shape is x's, or 1 where x has the batch or the second dimension."""
    if len(mask) != len(x) or len(x) < 1:
        return False
    return all(a == b or (a == 1 and i < 2) for i, (a, b) in enumerate(zip(mask, x, strict=True)))


_reference = sampler_step


def _check_numbers(quantile: float, threshold_max: float) -> None:
    op = "sampler_step"
    expect(0 <= quantile <= 1, op, "quantile", "a number from 0 to 1", quantile)
    expect(threshold_max >= 1, op, "threshold_max", "a number >= 1", threshold_max)


def _plan(x: Tensor, outputs: list[Tensor], *rest: Any) -> Any:
    *tensors, _, _, copies, input_dtype = rest
    device, wide = device_type(x), gate_dtype(x.dtype)
    if not (device == "cpu" or (device == "cuda" and wide == torch.float32)):
        return _by_reference  # float64 and other devices: exactness, not speed
    kernel, empty_like = kernels_of(x).sampler_step, torch.empty_like
    # One element that stands for the whole model input: `empty_like` is the cheapest allocation
    like_input = torch.empty((), dtype=input_dtype, device=x.device)
    like_input = like_input.expand(copies * x.shape[0], *x.shape[1:])
    with torch.inference_mode(False):  # one for all calls, whatever mode they are in
        nothing = torch.empty(0, dtype=wide, device=x.device)
    like_statistics = x.new_empty((), dtype=wide).expand(x.shape[0], 2)
    on_cpu = device == "cpu"

    def route(
        x: Any,
        outputs: Any,
        weights: Any,
        table: Any,
        step: Any,
        history: Any,
        seeds: Any,
        noise: Any,
        rescale: Any,
        mask: Any,
        known: Any,
        quantile: float,
        threshold_max: float,
        copies: int,
        _: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= quantile <= 1 <= threshold_max:  # a plan holds for all floats
            _check_numbers(quantile, threshold_max)
        x_next, model_input = empty_like(x), empty_like(like_input)
        h_next = nothing if history is None else empty_like(history)
        # What is said of whole samples first; the CPU has memory of its own for it
        plain = on_cpu or (rescale is None and quantile == 0)
        statistics = None if plain else empty_like(like_statistics)
        kernel(
            x_next,
            h_next,
            model_input,
            statistics,
            x,
            outputs,
            weights,
            table,
            step,
            history,
            seeds,
            noise,
            rescale,
            mask,
            known,
            quantile,
            threshold_max,
            copies,
        )
        return x_next, h_next, model_input

    def copying(x: Any, outputs: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        rest = tuple(t.contiguous() if isinstance(t, Tensor) else t for t in rest)
        return route(x.contiguous(), [t.contiguous() for t in outputs], *rest)

    plain = all(t is None or t.is_contiguous() for t in (x, *outputs, *tensors))
    return route if plain else copying


def _by_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_numbers(*args[11:13])  # a plan holds for all floats
    return _reference(*args)


sampler_step = define_op(sampler_step, fake=_fake, plan=_plan)
