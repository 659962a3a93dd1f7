"""Tables from diffusers' configurations: every option of every class, over whole trajectories."""

import inspect

import numpy as np
import pytest

from fastlora.samplers.config import ARGUMENTS
from fastlora.samplers.config_grids import GRIDS
from fastlora.samplers.options import DEFAULTS
from tests.samplers.diffusers_parity import compare

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}
SAMPLE, TRAILING = {"prediction_type": "sample"}, {"timestep_spacing": "trailing"}
UNCLIPPED = {"clip_sample": False}
THRESHOLD = {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9}
MIN = {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LINEAR, LOGISTIC = {"beta_schedule": "linear"}, {"beta_schedule": "sigmoid"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
TRAINED = {"trained_betas": [0.001 + 0.0003 * i for i in range(50)], "num_train_timesteps": 50}

BETAS = [
    LINEAR,
    COSINE,
    TRAINED,
    {"num_train_timesteps": 300},
    {"beta_start": 1e-4},
    {"beta_end": 0.03},
]
SPACINGS = [
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    TRAILING,
    {"timestep_spacing": "linspace"},
]
RAMPS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
LIMITS = [r | {"sigma_min": 0.1, "sigma_max": 10.0} for r in RAMPS]
ALPHA_ONE = [{"set_alpha_to_one": False}]
CLIPS = [UNCLIPPED, {"clip_sample_range": 0.7}, THRESHOLD]
SNR_ZERO = ZERO | TRAILING

CONFIGS = {
    "DDIMScheduler": [*BETAS, *SPACINGS, *CLIPS, *ALPHA_ONE, V, SAMPLE, SNR_ZERO | V | UNCLIPPED],
    "DDPMScheduler": [
        *BETAS,
        *SPACINGS,
        *CLIPS,
        *(LOGISTIC, {"beta_schedule": "laplace"}, V, SAMPLE, SNR_ZERO | V | UNCLIPPED),
        *({"variance_type": kind} | UNCLIPPED for kind in ("fixed_small_log", "fixed_large")),
        {"variance_type": "fixed_large"} | TRAILING,
    ],
    "DDIMInverseScheduler": [
        *BETAS,
        *SPACINGS[:3],
        *CLIPS[:2],
        *(*ALPHA_ONE, V, SAMPLE | ALPHA_ONE[0], ZERO | V | UNCLIPPED),
    ],
    "EulerDiscreteScheduler": [
        *BETAS,
        *SPACINGS,
        *RAMPS,
        *LIMITS,
        *(V, SAMPLE, SNR_ZERO, SNR_ZERO | V, MIN, MIN | RAMPS[0]),
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear"} | RAMPS[0],
        {"timestep_type": "continuous"} | V,
        {"timestep_type": "continuous"},  # counts for v prediction only
        {"prediction_type": "original_sample"},
    ],
    "EulerAncestralDiscreteScheduler": [*BETAS, *SPACINGS, V, SNR_ZERO, SNR_ZERO | V],
    "HeunDiscreteScheduler": [
        *(o for o in BETAS if o != COSINE),  # from sigma = 20000 on: x, and its rounding, is huge
        *SPACINGS,
        *RAMPS,
        *LIMITS,
        *(V, SAMPLE, {"beta_schedule": "exp"}),
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.7} | V,
    ],
    "DPMSolverMultistepScheduler": [
        *BETAS,
        *SPACINGS,
        *RAMPS,
        *LIMITS,
        *(V, SAMPLE, THRESHOLD, MIN, SNR_ZERO, SNR_ZERO | V),
        *({"solver_order": order} for order in (1, 3)),
        *({"algorithm_type": "sde-dpmsolver++", "solver_order": order} for order in (1, 2, 3)),
        *({"algorithm_type": "dpmsolver", "solver_order": order} | MIN for order in (1, 2, 3)),
        *({"algorithm_type": "sde-dpmsolver", "solver_order": order} | MIN for order in (1, 2)),
        *(
            {"algorithm_type": algorithm, "solver_type": "heun"} | MIN
            for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        ),
        *({"algorithm_type": "dpmsolver"} | MIN | o for o in (V, SAMPLE, THRESHOLD)),
        {"lower_order_final": False} | MIN,
        {"lower_order_final": False, "solver_order": 3} | MIN,
        {"euler_at_final": True, "lower_order_final": False} | MIN,
        {"use_lu_lambdas": True},
        {"use_lu_lambdas": True} | COSINE,
        {"use_karras_sigmas": True} | COSINE,
        {"lambda_min_clipped": -5.1} | COSINE,
        {"lambda_min_clipped": -1.5, "timestep_spacing": "leading"},
        {"lambda_min_clipped": -1.5, "timestep_spacing": "trailing"},
        FLOW,
        FLOW | {"flow_shift": 3.0},
        FLOW | {"prediction_type": "epsilon"},
        {"algorithm_type": "deis", "solver_type": "logrho"} | MIN,
    ],
    "LCMScheduler": [
        *BETAS[:2],
        *BETAS[3:],
        *({"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.7}, THRESHOLD),
        *(*ALPHA_ONE, V, SAMPLE, ZERO | V),
        *({"original_inference_steps": 100}, {"timestep_scaling": 0.1}),
    ],
    "FlowMatchEulerDiscreteScheduler": [
        *({}, {"shift": 3.0}, {"num_train_timesteps": 300}, {"stochastic_sampling": True}),
        *({"shift_terminal": 0.1}, {"invert_sigmas": True}, {"invert_sigmas": True, "shift": 3.0}),
        *RAMPS,
        *(r | {"sigma_min": 0.1, "sigma_max": 0.9} for r in RAMPS),
    ],
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 3.0}, {"num_train_timesteps": 300}],
    "UniPCMultistepScheduler": [
        *BETAS,
        *SPACINGS,
        *RAMPS,
        *LIMITS,
        *(V, SAMPLE, THRESHOLD, MIN, SNR_ZERO, SNR_ZERO | V, MIN | RAMPS[0], MIN | RAMPS[1]),
        {"solver_order": 1},
        *({"solver_type": "bh1", "solver_order": order} | MIN for order in (1, 2)),
        *({"predict_x0": False} | MIN | o for o in ({}, V, SAMPLE, {"solver_type": "bh1"})),
        {"lower_order_final": False} | MIN,
        {"disable_corrector": [0, 3]},
        FLOW,
        FLOW | {"flow_shift": 3.0},
        FLOW | {"prediction_type": "epsilon"},
        FLOW | {"shift_terminal": 0.1},
        FLOW | MIN,
        FLOW | RAMPS[0],
        {"solver_type": "midpoint"},
    ],
}


def label(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    short = {k: v for k, v in value.items() if k not in ("trained_betas",)}
    return ",".join(f"{k}={v}" for k, v in short.items()) or "default"


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, several in CONFIGS.items() for options in several],
    ids=label,
)
def test_trajectory(name, options):
    base = {} if name.startswith("Flow") else SD
    steps = {"LCMScheduler": 4, "DPMSolverMultistepScheduler": 16}.get(name, 9)
    compare(name, base | options, steps)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(name, steps):
    compare(name, {} if name.startswith("Flow") else SD, steps)


