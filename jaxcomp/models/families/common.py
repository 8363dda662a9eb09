"""What the configs of all Llama-like families say in the same words."""

from collections.abc import Mapping
from typing import Any

from jaxcomp.models.config import ModelConfig
from jaxcomp.models.families.fields import Fields
from jaxcomp.models.families.rope_fields import read_rope
from jaxcomp.models.rope import Rope

MAX_BLOCKS = 10_000
ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_dense(
    family: str,
    fields: Fields,
    generation: Mapping[str, Any],
    compute_dtype: str,
    allow: tuple[str, ...],
    head_dim: int | None = None,
    *,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    tied: bool = False,
    rope: Rope | None = None,
    partial_rope: bool = False,
) -> dict[str, Any]:
    """The arguments of `DenseShape` that families read alike.

    Args:
      family: key in FAMILIES.
      fields: the config.
      generation: `generation_config.json`, or an empty dict; its token ids win.
      compute_dtype: dtype of activations and products.
      allow: fields the caller vouches for.
      head_dim: what a config without `head_dim` means; None for d_model / n_heads.
      activation: the field that names it, and what a config without the field means.
      tied: what a config without `tie_word_embeddings` means.
      rope: the rotary embedding, where the family reads it in another way.
      partial_rope: the family can turn a share of a head's channels.
    """
    d_model, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    n_kv_heads = fields.integer("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise ValueError(
            f"{fields.where}: num_attention_heads={n_heads} is not a multiple of "
            f"num_key_value_heads={n_kv_heads}; correct them there"
        )
    if head_dim is None and fields.get("head_dim", None) is None and d_model % n_heads:
        raise ValueError(
            f"{fields.where}: hidden_size={d_model} is not a multiple of "
            f"num_attention_heads={n_heads} and head_dim is not given; add head_dim"
        )
    head_dim = fields.integer("head_dim", head_dim or d_model // n_heads)
    name = fields.get(*activation)
    if name not in list(ACTIVATION_NAMES):  # a list compares, whatever type the config has
        raise ValueError(
            f"{fields.where}: {activation[0]}={name!r} is not supported; "
            f"there is {', '.join(ACTIVATION_NAMES)}"
        )
    context = fields.integer("max_position_embeddings")
    config = ModelConfig(
        family=family,
        d_model=d_model,
        vocab_size=fields.integer("vocab_size"),
        context_length=context,
        compute_dtype=compute_dtype,
        bos_token_id=_token_id(fields, generation, "bos_token_id"),
        eos_token_ids=_token_ids(fields, generation, "eos_token_id"),
    )
    return dict(
        config=config,
        d_ff=fields.integer("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        eps=fields.number("rms_norm_eps"),
        rope=rope or read_rope(fields, context, head_dim, allow, partial_rope),
        activation=ACTIVATION_NAMES[name],
        tied=fields.flag("tie_word_embeddings", tied),
    )


def depth(fields: Fields) -> int:
    """Number of blocks, checked before anything is built for each of them."""
    n_blocks = fields.integer("num_hidden_layers")
    if n_blocks > MAX_BLOCKS:
        raise ValueError(
            f"{fields.where}: num_hidden_layers={n_blocks} is above {MAX_BLOCKS}, more than any "
            "model has; the file is damaged: download it again"
        )
    return n_blocks


def windows_by_layer(fields: Fields) -> tuple[int | None, ...]:
    """Attention window of each block, as Qwen2 and Qwen3 say it.

    Without `layer_types`, `use_sliding_window` gives the window to the blocks from
    `max_window_layers` on: the first ones see everything.

    Raises:
      ValueError: `layer_types` of another length or with a kind there is no block for.
    """
    n_blocks = depth(fields)
    window = fields.integer("sliding_window", 4096)
    first = fields.integer("max_window_layers", 28, least=0)
    window = window if fields.flag("use_sliding_window") else None
    kinds = fields.get("layer_types", None)
    if kinds is None:
        return tuple(window if i >= first else None for i in range(n_blocks))
    return windows_of(fields, kinds, window, "use_sliding_window and sliding_window")


def windows_of(
    fields: Fields, kinds: Any, window: int | None, needs: str
) -> tuple[int | None, ...]:
    """The window of each block, from the kind of its attention.

    Args:
      needs: what gives a model the window, for the message.

    Raises:
      ValueError: not one known kind for each block.
    """
    n_blocks = depth(fields)
    known = {"full_attention": None} | ({"sliding_attention": window} if window else {})
    named = isinstance(kinds, list) and all(isinstance(k, str) and k in known for k in kinds)
    if not named or len(kinds) != n_blocks:
        raise ValueError(
            f"{fields.where}: layer_types={kinds} must name {n_blocks} blocks out of "
            f"{', '.join(known)} (sliding_attention needs {needs})"
        )
    return tuple(known[kind] for kind in kinds)


def _token_id(fields: Fields, generation: Mapping[str, Any], name: str) -> int | None:
    ids = _token_ids(fields, generation, name)
    return ids[0] if ids else None


def _token_ids(fields: Fields, generation: Mapping[str, Any], name: str) -> tuple[int, ...]:
    found = generation.get(name)
    found = fields.get(name, None) if found is None else found
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{fields.where}: {name}={found!r} must be token ids; correct it there")
    return tuple(ids)
