"""`Weight`: a quantized weight as kernels take it, in the canonical form or in a chip's own.

`w = (q − z)·s` with `q` `[*experts, in_ch, out_ch]`. The canonical form is the one on disk. Each
operation that wants another has a `prepare` that makes it, once, when a model is loaded; a kernel
never reorders a weight in a call. What a prepared form adds are channels of padding, which have
codes and scales of zero, so that `in_ch` and `out_ch` are always those of the weight itself.
"""

import dataclasses
import functools
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Int32, UInt8

from pallas_kernels.packing import pack, unpack

# canonical     uint8 [*experts, bytes, out_ch]: a bit stream along in_ch (`pallas_kernels.packing`)
# int8          int8 [*experts, in_ch, out_ch]: one code a byte
# nibbles       uint8 [*experts, in_ch / 2, out_ch]: up to 4 bits, as canonical codes of 4 bits are
# rows          int8 or int4 [*experts, out_ch, in_ch]: in_ch contiguous, as Hopper's wgmma reads it
# native        the panels of `pallas_kernels.native`
Layout = Literal["canonical", "int8", "nibbles", "rows", "native"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale", "zero_point", "sums"),
    meta_fields=("bits", "in_ch", "out_ch", "group_size", "layout"),
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """See the module docstring.

    Attributes:
      codes: by `layout`.
      scale: step size; `groups` divides `in_ch`, `cols` is `out_ch` or 1.
      zero_point: the code of 0.0, with the shape of `scale`; None when symmetric.
      sums: Σ q over the channels of each group, for activations with a zero point; or None.
      bits: width of a code, 2..8.
      in_ch, out_ch: channels of the weight, without padding.
      group_size: input channels that share a scale; `in_ch` where all do.
    """

    codes: Array
    scale: Float[Array, "*experts groups cols"]
    zero_point: Int8[Array, "*experts groups cols"] | None = None
    sums: Int32[Array, "*experts groups out_ch"] | None = None
    bits: int = 8
    in_ch: int = 0
    out_ch: int = 0
    group_size: int = 0
    layout: Layout = "canonical"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it stands for."""
        return (*self.scale.shape[:-2], self.in_ch, self.out_ch)

    @property
    def groups(self) -> int:
        """Groups of input channels, each with a scale of its own."""
        return self.in_ch // self.group_size

    def replace(self, **changes) -> "Weight":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


# JAX puts placeholders into the fields of a pytree, which run-time type checks would refuse.
Weight.__init__ = typing.no_type_check(Weight.__init__)


def canonical_weight(
    packed: UInt8[Array, "*experts bytes out_ch"],
    scale: Float[Array, "*experts groups cols"],
    zero_point: Int8[Array, "*experts groups cols"] | None,
    bits: int,
    in_ch: int,
) -> Weight:
    """The weight whose codes are packed as `pallas_kernels.packing.pack` does.

    Raises:
      ValueError: shapes that contradict each other, or a width outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is outside 2..8")
    stored, out_ch = packed.shape[-2:]
    groups, cols = scale.shape[-2:]
    if stored != -(-in_ch * bits // 8):
        raise ValueError(
            f"{in_ch} input channels of {bits} bits take {-(-in_ch * bits // 8)} bytes, and the "
            f"packed weight {packed.shape} has {stored}"
        )
    if in_ch % groups or cols not in (1, out_ch):
        raise ValueError(
            f"scale {scale.shape} fits no weight of {in_ch} × {out_ch}: groups divide in_ch, and "
            f"columns are {out_ch} or 1"
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(f"zero_point {zero_point.shape} has not the shape of scale {scale.shape}")
    return Weight(packed, scale, zero_point, None, bits, in_ch, out_ch, in_ch // groups)


def codes_of(w: Weight) -> Int8[Array, "*experts in_ch out_ch"]:
    """The signed codes, whatever the layout."""
    if w.layout == "canonical":
        return unpack(w.codes, w.bits, w.in_ch)
    if w.layout == "native":
        from pallas_kernels.native import panels

        return panels.codes_of_panels(w)
    codes = w.codes.swapaxes(-1, -2) if w.layout == "rows" else w.codes
    if w.layout == "nibbles":
        codes = unpack(codes, 4, 2 * codes.shape[-2])
    return codes[..., : w.in_ch, : w.out_ch].astype(jnp.int8)


def grid_of(
    w: Weight,
) -> tuple[Float[Array, "*experts groups cols"], Int8[Array, "*experts groups cols"] | None]:
    """Scale and zero point without the padding of a prepared form."""
    scale = w.scale[..., : w.groups, : w.out_ch]
    if w.zero_point is None:
        return scale, None
    return scale, w.zero_point[..., : w.groups, : w.out_ch].astype(jnp.int8)


def take_columns(w: Weight, ids: Int[Array, "*ids"]) -> Float[Array, "*ids in_ch"]:
    """Output channels of a weight without experts, one a row, float32: how an embedding is read.

    Only the codes of these channels are touched, in whatever layout they are.
    """
    at = ids.reshape(-1)
    pick = lambda a: a if a is None or a.shape[-1] == 1 else jnp.take(a, at, axis=-1)  # noqa: E731
    if w.layout == "native":
        from pallas_kernels.native import panels

        codes, layout = panels.columns_of_panels(w, at), "int8"
    elif w.layout == "rows":
        codes, layout = jnp.take(w.codes, at, axis=-2), "rows"
    else:
        codes, layout = jnp.take(w.codes, at, axis=-1), w.layout
    scale, zero = pick(w.scale), pick(w.zero_point)
    few = w.replace(
        codes=codes, scale=scale, zero_point=zero, sums=None, out_ch=len(at), layout=layout
    )
    return dequantize(few).T.reshape(*ids.shape, w.in_ch)


def to_canonical(w: Weight) -> Weight:
    """The inverse of every `prepare`."""
    if w.layout == "canonical":
        return w
    return canonical_weight(pack(codes_of(w), w.bits), *grid_of(w), w.bits, w.in_ch)


def dequantize(w: Weight) -> Float[Array, "*experts in_ch out_ch"]:
    """`(q − z)·s` in float32."""
    return dequantize_codes(codes_of(w), *grid_of(w))


def dequantize_codes(
    codes: Int8[Array, "*batch in_ch out_ch"],
    scale: Float[Array, "*batch groups cols"],
    zero_point: Int8[Array, "*batch groups cols"] | None,
) -> Float[Array, "*batch in_ch out_ch"]:
    """`(q − z) · s` in float32, group by group along `in_ch`."""
    *batch, in_ch, out_ch = codes.shape
    groups = scale.shape[-2]
    q = codes.reshape(*batch, groups, in_ch // groups, out_ch).astype(jnp.float32)
    if zero_point is not None:
        q = q - zero_point[..., :, None, :].astype(jnp.float32)
    return (q * scale[..., :, None, :].astype(jnp.float32)).reshape(codes.shape)
