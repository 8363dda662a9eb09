"""Tensor names of GGUF files against those of Hugging Face checkpoints, both ways.

Source: `gguf.tensor_mapping` of llama.cpp's Python package, for the families read here.
"""

import re
from typing import NamedTuple

MODEL = {  # GGUF → Hugging Face
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {  # blk.{i}.<GGUF> → model.layers.{i}.<Hugging Face>
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Architecture(NamedTuple):
    """What llama.cpp makes of a family.

    Attributes:
      name: `general.architecture`.
      interleaved: RoPE turns neighbouring channels, so that rows of q and k are reordered.
      biases: it has the biases that the family may have.
      tied: the embedding may be the head.
      square: q makes as many channels as the residual stream has.
    """

    name: str
    interleaved: bool = False
    biases: bool = True
    tied: bool = True
    square: bool = False


ARCHITECTURES = {  # family → architecture
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", biases=False),
    "olmo2": Architecture("olmo2", biases=False, tied=False, square=True),
    "phi3": Architecture("phi3", square=True),
}


def to_hf(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None if there is none."""
    return _translate(name, r"blk\.(\d+)\.", "model.layers.{}.", MODEL, BLOCK)


def to_gguf(name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor, None if there is none."""
    model, block = ({v: k for k, v in table.items()} for table in (MODEL, BLOCK))
    return _translate(name, r"model\.layers\.(\d+)\.", "blk.{}.", model, block)


def _translate(
    name: str, prefix: str, other_prefix: str, model: dict[str, str], block: dict[str, str]
) -> str | None:
    stem, _, kind = name.rpartition(".")
    in_block = re.match(prefix, stem)
    table = block if in_block else model
    stem = stem[in_block.end() :] if in_block else stem
    if stem not in table or kind not in ("weight", "bias"):
        return None
    return f"{other_prefix.format(in_block[1]) if in_block else ''}{table[stem]}.{kind}"
