"""`QuantSpec` says which grid, `QTensor` holds codes on it, and these functions go between.

The grids are those of `pallas_kernels.grid`, with signed codes also where asymmetric.

Source: Jacob et al., arXiv 1712.05877, Eq. 1; plain min/max range. Searching a smaller range is
`jaxcomp.solvers.clipping`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

from jaxcomp.core.struct import node, static, static_value
from pallas_kernels import grid
from pallas_kernels.packing import pack, unpack
from pallas_kernels.weight import dequantize_codes

Granularity = Literal["tensor", "channel", "token", "head"]


@static_value
class QuantSpec:
    """A quantization grid: how wide, how fine, and when its range is measured.

    Attributes:
      bits: width of a code, 2..8.
      dtype: element format of the codes; "int" is the only one so far.
      granularity: what shares one range. Weights: "tensor" or "channel" (an output channel).
        Activations: "tensor", "token" (all channels of a token) or "head" (one token and head).
      group_size: splits `in_ch` of a weight into groups with a range each; None for one group.
      symmetric: no zero point.
      dynamic: the range is measured at run time (activations only) instead of by calibration.
    """

    bits: int = 4
    dtype: Literal["int"] = "int"
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False

    def __post_init__(self):
        if self.dtype != "int":
            raise ValueError(f"dtype={self.dtype!r} is not a known element format; use 'int'")
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            raise ValueError(f"bits={self.bits!r} is outside 2..8; for 16 leave the tensor alone")
        if self.granularity not in ("tensor", "channel", "token", "head"):
            raise ValueError(
                f"granularity={self.granularity!r} is unknown; use tensor, channel, token or head"
            )
        if self.group_size is not None:
            if self.group_size < 1:
                raise ValueError(f"group_size={self.group_size} is below 1; use None for one group")
            if self.granularity != "channel":
                raise ValueError(
                    f"group_size={self.group_size} needs granularity='channel', "
                    f"not {self.granularity!r}"
                )
        if self.dynamic and self.granularity == "channel":
            raise ValueError("dynamic=True needs granularity 'tensor', 'token' or 'head'")

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1))

    def __str__(self) -> str:
        size = f"g{self.group_size}" if self.group_size else f"per-{self.granularity}"
        return f"{self.dtype}{self.bits} {size} {'sym' if self.symmetric else 'asym'}"


@node
class QTensor:
    """A quantized weight `[*batch, in_ch, out_ch]`: `w = (q − z)·s`.

    Attributes:
      packed: uint8 `[*batch, ceil(in_ch·bits/8), out_ch]`, a little-endian bit stream along
        `in_ch` (`pallas_kernels.packing`).
      scale: float32 `[*batch, groups, out_ch]`, or `[*batch, 1, 1]` per tensor.
      zero_point: int8 with the shape of `scale`; None when symmetric.
      bits: width of a code.
      in_ch: rows of the weight, which the packed form rounds up to whole bytes.
    """

    packed: UInt8[Array, "*batch bytes out_ch"]
    scale: Float[Array, "*batch groups cols"]
    zero_point: Int8[Array, "*batch groups cols"] | None
    bits: int = static()
    in_ch: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for."""
        return (*self.packed.shape[:-2], self.in_ch, self.packed.shape[-1])

    @property
    def codes(self) -> Int8[Array, "*batch in_ch out_ch"]:
        """The signed codes, unpacked."""
        return unpack(self.packed, self.bits, self.in_ch)


def quantize(w: Float[Array, "*batch in_ch out_ch"], spec: QuantSpec) -> QTensor:
    """Rounds `w` to the nearest code of a grid fitted to each group's range.

    Args:
      w: weight applied as ``x @ w``; any float dtype; leading axes (experts) are independent.
      spec: bits, group_size and symmetry of the grid.

    Returns:
      QTensor; `scale` is float32 in units of `w` per code, `zero_point` None when symmetric.

    Raises:
      ValueError: `in_ch` is not a whole number of groups, or the spec is for activations.
    """
    scale, zero_point = fit_range(w, spec)
    return quantize_with(w, scale, zero_point, spec)


