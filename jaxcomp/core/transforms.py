"""Invertible transforms of an activation: x → x T, with the inverse folded into the weights.

A transform is a node, so a block that rotates its input says so in its tree. Everything is done
with two functions, because x W = (x T)(T⁻¹ W) and T⁻¹ W = (Wᵀ T⁻ᵀ)ᵀ:
    transform(t, x)         x T, over the last axis
    inverse_transpose(t)    the transform T⁻ᵀ
    transform_rows(T⁻ᵀ, w)  T⁻¹ W, what a consumer of x T multiplies by
    transform_columns(t, w) W T, what makes a producer put out x T
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.hadamard import hadamard_base, hadamard_matrix, no_hadamard
from jaxcomp.core.struct import node, static
from pallas_kernels import hadamard, kron_matmul


@node
class Diag:
    """x → x ⊙ scale; nothing about the inverse is stored."""

    scale: Float[Array, " channels"]


@node
class Kron:
    """x → x (left ⊗ right); see `pallas_kernels.kron_matmul`.

    One factor alone is block-diagonal (`left` None: every run of n2 channels alike, as for heads)
    or a mix of runs (`right` None); `left` None with `right` of all channels is a full matrix.
    """

    left: Float[Array, "n1 n1"] | None = None
    right: Float[Array, "n2 n2"] | None = None


@node
class Hadamard:
    """x → x (I ⊗ H/√order ⊗ I_inner), orthogonal; channels are `[blocks, order, inner]`.

    `inner` 1 rotates runs of `order` neighbouring channels, `inner` head_dim mixes heads.
    `transposed` takes Hᵀ, which undoes H: not every Hadamard matrix is symmetric.
    """

    order: int = static()
    inner: int = static(default=1)
    transposed: bool = static(default=False)

    def __post_init__(self):
        if hadamard_base(self.order) is None:
            raise ValueError(no_hadamard(self.order))


Transform = Diag | Kron | Hadamard


@functools.singledispatch
def transform(t: Transform, x: Float[Array, "*dims channels"]) -> Float[Array, "*dims channels"]:
    """`x T` in the dtype of `x`.

    Raises:
      ValueError: the transform is not for so many channels.
    """
    raise TypeError(f"{type(t).__name__} is no transform")


@transform.register
def _(t: Diag, x: Array) -> Array:
    return (x.astype(jnp.float32) * t.scale).astype(x.dtype)


@transform.register
def _(t: Kron, x: Array) -> Array:
    return kron_matmul(x, t.left, t.right)


@transform.register
def _(t: Hadamard, x: Array) -> Array:
    base = hadamard_base(t.order)
    factor = None if base == 1 else hadamard_matrix(base)
    if t.transposed and factor is not None:
        factor = factor.T
    return hadamard(x, factor, (t.order // base).bit_length() - 1, t.inner)


@functools.singledispatch
def inverse_transpose(t: Transform) -> Transform:
    """T⁻ᵀ as a transform: `transform(t, x) · transform(inverse_transpose(t), w) = x · w`."""
    raise TypeError(f"{type(t).__name__} is no transform")


@inverse_transpose.register
def _(t: Diag) -> Diag:
    return Diag(1.0 / t.scale)


@inverse_transpose.register
def _(t: Kron) -> Kron:
    invert = lambda m: None if m is None else jnp.linalg.inv(m).T  # noqa: E731
    return Kron(invert(t.left), invert(t.right))


@inverse_transpose.register
def _(t: Hadamard) -> Hadamard:
    return t


@functools.singledispatch
def transform_rows(
    inverse: Transform, w: Float[Array, "in_ch out_ch"]
) -> Float[Array, "in_ch out_ch"]:
    """T⁻¹ W, given `inverse_transpose` of T."""
    return transform(inverse, w.T).T


@transform_rows.register
def _(inverse: Diag, w: Array) -> Array:
    return (w.astype(jnp.float32) * inverse.scale[:, None]).astype(w.dtype)


@transform_rows.register
def _(inverse: Kron, w: Array) -> Array:
    """Both products on W as it lies: transposing it costs more than they do."""
    left, right, (in_ch, out_ch) = inverse.left, inverse.right, w.shape
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if left is not None:
        w = product("ia,ij->aj", left, w.reshape(len(left), -1))
    if right is not None:
        runs = in_ch // len(
            right
        )  # one product each: the compiler would transpose W for one in all
        each = jnp.broadcast_to(right, (runs, *right.shape))
        w = product("acd,aco->ado", each, w.reshape(runs, len(right), out_ch))
    return w.reshape(in_ch, out_ch)


def transform_columns(
    t: Transform, w: Float[Array, "*in_ch out_ch"]
) -> Float[Array, "*in_ch out_ch"]:
    """W T, also for a bias."""
    return transform(t, w)
