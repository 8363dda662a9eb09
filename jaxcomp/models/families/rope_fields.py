"""The rotary embedding as a `config.json` says it, in the old and in the new spelling.

    old   "rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, …}
    new   "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, …}

and, where types of layers differ in it,

    old   "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {…}
    new   "rope_parameters": {"full_attention": {…}, "sliding_attention": {…}}

Source: transformers' `modeling_rope_utils` (`standardize_rope_params` and the functions behind
each `rope_type`), whose defaults are repeated here so that logits agree.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxcomp.models.families.fields import Fields
from jaxcomp.models.rope import Rope, turned_channels

DEFAULT_THETA = 10_000.0  # what transformers takes when a config does not say
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
FROM_ORIGINAL = ("llama3", "yarn", "longrope")  # kinds that go by the context before extension
ORIGINAL = "original_max_position_embeddings"


def read_rope(
    fields: Fields,
    context_length: int,
    head_dim: int,
    allow: Collection[str] = (),
    partial: bool = False,
) -> Rope:
    """The rotary embedding of a model whose config has `max_position_embeddings=context_length`.

    Args:
      partial: the family can turn a share of a head's channels.

    Raises:
      ValueError: a kind or field this library does not have, a missing one, or spellings that
        disagree.
    """
    scaling = _scaling(fields)
    theta = _agreed(fields, "rope_theta", scaling, "rope_theta", DEFAULT_THETA)
    share = _agreed(fields, "partial_rotary_factor", scaling, "partial_rotary_factor", 1.0)
    if share != 1.0 and not partial:
        raise ValueError(
            f"{fields.where}: partial_rotary_factor={share} turns only some channels of a head; "
            "only 1.0 is supported for this family"
        )
    original = fields.integer(ORIGINAL, None, least=2)
    rope = _rope(scaling, theta, share, original, context_length, head_dim)
    if original is not None and rope.kind not in FROM_ORIGINAL and ORIGINAL not in allow:
        raise ValueError(
            f"{fields.where}: {ORIGINAL}={original} means nothing with rope_type={rope.kind!r}; "
            f"remove it, or vouch for it with allow_config=({ORIGINAL!r},)"
        )
    scaling.finish(harmless=(), allow=allow)
    return rope


def read_ropes(
    fields: Fields,
    context_length: int,
    head_dim: int,
    thetas: Mapping[str, tuple[str, float]],
    allow: Collection[str] = (),
) -> dict[str, Rope]:
    """The rotary embedding of each type of layer.

    Args:
      thetas: type of layer → the old field for its theta, and what a config without it means. The
        old scaling is that of the first type.

    Raises:
      ValueError: as `read_rope`, and for types of layers that are not in `thetas`.
    """
    old, new = fields.get("rope_scaling", None), fields.get("rope_parameters", None)
    first = next(iter(thetas))
    if new and not (isinstance(new, dict) and new.keys() <= thetas.keys()):
        raise ValueError(
            f"{fields.where}: rope_parameters={str(new)[:200]} must be one object for each of "
            f"{', '.join(thetas)}"
        )
    if old and new and old != new.get(first):
        raise ValueError(
            f"{fields.where}: rope_scaling={old} and rope_parameters={new} disagree; keep one"
        )
    ropes = {}
    for layer, (name, default) in thetas.items():
        if new:
            scaling = _flat(fields, f"rope_parameters.{layer}", new.get(layer) or {})
        else:
            scaling = _flat(fields, "rope_scaling", (old if layer == first else None) or {})
        theta = _agreed(fields, name, scaling, "rope_theta", default)
        ropes[layer] = _rope(scaling, theta, 1.0, None, context_length, head_dim)
        scaling.finish(harmless=(), allow=allow)
    return ropes


def _rope(
    scaling: Fields, theta: float, share: float, original: int | None, context: int, head_dim: int
) -> Rope:
    """What the flat object `scaling` says; `original` is the context before extension as the
    config says it elsewhere, if it does."""
    kind = scaling.get("rope_type", None) or scaling.get("type", "default")
    if kind not in KINDS or scaling.get("type", kind) != kind:
        raise ValueError(
            f"{scaling.where}: rope_type={kind!r} (type={scaling.get('type', None)!r}) is not "
            f"supported; there is {', '.join(KINDS)}"
        )
    rope = Rope(theta, kind, partial=share)
    turned = turned_channels(rope, head_dim)
    if head_dim % 2 or turned % 2 or not 0 < turned <= head_dim:
        told = f"partial_rotary_factor={share} makes {turned} of head_dim={head_dim} channels turn"
        told = f"head_dim={head_dim} is odd" if head_dim % 2 else told
        raise ValueError(f"{scaling.where}: {told}, and RoPE turns pairs")
    if kind == "default":
        return rope
    if kind in ("linear", "dynamic"):
        factor = scaling.number("factor")
        length = context if kind == "dynamic" else 0
        return dataclasses.replace(rope, factor=factor, original_context=length)
    inner = scaling.integer(ORIGINAL, None, least=2)
    if None not in (original, inner) and original != inner:
        raise ValueError(
            f"{scaling.where}: {ORIGINAL}={inner} disagrees with the {original} outside; keep one"
        )
    original = original or inner or context
    if kind == "longrope":
        found = _longrope(scaling, original, context, turned // 2)
    else:
        found = (_llama3 if kind == "llama3" else _yarn)(scaling)
    return dataclasses.replace(rope, original_context=original, **found)


def _llama3(scaling: Fields) -> dict[str, Any]:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise ValueError(
            f"{scaling.where}: low_freq_factor={low} must be below high_freq_factor={high}; "
            "correct them there"
        )
    return dict(factor=scaling.number("factor"), low_freq_factor=low, high_freq_factor=high)


def _yarn(scaling: Fields) -> dict[str, Any]:
    factor = scaling.number("factor")
    mscale, all_dim = scaling.number("mscale", None), scaling.number("mscale_all_dim", None)
    if mscale and all_dim:
        default = _magnitude(factor, mscale) / _magnitude(factor, all_dim)
    else:
        default = _magnitude(factor)
    return dict(
        factor=factor,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=scaling.number("attention_factor", default),
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(scaling: Fields, original: int, context: int, pairs: int) -> dict[str, Any]:
    factor = scaling.number("factor", context / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return dict(
        factor=factor,
        short_factors=scaling.numbers("short_factor", pairs),
        long_factors=scaling.numbers("long_factor", pairs),
        attention_factor=scaling.number("attention_factor", default),
    )


def _scaling(fields: Fields) -> Fields:
    old, new = fields.get("rope_scaling", None), fields.get("rope_parameters", None)
    if old and new and old != new:
        raise ValueError(
            f"{fields.where}: rope_scaling={old} and rope_parameters={new} disagree; keep one"
        )
    return _flat(fields, "rope_parameters" if new else "rope_scaling", new or old or {})


def _flat(fields: Fields, name: str, value: Any) -> Fields:
    if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
        raise ValueError(
            f"{fields.where}: {name}={str(value)[:200]} must be one flat object; a rotary "
            "embedding per layer type is not supported there"
        )
    return Fields(value, f"{fields.where}: {name}")


def _agreed(fields: Fields, name: str, scaling: Fields, inner_name: str, default: float) -> float:
    outer, inner = fields.number(name, None), scaling.number(inner_name, None)
    if None not in (outer, inner) and outer != inner:
        raise ValueError(
            f"{fields.where}: {name}={outer} and {scaling.where}.{inner_name}={inner} disagree; "
            "keep one"
        )
    return next((value for value in (inner, outer) if value is not None), default)
