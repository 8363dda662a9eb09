"""Neighbouring blocks become one: the weighted sum that is left after merges of merges.

    laco        W ← W_0 + Σ_k (W_k − W_0)        of `count` neighbours; the paper's formula
    laco_code   W ← W_last                       what the authors' code comes to
    last        W ← α W_0 + (1 − α) W_1          of two

All are weighted sums with constant weights, and so is a merge of what was merged before. For two
neighbours the first two are the same.

Sources: Yang et al., LaCo, arXiv 2402.11187; Liu et al., MKA, 2406.16330 (last).
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal["laco", "laco_code", "last"]
Merge = tuple[int, int]  # place of the first block as the merges before left it, how many blocks


class Mix(NamedTuple):
    """A block as a weighted sum of neighbours of the original.

    Attributes:
      first: the block whose place it takes, and whose norms it keeps.
      weights: of that block and of those behind it, one after another.
    """

    first: int
    weights: tuple[float, ...] = (1.0,)


def unmerged(n_blocks: int) -> list[Mix]:
    """Every block as it is."""
    return [Mix(i) for i in range(n_blocks)]


def merge(mixes: list[Mix], at: int, count: int, kind: Kind, alpha: float) -> list[Mix]:
    """The blocks with those at `at` … `at + count − 1` as one.

    Raises:
      ValueError: there are not so many, or `kind` does not merge so many.
    """
    if count < 2 or not 0 <= at <= len(mixes) - count:
        raise ValueError(
            f"the merge ({at}, {count}) means blocks {at} to {at + count - 1}, at least two, and "
            f"there are blocks 0 to {len(mixes) - 1} before it"
        )
    factors = _factors(count, kind, alpha)
    parts = zip(factors, mixes[at : at + count], strict=True)
    weights = tuple(factor * w for factor, mix in parts for w in mix.weights)
    return [*mixes[:at], Mix(mixes[at].first, weights), *mixes[at + count :]]


def merge_all(n_blocks: int, merges: Iterable[Merge], kind: Kind, alpha: float) -> list[Mix]:
    """What is left of `n_blocks` blocks after all merges, in their order."""
    mixes = unmerged(n_blocks)
    for at, count in merges:
        mixes = merge(mixes, at, count, kind, alpha)
    return mixes


def merges_of_last(n_blocks: int, remove: int, protected: int) -> tuple[Merge, ...]:
    """The last two become one, `remove` times; of `n_blocks`, the last `protected` stay out."""
    return tuple((n_blocks - protected - 2 - k, 2) for k in range(remove))


def absorbed(mixes: list[Mix]) -> tuple[int, ...]:
    """Blocks of the original that are no block of their own any more."""
    return tuple(mix.first + k for mix in mixes for k in range(1, len(mix.weights)))


def _factors(count: int, kind: Kind, alpha: float) -> tuple[float, ...]:
    if kind == "laco":
        return (2.0 - count, *[1.0] * (count - 1))
    if kind == "laco_code":
        return (*[0.0] * (count - 1), 1.0)
    if count != 2:
        raise ValueError(f"kind='last' merges two blocks at a time, not {count}")
    return alpha, 1.0 - alpha
