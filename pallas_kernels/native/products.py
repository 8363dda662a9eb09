"""The functions of `native.cpp` on arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.native import library
from pallas_kernels.native.panels import stored_bits
from pallas_kernels.weight import Weight

MAPPED = {"vmap_method": "sequential"}  # one call for each member of a mapped axis


def float_product(x: Float[Array, "rows in_ch"], w: Weight) -> Float[Array, "rows out_ch"]:
    """`x @ w` in float32, for a weight in panels."""
    library.require()
    call = jax.ffi.ffi_call("jaxcomp_float_product", _result(x, w), **MAPPED)
    x = _whole_words(x.astype(jnp.float32), w)
    return call(x, w.codes, w.scale, _or_none(w.zero_point), bits=stored_bits(w.bits))


def integer_product(
    codes: Int8[Array, "rows in_ch"],
    scale: Float[Array, "rows 1"],
    zero: Int8[Array, "rows 1"] | None,
    w: Weight,
) -> Float[Array, "rows out_ch"]:
    """`((codes − zero) · scale) @ w`, the sums of groups exact, for a weight in panels."""
    library.require()
    call = jax.ffi.ffi_call("jaxcomp_integer_product", _result(codes, w), **MAPPED)
    zero = None if zero is None else zero.astype(jnp.int32)
    return call(
        _whole_words(codes, w),
        scale.astype(jnp.float32),
        _or_none(zero),
        w.codes,
        w.scale,
        _or_none(w.zero_point),
        _or_none(w.sums),
        bits=stored_bits(w.bits),
    )


def dense_product(
    x: Float[Array, "rows in_ch"], w: Float[Array, "..."], transposed: bool
) -> Float[Array, "rows out_ch"]:
    """`x @ w` in float32, or `x @ w.T`; `w` float32 or bfloat16."""
    library.require()
    out = jax.ShapeDtypeStruct((len(x), w.shape[0 if transposed else 1]), jnp.float32)
    call = jax.ffi.ffi_call("jaxcomp_dense_product", out, **MAPPED)
    return call(x.astype(jnp.float32), w, transposed=transposed)


def _result(x: Array, w: Weight) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((len(x), w.out_ch), jnp.float32)


def _whole_words(x: Array, w: Weight) -> Array:
    more = w.codes.shape[1] * (32 // stored_bits(w.bits)) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, more)]) if more else x


def _or_none(a: Array | None) -> Array:
    """What stands for an absent operand: an array without elements."""
    return jnp.zeros((0,), jnp.int32) if a is None else a
