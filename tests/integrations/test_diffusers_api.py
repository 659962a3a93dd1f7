"""What callers of diffusers' schedulers rely on, and what is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import fields

import pytest
import torch

from fastlora.samplers.options import DEFAULTS
from tests.integrations.diffusers_cases import (
    NAMES,
    SHAPE,
    Case,
    diffusers,
    first_step,
    network,
    pair,
    start,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STATELESS = ["DDIMScheduler", "DDPMScheduler"]


@pytest.mark.parametrize("name", NAMES)
def test_is_the_class_that_it_replaces(name):
    theirs, ours = pair(name)
    assert isinstance(ours, type(theirs)) and ours.replaces is type(theirs)
    assert ours.order == theirs.order and ours._compatibles == theirs._compatibles
    assert dict(ours.config) == dict(theirs.config)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert type(theirs) in ours.compatibles
    for method in ("__init__", "set_timesteps", "step"):
        parameters = [
            [(p.name, p.default, p.kind) for p in signature.parameters.values()]
            for signature in (inspect.signature(getattr(type(s), method)) for s in (theirs, ours))
        ]
        assert parameters[0] == parameters[1], method
    assert set(dir(theirs)) <= set(dir(ours))


@pytest.mark.parametrize("name", NAMES)
def test_all_options_are_known(name):
    theirs, _ = pair(name)
    parameters = set(inspect.signature(type(theirs).__init__).parameters) - {"self"}
    assert parameters <= DEFAULTS[name].keys()


def test_options_that_are_new_are_refused(monkeypatch):
    """A newer diffusers may have some; what they say by default is what was tested."""
    known = {k: v for k, v in DEFAULTS["DDIMScheduler"].items() if k != "steps_offset"}
    monkeypatch.setitem(DEFAULTS, "DDIMScheduler", known)
    assert Case("DDIMScheduler").ours().config.steps_offset == 0
    with pytest.raises(ValueError, match="^FastDDIMScheduler: steps_offset: expected 0, unknown"):
        Case("DDIMScheduler", {"steps_offset": 1}).ours()


@pytest.mark.parametrize("name", NAMES)
def test_output(name):
    outputs = []
    for scheduler in pair(name):
        results = []
        for return_dict in (True, False):
            scheduler.set_timesteps(4)
            generator = torch.Generator().manual_seed(0)
            results.append(first_step(scheduler, generator=generator, return_dict=return_dict))
        outputs.append(results)
    (theirs_dict, theirs_tuple), (ours_dict, ours_tuple) = outputs
    assert type(ours_dict) is type(theirs_dict)
    assert type(ours_tuple) is tuple and len(ours_tuple) == len(theirs_tuple)
    for field in fields(theirs_dict):
        torch.testing.assert_close(ours_dict[field.name], theirs_dict[field.name])
    for value, expected in zip(ours_tuple, theirs_tuple, strict=True):
        torch.testing.assert_close(value, expected)
    for value, expected in zip(ours_tuple, ours_dict.values(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtypes", [(a, b) for a in "fhbd" for b in "fhbd"], ids="".join)
def test_dtypes(name, dtypes):
    """The result has the dtype that diffusers gives it, also for mixed ones."""
    letters = {"f": torch.float32, "h": torch.float16, "b": torch.bfloat16, "d": torch.float64}
    sample, output = (letters[d] for d in dtypes)
    results = []
    for scheduler in pair(name):
        x, t = start().to(sample), scheduler.timesteps[0]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        results.append(scheduler.step(network(start(), t).to(output), t, x, return_dict=False)[0])
    assert results[1].dtype == results[0].dtype
    assert results[1].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 3, 4, 5, 6), (2, 7, 4), (1, 1)], ids=str)
def test_shapes(name, shape):
    """Videos, tokens, odd sizes, and strides as they come."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).transpose(0, -1)
    results = []
    for scheduler in pair(name):
        generator = torch.Generator().manual_seed(0)
        results.append(first_step(scheduler, x, generator=generator).prev_sample)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize(
    "kind",
    [int, float, torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor(t).int()],
    ids=["int", "float", "tensor", "[1]", "int32"],
)
def test_kinds_of_timesteps_where_any_may_be_given(name, kind):
    _, ours = pair(name, 10)
    x = start()
    listed = ours.timesteps[3]
    generator = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected = ours.step(network(x, 5), listed, x, generator=generator[0]).prev_sample
    got = ours.step(network(x, 5), kind(listed.item()), x, generator=generator[1]).prev_sample
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_kinds_of_timesteps_where_steps_are_counted(name, kind):
    theirs, ours = pair(name, 10)
    x, t = start(), kind(theirs.timesteps[3].item())
    results = []
    for scheduler in (theirs, ours):
        scheduler.scale_model_input(x, t)
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(network(x, 5), t, x, generator=generator).prev_sample)
        assert scheduler.step_index == 4
    torch.testing.assert_close(results[1], results[0])


