"""Tiny random models of transformers, and what adapters on them have to compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests.adapters.oracles import randomise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the imports of others warn about
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.pytorch_utils import Conv1D

WORDS = 64
SIZES: dict[str, Any] = dict(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2)
HEADS: dict[str, Any] = dict(num_attention_heads=4, intermediate_size=48)
TOKENS: dict[str, Any] = dict(bos_token_id=0, eos_token_id=1, pad_token_id=0)
DECODER = SIZES | HEADS | TOKENS | dict(num_key_value_heads=2, max_position_embeddings=64)
T5: dict[str, Any] = dict(
    vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
    feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
NO_DROPOUT: dict[str, Any] = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
T = transformers


def bert() -> nn.Module:
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return T.BertModel(T.BertConfig(**SIZES, **HEADS, **dropout, max_position_embeddings=32))


def gpt2() -> nn.Module:
    sizes = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=32)
    return T.GPT2LMHeadModel(T.GPT2Config(**sizes, **TOKENS, **NO_DROPOUT))


def clip_text() -> nn.Module:
    tokens = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)
    return T.CLIPTextModel(T.CLIPTextConfig(**SIZES, **HEADS, **tokens, max_position_embeddings=16))


def clip_vision() -> nn.Module:
    sizes = {**SIZES, **HEADS} | dict(image_size=16, patch_size=8)
    del sizes["vocab_size"]
    return T.CLIPVisionModel(T.CLIPVisionConfig(**sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "CLIPTextModel": clip_text,
    "CLIPVisionModel": clip_vision,
    "T5EncoderModel": lambda: T.T5EncoderModel(T.T5Config(**T5)),
    "T5ForConditionalGeneration": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "BertModel": bert,
    "GPT2LMHeadModel": gpt2,
    "LlamaForCausalLM": lambda: T.LlamaForCausalLM(T.LlamaConfig(**DECODER)),
    "Phi3ForCausalLM": lambda: T.Phi3ForCausalLM(T.Phi3Config(**DECODER)),  # fused projections
}
GENERATE = ("T5ForConditionalGeneration", "GPT2LMHeadModel", "LlamaForCausalLM")


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "CLIPVisionModel":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    found = {"input_ids": torch.randint(3, WORDS, (2, 9), generator=generator)}
    if name == "T5ForConditionalGeneration":
        found["decoder_input_ids"] = torch.randint(3, WORDS, (2, 5), generator=generator)
    return found


def output(model: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    own = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    found = model(**own)
    return found.logits if "logits" in found else found.last_hidden_state


def linear_paths(model: nn.Module) -> list[str]:
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def adapt(model: nn.Module, spec: fastlora.LoRA | None = None) -> list[str]:
    """Random adapters on all linear layers of a model; their paths."""
    paths = linear_paths(model)
    info = fastlora.inject(model, spec or fastlora.LoRA(rank=4, alpha=6), where=paths, seed=0)
    assert sorted(info.modules) == sorted(paths)
    randomise(model, size=0.5)
    return paths


def adapted(name: str, spec: fastlora.LoRA | None = None) -> Any:
    model = fresh(name)
    adapt(model, spec)
    return model


def merged_by_hand(name: str, model: nn.Module, ratio: float) -> nn.Module:
    """The plain model in float64 with `W + ratio U D` written out, of the adapters in `model`."""
    double = copy.deepcopy(fresh(name)).double()
    for path in linear_paths(double):
        layer: Any = double.get_submodule(path)
        slot: Any = model.get_submodule(path).fastlora["default"]
        update = ratio * (slot.up.detach().double() @ slot.down.detach().double())
        update = update.t() if isinstance(layer, Conv1D) else update
        layer.weight = nn.Parameter(layer.weight.detach() + update)  # tied to another one no more
    return double
