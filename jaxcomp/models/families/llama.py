"""Llama 1 to 3, SmolLM and what else calls itself `LlamaForCausalLM`."""

from collections.abc import Mapping
from typing import Any

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.common import depth, read_dense
from jaxcomp.models.families.fields import Fields
from jaxcomp.models.families.template import DenseShape, dense_decoder

ARCHITECTURE = "LlamaForCausalLM"


def template(
    hf_config: Mapping[str, Any],
    generation: Mapping[str, Any],
    compute_dtype: str,
    allow: tuple[str, ...],
) -> Decoder:
    """See `jaxcomp.models.families.template_of`."""
    fields = Fields(hf_config)
    dense = read_dense("llama", fields, generation, compute_dtype, allow)
    bias = fields.flag("attention_bias")
    shape = DenseShape(
        **dense,
        windows=(None,) * depth(fields),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )
    fields.finish(allow=allow)
    return dense_decoder(shape)
