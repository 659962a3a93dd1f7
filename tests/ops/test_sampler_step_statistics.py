"""What `sampler_step` has to know of whole samples first: guidance rescale, dynamic thresholding;
and the mask, which has a shape of its own."""

import numpy as np
import pytest
import torch

from fastlora import ops
from fastlora.ops import _philox
from fastlora.ops.sampler_step import COLUMNS
from tests.devices import on_devices
from tests.ops.sampler_cases import LOW, Case, check, name_of, rescaling, same_bits, widened

NAN, INF = float("nan"), float("inf")


def only(**columns: float) -> dict[str, float]:
    return dict.fromkeys(COLUMNS, 0.0) | {"m": 1.0, "clip": INF} | columns


# --- guidance rescale -----------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("output_dtype", LOW, ids=name_of)
@pytest.mark.parametrize("shape", [(3, 2), (3, 5, 7), (2, 1030), (2, 4, 64, 65)], ids=str)
def test_rescale(shape, output_dtype, n):
    case = Case(shape, n, output_dtype=output_dtype, rescale=shape[0], quantile=0.95)
    check(ops.sampler_step, case.arguments())


@on_devices
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0, 1.5])
def test_rescale_is_that_of_diffusers(phi):
    pytest.importorskip("diffusers")
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    arguments = Case((3, 4, 9, 9), history=0, noise="none", columns=only(c_e=1.0)).arguments()
    arguments |= {"weights": torch.tensor([[[7.5], [-6.5]]]), "rescale": torch.tensor([phi])}
    ours = ops.sampler_step(**arguments)[0].double()
    cond, uncond = (e.double() for e in arguments["outputs"])
    theirs = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, phi)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@on_devices
@pytest.mark.parametrize("mean", [0.0, 1.0, 4096.0, -1e6])
@pytest.mark.parametrize("inner", [2, 3, 999, 5000])
def test_deviation_far_from_zero(inner, mean):
    """Squares of the values would leave nothing of the deviation. The sums are exact here."""
    g = torch.Generator().manual_seed(0)
    outputs = [torch.randint(-8, 9, (2, inner), generator=g) / 8 + mean for _ in range(2)]
    arguments = Case((2, inner), history=0, noise="none", columns=only(c_e=1.0)).arguments()
    arguments |= {"outputs": outputs, "weights": torch.tensor([[[2.0], [-1.0]]])}
    arguments["rescale"] = torch.ones(2)
    factor = rescaling(arguments)[:, None]
    e = 2 * outputs[0].double() - outputs[1].double()
    x_next = ops.sampler_step(**arguments)[0]
    torch.testing.assert_close(x_next.double(), e * factor, rtol=2e-7, atol=0)


@on_devices
def test_an_outlier_does_not_spoil_the_deviation():
    outputs = [torch.randn(1, 5000), torch.randn(1, 5000)]
    outputs[0][0, 0] = 3e4
    outputs[1][0, 17] = -3e4
    arguments = Case((1, 5000), history=0, noise="none", columns=only(c_e=1.0)).arguments()
    arguments |= {"outputs": outputs, "rescale": torch.ones(1)}
    check(ops.sampler_step, arguments)


@on_devices
@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1)], ids=str)
def test_a_single_element_has_no_deviation(shape):
    arguments = Case(shape, rescale=1, columns={"c_e": 1.0}).arguments()
    assert ops.sampler_step(**arguments)[0].isnan().all()


@on_devices
def test_rescale_of_a_constant():
    """std 0: infinitely large, and no number where 0 is rescaled to 0."""
    case = Case((2, 4), history=0, noise="none", columns=only(c_e=1.0), rescale=1)
    arguments = case.arguments()
    arguments["outputs"] = [torch.randn(2, 4), torch.zeros(2, 4)]
    arguments |= {"weights": torch.tensor([[[0.0], [1.0]]]), "rescale": torch.ones(1)}
    results = ops.sampler_step(**arguments)
    torch.testing.assert_close(
        results, ops.sampler_step.reference(**arguments), equal_nan=True, rtol=0, atol=0
    )


