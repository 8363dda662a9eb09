"""The rotary embedding as a `config.json` says it, in the old and in the new spelling.

    old   "rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, …}
    new   "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, …}

Source: transformers' `modeling_rope_utils` (`standardize_rope_params` and the functions behind
each `rope_type`), whose defaults are repeated here so that logits agree.
"""

import math
from collections.abc import Collection

from jaxcomp.models.families.fields import Fields
from jaxcomp.models.rope import Rope

DEFAULT_THETA = 10_000.0  # what transformers takes when a config does not say
KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(fields: Fields, context_length: int, allow: Collection[str] = ()) -> Rope:
    """The rotary embedding of a model whose config has `max_position_embeddings=context_length`.

    Raises:
      ValueError: a kind or field this library does not have, a missing one, or spellings that
        disagree.
    """
    scaling = _scaling(fields)
    theta = _agreed(fields, scaling, "rope_theta", DEFAULT_THETA)
    partial = _agreed(fields, scaling, "partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(
            f"{fields.where}: partial_rotary_factor={partial} turns only some channels of a head; "
            "only 1.0 is supported"
        )
    kind = scaling.get("rope_type", None) or scaling.get("type", "default")
    if kind not in KINDS or scaling.get("type", kind) != kind:
        raise ValueError(
            f"{scaling.where}: rope_type={kind!r} (type={scaling.get('type', None)!r}) is not "
            f"supported; there is {', '.join(KINDS)}"
        )
    outer = fields.integer("original_max_position_embeddings", None)
    if kind == "default":
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, kind, scaling.number("factor"))
    elif kind == "dynamic":
        rope = Rope(theta, kind, scaling.number("factor"), context_length)
    else:
        inner = scaling.integer("original_max_position_embeddings", context_length)
        rope = (_llama3 if kind == "llama3" else _yarn)(scaling, theta, outer or inner)
        outer = None
    if outer is not None and "original_max_position_embeddings" not in allow:
        raise ValueError(
            f"{fields.where}: original_max_position_embeddings={outer} means nothing with "
            f"rope_type={kind!r}; remove it, or vouch for it with "
            "allow_config=('original_max_position_embeddings',)"
        )
    scaling.finish(harmless=(), allow=allow)
    return rope


def _llama3(scaling: Fields, theta: float, original: int) -> Rope:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise ValueError(
            f"{scaling.where}: low_freq_factor={low} must be below high_freq_factor={high}; "
            "correct them there"
        )
    return Rope(
        theta,
        "llama3",
        scaling.number("factor"),
        original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(scaling: Fields, theta: float, original: int) -> Rope:
    factor = scaling.number("factor")
    mscale, all_dim = scaling.number("mscale", None), scaling.number("mscale_all_dim", None)
    if mscale and all_dim:
        default = _magnitude(factor, mscale) / _magnitude(factor, all_dim)
    else:
        default = _magnitude(factor)
    return Rope(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=scaling.number("attention_factor", default),
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _scaling(fields: Fields) -> Fields:
    old, new = fields.get("rope_scaling", None), fields.get("rope_parameters", None)
    if old and new and old != new:
        raise ValueError(
            f"{fields.where}: rope_scaling={old} and rope_parameters={new} disagree; keep one"
        )
    name = "rope_parameters" if new else "rope_scaling"
    value = new or old or {}
    if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
        raise ValueError(
            f"{fields.where}: {name}={str(value)[:200]} must be one flat object; a rotary "
            "embedding per layer type is not supported for this family"
        )
    return Fields(value, f"{fields.where}: {name}")


def _agreed(fields: Fields, scaling: Fields, name: str, default: float) -> float:
    outer, inner = fields.number(name, None), scaling.number(name, None)
    if None not in (outer, inner) and outer != inner:
        raise ValueError(
            f"{fields.where}: {name}={outer} and {scaling.where}.{name}={inner} disagree; keep one"
        )
    return next((value for value in (inner, outer) if value is not None), default)
