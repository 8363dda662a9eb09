"""The gated feed-forward unit."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.activation import QActivation
from jaxcomp.core.linear import Linear, linear
from jaxcomp.core.site import Tap
from jaxcomp.core.struct import node, static

TOKEN_TILE = (
    256  # tokens at a time on a CPU, so that gate and up stay in the cache until multiplied
)
MAX_TILES = 32  # longer sequences get larger tiles, which bounds the compiled program
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@node
class DenseFFN:
    """`down(act(gate(x)) · up(x))`.

    `gate_up` is one linear in place of gate and up, which are then None (`models.prepare`).
    """

    gate: Linear | None
    up: Linear | None
    down: Linear
    activation: Literal["silu", "gelu_tanh"] = static(default="silu")
    gate_up: Linear | None = None


def ffn(
    p: DenseFFN, x: Float[Array, "batch time d_model"] | QActivation, tap: Tap
) -> Float[Array, "batch time d_model"]:
    """The feed-forward unit of one block; `x` is what `ffn_in` gave."""
    time = x.shape[1]
    inputs = (x,) if p.gate_up is not None else (tap("gate_in", x), tap("up_in", x))
    tile = max(TOKEN_TILE, -(-time // MAX_TILES)) if jax.default_backend() == "cpu" else time
    parts = []
    for start in range(0, time, tile):
        # Both stay in float32 until their product.
        gate, up = _gate_up(p, *(a[:, start : start + tile] for a in inputs))
        parts.append((ACTIVATIONS[p.activation](gate) * up).astype(x.dtype))
    return linear(p.down, tap("ffn_mid", jnp.concatenate(parts, axis=1)))


def _gate_up(p: DenseFFN, *inputs: Array | QActivation) -> tuple[Array, Array]:
    if p.gate_up is not None:
        return tuple(jnp.split(linear(p.gate_up, *inputs, jnp.float32), 2, axis=-1))
    return tuple(linear(w, x, jnp.float32) for w, x in zip((p.gate, p.up), inputs, strict=True))
