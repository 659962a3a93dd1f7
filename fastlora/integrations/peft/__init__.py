"""PEFT's LoRA layers, live in a model: they stay PEFT's and compute fused.

PEFT keeps the books (which adapters there are, which are active, their scalings, what is merged),
fastlora computes. A layer stays the same object and changes its class (`layers.py`). Beside it,
hidden from its module tree, stands an adapted layer on the base layer's parameters (`hosts.py`),
whose slots are views of PEFT's (`slots.py`).
"""

from fastlora.integrations.peft.accelerating import (
    accelerate_layers,
    install,
    is_accelerated,
    restore_layers,
)

__all__ = ["accelerate_layers", "is_accelerated", "restore_layers"]

install()  # also where a pickle is the first to ask for these layers
