"""One step of gradient descent on a whole model, block by block.

    x ─▶ block ─▶ block ─▶ … ─▶ head and loss         forward, inputs of blocks kept
    dx ◀─ block ◀─ block ◀─ … ◀─┘                      each block again, and its gradients
    masters ◀─ AdamW                                   float32, all at once

The gradient is taken by one compiled program a block structure, called for every block, and not by
one program for the model: blocks need not be alike, and a model of thirty compiles as fast as one
of two. Recomputing a block is what rematerialisation would do inside one program.
"""

import functools
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxcomp.calibrate.losses import Targets, TopKLoss, distillation_loss
from jaxcomp.calibrate.trainable import ENDS, Masters, first_block, merged
from jaxcomp.core.struct import static_value
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import Block, Decoder, block_forward
from jaxcomp.models.head import Head, open_head
from jaxcomp.models.layers import embed_tokens


@static_value
class Descent:
    """How long and how fast.

    Attributes:
      epochs: passes over the training windows, each in an order of its own.
      steps: updates in all where that is fewer; None for all of the epochs.
      batch: windows an update.
      lr: AdamW's rate after warm-up; it falls along a cosine to `floor` of it.
      betas: AdamW's.
      weight_decay: decoupled, times the rate; vectors are left alone.
      decay_to_init: decay towards the first value instead of zero.
      warmup: share of the steps in which the rate grows.
      floor: the last rate as a share of `lr`.
      clip: largest norm of the gradient of all parameters together; None for no limit.
      dtype: of products, "float32" or "bfloat16"; masters, losses and updates are float32.
      remat: compute every block again on the way back; False keeps what it needs in memory, some
        forty values a token and channel a block.
      validation: windows at the end of the sample that are not trained on.
      every: steps between two looks at them, and between two saved states.
      seed: of the order of windows.
    """

    epochs: int = 1
    steps: int | None = None
    batch: int = 4
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    decay_to_init: bool = False
    warmup: float = 0.03
    floor: float = 0.05
    clip: float | None = 1.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = True
    validation: int = 4
    every: int = 50
    seed: int = 0

    def __post_init__(self):
        if self.dtype not in typing.get_args(Literal["float32", "bfloat16"]):
            raise ValueError(f"dtype={self.dtype!r} is neither float32 nor bfloat16")
        for name, least in (("epochs", 1), ("batch", 1), ("validation", 0), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} is below 1; None means all of the epochs")
        if not self.lr > 0 or (self.clip is not None and not self.clip > 0):
            raise ValueError(f"lr={self.lr} and clip={self.clip} are above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} are outside [0, 1)")
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1 and self.weight_decay >= 0):
            raise ValueError(
                f"warmup={self.warmup} in [0, 1), floor={self.floor} in [0, 1] or "
                f"weight_decay={self.weight_decay} at least 0 does not hold"
            )

    def order(self, windows: int) -> Int[np.ndarray, "steps batch"]:
        """Which windows each step takes; a last incomplete batch of an epoch is left out.

        Raises:
          ValueError: fewer windows than a batch.
        """
        if windows < self.batch:
            raise ValueError(
                f"{windows} windows to train on (validation={self.validation} are set aside) are "
                f"fewer than batch={self.batch}; draw more, or use a smaller batch"
            )
        generator = np.random.Generator(np.random.PCG64(self.seed))
        whole = windows - windows % self.batch
        rows = [generator.permutation(windows)[:whole] for _ in range(self.epochs)]
        return np.concatenate(rows).reshape(-1, self.batch)[: self.steps]


class Student(NamedTuple):
    """A model in training; see `calibrate.trainable`."""

    masters: Masters
    frozen: Decoder

    @property
    def first(self) -> int:
        """The first block that a gradient passes; what precedes it is computed once."""
        return first_block(self.masters)

    @property
    def learns_embedding(self) -> bool:
        """Whether the tokens' own vectors are trained."""
        return "embed.weight" in self.masters.get(ENDS, {})

    def block(self, i: int) -> tuple[Block, dict[str, Array]]:
        """The frozen part of a block, and its masters."""
        return self.frozen.blocks[i], self.masters.get(f"blocks.{i}", {})

    def end(self) -> tuple[Decoder | Head, dict[str, Array]]:
        """What makes the head: opened already where nothing of it is trained."""
        masters, ends = self.masters.get(ENDS, {}), self.frozen.replace(blocks=())
        return (ends, masters) if masters else (open_head(ends), {})


