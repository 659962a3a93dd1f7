"""`sample` and `sample_steps`: guidance, seeds, dtypes, and what they refuse."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import Schedule, ddim, sample, samplers
from fastlora.samplers import noise, sample_steps
from fastlora.samplers.table import Table

SHAPE = (3, 4, 4)


def network(x, t, cond):
    shift = 0 if cond is None else cond.view(-1, 1, 1, 1)
    return 0.5 * (x + shift + t.view(-1, 1, 1, 1) * 0.001).sin()


def quiet(model, table, x, *args, **options):
    return sample(model, table, x, *args, progress=False, **options)


def test_steps_end_in_the_sample():
    table, x = ddim(Schedule.cosine(), 7), noise([1, 2], SHAPE)
    steps = list(sample_steps(network, table, x))
    assert [s.index for s in steps] == list(range(7))
    assert [s.timestep for s in steps] == table.timesteps.tolist()
    assert torch.equal(steps[-1].x, quiet(network, table, x))
    assert len({s.x.data_ptr() for s in steps}) == 7  # each step's own, not one overwritten buffer


@pytest.mark.parametrize("table", [ddim(Schedule.cosine(), 5), samplers.heun(Schedule.linear(), 3)])
def test_steps_are_their_own(table):
    """Whoever writes into a step's x, and a model that uses its output's memory again, disturb
    neither the sampling nor a preview."""
    buffer = torch.empty(2, *SHAPE)

    def reusing(x, t, cond):
        return buffer.copy_(network(x, t, cond))

    x = noise([1, 2], SHAPE)
    expected = [(s.x, s.x0()) for s in sample_steps(network, table, x)]
    steps = []
    for step, (there, _) in zip(sample_steps(reusing, table, x), expected, strict=True):
        assert torch.equal(step.x, there)
        step.x.zero_()
        steps.append(step)
    for step, (_, clean) in zip(steps, expected, strict=True):
        assert torch.equal(step.x0(), clean)


def test_the_model_runs_only_as_far_as_one_looks():
    calls = []

    def model(x, t, cond):
        calls.append(t.tolist())
        return x

    steps = sample_steps(model, ddim(Schedule.cosine(), 10), noise([1, 2], SHAPE))
    assert calls == []
    next(steps)
    next(steps)
    assert calls == [[900, 900], [800, 800]]


def test_one_call_a_step_on_the_doubled_batch():
    seen = []

    def model(x, t, cond):
        seen.append((x.shape, t.dtype, t.shape, cond.tolist()))
        assert torch.equal(x[:2], x[2:])
        return network(x, t, cond)

    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])
    quiet(model, ddim(Schedule.cosine(), 4), noise([1, 2], SHAPE), cond, uncond, 3.0)
    assert seen == [((4, *SHAPE), torch.int64, (4,), [1.0, 2.0, 0.0, -1.0])] * 4


def test_guidance_is_extrapolation():
    """The doubled call is the same as a model that evaluates both and combines them itself."""
    table, x = ddim(Schedule.cosine(), 9), noise([1, 2], SHAPE)
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])

    def combined(x, t, cond):
        c, u = network(x, t, cond), network(x, t, uncond)
        return u + 2.5 * (c - u)

    expected = quiet(combined, table, x, cond)
    samples = quiet(network, table, x, cond, uncond, 2.5)
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [4.0, torch.tensor(4.0), torch.tensor([4.0])], ids=repr)
def test_guidance_scale_forms(scale):
    table, x = ddim(Schedule.cosine(), 3), noise([1, 2], SHAPE)
    cond, uncond = torch.ones(2), torch.zeros(2)
    expected = quiet(network, table, x, cond, uncond, torch.tensor([4.0, 4.0]))
    assert torch.equal(quiet(network, table, x, cond, uncond, scale), expected)


def test_guidance_per_sample():
    table, x = ddim(Schedule.cosine(), 5), noise([1, 2, 3], SHAPE)
    cond, uncond, scales = torch.arange(3.0), torch.zeros(3), torch.tensor([0.0, 1.0, 7.5])
    batch = quiet(network, table, x, cond, uncond, scales)
    for b, scale in enumerate(scales.tolist()):
        one = slice(b, b + 1)
        alone = quiet(network, table, x[one], cond[one], uncond[one], scale)
        torch.testing.assert_close(alone, batch[one])


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "plain"])
def test_batch_equals_singles_bit_for_bit(guided):
    """Noise comes from the sample's seed alone (the network here is element-wise)."""
    table, seeds = ddim(Schedule.cosine(), 6, eta=1.0), [11, -5, 2**62]
    x, cond = noise(seeds, SHAPE), torch.arange(3.0)
    options = {"uncond": torch.zeros(3), "guidance_scale": 3.0} if guided else {}
    batch = quiet(network, table, x, cond, seeds=seeds, **options)
    for b, seed in enumerate(seeds):
        one = slice(b, b + 1)
        start = noise([seed], SHAPE)
        assert torch.equal(start, x[one])
        if guided:
            options["uncond"] = torch.zeros(1)
        alone = quiet(network, table, start, cond[one], seeds=torch.tensor([seed]), **options)
        assert torch.equal(alone, batch[one])


