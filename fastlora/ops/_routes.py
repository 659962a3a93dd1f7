"""The routes of `lora_linear`: ways to compute the same call, and which is predicted to be fastest.

`routes` says which apply to the arguments; `predicted` what each takes by the cost model
(csrc/heuristics.h); `chosen` is the one that `fastlora.tune` has measured to be fastest, or else
the minimum of the predictions. All of them keep to the operator's contract and accuracy; they
differ in the order of roundings.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops import _tuned
from fastlora.ops._define import kernels
from fastlora.ops._device import device_type, kernels_of

# The forms of the CUDA version (csrc/lora_linear.h); the last two need tensor cores.
TILED, EXTENDED, APPENDED = 0, 1, 2
APPENDED_RANK = 32
# More factors than that our pass would sum one after the other, and round too often.
PASS_RANK = 256
# Multiplications up to which plain arithmetic in CUDA is taken to be faster than the library's
# launches; a guess until it has been measured.
TINY_CUDA = 1 << 22
# The element types of csrc/tensor.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
ISAS = {"baseline": 0, "avx2": 1, "avx512": 2}

Routes = dict[str, Any]  # name -> plan: a callable, or a native plan


_watchers: list[Callable[..., None]] = []


@contextmanager
def watched(watch: Callable[..., None]) -> Iterator[None]:
    """Within it, `watch` sees the arguments for which a plan is made."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


_forced: list[str] = []


@contextmanager
def forced(route: str) -> Iterator[None]:
    """Plans that are made within it take `route` where it applies. For comparisons: plans stay, so
    `lora_linear.clear()` goes before and after."""
    _forced.append(route)
    try:
        yield
    finally:
        _forced.pop()


def chosen(*args: Any) -> tuple[str, Any]:
    """The name and the plan of the route for these arguments."""
    for watch in _watchers:
        watch(*args)
    possible = routes(*args)
    if len(possible) == 1:
        return next(iter(possible.items()))
    name = _forced[-1] if _forced else _tuned.lookup(*args)
    if name is None or name not in possible:  # as a table made elsewhere may have it
        times = predicted(*args)
        name = min(possible, key=lambda route: times[route])
    return name, possible[name]


def routes(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, row_scale: Any
) -> Routes:
    """The routes that apply.

    On the CPU: "loop" (ours, by rows of W), "around" (the library's product, our pass over x and
    y), "products" (the library alone). On CUDA: "tiled", "extended", "appended", "products".
    """
    if x.numel() == 0 or weight.numel() == 0:
        return {"products": _products}
    rank = up.shape[1]
    found: Routes = {}
    if device_type(x) == "cpu":
        vectors = all(
            v is None or (v.is_contiguous() and v.dtype == x.dtype) for v in (bias, row_scale)
        )
        if neighbours(weight, down, up):
            found["loop"] = kernels.lora_linear_plan if x.is_contiguous() and vectors else _loop
        if 0 < rank <= PASS_RANK:
            short = row_scale is None and x.is_contiguous()
            found["around"] = _around if short else partial(_products, by_pass=True)
        short = row_scale is None and x.dim() == 2 and gate.dim() == 1
        short = short and down.dtype == up.dtype == x.dtype
        found["products"] = _few if short else _products
        return found
    if device_type(x) == "cuda" and x.dtype != torch.float64:
        found["tiled"] = partial(_kernel, form=TILED)
        if on_tensor_cores(x, weight, down, up):
            found["extended"] = partial(_kernel, form=EXTENDED)
            if rank <= APPENDED_RANK:
                found["appended"] = partial(_kernel, form=APPENDED)
    found["products"] = _products
    return found


def predicted(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, row_scale: Any
) -> dict[str, float]:
    """Seconds of the plain layer ("plain") and of every route, whether it applies or not."""
    (out, features), rank = weight.shape, up.shape[1]
    tokens = x.numel() // max(features, 1)
    if device_type(x) == "cpu":
        return predicted_on_cpu(x.dtype, tokens, features, out, rank)
    named = predicted_on_cuda(x, tokens, features, out, rank)
    # Nobody has a rate for plain arithmetic yet; beside tensor cores it has never a chance.
    work = tokens * (out * features + rank * (out + features))
    beside = on_tensor_cores(x, weight, down, up)
    named["tiled"] = float("inf") if beside else named["products"] * work / TINY_CUDA
    return named


def predicted_on_cuda(
    like: Tensor, tokens: int, features: int, out: int, rank: int
) -> dict[str, float]:
    """For 16-bit elements."""
    times = kernels.predict_lora_linear(tokens, features, out, rank, *gpu_of(like))
    return dict(zip(("plain", "products", "extended", "appended"), times, strict=True))


