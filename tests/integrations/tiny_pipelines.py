"""Pipelines of the real classes with tiny random models, made without a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")

WORDS = "<pad> <unk> <bos> <eos> a cat dog on the moon red blue photo of".split()
TOKENS = 8  # of a prompt
SIZE = 16  # pixels of an image; latents are half of it
UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": 4,
}
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FRAGILE = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the hosts' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]


def tokenizer() -> Any:
    """Words to numbers, padded and cut to `TOKENS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    names = {"pad": "<pad>", "unk": "<unk>", "bos": "<bos>", "eos": "<eos>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=TOKENS,
        **{f"{kind}_token": token for kind, token in names.items()},
    )


def clip(width: int = 12, projection: bool = False, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return getattr(transformers, name)(config).eval()


def t5(width: int = 12, seed: int = 2) -> Any:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def vae(channels: int = 4, seed: int = 3, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
        **settings,
    ).eval()


def unet(seed: int = 4, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        **UNET | {"cross_attention_dim": 12} | settings,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion(cls: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    own = {
        "vae": vae(),
        "unet": unet(),
        "text_encoder": clip(),
        "tokenizer": tokenizer(),
        "scheduler": diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return quiet(getattr(diffusers, cls)(**own | parts, requires_safety_checker=False))


def controlnet_pipeline() -> Any:
    torch.manual_seed(5)
    controlnet = diffusers.ControlNetModel(
        **{name: value for name, value in UNET.items() if name != "sample_size"},
        cross_attention_dim=12,
        conditioning_embedding_out_channels=(4, 8),
    ).eval()
    for parameter in controlnet.parameters():  # else its zero convolutions give nothing
        torch.nn.init.normal_(parameter, std=0.1)
    return stable_diffusion("StableDiffusionControlNetPipeline", controlnet=controlnet)


def sdxl(**parts: Any) -> Any:
    own = {
        "vae": vae(),
        "unet": unet(
            cross_attention_dim=24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
        ),
        "text_encoder": clip(seed=1),
        "text_encoder_2": clip(projection=True, seed=6),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(**SCALED_LINEAR),
    }
    return quiet(diffusers.StableDiffusionXLPipeline(**own | parts, add_watermarker=False))


def sd3() -> Any:
    torch.manual_seed(7)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        out_channels=4,
    ).eval()
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            vae=vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=clip(projection=True, seed=1),
            text_encoder_2=clip(projection=True, seed=6),
            text_encoder_3=t5(24),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            tokenizer_3=tokenizer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


def flux() -> Any:
    torch.manual_seed(8)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return quiet(
        diffusers.FluxPipeline(
            transformer=transformer,
            vae=vae(1, shift_factor=0.06, scaling_factor=1.5),
            text_encoder=clip(),
            text_encoder_2=t5(),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )
    )


def pixart() -> Any:
    torch.manual_seed(9)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=12,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=8,
        use_additional_conditions=False,
    ).eval()
    return quiet(
        diffusers.PixArtAlphaPipeline(
            transformer=transformer,
            vae=vae(),
            text_encoder=t5(),
            tokenizer=tokenizer(),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    )


def dit() -> Any:
    torch.manual_seed(10)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    ).eval()
    return quiet(
        diffusers.DiTPipeline(
            transformer=transformer, vae=vae(), scheduler=diffusers.DDIMScheduler()
        )
    )


MAKE = {
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "dit": dit,
}
PROMPTS = ["a red cat", "the blue dog on the moon", "photo of a moon"]
# How each pipeline says what it says with cross_attention_kwargs.
CHANNEL = dict.fromkeys(("sd", "sdxl"), "cross_attention_kwargs")
CHANNEL |= dict.fromkeys(("sd3", "flux"), "joint_attention_kwargs")


def arguments(kind: str, images: int = 1, steps: int = 3, **others: Any) -> dict[str, Any]:
    """A call's, for so many images with a prompt each; latents are those of `latents`."""
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0}
    if kind == "dit":
        return given | {"class_labels": [1, 2, 3][:images], "output_type": "pt"} | others
    given |= {"prompt": PROMPTS[:images], "height": SIZE, "width": SIZE, "output_type": "latent"}
    if kind == "pixart":
        given |= {"use_resolution_binning": False, "clean_caption": False}
    if kind in ("sd3", "flux", "pixart"):
        given["max_sequence_length"] = TOKENS
    return given | others


def run(pipeline: Any, kind: str, images: int = 1, **others: Any) -> Tensor:
    """The images of a call, which draws one image's noise after the other: an image of several is
    the image alone with its seed."""
    seeds = others.pop("seeds", range(images))
    given = arguments(kind, images, **others)
    given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(**given).images