def test_seeds():
    table, x = ddim(Schedule.cosine(), 6, eta=1.0), noise([1, 2], SHAPE)
    torch.manual_seed(3)
    first = quiet(network, table, x)
    second = quiet(network, table, x)
    torch.manual_seed(3)
    assert torch.equal(quiet(network, table, x), first) and not torch.equal(first, second)
    # the two samples of a batch get seeds of their own
    twins = quiet(network, table, x[:1].repeat(2, 1, 1, 1))
    assert not torch.equal(twins[0], twins[1])
    # a deterministic table takes nothing from the generator, and ignores the seeds that it is given
    state = torch.get_rng_state()
    table = ddim(Schedule.cosine(), 6)
    assert torch.equal(quiet(network, table, x), quiet(network, table, x, seeds=[7, 8]))
    assert torch.equal(torch.get_rng_state(), state)


def test_noise():
    x = noise([3, 4], (2, 100))
    assert x.shape == (2, 2, 100) and x.dtype == torch.float32
    assert torch.equal(x[1:], noise(torch.tensor([4]), (2, 100)))
    assert noise([], (2, 3)).shape == (0, 2, 3)
    # a stream of its own: not the noise of any step under the same seeds
    table = Table.of("noise", "epsilon", torch.tensor([1, 0]), c_n=1.0)
    steps = sample_steps(lambda x, t, cond: x, table, torch.zeros(2, 2, 100), seeds=[3, 4])
    for step in steps:
        correlation = torch.corrcoef(torch.stack((x.flatten(), step.x.flatten())))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(x.numel())


def test_history_reaches_the_next_step():
    """h' = x̂0 of one row is h of the next: x1 = x̂0(x), x2 = x̂0(x1) + 10 x̂0(x)."""
    table = Table.of(
        "test", "x0", torch.tensor([1, 0]), k_e=1.0, c_0=1.0, g_0=1.0, c_h=torch.tensor([0.0, 10.0])
    )
    x = noise([1], SHAPE)
    one = network(x, torch.tensor([1]), None)
    two = network(one, torch.tensor([0]), None) + 10 * one
    torch.testing.assert_close(quiet(network, table, x), two)


# --- dtypes, gradients, synchronisation ----------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.seen = []

    def forward(self, x, t, cond):
        self.seen.append(x.dtype)
        return self.layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_module_sees_its_own_dtype(dtype):
    torch.manual_seed(0)
    net = Net().to(dtype)
    x = noise([1, 2], SHAPE)
    x = x.double() if dtype == torch.float64 else x
    samples = quiet(net, ddim(Schedule.cosine(), 3), x)
    assert net.seen == [dtype] * 3 and samples.dtype == x.dtype


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "plain"])
def test_a_float64_module_makes_x_float64(guided):
    torch.manual_seed(0)
    net, x = Net().double(), noise([1, 2], SHAPE)
    table = ddim(Schedule.cosine(), 3, eta=1.0)
    options = {"seeds": [1, 2]}
    if guided:
        options |= {"cond": torch.ones(2), "uncond": torch.zeros(2), "guidance_scale": 2.0}
    samples = quiet(net, table, x, **options)
    assert samples.dtype == torch.float64
    assert torch.equal(samples, quiet(net, table, x.double(), **options))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_a_function_sees_the_dtype_of_x(dtype):
    seen = []

    def model(x, t, cond):
        seen.append(x.dtype)
        return x * 0.5

    samples = quiet(model, ddim(Schedule.cosine(), 3), noise([1], SHAPE).to(dtype))
    assert seen == [dtype] * 3
    assert samples.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_no_graph_is_kept():
    net, x = Net(), noise([1], SHAPE).requires_grad_()
    for step in sample_steps(net, ddim(Schedule.cosine(), 3), x):
        assert not step.x.requires_grad
        assert torch.is_grad_enabled()  # what the caller does between steps is the caller's


