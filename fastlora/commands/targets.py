"""Models that commands can train: ours of digits, and Stable Diffusion from a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.commands import CommandError
from fastlora.commands.models import PIPELINE, chosen_device, model_folder, pretrained
from fastlora.samplers import Schedule, Table, ddim

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Target:
    """A model in the form that recipes take, with how to feed it."""

    model: nn.Module  # model(x, t, cond), the text encoder inside
    schedule: Schedule
    prediction: str
    shape: tuple[int, ...]  # of one x: a picture, or its latents
    encode: Callable[[Sequence[str]], torch.Tensor]  # captions -> cond, differentiable
    read: Callable[[Sequence[Path]], torch.Tensor]  # picture files -> x0 [N, *shape]
    # What adapters are saved from, by what is put before a file's ending: paths in a file are those
    # of the module that a user loads it into.
    parts: dict[str, nn.Module]
    unet: str  # the path of the network in the model: what is trained without a text encoder
    lr: float  # of shifts, and of norms: SVDiff's, or what does well on this model
    norm_lr: float
    prior_table: Table  # how class pictures are sampled
    guidance: float


def load_target(name: str, size: int | None, device: str | None, dtype: str) -> Target:
    """`digits`, or the Stable Diffusion in that folder. Raises CommandError, AdapterError for a
    device that is not there, and ImportError."""
    at, folder = chosen_device(device), model_folder(name, PIPELINE)
    if folder is not None:
        return diffusion_target(folder, size, at, getattr(torch, dtype))
    if size not in (None, 32):
        raise CommandError(f"--size: the digits model draws 32 pixels, got {size}")
    if dtype != "float32":
        raise CommandError(f"--dtype: the digits model is trained in float32, got {dtype}")
    return digits_target(at)


def digits_target(device: torch.device) -> Target:
    from fastlora.models import digits

    model = digits.load(device=device)
    schedule = Schedule.cosine(1000)
    return Target(
        model=model,
        schedule=schedule,
        prediction="v",
        shape=model.shape,
        encode=model.encode,
        read=lambda paths: pictures(paths, 32, "L").to(device),
        parts={"": model},
        unet="unet",
        lr=2e-2,
        norm_lr=3e-3,
        prior_table=ddim(schedule, 25, prediction="v", spacing="trailing"),
        guidance=2.0,
    )


class LatentDiffusion(nn.Module):
    """`model(x [B, 4, H, W], t, cond [B, L, D]) -> prediction` of a UNet of diffusers, whatever
    dtype it has; the text encoder is a part of it, so that it can be trained along."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        unet: Any = self.unet
        cond = cond.to(unet.dtype)
        return unet(x.to(unet.dtype), t, encoder_hidden_states=cond).sample.to(x.dtype)


def diffusion_target(
    folder: Path, size: int | None, device: torch.device, dtype: torch.dtype
) -> Target:
    """Stable Diffusion 1.x or 2.x: a UNet on 4 latent channels and one CLIP text encoder."""
    pipe = pretrained(folder, "diffusers", "StableDiffusionPipeline", dtype, safety_checker=None)
    unet, vae = pipe.unet, pipe.vae.to(device).requires_grad_(False).eval()
    if vae.dtype != torch.float32:  # half precision overflows in it
        vae.float()
    model = LatentDiffusion(unet, pipe.text_encoder).to(device).requires_grad_(False).eval()
    scale, factor = vae.config.scaling_factor, pipe.vae_scale_factor
    pixels = size or unet.config.sample_size * factor
    if pixels % factor:
        raise CommandError(f"--size: expected a multiple of {factor}, got {pixels}")

    def encode(captions: Sequence[str]) -> torch.Tensor:
        tokenizer = pipe.tokenizer
        warn_of_cut(tokenizer, captions)
        ids = tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        return model.text_encoder(input_ids=ids).last_hidden_state

    @torch.no_grad()
    def read(paths: Sequence[Path]) -> torch.Tensor:
        """Latents: the mean that the autoencoder gives, scaled; one picture at a time."""
        found = []
        for picture in pictures(paths, pixels, "RGB").split(1):
            found.append(vae.encode(picture.to(device)).latent_dist.mode() * scale)
        return torch.cat(found)

    schedule, prediction = schedule_of(dict(pipe.scheduler.config))
    return Target(
        model=model,
        schedule=schedule,
        prediction=prediction,
        shape=(unet.config.in_channels, pixels // factor, pixels // factor),
        encode=encode,
        read=read,
        parts={"": unet, "text_encoder": pipe.text_encoder},
        unet="unet",
        lr=1e-3,
        norm_lr=1e-6,
        prior_table=ddim(schedule, min(50, len(schedule)), prediction=prediction),
        guidance=7.5,
    )


def warn_of_cut(tokenizer: Any, captions: Sequence[str]) -> None:
    """A UserWarning for a caption of which the text encoder does not see the end."""
    most = tokenizer.model_max_length
    for caption in dict.fromkeys(captions):
        count = len(tokenizer(caption, verbose=False).input_ids)
        if count > most:
            warnings.warn(
                f"caption {caption!r} has {count} tokens, of which the text encoder takes {most}:"
                " the rest is cut off",
                stacklevel=3,
            )


def schedule_of(config: dict[str, Any]) -> tuple[Schedule, str]:
    """The levels that a model was trained on, and what it predicts, from its scheduler of any
    kind: samplers differ, these entries do not."""
    from fastlora.samplers import schedule_from_config

    trained = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    trained += ("set_alpha_to_one", "rescale_betas_zero_snr")
    kept = {key: config[key] for key in trained if config.get(key) is not None}
    names = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in names:
        raise CommandError(f"--model: its scheduler predicts {prediction}: expected {[*names]}")
    try:
        schedule = schedule_from_config({"_class_name": "DDIMScheduler", **kept})
    except ValueError as error:
        raise CommandError(f"--model: its scheduler: {error}") from error
    return schedule, names[prediction]


def find_pictures(folder: Path) -> list[Path]:
    """Picture files of a folder (or one file), by name. Raises CommandError if there are none."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise CommandError(f"--images: {folder}: no such folder")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if not found:
        raise CommandError(f"--images: {folder}: no pictures in it ({', '.join(PICTURES)})")
    return found


def pictures(paths: Sequence[Path], size: int, mode: str) -> torch.Tensor:
    """float32 [N, C, size, size] in [-1, 1]: turned as the camera says, cut to the middle square,
    resized (Lanczos); what is transparent is white. `mode`: RGB or L. Raises CommandError for a
    file that is no picture."""
    import numpy as np
    from PIL import Image, ImageOps

    found = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                picture = on_white(ImageOps.exif_transpose(opened)).convert(mode)
        # Pillow has no class of its own for broken files, and one for too large ones.
        except Exception as error:
            raise CommandError(f"--images: {path}: not a picture that reads: {error}") from error
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
        values = torch.from_numpy(np.array(picture, dtype=np.float32) / 127.5 - 1)
        found.append(values[None] if mode == "L" else values.permute(2, 0, 1))
    return torch.stack(found)


def on_white(picture: Any) -> Any:
    """A picture of Pillow without transparency, which `convert` would drop: as a rule it hides
    black."""
    from PIL import Image

    # A colour that stands for transparent is in `info`: of palettes, and of pictures without alpha.
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture)
