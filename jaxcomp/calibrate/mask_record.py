"""What a search of masks keeps while it goes on, what it ends with, and what is said of it."""

import itertools
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.calibrate.stream import write_whole
from jaxcomp.solvers import subset

log = logging.getLogger(__name__)

FILE = "search.json"
RECENT = 100  # masks whose overlap says whether the search has settled
APART = 0.5  # an overlap below this at the end is no decision


class Mask(NamedTuple):
    """What was found.

    Attributes:
      removed: places of the blocks that go.
      scores: of each block that may go, at the end of the search.
      margin: between the last that stays and the first that goes, in units of the scores.
      metrics: what the report says of the search.
      warnings: what its user should know.
    """

    removed: tuple[int, ...]
    scores: tuple[float, ...]
    margin: float
    metrics: dict[str, Any]
    warnings: tuple[str, ...]


class State(NamedTuple):
    """Everything that a killed search continues from.

    Attributes:
      scores: of each free block, of mean 0.
      inner: Adam's.
      done: steps.
      losses: of every step.
      recent: zeros of the last masks, as places among the free.
      moved: steps in which noise changed the choice.
      seen: choices without noise that were met, in order: blocks removed, and the loss on the
        windows set aside.
      looks: steps, and the loss of the choice without noise then.
    """

    scores: Float[Array, " free"]
    inner: Any
    done: int
    losses: list[float]
    recent: list[list[int]]
    moved: int
    seen: list[list[Any]]
    looks: list[list[float]]


def resume(work: pathlib.Path, scores: Float[Array, " free"], inner: Any) -> State:
    """The state to continue from; a fresh one where nothing is kept in `work`."""
    place = work / FILE
    if not place.exists():
        return State(scores, inner, 0, [], [], 0, [], [])
    *leaves, rest = json.loads(place.read_text())
    tree = (scores, inner)
    stored = [
        jnp.asarray(value, like.dtype)
        for value, like in zip(leaves, jax.tree.leaves(tree), strict=True)
    ]
    scores, inner = jax.tree.unflatten(jax.tree.structure(tree), stored)
    return State(**rest | {"scores": scores, "inner": inner})


def save(work: pathlib.Path, state: State) -> None:
    """Writes the state as JSON, in which float32 is exact; whole or not at all."""
    leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves((state.scores, state.inner))]
    data = json.dumps([*leaves, state._asdict() | {"scores": None, "inner": None}]).encode()
    write_whole(work / FILE, lambda file: file.write(data))


def lowest(scores: Array, count: int) -> list[int]:
    """Places of the `count` lowest scores: the zeros of the mask without noise."""
    mask = subset.hard_mask(jnp.asarray(scores), len(scores) - count)
    return np.flatnonzero(np.asarray(mask) == 0).tolist()


def found(state: State, free: tuple[int, ...], remove: int, zeros: list[int]) -> Mask:
    """The best choice that was measured, and what is to be said of the search.

    Args:
      zeros: how many blocks the mask of each step removed.
    """
    removed, best = min(state.seen, key=lambda pair: pair[1])
    ranked = np.sort(np.asarray(state.scores))
    margin = float(ranked[remove] - ranked[remove - 1])
    last = sorted(free[i] for i in lowest(state.scores, remove))
    late = [zeros for zeros in state.recent if len(zeros) == remove]
    together = overlap(late)
    metrics: dict[str, Any] = {
        "steps": state.done,
        "held_out_start": state.looks[0][1],
        "held_out_last": state.looks[-1][1],
        "held_out_best": best,
        "choices_measured": len(state.seen),
        "start_choice": ", ".join(map(str, state.seen[0][0])),
        "last_choice": ", ".join(map(str, last)),
        "score_margin": margin,
        "overlap": together,
        "held_out_steps": [float(step) for step, _ in state.looks],
        "held_out_curve": [value for _, value in state.looks],
        "loss_curve": [float(f"{value:.6g}") for value in state.losses],
        "removed_curve": [float(count) for count in zeros],
    }
    warnings = []
    if not state.moved:
        warnings.append(
            f"the noise never changed a choice: the scores are too far apart (margin {margin:.3g} "
            "at the end); use a smaller spread"
        )
    if together < APART:
        warnings.append(
            f"the last {len(late)} masks share {100 * together:.0f} % of their zeros on "
            "average: the search has not settled; give it more steps"
        )
    if last != removed:
        warnings.append(
            f"the search ended at {', '.join(map(str, last))}, and blocks "
            f"{', '.join(map(str, removed))}, met on the way, lose less on the windows set aside"
        )
    for warning in warnings:
        log.warning(warning)
    return Mask(tuple(removed), tuple(map(float, state.scores)), margin, metrics, tuple(warnings))


def overlap(masks: list[list[int]]) -> float:
    """Mean over pairs of sets of the share that both hold, of the smaller one; 1 for one set."""
    pairs = [
        len(set(a) & set(b)) / min(len(a), len(b)) for a, b in itertools.combinations(masks, 2)
    ]
    return float(np.mean(pairs)) if pairs else 1.0
