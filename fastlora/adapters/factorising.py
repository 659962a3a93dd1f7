"""Decompositions of a model's layers: one for all equal weights, largest first, in parallel."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted, adapted_class
from fastlora.adapters.decomposition import NOT_FINITE, Factors, LinAlgError, Settings
from fastlora.adapters.factor_cache import FactorCache, digest, obtain, place
from fastlora.adapters.specs import AdapterError

HELD = "_fastlora_factors"  # on a layer: what `decompose` has left for `inject`
SMALL = 1 << 30  # multiplications of a model below which threads are not worth starting
WORKERS = 8  # threads at most: LAPACK's scratch of each is a few times the weight


class Held(NamedTuple):
    """Factors that wait on a layer, and the weight that they are of."""

    factors: Factors
    settings: Settings
    key: str


class Task:
    """A matrix `[out, in]` and the layers that have it."""

    def __init__(self, path: str, matrix: Tensor, settings: Settings, held: Held | None) -> None:
        self.paths, self.matrix, self.settings, self.held = [path], matrix, settings, held
        self.key = ""
        self.found: Factors | None = None
        self.source = "computed"  # or "cache", "layer"
        self.seconds = 0.0

    @property
    def work(self) -> int:
        return math.prod(self.matrix.shape) * min(self.matrix.shape)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a layer, adapted or about to be, as `[out, everything else]`."""
    kind = type(module) if isinstance(module, Adapted) else adapted_class(type(module))
    assert kind is not None
    return kind.matrix(module).detach()  # type: ignore[arg-type]  # it reads what the base has


def rank_of(module: nn.Module) -> int:
    """How many shifts a layer's singular values have."""
    if isinstance(module, Adapted) and module.fastlora.svd_s is not None:
        return len(module.fastlora.svd_s)
    held = vars(module).get(HELD)
    if held is not None:
        return len(held.factors.s)
    return full_rank(module)


def full_rank(module: nn.Module) -> int:
    return min(matrix_of(module).shape)


def factorise(
    modules: Mapping[str, nn.Module],
    settings: Mapping[str, Settings] | None,
    cache: FactorCache,
    what: str,
    *,
    device: torch.device | None = None,
    progress: bool = True,
) -> dict[str, Task]:
    """The decompositions of the layers' weights, on the weights' devices, by path.

    Looked for on the layer, then in the cache; what is in neither is computed. Without `settings`
    they are those of what is on the layer, where that is of another weight its rank, else all is
    kept. Raises AdapterError, naming `what` and the layer, where a weight has none.
    """
    tasks = []
    for path, module in modules.items():
        matrix, held = matrix_of(module), vars(module).get(HELD)
        wanted = held.settings if held else Settings()
        if not torch.isfinite(matrix).all():  # before minutes of work on others
            raise undecomposable(what, path, NOT_FINITE)
        tasks.append(Task(path, matrix, settings[path] if settings else wanted, held))
    if cache.reads or settings is not None or any(task.held for task in tasks):
        set_keys(tasks, keeping_ranks=settings is None)
        tasks = united(tasks)
    tasks.sort(key=lambda task: -task.work)
    places = {id(task): device or place(task.matrix) for task in tasks}

    def run(task: Task) -> None:
        start = time.perf_counter()
        if task.held:
            task.found, task.source = task.held.factors.to(task.matrix.device), "layer"
            cache.complete(task.key, task.settings, task.found)
            return
        try:
            task.found, hit = obtain(task.matrix, task.settings, cache, places[id(task)], task.key)
        except LinAlgError as error:
            raise undecomposable(what, task.paths[0], error) from None
        task.source = "cache" if hit else "computed"
        task.seconds = time.perf_counter() - start

    total = sum(task.work for task in tasks)
    on_cpu = all(place.type == "cpu" for place in places.values())
    with bar(total, what, progress) as shown:
        for i, task in enumerate(each(run, tasks, parallel=on_cpu and total > SMALL)):
            shown.set_postfix_str(f"{i + 1} of {len(tasks)} weights", refresh=False)
            shown.update(task.work)
    return {path: task for task in tasks for path in task.paths}


def undecomposable(what: str, path: str, why: object) -> AdapterError:
    return AdapterError(f"{what}: {path}: its weight has no decomposition: {why}")


def set_keys(tasks: list[Task], keeping_ranks: bool) -> None:
    """Names the weights by their hashes, and drops what the layers hold of other ones."""

    def run(task: Task) -> None:
        task.key = digest(task.matrix)
        held = task.held
        if held and held.key != task.key and keeping_ranks:
            task.settings = Settings(held.settings.dtype, len(held.factors.s))
        task.settings = task.settings.of(task.matrix)
        if held and (held.key, held.settings) != (task.key, task.settings):
            task.held = None

    size = sum(task.matrix.nbytes for task in tasks)
    for _ in each(run, tasks, parallel=size > 1 << 24):
        pass


def united(tasks: list[Task]) -> list[Task]:
    """One task for all layers with equal weights."""
    found: dict[Any, Task] = {}
    for task in tasks:
        same = found.setdefault((task.key, task.settings, task.matrix.device), task)
        if same is not task:
            same.paths += task.paths
            same.held = same.held or task.held
    return list(found.values())


def each(run: Callable[[Task], None], tasks: list[Task], parallel: bool) -> Iterator[Task]:
    """Runs all tasks and yields each when it is done. In parallel every thread has its share of
    the cores: LAPACK does not use many of them well for one matrix. The first error ends it."""
    threads = torch.get_num_threads()
    workers = min(threads, WORKERS, len(tasks))
    if not parallel or workers < 2:
        for task in tasks:
            run(task)
            yield task
        return
    from concurrent.futures import ThreadPoolExecutor, as_completed

    torch.set_num_threads(threads // workers)  # new threads take it over
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(run, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def bar(total: int, what: str, shown: bool) -> Any:
    """A progress bar of work, for what takes more than a second."""
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    return tqdm(
        total=total, desc=what, disable=not shown, delay=1.0, bar_format=layout, leave=False
    )
