"""Published methods as short recipes over adapters, training and samplers."""

from fastlora.methods.svdiff import personalise
from fastlora.methods.visual_slider import train_visual_slider

__all__ = ["personalise", "train_visual_slider"]
