"""The gated feed-forward unit."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.linear import Linear, linear
from jaxcomp.core.site import Tap
from jaxcomp.core.struct import node, static

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@node
class DenseFFN:
    """`down(act(gate(x)) · up(x))`."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Literal["silu", "gelu_tanh"] = static(default="silu")


def ffn(
    p: DenseFFN, x: Float[Array, "batch time d_model"], tap: Tap
) -> Float[Array, "batch time d_model"]:
    """The feed-forward unit of one block; `x` is what `ffn_in` gave.

    Gate and up stay in float32 until their product: rounding them first costs accuracy and time.
    """
    gate, up = linear(p.gate, x, jnp.float32), linear(p.up, x, jnp.float32)
    h = (ACTIVATIONS[p.activation](gate) * up).astype(x.dtype)
    return linear(p.down, tap("ffn_mid", h))