def test_inference_mode():
    net, x = Net(), noise([1], SHAPE)
    table = ddim(Schedule.cosine(), 3)
    expected = quiet(net, table, x)
    with torch.inference_mode():
        assert torch.equal(quiet(net, table, x), expected)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation():
    """No step reads a number back from the device, and each has one sampler_step."""
    table, x = ddim(Schedule.cosine(), 5, eta=1.0), noise([1, 2], SHAPE)
    cond, uncond = torch.ones(2), torch.zeros(2)
    steps = sample_steps(network, table, x, cond, uncond, 3.0, seeds=[1, 2])
    next(steps)
    with Operators() as seen:
        for _ in steps:
            pass
    assert seen.names.count("fastlora::sampler_step") == 4
    reading = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
    assert not reading & set(seen.names)


def test_progress_bar(capfd):
    table, x = ddim(Schedule.cosine(), 3), noise([1], SHAPE)
    with_bar = sample(network, table, x)
    assert "3/3" in capfd.readouterr().err
    assert torch.equal(quiet(network, table, x), with_bar)
    assert capfd.readouterr().err == ""


# --- conditions and adapters ---------------------------------------------------------------------


def test_nested_conditions():
    def model(x, t, cond):
        tokens, extra = cond["tokens"], cond["extra"]
        assert tokens.shape == (4, 5) and extra[1].shape == (4,) and extra[0] is None
        return network(x, t, tokens.sum(1) + extra[1])

    def made(scale):
        return {"tokens": torch.full((2, 5), scale), "extra": (None, torch.full((2,), scale))}

    table, x = ddim(Schedule.cosine(), 3), noise([1, 2], SHAPE)
    samples = quiet(model, table, x, made(1.0), made(0.5), 2.0)
    expected = quiet(network, table, x, torch.full((2,), 6.0), torch.full((2,), 3.0), 2.0)
    torch.testing.assert_close(samples, expected)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x, t, cond):
        return self.layer(x + cond[:, None]).sin()


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "plain"])
def test_strength_per_sample_inside_guidance(guided):
    torch.manual_seed(0)
    net = Mixing()
    fastlora.inject(net, fastlora.LoRA(rank=2), where=["layer"], name="slider", seed=0)
    for p in fastlora.parameters(net, "slider"):
        nn.init.normal_(p)
    table, x = ddim(Schedule.cosine(), 4, eta=0.5), noise([1, 2, 3], (16,))
    cond, strengths = torch.arange(3.0), torch.tensor([-1.0, 0.0, 2.0])
    options = {"uncond": torch.zeros(3), "guidance_scale": 2.0} if guided else {}
    fastlora.set_scale(net, {"slider": strengths})
    batch = quiet(net, table, x, cond, seeds=[1, 2, 3], **options)
    for b, strength in enumerate(strengths.tolist()):
        one = slice(b, b + 1)
        fastlora.set_scale(net, {"slider": strength})
        if guided:
            options["uncond"] = torch.zeros(1)
        alone = quiet(net, table, x[one], cond[one], seeds=[b + 1], **options)
        torch.testing.assert_close(alone, batch[one])


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 3, dtype=torch.int64)},
            r"x: expected a floating-point .* int64 \[2, 3\]",
        ),
        (
            {"x": torch.tensor(1.0)},
            r"x: expected a floating-point tensor \[B, ...\], got float32 \[\]",
        ),
        ({"x": [1.0]}, r"x: expected a floating-point tensor \[B, ...\], got a list of 1"),
        ({"uncond": None}, "guidance_scale: expected 1.0 where uncond is not given, got 2.0"),
        (
            {"guidance_scale": torch.ones(3)},
            r"guidance_scale: expected a number or a tensor \[2\], or .* by step, got \[3\]",
        ),
        (
            {"guidance_scale": torch.ones(2, 1)},
            r"guidance_scale: expected a number or a tensor \[2\], or .* by step, got \[2, 1\]",
        ),
        (
            {"guidance_scale": None},
            r"guidance_scale: expected a number or a tensor \[2\], or .* by step, got None",
        ),
        (
            {"guidance_scale": "a"},
            r"guidance_scale: expected a number or a tensor \[2\], or .* by step, got a str",
        ),
        (
            {"uncond": torch.zeros(1)},
            r"uncond: expected the shape of cond, .* got \[1\] beside \[2\]",
        ),
        (
            {"cond": torch.zeros(4), "uncond": torch.zeros(4)},
            r"uncond: expected the shape of cond, \[2, ...\], got \[4\] beside \[4\]",
        ),
        ({"uncond": {"a": torch.zeros(2)}}, "uncond: expected tensors .* got a dict of 'a' beside"),
        (
            {"cond": {"a": (torch.zeros(2),)}, "uncond": {"a": (None,)}},
            r"uncond\['a'\]\[0\]: expected tensors in the same .* got None beside float32 \[2\]",
        ),
        ({"cond": ["a", "b"], "uncond": ["", ""]}, r"uncond\[0\]: expected tensors .* got a str"),
        ({"seeds": [1]}, r"seeds: expected 2 int64 numbers, one per sample, got int64 \[1\]"),
        (
            {"seeds": [1, 2**63]},
            "seeds: expected 2 int64 numbers, .* got 9223372036854775808 among",
        ),
        (
            {"seeds": [1, 0.5]},
            "seeds: expected 2 int64 numbers, one per sample, got 0.5 among them",
        ),
        ({"seeds": torch.zeros(2)}, r"seeds: expected 2 int64 numbers, .* got float32 \[2\]"),
        (
            {"model": lambda x, t, c: x[:2]},
            r"model: expected a prediction \[4, 3, 4, 4\], got float32",
        ),
        ({"model": lambda x, t, c: {"sample": x}}, "model: expected .*, got a dict of 'sample'"),
        ({"model": lambda x, t, c: x.long()}, "model: expected a floating-point .* got int64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    options = {
        "model": network,
        "table": ddim(Schedule.cosine(), 3),
        "x": noise([1, 2], SHAPE),
        "cond": torch.ones(2),
        "uncond": torch.zeros(2),
        "guidance_scale": 2.0,
    }
    with pytest.raises(ValueError, match=f"^sample: {message}"):
        quiet(**options | change)


