"""One way of timing for all suites: the host's clock on the CPU, CUDA events on a GPU."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.samplers.graph import forget_capture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What models are served in on a GPU; a CPU without instructions for it would only convert.
DTYPES = [torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32]
SAMPLES, BACK_TO_BACK = 30, 20
# Contenders that take turns: for so long together, within so many rounds.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 5.0, 12, 150
GPU_SECONDS, EAGER_SAMPLES = 0.25, 8
GRAPH_CALLS = 16  # at least so many calls in one graph: starting it must not count

Function = Callable[[], Any]


def measure(
    benchmark: Any,
    function: Function,
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


# --- in turns: machines drift, and no contender should have the worse minute ----------------------


@dataclass
class Turns:
    """What a contender took in every round, in seconds, and what else is known of it."""

    times: list[float]
    info: dict[str, Any]


class Replay:
    """A clock for pytest-benchmark that tells times which were taken before, so that contenders
    that took turns have entries of their own: `@pytest.mark.benchmark(timer=replay)`."""

    __name__ = "replay"

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self) -> float:
        return self.ticks.pop(0)

    def show(self, benchmark: Any, turns: Turns) -> None:
        self.ticks = [tick for seconds in turns.times for tick in (0.0, seconds)]
        benchmark.extra_info |= turns.info
        benchmark.pedantic(lambda: None, rounds=len(turns.times))


replay = Replay()
Contenders = Mapping[str, Sequence[Function]]


def take_turns(
    contenders: Contenders,
    seconds: float = SECONDS,
    context: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Turns]:
    """Times contenders round by round, each once a round. One is called "floor": `info` has
    `over_floor`, the median of the rounds' ratios to it, their quartiles `low` and `high`, and
    `fastest`, the ratio of the fastest times.

    On the CPU a round calls the first function of each. On a GPU it replays a CUDA graph of each,
    in which its functions (layers with weights of their own) follow one another as in a model: the
    input is warm and weights come from memory; `info` then has `captured` and `eager` (calls back
    to back without a graph), in microseconds of one call. `context(name)` is active where a
    contender is called.
    """
    with torch.no_grad():
        found = on_cpu(contenders, seconds) if DEVICE == "cpu" else in_graphs(contenders, context)
    floors = found["floor"].times
    for turns in found.values():
        turns.info["device"] = DEVICE
        if len(turns.times) == len(floors):  # otherwise it was not captured
            turns.info |= quartiles(turns.times, floors)
    return found


def quartiles(times: Sequence[float], floors: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios, and the ratio of the fastest times."""
    ratios = [t / f for t, f in zip(times, floors, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    fastest = min(times) / min(floors)
    return {"over_floor": middle, "low": low, "high": high, "fastest": fastest}


def on_cpu(contenders: Contenders, seconds: float) -> dict[str, Turns]:
    names = list(contenders)
    found = {name: Turns([], {}) for name in names}
    once = sum(min(seconds_of(contenders[name][0]) for _ in range(3)) for name in names)
    for i in range(min(MOST_ROUNDS, max(LEAST_ROUNDS, round(seconds / once)))):
        first = i % len(names)  # nobody always finds the caches that the same other one left
        for name in names[first:] + names[:first]:
            found[name].times.append(seconds_of(contenders[name][0]))
    return found


def seconds_of(function: Function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def in_graphs(
    contenders: Contenders, context: Callable[[str], AbstractContextManager[Any]]
) -> dict[str, Turns]:
    found: dict[str, Turns] = {}
    graphs: dict[str, Any] = {}
    calls = {name: max(GRAPH_CALLS, len(functions)) for name, functions in contenders.items()}
    for name, functions in contenders.items():
        with context(name):
            run = in_turn(functions, calls[name])
            eager = median(run, per=calls[name], samples=EAGER_SAMPLES)
            graph, why = captured(run)
        found[name] = Turns([], {"eager": eager})
        if graph is None:
            found[name] = Turns([eager * 1e-6], {"eager": eager, "captured": None, "why": why})
        else:
            graphs[name] = graph
    once = sum(median(graph.replay, samples=2) for graph in graphs.values()) * 1e-6
    rounds = min(SAMPLES, max(8, round(GPU_SECONDS / once)))
    for i, taken in enumerate(timed([graph.replay for graph in graphs.values()] * rounds)):
        name = list(graphs)[i % len(graphs)]
        found[name].times.append(taken * 1e-6 / calls[name])
    for name in graphs:
        found[name].info["captured"] = statistics.median(found[name].times) * 1e6
    return found


def in_turn(functions: Sequence[Function], calls: int) -> Function:
    def run() -> None:
        for i in range(calls):
            functions[i % len(functions)]()

    return run


def copies_for(weight_bytes: int, most: int = 128) -> int:
    """Layers whose weights together are twice the second-level cache; one layer on the CPU."""
    if DEVICE == "cpu":
        return 1
    return min(most, max(1, -(-2 * l2_bytes() // max(weight_bytes, 1))))


# --- a GPU ----------------------------------------------------------------------------------------


def synchronised(function: Function) -> Function:
    def finished() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return finished


def on_gpu(function: Function, capture: bool = True) -> dict[str, Any]:
    """Medians of three ways of calling, in microseconds."""
    for _ in range(10):
        function()
    many = in_turn([function], BACK_TO_BACK)
    found: dict[str, Any] = {"eager": median(many, per=BACK_TO_BACK)}
    if not capture:
        return {**found, "captured": None, "why": "waits for the host"}
    graph, why = captured(function)
    graph_of_many, _ = captured(many) if graph is not None else (None, "")
    if graph is None or graph_of_many is None:
        return {**found, "captured": None, "why": why}
    found["captured"] = median(graph.replay, cold=True)
    found["warm"] = median(graph_of_many.replay, per=BACK_TO_BACK)
    return found


def captured(function: Function) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """A graph of one call, or why there is none: a host synchronisation inside, and whatever else a
    peer does."""
    current = torch.cuda.current_stream()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph, ""
    except Exception as error:
        torch.cuda.set_stream(current)  # a capture that breaks leaves its own behind
        torch.cuda.synchronize()
        forget_capture(current.device)
        return None, str(error).splitlines()[0][:120]


def median(function: Function, per: int = 1, cold: bool = False, samples: int = SAMPLES) -> float:
    """Median microseconds of a call between two events; `cold`: the second-level cache is emptied
    first."""
    function()
    return statistics.median(timed([function] * samples, cold)) / per


def timed(functions: Sequence[Function], cold: bool = False) -> list[float]:
    """Microseconds of each of some calls, one after another."""
    flush = torch.empty(2 * l2_bytes(), dtype=torch.uint8, device="cuda") if cold else None
    pairs = []
    for function in functions:
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def ceilings() -> dict[str, float]:
    """What this GPU reaches: bytes per second of a large copy, operations per second of a large
    product in each dtype."""
    found = {}
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["bytes"] = 2 * source.numel() / (median(lambda: target.copy_(source)) * 1e-6)
    for dtype in (torch.bfloat16, torch.float32):
        n = 8192 if dtype == torch.bfloat16 else 4096
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        found[name] = 2 * n**3 / (median(lambda a=a, b=b: a @ b) * 1e-6)
    return found