def quantize_with(
    w: Float[Array, "*batch in_ch out_ch"],
    scale: Float[Array, "*batch groups cols"],
    zero_point: Int8[Array, "*batch groups cols"] | None,
    spec: QuantSpec,
) -> QTensor:
    """Rounds `w` to the nearest code of the given grid."""
    grouped = _grouped(w, scale.shape[-2])
    z = None if zero_point is None else zero_point[..., :, None, :]
    codes = round_to_codes(grouped, scale[..., :, None, :], z, spec).reshape(w.shape)
    return QTensor(pack(codes, spec.bits), scale, zero_point, spec.bits, w.shape[-2])


def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch in_ch out_ch"]:
    """`(q − z)·s`, computed in float32 and cast to `dtype`."""
    return dequantize_codes(q.codes, q.scale, q.zero_point).astype(dtype)


def fit_range(
    w: Float[Array, "*batch in_ch out_ch"], spec: QuantSpec
) -> tuple[Float[Array, "*batch groups cols"], Int8[Array, "*batch groups cols"] | None]:
    """Scale and zero point from the least and greatest weight of each group.

    Raises:
      ValueError: `in_ch` is not a whole number of groups, or the spec is for activations.
    """
    low, high = weight_range(w, spec)
    return range_to_grid(low, high, spec)


def weight_range(
    w: Float[Array, "*batch in_ch out_ch"], spec: QuantSpec
) -> tuple[Float[Array, "*batch groups cols"], Float[Array, "*batch groups cols"]]:
    """Least and greatest weight of each group, float32."""
    if spec.granularity == "tensor":
        axes, grouped = (-3, -2, -1), _grouped(w, 1)
    elif spec.granularity == "channel":
        axes, grouped = (-2,), _grouped(w, n_groups(w.shape[-2], spec))
    else:
        raise ValueError(
            f"granularity={spec.granularity!r} is for activations; "
            "a weight takes 'tensor' or 'channel'"
        )
    low, high = least(grouped, axes), greatest(grouped, axes)
    return low[..., 0, :], high[..., 0, :]


def n_groups(in_ch: int, spec: QuantSpec) -> int:
    """Groups that `spec` makes of `in_ch` input channels.

    Raises:
      ValueError: `group_size` does not divide `in_ch`; the message names divisors near it.
    """
    group = spec.group_size or in_ch
    if in_ch % group:
        near = sorted(
            (d for d in range(1, in_ch + 1) if in_ch % d == 0), key=lambda d: abs(d - group)
        )
        raise ValueError(
            f"in_ch={in_ch} is not a multiple of group_size={group}; use group_size=None "
            f"or a divisor of {in_ch} such as {', '.join(map(str, sorted(near[:3])))}"
        )
    return in_ch // group


def range_to_grid(low: Array, high: Array, spec: QuantSpec) -> tuple[Array, Array | None]:
    """The grid that just covers [low, high]; float32 scale, int8 zero point or None."""
    return grid.range_to_grid(low, high, spec.bits, spec.symmetric)


def round_to_codes(x: Array, scale: Array, zero_point: Array | None, spec: QuantSpec) -> Array:
    """Nearest code of each entry, int8; `scale` and `zero_point` broadcast against `x`."""
    return grid.round_to_codes(x, scale, zero_point, spec.bits)


