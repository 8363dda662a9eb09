"""What architectures of llama.cpp say in other words than its "llama", or leave to its code.

Source: llama.cpp's `convert_hf_to_gguf` for keys, tensor names and the + 1 of Gemma's norms;
`llama-model.cpp` for what a gemma3 file does not say: five blocks of six have the window, their
rotary embedding is unscaled with base 10,000, and scores are divided by the root of head_dim, or
of d_model / n_heads in the model of 62 blocks.
"""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxcomp.hub.gguf import GGUFFile
from jaxcomp.hub.names import to_gguf, to_hf
from jaxcomp.models.families.fields import Fields

ROPE_FACTORS = {
    "long_factor": "rope_factors_long.weight",
    "short_factor": "rope_factors_short.weight",
}
ROPE_FREQS = "rope_freqs.weight"
LOCAL_THETA = 10_000.0
WINDOW_PATTERN = 6
LARGEST = 62  # blocks of Gemma 3 27B
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _nothing(file: GGUFFile, fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


class Dialect(NamedTuple):
    """How to read the files of one architecture.

    Attributes:
      family: key in FAMILIES.
      names: GGUF's names of a block's tensors that are other ones in this family → Hugging Face's.
      norm_shift: what the file adds to the weights of norms.
      config: (file, its fields, the config so far) → fields of the config that differ.
      partial: RoPE may turn fewer channels than a head has.
      said: tensors that are no weights; the config says what they say.
    """

    family: str
    names: Mapping[str, str] = MappingProxyType({})
    norm_shift: int = 0
    config: Callable[[GGUFFile, Fields, Mapping[str, Any]], dict[str, Any]] = _nothing
    partial: bool = False
    said: tuple[str, ...] = (ROPE_FREQS,)


def hf_name(name: str, dialect: Dialect) -> str | None:
    """The Hugging Face name of a GGUF tensor, None if there is none."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in dialect.names:
        return f"model.layers.{match[1]}.{dialect.names[match[2]]}.{match[3]}"
    usual = to_hf(name)
    taken = usual and any(f".{new}." in usual for new in dialect.names.values())
    return None if taken else usual


def gguf_name(name: str, dialect: Dialect) -> str | None:
    """The GGUF name of a Hugging Face tensor, None if there is none."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name)
    own = {new: old for old, new in dialect.names.items()}
    if match and match[2] in own:
        return f"blk.{match[1]}.{own[match[2]]}.{match[3]}"
    return to_gguf(name)


def _gemma3(file: GGUFFile, fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    window = fields.integer("attention.sliding_window", None)
    local = dict(rope_type="default", rope_theta=fields.number("rope.freq_base_swa", LOCAL_THETA))
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == LARGEST:
        scalar = config["hidden_size"] / config["num_attention_heads"]
    return dict(
        hidden_act=None,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=window,
        sliding_window_pattern=WINDOW_PATTERN if window else 1,
        query_pre_attn_scalar=scalar,
        rope_parameters=dict(full_attention=config["rope_parameters"], sliding_attention=local),
    )


def _phi3(file: GGUFFile, fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim, rope = config["head_dim"], config["rope_parameters"]
    turned = fields.integer("rope.dimension_count", head_dim)
    share = turned / head_dim
    if int(head_dim * share) != turned:  # how it is read again
        share = math.nextafter(share, 2.0)
    if any(name in file.tensors for name in ROPE_FACTORS.values()):
        rope = dict(rope_type="longrope", rope_theta=rope["rope_theta"])
        rope["attention_factor"] = fields.number("rope.scaling.attn_factor")
        for key, name in ROPE_FACTORS.items():
            if name not in file.tensors:
                raise ValueError(f"{file.path}: tensor {name!r} is missing; convert it again")
            rope[key] = file.rows(name, 0, math.prod(file.tensors[name].shape)).tolist()
    return dict(
        rope_parameters=rope,
        partial_rotary_factor=share,
        sliding_window=fields.integer("attention.sliding_window", 0, least=0) or None,
        original_max_position_embeddings=fields.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    )


DIALECTS = {  # general.architecture → how to read it
    "llama": Dialect("llama"),  # Mistral too
    "qwen2": Dialect("qwen2"),
    "qwen3": Dialect("qwen3"),
    "gemma3": Dialect(
        "gemma3_text",
        SANDWICH | {"ffn_norm": "pre_feedforward_layernorm"},
        norm_shift=1,
        config=_gemma3,
    ),
    "olmo2": Dialect("olmo2", SANDWICH),
    "phi3": Dialect(
        "phi3",
        {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        config=_phi3,
        partial=True,
        said=(ROPE_FREQS, *ROPE_FACTORS.values()),
    ),
}
