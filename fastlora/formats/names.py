"""The names that files have for a model's weights, and the weights that are meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastlora.formats import names_flux, names_ldm
from fastlora.formats.changes import Target
from fastlora.formats.files import FormatError
from fastlora.formats.names_flux import fused
from fastlora.formats.names_grammar import dotted

__all__ = ["Index", "Place", "dotted", "evidence", "family", "find", "flat_name", "fused", "places"]

_TEXT_ENCODERS = {
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
_PREFIXES = {
    "sd": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux": {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
}
_UNET = """
    down_blocks mid_block up_blocks conv_in conv_out conv_norm_out
    time_embedding add_embedding class_embedding
"""
_TRANSFORMER = """
    transformer_blocks single_transformer_blocks x_embedder context_embedder time_text_embed
    pos_embed caption_projection adaln_single norm_out proj_out proj_out_1 proj_out_2
"""
_COMPONENTS = {  # by the first part of a path
    **dict.fromkeys(_UNET.split(), "unet"),
    **dict.fromkeys(_TRANSFORMER.split(), "transformer"),
}
# What only one of the families has. UNets: which blocks have attentions, how many there are and how
# deep; FLUX: blocks without a stream for text, and T5 as the second text encoder.
_EVIDENCE = {
    "sd": re.compile(
        r"unet\.((down|up)_blocks\.3|down_blocks\.0\.attentions|up_blocks\.[23]\.attentions"
        r"|down_blocks\.2\.downsamplers|up_blocks\.2\.upsamplers)\."
    ),
    "sdxl": re.compile(
        r"unet\.(add_embedding|up_blocks\.0\.attentions|\w+(\.\d)?\.attentions\.\d"
        r"\.transformer_blocks\.[1-9])\."
    ),
    "flux": re.compile(
        r"transformer\.(single_transformer_blocks|time_text_embed\.guidance_embedder)\."
        r"|text_encoder_2\.encoder\.block\."
    ),
}


# A pipeline has a UNet or a transformer, and files name the one when they mean the other.
_ALIASES = {"unet": "transformer", "transformer": "unet"}


class Place(NamedTuple):
    """A module that a name means, and its share of the name's rows: fused projections have several.

    The rows [first, last) of `total` equal parts.
    """

    target: Target
    first: int = 0
    last: int = 1
    total: int = 1


def places(prefix: str, flat: str, family: str | None = None) -> tuple[Place, ...]:
    """What a kohya or LyCORIS name `<prefix>_<flat>` means: no place for a name that is unknown.

    `prefix`: "lora_unet", "lora_transformer", "lora_te", "lora_te1", "lora_te2", "lora_te3", or
    "lycoris", after which the model itself is meant (component ""). Paths of text encoders and of
    such models that the name does not tell stay flat (`Target.flat`), for `Index` to find.

    `family` "flux" makes lora_te3 what it is in files for FLUX: T5, the second text encoder there
    and the third of SD3.
    """
    if not flat:
        return ()
    if prefix == "lora_te3" and family == "flux":
        return (Place(_named("text_encoder_2", flat)),)
    if prefix in _TEXT_ENCODERS:
        return (Place(_named(_TEXT_ENCODERS[prefix], flat)),)
    if prefix == "lycoris":
        known = (p._replace(target=p.target._replace(component="")) for p in _denoiser(flat))
        return tuple(known) or (Place(_named("", flat)),)
    if prefix == "lora_transformer":
        return tuple(p for p in _denoiser(flat) if p.target.component == "transformer")
    return _denoiser(flat) if prefix == "lora_unet" else ()


def flat_name(target: Target, family: str) -> tuple[str, str]:
    """The prefix and the flat name of a module in kohya's files of "sd", "sdxl" or "flux".

    `places` of the two, with the family, is the module again. Raises FormatError for an unknown
    family, for a component or a path that it has no name for, and for a module that is a part of a
    fused one there (`fused`).
    """
    if family not in _PREFIXES:
        raise FormatError(f"family: expected one of {', '.join(_PREFIXES)}, got {family!r}")
    module = _spelled_out(target)
    if module.component == "transformer" and (whole := fused(module.path)):
        raise FormatError(f"{target}: expected a whole module, got a part of FLUX's {whole[0]}")
    prefix, flat = _PREFIXES[family].get(module.component), _flat(module, family)
    if prefix and flat:
        unknown = Target(module.component, flat, flat=True)
        if places(prefix, flat, family) in ((Place(module),), (Place(unknown),)):
            return prefix, flat
    raise FormatError(f"{target}: kohya's files for {family} have no name for it")


def family(targets: Iterable[Target]) -> str:
    """The one of "sd", "sdxl" and "flux" that has these modules.

    Raises FormatError where the paths do not tell: text encoders and some layers are alike.
    """
    modules = [_spelled_out(target) for target in targets]
    found = evidence(modules)
    if len(found) != 1:
        some = ", ".join(map(str, modules[:3])) + (", ..." if len(modules) > 3 else "")
        raise FormatError(
            f"expected modules of one of {', '.join(_EVIDENCE)}, got some that "
            f"{' and '.join(sorted(found)) or 'none of them'} alone would have: {some or 'none'}"
        )
    return found.pop()


def evidence(targets: Iterable[Target]) -> set[str]:
    """Every family that has some of these modules and that no other one has."""
    modules = [_spelled_out(target) for target in targets]
    found = {f for f, only in _EVIDENCE.items() if any(only.match(str(m)) for m in modules)}
    if {"unet", "text_encoder_2"} <= {module.component for module in modules}:
        found.add("sdxl")
    return found


class Index:
    """The modules of a live model, by the names that files have for them."""

    def __init__(self, paths: Iterable[str]):
        """`paths`: the names of the model's modules, or of those of them that may be meant."""
        self._paths = set(paths)
        self._flat: dict[str, list[str]] = {}
        for path in sorted(self._paths):
            self._flat.setdefault(path.replace(".", "_"), []).append(path)

    def find(self, target: Target) -> str | None:
        """The path of a target's module, whatever the component; None without one.

        CLIP's `text_model` may be missing or additional: not all versions of transformers have it.
        Raises FormatError for a flat name that several modules have.
        """
        wrapper = "text_model_" if target.flat else "text_model."
        bare = target.path.removeprefix(wrapper)
        for path in (target.path, bare if bare != target.path else wrapper + bare):
            found = self._flat.get(path, []) if target.flat else [path] * (path in self._paths)
            if len(found) > 1:
                raise FormatError(f"{target}: several modules have this name: {', '.join(found)}")
            if found:
                return found[0]
        return None


