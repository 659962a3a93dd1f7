"""Adapters of other tools come and go in compiled models of diffusers and transformers: one graph,
the same addresses, and what weights merged in float64 compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora.adapters.lookup import adapted_layers
from tests.integrations.swap_cases import (
    ATTENTION,
    Deltas,
    Merged,
    called,
    dora_file,
    inputs,
    kohya_file,
    loha_file,
    models,
    peft_folders,
)

RANK = 12
FC = "encoder.layers.0.mlp.fc1"
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv_in"],
    "text_encoder": ["q_proj", "fc1", "fc2", "token_embedding"],
}


class Service:
    """Both models compiled, with a reserve, and what they should compute."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.models = models()
        self.merged, self.args = Merged(self.models), inputs()
        for model in self.models.values():
            fastlora.reserve(model, RANK)
        self.counters = {p: CompileCounterWithBackend("eager") for p in self.models}
        self.compiled: dict[str, Any] = {
            part: torch.compile(model, backend=self.counters[part], fullgraph=True)
            for part, model in self.models.items()
        }

    @property
    def graphs(self) -> list[int]:
        return [counter.frame_count for counter in self.counters.values()]

    def each(self, function: Any, *args: Any) -> None:
        for model in self.models.values():
            function(model, *args)

    def check(self, *parts: tuple[Deltas, float]) -> Tensor:
        """The compiled models compute what the merged weights do."""
        with torch.no_grad():
            y = called(self.compiled, *self.args)
        expected = self.merged(*parts, args=self.args)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        return y

    def addresses(self) -> list[int]:
        """Of D, U and gates of all layers."""
        found = []
        for model in self.models.values():
            for layer in adapted_layers(model).values():
                (part,) = layer._state.parts.values()
                tensors = layer.fastlora.reserved_down, layer.fastlora.reserved_up, part
                found += [t.data_ptr() for t in tensors]
        return found


@pytest.fixture(scope="module")
def service() -> Service:
    torch.manual_seed(0)
    return Service()


@pytest.fixture
def files(service: Service, tmp_path: Path) -> tuple[Deltas, Deltas]:
    """a.safetensors: kohya's, attention of both models, rank 4 at alpha / rank = 1/4. b/: PEFT's,
    other layers, ranks from 3 to 8 with alphas of their own."""
    plain = {part: model.float() for part, model in service.merged.models.items()}
    a = kohya_file(plain, tmp_path / "a.safetensors", ATTENTION, 4, 1.0)
    ranks = {"net.2": 3, "conv1": 5, "fc1": 6}
    alphas = {"to_k": 32.0, "conv1": 2.0, "fc2": 24.0}
    b = peft_folders(plain, tmp_path / "b", TARGETS, 8, 16.0, ranks, alphas)
    for model in plain.values():
        model.double()
    return a, b


@pytest.mark.slow
def test_files_come_and_go_in_one_graph(
    service: Service, files: tuple[Deltas, Deltas], tmp_path: Path
) -> None:
    (a, b), s = files, service
    assert {part for part, _ in a} == {part for part, _ in b} == {"unet", "text_encoder"}
    assert {path for _, path in b} - {path for _, path in a}, "other layers"
    plain = s.check()
    places = s.addresses()

    def load_b() -> None:
        for part, model in s.models.items():
            fastlora.load(model, tmp_path / "b" / part, name="b")

    with torch.compiler.set_stance("fail_on_recompile"):
        fastlora.load(s.models, tmp_path / "a.safetensors", name="a")
        s.check((a, 1.0))
        s.each(fastlora.remove, "a")
        load_b()
        s.check((b, 1.0))
        fastlora.load(s.models, tmp_path / "a.safetensors", name="a", scale=0.5)
        s.check((a, 0.5), (b, 1.0))
        s.each(fastlora.set_scale, {"a": -2.0, "b": 0.25})
        s.check((a, -2.0), (b, 0.25))
        s.each(fastlora.disable, "b")
        s.check((a, -2.0))
        s.each(fastlora.set_scale, {"a": 1.0})
        s.check((a, 1.0))
        s.each(fastlora.enable)
        s.check((a, 1.0), (b, 0.25))
        with torch.no_grad():
            eager = called(s.models, *s.args)  # in between: the graphs stay
        torch.testing.assert_close(eager, s.check((a, 1.0), (b, 0.25)), rtol=1e-4, atol=1e-4)
        s.each(fastlora.remove, "b")
        load_b()  # α/r is the file's again, not what somebody had before
        s.each(fastlora.set_scale, 1.0)
        s.check((a, 1.0), (b, 1.0))
        for name in "ab":
            s.each(fastlora.remove, name)
        assert torch.equal(s.check(), plain)
    assert s.graphs == [1, 1] and s.addresses() == places


@pytest.mark.slow
def test_what_stays_outside_of_the_reserve_compiles_once_more_and_is_right(
    service: Service, tmp_path: Path
) -> None:
    """DoRA and LoHa of the text encoder: its graph is made once for each layout, the UNet's not."""
    s = service
    layer = s.models["text_encoder"].get_submodule(FC)
    weight = layer.weight.detach().double()
    dora, loha = dora_file(layer, tmp_path / "dora"), loha_file(layer, tmp_path / "loha")
    s.check()
    graphs = s.graphs
    for more, (name, delta) in enumerate({"dora": dora, "loha": loha}.items(), start=1):
        fastlora.load(s.models, tmp_path / name, name=name)
        s.check(({("text_encoder", FC): delta(weight, 1.0)}, 1.0))
        assert s.graphs == [graphs[0], graphs[1] + more]
        fastlora.set_scale(s.models["text_encoder"], {name: 0.5})
        s.check(({("text_encoder", FC): delta(weight, 0.5)}, 1.0))
        fastlora.remove(s.models["text_encoder"], name)
        s.check()
        assert s.graphs == [graphs[0], graphs[1] + more]


def test_blocks_compiled_by_diffusers_are_as_many_graphs_as_of_the_plain_model(
    tmp_path: Path,
) -> None:
    unet, (x, t, _) = models()["unet"], inputs()
    hidden = torch.randn(2, 10, 12)
    merged = Merged({"unet": unet})
    deltas = kohya_file({"unet": unet}, tmp_path / "a.safetensors", ATTENTION, 4, 1.0)
    graphs = []
    for rank in (0, RANK):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model: Any = copy.deepcopy(unet)
        if rank:
            fastlora.reserve(model, rank)
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        with torch.no_grad():
            model(x, t, hidden)
            graphs.append(counter.frame_count)
            if rank:
                fastlora.load(model, tmp_path / "a.safetensors", name="a")
                y = model(x, t, hidden).sample.double()
                double = merged.changed((deltas, 1.0))["unet"]
                expected = double(x.double(), t, hidden.double()).sample
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert graphs[0] == graphs[1] == counter.frame_count
