"""Continuous grids and SDEs: beside diffusers, the equations that they solve, their ends."""

import math

import pytest
import torch

from fastlora.samplers import Grid, Schedule, sample
from fastlora.samplers.continuous import cosine_log_snr, geometric, karras, linear_log_snr
from fastlora.samplers.sde import SDE, VE, VP, SubVP
from fastlora.samplers.solvers.log_snr_ancestral import log_snr_ancestral

EXPLODING = [karras, geometric]
LOG_SNR = [cosine_log_snr, linear_log_snr]
SDES = [VE(), VP(), SubVP(), VE(0.1, 5.0), VP(0.2, 9.0), SubVP(0.2, 9.0)]


def named(values):
    return pytest.mark.parametrize("make", values, ids=lambda make: make.__name__)


each_sde = pytest.mark.parametrize("sde", SDES, ids=str)


@pytest.mark.parametrize("steps", [2, 10, 40])
def test_karras_like_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(steps)
    grid = karras(steps)
    levels = torch.cat((grid.sigma, grid.sigma_next[-1:]))
    torch.testing.assert_close(levels, scheduler.sigmas.double(), rtol=1e-5, atol=0)


def test_geometric_like_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_sigmas(100)
    expected = scheduler.discrete_sigmas.flip(0).double()
    torch.testing.assert_close(geometric(100).sigma, expected, rtol=1e-5, atol=0)


def test_published_levels():
    """NCSNv2: 232 levels from 50 to 0.01, neighbours a factor of 0.9638 apart."""
    ratio = geometric(232).sigma[1:] / geometric(232).sigma[:-1]
    torch.testing.assert_close(ratio, torch.full((231,), (0.01 / 50) ** (1 / 231)).double())


@named(EXPLODING)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_exploding_levels(make, steps):
    for clean in (True, False):
        grid = make(steps, 0.05, 20.0, clean=clean)
        assert len(grid) == steps and grid.init_noise_sigma == grid.sigma[0] == 20.0
        assert grid.sigma_next[-1] == (0.0 if clean else 0.05)  # to the last bit
        assert grid.sigma[-1] == 0.05 or steps == 1 or not clean
        assert bool((grid.sigma_next < grid.sigma).all() and (grid.alpha == 1).all())
        assert torch.equal(grid.timesteps, grid.sigma) and torch.equal(grid.alpha_next, grid.alpha)
        assert torch.equal(grid.sigma[1:], grid.sigma_next[:-1])


@named(LOG_SNR)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_log_snr_levels(make, steps):
    for clean in (True, False):
        grid = make(steps, -15.0, 18.0, clean=clean)
        assert len(grid) == steps and grid.init_noise_sigma == 1
        assert grid.timesteps[0] == -15.0 and bool((grid.timesteps.diff() > 0).all())
        log_snr = 2 * grid.half_log_snr
        torch.testing.assert_close(log_snr, grid.timesteps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grid.alpha**2 + grid.sigma**2, torch.ones(steps).double())
        last = grid.alpha_next[-1].item(), grid.sigma_next[-1].item()
        assert last == (1.0, 0.0) or not clean
        assert clean or 2 * math.log(last[0] / last[1]) == pytest.approx(18, abs=1e-6)


