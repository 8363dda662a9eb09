"""What the weights of a block say of its importance: first-order change of the loss, or magnitude.

    taylor     Σ over the linears of Σ_ij | w_ij · ∂L/∂w_ij |,  L the mean loss over all tokens
    magnitude  Σ over the linears of Σ_ij | w_ij |

The gradient is summed over all text before the absolute value is taken, in float32: the change of
the loss of the whole text, not of each window. Backwards as forwards, one block is in memory.

Source: Shortened LLaMA, arXiv 2402.02834, and the authors' code (norms excluded).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.calibrate.stream import Calibration
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.tree import get_at, replace_many
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import (
    Block,
    Decoder,
    block_forward,
    block_struct,
    head_logits,
    iter_blocks,
    load_block,
)
from jaxcomp.models.stream import embed_batches, step_batches

WINDOW = 1  # windows whose logits exist at once


def taylor(
    model: Decoder, calib: Calibration, tick: Callable[[int], None] = lambda done: None
) -> Float[np.ndarray, " blocks"]:
    """The first-order score of every block; all hidden states are kept on the host.

    Args:
      tick: told the number of blocks passed, forwards and then backwards.

    Raises:
      ValueError: a weight is quantized (see `check_weights`); a gradient is not finite.
    """
    check_weights(model, "taylor")
    states, n = [embed_batches(model, calib.tokens, calib.batch)], len(model.blocks)
    for i, block in enumerate(iter_blocks(model)):
        states.append(step_batches(jax.device_put(block), states[-1]))
        tick(i + 1)
    targets = calib.tokens.shape[0] * (calib.tokens.shape[1] - 1)
    end = jax.device_put(model.replace(blocks=()))
    slopes = _end_slopes(end, states.pop(), calib, targets)
    scores = np.zeros(n)
    for i in reversed(range(n)):
        block, inputs = jax.device_put(load_block(model.blocks[i])), states.pop()
        total, before = None, []
        for b, (x, slope) in enumerate(zip(inputs, slopes, strict=True)):
            gradient, slope = backward(block, x, slope)
            if not bool(_finite(gradient)):
                raise ValueError(
                    f"the gradient of block {i} is NaN or infinity in batch {b} of the "
                    "calibration; compute in float32"
                )
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
            before.append(np.asarray(slope))
        slopes = before
        scores[i] = float(_products(weights(block), total))
        tick(2 * n - i)
    return scores


def magnitude(
    model: Decoder, tick: Callable[[int], None] = lambda done: None
) -> Float[np.ndarray, " blocks"]:
    """Σ |w| of every block's linears.

    Raises:
      ValueError: a weight is quantized (see `check_weights`).
    """
    check_weights(model, "magnitude")
    scores = []
    for i, block in enumerate(iter_blocks(model)):
        each = weights(block).values()
        scores.append(sum(float(np.abs(np.asarray(w, np.float32)).sum(dtype=float)) for w in each))
        tick(i + 1)
    return np.array(scores)


def weights(block: Block) -> dict[str, Float[Array, "in_ch out_ch"]]:
    """The weights of the block's linears, by path."""
    return {f"{path}.w": get_at(block, path).w for path in anatomy(block).linears}


def check_weights(model: Decoder, name: str) -> None:
    """Refuses codes, which have neither gradient nor magnitude of their own.

    Raises:
      ValueError: names the block and the linear.
    """
    for i, block in enumerate(map(block_struct, model.blocks)):
        for path, w in weights(block).items():
            if isinstance(w, QTensor):
                raise ValueError(
                    f"block {i}, {path.removesuffix('.w')} is quantized to {w.bits} bits, and "
                    f"{name} looks at weights as floats; remove blocks before quantizing"
                )


def _end_slopes(
    end: Decoder, hidden: list[np.ndarray], calib: Calibration, targets: int
) -> list[np.ndarray]:
    """∂L/∂X_L, a batch each."""
    slopes, row = [], 0
    for x in hidden:
        parts = []
        for i in range(0, len(x), WINDOW):
            tokens = calib.tokens[row + i : row + i + WINDOW]
            parts.append(np.asarray(_end_slope(end, x[i : i + WINDOW], tokens)) / targets)
        row += len(x)
        slopes.append(np.concatenate(parts))
    return slopes


@jax.jit
def _end_slope(
    end: Decoder, x: Float[Array, "batch time d"], tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time d"]:
    def loss(x: Array) -> Array:
        log_p = jax.nn.log_softmax(head_logits(end, x[:, :-1]))
        return -jnp.sum(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

    return jax.grad(loss)(x.astype(jnp.float32))


@jax.jit
def backward(block: Block, x: Array, slope: Array) -> tuple[dict[str, Array], Array]:
    """∂L/∂w of one batch, float32, and the slope before the block."""
    free = {path: w.astype(jnp.float32) for path, w in weights(block).items()}

    def run(free: dict[str, Array], x: Array) -> Array:
        y = block_forward(replace_many(block, free), x, plain_context(*x.shape[:2]))
        return y.astype(jnp.float32)

    _, back = jax.vjp(run, free, x.astype(jnp.float32))
    return back(slope)


@jax.jit
def _products(weights: dict[str, Array], gradient: dict[str, Array]) -> Array:
    each = [
        jnp.sum(jnp.abs(weights[path].astype(jnp.float32) * gradient[path])) for path in weights
    ]
    return jnp.sum(jnp.stack(each))


@jax.jit
def _finite(gradient: dict[str, Array]) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in gradient.values()]))
