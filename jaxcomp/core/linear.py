"""`linear`: the one function that multiplies by a weight, whatever leaf holds it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.activation import QActivation
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.struct import node
from pallas_kernels import DenseWeight, dense_matmul, quant_matmul, quant_matmul_int
from pallas_kernels.weight import Weight, canonical_weight, dequantize


@node
class Linear:
    """`y = x @ w + b`, with `w` `[*experts, in_ch, out_ch]`, `b` `[out_ch]`.

    `models.prepare` turns `w` into what the kernels of a chip read: a `QTensor` into a
    `Weight`, an array into a `DenseWeight`.
    """

    w: Float[Array, "*experts in_ch out_ch"] | QTensor | Weight | DenseWeight
    b: Float[Array, " out_ch"] | None = None


def linear(
    p: Linear, x: Float[Array, "*tokens in_ch"] | QActivation, dtype: Any = None
) -> Float[Array, "*tokens out_ch"]:
    """`x @ w + b` in `dtype`, by default that of `x`; accumulated in float32, codes in int32.

    The weight keeps its stored dtype and is cast inside the product. `preferred_element_type` is
    not only for accuracy: with it XLA's CPU backend uses the processor's bfloat16 matrix units,
    without it the product is computed in float32 after all.

    Raises:
      ValueError: `x` is codes and the weight is not, or has groups too long for an int32 sum.
    """
    if isinstance(x, QActivation):
        y = _integer_product(p.w, x)
    elif isinstance(p.w, QTensor | Weight):
        y = quant_matmul(x, weight_of(p.w), jnp.float32)
    elif isinstance(p.w, DenseWeight):
        y = dense_matmul(x, p.w, jnp.float32)
    else:
        y = _dense_product(x, p.w)
    if p.b is not None:
        y = y + p.b.astype(jnp.float32)
    return y.astype(dtype or x.dtype)


def _dense_product(x: Array, w: Array) -> Array:
    """Tokens are one axis, or the gradient of `w` would be computed from transposed activations."""
    rows = x.reshape(-1, x.shape[-1]) if w.ndim == 2 else x
    y = jnp.matmul(rows, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def weight_of(w: QTensor | Weight) -> Weight:
    """The weight as kernels take it."""
    if isinstance(w, Weight):
        return w
    return canonical_weight(w.packed, w.scale, w.zero_point, w.bits, w.in_ch)


def dense_of(w: Array | QTensor | Weight | DenseWeight) -> Float[Array, "*experts in_ch out_ch"]:
    """The weight as an array; float32 where it was quantized."""
    if isinstance(w, DenseWeight):
        return w.dense
    return dequantize(weight_of(w)) if isinstance(w, QTensor | Weight) else w


def _integer_product(w: Array | QTensor | Weight, x: QActivation) -> Float[Array, "*tokens out_ch"]:
    if not isinstance(w, QTensor | Weight):
        raise ValueError(
            f"the activation is codes and the weight {w.shape} is dense; "
            "quantize it, or leave `integer` of the site's quantizer off"
        )
    scale, zero = (None if a is None else jnp.atleast_1d(a) for a in (x.scale, x.zero_point))
    return quant_matmul_int(x.codes, scale, zero, weight_of(w))