def extra_seconds(like: Tensor, tokens: int, features: int, out: int, rank: int) -> float:
    """What a low-rank part adds to the plain layer's time by the fastest route, as predicted; less
    than nothing where a route of ours is faster than the library."""
    if device_type(like) == "cpu":
        times = predicted_on_cpu(like.dtype, tokens, features, out, rank)
    else:
        times = predicted_on_cuda(like, tokens, features, out, rank)
        if rank > APPENDED_RANK or not on_tensor_cores(like):
            del times["appended"]
        if not on_tensor_cores(like):
            del times["extended"]
    plain = times.pop("plain")
    return min(times.values()) - plain


def fold_seconds(like: Tensor, size: int) -> float:
    """Predicted time of a fold of `size` bytes of W, W', D and U."""
    if device_type(like) == "cpu":
        return kernels.predict_fold_cpu(size)
    return kernels.predict_fold(size, *gpu_of(like))


def predicted_on_cpu(
    dtype: torch.dtype, tokens: int, features: int, out: int, rank: int
) -> dict[str, float]:
    isa, threads = ISAS[kernels.build_info()["cpu_isa"]], torch.get_num_threads()
    return kernels.predict_lora_linear_cpu(tokens, features, out, rank, DTYPES[dtype], isa, threads)


def neighbours(*matrices: Tensor) -> bool:
    """Whether the elements of every row are neighbours in memory."""
    return all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in matrices)


def on_tensor_cores(x: Tensor, *others: Tensor) -> bool:
    """They want 16-bit elements, and neighbours of a sum to be neighbours in memory."""
    sixteen = x.element_size() == 2 and all(t.numel() for t in others)
    return sixteen and neighbours(x, *others) and gpu_of(x)[0] >= 80


def gpu_of(x: Tensor) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and multiprocessors; an emulated GPU is an H100."""
    if not x.is_cuda:
        return 90, 132
    properties = torch.cuda.get_device_properties(x.device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


# --- on the CPU -----------------------------------------------------------------------------------


def _loop(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, row_scale: Any
) -> Tensor:
    """The native plan does the same for contiguous x and vectors of its dtype."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    m = None if row_scale is None else row_scale.to(x.dtype).contiguous()
    b = None if bias is None else bias.contiguous()
    x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    kernels.lora_linear(y, x2, weight, b, down, up, gate, m, None, TILED)
    return y


def _around(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, _: None
) -> Tensor:
    y = F.linear(x, weight, bias)
    kernels.lora_add_(y, x, down, up, gate, None)
    return y


def _few(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, _: None
) -> Tensor:
    y = F.linear(x, weight, bias)
    return y.addmm_(torch.mm(x, down.t()).mul_(gate), up.t())


# --- on CUDA --------------------------------------------------------------------------------------


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    row_scale: Any,
    form: int = TILED,
) -> Tensor:
    (out, features), dtype = weight.shape, x.dtype
    x2 = x.reshape(-1, features)
    y = x.new_empty(x2.shape[0], out)
    h = None if form == APPENDED else x.new_empty(x2.shape[0], up.shape[1])
    m = None if row_scale is None else row_scale.to(dtype)
    kernels_of(x).lora_linear(y, x2, weight, bias, down.to(dtype), up.to(dtype), gate, m, h, form)
    return y.view(*x.shape[:-1], out)


# --- by the library -------------------------------------------------------------------------------


def _products(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    row_scale: Any,
    by_pass: bool = False,
) -> Tensor:
    """Torch's matrix products; around them one pass over h and, for DoRA, one over y."""
    x2 = x.reshape(-1, x.shape[-1])
    y = F.linear(x2, weight, bias if row_scale is None else None)
    accumulate(y, x2, down, up, gate, by_pass)
    if row_scale is not None:
        m = row_scale.to(y.dtype)
        y = y.mul_(m) if bias is None else torch.addcmul(bias, y, m, out=y)
    return y.view(*x.shape[:-1], weight.shape[0])


def pass_is_faster(y: Tensor, tokens: int, features: int, out: int, rank: int) -> bool:
    """Whether our pass adds a low-rank part to y faster than torch's products do."""
    if device_type(y) != "cpu" or not 0 < rank <= PASS_RANK:
        return False
    times = predicted_on_cpu(y.dtype, tokens, features, out, rank)
    return times["around"] < times["products"]


def accumulate(
    y: Tensor, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor, by_pass: bool
) -> None:
    """`y += ((x Dᵀ) ∘ g) Uᵀ` on matrices `y [tokens, out]`, `x [tokens, in]`."""
    tokens, dtype = y.shape[0], y.dtype
    if tokens == 0 or up.shape[1] == 0:
        return
    if by_pass:
        kernels.lora_add_(y, x, down, up, gate, None)
        return
    h = x if down is None else torch.mm(x, (down if down.dtype == dtype else down.to(dtype)).t())
    if gate.dim() == 1:
        h = h * gate if down is None else h.mul_(gate)
    else:
        rows = h.view(gate.shape[0], -1, gate.shape[1])
        h = torch.mul(rows, gate[:, None], out=None if down is None else rows).view(h.shape)
    up = up if up.dtype == dtype else up.to(dtype)
    y.addmm_(h if h.dtype == dtype else h.to(dtype), up.t())
