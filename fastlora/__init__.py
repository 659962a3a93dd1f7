"""fastlora: adapters of diffusion models, fused."""

__version__ = "0.1.0"