def loss_and_gradients(
    student: Student,
    end: tuple[Decoder | Head, dict[str, Array]],
    x: Array,
    targets: Targets,
    loss: TopKLoss,
    remat: bool,
) -> tuple[Float[Array, ""], Masters]:
    """The loss of a batch, and its gradient in every master.

    Args:
      end: `student.end()`; opened once for many batches where it is frozen.
      x: hidden states before block `student.first`, or the batch's tokens where the embedding is
        trained.
    """
    grads, pulls = {}, []
    tokens, ends_masters = x, end[1]
    if student.learns_embedding:
        x = _embed(*end, tokens)
    for i in range(student.first, len(student.frozen.blocks)):
        block, masters = student.block(i)
        through = i > student.first or student.learns_embedding
        x, pull = _forward(block, masters, x, through, remat)
        pulls.append(pull)
    value, d_end, dx = _head_gradients(*end, x, targets, loss=loss)
    for i, pull in reversed([*enumerate(pulls, student.first)]):
        grads[f"blocks.{i}"], dx = pull(dx)
    if student.learns_embedding:
        table = _embed_gradient(*end, tokens, dx)
        d_end = {**d_end, "embed.weight": d_end["embed.weight"] + table}
    if ends_masters:
        grads[ENDS] = d_end
    return value, {group: grads[group] for group in student.masters}


