"""`linear`: the one function that multiplies by a weight, whatever leaf holds it.

Dense weights keep their stored dtype and are cast inside the product, and the gradient of that
product is written out: in a dtype below float32, what comes back is cast as well. Differentiated by
rule, both products of a gradient would mix float32 with bfloat16, which no matrix unit takes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from jaxcomp.core.activation import QActivation
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.struct import node
from pallas_kernels import DenseWeight, dense_matmul, quant_matmul, quant_matmul_int
from pallas_kernels.weight import Weight, canonical_weight, dequantize


@node
class LowRank:
    """A weight with a low-rank addition, `w + a @ b`, while the addition is trained (LoRA).

    The sum is not formed: the gradient of `w` is then never computed. `folded` forms it.
    """

    w: Float[Array, "in_ch out_ch"]
    a: Float[Array, "in_ch rank"]
    b: Float[Array, "rank out_ch"]


@node
class Linear:
    """`y = x @ w + b`, with `w` `[*experts, in_ch, out_ch]`, `b` `[out_ch]`.

    `models.prepare` turns `w` into what the kernels of a chip read: a `QTensor` into a
    `Weight`, an array into a `DenseWeight`.
    """

    w: Float[Array, "*experts in_ch out_ch"] | QTensor | Weight | DenseWeight | LowRank
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
    elif isinstance(p.w, LowRank):
        inner = _dense_product(x, p.w.a).astype(x.dtype)
        y = _dense_product(x, p.w.w) + _dense_product(inner, p.w.b)
    else:
        y = _dense_product(x, p.w)
    if p.b is not None:
        y = y + p.b.astype(jnp.float32)
    return y.astype(dtype or x.dtype)


def folded(w: LowRank) -> Float[Array, "in_ch out_ch"]:
    """`w + a @ b`, summed in float32, in the dtype of `w`."""
    added = jnp.matmul(w.a.astype(jnp.float32), w.b.astype(jnp.float32), precision="highest")
    return (w.w.astype(jnp.float32) + added).astype(w.w.dtype)


def _dense_product(x: Array, w: Array) -> Array:
    """Tokens are one axis, or the gradient of `w` would be computed from transposed activations."""
    if w.ndim != 2:
        return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    rows = x.reshape(-1, x.shape[-1])
    return _product(rows, w).reshape(*x.shape[:-1], w.shape[-1])


@jax.custom_vjp
def _product(x: Float[Array, "rows in_ch"], w: Float[Array, "in_ch out_ch"]) -> Array:
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w), (x, w)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    g = g.astype(x.dtype)
    dx = _contract(g, w.astype(x.dtype), 1, 1)
    dw = _contract(transposed(x), g, 1, 0)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


def _contract(a: Array, b: Array, i: int, j: int) -> Array:
    """The product over axis `i` of `a` and `j` of `b`, float32."""
    axes = ((i,), (j,)), ((), ())
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def transposed(x: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """`x.T` as the left side of a product.

    XLA's CPU backend folds a transpose into the product that follows, which then leaves the
    bfloat16 matrix unit; a fixed layout keeps the two apart.
    """
    if jax.default_backend() != "cpu" or x.dtype != jnp.bfloat16:
        return x.T
    rows_first = Layout(major_to_minor=(0, 1))
    return with_layout_constraint(with_layout_constraint(x, rows_first).T, rows_first)


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
