"""`QActivation`: an activation as codes on a grid.

A site gives one in integer execution, and a packed KV cache stores one; everywhere else a quantized
activation stays a float that lies on the grid (`core.quantize.fake_quantize`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxcomp.core.quantize import QuantSpec, activation_range, range_to_grid, round_to_codes
from jaxcomp.core.struct import node, static
from pallas_kernels import quantize_tokens


@node
class QActivation:
    """A quantized activation: `x = (q − z)·s`. It has the shape and is indexed like the array.

    Attributes:
      codes: the signed codes.
      scale: float32; measured on every token `[*dims, 1]`, or one grid for all tokens, which
        broadcasts against `codes` with fewer axes.
      zero_point: int8 with the shape of `scale`; None when symmetric.
      bits: width of a code.
      dtype: of the activation it stands for, which its consumers go on with.
    """

    codes: Int8[Array, "*dims channels"]
    scale: Float[Array, "..."]
    zero_point: Int8[Array, "..."] | None = None
    bits: int = static(default=8)
    dtype: Any = static(default=jnp.dtype("float32"))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation it stands for."""
        return self.codes.shape

    def __getitem__(self, tokens: Any) -> "QActivation":
        """Some of the tokens: an index of leading axes; a grid for all tokens stays whole."""
        own = self.shape[:-1]
        return jax.tree.map(lambda a: a[tokens] if a.shape[:-1] == own else a, self)


def activation_grid(
    x: Float[Array, "*dims"], spec: QuantSpec, clip: Float[Array, "2"] | None = None
) -> tuple[Array, Array | None]:
    """Scale and zero point of a dynamic grid, measured on `x`; `clip` as in `fake_quantize`."""
    low, high = activation_range(x, spec)
    if clip is not None:
        low, high = low * clip[0], high * clip[1]
    return range_to_grid(low, high, spec)


def quantize_dynamic(
    x: Float[Array, "*dims"], spec: QuantSpec, clip: Float[Array, "2"] | None = None
) -> QActivation:
    """The codes of `x` on the grid that `activation_grid` measures."""
    if spec.granularity == "tensor":
        return quantize_activation(x, *activation_grid(x, spec, clip), spec)
    grid = quantize_tokens(x, clip, bits=spec.bits, symmetric=spec.symmetric)
    return QActivation(*grid, spec.bits, x.dtype)


def quantize_activation(
    x: Float[Array, "*dims"], scale: Array, zero_point: Array | None, spec: QuantSpec
) -> QActivation:
    """The nearest codes on the given grid; entries outside it saturate."""
    codes = round_to_codes(x, scale, zero_point, spec)
    return QActivation(codes, scale, zero_point, spec.bits, x.dtype)


def as_float(x: Float[Array, "*dims"] | QActivation) -> Float[Array, "*dims"]:
    """`(q − z)·s` in the dtype of the activation, the value that `fake_quantize` gives."""
    if not isinstance(x, QActivation):
        return x
    q = x.codes.astype(jnp.float32)
    if x.zero_point is not None:
        q = q - x.zero_point.astype(jnp.float32)
    return (q * x.scale).astype(x.dtype)
