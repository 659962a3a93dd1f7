"""Published methods as short recipes over adapters, training and samplers."""

from fastlora.methods.attention_maps import capture_attention
from fastlora.methods.collages import Concept, collage
from fastlora.methods.cut_mix_unmix import cut_mix_unmix, unmix_loss
from fastlora.methods.editing import edit, invert, slerp
from fastlora.methods.prior import sample_prior
from fastlora.methods.svdiff import personalise
from fastlora.methods.visual_slider import train_visual_slider

__all__ = [
    "Concept",
    "capture_attention",
    "collage",
    "cut_mix_unmix",
    "edit",
    "invert",
    "personalise",
    "sample_prior",
    "slerp",
    "train_visual_slider",
    "unmix_loss",
]