# --- dynamic thresholding -------------------------------------------------------------------------


def thresholded(x: torch.Tensor, quantile: float, largest: float = 1e30) -> torch.Tensor:
    """What the operator makes of x0 = x."""
    columns = only(k_x=1.0, c_0=1.0)
    arguments = Case(tuple(x.shape), history=0, noise="none", columns=columns).arguments()
    arguments |= {"x": x, "quantile": quantile, "threshold_max": largest}
    return ops.sampler_step(**arguments)[0]


def by_numpy(x: torch.Tensor, quantile: float, largest: float = 1e30) -> torch.Tensor:
    flat = x.double().flatten(1)
    sizes = flat.abs().numpy()
    with np.errstate(invalid="ignore"):
        s = np.quantile(sizes, quantile, axis=1)
        # numpy's own way of interpolating loses an infinite neighbour in the second half
        low, high = (np.quantile(sizes, quantile, 1, method=m) for m in ("lower", "higher"))
        s = np.where(np.isfinite(low) & np.isinf(high), high, s)
    s = torch.from_numpy(s).clamp(1, largest)[:, None]
    return (torch.minimum(torch.maximum(flat, -s), s) / s).view(x.shape)


@on_devices
@pytest.mark.parametrize("quantile", [1e-9, 0.3, 0.5, 0.995, 1 - 1e-9, 1.0, 1])
@pytest.mark.parametrize("inner", [1, 2, 3, 1000, 4097])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_quantile(x_dtype, inner, quantile):
    x = (20 * torch.randn(3, inner)).to(x_dtype)
    result, expected = thresholded(x, quantile).double(), by_numpy(x, quantile)
    tolerance = torch.finfo(x_dtype).eps / 2 + 5e-7
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=0)


@on_devices
@pytest.mark.parametrize("rank", [1, 512, 4095, 4096])
def test_the_selected_element_is_exact(rank):
    """Nothing has to be interpolated where the quantile is one of the elements."""
    x = 1 + torch.randn(2, 4097).abs()
    s = x.sort(1).values[:, rank, None]
    assert torch.equal(thresholded(x, rank / 4096), torch.minimum(x, s) / s)


@on_devices
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("values", [1, 2, 3, 40])
def test_quantile_of_ties(values, quantile):
    x = 2.0 + torch.randint(0, values, (3, 1500)) * torch.randn(3, 1500).sign()
    torch.testing.assert_close(
        thresholded(x, quantile).double(), by_numpy(x, quantile), rtol=5e-7, atol=0
    )


@on_devices
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-3, 1.0, 1e36])
def test_quantile_of_any_size(scale):
    """Subnormals too: with a threshold of 1 nothing changes below it."""
    x = torch.randn(2, 2000) * scale
    expected = by_numpy(x, 0.9, 1e38)
    result = thresholded(x, 0.9, 1e38)
    torch.testing.assert_close(result.double(), expected, rtol=5e-7, atol=1e-45)


