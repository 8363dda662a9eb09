"""The small parts of a decoder: normalisation and embedding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomp.core.linear import dense_of, weight_of
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.struct import node, static
from pallas_kernels import DenseWeight, Weight
from pallas_kernels.weight import take_columns


@node
class RMSNorm:
    """`x / rms(x) · (offset + weight)`; `offset` 1 keeps (1 + w) weights as they are stored."""

    weight: Float[Array, " channels"]
    eps: float = static(default=1e-6)
    offset: int = static(default=0)


def rms_norm(
    p: RMSNorm | None, x: Float[Array, "*dims channels"]
) -> Float[Array, "*dims channels"]:
    """Normalises over the last axis in float32; without parameters it is the identity."""
    if p is None:
        return x
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + p.eps)
    return (y * (p.offset + p.weight.astype(jnp.float32))).astype(x.dtype)


@node
class JointNorm:
    """Queries or keys normalised over the channels of all heads together (OLMo-2)."""

    norm: RMSNorm


def head_norm(
    p: RMSNorm | JointNorm | None, x: Float[Array, "*dims heads head_dim"]
) -> Float[Array, "*dims heads head_dim"]:
    """Normalises every head by itself, or all heads together where `p` is a `JointNorm`."""
    if isinstance(p, JointNorm):
        return rms_norm(p.norm, x.reshape(*x.shape[:-2], -1)).reshape(x.shape)
    return rms_norm(p, x)


COLUMNS = (QTensor, Weight, DenseWeight)  # tables of which a token is a column


@node
class Embed:
    """Token embedding; `scale` multiplies what is read from it.

    A table that is quantized, or prepared for a chip's kernels, is the weight `[d_model, vocab]`
    that a tied head multiplies by: groups are runs of a token's channels, and a token is a column.
    """

    weight: Float[Array, "vocab d_model"] | QTensor | Weight | DenseWeight
    scale: float | None = static(default=None)

    @property
    def table_shape(self) -> tuple[int, int]:
        """`[vocab, d_model]`, however the table is held."""
        held = self.weight.shape
        return held[::-1] if isinstance(self.weight, COLUMNS) else held


def embed_tokens(
    p: Embed, tokens: Int[Array, "batch time"], dtype: str
) -> Float[Array, "batch time d_model"]:
    """Rows of the embedding in `dtype`."""
    if isinstance(p.weight, QTensor | Weight):
        x = take_columns(weight_of(p.weight), tokens).astype(dtype)
    elif isinstance(p.weight, DenseWeight):
        x = p.weight.columns(tokens).astype(dtype)
    else:
        x = p.weight[tokens].astype(dtype)
    return x if p.scale is None else x * jnp.asarray(p.scale, dtype)


def table_of(p: Embed) -> Float[Array, "vocab d_model"]:
    """The whole table as an array; float32 where it was quantized."""
    return dense_of(p.weight).T if isinstance(p.weight, COLUMNS) else p.weight
