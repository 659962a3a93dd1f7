"""Dots put back into module paths of known architectures that had them replaced by underscores."""

from __future__ import annotations

import re

INDEX = "0|[1-9][0-9]{0,3}"  # of a module in a list

# The names of modules in diffusers' UNets (SD 1, 2, XL) and transformers (FLUX, SD3, PixArt, DiT),
# in CLIP's text models and in T5's encoder. `dotted` takes the longest one that fits.
_ATTENTION = """
    attn attn1 attn2 to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj
    norm_q norm_k norm_added_q norm_added_k
"""
_BLOCKS = """
    norm norm1 norm2 norm3 norm1_context norm2_context ff ff_context net proj proj_in proj_out
    proj_mlp linear linear_1 linear_2 act act_1 act_mlp silu nonlinearity dropout
"""
_UNET = """
    down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers transformer_blocks
    conv conv1 conv2 conv_in conv_out conv_norm_out conv_act conv_shortcut time_emb_proj
    time_proj time_embedding add_time_proj add_embedding class_embedding
"""
_TRANSFORMER = """
    single_transformer_blocks x_embedder context_embedder time_text_embed timestep_embedder
    guidance_embedder text_embedder class_embedder embedding_table pos_embed caption_projection
    adaln_single emb additional_condition_proj resolution_embedder aspect_ratio_embedder
    norm_out proj_out_1 proj_out_2
"""
_CLIP = """
    text_model text_projection embeddings token_embedding position_embedding encoder layers
    self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 activation_fn layer_norm1 layer_norm2
    final_layer_norm
"""
_T5 = """
    shared embed_tokens block layer layer_norm SelfAttention q k v o relative_attention_bias
    DenseReluDense wi wi_0 wi_1 wo
"""
_WORDS = frozenset((_ATTENTION + _BLOCKS + _UNET + _TRANSFORMER + _CLIP + _T5).split())
_INDEX = re.compile(INDEX)
_LONGEST = max(word.count("_") + 1 for word in _WORDS)


def dotted(flat: str) -> str | None:
    """The path whose dots were made underscores; None with a part that no known model has.

    "mid_block_attentions_0_proj_in" is "mid_block.attentions.0.proj_in".
    """
    pieces = flat.split("_")
    path: list[str] = []
    start = 0
    while start < len(pieces):
        for stop in range(min(start + _LONGEST, len(pieces)), start, -1):
            word = "_".join(pieces[start:stop])
            if word in _WORDS or (path and _INDEX.fullmatch(word)):
                path.append(word)
                start = stop
                break
        else:
            return None
    return ".".join(path)