@on_devices
@pytest.mark.parametrize("special", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("quantile", [0.25, 0.9, 0.9995, 1.0])
@pytest.mark.parametrize("inner", [1, 4, 1000])
def test_quantile_beside_special_values(inner, quantile, special):
    """NaN makes all of its sample NaN and of no other. Infinity is a number like others: only a
    quantile between it and itself is none."""
    x = 3 * torch.randn(2, inner)
    x[0, inner // 2] = special
    result = thresholded(x, quantile)
    expected = by_numpy(x, quantile)
    expected[0, inner // 2] = result[0, inner // 2]  # it may be 0 times infinity, that of c_x
    torch.testing.assert_close(result.double(), expected, equal_nan=True, rtol=5e-7, atol=0)
    assert not result[1].isnan().any()
    if special != special:
        assert result[0].isnan().all()


@on_devices
@pytest.mark.parametrize("largest", [1.0, 1.5, 1e30])
def test_threshold_stays_within_its_bounds(largest):
    x = torch.cat((0.01 * torch.randn(1, 500), 30 * torch.randn(1, 500)))
    result = thresholded(x, 0.9, largest)
    torch.testing.assert_close(result.double(), by_numpy(x, 0.9, largest), rtol=5e-7, atol=0)
    assert torch.equal(result[0], x[0]) and result[1].abs().max() == 1


@on_devices
def test_threshold_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(thresholding=True, sample_max_value=2.5)
    x = 3 * torch.randn(3, 4, 13, 17)
    theirs = scheduler._threshold_sample(x)
    torch.testing.assert_close(thresholded(x, 0.995, 2.5), theirs, rtol=1e-6, atol=1e-6)


@on_devices
def test_quantile_is_not_part_of_a_plan():
    """The same signature with other numbers, and with numbers that are none."""
    arguments = Case((2, 50), quantile=0.5).arguments()
    for quantile in (0.5, 0.0, 0.9, 0.0, 1.0):
        check(ops.sampler_step, arguments | {"quantile": quantile, "threshold_max": 4.0})
    for bad, message in (
        ({"quantile": 2.0}, "quantile: expected a number from 0 to 1, got 2.0"),
        ({"quantile": -0.5}, "quantile: expected a number from 0 to 1, got -0.5"),
        ({"quantile": NAN}, "quantile: expected a number from 0 to 1, got nan"),
        ({"threshold_max": 0.5}, "threshold_max: expected a number >= 1, got 0.5"),
        ({"threshold_max": NAN}, "threshold_max: expected a number >= 1, got nan"),
    ):
        for x in (arguments["x"], arguments["x"].double()):
            wide = arguments if x.dtype == torch.float32 else widened(arguments)
            ops.sampler_step(**wide)
            with pytest.raises(ValueError, match=f"^sampler_step: {message}"):
                ops.sampler_step(**wide | bad)


# --- mask -----------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        *(((2, 3, 4, 5), (b, c, 4, 5)) for b in (1, 2) for c in (1, 3)),
        *(((2, 3, 4, 8), (b, c, 4, 8)) for b in (1, 2) for c in (1, 3)),
        ((3,), (1,)),
        ((3,), (3,)),
        ((2, 5), (1, 1)),
        ((2, 5), (2, 1)),
        ((2, 5), (1, 5)),
        ((2, 1100), (2, 1)),
        ((2, 600, 3), (2, 1, 3)),
        ((1, 3, 40, 41), (1, 1, 40, 41)),
        ((2, 4, 32, 32), (2, 1, 32, 32)),
    ],
    ids=str,
)
def test_mask(shape, mask, x_dtype):
    check(ops.sampler_step, Case(shape, x_dtype=x_dtype, mask=mask).arguments())


@on_devices
def test_mask_of_ones_and_of_zeros():
    arguments = Case((2, 3, 40, 41), mask=(1, 1, 40, 41)).arguments()
    unmasked = ops.sampler_step(**arguments | {"mask": None, "known": None})
    ones = ops.sampler_step(**arguments | {"mask": torch.ones(1, 1, 40, 41)})
    assert same_bits(ones, unmasked)
    x_next, history, _ = ops.sampler_step(**arguments | {"mask": torch.zeros(1, 1, 40, 41)})
    assert torch.equal(history, unmasked[1])
    z = _philox.normal(arguments["seeds"], _philox.START, 3 * 40 * 41, torch.float64)
    p_0, p_e = (arguments["table"][3, COLUMNS.index(c)].double() for c in ("p_0", "p_e"))
    expected = p_0 * arguments["known"].double() + p_e * z.view(2, 3, 40, 41)
    torch.testing.assert_close(x_next.double(), expected, rtol=1e-6, atol=2e-6)