@pytest.mark.parametrize("options", [{}, THRESHOLD, V, SAMPLE, TRAILING], ids=label)
@pytest.mark.parametrize(("eta", "rederive"), [(0.0, True), (0.5, False), (1.0, True)])
def test_arguments_of_ddim(options, eta, rederive):
    compare("DDIMScheduler", SD | options, 9, eta=eta, rederive=rederive)


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("DDPMScheduler", {}, {"timesteps": [999, 400, 30]}),
        ("LCMScheduler", {}, {"timesteps": [999, 499, 259, 19]}),
        ("EulerDiscreteScheduler", {}, {"timesteps": [999, 400, 30]}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, {"timesteps": [999, 400, 30]}),
        ("EulerDiscreteScheduler", {}, {"sigmas": [14.0, 3.2, 0.7, 0.0]}),
        ("EulerDiscreteScheduler", {}, {"sigmas": [14.0, 3.2, 0.7, 0.1]}),
        ("HeunDiscreteScheduler", {}, {"timesteps": [999, 400, 30]}),
        ("HeunDiscreteScheduler", COSINE, {"timesteps": [900, 400, 30]}),
        ("DPMSolverMultistepScheduler", {}, {"timesteps": [999, 800, 400, 30]}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": [1.0, 0.6, 0.1]}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"timesteps": [999.0, 600.0, 100.0]}),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"shift": 3.0},
            {"timesteps": [999.0, 600.0, 100.0], "sigmas": [1.0, 0.5, 0.2]},
        ),
        ("UniPCMultistepScheduler", FLOW, {"sigmas": np.array([0.99, 0.6, 0.3, 0.1])}),
    ],
    ids=label,
)
def test_lists(name, options, arguments):
    compare(name, ({} if name.startswith("Flow") else SD) | options, **arguments)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
        ("UniPCMultistepScheduler", FLOW),
    ],
    ids=label,
)
def test_dynamic_shift(name, options, kind):
    options = options | {"use_dynamic_shifting": True, "time_shift_type": kind}
    compare(name, options, 9, mu=1.15)


