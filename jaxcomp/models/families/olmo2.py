"""OLMo 2: no norm before a unit, one behind it; q and k are normalised over all heads together."""

from collections.abc import Mapping
from typing import Any

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.common import depth, read_dense
from jaxcomp.models.families.fields import Fields
from jaxcomp.models.families.template import DenseShape, dense_decoder

ARCHITECTURE = "Olmo2ForCausalLM"
NORMS = {
    "attn_post_norm": "post_attention_layernorm",
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
    dense = read_dense("olmo2", fields, generation, compute_dtype, allow)
    bias = fields.flag("attention_bias")
    shape = DenseShape(
        **dense,
        windows=(None,) * depth(fields),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="joint",
        norms=NORMS,
    )
    fields.finish(allow=allow)
    return dense_decoder(shape)
