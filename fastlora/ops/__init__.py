"""The operators. Each is a function with its plain PyTorch version as `.reference`."""

from fastlora.ops._define import ContractError, Operator, operators
from fastlora.ops.lora_add import lora_add_
from fastlora.ops.lora_linear import lora_linear

__all__ = ["ContractError", "Operator", "lora_add_", "lora_linear", "operators"]
