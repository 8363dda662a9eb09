"""A patch: one linear map of the residual stream where blocks were removed.

It belongs to the block behind the cut and acts on its input, x → x P, before norm and residual sum.
As a chain of transforms it runs factored (Hadamard, scale, Hadamard back); as one matrix it is
dense, which is what fine-tuning wants and what a rotation of the stream makes of it.

Source: Chen et al., LinearPatch, arXiv 2505.24680.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomp.core.struct import node, static
from jaxcomp.core.transforms import Kron, Transform, transform, transform_columns, transform_rows


@node
class Patch:
    """x → x T₁ T₂ …, over the channels of the residual stream.

    Attributes:
      transforms: applied in turn, in float32.
      skip_first: leave the first token of a sequence as it is; it may carry a massive activation,
        which is a constant that later blocks rely on and no scale should move.
    """

    transforms: tuple[Transform, ...] = ()
    skip_first: bool = static(default=False)


def apply_patch(
    patch: Patch | None,
    x: Float[Array, "batch time d_model"],
    positions: Int[Array, "batch time"],
) -> Float[Array, "batch time d_model"]:
    """The patched stream in the dtype of `x`; without a patch, `x`."""
    if patch is None:
        return x
    y = functools.reduce(lambda y, t: transform(t, y), patch.transforms, x.astype(jnp.float32))
    if patch.skip_first:
        y = jnp.where((positions == 0)[..., None], x, y)
    return y.astype(x.dtype)


def patch_matrix(patch: Patch, d_model: int) -> Float[Array, "d_model d_model"]:
    """P, float32."""
    eye = jnp.eye(d_model)
    return functools.reduce(lambda y, t: transform(t, y), patch.transforms, eye)


def dense_patch(patch: Patch, d_model: int) -> Patch:
    """The same map as one matrix, all of whose entries may be trained."""
    return patch.replace(transforms=(Kron(right=patch_matrix(patch, d_model)),))


def rotate_patch(patch: Patch, rotation: tuple[Transform, ...], d_model: int) -> Patch:
    """The patch in the basis of a rotated stream x R: Rᵀ P R, dense.

    Args:
      rotation: the parts of R, each its own inverse transpose.
    """
    p = patch_matrix(patch, d_model)
    p = functools.reduce(lambda p, t: transform_columns(t, p), rotation, p)
    p = functools.reduce(lambda p, t: transform_rows(t, p), rotation, p)
    return patch.replace(transforms=(Kron(right=p),))
