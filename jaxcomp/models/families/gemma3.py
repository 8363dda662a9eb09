"""Gemma 3, text only: norms around both units, windows in five blocks of six, two rotary bases.

Norm weights are stored as w of (1 + w), also those of queries and keys per head. The embedding is
multiplied by √d_model in the compute dtype, scores by query_pre_attn_scalar^(−1/2). Blocks that see
everything have `rope_theta` and the scaling, those with a window `rope_local_base_freq` alone. The
model is nonsense without a BOS token.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.common import depth, read_dense, windows_of
from jaxcomp.models.families.fields import HARMLESS, Fields
from jaxcomp.models.families.rope_fields import read_ropes
from jaxcomp.models.families.template import DenseShape, dense_decoder

ARCHITECTURE = "Gemma3ForCausalLM"
# What a config without the field means.
DEFAULT_HEAD_DIM = 256
DEFAULT_QUERY_SCALAR = 256.0
DEFAULT_WINDOW = 4096
DEFAULT_PATTERN = 6
THETAS = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}
NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}


def template(
    hf_config: Mapping[str, Any],
    generation: Mapping[str, Any],
    compute_dtype: str,
    allow: tuple[str, ...],
) -> Decoder:
    """See `jaxcomp.models.families.template_of`."""
    fields = Fields(hf_config)
    fields.integer("num_key_value_heads")  # the default would not be n_heads
    context = fields.integer("max_position_embeddings")
    head_dim = fields.integer("head_dim", DEFAULT_HEAD_DIM)
    ropes = read_ropes(fields, context, head_dim, THETAS, allow)
    dense = read_dense(
        "gemma3_text",
        fields,
        generation,
        compute_dtype,
        allow,
        DEFAULT_HEAD_DIM,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        tied=True,
        rope=ropes["full_attention"],
    )
    config = dataclasses.replace(dense.pop("config"), bos="window")
    if config.bos_token_id is None:
        raise ValueError(
            f"{fields.where}: bos_token_id is missing, and the model is nonsense without a BOS "
            "token before the text; add the tokenizer's"
        )
    bias = fields.flag("attention_bias")
    shape = DenseShape(
        config=config,
        **dense,
        windows=_windows(fields),
        window_rope=ropes["sliding_attention"],
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        norms=NORMS,
        norm_offset=1,
        scale=fields.number("query_pre_attn_scalar", DEFAULT_QUERY_SCALAR) ** -0.5,
        embed_scale=math.sqrt(config.d_model),
    )
    fields.finish(HARMLESS | {"cache_implementation"}, allow)
    return dense_decoder(shape)


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """Attention window of each block: by `layer_types`, else all but every so-manieth block.

    Raises:
      ValueError: both are given and disagree, or a window is wanted and null.
    """
    absent = None if "sliding_window" in fields.values else DEFAULT_WINDOW
    window = fields.integer("sliding_window", absent)
    kinds, every = fields.get("layer_types", None), fields.integer("sliding_window_pattern", None)
    n_blocks, period = depth(fields), every or DEFAULT_PATTERN
    regular = [
        "sliding_attention" if i % period else "full_attention" for i in range(1, n_blocks + 1)
    ]
    windows = windows_of(fields, regular if kinds is None else kinds, window, "sliding_window")
    if kinds is not None and every is not None and kinds != regular:
        raise ValueError(
            f"{fields.where}: layer_types={kinds} and sliding_window_pattern={every}, which means "
            f"a block without a window after every {every - 1} with one, disagree; keep one"
        )
    if kinds is not None:  # beside which transformers saves a pattern that it does not read
        fields.get("_sliding_window_pattern", None)
    return windows
