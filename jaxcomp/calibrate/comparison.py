"""Two models side by side on the same tokens: where along its depth the compressed one departs.

    h, h' = embed(tokens), embed'(tokens)
    for block, block' in blocks:                     one of each in memory
        block'(h R)  against  block(h) R             `local`: what this block alone adds
        h, h' = block(h), block'(h')
        h'           against  h R                    what has come together so far

R is the orthogonal matrix between the two residual streams, so the errors of a rotated model mean
what those of any other do: the identity where the embedding tables agree, else the solution of
min ‖E R − E'‖ (Schönemann, doi 10.1007/BF02289451), which is exact but for rounding where a method
rotated the stream. Streams that no R brings together are not compared.

Where maps of cuts are folded into the weights the stream is of another size (`Decoder.stream`);
its size is taken out of h' first.

One token can hold nearly all the energy of a hidden state (the first of SmolLM2, in one channel),
so an error is the median over tokens; the ratio of the energies of all stands beside it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.calibrate.flatness import compare_flatness
from jaxcomp.models.decoder import Block, Decoder, head_logits, load_block
from jaxcomp.models.layers import table_of
from jaxcomp.models.stream import Hidden, embed_batches, run_blocks

SAME = 1e-5  # embeddings this close (squared, relative) are equal but for rounding
STRANGE = 0.25  # streams that R leaves further apart than this are not the same stream
ROWS = 8  # rows of the embedding that find R, per channel
BLOCKS = 5  # blocks whose flatness is compared, the first and the last among them
HEAD_TOKENS = 128  # tokens whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found, as JSON values.

    Attributes:
      tokens: how many went through both models.
      depth: `median`, `energy` and `local`, each a list of relative squared errors ‖h' − hR‖²/‖h‖²,
        first of the embedding and then behind every block of the compressed model, of a pruned one
        beside the block of the original that it was. `median` and `local` are the medians of single
        tokens, `energy` is over all tokens at once. `rotated` says whether R is not the identity. A
        comparison that means nothing is left out and `skipped` says why.
      output: `kl`, the mean KL(original ‖ compressed) of the next token in nats, and `top1`, the
        share of tokens for which both give the same next token the highest probability.
      flatness: `compare_flatness` of some blocks, each entry with its `block`; empty where the
        models differ in the number of blocks and nothing says which are left.
    """

    tokens: int
    depth: dict[str, Any]
    output: dict[str, float]
    flatness: list[dict[str, Any]]


def compare(
    original: Decoder,
    compressed: Decoder,
    tokens: Int[np.ndarray, "windows time"],
    progress: Callable[[Iterable], Iterable] = iter,
) -> Comparison:
    """Streams `tokens` through both models, whose blocks may be handles.

    Args:
      tokens: few; all windows go through a block at once.
      progress: wraps the pairs of blocks to show how far it is.
    """
    h, h_new = (embed_batches(model, tokens, len(tokens)) for model in (original, compressed))
    flatness: list[dict[str, Any]] = []
    places = _places(original, compressed)
    if places is None:
        n, m = len(original.blocks), len(compressed.blocks)
        depth: dict[str, Any] = {"skipped": f"the models have {n} and {m} blocks"}
        h, h_new = run_blocks(original, h), run_blocks(compressed, h_new)
        return Comparison(tokens.size, depth, output_gap(original, compressed, h, h_new), flatness)
    rotation, strange = residual_rotation(original, compressed)
    depth = {"skipped": strange} if strange else {"rotated": rotation is not None}
    errors = [] if strange else [_errors(h_new, h, rotation)]
    local = [median for median, _ in errors]
    scales = compressed.stream or (1.0,) * len(places)
    chosen = {round(i) for i in np.linspace(0, len(places) - 1, BLOCKS)}
    pairs, passed = zip(places, compressed.blocks, strict=True), 0
    for i, (place, new) in progress(enumerate(pairs)):
        h = run_blocks(original.replace(blocks=original.blocks[passed:place]), h)
        passed = place + 1
        old, new = (jax.device_put(load_block(b)) for b in (original.blocks[place], new))
        if i in chosen:
            flatness += [{"block": i, **site} for site in compare_flatness(old, new, h, h_new)]
        start, h, h_new = h, _step(original, old, h), _step(compressed, new, h_new)
        if not strange:
            size = scales[i]
            errors.append(_errors(_times(h_new, 1 / size), h, rotation))
            bare = new.replace(patch=None)  # its input is the original's own, which needs none
            alone = _step(compressed, bare, _times(_rotated(start, rotation), size))
            local.append(_errors(_times(alone, 1 / size), h, rotation)[0])
    h = run_blocks(original.replace(blocks=original.blocks[passed:]), h)
    if not strange:
        curves = zip(
            ("median", "energy", "local"), (*zip(*errors, strict=True), local), strict=True
        )
        depth |= {name: [float(f"{e:.6g}") for e in curve] for name, curve in curves}
    return Comparison(tokens.size, depth, output_gap(original, compressed, h, h_new), flatness)


