"""Qwen3, dense: q and k are normalised per head, and head_dim is a number of its own."""

from collections.abc import Mapping
from typing import Any

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.common import read_dense, windows_by_layer
from jaxcomp.models.families.fields import Fields
from jaxcomp.models.families.template import DenseShape, dense_decoder

ARCHITECTURE = "Qwen3ForCausalLM"
DEFAULT_HEAD_DIM = 128  # a config without the field, whatever d_model / n_heads is


def template(
    hf_config: Mapping[str, Any],
    generation: Mapping[str, Any],
    compute_dtype: str,
    allow: tuple[str, ...],
) -> Decoder:
    """See `jaxcomp.models.families.template_of`."""
    fields = Fields(hf_config)
    dense = read_dense("qwen3", fields, generation, compute_dtype, allow, DEFAULT_HEAD_DIM)
    bias = fields.flag("attention_bias")
    shape = DenseShape(
        **dense, windows=windows_by_layer(fields), qkv_bias=bias, o_bias=bias, qk_norm="head"
    )
    fields.finish(allow=allow)
    return dense_decoder(shape)