def test_cosine_is_the_cosine():
    """alpha = cos(a u + b) at evenly spaced u; without limits on lambda the angle is pi u / 2."""
    grid = cosine_log_snr(101, -60.0, 60.0)
    u = torch.linspace(1, 0, 101, dtype=torch.float64)
    torch.testing.assert_close(grid.alpha, (u * math.pi / 2).cos(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grid.sigma, (u * math.pi / 2).sin(), rtol=0, atol=1e-12)
    angle = cosine_log_snr(50).alpha.acos()  # 20: the angles are even all the same
    torch.testing.assert_close(angle.diff(), angle.diff().mean().expand(49), rtol=1e-7, atol=0)


def test_linear_is_even():
    assert linear_log_snr(41).timesteps.tolist() == pytest.approx(list(range(-20, 21)))


@each_sde
def test_marginals_solve_the_equation(sde):
    """d alpha/dt = f alpha, and d sigma^2/dt = 2 f sigma^2 + g^2, by autograd."""
    t = torch.linspace(0.001, 1, 97, dtype=torch.float64).requires_grad_()
    alpha, square = sde.alpha(t), sde.sigma(t) ** 2
    (d_alpha,) = torch.autograd.grad(alpha.sum() + 0 * t.sum(), t, retain_graph=True)
    (d_square,) = torch.autograd.grad(square.sum(), t)
    torch.testing.assert_close(d_alpha, (sde.drift(t) * alpha).detach(), rtol=1e-12, atol=1e-14)
    right = 2 * sde.drift(t) * square + sde.diffusion(t) ** 2
    torch.testing.assert_close(d_square, right.detach(), rtol=1e-11, atol=1e-13)


@each_sde
def test_sde_levels(sde):
    t = sde.times(10, 0.01)
    assert t[0] == 1 and t[-1] == 0.01 and len(t) == 10
    grid = sde.grid(10, 0.01)
    assert torch.equal(grid.alpha, sde.alpha(t)) and torch.equal(grid.sigma, sde.sigma(t))
    assert grid.alpha_next[-1] == 1 and grid.sigma_next[-1] == 0
    assert torch.equal(grid.timesteps, sde.sigma(t) if isinstance(sde, VE) else t)
    assert grid.init_noise_sigma == (sde.sigma_max if isinstance(sde, VE) else 1)
    arrives = sde.grid(10, 0.01, clean=False)
    assert len(arrives) == 10 and arrives.sigma_next[-1] == grid.sigma[-1]
    assert arrives.alpha_next[-1] == grid.alpha[-1]


def test_marginals_of_the_paper():
    """VE: geometric from 0.01 to 50. VP: DDPM's linear betas, continued. Sub-VP: its variance is
    the square of that of VP."""
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = torch.tensor([0.01, 0.0840896, 0.7071068, 5.9460356, 50.0]).double()
    torch.testing.assert_close(VE().sigma(u), expected, rtol=1e-6, atol=0)
    t = torch.arange(1, 1001).double() / 1000
    discrete = Schedule.linear().alphas_cumprod.log()
    torch.testing.assert_close(2 * VP().alpha(t).log(), discrete, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(SubVP().sigma(t), VP().sigma(t) ** 2, rtol=1e-12, atol=0)
    assert torch.equal(SubVP().alpha(t), VP().alpha(t))


@pytest.mark.parametrize("grid", [karras(3), VP().grid(3), linear_log_snr(3)], ids=len)
def test_what_the_model_is_told(grid):
    """The numbers of `timesteps`, as floats."""
    told = []

    def model(x, t, cond):
        told.append(t.tolist())
        return x

    sample(model, log_snr_ancestral(grid, v=0.0), torch.ones(2, 1), seeds=[1, 2], progress=False)
    expected = [[t, t] for t in grid.timesteps.tolist()]
    assert len(told) == 3
    for given, exact in zip(told, expected, strict=True):
        assert given == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: karras(0), "karras: steps: expected an int >= 1, got 0"),
        (lambda: karras(2.5), "karras: steps: expected an int >= 1, got 2.5"),
        (lambda: karras(5, sigma_min=0), "karras: sigma_min: expected a number > 0, got 0"),
        (lambda: karras(5, 2.0, 1.0), "karras: sigma_max: expected a number above sigma_min = 2.0"),
        (lambda: karras(5, sigma_max=math.inf), "karras: sigma_max: .*, got inf"),
        (lambda: karras(5, rho=0), "karras: rho: expected a number > 0, got 0"),
        (lambda: karras(5, rho=math.nan), "karras: rho: expected a number > 0, got nan"),
        (lambda: geometric(True), "geometric: steps: expected an int >= 1, got True"),
        (lambda: geometric(5, "a"), "geometric: sigma_min: expected a number > 0, got 'a'"),
        (lambda: linear_log_snr(5, 20, -20), "linear_log_snr: log_snr_min: .* within ±700, got 20"),
        (lambda: cosine_log_snr(5, -800), "cosine_log_snr: log_snr_min: .* got -800 and 20.0"),
        (lambda: VE(50.0, 0.01), "VE: sigma_max: expected a number above sigma_min = 50.0"),
        (lambda: VP(beta_min=-1.0), "VP: beta_min: expected a number > 0, got -1.0"),
        (lambda: SubVP(beta_max=0.05), "SubVP: beta_max: expected a number above beta_min = 0.1"),
        (lambda: VP().grid(0), "VP: steps: expected an int >= 1, got 0"),
        (lambda: VE().grid(5, 0.0), r"VE: end: expected a number in \(0, 1\), got 0.0"),
        (lambda: SubVP().grid(5, 1.0), r"SubVP: end: expected a number in \(0, 1\), got 1.0"),
    ],
    ids=range(17),
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_grids_are_grids():
    assert isinstance(karras(3), Grid) and isinstance(VP().grid(3), Grid)
    assert isinstance(VE(), SDE) and len(VE().grid(7)) == 7
