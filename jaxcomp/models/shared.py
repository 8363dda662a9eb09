"""Texts that begin alike as one sequence, so that what they share is computed once.

    the cat sat            tokens     the cat sat ran a dog ran
    the cat ran            positions    0   1   2   2 0   1   2
    a dog ran              ends         4   4   3   4 7   7   7

In the order of their tokens, each text adds to its sequence only what the text before it does not
begin with. A token sees those before it whose end comes after it: the way up to the root of a tree
of prefixes. Texts that share nothing fill one sequence as well; they do not see each other.

Few-shot prompts and the choices of one question shrink to a fraction of their tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxcomp.models.attention import Context


class Shared(NamedTuple):
    """One sequence that holds several texts; `n` slots, in the order of the module docstring.

    Attributes:
      slots: index of a text → where its tokens stand, in order.
    """

    tokens: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " n"]
    slots: dict[int, Int[np.ndarray, " m"]]


def share(texts: Sequence[Int[np.ndarray, " n"]], capacity: int) -> list[Shared]:
    """The texts in sequences of at most `capacity` tokens, or of one longer text alone."""
    order = sorted(range(len(texts)), key=lambda i: texts[i].tolist())
    groups: list[list[int]] = []
    size, last = 0, None
    for i in order:
        more = len(texts[i]) - (0 if last is None else _alike(texts[last], texts[i]))
        if last is None or size + more > capacity:
            groups.append([])
            size, more = 0, len(texts[i])
        groups[-1].append(i)
        size, last = size + more, i
    return [_grow(texts, group) for group in groups]


def padded(
    sequences: Sequence[Shared], batch: int, length: int
) -> tuple[Int[np.ndarray, "batch length"], Context]:
    """Tokens of a batch and where they stand; padding sees itself alone."""
    tokens, positions = np.zeros((2, batch, length), np.int32)
    ends = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), (batch, length)).copy()
    for row, sequence in enumerate(sequences):
        n = len(sequence.tokens)
        tokens[row, :n], positions[row, :n] = sequence.tokens, sequence.positions
        ends[row, :n] = sequence.ends
    return tokens, Context(jnp.asarray(positions), ends=jnp.asarray(ends))


def _grow(texts: Sequence[np.ndarray], group: Sequence[int]) -> Shared:
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    path: list[int] = []  # slots of the text that came last
    slots = {}
    for last, i in zip([None, *group], group, strict=False):
        alike = 0 if last is None else _alike(texts[last], texts[i])
        for slot in path[alike:]:
            ends[slot] = len(tokens)
        new = texts[i][alike:].tolist()
        path = path[:alike] + list(range(len(tokens), len(tokens) + len(new)))
        positions += range(alike, alike + len(new))
        tokens += new
        ends += [0] * len(new)
        slots[i] = np.array(path)
    for slot in path:
        ends[slot] = len(tokens)
    return Shared(*(np.array(a, np.int32) for a in (tokens, positions, ends)), slots)


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common at their start."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
