"""One way of timing for all suites: the host's clock on the CPU, CUDA events on a GPU."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What models are served in on a GPU; a CPU without instructions for it would only convert.
DTYPES = [torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32]
SAMPLES, BACK_TO_BACK = 30, 20


def measure(
    benchmark: Any,
    function: Callable[[], Any],
    *,
    rounds: int,
    iterations: int = 1,
    setup: Callable[[], None] | None = None,
    size: int | None = None,
    work: int | None = None,
    capture: bool = True,
) -> None:
    """Times `function`, which has to move at least `size` bytes and to do `work` operations.

    On a GPU `extra_info` gets medians in microseconds: `eager` (back to back, inputs warm: the
    price of launching is in it), `captured` (one call in a CUDA graph, cold second-level cache) and
    `warm` (a call of many in one graph). A call that cannot be captured says why instead.
    """
    benchmark.extra_info |= {"bytes": size, "operations": work, "device": DEVICE}
    with torch.no_grad():
        if DEVICE == "cuda" and setup is None:
            benchmark.extra_info |= on_gpu(function, capture)
        run = function if DEVICE == "cpu" else synchronised(function)
        if setup is not None:
            benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=1)
        else:
            warmup = 2 if rounds < 20 else 4
            benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=warmup)


def synchronised(function: Callable[[], Any]) -> Callable[[], Any]:
    def finished() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return finished


def on_gpu(function: Callable[[], Any], capture: bool = True) -> dict[str, Any]:
    """Medians of three ways of calling, in microseconds."""
    for _ in range(10):
        function()
    found: dict[str, Any] = {"eager": median(lambda: repeat(function), per=BACK_TO_BACK)}
    if not capture:
        return {**found, "captured": None, "why": "waits for the host"}
    stream = torch.cuda.current_stream()
    try:
        once, many = graph_of(function), graph_of(lambda: repeat(function))
    except Exception as error:  # a host synchronisation inside, and whatever else a peer does
        torch.cuda.set_stream(stream)  # a capture that breaks leaves its own behind
        torch.cuda.synchronize()
        return {**found, "captured": None, "why": str(error).splitlines()[0][:120]}
    found["captured"] = median(once.replay, cold=True)
    found["warm"] = median(many.replay, per=BACK_TO_BACK)
    return found


def repeat(function: Callable[[], Any]) -> None:
    for _ in range(BACK_TO_BACK):
        function()


def graph_of(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def median(function: Callable[[], Any], per: int = 1, cold: bool = False) -> float:
    """Median time of a call between two events; `cold`: the second-level cache is emptied first."""
    flush = torch.empty(flush_bytes(), dtype=torch.uint8, device="cuda") if cold else None
    pairs = []
    function()
    for _ in range(SAMPLES):
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3 / per


def flush_bytes() -> int:
    return 2 * torch.cuda.get_device_properties(0).L2_cache_size


def ceilings() -> dict[str, float]:
    """What this GPU reaches: bytes per second of a large copy, operations per second of a large
    product in each dtype."""
    found = {}
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["bytes"] = 2 * source.numel() / (median(lambda: target.copy_(source)) * 1e-6)
    for dtype in (torch.bfloat16, torch.float32):
        n = 8192 if dtype == torch.bfloat16 else 4096
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        found[name] = 2 * n**3 / (median(lambda a=a, b=b: a @ b) * 1e-6)
    return found
