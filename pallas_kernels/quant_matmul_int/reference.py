"""`quant_matmul_int` in plain jnp: int8 × int8 → int32 products, group after group.

    y = a · Σ_G s_G · Σ_{k in G} (qx − zx)(qw − zw),
    the inner sum being  Σ qx·qw − zx·Σ qw − zw·(Σ qx − |G|·zx),  all of it exact in int32.

On a CPU the product of many rows takes a tenth of the time of one in float32, but XLA turns a
single row into a naive loop: one row is therefore made two. int4 × int4 does not exist there, so
4-bit codes are carried in int8. Groups are a loop: as one batched product they are slower by far.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels.weight import Weight, codes_of, grid_of


def quant_matmul_int(
    codes: Int8[Array, "*tokens in_ch"],
    code_scale: Float[Array, "*#tokens 1"],
    code_zero: Int8[Array, "*#tokens 1"] | None,
    weight: Weight,
    out_dtype: DTypeLike,
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul_int.quant_matmul_int`."""
    *tokens, in_ch = codes.shape
    groups, out_ch = weight.groups, weight.out_ch
    scale, zero_point = grid_of(weight)
    x = codes.reshape(-1, groups, in_ch // groups).swapaxes(0, 1)
    w = codes_of(weight).reshape(groups, in_ch // groups, out_ch)
    x_zero = None
    if code_zero is not None:
        x_zero = jnp.broadcast_to(code_zero, (*tokens, 1)).reshape(-1, 1)

    def add(total: Array, group: tuple) -> tuple[Array, None]:
        x, w, s, w_zero = group
        part = integer_product(x, x_zero, w, w_zero).astype(jnp.float32)
        return total + part * s.astype(jnp.float32), None

    total = jnp.zeros((x.shape[1], out_ch), jnp.float32)
    total, _ = jax.lax.scan(add, total, (x, w, scale, zero_point))
    return (total.reshape(*tokens, out_ch) * code_scale).astype(out_dtype)


def integer_product(
    x: Int8[Array, "rows in_ch"],
    x_zero: Int8[Array, "rows 1"] | None,
    w: Int8[Array, "in_ch out_ch"],
    w_zero: Int8[Array, " cols"] | None,
) -> Int32[Array, "rows out_ch"]:
    """``(x − x_zero) @ (w − w_zero)``, exact while the result fits int32."""
    rows, in_ch = x.shape
    if x_zero is not None:
        more = jnp.ones((1, in_ch), jnp.int8)  # the product of this row is the columns' sums
    else:
        more = jnp.zeros((1 if rows == 1 else 0, in_ch), jnp.int8)
    product = jax.lax.dot_general(
        jnp.concatenate([x, more]),
        w,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    y = product[:rows]
    if x_zero is not None:
        x_zero = x_zero.astype(jnp.int32)
        y = y - x_zero * product[rows]
    if w_zero is not None:
        sums = jnp.sum(x, axis=1, keepdims=True, dtype=jnp.int32)
        if x_zero is not None:
            sums = sums - in_ch * x_zero
        y = y - sums * w_zero.astype(jnp.int32)
    return y
