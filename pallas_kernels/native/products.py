"""The functions of `native.cpp` on arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.grid import MIN_SCALE
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
    x: Float[Array, "rows in_ch"], w: Float[Array, "panels in_ch 64"], out_ch: int
) -> Float[Array, "rows out_ch"]:
    """`x @ w` in float32, for a weight of float32 or bfloat16 in panels."""
    library.require()
    out = jax.ShapeDtypeStruct((len(x), out_ch), jnp.float32)
    call = jax.ffi.ffi_call("jaxcomp_dense_product", out, **MAPPED)
    return call(x.astype(jnp.float32), w)


def quantize(
    x: Float[Array, "rows channels"], clip: Float[Array, "2"] | None, bits: int, symmetric: bool
) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points of each row; without meaning where symmetric."""
    library.require()
    rows = len(x)
    shapes = (x.shape, jnp.int8), ((rows,), jnp.float32), ((rows,), jnp.int8)
    call = jax.ffi.ffi_call(
        "jaxcomp_quantize", [jax.ShapeDtypeStruct(*s) for s in shapes], **MAPPED
    )
    clip = jnp.ones(2, jnp.float32) if clip is None else clip.astype(jnp.float32)
    x = x.astype(jnp.float32)
    return tuple(call(x, clip, bits=bits, symmetric=symmetric, min_scale=np.float32(MIN_SCALE)))


def decode_attention(
    q: Float[Array, "batch kv_head group head_dim"],
    k: Array,
    v: Array,
    starts: Int[Array, " batch"],
    stops: Int[Array, " batch"],
    k_scale: Array | None,
    k_zero: Array | None,
    v_scale: Array | None,
    v_zero: Array | None,
    scale: float,
    k_bits: int,
    v_bits: int,
) -> Float[Array, "batch kv_head group head_dim"]:
    """See `pallas_kernels.quant_decode_attention.quant_decode_attention`; float32."""
    library.require()
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    call = jax.ffi.ffi_call("jaxcomp_decode_attention", out, **MAPPED)
    return call(
        q.astype(jnp.float32),
        k,
        v,
        starts.astype(jnp.int32),
        stops.astype(jnp.int32),
        *map(_or_none, (k_scale, k_zero, v_scale, v_zero)),
        scale=np.float32(scale),
        k_bits=k_bits,
        v_bits=v_bits,
    )


def prefill_attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch kv_head slots head_dim"],
    v: Float[Array, "batch kv_head slots head_dim"],
    starts: Int[Array, " batch"],
    slot: Int[Array, ""],
    scale: float,
    window: int | None,
) -> Float[Array, "batch time heads head_dim"]:
    """See `pallas_kernels.prefill_attention.prefill_attention`; float32."""
    library.require()
    call = jax.ffi.ffi_call(
        "jaxcomp_prefill_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32), **MAPPED
    )
    return call(
        *(a.astype(jnp.float32) for a in (q, k, v)),
        starts.astype(jnp.int32),
        jnp.asarray(slot, jnp.int32).reshape(1),
        scale=np.float32(scale),
        window=window or 0,
    )


def _result(x: Array, w: Weight) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((len(x), w.out_ch), jnp.float32)


def _whole_words(x: Array, w: Weight) -> Array:
    more = w.codes.shape[1] * (32 // stored_bits(w.bits)) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, more)]) if more else x


def _or_none(a: Array | None) -> Array:
    """What stands for an absent operand: an array without elements."""
    return jnp.zeros((0,), jnp.int32) if a is None else a
