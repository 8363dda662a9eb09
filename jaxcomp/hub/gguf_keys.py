"""What a GGUF file says about a model apart from its tensors; `gguf_model` read backwards.

Everything is taken from the tree, which knows what it computes.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxcomp.hub.gguf_container import ALIGNMENT, Value
from jaxcomp.hub.names import Architecture
from jaxcomp.models.config import ModelConfig
from jaxcomp.models.decoder import Block
from jaxcomp.models.rope import Rope, turned_channels

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
NAME = "exported by jaxcomp"  # loaders go by the names of some families, if they find one here
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}  # what llama.cpp has built in


def model_keys(
    config: ModelConfig, blocks: list[Block], eps: float, arch: Architecture, file_type: str
) -> dict[str, Value]:
    """The keys of the model itself.

    Args:
      config: of the model.
      blocks: structs.
      eps: of its norms.
      arch: what llama.cpp calls it.
      file_type: storage type of most of its weights.
    """
    attn, d_ff = blocks[0].attn, blocks[0].ffn.gate.w.shape[-1]
    numbers: dict[str, Any] = {
        "context_length": np.uint32(context_length(config, blocks)),
        "embedding_length": np.uint32(config.d_model),
        "block_count": np.uint32(len(blocks)),
        "feed_forward_length": np.uint32(d_ff),
        "attention.head_count": np.uint32(attn.n_heads),
        "attention.head_count_kv": np.uint32(attn.n_kv_heads),
        "attention.key_length": np.uint32(attn.head_dim),
        "attention.value_length": np.uint32(attn.head_dim),
        "attention.layer_norm_rms_epsilon": np.float32(eps),
        "vocab_size": np.uint32(config.vocab_size),
        "rope.dimension_count": np.uint32(turned_channels(attn.rope, attn.head_dim)),
        "rope.freq_base": np.float32(attn.rope.theta),
    }
    general = {
        "general.architecture": arch.name,
        "general.name": NAME,
        "general.alignment": np.uint32(ALIGNMENT),
        "general.file_type": np.uint32(FILE_TYPES[file_type]),
        "general.quantization_version": np.uint32(2),
    }
    numbers |= rope_keys(attn.rope, arch)
    return general | {f"{arch.name}.{key}": value for key, value in numbers.items()}


def context_length(config: ModelConfig, blocks: list[Block]) -> int:
    """Tokens up to which llama.cpp computes what the model computes, at most its own context.

    No architecture written here has windows there, and none has dynamic NTK, which acts beyond the
    context before extension.
    """
    lengths = [config.context_length]
    lengths += [block.attn.window for block in blocks if block.attn.window is not None]
    rope = blocks[0].attn.rope
    return min(lengths + [rope.original_context] * (rope.kind == "dynamic"))


def rope_keys(rope: Rope, arch: Architecture) -> dict[str, Value]:
    """The keys of a scaled rotary embedding; llama3's scaling is a tensor, `llama3_divisors`.

    Raises:
      ValueError: llama.cpp has no such scaling, or none for this architecture.
    """
    if rope.kind in ("default", "dynamic"):
        return {}
    if rope.kind == "llama3" and arch.name == "llama":
        return {}
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": np.float32(rope.factor)}
    if rope.kind != "yarn":
        raise ValueError(
            f"{arch.name} of llama.cpp has no rotary embedding of kind {rope.kind!r}; it has "
            f"default, linear, yarn{' and llama3' if arch.name == 'llama' else ''}"
        )
    wanted = YARN | {"attention_factor": 0.1 * math.log(max(rope.factor, 1.0)) + 1.0}
    for name, value in wanted.items():
        if not math.isclose(getattr(rope, name), value, rel_tol=1e-6):
            raise ValueError(
                f"the YaRN embedding has {name}={getattr(rope, name):g} and llama.cpp's, as its "
                f"converter writes it, {value:g}"
            )
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": np.float32(rope.factor),
        "rope.scaling.original_context_length": np.uint32(rope.original_context),
    }


def llama3_divisors(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """What divides each frequency, float32: 1/divisor = s + (1 − s)/factor, as in `models.rope`."""
    freq = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope.original_context * freq / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / (smooth + (1 - smooth) / rope.factor)).astype(np.float32)