def _places(original: Decoder, compressed: Decoder) -> tuple[int, ...] | None:
    """Where the blocks of the compressed model stand in the original; None where nothing says."""
    n = len(original.blocks)
    if n == len(compressed.blocks):
        return tuple(range(n))
    kept = compressed.kept
    return kept if kept and original.kept is None and kept[-1] < n else None


def residual_rotation(original: Decoder, compressed: Decoder) -> tuple[np.ndarray | None, str]:
    """R, or None for the identity; and why there is none, or ""."""
    vocab, width = original.embed.table_shape
    if compressed.embed.table_shape != (vocab, width):
        other = " × ".join(map(str, compressed.embed.table_shape))
        return None, f"the embeddings are {vocab} × {width} and {other}"
    rows = slice(None, None, max(1, vocab // (ROWS * width)))
    a, b = (
        np.asarray(table_of(e)[rows], np.float64) * (e.scale or 1.0)
        for e in (original.embed, compressed.embed)
    )
    gap = lambda x: np.sum((x - b) ** 2) / np.sum(b**2)  # noqa: E731
    if gap(a) <= SAME:
        return None, ""
    u, _, v = np.linalg.svd(a.T @ b)  # float64: the stream may be strong where the table is weak
    rotation = u @ v
    turned, still = gap(a @ rotation), gap(a)
    if min(turned, still) > STRANGE:
        return None, f"no rotation brings the residual streams together (error {turned:.2g})"
    # A rounded table is also fitted a little better by a rotation that nobody made.
    return (rotation.astype(np.float32) if turned < still / 2 else None), ""


def output_gap(
    original: Decoder, compressed: Decoder, h: Hidden, h_new: Hidden
) -> dict[str, float]:
    """`Comparison.output` from the hidden states behind the last block."""
    ends = [jax.device_put(model.replace(blocks=())) for model in (original, compressed)]
    rows = [np.concatenate(x).reshape(-1, x[0].shape[-1]) for x in (h, h_new)]
    kl, same = 0.0, 0
    for start in range(0, len(rows[0]), HEAD_TOKENS):
        # One model after the other: each has its head in the compute dtype while it is used.
        parts = [x[start : start + HEAD_TOKENS] for x in rows]
        p, q = (np.asarray(_log_probabilities(*pair)) for pair in zip(ends, parts, strict=True))
        kl += np.sum(np.exp(p) * (p - q), dtype=np.float64)
        same += int(np.sum(p.argmax(-1) == q.argmax(-1)))
    tokens = len(rows[0])
    return {"kl": float(f"{max(kl / tokens, 0.0):.6g}"), "top1": float(f"{same / tokens:.6g}")}


@jax.jit
def _log_probabilities(
    end: Decoder, h: Float[Array, "tokens d_model"]
) -> Float[Array, "tokens vocab"]:
    return jax.nn.log_softmax(head_logits(end, h))


def _step(model: Decoder, block: Block, hidden: Hidden) -> Hidden:
    return run_blocks(model.replace(blocks=(block,)), hidden)


def _rotated(hidden: Hidden, rotation: np.ndarray | None) -> Hidden:
    return hidden if rotation is None else [(x @ rotation).astype(x.dtype) for x in hidden]


def _times(hidden: Hidden, factor: float) -> Hidden:
    return hidden if factor == 1 else [(x * factor).astype(x.dtype) for x in hidden]


def _errors(hidden: Hidden, reference: Hidden, rotation: np.ndarray | None) -> tuple[float, float]:
    """‖h' − h R‖² / ‖h‖²: median of the tokens, and of all tokens together."""
    x, y = (np.concatenate(side).astype(np.float32) for side in (hidden, reference))
    gap = np.sum((x - (y if rotation is None else y @ rotation)) ** 2, -1, dtype=np.float64)
    energy = np.maximum(np.sum(y**2, -1, dtype=np.float64), 1e-30)
    return float(np.median(gap / energy)), float(gap.sum() / energy.sum())
