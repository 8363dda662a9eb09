"""How far one array is from another, and the row that carries such numbers to the report."""

import dataclasses
import itertools
from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float


def relative_error(x: Float[Array, "*dims"], reference: Float[Array, "*dims"]) -> Float[Array, ""]:
    """‖x − reference‖² / ‖reference‖², float32; 0 is equal, 1 is no better than zeros."""
    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    return jnp.sum((x - reference) ** 2) / jnp.maximum(jnp.sum(reference**2), 1e-30)


def sqnr(x: Float[Array, "*dims"], reference: Float[Array, "*dims"]) -> Float[Array, ""]:
    """Signal to quantization noise in decibel: −10·log10(relative error)."""
    return -10.0 * jnp.log10(jnp.maximum(relative_error(x, reference), 1e-30))


def cosine(x: Float[Array, "*dims"], reference: Float[Array, "*dims"]) -> Float[Array, ""]:
    """Cosine of the angle between the flattened arrays, float32."""
    x, reference = x.astype(jnp.float32).ravel(), reference.astype(jnp.float32).ravel()
    norm = jnp.linalg.norm(x) * jnp.linalg.norm(reference)
    return jnp.dot(x, reference) / jnp.maximum(norm, 1e-30)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a method reports about one block, or about one linear of it.

    Attributes:
      step: name of the method.
      block, linear: where; None for the whole model or the whole block.
      metrics: by convention `error_before` and `error_after` (relative squared error of the
        output, of plain rounding and of the method), `weight_error`, `bits`; others are free. A
        list of floats is a curve for the pictures.
      seconds: wall time, 0.0 where it was not taken separately.
    """

    step: str
    block: int | None
    linear: str | None
    metrics: dict[str, float | int | str | list[float]]
    seconds: float = 0.0


def told_apart(rows: Iterable[Row], earlier: Iterable[Row]) -> list[Row]:
    """Rows of a step under names that none of the rows before it has: "Distill", "Distill 2"."""
    taken, names = {row.step for row in earlier}, {}
    for row in rows:
        numbers = (f"{row.step} {n}" for n in itertools.count(2))
        free = (name for name in itertools.chain([row.step], numbers) if name not in taken)
        names.setdefault(row.step, next(free))
    return [dataclasses.replace(row, step=names[row.step]) for row in rows]
