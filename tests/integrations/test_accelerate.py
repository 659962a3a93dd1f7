"""`accelerate` and `restore`: what they take, what they say, and that all of it can be undone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora.integrations import versions
from tests.integrations.adapter_samples import kohya, linears
from tests.integrations.tiny_pipelines import FRAGILE, MAKE, diffusers, run, stable_diffusion

pytestmark = FRAGILE


@pytest.fixture
def calls(monkeypatch):
    """What was asked of the module about PEFT's layers: ("accelerate", model), ..."""
    pytest.importorskip("peft")
    from fastlora.integrations import peft

    seen = []

    def noting(what, function):
        return lambda model: seen.append((what, model)) or function(model)

    for what in ("accelerate", "restore"):
        own = getattr(peft, f"{what}_layers")
        monkeypatch.setattr(peft, f"{what}_layers", noting(what, own))
    return seen


def with_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"])
    return peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)


def state(pipeline):
    """What `accelerate` may change: the class, and the objects inside."""
    return type(pipeline), dict(vars(pipeline)), pipeline.config


@pytest.mark.parametrize("kind", list(MAKE))
def test_restore_gives_back_the_very_objects(kind):
    pipeline = MAKE[kind]()
    before = state(pipeline)
    report = fastlora.accelerate(pipeline)
    cls = type(pipeline)
    assert cls is not before[0] and isinstance(pipeline, before[0])
    names = "__name__", "__qualname__", "__module__", "__doc__"
    assert all(getattr(cls, name) == getattr(before[0], name) for name in names)
    assert f"pipeline: {cls.__name__}: calls" in str(report)
    again = fastlora.accelerate(pipeline)
    assert type(pipeline) is cls and "already" in again.pipeline
    back = fastlora.restore(pipeline)
    after = state(pipeline)
    assert after[0] is before[0] and after[2] == before[2]
    before_parts = {name: value for name, value in before[1].items() if name != "_internal_dict"}
    assert all(after[1][name] is value for name, value in before_parts.items())
    assert after[1].keys() == before[1].keys()
    assert "diffusers' own class" in back.pipeline
    assert "is its own class" in fastlora.restore(pipeline).pipeline


def test_one_class_for_all_pipelines_of_a_class():
    pipelines = stable_diffusion(), stable_diffusion()
    for pipeline in pipelines:
        fastlora.accelerate(pipeline)
    assert type(pipelines[0]) is type(pipelines[1])


def test_layers_of_every_model_are_accelerated(calls):
    pipeline = stable_diffusion()
    config = pytest.importorskip("peft").LoraConfig(target_modules=["to_q"])
    pipeline.unet.add_adapter(config)
    report = fastlora.accelerate(pipeline)
    assert set(report.layers) == {"vae", "text_encoder", "unet"}
    count = len(linears(pipeline, "unet", "to_q.base_layer"))
    assert f"unet: {count} layers of PEFT's compute fused" in str(report)
    assert "vae" not in str(report)
    fastlora.restore(pipeline)
    models = pipeline.vae, pipeline.text_encoder, pipeline.unet
    asked = {(what, id(model)) for what, model in calls}
    assert asked == {(what, id(m)) for m in models for what in ("accelerate", "restore")}


def test_modules_and_dicts_of_them():
    model, other = with_lora(), nn.Linear(2, 2)
    layer = model.base_model.model[0]
    cls = type(layer)
    assert str(fastlora.accelerate(model)) == "1 layer of PEFT's computes fused"
    assert type(layer) is not cls and str(fastlora.accelerate(model)) == "nothing to do"
    assert str(fastlora.restore(model)) == "1 layer of PEFT's is its own again"
    assert type(layer) is cls
    report = fastlora.accelerate({"unet": model, "text_encoder": other})
    assert list(report.layers) == ["unet", "text_encoder"] and not report.pipeline
    assert type(layer) is not cls
    fastlora.restore({"unet": model})
    assert type(layer) is cls


@pytest.mark.parametrize("wrong", [{}, {"unet": 3}, [nn.Linear(1, 1)], 3, None, nn.Linear])
@pytest.mark.parametrize("function", [fastlora.accelerate, fastlora.restore])
def test_other_targets(function, wrong):
    with pytest.raises(TypeError, match=f"^{function.__name__}: target: expected"):
        function(wrong)


