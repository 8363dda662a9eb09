"""Which blocks may go: a descent on one score a block, through masks drawn by the scores.

    s ─▶ mask m, exactly K ones (`solvers.subset`) ─▶ x + m_l (block_l(x) − x) in every block
      ─▶ KL to the teacher's top words ─▶ ∂/∂m ─▶ ∂/∂s by the soft mask ─▶ Adam, s − mean(s)

Weights are frozen. A block behind a mask of 0 is computed like any other, because its gradient is
what brings it back: a step costs a forward pass of the whole model, the same again to recompute,
and the way back through activations. Masks are data; nothing is compiled twice.

While the search goes on, the number of zeros grows to what is wanted, the soft mask gets colder and
the noise fades. Every so often the choice without noise is measured on windows set aside, and the
best of these is what is found, the choice that the search began with among them.

Source: Yuan et al., E³-Pruner, arXiv 2511.17205. Reconstructed, since neither code nor formulas
were at hand: frozen weights, the soft masks, all schedules, the optimiser, and the choice of the
best by windows set aside.
"""

import dataclasses
import functools
import logging
import pathlib
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxcomp.calibrate.descent import Descent, Student, loss_and_gradients, loss_of
from jaxcomp.calibrate.distillation import Lesson
from jaxcomp.calibrate.losses import TopKLoss
from jaxcomp.calibrate.mask_record import RECENT, Mask, found, lowest, resume, save
from jaxcomp.calibrate.start_scores import Init
from jaxcomp.calibrate.stream import Run
from jaxcomp.calibrate.trainable import cast_frozen
from jaxcomp.core.metrics import Row
from jaxcomp.core.struct import static_value
from jaxcomp.models.decoder import Decoder, load_block
from jaxcomp.models.stream import embed_batches, run_blocks
from jaxcomp.solvers import subset
from jaxcomp.solvers.subset import Surrogate

log = logging.getLogger(__name__)

Shape = Literal["linear", "cubic"]


