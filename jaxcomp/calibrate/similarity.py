"""How little a block, or a run of blocks, changes the residual stream: many measures, one pass.

With X_l the input of block l, and X_L what the last block gives, before the final norm:
    block influence      BI_l   = E 1 − cos(X_l, X_l+1)                over tokens
    relative change      RC_l   = E ‖X_l+1 − X_l‖ / ‖X_l‖              over tokens
    cosine of a span     BC_s   = E 1 − cos(X_s, X_s+n)                over tokens
    angle of a span      A_s    = E arccos cos(X_s, X_s+n) / π         over last tokens
    the same by channel  CC_s   = E 1 − cos of X_s and X_s+n along time, over windows and channels
Low is similar. A cosine is formed from unit vectors, 1 − cos = ‖x̂ − ŷ‖²/2, so that equal states
give 0 and not the rounding error of a quotient.

A mean over tokens hardly sees one of them: a block that creates the massive activation of the first
token looks harmless and is not, which `peaks` and `outlier_blocks` are for.

Sources: ShortGPT, arXiv 2403.03853 (BI); LLM-Streamline, 2403.19135 (BC); Gromov et al., 2403.17887
(A); the code of LinearPatch, 2505.24680, takes its cosine along time (CC). Departure: the last
candidate of the authors' code compares with a state behind the final norm; ours is before it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.calibrate.stream import Calibration
from jaxcomp.models.decoder import Decoder, iter_blocks
from jaxcomp.models.stream import Hidden, embed_batches, map_batches, step_batches
from jaxcomp.parallel.mesh import Placement

JUMP = 20.0  # factor of the largest activation over a block that makes it an outlier's creator


class Similarity(NamedTuple):
    """What a dense pass says; float64.

    Attributes:
      influence, change: of each block.
      cosine, angle, channel_cosine: of the span of n blocks from each start.
    """

    influence: Float[np.ndarray, " blocks"]
    change: Float[np.ndarray, " blocks"]
    cosine: Float[np.ndarray, " starts"]
    angle: Float[np.ndarray, " starts"]
    channel_cosine: Float[np.ndarray, " starts"]


class _Pair(NamedTuple):
    """Of two states of a batch: a number for each token, window, or window and channel."""

    cosine: Float[Array, "batch time"]
    change: Float[Array, "batch time"]
    angle: Float[Array, " batch"]
    channel_cosine: Float[Array, "batch channels"]


def similarity(
    model: Decoder,
    calib: Calibration,
    span: int,
    place: Placement = Placement(),
    tick: Callable[[int], None] = lambda done: None,
) -> Similarity:
    """All measures of `model`, whose blocks may be handles; keeps `span` + 1 states of all windows.

    Args:
      span: blocks in a span, 1 or more.
      tick: told the number of blocks passed.

    Raises:
      ValueError: a state is NaN or infinity, or zero for a token; names the block and the batch.
    """
    states = [embed_batches(model, calib.tokens, calib.batch)]
    _checked(states[0], "the embedding")
    single: list[_Pair] = []
    spans: list[_Pair] = []
    for i, block in enumerate(iter_blocks(model)):
        states.append(step_batches(jax.device_put(block), states[-1], place=place))
        _checked(states[-1], f"the output of block {i}")
        single.append(_pairs(states[-2], states[-1]))
        if len(states) > span:
            spans.append(single[-1] if span == 1 else _pairs(states[0], states[-1]))
            states.pop(0)
        tick(i + 1)
    mean = lambda pairs, name: np.array([getattr(p, name) for p in pairs])  # noqa: E731
    return Similarity(
        mean(single, "cosine"),
        mean(single, "change"),
        mean(spans, "cosine"),
        mean(spans, "angle"),
        mean(spans, "channel_cosine"),
    )


def peaks(model: Decoder, calib: Calibration) -> Float[np.ndarray, " states"]:
    """Largest |X_l| over the first batch of windows, float64; see `similarity`."""
    hidden = embed_batches(model, calib.tokens[: calib.batch], calib.batch)
    amax = [_checked(hidden, "the embedding")]
    for i, block in enumerate(iter_blocks(model)):
        hidden = step_batches(jax.device_put(block), hidden)
        amax.append(_checked(hidden, f"the output of block {i}"))
    return np.array(amax)


def outlier_blocks(amax: Float[np.ndarray, " states"]) -> tuple[int, ...]:
    """Blocks over which the largest activation grows or falls by `JUMP` or more.

    The first block is not among them where it grows: embeddings are small.
    """
    ratio = amax[1:] / np.maximum(amax[:-1], 1e-30)
    made = [i for i, r in enumerate(ratio) if (r >= JUMP and i > 0) or r <= 1 / JUMP]
    return tuple(made)


def unit_distance(x: Array, y: Array) -> Float[Array, "*tokens"]:
    """1 − cos over the last axis, float32; what is equal gives 0, to the square of rounding."""
    return 0.5 * jnp.sum((_unit(x) - _unit(y)) ** 2, axis=-1)


@jax.jit
def _measure(x: Float[Array, "batch time d"], y: Float[Array, "batch time d"]) -> _Pair:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norm = lambda a: jnp.linalg.norm(a, axis=-1)  # noqa: E731
    a, b = _unit(x[:, -1]), _unit(y[:, -1])
    angle = 2 * jnp.arctan2(norm(a - b), norm(a + b)) / jnp.pi
    along_time = unit_distance(x.swapaxes(1, 2), y.swapaxes(1, 2))
    return _Pair(unit_distance(x, y), norm(y - x) / norm(x), angle, along_time)


def _pairs(x: Hidden, y: Hidden) -> _Pair:
    """The means over all batches, summed in float64: batches of any size give the same."""
    parts = map_batches(lambda a, b: jax.device_get(_measure(a, b)), x, y)
    return _Pair(*(np.mean(np.concatenate(part), dtype=np.float64) for part in zip(*parts)))  # noqa: B905


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def _checked(hidden: Hidden, what: str) -> float:
    """Largest magnitude of a state.

    Raises:
      ValueError: a value is not finite, or a token has no direction.
    """
    most = 0.0
    for b, x in enumerate(hidden):
        size = np.abs(np.asarray(x, np.float32)).max(axis=-1)
        if not np.isfinite(size).all():
            raise ValueError(
                f"{what}, batch {b} of the calibration: NaN or infinity; the checkpoint is damaged "
                "or overflowed in its dtype"
            )
        if not size.all():
            raise ValueError(
                f"{what}, batch {b} of the calibration: {int((size == 0).sum())} tokens are all "
                "zeros and have no direction; calibrate on text without such tokens"
            )
        most = max(most, float(size.max()))
    return most
