"""Phi 3 and 4 as `Phi3ForCausalLM`: q, k, v are rows of one tensor, and so are gate and up.

Long contexts are LongRoPE's; some models turn only a share of a head's channels.
"""

from collections.abc import Mapping
from typing import Any

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.common import depth, read_dense
from jaxcomp.models.families.fields import HARMLESS, Fields
from jaxcomp.models.families.rope_fields import ORIGINAL
from jaxcomp.models.families.template import DenseShape, dense_decoder

ARCHITECTURE = "Phi3ForCausalLM"
DEFAULT_ORIGINAL = 4096  # context before extension of a config without the field
# Dropouts, the authors' own code of the same model.
HARMLESS_HERE = HARMLESS | {"embd_pdrop", "resid_pdrop", "auto_map"}
LONGROPE = ("longrope", "su", "yarn")  # the names that it had
OFF_AT_ONE = ("full_attn_mod", "interpolate_factor")


def template(
    hf_config: Mapping[str, Any],
    generation: Mapping[str, Any],
    compute_dtype: str,
    allow: tuple[str, ...],
) -> Decoder:
    """See `jaxcomp.models.families.template_of`."""
    fields = Fields(_renamed(hf_config))
    # The context before extension stands in configs that extend nothing, too.
    dense = read_dense(
        "phi3", fields, generation, compute_dtype, (*allow, ORIGINAL), partial_rope=True
    )
    shape = DenseShape(
        **dense,
        windows=(fields.integer("sliding_window", None),) * depth(fields),
        fused=True,
    )
    for name in OFF_AT_ONE:
        if (value := fields.integer(name, 1)) != 1:
            raise ValueError(f"{fields.where}: {name}={value} is not supported; there is 1")
    fields.finish(HARMLESS_HERE, allow)
    return dense_decoder(shape)


def _renamed(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with LongRoPE under its last name.

    Raises:
      ValueError: another scaling, which the family does not have.
    """
    config = {ORIGINAL: DEFAULT_ORIGINAL} | dict(hf_config)
    for name in ("rope_scaling", "rope_parameters"):
        scaling = config.get(name)
        if not isinstance(scaling, dict):
            continue  # refused where it is read
        kinds = {key: scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None}
        for key, kind in kinds.items():
            if kind not in ("default", *LONGROPE):
                raise ValueError(
                    f"config.json: {name}: {key}={kind!r} is not supported for phi3; "
                    f"there is default, {', '.join(LONGROPE)}"
                )
        renamed = {key: "longrope" for key, kind in kinds.items() if kind in LONGROPE}
        config[name] = scaling | renamed
    return config
