"""Every planted fault is found, whatever the seed, and the message says where it is."""

from pathlib import Path

import pytest
import torch

from tests.emulator.harness import SOURCE, KernelFault, Role, floats, ints

IN, OUT, BOTH, SCRATCH = Role

pytestmark = pytest.mark.emulated


def line_of(text: str) -> int:
    """The line of kernels.cu that contains `text`."""
    (found,) = [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line]
    return found


def fault(kernels, name, *arrays, **options) -> str:
    """The message; the arrays have not changed."""
    before = [t.clone() for t, _ in arrays]
    with pytest.raises(KernelFault) as caught:
        kernels(name, *arrays, **options)
    for (array, _), old in zip(arrays, before, strict=True):
        assert torch.equal(array.view(torch.uint8), old.view(torch.uint8))
    return str(caught.value)


def to(n: int = 128) -> tuple[torch.Tensor, Role]:
    return torch.full((n,), -7, dtype=torch.int32), OUT


SEEDS = pytest.mark.parametrize("seed", range(5))


@SEEDS
@pytest.mark.parametrize("name", ["no_barrier", "unwritten", "reads_beyond"])
def test_bits_that_depend_on_the_execution(emulated, name, seed):
    message = fault(emulated, name, to(), (ints(128), IN), seed=seed)
    assert f"{name}: array 0[" in message and "depends on how it is executed" in message
    if name == "unwritten":
        assert "array 0[77]" in message
    if name == "reads_beyond":
        assert "array 0[127]" in message


@SEEDS
def test_races(emulated, seed):
    assert "array 0[" in fault(emulated, "race", to(64), (ints(128), IN), seed=seed)
    assert "array 0[0]" in fault(emulated, "race_of_blocks", to(1), seed=seed)


@SEEDS
def test_unwritten_shared_memory(emulated, seed):
    assert "Unwritten memory" in fault(emulated, "unwritten_shared", to(), seed=seed)


@SEEDS
@pytest.mark.parametrize(
    "name", ["looks_too_early", "no_barrier_after_wait", "copies_over_readers"]
)
def test_asynchronous_copies(emulated, name, seed):
    out, x = (torch.zeros(128), OUT), (floats(5 * 512), IN)
    assert "depends on how it is executed" in fault(emulated, name, out, x, seed=seed)


def test_copy_that_nobody_waits_for(emulated):
    message = fault(emulated, "never_waits", (torch.zeros(32), OUT), (floats(8), IN))
    assert "ends with an asynchronous copy that nobody has waited for" in message
    assert "thread (0, 0, 0)" in message
    assert f"kernels.cu:{line_of('copy_async<16>(tile, from)')}" in message


def test_writes_beyond_the_end(emulated):
    message = fault(emulated, "beyond", to(), (ints(128), IN))
    assert "beyond array 0" in message


def test_helpers_name_thread_and_line(emulated):
    message = fault(emulated, "stores_beyond", (torch.zeros(64), OUT), (floats(64), IN))
    line = line_of("store(to + n, false, 3, v)")
    assert "kernel stores_beyond, block (0, 0, 0), thread (7, 0, 0)" in message
    assert "writes 12 bytes at byte 256 of array 0, which has 256" in message
    assert f"kernels.cu:{line}" in message


def test_misaligned_vectors(emulated):
    message = fault(emulated, "misaligned", (torch.zeros(16), OUT), (floats(16), IN))
    assert "not a multiple of 16 (array 1 + 4)" in message
    assert f"kernels.cu:{line_of('load(from + 1, true')}" in message


def test_writes_beyond_shared_memory(emulated):
    message = fault(emulated, "beyond_shared", to(32))
    assert "kernel beyond_shared, block (0, 0, 0) writes" in message and "beyond box" in message


def test_changed_input(emulated):
    message = fault(emulated, "writes_input", to(), (ints(128) + 10, IN))
    assert "of array 1, which is no element of an output" in message


def test_barrier_that_not_all_reach(emulated):
    message = fault(emulated, "half_a_barrier", to())
    line = line_of("if (threadIdx.x < 64) __syncthreads();")
    assert "thread (0, 0, 0) waits for ever for __syncthreads" in message
    assert f"kernels.cu:{line}" in message and "has ended" in message


def test_two_places_of_a_barrier(emulated):
    message = fault(emulated, "two_barriers", to())
    assert "comes to a __syncthreads while others wait at that of kernels.cu:" in message


def test_numbers_of_a_barrier(emulated):
    assert "comes to barrier 1 with 96 threads, others with 64" in fault(
        emulated, "crowded_barrier", to(), runs=1
    )


def test_lanes_that_are_not_there(emulated):
    # Who is first decides what is seen first: the missing lane, or others that wait for it.
    message = fault(emulated, "lonely_shuffle", to(32))
    assert "__shfl_xor_sync" in message and ("lane 7" in message or "(7, 0, 0)" in message)


def test_different_collectives(emulated):
    message = fault(emulated, "two_shuffles", to(32))
    assert "__shfl_xor_sync" in message and "__ballot_sync" in message


@SEEDS
def test_dependent_kernel_that_waits_too_late(emulated, seed):
    out, middle = (torch.zeros(128), OUT), (torch.zeros(128), SCRATCH)
    message = fault(emulated, "waits_too_late", out, middle, (floats(128), IN), seed=seed)
    assert "depends on how it is executed" in message and "Kernels: square, negate" in message


