"""`fit`: gradient descent on the parameters of one block, over batches in a fixed order.

One compiled step serves all blocks of a structure: what differs between them is an argument. The
loss is divided by its own value, so that every batch weighs the same whatever its size; the
gradient is that of its logarithm.

Optimiser: AdamW, a learning rate a group of parameters, cosine decay to a floor they share, an
optional linear warm-up. Weight decay is 0.01, PyTorch's default (optax's own is 1e-4).

Over a mesh the windows of a batch are shared among the devices; parameters are on all of them, and
all of them make the same update.

Source: FlatQuant's code (arXiv 2410.09426), whose settings are the defaults.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxcomp.parallel.mesh import Placement, as_replicated

Loss = Callable[..., Float[Array, ""]]  # (params, setting, *batch) → loss
FROZEN = "frozen"  # a group of parameters that stays as it is
TINY = 1e-30  # of a loss that is 0 already
FLOOR = 1e-3  # the last learning rate, as a share of the first group's
WARMUP_START = 0.01


@dataclasses.dataclass(frozen=True)
class FitSpec:
    """How long and how fast to fit.

    Attributes:
      steps: updates in all.
      lr: pairs of a group's name and its first learning rate. The first pair sets the floor.
      warmup: steps of linear growth from a hundredth of the rate.
      weight_decay: decoupled, times the learning rate.
    """

    steps: int
    lr: tuple[tuple[str, float], ...]
    warmup: int = 0
    weight_decay: float = 0.01


class FitState(NamedTuple):
    """What one step hands to the next; `params` is a dict of group → subtree."""

    params: dict[str, Any]
    optimiser: Any


def fit_init(params: dict[str, Any], spec: FitSpec) -> FitState:
    """The state before the first step."""
    # Copied, because the steps donate them; with a dtype, or a weak one costs another compilation.
    params = jax.tree.map(lambda a: jnp.array(a, a.dtype), params)
    return FitState(params, optimiser(spec).init(params))


@functools.partial(jax.jit, static_argnames=("loss", "setting", "spec"), donate_argnums=0)
def fit_step(
    state: FitState, data: tuple, *, loss: Loss, setting: Any, spec: FitSpec
) -> tuple[FitState, Float[Array, ""]]:
    """One update, and the loss before it. `state` is donated.

    Args:
      data: what `loss` takes after the parameters and the setting; the last one is of a batch.
      loss: a module-level function, being part of the compilation key.
      setting: hashable; equal for blocks that shall share a compilation.
    """

    def log_loss(params: dict) -> tuple[Array, Array]:
        value = loss(params, setting, *data)
        return value / jax.lax.stop_gradient(jnp.maximum(value, TINY)), value

    grads, value = jax.grad(log_loss, has_aux=True)(state.params)
    updates, inner = optimiser(spec).update(grads, state.optimiser, state.params)
    new = FitState(optax.apply_updates(state.params, updates), inner)
    return as_replicated((new, value), data[-1])


@functools.cache
def optimiser(spec: FitSpec) -> optax.GradientTransformation:
    """AdamW for each group; parameters called `base` stay as they are."""
    floor = FLOOR * spec.lr[0][1]
    adam = {
        name: optax.adamw(_schedule(rate, floor, spec), weight_decay=spec.weight_decay)
        for name, rate in spec.lr
    }
    return optax.multi_transform({**adam, FROZEN: optax.set_to_zero()}, _groups)


def _groups(params: dict[str, Any]) -> Any:
    def group(path: tuple, _: Array) -> str:
        last = jax.tree_util.keystr(path[-1:], simple=True)
        return FROZEN if last == "base" else path[0].key

    return jax.tree_util.tree_map_with_path(group, params)


def _schedule(rate: float, floor: float, spec: FitSpec) -> optax.Schedule:
    cosine = optax.cosine_decay_schedule(rate, spec.steps, alpha=floor / rate)
    if not spec.warmup:
        return cosine
    rise = optax.linear_schedule(WARMUP_START * rate, rate, spec.warmup)
    return optax.join_schedules([rise, cosine], [spec.warmup])


def run_fit(
    params: dict[str, Any],
    batches: Sequence[tuple],
    fixed: tuple,
    *,
    loss: Loss,
    setting: Any,
    spec: FitSpec,
    place: Placement = Placement(),
) -> tuple[dict[str, Any], list[float]]:
    """Fits `params`; returns them and the loss at every step.

    Args:
      batches: tuples of host arrays, taken in this order again and again until `spec.steps`.
      fixed: data that precedes a batch's own, such as the block.
      place: the devices that share a batch.

    Raises:
      ValueError: a loss is NaN or infinite; the message names the step.
    """
    state, losses = place.replicate(fit_init(params, spec)), []
    fixed = place.replicate(fixed)
    for i in range(spec.steps):
        batch = [place.put(x) for x in batches[i % len(batches)]]
        state, value = fit_step(state, (*fixed, *batch), loss=loss, setting=setting, spec=spec)
        losses.append(float(value))
        if not jnp.isfinite(losses[-1]):
            raise ValueError(f"step {i} of {spec.steps}: the loss is {losses[-1]}")
    return place.local(state.params), losses
