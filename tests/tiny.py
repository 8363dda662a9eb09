"""Every family at 2 blocks and d_model 32: configs, random models, tokens, checkpoints on disk.

The numbers are chosen to trip code that assumes too much: grouped heads everywhere, a head_dim
that is not d_model / n_heads (qwen3, mistral, gemma3_text), tied (llama, qwen2, gemma3_text) and
untied heads, a window below the sequence length in every block (mistral) or in the first
(gemma3_text), biases (qwen2), a scale that is not head_dim^(−1/2) (gemma3_text), a head that turns
in part by frequencies that change within the sequence length (phi3).
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.tensorfile import write_tensors
from jaxcomp.core.tree import named_leaves
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families import FAMILIES, Param, template_of
from jaxcomp.models.families.template import stored_tensors
from jaxcomp.models.layers import RMSNorm

VOCAB = 320
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=2,
    torch_dtype="float32",
)
SHORT = [1.0, 1.1, 1.3, 1.4, 1.6, 1.7, 1.8, 1.9]  # LongRoPE's divisors, cut to the pairs that turn
LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict(head_dim=8, tie_word_embeddings=True, attention_bias=False, mlp_bias=False),
    "mistral": dict(head_dim=16, sliding_window=8),
    "qwen2": dict(tie_word_embeddings=True, use_sliding_window=False),
    "qwen3": dict(head_dim=16, attention_bias=False),
    "gemma3_text": dict(
        head_dim=16,
        hidden_act=None,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,
        sliding_window=8,
        sliding_window_pattern=2,
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        tie_word_embeddings=None,
    ),
    "olmo2": dict(attention_bias=False),
    "phi3": dict(
        head_dim=8,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=12,
        pad_token_id=1,
        rope_scaling=dict(type="longrope", short_factor=SHORT, long_factor=LONG),
    ),
}
SENTENCES = [
    "The Atlantic Ocean is the second largest of the five oceans of the world.",
    "In 1492 three ships sailed from Palos; in 1969 two people walked on the Moon.",
    "Each block reads the residual stream and adds to it, and the head reads the sum.",
]


def hf_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The `config.json` of a tiny model; a value of None removes the field."""
    names = {"architectures": [FAMILIES[family].ARCHITECTURE], "model_type": family}
    config = names | COMMON | CONFIGS[family] | overrides
    config = {k: v for k, v in config.items() if v is not None}
    if (scaling := config.get("rope_scaling", {})).get("short_factor") is SHORT:
        pairs = int(config.get("head_dim", 8) * config.get("partial_rotary_factor", 1.0)) // 2
        cut = dict(short_factor=SHORT[:pairs], long_factor=LONG[:pairs])
        config["rope_scaling"] = scaling | cut
    return config


def model(family: str, key: jax.Array, **overrides: Any) -> Decoder:
    """A random model in float32: norms around 1, weights of variance 1/in_ch."""
    template = template_of(hf_config(family, **overrides))
    rng = _generator(key)
    drawn = jax.tree.map(lambda param: jnp.asarray(_draw(param, rng)), template)
    is_norm = lambda p: isinstance(p, RMSNorm)  # noqa: E731
    as_stored = lambda p: p.replace(weight=p.weight - p.offset) if is_norm(p) else p  # noqa: E731
    return jax.tree.map(as_stored, drawn, is_leaf=is_norm)


def tokens(key: jax.Array, batch: int = 2, time: int = 16) -> jax.Array:
    """Random token ids, `[batch, time]` int32."""
    return jnp.asarray(_generator(key).integers(0, VOCAB, (batch, time)), jnp.int32)


def checkpoint(
    family: str,
    key: jax.Array,
    directory: Path,
    shards: int = 1,
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Writes `model(family, key)` as a Hugging Face directory with a tokenizer; returns it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = hf_config(family, **overrides)
    write_weights(directory, hf_tensors(family, key, dtype, **overrides), shards)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    tokenizer().save_pretrained(directory)
    return directory


def hf_tensors(
    family: str, key: jax.Array, dtype: str = "float32", **overrides: Any
) -> dict[str, np.ndarray]:
    """The tensors of `model(family, key)` as Hugging Face names and orients them."""
    arrays = named_leaves(model(family, key, **overrides))
    stored = {
        name: np.concatenate(
            [arrays[at].T if p.transpose else arrays[at] for at, p in parts.items()]
        )
        for name, parts in stored_tensors(template_of(hf_config(family, **overrides))).items()
    }
    return {name: np.asarray(jnp.asarray(x, dtype)) for name, x in stored.items()}


def write_weights(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """One `model.safetensors`, or `shards` files with an index."""
    if shards == 1:
        write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_tensors(directory / file, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of at most `VOCAB` tokens, trained on `SENTENCES`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|start|>", "<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    special = dict(bos_token="<|start|>", pad_token="<|pad|>", eos_token="<|end|>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _generator(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _draw(param: Param, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(param.shape, np.float32)
    if len(param.shape) == 1:
        return 0.1 * x if param.name.endswith(".bias") else 1 + 0.1 * x
    in_ch = param.shape[0] if param.transpose else param.shape[1]  # the embedding feeds the head
    return x / np.float32(np.sqrt(in_ch))