def test_seeds_that_are_not_a_sequence():
    with pytest.raises(TypeError, match="sample: seeds: expected 1 int64 numbers, .*, got 7"):
        quiet(network, ddim(Schedule.cosine(), 3), noise([1], SHAPE), seeds=7)


# --- guidance, in all its forms ------------------------------------------------------------------


def test_guidance_by_step():
    table, x = ddim(Schedule.cosine(), 5), noise([1, 2], SHAPE)
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])
    scales = torch.tensor([[1.0, 3.0], [0.0, 1.0], [2.0, 2.0], [5.0, -1.0], [1.0, 1.0]])
    seen = iter(scales)

    def combined(x, t, cond):
        c, u = network(x, t, cond), network(x, t, uncond)
        return u + next(seen).view(-1, 1, 1, 1) * (c - u)

    expected = quiet(combined, table, x, cond)
    torch.testing.assert_close(quiet(network, table, x, cond, uncond, scales), expected)


@pytest.mark.parametrize(
    "weights",
    [
        [2.0, -1.5, 0.5],
        torch.tensor([[2.0, 1.0], [-1.0, 0.5], [0.0, 3.0]]),
        torch.arange(18.0).view(3, 3, 2) / 9,
    ],
    ids=["n", "n_by_sample", "n_by_step_and_sample"],
)
def test_any_number_of_outputs(weights):
    table, x = ddim(Schedule.cosine(), 3), noise([1, 2], SHAPE)
    conditions = [torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0]), torch.tensor([0.5, 0.5])]
    w = torch.as_tensor(weights)
    w = w.view(1, 3, 1) if w.dim() == 1 else w[None] if w.dim() == 2 else w
    seen = iter(w.expand(3, 3, 2))

    def combined(x, t, cond):
        terms = zip(next(seen), conditions, strict=True)
        return sum(w_j.view(-1, 1, 1, 1) * network(x, t, c) for w_j, c in terms)

    expected = quiet(combined, table, x)
    torch.testing.assert_close(quiet(network, table, x, conditions, weights=weights), expected)