def loss_of(
    student: Student,
    end: tuple[Decoder | Head, dict[str, Array]],
    x: Array,
    targets: Targets,
    loss: TopKLoss,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss of a batch without gradients, and how many positions it is the mean of."""
    if student.learns_embedding:
        x = _embed(*end, x)
    for i in range(student.first, len(student.frozen.blocks)):
        x = _block(*student.block(i), x)
    return _head_loss(*end, x, targets, loss=loss)


def step_programs(student: Student, x: Any, targets: Any, loss: TopKLoss, fit: Descent, steps: int):
    """What a descent calls, for a dry run: functions, arguments, calls and static arguments.

    Args:
      student: with structs for arrays, as `x` and `targets`, a batch of each.
    """
    masters, frozen = student
    groups: dict[Any, list] = {}
    for i in range(student.first, len(frozen.blocks)):
        through = i > student.first or student.learns_embedding
        leaves, structure = jax.tree.flatten(student.block(i))
        shapes = tuple((a.shape, str(a.dtype)) for a in leaves)
        groups.setdefault((structure, shapes, through), []).append(i)
    found: list[tuple[Callable, tuple, int, dict]] = []
    for (_, _, through), places in groups.items():
        args, calls = (*student.block(places[0]), x), steps * len(places)
        if fit.remat:
            found.append((_block, args, calls, {}))
            found.append((_gradients, (*args, x), calls, {"through": through}))
        else:
            pull = jax.eval_shape(functools.partial(_saving, through=through), *args)[1]
            found.append((_saving, args, calls, {"through": through}))
            found.append((_recall, (pull, x), calls, {}))
    ends = frozen.replace(blocks=())
    end = (ends, masters[ENDS]) if ENDS in masters else (jax.eval_shape(open_head, ends), {})
    found.append((_head_gradients, (*end, x, targets), steps, {"loss": loss}))
    inner = jax.eval_shape(optimiser(fit, steps).init, masters)
    start = masters if fit.decay_to_init else None
    found.append((update, (masters, inner, masters, start), steps, {"fit": fit, "steps": steps}))
    return found


@functools.partial(jax.jit, static_argnames=("fit", "steps"), donate_argnums=(0, 1))
def update(
    masters: Masters, inner: Any, grads: Masters, start: Masters | None, *, fit: Descent, steps: int
) -> tuple[Masters, Any]:
    """One update; `masters` and the optimiser's state are donated.

    Args:
      start: the first masters, where decay is towards them; else None.
      steps: of the whole descent, for its schedule.
    """
    origin = masters if start is None else jax.tree.map(jnp.subtract, masters, start)
    change, inner = optimiser(fit, steps).update(grads, inner, origin)
    return optax.apply_updates(masters, change), inner


@functools.cache
def optimiser(fit: Descent, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up, a cosine and a limit on the gradient's norm."""
    rise = int(fit.warmup * steps)
    rate = optax.cosine_decay_schedule(fit.lr, max(steps - rise, 1), fit.floor)
    if rise:
        grow = optax.linear_schedule(fit.lr / (rise + 1), fit.lr, rise)
        rate = optax.join_schedules([grow, rate], [rise])
    matrices = lambda masters: jax.tree.map(lambda a: a.ndim > 1, masters)  # noqa: E731
    return optax.chain(
        optax.identity() if fit.clip is None else optax.clip_by_global_norm(fit.clip),
        optax.scale_by_adam(*fit.betas),
        optax.add_decayed_weights(fit.weight_decay, matrices),
        optax.scale_by_learning_rate(rate),
    )


def _forward(
    block: Block, masters: dict[str, Array], x: Array, through: bool, remat: bool
) -> tuple[Array, Callable]:
    """The block's output, and what gives the gradients of its masters and of `x` for one of it."""
    if remat:
        pull = functools.partial(_gradients, block, masters, x, through=through)
        return _block(block, masters, x), pull
    y, saved = _saving(block, masters, x, through=through)
    return y, functools.partial(_recall, saved)


def _apply(block: Block, masters: dict[str, Array], x: Array) -> Array:
    return block_forward(merged(block, masters), x, plain_context(*x.shape[:2]))


_block = jax.jit(_apply)


def _vjp(block: Block, masters: dict[str, Array], x: Array, through: bool) -> tuple[Array, Any]:
    """The block's output and its pull-back; without `through` nothing is passed on to `x`."""
    if through:
        return jax.vjp(lambda masters, x: _apply(block, masters, x), masters, x)
    return jax.vjp(lambda masters: _apply(block, masters, x), masters)


@functools.partial(jax.jit, static_argnames="through")
def _gradients(
    block: Block, masters: dict[str, Array], x: Array, dy: Array, *, through: bool
) -> tuple[dict[str, Array], Array | None]:
    return _both(_vjp(block, masters, x, through)[1](dy))


@functools.partial(jax.jit, static_argnames="through")
def _saving(block: Block, masters: dict[str, Array], x: Array, *, through: bool) -> tuple:
    return _vjp(block, masters, x, through)


@jax.jit
def _recall(pull: Callable, dy: Array) -> tuple[dict[str, Array], Array | None]:
    return _both(pull(dy))


def _both(found: tuple) -> tuple[dict[str, Array], Array | None]:
    return (*found, None)[:2]


def _head_of(ends: Decoder | Head, masters: dict[str, Array]) -> Head:
    return ends if isinstance(ends, Head) else open_head(merged(ends, masters))


@functools.partial(jax.jit, static_argnames="loss")
def _head_gradients(
    ends: Decoder | Head, masters: dict[str, Array], x: Array, targets: Targets, *, loss: TopKLoss
) -> tuple[Array, dict[str, Array], Array]:
    learns = bool({"embed.weight", "lm_head.w"} & masters.keys())

    def value(masters: dict[str, Array], x: Array) -> Array:
        return distillation_loss(loss, _head_of(ends, masters), x, targets, learns)[0]

    found, (d_masters, dx) = jax.value_and_grad(value, argnums=(0, 1))(masters, x)
    return found, d_masters, dx


@functools.partial(jax.jit, static_argnames="loss")
def _head_loss(
    ends: Decoder | Head, masters: dict[str, Array], x: Array, targets: Targets, *, loss: TopKLoss
) -> tuple[Array, Array]:
    return distillation_loss(loss, _head_of(ends, masters), x, targets)


def _look_up(ends: Decoder, masters: dict[str, Array], tokens: Array) -> Array:
    ends = merged(ends, masters)
    return embed_tokens(ends.embed, tokens, ends.config.compute_dtype)


_embed = jax.jit(_look_up)


@jax.jit
def _embed_gradient(ends: Decoder, masters: dict[str, Array], tokens: Array, dx: Array) -> Array:
    table = masters["embed.weight"]
    pull = jax.vjp(lambda w: _look_up(ends, {**masters, "embed.weight": w}, tokens), table)[1]
    return pull(dx)[0]
