"""Fusing one weight into another: w + C ∘ v + a b, and what tells whether it worked.

    v      the donor: a weight of the same shape from a block that is removed; frozen
    C      how much of each of its entries enters: low_rank (down · up), one number an output
           channel (row), or one an entry (full); zero at first
    a b    an ordinary low-rank addition; zero at first

The product with C is entry by entry, so w + C ∘ v can differ from w by a matrix of full rank even
where C has rank 1.

Source: Pei et al., FuseGPT, arXiv 2411.14507, and the authors' code. Weights here are [in, out].
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Coefficient = Literal["low_rank", "row", "full"]
GroupLoss = Literal["mse", "cosine", "batch_kl"]
TINY = 1e-30

States = Float[Array, "batch time d_model"]


def neighbourhood(block: int, n_blocks: int, group_size: int) -> tuple[int, ...]:
    """`group_size` neighbours with `block` among them, half before it; all where there are fewer.

    At the ends the group is shifted and not cut. Of an odd size as many stand before as behind; of
    an even one, one more before, as in the authors' code.
    """
    size = min(group_size, n_blocks)
    start = min(max(block - group_size // 2, 0), n_blocks - size)
    return tuple(range(start, start + size))


def init_coefficient(
    kind: Coefficient, generator: np.random.Generator, shape: tuple[int, int], rank: int
) -> dict[str, Float[np.ndarray, "*shape"]]:
    """The parts of a C that is zero, for weights of `shape`, float32; `rank` is of low_rank."""
    in_ch, out_ch = shape
    if kind == "row":
        return {"row": np.zeros(out_ch, np.float32)}
    if kind == "full":
        return {"full": np.zeros(shape, np.float32)}
    return {"down": _uniform(generator, in_ch, rank), "up": np.zeros((rank, out_ch), np.float32)}


def init_lora(
    generator: np.random.Generator, shape: tuple[int, int], rank: int
) -> dict[str, Float[np.ndarray, "*shape"]]:
    """The factors of a zero addition, float32."""
    in_ch, out_ch = shape
    return {"a": _uniform(generator, in_ch, rank), "b": np.zeros((rank, out_ch), np.float32)}


def coefficient(parts: dict[str, Array]) -> Float[Array, "*shape"]:
    """C, or what broadcasts to it."""
    if "up" in parts:
        return _product(parts["down"], parts["up"])
    return parts["row"] if "row" in parts else parts["full"]


def fused(
    w: Float[Array, "*shape"],
    donor: Float[Array, "*shape"] | None,
    parts: dict[str, Array] | None,
    lora: dict[str, Array] | None,
) -> Float[Array, "*shape"]:
    """w + C ∘ donor + a b in float32, without what is None; w may be a bias, with C as a row."""
    w = w.astype(jnp.float32)
    if parts is not None:
        w = w + coefficient(parts) * donor.astype(jnp.float32)
    return w if lora is None else w + _product(lora["a"], lora["b"])


def group_loss(
    kind: GroupLoss, found: States, target: States, token_limit: float | None = None
) -> Float[Array, ""]:
    """How far `found` is from `target`, 0 where they are equal; float32."""
    found, target = found.astype(jnp.float32), target.astype(jnp.float32)
    if kind == "cosine":
        return jnp.mean(0.5 * jnp.sum((_unit(found) - _unit(target)) ** 2, axis=-1))
    return batch_kl(found, target) if kind == "batch_kl" else mse(found, target, token_limit)


def mse(found: States, target: States, token_limit: float | None = None) -> Float[Array, ""]:
    """Squared error as a share of the target's energy.

    Args:
      token_limit: a token with more than so many times the energy of the median token's weighs less
        in proportion, in the error and in the energy, so that one massive token decides neither.
    """
    error = jnp.mean((found - target) ** 2, axis=-1)
    energy = jnp.mean(target**2, axis=-1)
    if token_limit is not None:
        limit = token_limit * jnp.median(energy)
        weight = jnp.minimum(1.0, limit / jnp.maximum(energy, TINY))
        error, energy = weight * error, weight * energy
    return jnp.sum(error) / jnp.maximum(jnp.sum(energy), TINY)


def batch_kl(found: States, target: States) -> Float[Array, ""]:
    """The authors' loss: at every position and channel a distribution over the windows of a batch,
    KL(target ‖ found), summed and divided by the windows.

    What is added to all windows alike at a position and channel changes nothing; a batch of one
    window has no loss at all.
    """
    p, q = jax.nn.log_softmax(target, axis=0), jax.nn.log_softmax(found, axis=0)
    return jnp.sum(jnp.exp(p) * (p - q)) / len(target)


def _product(a: Float[Array, "m r"], b: Float[Array, "r n"]) -> Float[Array, "m n"]:
    return jnp.matmul(a, b, precision="highest")  # sums of weights, not of activations


def _uniform(
    generator: np.random.Generator, in_ch: int, rank: int
) -> Float[np.ndarray, "in_ch rank"]:
    """Kaiming's uniform with a = √5."""
    bound = in_ch**-0.5
    return generator.uniform(-bound, bound, (in_ch, rank)).astype(np.float32)


def _unit(x: Float[Array, "*dims d_model"]) -> Float[Array, "*dims d_model"]:
    norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), TINY))
    return x / norm