def test_dependent_kernel_that_never_waits(emulated):
    out, middle = (torch.zeros(128), OUT), (torch.zeros(128), SCRATCH)
    message = fault(emulated, "does_not_wait", out, middle, (floats(128), IN))
    assert "kernel negate, block (0, 0, 0) never waits for the kernel before it" in message


@SEEDS
def test_update_that_is_not_atomic(emulated, seed):
    """Through the helpers, which let other threads run in between. A raw one is not seen."""
    count = torch.zeros(1, dtype=torch.int32)
    assert "array 0[0]" in fault(emulated, "lost_update", (count, BOTH), seed=seed)


def test_unwritten_values_that_only_decide(emulated):
    flag = (torch.zeros(1, dtype=torch.int32), SCRATCH)
    assert "depends on" in fault(emulated, "unwritten_flag", to(), flag)
    least, out = (torch.zeros(128), SCRATCH), (torch.zeros(128), OUT)
    x = floats(128).abs() + 1
    assert "depends on" in fault(emulated, "unwritten_minimum", out, least, (x, IN))


def test_much_shared_memory_has_to_be_allowed(emulated):
    message = fault(emulated, "greedy", to(32))
    assert "kernel greedy: 61440 bytes of shared memory; more than 48 KB need" in message


def test_static_shared_memory_counts_beside_the_dynamic(emulated):
    message = fault(emulated, "nearly_greedy", to(32))
    assert "kernel nearly_greedy: 49280 bytes of shared memory; more than 48 KB need" in message


def test_matrices_are_loaded_from_shared_memory(emulated):
    message = fault(emulated, "matrix_in_global", to(32), (ints(128), IN))
    assert "in array 1, which is not in shared memory" in message


def test_shuffles_of_different_types(emulated):
    message = fault(emulated, "two_types", to(32))
    assert "4 bytes" in message and "8 bytes" in message


def test_named_barriers_take_whole_warps(emulated):
    message = fault(emulated, "half_a_warp", to())
    assert "waits for ever for barrier 1 at kernels.cu" in message and "has ended" in message


def test_copy_of_more_than_there_is_room_for(emulated):
    message = fault(emulated, "long_copy", (torch.zeros(32), OUT), (floats(8), IN))
    assert "copies 20 of 16 bytes" in message and "thread (0, 0, 0)" in message


def test_wrong_swizzle_gives_wrong_results(emulated):
    """No rule is broken: it is the comparison with the reference that finds it."""
    a, b, c = floats(16 * 64, 1).bfloat16(), floats(8 * 64, 2).bfloat16(), torch.empty(128)
    emulated("wrong_swizzle", (c, OUT), (a, IN), (b, IN))
    exact = a.view(16, 64).double() @ b.view(8, 64).double().T
    assert (c.view(16, 8).double() - exact).abs().max() > 1


def product() -> tuple:
    """C = A B of a warpgroup, 64 x 128 x 128."""
    a, b = floats(2 * 64 * 64, 1).bfloat16(), floats(2 * 64 * 128, 2).bfloat16()
    return (torch.zeros(64 * 128), OUT), (a, IN), (b, IN)


@SEEDS
@pytest.mark.parametrize("name", ["no_proxy_fence", "early_proxy_fence"])
def test_shared_memory_that_wgmma_may_not_see_yet(emulated, name, seed):
    """Without fence.proxy.async, or with one before the copies had been waited for."""
    message = fault(emulated, name, *product(), seed=seed)
    lines = [line_of("place(base, i / 8, i % 8), a"), line_of("copy_async<16>(to, from + i * 8)")]
    assert "a wgmma reads shared memory that thread (" in message
    assert any(f"writes at kernels.cu:{n} without a fence.proxy.async" in message for n in lines)


@SEEDS
@pytest.mark.parametrize(
    "name",
    [
        "reads_accumulators",
        "overwrites_operands",
        "reuses_registers",
        "no_barrier_before_wgmma",
    ],
)
def test_what_wgmma_does_at_any_time(emulated, name, seed):
    """Accumulators read, A's registers or B's memory overwritten before the wait; no barrier."""
    message = fault(emulated, name, *product(), seed=seed)
    assert "depends on how it is executed" in message or "a wgmma reads shared memory" in message


def test_registers_without_a_fence(emulated):
    message = fault(emulated, "no_register_fence", *product())
    assert "a wgmma without a wgmma.fence" in message


def test_wgmma_takes_four_warps(emulated):
    message = fault(emulated, "lonely_wgmma", (torch.zeros(128), OUT))
    assert "waits for ever for the wgmma of the other warps" in message


def test_wgmma_that_nobody_waits_for(emulated):
    message = fault(emulated, "never_waits_for_wgmma", (torch.zeros(128), OUT))
    assert "ends with a wgmma that nobody has waited for at kernels.cu:" in message


def test_unknown_kernel(emulated):
    with pytest.raises(KernelFault, match="no kernel is called nothing"):
        emulated("nothing", to())


def test_every_faulty_kernel_is_tested():
    text = SOURCE.read_text()
    faulty = text[text.index("// --- with a fault") : text.index("// --- by name")]
    names = {line.split("void ")[1].split("_kernel(")[0] for line in faulty.splitlines()
             if line.startswith("__global__ void")}  # fmt: skip
    assert len(names) > 15
    assert [n for n in sorted(names) if f'"{n}"' not in Path(__file__).read_text()] == []
