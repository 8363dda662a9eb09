"""GPTQ: round one input channel at a time and let the others make up for the error.

With W `[in_ch, out_ch]` and H ∝ XᵀX over calibration activations X, the output error of Ŵ is
tr((Ŵ − W)ᵀ H (Ŵ − W)). The authors round channel j and spread its error over the channels after it,
    e = (w_j − Q(w_j)) / U_jj,   w_k ← w_k − U_jk · e,   H⁻¹ = Uᵀ U, U upper triangular.
The same numbers come out when every channel instead collects what the channels before it left,
    ŵ_j = Q(w_j + Σ_{k<j} (w_k − ŵ_k) · R_kj / R_jj),    H = R Rᵀ, R upper triangular,
which needs one Cholesky factor and no inverse. That is the form used here.

Source: Frantar et al., arXiv 2210.17323, Algorithm 1, and the authors' options: channels by
descending H_jj ("act-order", with group grids from the original weights), damping by a share of the
mean diagonal, dead channels zeroed. Equality of the two forms: Chee et al., arXiv 2307.13304,
Theorem 6. Departures:
- a factorisation that fails is repeated from a fresh H with twice the damping (the authors add
  0.0015 to the matrix already damped); the damping used is returned.
- all output channels are solved at once, so the consumers of one site are one call.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomp.core.quantize import QTensor, QuantSpec, fit_range, n_groups, round_to_codes
from jaxcomp.solvers.clipping import search_range
from pallas_kernels.packing import pack

TILE = 64  # channels rounded between two products with the whole matrix of errors
MAX_DAMP = 1.0

Clip = Literal["none", "weight", "output"]


class GPTQSolution(NamedTuple):
    """A quantized weight and how it was reached.

    Attributes:
      weight: codes and grid.
      damp: share of mean(diag H) that was added to the diagonal; NaN if nothing up to 1 helped.
      error_before: per output channel, ‖X(Ŵ − W)‖² of rounding to nearest on the initial grid.
      error_after: the same of `weight`.
      energy: the same of W itself, to make them relative.
    """

    weight: QTensor
    damp: Float[Array, ""]
    error_before: Float[Array, " out_ch"]
    error_after: Float[Array, " out_ch"]
    energy: Float[Array, " out_ch"]


def gptq(
    w: Float[Array, "in_ch out_ch"],
    hessian: Float[Array, "in_ch in_ch"],
    spec: QuantSpec,
    *,
    act_order: bool = True,
    damp: float | Float[Array, ""] = 0.01,
    clip: Clip = "none",
) -> GPTQSolution:
    """Quantizes `w` for inputs whose second moment is `hessian`; jittable, float32 inside.

    Args:
      w: weight applied as ``x @ w``.
      hessian: any positive multiple of XᵀX; not changed.
      spec: the grid; per tensor, per channel or per group along `in_ch`.
      act_order: round the channels with the largest H_jj first, on grids fitted beforehand.
        Without it channels go in stored order and a group's grid is fitted to the weights as the
        errors of earlier groups left them.
      damp: initial share of mean(diag H) added to the diagonal.
      clip: how a group's range is fitted: min/max, or by `solvers.clipping.search_range` for the
        least error of the "weight" or of the "output".

    Raises:
      ValueError: `in_ch` is not a whole number of groups.
    """
    groups = n_groups(w.shape[0], spec) if spec.granularity == "channel" else 1
    w = w.astype(jnp.float32)
    hessian = hessian.astype(jnp.float32)
    dead = jnp.diagonal(hessian) <= 0
    target = jnp.where(dead[:, None], 0.0, w)

    importance = jnp.diagonal(hessian)
    scale, zero = _fit(target, importance, spec, clip)
    first = _round(target, scale, zero, spec, groups)

    # R upper triangular in rounding order is L lower triangular in its reverse: H = L Lᵀ.
    order = jnp.argsort(jnp.diagonal(hessian)) if act_order else jnp.arange(len(w))[::-1]
    factor, damp_used = _factor(hessian, order, damp)
    refit = functools.partial(_fit, clip=clip) if groups > 1 and not act_order else None
    reversed_codes, scale, zero = _round_in_turn(
        target[order],
        factor,
        importance[order],
        (scale, zero),
        order * groups // len(w),
        spec,
        refit,
    )
    codes = jnp.zeros_like(reversed_codes).at[order].set(reversed_codes)
    weight = QTensor(pack(codes, spec.bits), scale, zero, spec.bits, len(w))

    def output_error(values: Array) -> Array:
        return jnp.sum(values * (hessian @ values), axis=0)

    return GPTQSolution(
        weight,
        damp_used,
        output_error(first - w),
        output_error(_values(codes, scale, zero, groups) - w),
        output_error(w),
    )


def _fit(w: Array, importance: Array, spec: QuantSpec, clip: Clip) -> tuple[Array, Array | None]:
    if clip == "none":
        return fit_range(w, spec)
    return search_range(w, spec, importance if clip == "output" else None)


def _factor(h: Array, order: Array, damp: float | Array) -> tuple[Array, Array]:
    """L lower triangular with H[order, order] + λ·mean(diag H)·I = L Lᵀ, and the λ that worked.

    Dead channels get a diagonal of 1.
    """
    h = h[order[:, None], order[None, :]]
    diagonal = jnp.diagonal(h)
    diagonal = jnp.where(diagonal <= 0, 1.0, diagonal)
    every, mean = jnp.arange(len(h)), jnp.mean(diagonal)

    def attempt(share: Array) -> Array:
        return jnp.linalg.cholesky(h.at[every, every].set(diagonal + share * mean))

    def failed(state: tuple) -> Array:
        _, used, factor = state
        return ~jnp.isfinite(factor[-1, -1]) & (used < MAX_DAMP)

    def again(state: tuple) -> tuple:
        share = state[0]
        return jnp.minimum(2 * jnp.maximum(share, 1e-4), MAX_DAMP), share, attempt(share)

    nothing = jnp.asarray(damp, h.dtype), jnp.zeros((), h.dtype), jnp.full_like(h, jnp.nan)
    _, used, factor = jax.lax.while_loop(failed, again, nothing)
    return factor, jnp.where(jnp.isfinite(factor[-1, -1]), used, jnp.nan)


def _round_in_turn(
    w: Float[Array, "in_ch out_ch"],
    factor: Float[Array, "in_ch in_ch"],
    importance: Float[Array, " in_ch"],
    grid: tuple[Array, Array | None],
    group_of: Int[Array, " in_ch"],
    spec: QuantSpec,
    refit: Callable | None,
) -> tuple[Array, Array, Array | None]:
    """The column loop, from the last row of `w` to the first.

    `refit` not None: tiles are groups, and each begins by fitting its grid to the weights as the
    errors so far have moved them.
    """
    (in_ch, out_ch), (scale, zero) = w.shape, grid
    tile = TILE if refit is None else in_ch // len(scale)
    if pad := -in_ch % tile:  # zero channels, tied to no other: they round without error
        w = jnp.pad(w, ((0, pad), (0, 0)))
        factor = jnp.pad(factor, ((0, pad), (0, pad)))
        factor = factor + jnp.diag((jnp.arange(in_ch + pad) >= in_ch).astype(factor.dtype))
        group_of = jnp.pad(group_of, (0, pad), mode="edge")
    feedback = factor / jnp.diagonal(factor)  # column j: what channel j collects from the others
    one_group = QuantSpec(spec.bits, symmetric=spec.symmetric)

    def do_tile(t: Array, state: tuple) -> tuple:
        errors, codes, scale, zero = state  # errors: w − ŵ, zero where not yet rounded
        start = in_ch + pad - (t + 1) * tile
        columns = jax.lax.dynamic_slice_in_dim(feedback, start, tile, axis=1)
        wanted = jax.lax.dynamic_slice_in_dim(w, start, tile)
        inside = jax.lax.dynamic_slice_in_dim(columns, start, tile)
        drift = columns.T @ errors
        if refit is not None:
            # Where the weights of the group have moved to while all of them are still free.
            free = jax.scipy.linalg.solve_triangular(
                inside, drift, trans="T", lower=True, unit_diagonal=True
            )
            tile_importance = jax.lax.dynamic_slice_in_dim(importance, start, tile)
            group_scale, group_zero = refit(wanted + free, tile_importance, one_group)
            scale = scale.at[t].set(group_scale[0])
            zero = None if zero is None else zero.at[t].set(group_zero[0])

        moved = wanted + drift

        def do_channel(i: Array, inner: tuple) -> tuple:
            j = tile - 1 - i
            errors, codes = inner
            g = group_of[start + j]
            s, z = scale[g], (None if zero is None else zero[g])
            q = round_to_codes(moved[j] + inside[:, j] @ errors, s, z, spec)
            value = (q if z is None else q.astype(jnp.float32) - z) * s
            return errors.at[j].set(wanted[j] - value), codes.at[j].set(q)

        empty = jnp.zeros((tile, out_ch)), jnp.zeros((tile, out_ch), jnp.int8)
        tile_errors, tile_codes = jax.lax.fori_loop(0, tile, do_channel, empty)
        put = jax.lax.dynamic_update_slice_in_dim
        return put(errors, tile_errors, start, 0), put(codes, tile_codes, start, 0), scale, zero

    start = jnp.zeros(w.shape), jnp.zeros(w.shape, jnp.int8), scale, zero
    _, codes, scale, zero = jax.lax.fori_loop(0, len(w) // tile, do_tile, start)
    return codes[:in_ch], scale, zero


def _round(w: Array, scale: Array, zero: Array | None, spec: QuantSpec, groups: int) -> Array:
    """Rounding to nearest, as values."""
    grouped = w.reshape(groups, -1, w.shape[-1])
    z = None if zero is None else zero[:, None]
    codes = round_to_codes(grouped, scale[:, None], z, spec).reshape(w.shape)
    return _values(codes, scale, zero, groups)


def _values(codes: Array, scale: Array, zero: Array | None, groups: int) -> Array:
    grouped = codes.reshape(groups, -1, codes.shape[-1]).astype(jnp.float32)
    if zero is not None:
        grouped = grouped - zero[:, None].astype(jnp.float32)
    return (grouped * scale[:, None]).reshape(codes.shape)
