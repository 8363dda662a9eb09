"""What the model's prediction loses without a block: every block is left out in turn.

Without block j the model shares everything up to X_j, its input. One walk over the blocks therefore
does for all: at block j a stream starts as a copy of X_j, and goes through the blocks behind it,

    streams = {}
    for j, block:      streams[i] ← block(streams[i]) for i < j,   streams[j] ← X_j,   X ← block(X)

which is half the work of running each model alone, reads each block once, and is exact. All streams
are kept: candidates × windows × d_model numbers.

Sources: Shortened LLaMA, arXiv 2402.02834 (the loss with one block left out, one shot); SLEB,
2402.09025 (the same again after every removal); FuseGPT, 2411.14507 (the cosine of final states).
"""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxcomp.calibrate.similarity import unit_distance
from jaxcomp.calibrate.stream import Calibration
from jaxcomp.models.decoder import Decoder, iter_blocks
from jaxcomp.models.head import Head, open_head, token_scores
from jaxcomp.models.stream import Hidden, embed_batches, map_batches, step_batches
from jaxcomp.parallel.mesh import Placement

Tick = Callable[[int], None]


def without_each(
    model: Decoder,
    calib: Calibration,
    candidates: Collection[int],
    place: Placement = Placement(),
    tick: Tick = lambda done: None,
) -> tuple[Hidden, dict[int, Hidden]]:
    """Final hidden states of the model, and of the model without each candidate.

    Args:
      tick: told the number of blocks passed.
    """
    hidden = embed_batches(model, calib.tokens, calib.batch)
    streams: dict[int, Hidden] = {}
    for j, block in enumerate(iter_blocks(model)):
        block = jax.device_put(block)
        streams = {i: step_batches(block, x, place=place) for i, x in streams.items()}
        if j in candidates:
            streams[j] = hidden
        hidden = step_batches(block, hidden, place=place)
        tick(j + 1)
    return hidden, streams


def losses_without(
    model: Decoder,
    calib: Calibration,
    candidates: Collection[int],
    place: Placement = Placement(),
    tick: Tick = lambda done: None,
) -> dict[int, float]:
    """Mean −log p of the next token, in nats, without each candidate.

    Raises:
      ValueError: one is not finite; names the block and the batch.
    """
    _, streams = without_each(model, calib, candidates, place, tick)
    head, targets = open_head(model), _batches(calib)
    return {
        j: mean_loss(head, x, targets, f"the loss without block {j}") for j, x in streams.items()
    }


def influences(
    model: Decoder,
    calib: Calibration,
    candidates: Collection[int],
    place: Placement = Placement(),
    tick: Tick = lambda done: None,
) -> dict[int, float]:
    """Macro Influence: mean over tokens of 1 − cos between final states with and without a block.

    Raises:
      ValueError: one is not finite; names the block and the batch.
    """
    hidden, streams = without_each(model, calib, candidates, place, tick)
    return {
        j: _mean(
            map_batches(lambda a, b: np.asarray(_distance(a, b)), hidden, x),
            f"the influence of block {j}",
        )
        for j, x in streams.items()
    }


def mean_loss(
    head: Head, hidden: Hidden, targets: list[Int[np.ndarray, "batch time"]], what: str
) -> float:
    """Mean −log p of the tokens that follow, in nats, from final hidden states.

    Args:
      targets: the tokens of each batch, the first of a window included.
    """
    nll = map_batches(lambda x, t: np.asarray(_nll(head, x, t)), hidden, targets)
    return _mean(nll, what)


@jax.jit
def _nll(head: Head, x: Float[jax.Array, "batch time d"], tokens: Int[jax.Array, "batch time"]):
    return token_scores(head, x[:, :-1], tokens[:, 1:]).nll


@jax.jit
def _distance(x: Float[jax.Array, "batch time d"], y: Float[jax.Array, "batch time d"]):
    return unit_distance(x.astype(jnp.float32), y.astype(jnp.float32))


def _batches(calib: Calibration) -> list[np.ndarray]:
    starts = range(0, len(calib.tokens), calib.batch)
    return [calib.tokens[i : i + calib.batch] for i in starts]


def _mean(parts: list[np.ndarray], what: str) -> float:
    for b, part in enumerate(parts):
        if not np.isfinite(part).all():
            raise ValueError(
                f"{what} is NaN or infinity in batch {b} of the calibration; the model overflows "
                "in its dtype, or its weights are damaged"
            )
    return float(sum(np.sum(p, dtype=np.float64) for p in parts) / sum(p.size for p in parts))
