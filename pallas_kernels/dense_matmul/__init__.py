"""`dense_matmul`: activations times a dense weight in its stored dtype."""

import dataclasses
import functools
import typing

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dense_matmul import reference
from pallas_kernels.dispatch import first_supported

# XLA's own product is what a TPU and a GPU want.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {"cpu": ("native",)}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("transposed", "out_ch")
)
@dataclasses.dataclass(frozen=True)
class DenseWeight:
    """A weight `[in_ch, out_ch]` for `dense_matmul`, as it lies or in a chip's own layout.

    Attributes:
      array: the weight; or `[panels, in_ch, 64]`, the panels of `pallas_kernels.native`.
      transposed: it lies as `[out_ch, in_ch]`.
      out_ch: output channels of a weight in panels; 0 where it is not.
    """

    array: Float[Array, "..."]
    transposed: bool = False
    out_ch: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """`[in_ch, out_ch]`."""
        if self.out_ch:
            return self.array.shape[1], self.out_ch
        return self.array.shape[::-1] if self.transposed else self.array.shape

    @property
    def dense(self) -> Float[Array, "in_ch out_ch"]:
        """The weight itself."""
        if not self.out_ch:
            return self.array.T if self.transposed else self.array
        return self.array.swapaxes(0, 1).reshape(self.array.shape[1], -1)[:, : self.out_ch]

    def columns(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids in_ch"]:
        """Output channels, one a row: how an embedding is read."""
        if self.out_ch:
            panel = self.array.shape[-1]
            return self.array[ids // panel, :, ids % panel]
        return self.array[ids] if self.transposed else self.array.T[ids]


# JAX puts placeholders into the fields of a pytree, which run-time type checks would refuse.
DenseWeight.__init__ = typing.no_type_check(DenseWeight.__init__)


def dense_matmul(
    x: Float[Array, "*tokens in_ch"], w: DenseWeight, out_dtype: DTypeLike | None = None
) -> Float[Array, "*tokens out_ch"]:
    """`x @ w`, with `w` cast to the dtype of `x` inside the product.

    Accumulated in float32. For a few rows a CPU is bound by reading the weight, which XLA does with
    one thread, after writing a copy of one that is bfloat16.

    Args:
      out_dtype: dtype of the product; None for that of `x`.

    Raises:
      ValueError: `x` has not the weight's input channels.
    """
    if len(w.shape) != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"activations {x.shape} do not fit a weight of shape {w.shape}")
    return first_supported(
        __name__, IMPLEMENTATIONS, reference.dense_matmul, x, w, out_dtype=out_dtype or x.dtype
    )