def test_ddim_from_a_timestep_that_is_not_listed():
    theirs, ours = pair("DDIMScheduler", 10)
    x = start()
    expected = theirs.step(network(x, 5), 333, x).prev_sample
    torch.testing.assert_close(ours.step(network(x, 5), 333, x).prev_sample, expected)


def test_elements_are_known_by_their_places():
    """So that timesteps on a GPU need not be read there."""
    from fastlora.integrations.diffusers.base import nth, place_of

    timesteps = torch.tensor([30, 20, 10, 0])
    assert [place_of(t, timesteps) for t in timesteps] == [0, 1, 2, 3]
    assert [place_of(t, timesteps) for t in timesteps[2:]] == [2, 3]
    assert place_of(timesteps[1:2], timesteps) == 1
    assert place_of(timesteps[1].clone(), timesteps) is None
    assert place_of(timesteps[1].int(), timesteps) is None
    assert place_of(torch.tensor([40, *timesteps.tolist()])[2], timesteps) is None
    assert place_of(timesteps[0], timesteps[1:]) is None  # before its first
    scheduler = Case("EulerDiscreteScheduler").theirs()
    for listed in ([30.0, 20.0, 10.0], [30.0, 20.0, 20.0, 20.0, 10.0]):
        assert [nth(t, listed) for t in listed] == [
            scheduler.index_for_timestep(t, torch.tensor(listed)) for t in listed
        ]


def test_lcm_with_another_timestep_than_is_due():
    theirs, ours = pair("LCMScheduler")
    x = start()
    results = []
    for scheduler in (theirs, ours):
        generator = torch.Generator().manual_seed(0)
        scheduler.set_begin_index(1)
        results.append(scheduler.step(network(x, 5), 500, x, generator=generator))
    torch.testing.assert_close(results[1].prev_sample, results[0].prev_sample)
    torch.testing.assert_close(results[1].denoised, results[0].denoised)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("several", [False, True], ids=["one generator", "a list"])
def test_generators(name, several):
    options = {"DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"}}
    options["FlowMatchEulerDiscreteScheduler"] = {"stochastic_sampling": True}
    results = []
    for scheduler in pair(name, **options.get(name, {})):
        seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
        arguments = {"eta": 1.0} if name == "DDIMScheduler" else {}
        arguments |= {"s_churn": 3.0} if name == "EulerDiscreteScheduler" else {}
        generator = seeds if several else seeds[0]
        x = first_step(scheduler, generator=generator, **arguments).prev_sample
        results.append((x, seeds[0].get_state(), seeds[1].get_state()))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1]) and torch.equal(results[1][2], results[0][2])
    untouched = torch.Generator().manual_seed(1).get_state()
    assert not torch.equal(results[1][1], untouched)  # something was drawn


@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 8, 8)], ids=["whole", "broadcast"])
def test_variance_noise(shape):
    noise = torch.randn(shape)
    for name, options, arguments in (
        ("DDIMScheduler", {}, {"eta": 1.0}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ):
        theirs, ours = pair(name, **options)
        expected = first_step(theirs, variance_noise=noise, **arguments).prev_sample
        got = first_step(ours, variance_noise=noise, **arguments).prev_sample
        torch.testing.assert_close(got, expected)
    _, ours = pair("DDIMScheduler")
    with pytest.raises(ValueError, match="variance_noise: expected none beside a generator"):
        first_step(ours, eta=1.0, variance_noise=noise, generator=torch.Generator())


def test_per_token_timesteps_are_diffusers_own():
    theirs, ours = pair("FlowMatchEulerDiscreteScheduler")
    x = torch.randn(2, 5, 3)
    tokens = torch.tensor([[1000.0, 500.0, 250.0, 1000.0, 10.0]]).expand(2, -1)
    results = [
        s.step(network(x, 5), s.timesteps[0], x, per_token_timesteps=tokens).prev_sample
        for s in (theirs, ours)
    ]
    assert torch.equal(results[1], results[0])
    assert ours.step_index == 1


@pytest.mark.parametrize("name", NAMES)
def test_save_load_and_copies(name, tmp_path):
    _, ours = pair(name)
    expected = first_step(ours, generator=torch.Generator().manual_seed(0)).prev_sample
    ours.save_pretrained(tmp_path)
    assert f'"_class_name": "{name}"' in (tmp_path / "scheduler_config.json").read_text()
    theirs = getattr(diffusers, name).from_pretrained(tmp_path)
    assert {k: v for k, v in theirs.config.items() if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }
    copies = [type(ours).from_pretrained(tmp_path), type(ours).from_config(theirs.config)]
    copies += [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for other in copies:
        assert type(other) is type(ours)
        other.set_timesteps(4)
        got = first_step(other, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_from_the_configuration_of_another_class(name):
    """Of every class that diffusers calls compatible, as people switch them."""
    for other in NAMES[:-2]:
        if name != "FlowMatchEulerDiscreteScheduler":
            config = getattr(diffusers, other)(beta_end=0.015).config
            ours = Case(name).ours().from_config(config)
            assert ours.config.beta_end == 0.015


@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_velocity(name):
    theirs, ours = pair(name)
    x, noise, t = start(), torch.randn(SHAPE), theirs.timesteps[:2]
    for method in ("add_noise", "get_velocity", "scale_noise"):
        if hasattr(theirs, method):
            arguments = (x, t, noise) if method == "scale_noise" else (x, noise, t)
            expected = getattr(theirs, method)(*arguments)
            assert torch.equal(getattr(ours, method)(*arguments), expected)


@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"],
)
@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "written to"])
def test_levels_that_somebody_changes(name, in_place):
    """Tables follow sigmas that are set or written to after set_timesteps."""
    results = []
    for scheduler in pair(name, 6):
        first_step(scheduler)
        if in_place:
            scheduler.sigmas.mul_(0.9)
        else:
            scheduler.sigmas = scheduler.sigmas * 0.9
        x, t = start(), scheduler.timesteps[1]
        results.append(scheduler.step(network(x, t), t, x).prev_sample)
    torch.testing.assert_close(results[1], results[0])


