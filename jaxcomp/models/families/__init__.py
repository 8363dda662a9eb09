"""Model families: from a Hugging Face config to a template of the model.

A family is one file with `ARCHITECTURE`, the name under which checkpoints know it, and
`template(hf_config, generation, compute_dtype, allow)`. Adding one is that file and its line here,
under the `model_type` of its configs.
"""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families import gemma3, llama, mistral, olmo2, phi3, qwen2, qwen3
from jaxcomp.models.families.template import Param

__all__ = ["FAMILIES", "Param", "template_of"]

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3_text": gemma3,
    "olmo2": olmo2,
    "phi3": phi3,
}


def template_of(
    hf_config: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    compute_dtype: str = "float32",
    allow: Iterable[str] = (),
) -> Decoder:
    """The template of the model that a config describes: `Param` leaves instead of arrays.

    Args:
      hf_config: `config.json` as a dict, in the spelling of any transformers version.
      generation: `generation_config.json`; its bos and eos ids win over the config's.
      compute_dtype: dtype of activations and products.
      allow: unknown config fields that the caller vouches change nothing.

    Raises:
      ValueError: an unsupported architecture, or a config field that is wrong, missing, or unknown
        and not off.
    """
    if quantization := hf_config.get("quantization_config"):
        raise ValueError(
            f"config.json: quantization_config={str(quantization)[:120]}: the checkpoint is "
            "already quantized, and a template is of the dense model; read it with "
            "jaxcomp.hub.open_checkpoint, or leave the field out"
        )
    family = _family(hf_config)
    return family.template(hf_config, generation or {}, compute_dtype, tuple(allow))


def _family(hf_config: Mapping[str, Any]) -> ModuleType:
    known = {family.ARCHITECTURE: (name, family) for name, family in FAMILIES.items()}
    found = hf_config.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or found[0] not in list(known):
        raise ValueError(
            f"config.json: architectures={found} is not supported; there is {', '.join(known)}"
        )
    name, family = known[found[0]]
    if hf_config.get("model_type", name) != name:
        raise ValueError(
            f"config.json: model_type={hf_config['model_type']!r} does not go with {found[0]}, "
            f"whose model_type is {name!r}; correct one of them"
        )
    return family
