"""Rotary position embedding with the scalings found in checkpoints.

Angles: a[t, i] = position[t] · f[i], f[i] = theta^(−2i/d). Scalings change f (and, for YaRN, the
magnitude of cos and sin). The half-split form is used: channels i and i + d/2 form a pair. Where
only a share of a head turns, d is the number of its first channels that do.

Dynamic NTK and LongRoPE choose f by the length of the sequence. A key in a cache keeps the f it was
turned with, so a sequence must have one f for all its tokens: see `Context.horizon`.

Source: Su et al., arXiv 2104.09864; linear: Chen et al., arXiv 2306.15595; dynamic NTK and YaRN:
Peng et al., arXiv 2309.00071; llama3: the Llama 3.1 release; LongRoPE: Ding et al., arXiv
2402.13753. Where papers leave freedom, transformers' `modeling_rope_utils` is followed, so that
logits agree with it.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.core.struct import static_value


@static_value
class Rope:
    """Settings of one rotary embedding.

    Attributes:
      theta: base of the geometric frequency series.
      kind: how frequencies are scaled for contexts beyond `original_context`.
      factor: context extension factor.
      original_context: training context before extension, in tokens (not "default", "linear").
      low_freq_factor, high_freq_factor: borders of the llama3 ramp, in turns per context.
      beta_fast, beta_slow, truncate: borders of the YaRN ramp, in turns per context.
      attention_factor: multiplies cos and sin (YaRN, LongRoPE).
      short_factors, long_factors: divisors of the frequencies of sequences up to and beyond
        `original_context` (LongRoPE), one a channel pair.
      partial: share of a head's channels that turn, the first ones; the others pass.
    """

    theta: float
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    partial: float = 1.0


def turned_channels(rope: Rope, head_dim: int) -> int:
    """How many of a head's channels turn, as transformers rounds it."""
    return int(head_dim * rope.partial)


def depends_on_length(rope: Rope) -> bool:
    """Whether the angle at a position depends on how long the sequence is or will be."""
    return rope.kind in ("dynamic", "longrope")


def rope_tables(
    rope: Rope,
    head_dim: int,
    positions: Int[Array, "batch time"],
    horizon: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
    """cos and sin of the angles at `positions`, float32, `half` of the channels that turn.

    The loop over frequencies keeps XLA from fusing the tables into the rotation, where it would
    compute every cosine anew for every head.

    Args:
      horizon: length of the sequences, for frequencies that depend on it; by default that of the
        longest one as the positions show it.
    """
    positions = positions.astype(jnp.float32)
    length = jnp.max(positions) + 1 if horizon is None else horizon.astype(jnp.float32)

    def one(frequency: Array) -> tuple[Array, Array]:
        angles = positions * frequency
        return jnp.cos(angles), jnp.sin(angles)

    tables = jax.lax.map(one, jnp.asarray(_frequencies(rope, head_dim, length)))
    cos, sin = (jnp.moveaxis(t, 0, -1) * rope.attention_factor for t in tables)
    return cos, sin


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    cos: Float[Array, "batch time half"],
    sin: Float[Array, "batch time half"],
) -> Float[Array, "batch time heads head_dim"]:
    """Turns each channel pair (i, i + half) by its angle, in float32; the rest of a head passes."""
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    parts = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    parts += [rest] if rest.shape[-1] else []
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def _frequencies(rope: Rope, head_dim: int, length: Array) -> Array | np.ndarray:
    base, dim = rope.theta, turned_channels(rope, head_dim)
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    if rope.kind == "dynamic":  # the base grows with the sequence
        length = jnp.maximum(length, rope.original_context).astype(jnp.float32)
        stretch = rope.factor * length / rope.original_context - (rope.factor - 1)
        grown = base * stretch ** (dim / (dim - 2))
        return grown ** jnp.asarray(-exponent, jnp.float32)
    freq = base**-exponent
    if rope.kind == "longrope":
        divided = (freq / np.asarray(f) for f in (rope.long_factors, rope.short_factors))
        return jnp.where(length > rope.original_context, *(f.astype(np.float32) for f in divided))
    if rope.kind == "linear":
        freq = freq / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_context * freq / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        freq = freq * (smooth + (1 - smooth) / rope.factor)
    elif rope.kind == "yarn":
        keep = 1 - _yarn_ramp(rope, dim)
        freq = freq * (keep + (1 - keep) / rope.factor)
    return freq.astype(np.float32)


def _yarn_ramp(rope: Rope, dim: int) -> np.ndarray:
    def channel(turns: float) -> float:  # the pair that makes `turns` over the original context
        return (dim * math.log(rope.original_context / (turns * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