def fake_quantize(
    x: Float[Array, "*dims"], spec: QuantSpec, clip: Array | None = None
) -> Float[Array, "*dims"]:
    """Quantizes and dequantizes, staying in the dtype of `x`, with a gradient.

    The range is measured on `x` itself: over the last axis for "token" (`[…, d_model]`) and "head"
    (`[…, head_dim]`), over everything for "tensor", along `in_ch` for a weight ("channel").

    The gradient passes straight through the rounding and nothing else: it is 0 for an entry beyond
    the range, and it reaches the entries that made the range, and `clip`, through the scale.

    Args:
      clip: factors of the least and the greatest value, `[2, …]` with the rest broadcasting against
        the ranges (`[groups, out_ch]` for a weight); None for the whole range.

    Source: straight-through estimator of Bengio et al., arXiv 1308.3432; clip factors of FlatQuant,
    arXiv 2410.09426.
    """
    weight = spec.granularity == "channel" or (spec.granularity == "tensor" and not spec.dynamic)
    low, high = weight_range(x, spec) if weight else activation_range(x, spec)
    if clip is not None:
        low, high = low * clip[0], high * clip[1]
    scale, zero_point = range_to_grid(low, high, spec)
    if not weight or scale.shape[-2] == 1:  # one group: no axis of its own, whose gradient is slow
        return fake_quantize_with(x, scale, zero_point, spec)
    z = None if zero_point is None else zero_point[..., :, None, :]
    grouped = _grouped(x, scale.shape[-2])
    return fake_quantize_with(grouped, scale[..., :, None, :], z, spec).reshape(x.shape)


def fake_quantize_with(
    x: Float[Array, "*dims"], scale: Array, zero_point: Array | None, spec: QuantSpec
) -> Float[Array, "*dims"]:
    """`fake_quantize` on a given grid, for static ranges; entries outside it saturate."""
    zero = jnp.zeros((), jnp.float32) if zero_point is None else zero_point.astype(jnp.float32)
    return _snap(x.astype(jnp.float32), scale, zero, spec).astype(x.dtype)


def activation_range(x: Float[Array, "*dims"], spec: QuantSpec) -> tuple[Array, Array]:
    """Least and greatest value of what shares a range: the last axis, or all for "tensor"."""
    axes = tuple(range(x.ndim)) if spec.granularity == "tensor" else (-1,)
    return least(x, axes).astype(jnp.float32), greatest(x, axes).astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def greatest(x: Array, axes: tuple[int, ...]) -> Array:
    """Maximum over `axes`, kept; every entry that attains it has the whole gradient.

    `jnp.max` divides it among them, for which it counts them: one more pass over a large array.
    """
    return jnp.max(x, axis=axes, keepdims=True)


@greatest.defjvp
def _(axes: tuple[int, ...], primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    top = greatest(primals[0], axes)
    at_top = jnp.where(primals[0] == top, tangents[0], 0)
    return top, jnp.sum(at_top, axis=axes, keepdims=True)


def least(x: Array, axes: tuple[int, ...]) -> Array:
    """Minimum over `axes`, kept, with the gradient of `greatest`."""
    return -greatest(-x, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _snap(x: Array, scale: Array, zero: Array, spec: QuantSpec) -> Array:
    """The grid point nearest to x, q·s with q = clip(round(x/s), qmin − z, qmax − z).

    Straight through the rounding, dq = d(x/s) inside the range and 0 outside, and with it
    d(q·s) = [inside]·dx + (q − [inside]·x/s)·ds. Written out for the sake of one pass over the
    array where differentiating the product and the quotient takes two.
    """
    return jnp.clip(jnp.round(x / scale), spec.qmin - zero, spec.qmax - zero) * scale


@_snap.defjvp
def _(spec: QuantSpec, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, scale, zero = primals
    steps = x / scale
    rounded = jnp.round(steps)
    q = jnp.clip(rounded, spec.qmin - zero, spec.qmax - zero)
    inside = rounded == q
    to_scale = jnp.where(inside, q - steps, q)
    return q * scale, jnp.where(inside, tangents[0], 0) + to_scale * tangents[1]


def _grouped(w: Array, groups: int) -> Array:
    *batch, in_ch, out_ch = w.shape
    return w.reshape(*batch, groups, in_ch // groups, out_ch)
