"""Scores to choices: which blocks go, when a low score says that a block is missed little."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Choice(NamedTuple):
    """Places that were chosen, in order.

    Attributes:
      margin: how much worse the next best would have been, relative to its score; None where there
        was no other, or no score.
    """

    removed: tuple[int, ...]
    margin: float | None = None


def candidates(
    n_blocks: int, protect: tuple[int, ...] = (1, 1), avoid: Iterable[int] = ()
) -> tuple[int, ...]:
    """The places that may go: all but the first and last so many, and those to avoid.

    Raises:
      ValueError: `protect` is not two numbers from 0.
    """
    if len(protect) != 2 or min(protect) < 0:
        raise ValueError(f"protect={protect}; give two numbers from 0, of first and last blocks")
    avoid = set(avoid)
    return tuple(i for i in range(protect[0], n_blocks - protect[1]) if i not in avoid)


def check_remove(remove: int, allowed: tuple[int, ...], n_blocks: int) -> None:
    """Refuses a number of blocks that cannot go.

    Raises:
      ValueError: it is below 1, above the number that may go, or all there are.
    """
    if remove < 1:
        raise ValueError(f"remove={remove} is below 1")
    if remove > len(allowed) or remove >= n_blocks:
        raise ValueError(
            f"remove={remove}, and of the {n_blocks} blocks {len(allowed)} may go; remove fewer, "
            "or protect fewer"
        )


def smallest(scores: Float[np.ndarray, " blocks"], remove: int, allowed: tuple[int, ...]) -> Choice:
    """The `remove` allowed blocks with the smallest scores; of equals the earlier."""
    check_scores(scores, allowed, "block")
    check_remove(remove, allowed, len(scores))
    order = sorted(allowed, key=lambda i: (scores[i], i))
    next_best = scores[order[remove]] if remove < len(order) else None
    return Choice(tuple(sorted(order[:remove])), _margin(scores[order[remove - 1]], next_best))


def smallest_span(
    scores: Float[np.ndarray, " starts"], remove: int, allowed: tuple[int, ...]
) -> Choice:
    """The `remove` neighbours, all allowed, whose score is smallest; `scores[s]` is of s and on.

    Raises:
      ValueError: a score is not finite; nowhere are so many neighbours allowed.
    """
    n_blocks = len(scores) + remove - 1
    check_remove(remove, allowed, n_blocks)
    free = set(allowed)
    starts = [s for s in range(len(scores)) if free.issuperset(range(s, s + remove))]
    if not starts:
        raise ValueError(
            f"nowhere may {remove} neighbouring blocks go; allowed are "
            f"{', '.join(map(str, allowed))}"
        )
    check_scores(scores, starts, "the span that starts at block")
    order = sorted(starts, key=lambda s: (scores[s], s))
    next_best = scores[order[1]] if len(order) > 1 else None
    best = order[0]
    return Choice(tuple(range(best, best + remove)), _margin(scores[best], next_best))


def span_sums(scores: Float[np.ndarray, " blocks"], remove: int) -> Float[np.ndarray, " starts"]:
    """Scores of spans as the sums of their blocks' scores."""
    return np.convolve(scores, np.ones(remove), "valid")


def every_other(remove: int, allowed: tuple[int, ...], n_blocks: int) -> Choice:
    """Allowed blocks at even distances."""
    check_remove(remove, allowed, n_blocks)
    step = len(allowed) / remove
    return Choice(tuple(allowed[int((k + 0.5) * step)] for k in range(remove)))


def deepest(remove: int, allowed: tuple[int, ...], n_blocks: int) -> Choice:
    """The last allowed blocks."""
    check_remove(remove, allowed, n_blocks)
    return Choice(allowed[-remove:])


def at_random(remove: int, allowed: tuple[int, ...], n_blocks: int, seed: int) -> Choice:
    """Allowed blocks, all sets alike; the same seed gives the same set."""
    check_remove(remove, allowed, n_blocks)
    chosen = np.random.default_rng(seed).choice(len(allowed), remove, replace=False)
    return Choice(tuple(allowed[i] for i in sorted(chosen)))


def check_scores(scores: Float[np.ndarray, " n"], at: Iterable[int], what: str) -> None:
    """Refuses scores that cannot be compared.

    Raises:
      ValueError: one is NaN or infinity; the message says whose.
    """
    for i in at:
        if not np.isfinite(scores[i]):
            raise ValueError(
                f"the score of {what} {i} is {scores[i]}; calibrate on other text, or in float32"
            )


def _margin(last: float, next_best: float | None) -> float | None:
    if next_best is None:
        return None
    return float((next_best - last) / max(abs(next_best), 1e-30))
