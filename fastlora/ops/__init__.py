"""The operators. Each is a function with its plain PyTorch version as `.reference`."""

from fastlora.ops._define import ContractError, Operator, operators
from fastlora.ops._device import emulated
from fastlora.ops.add_noise import add_noise
from fastlora.ops.fold import fold
from fastlora.ops.lora_add import lora_add_
from fastlora.ops.lora_linear import lora_linear
from fastlora.ops.sampler_step import sampler_step
from fastlora.ops.spectral_dots import spectral_dots
from fastlora.ops.spectral_linear import spectral_linear
from fastlora.ops.spectral_weight import spectral_weight, spectral_weights

__all__ = [
    "fold",
    "spectral_dots",
    "spectral_linear",
    "spectral_weight",
    "spectral_weights",
    "ContractError",
    "Operator",
    "add_noise",
    "emulated",
    "lora_add_",
    "lora_linear",
    "operators",
    "sampler_step",
]
