"""Token windows cut from one long text: random ones to calibrate on, consecutive ones to evaluate.

    sample_windows        ──[###]────────[###]──[###]───────    random starts, all different
    evaluation_windows    [0123][4567][89..]                    context 4: 0, 4 and 8 not predicted
      stride=2            [0123]
                            [2345]                              only 4 and 5 count here
                              [4567] …

Everything is numpy on the host; a model sees the arrays one batch at a time.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32


class Windows(NamedTuple):
    """Windows for perplexity; `score[i, j]` says whether predicting `tokens[i, j + 1]` counts.

    Invariant: no token of the text counts twice, and padding never counts.
    """

    tokens: Int32[np.ndarray, "windows context"]
    score: Bool[np.ndarray, "windows context-1"]


def sample_windows(
    ids: Int[np.ndarray, " n"], samples: int, length: int, seed: int
) -> Int32[np.ndarray, "samples length"]:
    """Cuts `samples` windows at random starts, no two alike; the same arguments give the same ones.

    Windows may overlap. Starts come from `np.random.Generator(PCG64(seed))`.

    Raises:
      ValueError: `samples` or `length` below 1; fewer than `length + samples - 1` tokens, which is
        what that many starts need; or fewer than `samples * length / 4`, where windows repeat each
        other so much that the sample is not what its size says.
    """
    _require_at_least("samples", samples, 1)
    _require_at_least("length", length, 1)
    starts = len(ids) - length + 1
    if starts < samples:
        raise ValueError(
            f"the text has {len(ids)} tokens and {samples} different windows of length={length} "
            f"need at least {length + samples - 1} (one needs {length}); "
            "use a longer text or a smaller length"
        )
    if 4 * len(ids) < samples * length:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than a quarter of samples={samples} x "
            f"length={length}, {-(-samples * length // 4)}; use a longer text or at most "
            f"{4 * len(ids) // length} samples"
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    first = generator.choice(starts, size=samples, replace=False)
    return ids[first[:, None] + np.arange(length)].astype(np.int32)


def sample_hash(windows: Int[np.ndarray, "samples length"]) -> str:
    """Returns the SHA-256 of the shape and the tokens as little-endian int32: equal on any host."""
    shape = np.asarray(windows.shape, "<i8").tobytes()
    return hashlib.sha256(shape + windows.astype("<i4").tobytes()).hexdigest()


def evaluation_windows(
    ids: Int[np.ndarray, " n"],
    context: int,
    stride: int | None = None,
    tokens: int | None = None,
    bos_id: int | None = None,
) -> Windows:
    """Cuts the text into consecutive windows and marks the predictions that count.

    Without a stride the windows do not overlap and each counts its `context - 1` predictions; a
    window's first token has no context and never counts. With a smaller stride, each window after
    the first counts only what no earlier one held: `stride` tokens, every one with at least
    `context - stride` before it. The last window is filled up with token 0, which no earlier
    position sees under a causal mask, and which does not count.

    Args:
      ids: the whole text, without special tokens.
      context: tokens per window, the model's view.
      stride: text tokens from one window's start to the next's; default: all that a window holds.
      tokens: how many predictions count in all, from the start of the text; the default and any
        number above what the text has mean all of it. 8,184 with context 1,024 are 8 windows.
      bos_id: put before every window, which then holds `context - 1` tokens of text and predicts
        them all.

    Returns:
      `Windows`; those in which nothing counts are left out.

    Raises:
      ValueError: context below 2, stride outside 1 … text tokens per window, budget below 1, or
        a text shorter than one window.
    """
    _require_at_least("context", context, 2)
    body = context - (bos_id is not None)
    stride = body if stride is None else stride
    if not 1 <= stride <= body:
        raise ValueError(
            f"stride={stride} is outside 1 to {body}, the text tokens of one window; "
            f"use stride=None for windows that do not overlap"
        )
    if tokens is not None:
        _require_at_least("tokens", tokens, 1)
    if len(ids) < body:
        raise ValueError(
            f"the text has {len(ids)} tokens and one window of context={context} needs {body}; "
            f"use a longer text or a smaller context"
        )
    windows = 1 + -(-(len(ids) - body) // stride)
    starts = stride * np.arange(windows)
    position = starts[:, None] + np.arange(body)  # in the text, [windows, body]
    held_before = np.concatenate([[0], starts[:-1] + body])  # by the windows before, per window
    score = (position >= held_before[:, None]) & (position < len(ids))
    text = np.append(ids, np.zeros(position[-1, -1] + 1 - len(ids), ids.dtype))[position]
    if bos_id is None:
        score = score[:, 1:]
    else:
        text = np.concatenate([np.full((windows, 1), bos_id, text.dtype), text], axis=1)
    if tokens is not None:
        score &= np.cumsum(score).reshape(score.shape) <= tokens
    counts = score.any(axis=1)
    return Windows(text[counts].astype(np.int32), score[counts])


def _require_at_least(name: str, value: int, limit: int) -> None:
    if value < limit:
        raise ValueError(f"{name}={value} is below {limit}; use {name}={limit} or more")