def test_levels_are_only_read():
    for final in ("zero", "sigma_min"):
        options = {"use_karras_sigmas": True, "final_sigmas_type": final}
        _, ours = pair("DPMSolverMultistepScheduler", **options)
        ours.sigmas = ours.sigmas.double()
        before = ours.sigmas.clone()
        first_step(ours)
        assert torch.equal(ours.sigmas, before)


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_inference_mode_serve_gradients(name):
    with torch.inference_mode():
        _, ours = pair(name)
        first_step(ours)
    x = start().requires_grad_()
    t = ours.timesteps[1]
    (gradient,) = torch.autograd.grad(ours.step(network(x, t), t, x).prev_sample.sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_options_that_somebody_changes():
    theirs, ours = pair("DDIMScheduler")
    for scheduler in (theirs, ours):
        first_step(scheduler)
        scheduler.register_to_config(prediction_type="v_prediction")
    torch.testing.assert_close(first_step(ours).prev_sample, first_step(theirs).prev_sample)


def test_dpm_solver_looks_back_on_model_outputs():
    """Who writes to that list, as LEDITS++ does, changes what the next step looks back on."""
    results = []
    for scheduler in pair("DPMSolverMultistepScheduler", 20, solver_order=3):
        x = start()
        for i, t in enumerate(scheduler.timesteps[:6]):
            if i == 4:
                scheduler.model_outputs[-1] = scheduler.model_outputs[-1] * 0.9
            x = scheduler.step(network(x, t), t, x).prev_sample
        results.append((x, *scheduler.model_outputs))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    untouched = pair("DPMSolverMultistepScheduler", 20, solver_order=3)[1]
    x = start()
    for t in untouched.timesteps[:6]:
        x = untouched.step(network(x, t), t, x).prev_sample
    assert (x - results[1][0]).abs().max() > 0.01


def test_gradients_reach_sample_and_output():
    """Guidance differentiates the predicted x0."""
    gradients = []
    for scheduler in pair("DDIMScheduler", clip_sample=False):
        x = start().requires_grad_()
        output = network(start(), 5).requires_grad_()
        step = scheduler.step(output, scheduler.timesteps[0], x)
        loss = (step.prev_sample**2).sum() + (step.pred_original_sample**2).sum()
        gradients.append(torch.autograd.grad(loss, (x, output)))
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_trailing_timesteps_below_zero_are_left_out():
    """diffusers lists -1 after 61 steps of 1000, and steps from there as from the noisiest one."""
    theirs, ours = pair("DDIMScheduler", 61, timestep_spacing="trailing")
    assert theirs.timesteps[-1] == -1
    assert torch.equal(ours.timesteps, theirs.timesteps[:-1])


def test_levels_that_repeat():
    """1000 steps of DPM-Solver list one timestep twice: diffusers' next step is 0 * inf. Here the
    step that looks back over it says so, and those before are diffusers'."""
    theirs, ours = pair("DPMSolverMultistepScheduler", 1000)
    repeats = (theirs.sigmas[1:] == theirs.sigmas[:-1]).nonzero().flatten().tolist()
    assert repeats
    x = start()
    expected = [s.step(network(x, 5), s.timesteps[0], x).prev_sample for s in (theirs, ours)]
    torch.testing.assert_close(expected[1], expected[0])
    ours.set_timesteps(1000)
    ours.set_begin_index(repeats[0])
    for _ in range(1):
        y = ours.step(network(x, 5), ours.timesteps[repeats[0]], x).prev_sample
        torch.testing.assert_close(y, x)
    with pytest.raises(ValueError, match="timestep: expected a step index .* other levels"):
        ours.step(network(x, 5), ours.timesteps[repeats[0] + 1], x)
