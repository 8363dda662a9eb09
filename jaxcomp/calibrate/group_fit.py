"""A group of neighbouring blocks learns to do without one of them.

    x, y = group_states(model, calib, group)           what enters it and leaves it
    fit_group(spec, survivors, donor, x, y, seed)      all that is left of it at once, towards y

The gradient is taken by one compiled program a block structure, called for every block of the
group, each block computed again on the way back:

    x ─▶ block ─▶ block ─▶ … ─▶ loss         inputs of blocks kept
    dx ◀─ block ◀─ block ◀─ … ◀─┘
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxcomp.calibrate.fusion import (
    RATES,
    Dtype,
    Fusion,
    Seed,
    Terms,
    attach,
    folded_block,
    fused_block,
)
from jaxcomp.calibrate.stream import Calibration, check_finite
from jaxcomp.core.linear import Linear
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import Block, Decoder, block_forward, load_block
from jaxcomp.models.stream import Hidden, embed_batches, step_batches
from jaxcomp.parallel.mesh import Placement, as_batch, as_replicated
from jaxcomp.solvers.fusion import GroupLoss, group_loss, mse

ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


class Fitted(NamedTuple):
    """What a fit found.

    Attributes:
      blocks: folded, in their stored dtypes.
      losses: of every step, before its update.
      before, after: relative squared error of the group's output on all windows; see
        `solvers.fusion.mse`.
    """

    blocks: tuple[Block, ...]
    losses: list[float]
    before: float
    after: float


def group_states(
    model: Decoder, calib: Calibration, group: tuple[int, ...], dtype: Dtype, place: Placement
) -> tuple[Float[np.ndarray, "n time d_model"], Float[np.ndarray, "n time d_model"]]:
    """What enters the group, in the model's dtype, and what leaves it, computed in `dtype`.

    Raises:
      ValueError: either is not finite.
    """
    hidden = states_before(model, calib, group[0], place)
    found = [np.asarray(x, jnp.dtype(dtype)) for x in hidden]
    for i in group:
        found = step_batches(jax.device_put(load_block(model.blocks[i])), found, place=place)
    x, y = np.concatenate(hidden), np.concatenate(found)
    check_finite({"before": x, "after": y}, f"the states of blocks {group[0]} to {group[-1]}")
    return x, y


def states_before(model: Decoder, calib: Calibration, block: int, place: Placement) -> Hidden:
    """The hidden states that enter a block, or leave the last."""
    hidden = embed_batches(model, calib.tokens, calib.batch)
    for i in range(block):
        hidden = step_batches(jax.device_put(load_block(model.blocks[i])), hidden, place=place)
    return hidden


def fit_group(
    spec: Fusion,
    group: tuple[Block, ...],
    donor: Block,
    x: Float[np.ndarray, "n time d_model"],
    y: Float[np.ndarray, "n time d_model"],
    seed: Seed,
    place: Placement = Placement(),
    tick: Callable[[int], None] = lambda done: None,
) -> Fitted:
    """Fits the additions to all blocks of a group, so that it maps `x` to `y`, and folds them.

    Args:
      group: the blocks that stay, in order, without the donor.
      seed: of first factors, and of the order of windows, which nothing else has a part in.
      tick: told the number of steps done.

    Raises:
      ValueError: a loss is NaN or infinite; names the epoch and the step.
    """
    steps, rates = spec.steps(len(x)), spec.rates.items()
    terms = tuple(attach(spec, block, (*seed, i)) for i, block in enumerate(group))
    state = place.replicate((terms, ADAM.init(terms)))
    fixed = place.replicate((group, donor))
    before = _error(spec, fixed, state[0], x, y, place)
    losses: list[float] = []
    for i, rows in enumerate(batches(spec, len(x), seed)):
        batch = place.put(x[rows]), place.put(y[rows])
        value, grads = loss_and_gradients(spec, *fixed, state[0], *batch)
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            epoch, step = divmod(i, steps // spec.epochs)
            raise ValueError(
                f"epoch {epoch + 1}, step {step + 1}: the loss is {losses[-1]}; nothing of this "
                f"round is folded. Lower {', '.join(f'{RATES[n]}={r:g}' for n, r in rates)}"
            )
        state = update(*state, grads, place.replicate(rates_at(spec, i, steps)))
        tick(i + 1)
    after = _error(spec, fixed, state[0], x, y, place)
    terms = place.local(state[0])
    blocks = tuple(_folded(b, donor, t) for b, t in zip(group, terms, strict=True))
    check_finite(blocks, "the fused weights of the group, block")
    return Fitted(blocks, losses, before, after)


def batches(spec: Fusion, windows: int, seed: Seed) -> Int[np.ndarray, "steps batch"]:
    """Which windows each step takes: every epoch in an order of its own."""
    generator = np.random.default_rng(seed)
    whole = windows - windows % spec.batch
    rows = [generator.permutation(windows)[:whole] for _ in range(spec.epochs)]
    return np.concatenate(rows).reshape(-1, spec.batch)


def rates_at(spec: Fusion, step: int, steps: int) -> dict[str, Float[np.ndarray, ""]]:
    """The learning rate of each group of parameters, along a cosine to 0."""
    left = 0.5 * (1 + np.cos(np.pi * step / steps))
    return {name: np.asarray(rate * left, np.float32) for name, rate in spec.rates.items()}


def loss_and_gradients(
    spec: Fusion,
    group: tuple[Block, ...],
    donor: Block,
    terms: tuple[Terms, ...],
    x: Float[Array, "batch time d_model"],
    y: Float[Array, "batch time d_model"],
) -> tuple[Float[Array, ""], tuple[Terms, ...]]:
    """The loss of a batch, and its gradient in every addition."""
    inputs = []
    x = _cast(x, dtype=spec.dtype)
    for block, t in zip(group, terms, strict=True):
        inputs.append(x)
        x = forward_fused(block, donor, t, x)
    value, dx = _loss_gradient(x, y, kind=spec.loss, token_limit=spec.token_limit)
    grads = []
    for block, t, x in reversed([*zip(group, terms, inputs, strict=True)]):
        d_terms, dx = backward_fused(block, donor, t, x, dx)
        grads.append(d_terms)
    return value, tuple(reversed(grads))


def fit_programs(spec: Fusion, block: Block, survivors: int, x: Any, steps: int) -> list[tuple]:
    """What a fit calls, for a dry run: functions, arguments, calls and static arguments.

    Args:
      block: its structure; it stands for the donor too.
      x: a batch of hidden states as a struct, in the model's dtype.
    """
    terms = jax.eval_shape(lambda block: attach(spec, block, (0,)), block)
    h = jax.ShapeDtypeStruct(x.shape, jnp.dtype(spec.dtype))
    all_terms = (terms,) * survivors
    state = jax.eval_shape(ADAM.init, all_terms)
    rates = jax.eval_shape(functools.partial(rates_at, spec, 0, steps))
    loss = dict(kind=spec.loss, token_limit=spec.token_limit)
    walks = survivors * steps
    return [
        (forward_fused, (block, block, terms, h), walks, {}),
        (_loss_gradient, (h, h), steps, loss),
        (backward_fused, (block, block, terms, h, h), walks, {}),
        (update, (all_terms, state, all_terms, rates), steps, {}),
    ]


@jax.jit
def forward_fused(
    block: Block, donor: Block, terms: Terms, x: Float[Array, "batch time d_model"]
) -> Float[Array, "batch time d_model"]:
    """The fused block on whole sequences, in the dtype of `x`."""
    return as_batch(_apply(block, donor, terms, x), x)


@jax.jit
def backward_fused(
    block: Block,
    donor: Block,
    terms: Terms,
    x: Float[Array, "batch time d_model"],
    dy: Float[Array, "batch time d_model"],
) -> tuple[Terms, Float[Array, "batch time d_model"]]:
    """Gradients in the additions and in `x`, for one in the output."""
    pull = jax.vjp(lambda terms, x: _apply(block, donor, terms, x), terms, x)[1]
    d_terms, dx = pull(dy)
    return as_replicated(d_terms, x), as_batch(dx, x)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def update(
    terms: tuple[Terms, ...],
    inner: optax.ScaleByAdamState,
    grads: tuple[Terms, ...],
    rates: dict[str, Float[Array, ""]],
) -> tuple[tuple[Terms, ...], optax.ScaleByAdamState]:
    """One update of Adam; `terms` and its state are donated.

    Rates are data, so that one program serves all steps, rounds and settings.
    """
    change, inner = ADAM.update(grads, inner)
    scaled = tuple(
        {name: jax.tree.map(lambda a, r=rates[name]: -r * a, d[name]) for name in d} for d in change
    )
    return as_replicated((optax.apply_updates(terms, scaled), inner), jax.tree.leaves(grads)[0])


def _apply(block: Block, donor: Block, terms: Terms, x: Array) -> Array:
    cast = lambda p: p.replace(w=p.w.astype(x.dtype))  # noqa: E731
    is_linear = lambda p: isinstance(p, Linear)  # noqa: E731
    whole = fused_block(block, donor, terms)
    whole = jax.tree.map(lambda p: cast(p) if is_linear(p) else p, whole, is_leaf=is_linear)
    return block_forward(whole, x, plain_context(*x.shape[:2]))


def _error(
    spec: Fusion, fixed: tuple, terms: tuple[Terms, ...], x: Array, y: Array, place: Placement
) -> float:
    """Mean over batches, each with its own median token; the last is left out if incomplete."""
    group, donor = fixed
    found = []
    for i in range(0, len(x) - spec.batch + 1, spec.batch):
        h = _cast(place.put(x[i : i + spec.batch]), dtype=spec.dtype)
        for block, t in zip(group, terms, strict=True):
            h = forward_fused(block, donor, t, h)
        target = place.put(y[i : i + spec.batch])
        found.append(float(_mse(h, target, token_limit=spec.token_limit)))
    return float(np.mean(found))


@functools.partial(jax.jit, static_argnames=("kind", "token_limit"))
def _loss_gradient(
    x: Array, y: Array, *, kind: GroupLoss, token_limit: float | None
) -> tuple[Array, Array]:
    value, dx = jax.value_and_grad(lambda x: group_loss(kind, x, y, token_limit))(x)
    return as_replicated(value, x), as_batch(dx, x)


@functools.partial(jax.jit, static_argnames="token_limit")
def _mse(x: Array, y: Array, *, token_limit: float | None) -> Array:
    return mse(x.astype(jnp.float32), y.astype(jnp.float32), token_limit)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(x: Array, *, dtype: str) -> Array:
    return as_batch(x.astype(dtype), x)


_folded = jax.jit(folded_block)
PROGRAMS = (forward_fused, backward_fused, update)  # of a step, one compilation each a structure
