"""The next token of a sequence: the most likely one, or one drawn from a filtered distribution.

Filters come in the order of transformers' logits processors, and mean what they mean there:
repetition penalty, temperature, top-k, top-p, min-p. What they leave is drawn from.

Nothing here sorts the vocabulary, which takes XLA's CPU backend tens of milliseconds a row: the
borders of top-k and top-p are found by halving an interval of floats, and a token is drawn by
walking down sums of the probabilities, with one random number a row.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

ROW = 256  # probabilities that share a sum when one of them is drawn


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy: always the most likely token.

    Attributes:
      temperature: divides the logits; 0 is greedy, whatever the filters below say.
      top_k: draw from so many of the most likely tokens; 0 for all.
      top_p: draw from the fewest most likely tokens whose probabilities reach this sum; 1 for all.
      min_p: draw from tokens at least so likely, as a share of the most likely one; 0 for all.
      repetition_penalty: divides the logit of a token that has been seen, in the prompt too, or
        multiplies it where it is negative; 1 changes nothing. Greedy choices feel it as well.
      seed: of the random numbers; the same seed gives the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        limits = (
            (
                "temperature",
                0 <= self.temperature < math.inf,
                "0 (greedy) or more, 0.7 for example",
            ),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more, 40 for example"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                "above 0; 1 changes nothing, 1.1 discourages repetition",
            ),
            ("seed", 0 <= self.seed < 2**32, f"0 to {2**32 - 1}"),
        )
        for name, holds, allowed in limits:
            if not holds:  # NaN holds nowhere
                raise ValueError(f"{name}={getattr(self, name)} is not possible; it is {allowed}")

    @property
    def greedy(self) -> bool:
        """Whether no random number is needed."""
        return self.temperature == 0


def sample(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"] | None,
    settings: Sampling = Sampling(),
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Int[Array, " batch"]:
    """One token a row, int32; a row's token depends on its own logits and key alone.

    Args:
      logits: of the next token, float32.
      keys: one a row; None will do where `settings` is greedy.
      seen: tokens that the repetition penalty falls on; None for none.
    """
    logits = filtered(logits, settings, seen)
    if settings.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(_draw)(jax.nn.softmax(logits, axis=-1), jax.vmap(jax.random.uniform)(keys))


def filtered(
    logits: Float[Array, "batch vocab"],
    settings: Sampling,
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Float[Array, "batch vocab"]:
    """The logits of what may be drawn, −inf elsewhere; with temperature 0 the penalty alone.

    Departure from transformers: tokens exactly as likely as the last one that top-p keeps are kept,
    where its unstable sort drops some of them.
    """
    if seen is not None and settings.repetition_penalty != 1:
        penalty = settings.repetition_penalty
        punished = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, punished, logits)
    if settings.greedy:
        return logits
    logits = logits / settings.temperature
    if settings.top_k:
        logits = _keep_top(logits, jnp.ones_like(logits), settings.top_k)
    if settings.top_p < 1:
        logits = _keep_top(logits, jax.nn.softmax(logits, axis=-1), settings.top_p)
    if settings.min_p > 0:
        p = jax.nn.softmax(logits, axis=-1)
        least = settings.min_p * jnp.max(p, axis=-1, keepdims=True)
        logits = jnp.where(p < least, -jnp.inf, logits)
    return logits


def _keep_top(
    logits: Float[Array, "batch vocab"],
    weights: Float[Array, "batch vocab"],
    total: float | int | int,
) -> Float[Array, "batch vocab"]:
    """Keeps the tokens above which there are others of less than `total` weight together.

    The border is found by halving an interval of floats in the order of their bits, so that 32
    steps end at the very float.
    """
    order = _order(logits)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # above `low` there is `total` or more, above `high` less
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without its overflow
        above = jnp.sum(jnp.where(order > middle, weights, 0.0), axis=-1, keepdims=True)
        enough = above >= total
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, high = (f(order, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    _, border = jax.lax.fori_loop(0, 32, halve, (low - 1, high))
    return jnp.where(order < border, -jnp.inf, logits)


def _order(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Integers that compare as the floats do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _draw(p: Float[Array, " vocab"], u: Float[Array, ""]) -> Int[Array, ""]:
    """The token where the running sum of `p` passes `u` of it all; never one of probability 0."""
    rows = jnp.pad(p, (0, -len(p) % ROW)).reshape(-1, ROW)
    sums = jnp.sum(rows, axis=1)
    row, rest = _passes(sums, u * jnp.sum(sums))
    token, _ = _passes(rows[row], rest)
    return (row * ROW + token).astype(jnp.int32)


def _passes(p: Float[Array, " n"], target: Float[Array, ""]) -> tuple[Array, Array]:
    """Where the running sum of `p` passes `target`, and how much of it is left for that entry.

    An entry of 0 is never it, however sums round; the last other entry is, where none passes.
    """
    ends = jnp.cumsum(p)
    passed = (ends > target) & (p > 0)
    last = len(p) - 1 - jnp.argmax(p[::-1] > 0)
    at = jnp.where(jnp.any(passed), jnp.argmax(passed), last)
    return at, target - (ends[at] - p[at])