def test_dynamic_shift_of_dpm_solver():
    compare("DPMSolverMultistepScheduler", SD | FLOW | {"use_dynamic_shifting": True}, 9, mu=1.15)


def test_mu_is_for_dynamic_shifting():
    """Pipelines pass it always."""
    compare("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 9, mu=1.15)


@pytest.mark.parametrize(
    ("name", "options", "begin"),
    [
        ("EulerDiscreteScheduler", {}, 4),
        ("EulerAncestralDiscreteScheduler", {}, 4),
        ("HeunDiscreteScheduler", {}, 4),
        ("DPMSolverMultistepScheduler", {}, 4),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, 8),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 4),
        ("LCMScheduler", {}, 2),
        ("FlowMatchEulerDiscreteScheduler", {}, 4),
        ("UniPCMultistepScheduler", {}, 4),
    ],
    ids=label,
)
def test_begin(name, options, begin):
    compare(name, {} if name.startswith("Flow") else SD | options, 10, begin=begin)


# --- what a configuration may say ----------------------------------------------------------------


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    theirs = {
        option: parameter.default
        for option, parameter in inspect.signature(
            getattr(diffusers, name).__init__
        ).parameters.items()
        if option not in ("self", "kwargs")
    }
    # read by the classes without being listed: limits of ramps, and a name of before
    unlisted = {"sigma_min", "sigma_max", "set_alpha_to_zero"}
    ours = {k: v for k, v in DEFAULTS[name].items() if k in theirs or k not in unlisted}
    assert ours == theirs


def test_every_class_and_option_is_tried():
    """With another value than its default; what is not here has its reason."""
    assert set(CONFIGS) == set(DEFAULTS) == set(GRIDS) == set(ARGUMENTS)
    elsewhere = {  # other tests, or nothing that a trajectory could show
        *("variance_type", "solver_p", "time_shift_type", "use_dynamic_shifting"),
        *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
        "set_alpha_to_zero",
    }
    for name, several in CONFIGS.items():
        base = {} if name.startswith("Flow") else SD
        tried = {
            option
            for options in several
            for option, value in (base | options).items()
            if value != DEFAULTS[name][option]
        }
        missing = set(DEFAULTS[name]) - tried - elsewhere
        if name == "LCMScheduler":  # never reads the first two; is distilled on 50 of its timesteps
            missing -= {"timestep_spacing", "steps_offset", "trained_betas", "beta_schedule"}
        assert not missing, name
