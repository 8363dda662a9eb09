"""Greedy generation: one prefill, then one compiled step per token with a donated cache.

Prompts are padded on the left to a multiple of `BUCKET` tokens and the cache to another, so that
prompts of similar length share their two compilations.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxcomp.kv.cache import Cache
from jaxcomp.models.decoder import Decoder, empty_cache, extend, iter_blocks

BUCKET = 64


def generate_greedy(
    model: Decoder,
    tokens: Int[np.ndarray, "batch time"],
    max_tokens: int,
    eos_ids: Sequence[int] = (),
    on_token: Callable[[np.ndarray], bool | None] | None = None,
    valid: Bool[np.ndarray, "batch time"] | None = None,
) -> Int[np.ndarray, "batch new"]:
    """The most likely continuation of each prompt, token by token.

    Args:
      model: blocks behind handles are loaded; the whole model is then in memory.
      tokens: prompts; with `valid`, padded on the left.
      max_tokens: how many to generate at most.
      eos_ids: a sequence is over at any of these; it is then filled with the first of them.
      on_token: called with the newest token of each sequence, int32 `[batch]`; True ends it all.

    Returns:
      The new tokens, cut where all sequences are over.

    Raises:
      ValueError: empty prompt, or prompt and `max_tokens` beyond the model's context.
    """
    batch, time = tokens.shape
    limit = model.config.context_length
    if time == 0:
        raise ValueError("the prompt has no tokens; give at least one, a BOS token for example")
    if max_tokens < 1 or time + max_tokens > limit:
        raise ValueError(
            f"a prompt of {time} tokens and max_tokens={max_tokens} do not fit the model's context "
            f"of {limit}; max_tokens may be 1..{limit - time}"
        )
    model = jax.device_put(model.replace(blocks=tuple(iter_blocks(model))))
    pad = -time % BUCKET
    valid = np.ones((batch, time), bool) if valid is None else valid
    tokens, valid = (np.pad(a, ((0, 0), (pad, 0))) for a in (tokens, valid))
    capacity, horizon = time + pad + max_tokens + (-max_tokens % BUCKET), time + max_tokens
    cache = empty_cache(model, batch, capacity, horizon)
    token, cache = _next_token(model, jnp.asarray(tokens, jnp.int32), cache, jnp.asarray(valid))
    out, over = [], np.zeros(batch, bool)
    while True:
        newest = np.where(over, eos_ids[0] if len(eos_ids) else 0, np.asarray(token))
        out.append(newest.astype(np.int32))
        enough = on_token is not None and on_token(out[-1])
        over |= np.isin(newest, eos_ids)
        if enough or over.all() or len(out) == max_tokens:
            return np.stack(out, axis=1)
        token, cache = _next_token(
            model, jnp.asarray(newest[:, None], jnp.int32), cache, jnp.ones((batch, 1), bool)
        )


@functools.partial(jax.jit, donate_argnames="cache")
def _next_token(
    model: Decoder, tokens: Int[Array, "batch time"], cache: Cache, valid: Bool[Array, "batch time"]
) -> tuple[Int[Array, " batch"], Cache]:
    logits, cache = extend(model, tokens, cache, valid, last_only=True)
    return jnp.argmax(logits[:, -1], axis=-1), cache
