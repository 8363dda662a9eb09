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

import numpy as np
from jaxtyping import Float, Int

from jaxcomp.data.batches import evaluation_windows
from jaxcomp.data.corpora import load_text
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.head import open_head, token_scores
from jaxcomp.models.sizes import cache_sizes
from jaxcomp.models.stream import (
    block_step,
    cached_block_step,
    embed_batches,
    map_batches,
    run_blocks,
)

CHUNK_TOKENS = 2**17  # tokens whose hidden states are on the host at once


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
        """What reports call it: all that its numbers depend on, defaults left out."""
        words = (
            f"perplexity {pathlib.Path(self.text).name} @{self.context}",
            self.through_cache and f"by {self.through_cache} through the cache",
            self.stride and f"stride {self.stride}",
            self.tokens and f"first {self.tokens}",
        )
        return " ".join(filter(None, words))

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
    out, head = [], open_head(model)
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        hidden = run_blocks(model, embed_batches(model, part, batch), progress, step)
        targets = [part[i : i + batch, 1:] for i in range(0, len(part), batch)]
        nll = lambda x, t: np.asarray(token_scores(head, x[:, :-1], t).nll)  # noqa: E731
        out += map_batches(nll, hidden, targets)
    return np.concatenate(out)
