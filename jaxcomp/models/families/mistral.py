"""Mistral: Llama with an attention window, the same in every block."""

from collections.abc import Mapping
from typing import Any

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.common import depth, read_dense
from jaxcomp.models.families.fields import Fields
from jaxcomp.models.families.template import DenseShape, dense_decoder

ARCHITECTURE = "MistralForCausalLM"
DEFAULT_WINDOW = 4096  # a config without the field; null means no window


def template(
    hf_config: Mapping[str, Any],
    generation: Mapping[str, Any],
    compute_dtype: str,
    allow: tuple[str, ...],
) -> Decoder:
    """See `jaxcomp.models.families.template_of`."""
    fields = Fields(hf_config)
    dense = read_dense("mistral", fields, generation, compute_dtype, allow)
    absent = DEFAULT_WINDOW if "sliding_window" not in hf_config else None
    window = fields.integer("sliding_window", absent)
    shape = DenseShape(**dense, windows=(window,) * depth(fields))
    fields.finish(allow=allow)
    return dense_decoder(shape)
