"""The operands that the TPU kernel multiplies by, made from the two factors.

    right   [width, columns]   what a run of `width` lanes is multiplied by
    left    [n1·c, n1·c]       leftᵀ ⊗ I_c: mixes the runs of c tokens in rows (run, token)

Where the codes will be packed, the columns of every 128 lanes are sorted into those of the low
nibbles and those of the high ones, so that the kernel has no lanes to shuffle. A factor of 64 lanes
puts out each of its two runs in both halves of the 128 lanes, `[128, 2·128]`: the left product then
has every run in every lane, and the kernel picks halves.

They are functions of the factors alone and cheap beside one use on many tokens; in a decoding loop
the compiler moves them out of it.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LANES = 128


def right_operand(
    right: Float[Array, "n2 n2"] | None, width: int, packed: bool, dtype: jnp.dtype
) -> Float[Array, "width columns"]:
    """See the module docstring; None stands for the identity of order `width`."""
    right = jnp.eye(width, dtype=dtype) if right is None else right.astype(dtype)
    if width % LANES:
        runs = LANES // width
        each = jnp.tile(right, (1, runs))  # a run in every part of the lanes
        blocks = [
            jnp.pad(each, ((i * width, LANES - (i + 1) * width), (0, 0))) for i in range(runs)
        ]
        right = jnp.concatenate(blocks, axis=1)
    if packed:
        right = right[:, nibble_order(right.shape[1])]
    return right


def left_operand(
    left: Float[Array, "n1 n1"], order: np.ndarray, tokens: int, dtype: jnp.dtype
) -> Float[Array, "rows rows"]:
    """`leftᵀ ⊗ I_tokens` with the runs in `order`."""
    mixed = left.astype(dtype).T[order][:, order]
    return jnp.kron(mixed, jnp.eye(tokens, dtype=dtype))


def nibble_order(columns: int) -> np.ndarray:
    """Columns in the order even, odd, within every 128."""
    lanes = np.arange(columns).reshape(-1, LANES // 2, 2)
    return lanes.swapaxes(1, 2).reshape(-1)
