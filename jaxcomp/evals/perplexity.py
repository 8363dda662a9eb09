"""Perplexity: exp of the mean negative log-likelihood of the next token, on whole windows.

Windows are cut from the tokenized text (`jaxcomp.data.batches.evaluation_windows`); each predicts
all its tokens but the first, or with `stride` only those not scored before. Blocks are streamed:
all windows of a chunk go through one block before the next is touched.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.core.quantize import QTensor, dequantize
from jaxcomp.data.batches import evaluation_windows
from jaxcomp.data.corpora import load_text
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.layers import RMSNorm, rms_norm
from jaxcomp.models.sizes import cache_sizes
from jaxcomp.models.stream import (
    block_step,
    cached_block_step,
    embed_batches,
    map_batches,
    run_blocks,
)

CHUNK_TOKENS = 2**17  # tokens whose hidden states are on the host at once
VOCAB_CHUNK = 512  # words whose logits exist at once; small enough to stay in the cache


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Settings of a perplexity measurement.

    Attributes:
      text: a name or file that `jaxcomp.data.load_text` knows.
      context: tokens a window, the first of which is not predicted.
      stride: tokens between window starts; None for non-overlapping windows.
      tokens: predicted tokens to score, from the start of the text; None for all.
      batch: windows a compiled call works on.
      through_cache: feed every window into the KV cache so many tokens at a time, as decoding does
        (1 is token by token), and report the bits of a cached value; None for whole windows.
    """

    text: str = "wiki_eval"
    context: int = 1024
    stride: int | None = None
    tokens: int | None = None
    batch: int = 1
    through_cache: int | None = None

    def __post_init__(self):
        if self.through_cache is not None and self.through_cache < 1:
            raise ValueError(
                f"through_cache={self.through_cache} is below 1; use the number of tokens to feed "
                "at a time, or None for whole windows"
            )

    @property
    def name(self) -> str:
        """What reports call it."""
        how = "" if self.through_cache is None else f" by {self.through_cache} through the cache"
        return f"perplexity {pathlib.Path(self.text).name} @{self.context}{how}"

    def __call__(
        self,
        model: Decoder,
        encode: Callable[[str], np.ndarray],
        progress: Callable = lambda x, **_: x,
    ) -> dict[str, int | float]:
        """Perplexity, mean nats a token and number of tokens scored of `text` under `model`.

        Args:
          model: blocks may be behind handles.
          encode: text → token ids, without special tokens.
          progress: wraps an iterable to show how far it is.
        """
        corpus = load_text(self.text)
        config = model.config
        bos = config.bos_token_id if config.bos == "window" else None
        windows = evaluation_windows(
            encode(corpus.text), self.context, self.stride, self.tokens, bos_id=bos
        )
        nll = window_nll(model, windows.tokens, self.batch, progress, self.through_cache)
        scored = nll[windows.score]
        mean = float(np.mean(scored, dtype=np.float64))
        if not math.isfinite(mean):
            raise ValueError(
                f"the loss on {self.text!r} is {mean}: the model holds or makes NaN or infinity; "
                "`jaxcomp inspect --check` names the block"
            )
        numbers = {
            "perplexity": math.exp(min(mean, 700.0)),
            "nll": mean,
            "tokens": int(scored.size),
        }
        if self.through_cache is not None:
            bits = cache_sizes(model, self.context)["bits_per_cached_value"]
            numbers["bits_per_cached_value"] = bits
        return numbers


def window_nll(
    model: Decoder,
    tokens: Int[np.ndarray, "windows context"],
    batch: int = 1,
    progress: Callable = lambda x, **_: x,
    through_cache: int | None = None,
) -> Float[np.ndarray, "windows context-1"]:
    """Negative log-likelihood of every token after the first of each window, in nats."""
    step = block_step
    if through_cache is not None:
        step = functools.partial(cached_block_step, chunk=min(through_cache, tokens.shape[1]))
    chunk = max(batch, CHUNK_TOKENS // tokens.shape[1] // batch * batch)
    out, head = [], _head(model.replace(blocks=()), model.config.compute_dtype)
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        hidden = run_blocks(model, embed_batches(model, part, batch), progress, step)
        targets = [part[i : i + batch, 1:] for i in range(0, len(part), batch)]
        nll = lambda x, t: np.asarray(token_nll(model.norm, head, x[:, :-1], t))  # noqa: E731
        out += map_batches(nll, hidden, targets)
    return np.concatenate(out)


class Head(NamedTuple):
    """The output layer: `w` in the compute dtype, `b` in float32 or None."""

    w: Float[Array, "vocab d_model"]
    b: Float[Array, " vocab"] | None


@functools.partial(jax.jit, static_argnames="dtype")
def _head(model: Decoder, dtype: str) -> Head:
    if model.lm_head is None:
        return Head(model.embed.weight.astype(dtype), None)
    w, b = model.lm_head.w, model.lm_head.b
    w = dequantize(w) if isinstance(w, QTensor) else w
    return Head(w.astype(dtype).T, None if b is None else b.astype(jnp.float32))


@jax.jit
def token_nll(
    norm: RMSNorm | None,
    head: Head,
    x: Float[Array, "batch time d_model"],
    targets: Int[Array, "batch time"],
) -> Float[Array, "batch time"]:
    """−log p(target) for each hidden state after the last block, float32.

    The vocabulary is walked in chunks with a running maximum and sum, so neither the logits nor the
    log-probabilities of all tokens and words ever exist.
    """
    rows, wanted = rms_norm(norm, x).reshape(-1, x.shape[-1]), targets.reshape(-1)
    vocab = head.w.shape[0]
    chunk = min(VOCAB_CHUNK, vocab)

    def visit(i: Array, state: tuple) -> tuple:
        highest, total, gold = state
        start = jnp.minimum(i * chunk, vocab - chunk)  # the last chunk overlaps the one before it
        part = jax.lax.dynamic_slice_in_dim(head.w, start, chunk)
        logits = jnp.matmul(rows, part.T, preferred_element_type=jnp.float32)
        if head.b is not None:
            logits = logits + jax.lax.dynamic_slice_in_dim(head.b, start, chunk)
        at = wanted - start
        here = (at >= 0) & (at < chunk)
        hit = jnp.take_along_axis(logits, jnp.clip(at, 0, chunk - 1)[:, None], axis=1)[:, 0]
        new = jnp.arange(chunk) + start >= i * chunk
        logits = logits + jnp.where(new, 0.0, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(logits, axis=1))
        total = total * jnp.exp(highest - higher)
        total = total + jnp.sum(jnp.exp(logits - higher[:, None]), axis=1)
        return higher, total, jnp.where(here, hit, gold)

    start = jnp.full(len(rows), -1e30), jnp.zeros(len(rows)), jnp.zeros(len(rows))
    highest, total, gold = jax.lax.fori_loop(0, -(-vocab // chunk), visit, start)
    return (jnp.log(total) + highest - gold).reshape(targets.shape)
