"""Agreement: how far two models are apart on the next token of the same text.

    teacher's blocks, then the student's ─▶ hidden states behind the last, of the same windows
    both heads, chunk by chunk of the vocabulary ─▶ KL(teacher ‖ student), first choices, losses

A mean hides what matters in a compressed model, a few tokens that go wrong, so the KL divergence
comes with its quantiles and along the position in the window.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.data.batches import Windows, evaluation_windows
from jaxcomp.data.corpora import load_text
from jaxcomp.models.config import ModelConfig
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.head import next_token_gap, open_head
from jaxcomp.models.stream import embed_batches, map_batches, run_blocks
from jaxcomp.models.text import Encode

CHUNK_TOKENS = 2**16  # tokens of which both models' hidden states are on the host at once


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Settings of a comparison; as those of `Perplexity`.

    Attributes:
      text: a name or file that `jaxcomp.data.load_text` knows.
      context: tokens a window, the first of which is not predicted.
      tokens: predicted tokens to compare, from the start of the text; None for all.
      batch: windows a compiled call works on.
    """

    text: str = "wiki_eval"
    context: int = 1024
    tokens: int | None = 8184
    batch: int = 1

    @property
    def name(self) -> str:
        """What reports call it."""
        part = "" if self.tokens is None else f" first {self.tokens}"
        return f"agreement {pathlib.Path(self.text).name} @{self.context}{part}"

    def windows(self, config: ModelConfig, encode: Encode) -> Windows:
        """The windows of the text, and which of their predictions count."""
        bos = config.bos_token_id if config.bos == "window" else None
        ids = encode(load_text(self.text).text)
        return evaluation_windows(ids, self.context, tokens=self.tokens, bos_id=bos)

    def __call__(
        self,
        teacher: Decoder,
        student: Decoder,
        encode: Encode,
        progress: Callable = lambda x, **_: x,
    ) -> dict[str, Any]:
        """How the student's predictions depart from the teacher's.

        Args:
          teacher, student: of one vocabulary (`check_same_tokens`); blocks may be behind handles,
            of which one is in memory at a time.
          encode: text → token ids, without special tokens.
          progress: wraps the blocks of either model to show how far it is.

        Returns:
          `kl`: mean, median, 99 % quantile and maximum in nats a token; `top1`: the share of tokens
          whose first choice is the same; `perplexity` of both and their `ratio`; `tokens`;
          `kl_by_position`: mean KL by the number of tokens that a prediction has seen.

        Raises:
          ValueError: a model makes NaN or infinity, or the vocabularies differ in size.
        """
        rows = [m.config.vocab_size for m in (teacher, student)]
        if rows[0] != rows[1]:
            raise ValueError(f"the models have vocabularies of {rows[0]} and {rows[1]} words")
        windows = self.windows(teacher.config, encode)
        heads = open_head(teacher), open_head(student)
        step = max(self.batch, CHUNK_TOKENS // self.context // self.batch * self.batch)
        found = []
        for start in range(0, len(windows.tokens), step):
            part = windows.tokens[start : start + step]
            ends = [
                run_blocks(model, embed_batches(model, part, self.batch), progress)
                for model in (teacher, student)
            ]
            targets = [part[i : i + self.batch, 1:] for i in range(0, len(part), self.batch)]

            def compare(x: Array, y: Array, t: Array) -> tuple[np.ndarray, ...]:
                return tuple(map(np.asarray, next_token_gap(*heads, x[:, :-1], y[:, :-1], t)))

            found += map_batches(compare, *ends, targets)
        kl, agree, *losses = (np.concatenate(column) for column in zip(*found, strict=True))
        return _summary(kl, agree, losses, windows.score)


class Readable(Protocol):
    """A model with its tokenizer, as `jaxcomp.job.load` gives it."""

    model: Decoder
    tokenizer: Any
    encode: Encode


def check_same_tokens(teacher: Readable, student: Readable, text: str) -> None:
    """Refuses models whose predictions are not about the same tokens.

    Args:
      text: must have the same tokens with both.

    Raises:
      ValueError: says what differs.
    """
    a, b = teacher.model.config, student.model.config
    why = "; only models of one vocabulary can be compared token by token"
    if a.vocab_size != b.vocab_size:
        raise ValueError(f"the models have {a.vocab_size} and {b.vocab_size} words{why}")
    ours, theirs = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    if odd := sorted(w for w in {*ours, *theirs} if ours.get(w) != theirs.get(w)):
        ids = " and ".join(str(v.get(odd[0], "no token")) for v in (ours, theirs))
        raise ValueError(f"the tokenizers differ in {len(odd)} words: {odd[0]!r} is {ids}{why}")
    starts = [c.bos_token_id if c.bos == "window" else None for c in (a, b)]
    if starts[0] != starts[1]:
        raise ValueError(f"windows begin with the tokens {starts[0]} and {starts[1]}{why}")
    x, y = teacher.encode(text), student.encode(text)
    if not np.array_equal(x, y):
        n = min(len(x), len(y))
        at = int(np.argmax(np.append(x[:n] != y[:n], True)))
        raise ValueError(
            f"the tokenizers cut the text into {len(x)} and {len(y)} tokens, which first differ at "
            f"token {at}{why}"
        )


def _summary(
    kl: Float[np.ndarray, "windows predictions"],
    agree: Bool[np.ndarray, "windows predictions"],
    losses: list[Float[np.ndarray, "windows predictions"]],
    score: Bool[np.ndarray, "windows predictions"],
) -> dict[str, Any]:
    """The numbers of `Agreement`, of the predictions that count."""
    scored = kl[score].astype(np.float64)
    nll = [float(np.mean(loss[score], dtype=np.float64)) for loss in losses]
    for who, mean in zip(("teacher", "student"), nll, strict=True):
        if not math.isfinite(mean):
            raise ValueError(
                f"the {who}'s loss is {mean}: the model holds or makes NaN or infinity; "
                "`jaxcomp inspect --check` names the block"
            )
    perplexities = [math.exp(min(mean, 700.0)) for mean in nll]
    seen = np.broadcast_to(np.arange(1, kl.shape[1] + 1), kl.shape)[score]
    edges = [2**i for i in range(int(seen.max()).bit_length())]
    pieces = [(seen >= low) & (seen < 2 * low) for low in edges]
    return {
        "tokens": int(scored.size),
        "kl": {
            "mean": float(scored.mean()),
            "median": float(np.median(scored)),
            "p99": float(np.quantile(scored, 0.99)),
            "max": float(scored.max()),
        },
        "top1": float(agree[score].mean()),
        "perplexity": {
            "teacher": perplexities[0],
            "student": perplexities[1],
            "ratio": math.exp(min(nll[1] - nll[0], 700.0)),
        },
        "kl_by_position": [
            {"from": low, "to": min(2 * low, kl.shape[1] + 1) - 1, "mean": float(scored[i].mean())}
            for low, i in zip(edges, pieces, strict=True)
            if i.any()
        ],
    }
