"""Scores of blocks from which a search of masks starts; high is kept.

    kl      D_l = E KL(model ‖ model without block l), over the whole vocabulary
    bi      D_l = block influence (`calibrate.similarity`)
    sleb    D_l = the round in which greedy removal takes block l; blocks never taken share the last
    zeros, random                                      know nothing

    s = spread · (log(D + ε) − mean) / std             over blocks that may go; of sleb, D itself

Source: Yuan et al., E³-Pruner, arXiv 2511.17205, starts from a divergence; the logarithm, ε and the
scaling are reconstructions, and the others are for comparison.
"""

import functools
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from jaxcomp.calibrate.removal import Tick, losses_without, without_each
from jaxcomp.calibrate.similarity import similarity
from jaxcomp.calibrate.stream import Calibration
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.depth import drop
from jaxcomp.models.head import next_token_gap, open_head
from jaxcomp.models.stream import map_batches

Init = Literal["kl", "bi", "sleb", "zeros", "random"]
EPSILON = 1e-6  # nats, or 1 − cos: what is below is nothing


def start_scores(
    init: Init,
    model: Decoder,
    calib: Calibration,
    allowed: tuple[int, ...],
    remove: int,
    spread: float,
    seed: int,
    tick: Tick = lambda done: None,
) -> Float[np.ndarray, " allowed"]:
    """One score for each block in `allowed`, float32.

    Args:
      remove: rounds of "sleb".
      spread: standard deviation of the scores; the noise of a search has π/√6.
      seed: of "random".
      tick: told the number of blocks passed, `passes` in all.

    Raises:
      ValueError: a score is not finite; names the block.
    """
    if init == "zeros":
        return np.zeros(len(allowed), np.float32)
    if init == "random":
        return spread * np.random.default_rng(seed).standard_normal(len(allowed), np.float32)
    if init == "kl":
        measured = np.log(_divergences(model, calib, allowed, tick) + EPSILON)
    elif init == "bi":
        found = similarity(model, calib, 1, tick=tick).influence
        measured = np.log(found[list(allowed)] + EPSILON)
    else:
        measured = _rounds(model, calib, allowed, remove, tick)
    for i, score in zip(allowed, measured, strict=True):
        if not np.isfinite(score):
            raise ValueError(
                f"the {init} score of block {i} is {score}; calibrate on other text, or in float32"
            )
    scale = np.std(measured)
    return np.float32(spread * (measured - np.mean(measured)) / (scale if scale > 0 else 1.0))


def passes(init: Init, n_blocks: int, remove: int) -> int:
    """How many blocks a start passes; 0 where it measures nothing."""
    if init == "sleb":
        return sum(n_blocks - r for r in range(remove))
    return n_blocks if init in ("kl", "bi") else 0


def _divergences(
    model: Decoder, calib: Calibration, allowed: tuple[int, ...], tick: Tick
) -> Float[np.ndarray, " allowed"]:
    """Mean over tokens of KL(model ‖ model without the block), in nats."""
    hidden, streams = without_each(model, calib, allowed, tick=tick)
    head, starts = open_head(model), range(0, len(calib.tokens), calib.batch)
    tokens = [calib.tokens[i : i + calib.batch] for i in starts]

    def gap(x: np.ndarray, y: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(jax.device_get(next_token_gap(head, head, x, y, tokens).kl))

    mean = lambda parts: np.concatenate(parts).mean(dtype=np.float64)  # noqa: E731
    return np.array([mean(map_batches(gap, hidden, streams[i], tokens)) for i in allowed])


def _rounds(
    model: Decoder, calib: Calibration, allowed: tuple[int, ...], remove: int, tick: Tick
) -> Float[np.ndarray, " allowed"]:
    """In which round each block goes when the one that is missed least goes first."""
    n, gone, done = len(model.blocks), [], 0
    for _ in range(remove):
        rest = [i for i in range(n) if i not in gone]
        places = [rest.index(i) for i in allowed if i not in gone]
        told = functools.partial(lambda before, passed: tick(before + passed), done)
        losses = losses_without(drop(model, gone), calib, places, tick=told)
        gone.append(rest[min(losses, key=lambda place: (losses[place], place))])
        done += len(rest)
    return np.array([gone.index(i) if i in gone else remove for i in allowed], float)
