"""GPTQ: round one input channel at a time and let the others make up for the error.

With W `[in_ch, out_ch]` and H ∝ XᵀX over calibration activations X, the output error of Ŵ is
tr((Ŵ − W)ᵀ H (Ŵ − W)). Channels are rounded in turn; the error of channel j is spread over the
channels k > j not yet rounded:
    e = (w_j − Q(w_j)) / U_jj,   w_k ← w_k − U_jk · e,   H⁻¹ = Uᵀ U, U upper triangular.

Source: Frantar et al., arXiv 2210.17323, Algorithm 1, and the authors' options: channels by
descending H_jj ("act-order", with group grids from the original weights), damping by a share of the
mean diagonal, dead channels zeroed. Departures:
- U is not computed from H⁻¹. If H = R Rᵀ with R upper triangular, then H⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹:
  one Cholesky (of H with both axes reversed) and one triangular inverse, which float32 carries.
- a factorisation that fails is repeated from a fresh H with twice the damping (the authors add
  0.0015 to the matrix already damped); the damping used is returned.
- all output channels are solved at once, so the consumers of one site are one call.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomp.core.quantize import QTensor, QuantSpec, fit_range, n_groups, round_to_codes
from jaxcomp.solvers.clipping import search_range
from pallas_kernels.packing import pack

TILE = 64  # channels rounded between two updates of the rest of the matrix
MAX_DAMP = 1.0


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
    damp: float = 0.01,
    clip: bool = False,
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
      clip: fit grids by `solvers.clipping.search_range` instead of min/max.

    Raises:
      ValueError: `in_ch` is not a whole number of groups.
    """
    groups = n_groups(w.shape[0], spec) if spec.granularity == "channel" else 1
    w = w.astype(jnp.float32)
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    dead = diagonal <= 0
    damped = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
    target = jnp.where(dead[:, None], 0.0, w)

    fit = search_range if clip else fit_range
    scale, zero = fit(target, spec)
    first = _round(target, scale, zero, spec, groups)

    order = jnp.argsort(-jnp.diagonal(damped)) if act_order else jnp.arange(len(w))
    inverse_root, damp_used = _inverse_root(damped[order][:, order], damp)
    refit = None if act_order or groups == 1 else fit
    codes, scale, zero = _round_in_turn(
        target[order], inverse_root, scale, zero, order * groups // len(w), spec, refit
    )
    codes = jnp.zeros_like(codes).at[order].set(codes)
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


def _inverse_root(h: Array, damp: float) -> tuple[Array, Array]:
    """U upper triangular with (H + λ·mean(diag H)·I)⁻¹ = Uᵀ U, and the λ that worked."""
    eye = jnp.eye(len(h), dtype=h.dtype)
    mean = jnp.mean(jnp.diagonal(h))

    def attempt(share):
        flipped = (h + share * mean * eye)[::-1, ::-1]
        root = jnp.linalg.cholesky(flipped)[::-1, ::-1]  # upper: H = R Rᵀ
        return jax.scipy.linalg.solve_triangular(root, eye, lower=False)

    def failed(state):
        share, u = state
        return ~jnp.all(jnp.isfinite(u)) & (share < MAX_DAMP)

    def retry(state):
        share = jnp.minimum(2 * jnp.maximum(state[0], 1e-4), MAX_DAMP)
        return share, attempt(share)

    share = jnp.asarray(damp, h.dtype)
    share, u = jax.lax.while_loop(failed, retry, (share, attempt(share)))
    return u, jnp.where(jnp.all(jnp.isfinite(u)), share, jnp.nan)


def _round_in_turn(
    w: Float[Array, "in_ch out_ch"],
    u: Float[Array, "in_ch in_ch"],
    scale: Array,
    zero: Array | None,
    group_of: Int[Array, " in_ch"],
    spec: QuantSpec,
    refit,
) -> tuple[Array, Array, Array | None]:
    """The column loop. `refit` not None: tiles are groups, and each begins by fitting its grid."""
    in_ch, out_ch = w.shape
    tile = TILE if refit is None else in_ch // len(scale)
    pad = -in_ch % tile
    # Padding channels are zero and independent of the others: they round to zero without error.
    w = jnp.pad(w, ((0, pad), (0, 0)))
    u = jnp.pad(u, ((0, pad), (0, pad))) + jnp.diag(
        jnp.where(jnp.arange(in_ch + pad) < in_ch, 0.0, 1.0)
    )
    group_of = jnp.pad(group_of, (0, pad), mode="edge")

    def grid_row(scale, zero, g):
        return scale[g], (None if zero is None else zero[g])

    def do_tile(t, state):
        w, codes, scale, zero = state
        start = t * tile
        rows = jax.lax.dynamic_slice_in_dim(w, start, tile)
        u_rows = jax.lax.dynamic_slice_in_dim(u, start, tile)
        u_tile = jax.lax.dynamic_slice_in_dim(u_rows, start, tile, axis=1)
        if refit is not None:
            group_scale, group_zero = refit(rows, spec_of_tile)
            scale = scale.at[t].set(group_scale[0])
            zero = None if zero is None else zero.at[t].set(group_zero[0])

        def do_channel(j, inner):
            rows, codes, errors = inner
            s, z = grid_row(scale, zero, group_of[start + j])
            q = round_to_codes(rows[j], s, z, spec)
            value = (q if z is None else q.astype(jnp.float32) - z) * s
            error = (rows[j] - value) / u_tile[j, j]
            rows = rows - u_tile[j][:, None] * error[None, :]
            return rows, codes.at[start + j].set(q), errors.at[j].set(error)

        rows, codes, errors = jax.lax.fori_loop(
            0, tile, do_channel, (rows, codes, jnp.zeros((tile, out_ch)))
        )
        # U is upper triangular, so earlier channels are left alone.
        return w - u_rows.T @ errors, codes, scale, zero

    spec_of_tile = QuantSpec(spec.bits, symmetric=spec.symmetric)
    codes = jnp.zeros(w.shape, jnp.int8)
    _, codes, scale, zero = jax.lax.fori_loop(0, len(w) // tile, do_tile, (w, codes, scale, zero))
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
