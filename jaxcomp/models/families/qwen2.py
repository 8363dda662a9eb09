"""Qwen2 and Qwen2.5: biases on q, k and v; an attention window in the later blocks if at all."""

from collections.abc import Mapping
from typing import Any

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.common import read_dense, windows_by_layer
from jaxcomp.models.families.fields import Fields
from jaxcomp.models.families.template import DenseShape, dense_decoder

ARCHITECTURE = "Qwen2ForCausalLM"


def template(
    hf_config: Mapping[str, Any],
    generation: Mapping[str, Any],
    compute_dtype: str,
    allow: tuple[str, ...],
) -> Decoder:
    """See `jaxcomp.models.families.template_of`."""
    fields = Fields(hf_config)
    dense = read_dense("qwen2", fields, generation, compute_dtype, allow)
    shape = DenseShape(**dense, windows=windows_by_layer(fields), qkv_bias=True)
    fields.finish(allow=allow)
    return dense_decoder(shape)