@pytest.mark.parametrize("phi", [0.0, 0.7, torch.tensor([0.2, 1.0])], ids=str)
def test_guidance_rescale(phi):
    """Against diffusers' rescale_noise_cfg where it is there, and against the formula."""
    table, x = ddim(Schedule.cosine(), 4), noise([1, 2], SHAPE)
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])

    def combined(x, t, cond):
        c, u = network(x, t, cond), network(x, t, uncond)
        e = u + 4 * (c - u)
        over = torch.as_tensor(phi).view(-1, 1, 1, 1)
        return e * (over * (c.flatten(1).std(1) / e.flatten(1).std(1)).view(-1, 1, 1, 1) + 1 - over)

    expected = quiet(combined, table, x, cond)
    ours = quiet(network, table, x, cond, uncond, 4.0, guidance_rescale=phi)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    if isinstance(phi, float) and phi > 0:
        module = pytest.importorskip(
            "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
        )

        def theirs(x, t, cond):
            c, u = network(x, t, cond), network(x, t, uncond)
            return module.rescale_noise_cfg(u + 4 * (c - u), c, phi)

        torch.testing.assert_close(ours, quiet(theirs, table, x, cond), rtol=1e-5, atol=1e-5)


# --- inpainting ----------------------------------------------------------------------------------


def mixing(x, t, cond):
    """Every value depends on its neighbours."""
    return network(x + 0.5 * x.roll(1, -1), t, cond)


def test_inpainting_keeps_what_is_known():
    """At every step the known part is where the schedule says, with the noise of the seeds; at the
    end it is what was given; the rest is sampled, and knows of it."""
    schedule, seeds = Schedule.cosine(), [1, 2]
    table, x = ddim(schedule, 5, eta=0.5), noise(seeds, SHAPE)
    known = torch.linspace(-1, 1, x.numel()).view(x.shape)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    at = [*table.timesteps.tolist()[1:], None]
    for step in sample_steps(mixing, table, x, seeds=seeds, mask=mask, known=known):
        t = at[step.index]
        alpha = 1.0 if t is None else schedule.alpha[t].item()
        sigma = 0.0 if t is None else schedule.sigma[t].item()
        expected = alpha * known + sigma * noise(seeds, SHAPE)
        left, right = slice(None, 2), slice(2, None)
        torch.testing.assert_close(step.x[..., left], expected[..., left])
        assert (step.x[..., right] - expected[..., right]).abs().max() > 0.1
        torch.testing.assert_close(step.x0()[..., left], known[..., left])
    assert torch.equal(step.x[..., :2], known[..., :2])
    free = quiet(mixing, table, x, seeds=seeds)
    inpainted = quiet(mixing, table, x, seeds=seeds, mask=mask, known=known)
    assert (free - inpainted)[..., 2:].abs().max() > 0.01  # the network mixes neighbours


