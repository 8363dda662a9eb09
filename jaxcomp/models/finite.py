"""Where a model stops computing numbers: the first part whose output is NaN or infinite."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxcomp.models.decoder import Decoder, head_logits, iter_blocks
from jaxcomp.models.stream import block_step, embed_batches


def first_not_finite(model: Decoder, tokens: Int[np.ndarray, " time"]) -> str | None:
    """The first of the embedding, the blocks and the head to give something that is no number.

    Runs the model anew, without a cache, one block at a time. None: all is finite.
    """
    (x,) = embed_batches(model, tokens[None], batch=1)
    if not np.isfinite(x).all():
        return "the embedding"
    x = jnp.asarray(x)
    for i, block in enumerate(iter_blocks(model)):
        x = block_step(block, x)
        if not jnp.isfinite(x).all():
            return f"block {i}"
    logits = jax.jit(head_logits)(model.replace(blocks=()), x[:, -1:])
    return None if jnp.isfinite(logits).all() else "the head"


def explain_not_finite(model: Decoder, tokens: Int[np.ndarray, " time"]) -> str:
    """A message for the user whose model gave no numbers after `tokens`."""
    where, dtype = first_not_finite(model, tokens), model.config.compute_dtype
    said = f"the logits after {len(tokens)} tokens are not finite (NaN or infinite)"
    if where is None:
        return (
            f"{said}, though whole sequences run through the model without a cache give numbers; "
            "this is an error of ours: please report it with the model and the prompt"
        )
    way_out = "look for damaged weights with `jaxcomp inspect MODEL --check`"
    if dtype != "float32":
        way_out += f", or leave {dtype} for compute_dtype='float32' (--dtype float32)"
    return f"{said}; the first output that is not is that of {where}: {way_out}"
