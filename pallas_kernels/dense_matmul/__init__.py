"""`dense_matmul`: activations times a dense weight in its stored dtype."""

import dataclasses
import functools
import typing

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dense_matmul import reference
from pallas_kernels.dispatch import first_supported

# XLA's own product is what a TPU and a GPU want.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {"cpu": ("native",)}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("transposed",)
)
@dataclasses.dataclass(frozen=True)
class DenseWeight:
    """A weight `[in_ch, out_ch]` for `dense_matmul`; where `transposed` it lies the other way."""

    array: Float[Array, "rows columns"]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """`[in_ch, out_ch]`."""
        return self.array.shape[::-1] if self.transposed else self.array.shape


# JAX puts placeholders into the fields of a pytree, which run-time type checks would refuse.
DenseWeight.__init__ = typing.no_type_check(DenseWeight.__init__)


def dense_matmul(
    x: Float[Array, "*tokens in_ch"], w: DenseWeight, out_dtype: DTypeLike | None = None
) -> Float[Array, "*tokens out_ch"]:
    """`x @ w`, with `w` cast to the dtype of `x` inside the product.

    Accumulated in float32. For a few rows a CPU is bound by reading the weight, and XLA would read
    it with one thread, and first write a copy of one that is bfloat16.

    Args:
      out_dtype: dtype of the product; None for that of `x`.

    Raises:
      ValueError: `x` has not the weight's input channels.
    """
    if w.array.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"activations {x.shape} do not fit a weight of shape {w.shape}")
    return first_supported(
        __name__, IMPLEMENTATIONS, reference.dense_matmul, x, w, out_dtype=out_dtype or x.dtype
    )