def test_a_mask_of_ones_changes_nothing():
    table, x = ddim(Schedule.cosine(), 5), noise([1, 2], SHAPE)
    inpainted = quiet(network, table, x, mask=torch.ones(2, 1, 4, 4), known=torch.zeros_like(x))
    torch.testing.assert_close(inpainted, quiet(network, table, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(2, *SHAPE)}, "known: expected both mask and known"),
        ({"known": torch.ones(2, *SHAPE)}, "mask: expected both mask and known"),
        (
            {"mask": torch.ones(4, 4), "known": torch.ones(2, *SHAPE)},
            r"mask: expected a tensor \[2, 3, 4, 4\], .* got float32 \[4, 4\]",
        ),
        (
            {"mask": -torch.ones(2, *SHAPE), "known": torch.ones(2, *SHAPE)},
            "mask: expected 1 where samples are made, .* got -1 to -1",
        ),
        ({"guidance_rescale": -0.1}, r"guidance_rescale: expected .* within \[0, 1\], got -0.1"),
        ({"guidance_rescale": torch.ones(3)}, r"guidance_rescale: expected .* got \[3\]"),
        ({"weights": [1.0, 2.0]}, "cond: expected a list of 2, one for each weight, got float32"),
        ({"weights": torch.ones(2, 3, 1)}, r"weights: expected \[n\], .* got \[2, 3, 1\]"),
        ({"weights": "a"}, r"weights: expected \[n\], .* got a str"),
        ({"weights": [1.0], "guidance_scale": 2.0}, "weights: expected neither uncond nor"),
        ({"guidance_scale": math.inf, "uncond": torch.ones(2)}, "guidance_scale: expected finite"),
        ({"weights": [math.nan], "cond": [None]}, "weights: expected finite numbers"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_guidance_and_masks(options, message):
    options = {"cond": torch.ones(2)} | options
    with pytest.raises(ValueError, match=f"^sample: {message}"):
        quiet(network, ddim(Schedule.cosine(), 3), noise([1, 2], SHAPE), **options)


# --- from an image -------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [0, 3, 9])
def test_from_an_image(begin):
    """An exact model (it knows the image) finds it again from any step, whatever the noise was."""
    image, schedule = noise([7, 8], SHAPE).tanh(), Schedule.cosine()

    def knowing(x, t, cond):
        a, s = (v[t.long()].float().view(-1, 1, 1, 1) for v in (schedule.alpha, schedule.sigma))
        return (x - a * image) / s

    for table in (ddim(schedule, 10), samplers.euler(schedule, 10, spacing="leading")):
        table = table.since(begin)
        z = noise([1, 2], SHAPE)
        x = table.noised(image, z)
        t = int(table.timesteps[0])
        a, s = schedule.alpha[t].item(), schedule.sigma[t].item()
        if "ddim" in table.name:
            torch.testing.assert_close(x, a * image + s * z)
        steps = list(sample_steps(knowing, table, x))
        assert len(steps) == 10 - begin
        torch.testing.assert_close(steps[0].x0(), image, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(steps[-1].x, image, rtol=1e-3, atol=1e-3)


def test_rows_that_look_back_cannot_begin():
    table = samplers.dpm_solver(Schedule.cosine(), 10)
    with pytest.raises(
        ValueError, match="begin: expected a row that needs nothing .* row 4 of dpm"
    ):
        table.since(4)
    with pytest.raises(ValueError, match="noised: expected a table of a solver"):
        Table.of("by hand", "epsilon", torch.arange(2)).noised(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(
    "table",
    [
        samplers.table_from_config(
            {"_class_name": name, "set_alpha_to_one": False, "clip_sample": False}, 4
        )
        for name in ("DDIMScheduler", "LCMScheduler")
    ]
    + [samplers.dpm_solver(Schedule.scaled_linear(), 5, final="sigma_min")],
    ids=["ddim", "lcm", "dpm_solver"],
)
def test_what_is_known_is_exact_where_a_schedule_does_not_end_clean(table):
    x, known = noise([1, 2], SHAPE), noise([3, 4], SHAPE)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    result = quiet(network, table, x, seeds=[1, 2], mask=mask, known=known)
    assert torch.equal(result[..., :2], known[..., :2])


def test_an_inversion_takes_what_is_known_to_its_noise():
    table = samplers.ddim_inversion(Schedule.cosine(), 5)
    x, known = noise([1, 2], SHAPE), noise([3, 4], SHAPE)
    result = quiet(network, table, x, seeds=[1, 2], mask=torch.zeros(1, 1, 4, 4), known=known)
    t = int(table.timesteps[-1])
    alpha, sigma = Schedule.cosine().alpha[t].item(), Schedule.cosine().sigma[t].item()
    torch.testing.assert_close(result, alpha * known + sigma * noise([1, 2], SHAPE))


def test_predictions_in_float64_and_flags_beside_tensors():
    table, x = ddim(Schedule.cosine(), 4), noise([1, 2], SHAPE)

    def model(x, t, cond):
        return network(x, t, cond["a"]).double() if cond["double"] else network(x, t, cond["a"])

    cond, uncond = {"a": torch.ones(2), "double": True}, {"a": torch.zeros(2), "double": True}
    expected = quiet(network, table, x, cond["a"], uncond["a"], 2.0)
    torch.testing.assert_close(quiet(model, table, x, cond, uncond, 2.0), expected)
    with pytest.raises(ValueError, match=r"uncond\['double'\]: expected tensors in the same"):
        quiet(model, table, x, cond, uncond | {"double": False}, 2.0)
