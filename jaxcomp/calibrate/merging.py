"""LaCo's walk: from the last blocks to the first, merge wherever the answer keeps its direction.

A window's answer is its final hidden states behind the final norm, all in one vector; the score of
a trial is the mean over windows of the cosine with the dense model's. A trial shares with the dense
model all that stands before its first merged block, because the walk goes towards the first block:
one dense pass keeps what enters every block, and a trial starts there.

Source: Yang et al., LaCo, arXiv 2402.11187, Algorithm 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.calibrate.stream import Calibration, Run, check_finite
from jaxcomp.models.decoder import Block, Decoder, iter_blocks, load_block
from jaxcomp.models.layers import RMSNorm, rms_norm
from jaxcomp.models.mix import weighted_sum
from jaxcomp.models.stream import Hidden, embed_batches, map_batches, step_batches
from jaxcomp.solvers.merging import Kind, Merge, Mix, merge, unmerged

Tick = Callable[[int], None]


class Walk(NamedTuple):
    """How the walk goes.

    Attributes:
      kind: of the merges.
      span: how many neighbours become one.
      threshold: a merge stays where the score is above it.
      interval: how far the walk goes on after a merge; by 1 after none.
      remove: it ends when so many blocks are gone, the last merge being of fewer; None for no end.
      protect: how many first and last blocks stay out of it.
    """

    kind: Kind
    span: int
    threshold: float
    interval: int
    remove: int | None
    protect: tuple[int, int]


class Found(NamedTuple):
    """What a walk gave.

    Attributes:
      merges: in their order.
      scores: of all trials, by the first block of each, in their order.
    """

    merges: list[Merge]
    scores: list[tuple[int, float]]


def find_merges(model: Decoder, calib: Calibration, how: Walk, run: Run, tick: Tick) -> Found:
    """Walks `model`, whose blocks may be handles.

    Args:
      run: with a store, the score of every trial is kept there.
      tick: told how many blocks the walk has left behind.

    Raises:
      ValueError: a score is not finite; names the blocks and the batch.
    """
    states = functools.cache(lambda: _states(model, calib, run))
    mixes, found = unmerged(len(model.blocks)), Found([], [])
    last = len(mixes) - how.protect[1]
    left = how.remove or len(mixes)
    count = min(how.span, left + 1)
    at = last - count
    tick(0)
    while at >= how.protect[0]:
        trial = merge(mixes, at, count, how.kind, 0.5)
        make = functools.partial(_similarity, model, trial, at, states, run)
        number = len(found.scores)
        score = run.store.keep(f"trial.{number}", make) if run.store else make()
        found.scores.append((at, score))
        if score > how.threshold:
            found.merges.append((at, count))
            mixes, left, last = trial, left - count + 1, last - count + 1
            if not left:
                break
            count = min(how.span, left + 1)
            at = min(at - how.interval, last - count)
        else:
            at -= 1
        tick(len(model.blocks) - max(at + 1, 0))
    tick(len(model.blocks))
    return found


def mixed_block(model: Decoder, mix: Mix, first: Block | None = None) -> Block:
    """The block that a mix stands for; what has the weight 0 is not read.

    Args:
      first: the block at `mix.first`, where the caller has it.

    Raises:
      ValueError: a weight of a block, or of their sum, is NaN or infinite.
    """
    first = load_block(model.blocks[mix.first]) if first is None else first
    if mix.weights == (1.0,):
        return first
    behind = {k: w for k, w in enumerate(mix.weights) if w and k}
    blocks = (_sound_block(model, mix.first + k) for k in behind)
    block = weighted_sum(first, blocks, (mix.weights[0], *behind.values()))
    last = mix.first + len(mix.weights) - 1
    check_finite(block, f"blocks {mix.first} to {last} as one")
    return block


def _sound_block(model: Decoder, i: int) -> Block:
    block = load_block(model.blocks[i])
    check_finite(block, f"the weights of block {i}")
    return block


def _states(model: Decoder, calib: Calibration, run: Run) -> list[Hidden]:
    """What enters every block of the model, and what leaves the last."""
    states = [embed_batches(model, calib.tokens, calib.batch)]
    for i, block in enumerate(iter_blocks(model)):
        states.append(step_batches(jax.device_put(block), states[-1], place=run.place))
        check_finite(states[-1], f"the states behind block {i}, batch")
    same = [np.asarray(_cosines(model.norm, x, x)) for x in states[-1]]
    check_finite(same, "the final states behind the norm, over their length, batch")
    return states


def _similarity(
    model: Decoder, mixes: list[Mix], at: int, states: Callable[[], list[Hidden]], run: Run
) -> float:
    """The score of a trial that left the blocks before `at` as they were."""
    hidden = states()[at]
    for mix in mixes[at:]:
        hidden = step_batches(jax.device_put(mixed_block(model, mix)), hidden, place=run.place)
    compare = lambda x, y: np.asarray(_cosines(model.norm, x, y))  # noqa: E731
    cosines = map_batches(compare, hidden, states()[-1])
    for b, part in enumerate(cosines):
        if not np.isfinite(part).all():
            many = len(mixes[at].weights)
            raise ValueError(
                f"with blocks {at} to {at + many - 1} as one the model's answer is NaN or infinity "
                f"in batch {b} of the calibration; calibrate in float32, or merge fewer at a time"
            )
    return float(np.mean(np.concatenate(cosines), dtype=np.float64))


@jax.jit
def _cosines(
    norm: RMSNorm | None,
    x: Float[Array, "batch time d_model"],
    y: Float[Array, "batch time d_model"],
) -> Float[Array, " batch"]:
    """Of whole windows, float32."""
    x, y = (rms_norm(norm, h.astype(jnp.float32)) for h in (x, y))
    dot = lambda a, b: jnp.sum(a * b, axis=(1, 2))  # noqa: E731
    return dot(x, y) / jnp.sqrt(dot(x, x) * dot(y, y))
