"""Right kernels pass, and mean what the PTX documentation and the hardware say."""

import pytest
import torch

from tests.emulator.harness import Role, floats, ints

IN, OUT, BOTH, SCRATCH = Role

LANES = range(32)


def halves_of(registers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[lanes, registers, 2]: each register's lower and upper element."""
    return registers.view(dtype).view(32, -1, 2).double()


def matrices_16(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype):
    """A [16, 16] and B [16, 8] from registers: "Matrix Fragments for mma.m16n8k16" of the PTX ISA.

    groupID = lane >> 2, threadID_in_group = lane % 4. A: row = groupID for a0, a1, a4, a5, else
    groupID + 8; col = threadID_in_group * 2 + (i & 1) for i < 4, else that + 8. B: row =
    threadID_in_group * 2 + (i & 1) for i < 2, else that + 8; col = groupID.
    """
    a, b = halves_of(a, dtype).view(32, 8), halves_of(b, dtype).view(32, 4)
    big, small = torch.zeros(16, 16).double(), torch.zeros(16, 8).double()
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            big[row, thread * 2 + (i & 1) + (0 if i < 4 else 8)] = a[lane, i]
        for i in range(4):
            small[thread * 2 + (i & 1) + (0 if i < 2 else 8), group] = b[lane, i]
    return big, small


def matrices_tf32(a: torch.Tensor, b: torch.Tensor):
    """A [16, 8] and B [8, 8]: row = groupID for a0 and a2, else groupID + 8; col =
    threadID_in_group for a0 and a1, else that + 4. B: row = threadID_in_group, + 4 for b1."""
    a, b = a.view(torch.float32).view(32, 4).double(), b.view(torch.float32).view(32, 2).double()
    big, small = torch.zeros(16, 8).double(), torch.zeros(8, 8).double()
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            big[group if i in (0, 2) else group + 8, thread if i < 2 else thread + 4] = a[lane, i]
        for i in range(2):
            small[thread + 4 * i, group] = b[lane, i]
    return big, small


def result_of(c: torch.Tensor) -> torch.Tensor:
    """C [16, 8]: row = groupID for c0 and c1, else groupID + 8; col = threadID_in_group * 2 +
    (i & 1)."""
    c, matrix = c.view(32, 4).double(), torch.zeros(16, 8).double()
    for lane in LANES:
        for i in range(4):
            matrix[(lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)] = c[lane, i]
    return matrix


@pytest.mark.parametrize("name", ["half", "bfloat16", "tf32"])
def test_products_of_matrices(kernels, name):
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}[name]
    if name == "tf32":
        a, b = floats(128, 1).view(torch.int32) & ~0x1FFF, floats(64, 2).view(torch.int32) & ~0x1FFF
        big, small = matrices_tf32(a, b)
    else:
        a, b = (floats(n, n).to(dtype).view(torch.int32) for n in (256, 128))
        big, small = matrices_16(a, b, dtype)
    start = floats(128, 3)
    c = start.clone()
    kernels(f"multiply_{name}", (c, BOTH), (a, IN), (b, IN))
    exact = result_of(start) + big @ small
    torch.testing.assert_close(result_of(c), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", [0, 7, 8, 15])
@pytest.mark.parametrize("k", [0, 1, 7, 8, 15])
def test_a_single_element_goes_where_it_should(kernels, row, k):
    """One 1 in A picks one row of B: nothing else can produce the result."""
    lane, index = row % 8 * 4 + k % 8 // 2, row // 8 + k // 8 * 2
    a = torch.zeros(32, 4, 2, dtype=torch.bfloat16)
    a[lane, index, k % 2] = 1
    b = floats(128, 5).to(torch.bfloat16)
    c = torch.zeros(128)
    a = a.flatten().view(torch.int32)
    kernels("multiply_bfloat16", (c, BOTH), (a, IN), (b.view(torch.int32), IN))
    expected = torch.zeros(16, 8).double()
    expected[row] = matrices_16(a, b.view(torch.int32), torch.bfloat16)[1][k]
    assert torch.equal(result_of(c), expected)


def test_rounding_to_tf32(kernels):
    tie = 1 + 2**-11
    x = torch.tensor([1.0, tie, tie + 2**-20, -tie, 1 + 2**-10, 0.0, 3e38, 2e-38])
    bits = torch.empty(8, dtype=torch.int32)
    kernels("tf32", (bits, OUT), (x, IN))
    assert not (bits & 0x1FFF).any()
    up, got = 1 + 2**-10, bits.view(torch.float32)
    assert got[:6].tolist() == [1, up, up, -up, up, 0]
    torch.testing.assert_close(got, x, rtol=2**-11, atol=0)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_loading_matrices(kernels, count, transposed):
    """ldmatrix: lane l gets elements 2 (l % 4) and the next of row l / 4 of each matrix."""
    rows = torch.arange(256, dtype=torch.int16)
    to = torch.empty(32 * count, dtype=torch.int32)
    name = f"load_{count}{'t' if transposed else ''}"
    kernels(name, (to, OUT), (rows.view(torch.int32), IN))
    matrices, got = rows.view(4, 8, 8), to.view(torch.int16).view(32, count, 2)
    for lane in LANES:
        for matrix in range(count):
            m = matrices[matrix].t() if transposed else matrices[matrix]
            assert got[lane, matrix].tolist() == m[lane // 4, lane % 4 * 2 :][:2].tolist()


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_storing_matrices(kernels, count, transposed, request):
    if "on_gpu" in request.node.callspec.id and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("stmatrix needs sm_90")
    registers = torch.arange(32 * count * 2, dtype=torch.int16)
    to = torch.empty(128, dtype=torch.int32)
    name = f"store_{count}{'t' if transposed else ''}"
    kernels(name, (to, OUT), (registers.view(torch.int32), IN))
    expected = torch.zeros(4, 8, 8, dtype=torch.int16)
    for lane in LANES:
        for matrix in range(count):
            m = expected[matrix].t() if transposed else expected[matrix]
            m[lane // 4, lane % 4 * 2 :][:2] = registers.view(32, count, 2)[lane, matrix]
    assert torch.equal(to.view(torch.int16).view(4, 8, 8), expected)


@pytest.mark.parametrize("layout", ["mn", "k"])
@pytest.mark.parametrize("place", ["registers", "memory"])
@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_products_of_a_warpgroup(kernels, name, columns, place, layout, request):
    """A [64, 192] in registers or shared memory, B [192, columns] or its transpose, in 128-byte
    swizzles, three times over the same memory."""
    if "on_gpu" in request.node.callspec.id and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs sm_90a")
    dtype = torch.float16 if name == "half" else torch.bfloat16
    a, b = floats(3 * 64 * 64, 1).to(dtype), floats(3 * 64 * columns, 2).to(dtype)
    c = torch.empty(64 * columns)
    kernels(f"wgmma_{name}_{columns}_{place}_{layout}", (c, OUT), (a, IN), (b, IN))
    left = a.view(3, 64, 64).double()
    right = b.double().view(3, 64, -1) if layout == "mn" else b.double().view(3, -1, 64).mT
    exact = (left @ right).sum(0)
    torch.testing.assert_close(c.view(64, columns).double(), exact, rtol=1e-5, atol=1e-4)


def test_sum_of_a_block(kernels):
    x, to = ints(5 * 128), torch.empty(5, dtype=torch.int32)
    kernels("sum", (to, OUT), (x, IN))
    assert torch.equal(to, x.view(5, 128).sum(1, dtype=torch.int32))


def test_shuffles_and_votes(kernels):
    x = ints(32)
    to = torch.zeros(321, dtype=torch.int32)
    kernels("warp", (to, BOTH), (x, IN))
    v, got = x.tolist(), to[:320].view(32, 10).T.tolist()
    assert got[0] == [v[(lane * 7 + 5) % 32] for lane in LANES]
    assert got[1] == [v[lane // 8 * 8 + 3] for lane in LANES]
    assert got[2] == [v[lane ^ 9] for lane in LANES]
    assert got[3] == [v[lane - 3] if lane >= 3 else v[lane] for lane in LANES]
    assert got[4] == [v[lane + 3] if lane % 16 < 13 else v[lane] for lane in LANES]
    assert [g & 0xFFFFFFFF for g in got[5]] == [sum(1 << i for i in LANES if v[i] % 2 == 0)] * 32
    assert got[6] == [0] * 32 and got[7] == [1] * 32
    assert got[8] == [v[lane ^ (1 if lane < 16 else 2)] for lane in LANES]
    assert got[9] == [1] * 32 and to[320] == sum(v)


@pytest.mark.parametrize("stages", [1, 2, 7])
def test_pipeline_of_copies(kernels, stages):
    x, to = ints(stages * 512).float(), torch.empty(128)
    kernels("pipeline", (to, OUT), (x, IN))
    index = (torch.arange(128)[:, None] * 4 + torch.arange(4) * 5) % 512
    assert torch.equal(to, x.view(stages, 512)[:, index].sum((0, 2)))


def test_lanes_that_are_not_there_do_not_take_part(kernels):
    """48 threads: a full warp without lane 5, which leaves early, and half a warp."""
    to = torch.full((48,), -7, dtype=torch.int32)
    kernels("partial_warp", (to, BOTH))
    full, half = (1 << 32) - 1 - (1 << 5), (1 << 16) - 1
    assert [v & 0xFFFFFFFF for v in to[:32].tolist()] == [
        (1 << 32) - 7 if lane == 5 else full for lane in LANES
    ]
    assert to[32:].tolist() == [half] * 16


def test_named_barriers(kernels):
    x, to = ints(6 * 64), torch.empty(6 * 64, dtype=torch.int32)
    kernels("named_barrier", (to, OUT), (x, IN))
    assert torch.equal(to, x.view(6, 64).flip(1).flatten())


def test_dynamic_shared_memory(kernels):
    x, to = ints(96), torch.empty(96, dtype=torch.int32)
    kernels("reverse", (to, OUT), (x, IN))
    assert torch.equal(to, x.flip(0))


def test_atomics(kernels):
    x, counts = ints(2048, high=10), torch.zeros(10, dtype=torch.int32)
    kernels("histogram", (counts, BOTH), (x, IN))
    assert torch.equal(counts.long(), torch.bincount(x, minlength=10))


def test_dependent_kernels(kernels):
    x, to, middle = floats(128), torch.empty(128), torch.empty(128)
    kernels("dependent", (to, OUT), (middle, SCRATCH), (x, IN))
    assert torch.equal(to, -x.square())


def test_swizzled_tile(kernels):
    a, b, c = floats(16 * 64, 1).bfloat16(), floats(8 * 64, 2).bfloat16(), torch.empty(128)
    kernels("swizzled", (c, OUT), (a, IN), (b, IN))
    exact = a.view(16, 64).double() @ b.view(8, 64).double().T
    torch.testing.assert_close(c.view(16, 8).double(), exact, rtol=1e-5, atol=1e-4)


def test_every_half_precision_number(kernels):
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    wide, back = torch.empty(65536), torch.empty(65536, dtype=torch.float16)
    kernels("halves", (wide, OUT), (halves, IN), (back, OUT))
    assert torch.equal(wide.isnan(), halves.isnan())
    assert torch.equal(wide.nan_to_num(7), halves.float().nan_to_num(7))
    numbers = ~halves.isnan()
    assert torch.equal(back.view(torch.int16)[numbers], halves.view(torch.int16)[numbers])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_rounding_to_sixteen_bits(kernels, dtype):
    """Ties, subnormals, overflow: all bit patterns of the upper half, three of the lower."""
    upper = torch.arange(65536, dtype=torch.int64) << 16
    bits = torch.cat([upper + lower for lower in (0, 0x1000, 0x2FFF, 0x7FFF, 0x8000, 0x8001)])
    x = bits.to(torch.int32).view(torch.float32)
    to = torch.empty(len(x), dtype=dtype)
    kernels("narrow_half" if dtype == torch.float16 else "narrow_bfloat16", (to, OUT), (x, IN))
    expected, numbers = x.to(dtype), ~x.isnan()
    assert torch.equal(to.isnan(), ~numbers)
    assert torch.equal(to.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
