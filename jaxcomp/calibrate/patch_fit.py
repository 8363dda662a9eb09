"""The map across one cut, by each of the ways there are to find it."""

import dataclasses
import functools
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.calibrate.cuts import Cut, mended
from jaxcomp.core.transforms import Diag, Hadamard, Kron, Transform, transform
from jaxcomp.models.patch import Patch, dense_patch
from jaxcomp.models.stream import Hidden
from jaxcomp.solvers.orthogonal import random_orthogonal
from jaxcomp.solvers.patch import least_squares_map, ratios

Kind = Literal["hadamard", "diag", "scalar", "lstsq", "mlp_branch"]
Reduction = Literal["ratio_of_means", "mean_of_ratios"]
Form = Literal["factors", "dense"]
Rotation = Literal["hadamard", "block", "orthogonal"]


@dataclasses.dataclass(frozen=True)
class Fitting:
    """How a map is found; the settings are those of `LinearPatch`, which explains them."""

    kind: Kind = "hadamard"
    reduction: Reduction = "ratio_of_means"
    skip_first: bool = False
    form: Form = "factors"
    rotation: Rotation = "hadamard"
    ridge: float = 1e-3
    eps: float = 0.0
    seed: int = 0

    def __post_init__(self):
        choices = dict(kind=Kind, reduction=Reduction, form=Form, rotation=Rotation)
        for name, known in choices.items():
            if getattr(self, name) not in typing.get_args(known):
                words = ", ".join(typing.get_args(known))
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {words}")
        for name in ("ridge", "eps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not a number from 0")


def fit_patch(how: Fitting, found: dict[int, dict[str, Any]], cut: Cut) -> Patch:
    """The map for one cut; what was measured goes into `found`, under the block behind it.

    Raises:
      ValueError: a channel that is silent, too few tokens; names the cut.
    """
    width, numbers = cut.before[0].shape[-1], {"start": cut.start, "end": cut.end}
    try:
        transforms = _transforms(how, cut, width, numbers)
    except ValueError as error:
        raise ValueError(f"the cut [{cut.start}, {cut.end}): {error}") from None
    patch = Patch(transforms, how.skip_first)
    if how.form == "dense" and how.kind in ("hadamard", "diag"):
        patch = dense_patch(patch, width)
    numbers["error_before"] = _error(cut.before, cut.after)
    numbers["error_after"] = _error(mended(cut, patch, how.kind == "mlp_branch"), cut.after)
    found[cut.block] = numbers
    return patch


def patch_like(how: Fitting, d_model: int) -> Patch:
    """A patch of the same structure that changes nothing."""
    if how.kind in ("lstsq", "mlp_branch"):
        return Patch((Kron(right=jnp.eye(d_model)),), how.skip_first)
    turn, back = rotation_of(how, d_model)
    patch = Patch((*turn, Diag(jnp.ones(d_model)), *back), how.skip_first)
    dense = how.form == "dense" and how.kind != "scalar"
    return dense_patch(patch, d_model) if dense else patch


def rotation_of(how: Fitting, d_model: int) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
    """What turns the stream before its channels are scaled, and what turns it back."""
    if how.kind != "hadamard":
        return (), ()
    if how.rotation == "orthogonal":
        q = random_orthogonal(jax.random.key(how.seed), d_model)
        return (Kron(right=q),), (Kron(right=q.T),)
    order = d_model if how.rotation == "hadamard" else d_model & -d_model
    return (Hadamard(order),), (Hadamard(order, transposed=True),)


def _transforms(
    how: Fitting, cut: Cut, width: int, numbers: dict[str, Any]
) -> tuple[Transform, ...]:
    first = int(how.skip_first)
    before, after, branch = (
        [x[:, first:] for x in side] for side in (cut.before, cut.after, cut.branch)
    )
    if how.kind == "scalar":
        pairs = zip(before, after, strict=True)
        alpha = np.concatenate([np.ravel(_lengths(y) / _lengths(x)) for x, y in pairs]).mean()
        numbers["scale"] = float(alpha)
        return (Diag(jnp.full(width, alpha, jnp.float32)),)
    if how.kind in ("lstsq", "mlp_branch"):
        source = branch if how.kind == "mlp_branch" else before
        return (Kron(right=_least_squares(how.ridge, source, before, after)),)
    turn, back = rotation_of(how, width)
    u, v = (_magnitudes(side, turn) for side in (after, before))
    c = ratios(u, v, how.reduction == "ratio_of_means", how.eps)
    numbers |= {"scale": float(c.mean()), "scale_min": float(c.min()), "scale_max": float(c.max())}
    return (*turn, Diag(jnp.asarray(c, jnp.float32)), *back)


def _least_squares(ridge: float, source: Hidden, before: Hidden, after: Hidden) -> jax.Array:
    """The map of `source` that adds what is missing between `before` and `after`.

    Products are summed in float32 within a batch and in float64 over batches.
    """
    width, tokens = source[0].shape[-1], 0
    gram, cross = np.zeros((width, width)), np.zeros((width, width))
    for m, x, y in zip(source, before, after, strict=True):
        one, two = _products(m, x, y)
        gram, cross = gram + np.asarray(one, np.float64), cross + np.asarray(two, np.float64)
        tokens += m.shape[0] * m.shape[1]
    return jnp.asarray(least_squares_map(gram, cross, ridge, tokens), jnp.float32)


@jax.jit
def _products(m: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    m, x, y = (a.astype(jnp.float32).reshape(-1, a.shape[-1]) for a in (m, x, y))
    product = functools.partial(jnp.matmul, precision="highest")
    return product(m.T, m), product(m.T, y - x)


def _magnitudes(hidden: Hidden, turn: tuple[Transform, ...]) -> np.ndarray:
    """Mean |x R| of each channel in each window, `[windows, channels]` float64."""
    return np.concatenate([np.asarray(_mean_magnitude(x, turn), np.float64) for x in hidden])


@jax.jit
def _mean_magnitude(x: jax.Array, turn: tuple[Transform, ...]) -> jax.Array:
    y = functools.reduce(lambda y, t: transform(t, y), turn, x.astype(jnp.float32))
    return jnp.mean(jnp.abs(y), axis=1)


def _lengths(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.asarray(x, np.float32), axis=-1)


def _error(x: Hidden, y: Hidden) -> float:
    """‖x − y‖² / ‖y‖²: the median of the tokens, of which one can hold nearly all the energy."""
    pairs = zip(x, y, strict=True)
    gaps = [np.ravel(_lengths(a - b) / np.maximum(_lengths(b), 1e-30)) for a, b in pairs]
    return float(np.median(np.concatenate(gaps)) ** 2)
