"""The settings in PEFT's adapter_config.json, which diffusers has in its files' headers too."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlora.formats.changes import LowRank
from fastlora.formats.files import FormatError
from fastlora.formats.patterns import Patterns, number

DEFAULT = 8  # of PEFT, for rank and alpha alike
ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # by peft_type

# With these, the tensors do not mean the update of a weight.
FOREIGN = {
    "layer_replication": "the modules are those of a model with repeated layers",
    "target_parameters": "the updates are of parameters, not of modules",
    "use_qalora": "the inputs are pooled",
    "alora_invocation_tokens": "the updates hold from certain tokens on",
    "arrow_config": "a router chooses among adapters",
    "use_bdlora": "the factors are block diagonal",
    "kasa_config": "the base's weights are truncated first",
    "monteclora_config": "the factors are random",
}
# PEFT takes the first update off the base's weights whenever it loads such an adapter.
SHIFTS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """What a file says of its modules' ranks and scales; the defaults: nothing."""

    kind: str | None = None  # peft_type
    rank: int | None = None
    alpha: float | None = None  # None: each module's rank
    ranks: Patterns = field(default_factory=lambda: Patterns("rank_pattern"))
    alphas: Patterns = field(default_factory=lambda: Patterns("alpha_pattern"))
    rank_stabilized: bool = False
    dora: bool | None = None
    dropout: float = 0.0

    def rank_at(self, path: str) -> float | None:
        rank = self.ranks.get(path)
        return self.rank if rank is None else rank

    def alpha_at(self, path: str) -> float | None:
        alpha = self.alphas.get(path)
        return self.alpha if alpha is None else alpha


def read_settings(config: Any) -> Settings:
    """The settings of a LoRA, LoHa or LoKr, with PEFT's defaults for those that are left out.

    Raises FormatError for another kind of adapter, for settings that make something else of the
    tensors than updates of weights, and for values that are none.
    """
    if not isinstance(config, Mapping):
        raise FormatError(f"expected an object of settings, got {type(config).__name__}")
    kind = config.get("peft_type") or "LORA"
    if not isinstance(kind, str) or kind not in ALPHAS:
        raise FormatError(f"peft_type: expected {', '.join(ALPHAS)}, got {kind!r}")
    for name, reason in FOREIGN.items():
        if config.get(name):
            raise FormatError(f"{name} {config[name]!r} is not supported: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(SHIFTS_BASE):
        raise FormatError(
            f"init_lora_weights {start!r}: the tensors are meant for changed weights of the base; "
            "save the adapter with path_initial_model_for_weight_conversion=..., which makes a "
            "plain LoRA of it"
        )
    rank = number("r", config.get("r", DEFAULT))
    if rank < 1 or rank != int(rank):
        raise FormatError(f"r: expected an integer >= 1, got {rank!r}")
    alpha = ALPHAS[kind]
    return Settings(
        kind=kind,
        rank=int(rank),
        alpha=number(alpha, config.get(alpha, DEFAULT)),
        ranks=Patterns("rank_pattern", config.get("rank_pattern")),
        alphas=Patterns("alpha_pattern", config.get("alpha_pattern")),
        rank_stabilized=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")) if kind == "LORA" else None,
        dropout=number("lora_dropout", config.get("lora_dropout") or 0.0),
    )


def write_settings(layers: Mapping[str, LowRank], dora: bool, bias: bool) -> dict[str, Any]:
    """A LoRA's settings for modules by path: the most common rank, alpha and dropout, and patterns
    for the ranks and alphas of the others."""
    stabilized = all(layer.rank_stabilized for layer in layers.values())
    ranks = {path: layer.rank for path, layer in layers.items()}
    alphas = {path: alpha_for(layer, stabilized) for path, layer in layers.items()}
    rank, alpha = most_common(ranks), most_common(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {whole(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {whole(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": list(layers),
        "lora_dropout": most_common({p: layer.dropout for p, layer in layers.items()}),
        "use_rslora": stabilized,
        "use_dora": dora,
        "lora_bias": bias,
    }


def alpha_for(layer: LowRank, stabilized: bool) -> float:
    """The alpha that gives the layer its ratio in a file that divides by √rank, or by the rank."""
    if layer.rank_stabilized == stabilized:
        alpha = layer.rank if layer.alpha is None else layer.alpha
    else:
        alpha = layer.ratio * (math.sqrt(layer.rank) if stabilized else layer.rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def whole(path: str) -> str:
    """The key of a pattern that means this path and no other one that ends alike."""
    return "^" + re.escape(path)
