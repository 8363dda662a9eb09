"""Both sides of every cut of a pruned model: what stood before the blocks that are gone, and after.

    original   X_0 … X_s ┄┄ the blocks that were removed ┄┄ X_e …
    pruned     X_0 … x̃_s ─────────────────────────────────▶ block behind the cut

A map from the near side to X_e is fitted on the original's own X_s (every cut by itself), or on
x̃_s, what the pruned model really has there behind the cuts and maps before it.

Source: LinearPatch, arXiv 2505.24680, fits on the original; the other way is the block loop's
"compressed".
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.calibrate.stream import Calibration, check_finite
from jaxcomp.core.tree import get_at, named_leaves, replace_many
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import Block, Decoder, load_block
from jaxcomp.models.depth import cuts
from jaxcomp.models.patch import Patch, apply_patch, patch_matrix
from jaxcomp.models.stream import Hidden, embed_batches, step_batches
from jaxcomp.parallel.mesh import Placement

Inputs = Literal["original", "compressed"]


class Cut(NamedTuple):
    """One cut with the states on both sides, a batch each, on the host.

    Attributes:
      block: index of the block behind it, in the pruned model.
      start, end: the blocks [start, end) of the original are gone.
      before, after: X_s or x̃_s, and X_e.
      branch: what the feed-forward unit of the block before the cut added to `before`; empty where
        it was not asked for or there is no block before.
    """

    block: int
    start: int
    end: int
    before: Hidden
    after: Hidden
    branch: Hidden


def fit_cuts(
    model: Decoder,
    original: Decoder,
    calib: Calibration,
    fit: Callable[[Cut], Patch],
    inputs: Inputs = "original",
    branch: bool = False,
    place: Placement = Placement(),
    tick: Callable[[int], None] = lambda done: None,
) -> dict[int, Patch]:
    """The map that `fit` finds for every cut of `model`, by the block behind it.

    Args:
      original: the model before any of it was removed, in the same residual basis.
      fit: gets the cuts in order. Its patch goes on with the pruned stream where that is the input;
        with `branch` the patch is a map of what the feed-forward unit added, not of the stream.
      tick: told the number of blocks of the original passed.

    Raises:
      ValueError: another stream (see `check_stream`); a state is NaN or infinity, with the block.
    """
    check_stream(model, original)
    missing, patches = cuts(model, original), {}
    ends = {end: (block, start) for block, (start, end) in missing.items()}
    starts = {start for start, _ in missing.values()}
    hidden = embed_batches(original, calib.tokens, calib.batch)
    pruned = _Pruned(model, hidden, place) if inputs == "compressed" else None
    before, added = hidden, []
    for i in range(max(ends, default=0) + 1):
        if i in ends:
            block, start = ends[i]
            if pruned is not None:
                pruned.walk_to(block, branch)
                before, added = pruned.hidden, pruned.added
            cut = Cut(block, start, i, before, hidden, added)
            patches[block] = fit(cut)
            if pruned is not None:
                pruned.hidden = mended(cut, patches[block], branch)
        if i in starts:
            before = hidden
        if i == max(ends, default=0):
            break
        there = jax.device_put(load_block(original.blocks[i]))
        inside, after = hidden, step_batches(there, hidden, place=place)
        check_finite(after, f"the output of block {i} of the original, batch")
        wanted = branch and pruned is None and i + 1 in starts
        added = _branch(there, inside, after, place) if wanted else added
        hidden = after
        tick(i + 1)
    return patches


def check_stream(model: Decoder, original: Decoder) -> None:
    """Refuses a model whose residual stream is not the original's: every block adds to what the
    embedding begins.

    Raises:
      ValueError: the embeddings differ.
    """
    a, b = (named_leaves(m.embed) for m in (model, original))
    same = a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    if not same or model.embed.scale != original.embed.scale:
        raise ValueError(
            "the embedding is not the original's any more, so the two residual streams cannot be "
            "compared; patch right after removing blocks, before a step that rotates or scales"
        )


@dataclasses.dataclass
class _Pruned:
    """The pruned model's own stream, which goes from cut to cut."""

    model: Decoder
    hidden: Hidden
    place: Placement
    done: int = 0
    added: Hidden = dataclasses.field(default_factory=list)

    def walk_to(self, block: int, branch: bool) -> None:
        """Runs the blocks before this one."""
        for i in range(self.done, block):
            there, inside = jax.device_put(load_block(self.model.blocks[i])), self.hidden
            self.hidden = step_batches(there, inside, place=self.place)
            if branch and i + 1 == block:
                self.added = _branch(there, inside, self.hidden, self.place)
        self.done = block


def mended(cut: Cut, patch: Patch, branch: bool = False) -> Hidden:
    """What the block behind the cut will see: the near side with its map, or with that of what the
    unit before it added."""
    if not branch:
        return [np.asarray(_patched(patch, x)) for x in cut.before]
    width = cut.before[0].shape[-1]
    change = np.asarray(patch_matrix(patch, width)) - np.eye(width, dtype=np.float32)
    pairs = zip(cut.before, cut.branch, strict=True)
    return [x + (m @ change).astype(x.dtype) for x, m in pairs]


@jax.jit
def _patched(patch: Patch, x: jax.Array) -> jax.Array:
    return apply_patch(patch, x, plain_context(*x.shape[:2]).positions)


def _branch(block: Block, x: Hidden, y: Hidden, place: Placement) -> Hidden:
    """What the feed-forward unit added: the output less that of the block without the unit."""
    writers = {path: get_at(block, path) for path in anatomy(block)["ffn_mid"].consumers}
    bare = replace_many(block, {at: jax.tree.map(jnp.zeros_like, p) for at, p in writers.items()})
    return [a - b for a, b in zip(y, step_batches(bare, x, place=place), strict=True)]