@pytest.mark.parametrize("fails", ["layers of the unet", "the schedulers", "the pipeline"])
def test_an_error_half_way_leaves_nothing_behind(calls, monkeypatch, fails):
    pipeline = stable_diffusion()
    before = state(pipeline)

    def fail(*_):
        raise RuntimeError(fails)

    if fails == "layers of the unet":
        from fastlora.integrations import peft

        own = peft.accelerate_layers
        broken = lambda m: fail() if m is pipeline.unet else own(m)  # noqa: E731
        monkeypatch.setattr(peft, "accelerate_layers", broken)
    elif fails == "the schedulers":
        monkeypatch.setattr("fastlora.integrations.schedulers._counterpart", fail)
    else:
        monkeypatch.setattr("fastlora.integrations.pipelines.fast_class", fail)
    with pytest.raises(RuntimeError, match=fails):
        fastlora.accelerate(pipeline)
    after = state(pipeline)
    assert after[0] is before[0] and after[2] == before[2]
    assert pipeline.scheduler is before[1]["scheduler"]
    done = [model for what, model in calls if what == "accelerate"]
    undone = [model for what, model in calls if what == "restore"]
    assert all(any(model is other for other in undone) for model in done)


def test_models_with_other_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(2, 2))
    wrapped = peft.get_peft_model(model, peft.LoHaConfig(target_modules=["0"]))
    cls = type(wrapped.base_model.model[0])
    report = fastlora.accelerate({"unet": wrapped})
    assert str(report) == "unet.0 is as it was: a loha adapter"
    assert type(wrapped.base_model.model[0]) is cls


def test_copies_and_pickles():
    """They are accelerated too, and can be restored."""
    pipeline = stable_diffusion()
    fastlora.accelerate(pipeline)
    wanted = run(pipeline, "sd")
    pickled = pickle.loads(pickle.dumps(pipeline))
    for other in (copy.deepcopy(pipeline), copy.copy(pipeline), pickled):
        assert type(other) is type(pipeline)
        assert torch.equal(run(other, "sd"), wanted)
    fastlora.restore(other)
    assert type(other) is diffusers.StableDiffusionPipeline


def test_saving_and_other_pipelines_of_the_same_parts(tmp_path):
    pipeline = stable_diffusion()
    fastlora.accelerate(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(loaded) is diffusers.StableDiffusionPipeline
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet
    auto = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    assert type(auto) is diffusers.StableDiffusionImg2ImgPipeline
    assert pipeline.components.keys() == loaded.components.keys()
    same = type(pipeline).from_pipe(loaded)
    assert same.unet is loaded.unet


def test_classes_of_ones_own():
    """Their methods are called by the ones that come before them."""

    class Mine(diffusers.StableDiffusionPipeline):
        def load_lora_weights(self, *args, **kwargs):
            self.loaded = True
            super().load_lora_weights(*args, **kwargs)

        def __call__(self, *args, **kwargs):
            self.called = True
            return super().__call__(*args, **kwargs)

    pipeline = stable_diffusion()
    object.__setattr__(pipeline, "__class__", Mine)
    fastlora.accelerate(pipeline)
    pytest.importorskip("peft")
    tensors, _ = kohya(pipeline, linears(pipeline, "unet", "to_q"))
    pipeline.load_lora_weights(tensors)
    run(pipeline, "sd")
    assert pipeline.loaded and pipeline.called
    fastlora.restore(pipeline)
    assert type(pipeline) is Mine


def test_untested_versions_are_named_once(monkeypatch):
    monkeypatch.setattr(versions, "TESTED", {"diffusers": ("0.1", "0.2"), "torch": ("1.0", "99")})
    monkeypatch.setattr(versions, "_told", set())
    got = diffusers.__version__
    with pytest.warns(UserWarning, match=rf"diffusers {got} \(tested: 0.1 to 0.2\)$"):
        fastlora.accelerate(nn.Linear(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.accelerate(nn.Linear(1, 1))


def test_the_installed_versions_are_tested(monkeypatch):
    monkeypatch.setattr(versions, "_told", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_untested()