@static_value
class MaskSearch:
    """How a search goes. Shares of the steps are in [0, 1].

    Attributes:
      steps: updates of the scores.
      batch: windows an update.
      lr: Adam's rate; it falls along a cosine to 0 while the noise fades.
      init: where the scores start: "kl", "bi", "sleb", "zeros" or "random".
      init_windows: windows that the start is measured on.
      spread: standard deviation of the scores at the start.
      surrogate: the soft mask of the gradient: "sigmoid", "subset" or "softmax".
      tau: its first and last temperature.
      noise_until: share of the steps with the whole noise, which then fades.
      ramp: share of the steps in which the number of zeros grows from 1; 0 begins with all.
      curriculum: how it grows: "linear", or "cubic", early.
      windows: search on the first so many windows of the text; None for all.
      validation: of these, windows at the end that are set aside.
      every: steps between two looks at them, and between two saved states.
      dtype: of products.
      remat: compute blocks again on the way back instead of keeping what they need.
      seed: of the noise, the order of windows and a random start.
    """

    steps: int = 500
    batch: int = 4
    lr: float = 1e-2
    init: Init = "kl"
    init_windows: int = 32
    spread: float = 1.0
    surrogate: Surrogate = "sigmoid"
    tau: tuple[float, float] = (1.0, 0.1)
    noise_until: float = 0.6
    ramp: float = 0.6
    curriculum: Shape = "linear"
    windows: int | None = None
    validation: int = 4
    every: int = 20
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = True
    seed: int = 0

    def __post_init__(self):
        named = (("init", Init), ("surrogate", Surrogate), ("curriculum", Shape))
        for name, kind in (*named, ("dtype", Literal["float32", "bfloat16"])):
            if getattr(self, name) not in typing.get_args(kind):
                known = ", ".join(typing.get_args(kind))
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")
        for name in ("steps", "batch", "init_windows", "validation", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if not (len(self.tau) == 2 and self.tau[0] >= self.tau[1] > 0):
            raise ValueError(
                f"tau={self.tau}; give a first and a last temperature above 0, the last no higher"
            )
        if not (self.lr > 0 and self.spread >= 0):
            raise ValueError(f"lr={self.lr} above 0 or spread={self.spread} from 0 does not hold")
        for name in ("noise_until", "ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside 0 to 1")
        if self.ramp == 1:
            raise ValueError("ramp=1 ends before all wanted blocks are removed; use less")

    @property
    def needed_windows(self) -> int:
        """The fewest windows that a search takes."""
        return self.batch + self.validation

    def order(self, windows: int) -> Int[np.ndarray, "steps batch"]:
        """Which windows each step takes."""
        epochs = -(-self.steps * self.batch // max(windows - windows % self.batch, 1))
        fit = Descent(epochs=epochs, steps=self.steps, batch=self.batch, seed=self.seed)
        return fit.order(windows)


def search_mask(
    name: str,
    model: Decoder,
    lesson: Lesson,
    scores: Float[np.ndarray, " free"],
    free: tuple[int, ...],
    remove: int,
    how: MaskSearch,
    loss: TopKLoss,
    work: pathlib.Path,
    run: Run = Run(),
) -> Mask:
    """Searches which `remove` of the blocks `free` may go.

    Args:
      name: of the step, in messages and for progress.
      model: its blocks may be behind handles; they are loaded and stay in memory.
      lesson: windows and the teacher's words on them.
      scores: where it starts, one a block in `free`; high is kept.
      work: a directory for what a killed search continues from.

    Raises:
      ValueError: as many scores as blocks are not there, or one is not finite; no choice is left;
        a loss is not finite, with the step, the blocks masked and the temperature.
    """
    check_search(remove, free, scores)
    student = masked_student(model, free, how.dtype)
    inputs = _inputs(model, student, lesson, how)
    windows = len(lesson.tokens)
    held_out = np.arange(windows - how.validation, windows)
    order = how.order(windows - how.validation)
    end, key = student.end(), jax.random.key(how.seed)
    fresh = jnp.asarray(scores, jnp.float32)
    fresh = fresh - jnp.mean(fresh)
    state = resume(work, fresh, _optimiser(how).init(fresh))

    def look() -> None:
        """Measures the choice without noise, if it is a new one."""
        zeros = sorted(free[i] for i in lowest(state.scores, remove))
        known = {tuple(removed): value for removed, value in state.seen}
        if tuple(zeros) not in known:
            mask = np.isin(free, zeros, invert=True).astype(np.float32)
            masked = _masked(student, free, mask)
            value = _held_out(masked, end, inputs, held_out, lesson, loss, how)
            _check_loss(name, value, state.done, zeros, how)
            known[tuple(zeros)] = value
            state.seen.append([zeros, value])
        state.looks.append([state.done, known[tuple(zeros)]])

    def tell() -> None:
        if run.progress:
            newest = {"loss": state.losses[-1]} if state.losses else {}
            run.progress(name, state.done, how.steps, [Row(name, None, None, newest)])

    if not state.looks:
        look()
    tell()
    for windows in order[state.done :]:
        at = _schedule(how, state.done, remove, len(free))
        here = jax.random.fold_in(key, state.done)
        settings = dict(surrogate=how.surrogate, most=remove)
        mask = np.asarray(subset.draw(state.scores, here, *at, **settings))
        zeros = np.flatnonzero(mask == 0).tolist()
        masked, targets = _masked(student, free, mask), lesson.targets(windows)
        value, slopes = loss_and_gradients(masked, end, inputs[windows], targets, loss, how.remat)
        _check_loss(name, float(value), state.done, [free[i] for i in zeros], how)
        slope = jnp.stack([slopes[f"blocks.{i}"]["gate"] for i in free])
        still = sorted(lowest(state.scores, len(zeros)))
        moved = state.moved + (zeros != still)
        new, inner = _update(state.scores, state.inner, here, *at, slope, how=how, most=remove)
        state.losses.append(float(value))
        recent = [*state.recent, zeros][-RECENT:]
        state = state._replace(
            scores=new, inner=inner, done=state.done + 1, recent=recent, moved=moved
        )
        if state.done % how.every == 0 or state.done == how.steps:
            look()
            save(work, state)
            log.info(
                "%s step %d/%d: %d removed, loss %.4f, without noise and set aside %.4f",
                *(name, state.done, how.steps, len(zeros), state.losses[-1], state.looks[-1][1]),
            )
        tell()
    ones = (_schedule(how, step, remove, len(free))[0] for step in range(how.steps))
    return found(state, free, remove, [len(free) - count for count in ones])


def check_search(
    remove: int, free: tuple[int, ...], scores: Float[np.ndarray, " n"] | None = None
) -> None:
    """Refuses a search that has nothing to choose, or scores that do not fit.

    Raises:
      ValueError: says which.
    """
    if not 1 <= remove < len(free):
        raise ValueError(
            f"remove={remove}, and {len(free)} blocks may go: a search needs from 1 to "
            f"{len(free) - 1}; protect fewer, or name the blocks without a search"
        )
    if scores is None:
        return
    if len(scores) != len(free):
        raise ValueError(f"{len(scores)} scores for the {len(free)} blocks that may go")
    if not np.isfinite(scores).all():
        at = int(np.argmin(np.isfinite(scores)))
        raise ValueError(f"the first score of block {free[at]} is {scores[at]}; scores are finite")


def masked_student(model: Decoder, free: tuple[int, ...], dtype: str) -> Student:
    """The model with the gates of `free` as what is trained, all 1, and the rest frozen."""
    config = dataclasses.replace(model.config, compute_dtype=dtype)
    blocks = (cast_frozen(jax.device_put(load_block(block)), dtype) for block in model.blocks)
    frozen = model.replace(blocks=tuple(blocks), config=config)
    return _masked(Student({}, frozen), free, np.ones(len(free), np.float32))


def _masked(student: Student, free: tuple[int, ...], mask: Float[np.ndarray, " free"]) -> Student:
    gates = {f"blocks.{i}": {"gate": np.asarray(m)} for i, m in zip(free, mask, strict=True)}
    return student._replace(masters=gates)


def _inputs(
    model: Decoder, student: Student, lesson: Lesson, how: MaskSearch
) -> Float[np.ndarray, "windows time d_model"]:
    """Hidden states of all windows before the first block with a mask."""
    before = model.replace(config=student.frozen.config, blocks=model.blocks[: student.first])
    return np.concatenate(run_blocks(before, embed_batches(before, lesson.tokens, how.batch)))


def _schedule(how: MaskSearch, step: int, remove: int, n: int) -> tuple[int, float, float]:
    """How many ones, the temperature, and the size of the noise."""
    zeros = subset.zeros_of(step, how.steps, remove, how.ramp, how.curriculum)
    noise = subset.noise(step, how.steps, how.noise_until)
    return n - zeros, subset.temperature(step, how.steps, *how.tau), noise


@functools.cache
def _optimiser(how: MaskSearch) -> optax.GradientTransformation:
    flat = int(how.noise_until * how.steps)
    fall = optax.cosine_decay_schedule(how.lr, max(how.steps - flat, 1))
    rate = optax.join_schedules([optax.constant_schedule(how.lr), fall], [flat])
    return optax.adam(rate)


@functools.partial(jax.jit, static_argnames=("how", "most"))
def _update(
    scores: Float[Array, " free"],
    inner: Any,
    key: Array,
    keep: Int[Array, ""],
    tau: Float[Array, ""],
    gamma: Float[Array, ""],
    slope: Float[Array, " free"],
    *,
    how: MaskSearch,
    most: int,
) -> tuple[Float[Array, " free"], Any]:
    """The scores after a step whose mask has the gradient `slope`."""

    def drawn(scores: Array) -> Array:
        return subset.draw(scores, key, keep, tau, gamma, surrogate=how.surrogate, most=most)

    (gradient,) = jax.vjp(drawn, scores)[1](slope)
    change, inner = _optimiser(how).update(gradient, inner)
    scores = optax.apply_updates(scores, change)
    return scores - jnp.mean(scores), inner


def _held_out(
    student: Student,
    end: Any,
    inputs: np.ndarray,
    windows: np.ndarray,
    lesson: Lesson,
    loss: TopKLoss,
    how: MaskSearch,
) -> float:
    """The loss of a masked model on windows set aside."""
    total, n = 0.0, 0.0
    for i in range(0, len(windows), how.batch):
        here = windows[i : i + how.batch]
        value, count = loss_of(student, end, inputs[here], lesson.targets(here), loss)
        total, n = total + float(value) * float(count), n + float(count)
    return total / max(n, 1.0)


def _check_loss(name: str, value: float, step: int, removed: list[int], how: MaskSearch) -> None:
    if not np.isfinite(value):
        tau = subset.temperature(step, how.steps, *how.tau)
        raise ValueError(
            f"{name}, step {step} of {how.steps}: the loss is {value} without blocks "
            f"{', '.join(map(str, removed))}, at temperature {tau:.3g}; compute in "
            "dtype='float32', or look at the text"
        )