def find(target: Target, indices: Mapping[str, Index]) -> list[Target]:
    """The modules of models by component that a target may mean; several where it names none.

    A model alone has the component ""; it may be the one that is meant, or have it as a part.
    Raises what `Index.find` does.
    """
    names = (target.component, _ALIASES.get(target.component))
    wanted = [name for name in names if name and name in indices][:1]
    if not wanted and ("" in indices or not target.component):
        wanted = list(indices)
    found: list[Target] = []
    for component in wanted:
        path = indices[component].find(target)
        if path is None and not component and target.component:
            whole = f"{target.component}{'_' if target.flat else '.'}{target.path}"
            path = indices[component].find(target._replace(path=whole))
        if path is not None:
            found.append(Target(component, path))
    return found


def _named(component: str, flat: str) -> Target:
    path = dotted(flat)
    return Target(component, flat, flat=True) if path is None else Target(component, path)


def _denoiser(flat: str) -> tuple[Place, ...]:
    """The modules of a UNet or a transformer that a name means, the original's or diffusers'."""
    if shares := names_flux.shares(flat):
        return tuple(Place(Target("transformer", path), *rows) for path, *rows in shares)
    path = names_ldm.to_diffusers(flat) or dotted(flat)
    component = _COMPONENTS.get(path.split(".")[0]) if path else None
    return (Place(Target(component, path)),) if path and component else ()


def _spelled_out(target: Target) -> Target:
    """The target with dots, component and CLIP's `text_model`, as far as these can be told."""
    if target.flat:
        target = _named(target.component, target.path)
    component, path, flat = target
    component = component or _COMPONENTS.get(path.split(".")[0], "")
    if component.startswith("text_encoder") and path.startswith(("encoder.layers.", "embeddings.")):
        path = f"text_model.{path}"
    return Target(component, path, flat)


def _flat(module: Target, family: str) -> str | None:
    """The flat name in a family's files, whatever their names for the component."""
    if module.component == "transformer":
        original = names_flux.from_diffusers(module.path)
        return None if original is None else original[0]
    if module.component == "unet" and family == "sdxl":
        return names_ldm.from_diffusers(module.path)
    return module.path.replace(".", "_")
