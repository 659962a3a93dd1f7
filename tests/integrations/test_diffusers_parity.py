"""The drop-ins beside diffusers' schedulers: whole trajectories, for every option of the seven."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.integrations.diffusers_cases import Case, distance, run, run_in_float64

# diffusers' own: of numpy and tensors, and of algorithm types in eps
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*deprecated:FutureWarning"),
]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
BOUNDS = (
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.8},
    {"thresholding": True, "sample_max_value": 1.5},
    {"thresholding": True, "sample_max_value": 0.7, "dynamic_thresholding_ratio": 0.9},
    {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.0},
)
TRAINED = {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist()}
RAMPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
GIVEN = {"timesteps": [900, 700, 300, 5]}


def ddim() -> list[Case]:
    steps = ({}, {"eta": 0.5}, {"eta": 1.0, "use_clipped_model_output": True})
    cases = [
        Case("DDIMScheduler", {"prediction_type": p, **bounds}, 10, step)
        for p, bounds, step in itertools.product(PREDICTIONS, BOUNDS, steps)
    ]
    cases += [
        Case("DDIMScheduler", {"timestep_spacing": spacing, "clip_sample": False, **SD}, n)
        for spacing in ("leading", "trailing", "linspace")
        for n in (7, 50)
    ]
    cases += [
        Case("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}),
        Case("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        Case("DDIMScheduler", ZERO_SNR),
        Case("DDIMScheduler", TRAINED),
        Case("DDIMScheduler", {"num_train_timesteps": 100}),
        Case("DDIMScheduler", {"clip_sample": False, **SD}, 1000, {"eta": 1.0}),
    ]
    return cases


def ddpm() -> list[Case]:
    variances = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", None)
    cases = [
        Case("DDPMScheduler", {"prediction_type": p, "variance_type": v}, 10)
        for p, v in itertools.product(PREDICTIONS, variances)
    ]
    cases += [Case("DDPMScheduler", bounds) for bounds in BOUNDS]
    schedules = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
    cases += [Case("DDPMScheduler", {"beta_schedule": s}, 50) for s in schedules]
    spacings = ("leading", "trailing", "linspace")
    cases += [
        Case("DDPMScheduler", {"timestep_spacing": s, "steps_offset": s == "leading"}, 30)
        for s in spacings
    ]
    cases += [
        Case("DDPMScheduler", {}, 1000),
        Case("DDPMScheduler", {}, None, timesteps=GIVEN),
        Case("DDPMScheduler", ZERO_SNR),
        Case("DDPMScheduler", TRAINED),
    ]
    return cases


def euler() -> list[Case]:
    churns = ({}, {"s_churn": 5.0}, {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 5.0, "s_noise": 1.01})
    name = "EulerDiscreteScheduler"
    cases = [
        Case(name, {"prediction_type": p}, 10, churn)
        for p, churn in itertools.product((*PREDICTIONS, "original_sample"), churns)
    ]
    spacings = ("leading", "trailing", "linspace")
    cases += [
        Case(name, {"timestep_spacing": s, "steps_offset": 1}, n)
        for s, n in itertools.product(spacings, (7, 61))
    ]
    cases += [Case(name, {ramp: True, "final_sigmas_type": "sigma_min"}) for ramp in RAMPS]
    continuous = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    cases += [
        Case(name, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}),
        Case(name, {"interpolation_type": "log_linear"}),
        Case(name, {**continuous, "use_karras_sigmas": True}),
        Case(name, ZERO_SNR),
        Case(name, TRAINED),
        Case(name, SD, None, timesteps=GIVEN),
        Case(name, SD, None, timesteps={"sigmas": [10.0, 5.0, 1.0, 0.1, 0.0]}),
        Case(name, {"beta_schedule": "squaredcos_cap_v2"}, begin=5),
    ]
    name = "EulerAncestralDiscreteScheduler"
    cases += [
        Case(name, {"prediction_type": p, **SD}, n)
        for p, n in itertools.product(("epsilon", "v_prediction"), (7, 50))
    ]
    cases += [Case(name, {"timestep_spacing": s, "steps_offset": 1}) for s in spacings]
    cases += [Case(name, {"rescale_betas_zero_snr": True}, begin=4), Case(name, TRAINED)]
    return cases


def lcm() -> list[Case]:
    cases = [
        Case("LCMScheduler", {"prediction_type": p, **bounds}, 4)
        for p, bounds in itertools.product(PREDICTIONS, BOUNDS)
    ]
    cases += [Case("LCMScheduler", {}, n) for n in (1, 8)]
    four = {"timesteps": [999, 759, 499, 259]}
    cases += [
        Case("LCMScheduler", {"timestep_scaling": 1.0, "original_inference_steps": 100}, 4),
        Case("LCMScheduler", {}, None, timesteps=four),
        Case("LCMScheduler", {}, 4, timesteps={"strength": 0.5}),
        Case("LCMScheduler", {}, 4, timesteps={"original_inference_steps": 20}),
        Case("LCMScheduler", {}, 8, begin=3),
        Case("LCMScheduler", {"set_alpha_to_one": False, "beta_schedule": "linear"}, 4),
        Case("LCMScheduler", {**ZERO_SNR, "timestep_spacing": "leading"}, 4),
        # of these only two are taken, and noise is added after the last
        Case("LCMScheduler", {}, None, timesteps={**four, "strength": 0.5}),
    ]
    return cases


def dpm_solver() -> list[Case]:
    name, cases = "DPMSolverMultistepScheduler", []
    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    for algorithm, order in itertools.product(algorithms, (1, 2, 3)):
        if algorithm == "sde-dpmsolver" and order == 3:  # diffusers has no such step
            continue
        final = "zero" if algorithm.endswith("++") else "sigma_min"
        for kind, p in itertools.product(("midpoint", "heun"), PREDICTIONS):
            options = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
            options |= {"prediction_type": p, "final_sigmas_type": final}
            if (algorithm, order, p) != ("sde-dpmsolver", 2, "v_prediction"):
                cases.append(Case(name, options, 10))
        if order > 1 and algorithm != "sde-dpmsolver":
            bounds = {"algorithm_type": algorithm, "solver_order": order, "thresholding": True}
            for largest in (1.5, 0.7):
                options = {**bounds, "final_sigmas_type": final, "sample_max_value": largest}
                cases.append(Case(name, options))
    for n, order in itertools.product((1, 2, 3, 14, 15, 100), (2, 3)):
        cases.append(Case(name, {"solver_order": order, **SD}, n))
    for ramp, final in itertools.product((*RAMPS, "use_lu_lambdas"), ("zero", "sigma_min")):
        cases.append(Case(name, {ramp: True, "final_sigmas_type": final}))
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0}
    for p, final in itertools.product(("epsilon", "sample"), ("zero", "sigma_min")):
        cases.append(Case(name, {**flow, "prediction_type": p, "final_sigmas_type": final}))
    flow["prediction_type"] = "flow_prediction"
    cases += [
        Case(name, flow),
        Case(name, {**flow, "use_dynamic_shifting": True}, timesteps={"mu": 0.7}),
        Case(name, {"solver_order": 3, "euler_at_final": True}),
        Case(name, {"lower_order_final": False}, 10),
        Case(name, {"timestep_spacing": "leading", "steps_offset": 1}, begin=7),
        Case(name, {"timestep_spacing": "trailing", "solver_order": 3}, begin=4),
        Case(name, {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}),
        Case(name, ZERO_SNR),
        Case(name, TRAINED),
        Case(name, {"variance_type": "learned_range"}),
        Case(
            name, {"algorithm_type": "deis", "solver_type": "bh2", "final_sigmas_type": "sigma_min"}
        ),
        Case(name, SD, None, timesteps=GIVEN),
    ]
    return cases


def flow() -> list[Case]:
    name = "FlowMatchEulerDiscreteScheduler"
    shift = {"shift": 3.0}
    options = [{}, shift, {**shift, "stochastic_sampling": True}, {"invert_sigmas": True}]
    options += [{"shift_terminal": 0.1}, *({ramp: True} for ramp in RAMPS)]
    cases = [Case(name, option) for option in options]
    for kind in ("exponential", "linear"):
        dynamic = {"use_dynamic_shifting": True, "time_shift_type": kind}
        cases.append(Case(name, dynamic, timesteps={"mu": 0.7}))
    sigmas = {"sigmas": [1.0, 0.7, 0.2]}
    cases += [
        Case(name, {}, None, timesteps=sigmas),
        Case(name, {}, None, timesteps={**sigmas, "timesteps": [999.0, 600.0, 200.0]}),
        Case(name, {"num_train_timesteps": 500}, 9),
        Case(name, shift, begin=7),
    ]
    return cases


CASES = [*ddim(), *ddpm(), *euler(), *lcm(), *dpm_solver(), *flow()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory_is_diffusers(case):
    """x within 1e-5 of max|x| after every step (of float64, where float32 is not), the other field
    of its own scale, the same numbers drawn, the same dtypes."""
    expected, got = run(case, case.theirs()), run(case, case.ours())
    apart = distance(got.x, expected.x)
    if apart > 1e-5:  # on some processors theirs is further from its own formulas in float64
        exact = run_in_float64(case).x
        assert distance(got.x, exact) <= 1e-5 < distance(expected.x, exact)
        assert apart <= 3e-5
    assert torch.equal(got.drawn, expected.drawn)
    for i, (theirs, ours) in enumerate(zip(expected.x0, got.x0, strict=True)):
        assert (theirs is None) == (ours is None)
        if theirs is None:
            continue
        assert ours.dtype == theirs.dtype
        # float32 leaves x0 what it has of x / alpha, from which it is taken before it is clipped
        before = got.x[i - 1] if i else got.x[0]
        alpha = expected.alphas[i] if expected.alphas else 1.0
        scale = max(theirs.abs().max().item(), before.abs().max().item() / max(alpha, 1e-3))
        assert (ours - theirs).abs().max().item() <= 1e-5 * scale


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_where_diffusers_loses_digits(kind):
    """2e-5 apart from diffusers, whose float32 coefficients lose digits here: of diffusers' own
    formulas in float64 the drop-in is 3e-7 away."""
    options = {"algorithm_type": "sde-dpmsolver", "solver_order": 2, "solver_type": kind}
    options |= {"prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"}
    case = Case("DPMSolverMultistepScheduler", options, 10)
    exact, ours, theirs = run_in_float64(case), run(case, case.ours()), run(case, case.theirs())
    assert distance(ours.x, exact.x) <= 1e-6
    assert distance(theirs.x, exact.x) > 1e-5


def test_every_option_is_in_a_case():
    """Options of the constructors that no case above sets would not be tested."""
    import inspect

    # for pipelines, which make mu of them; Euler's and LCM's that those never read
    unread = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
    for name in {case.name for case in CASES}:
        cases = [case for case in CASES if case.name == name]
        parameters = set(inspect.signature(cases[0].theirs().__class__.__init__).parameters)
        said = set().union(*(case.options for case in cases)) | {"self"} | unread
        elsewhere = set().union(*(case.options for case in CASES)) | {"beta_start", "beta_end"}
        missing = parameters - said
        assert missing <= elsewhere, name  # the levels are diffusers' own for all classes
        steps = set(inspect.signature(cases[0].theirs().step).parameters)
        for case in cases:
            steps -= set(case.step)
        rest = {"model_output", "timestep", "sample", "generator", "return_dict"}
        rest |= {"variance_noise", "per_token_timesteps"}  # of test_diffusers_api
        if name == "FlowMatchEulerDiscreteScheduler":
            rest |= {"s_churn", "s_tmin", "s_tmax", "s_noise"}  # which it does not read
        assert steps <= rest, name
