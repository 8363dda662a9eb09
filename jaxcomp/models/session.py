"""`Session`: sequences that are generated together, with their cache and one step a token.

Prompts enter the cache in chunks, padded on the left, so that all end in the same slot and no
padding stands between the tokens of a sequence; then every step feeds the newest tokens and chooses
the next ones. JAX computes while the host goes on: whoever asks for token t + 1 before reading
token t keeps the device busy, and reading waits only for what is read.

A step is one program. A chunk goes block by block, through a program that equal blocks share: it is
compiled once for all of them, so compiling takes no more time and memory for a deeper model.

Attention reads all of the cache, so the cache is no larger than need be, and moves into a larger
one when it is full. Sizes come from short lists, for every one costs a compilation: prompts are
padded to multiples of `BUCKET`, what a long one has beyond whole chunks comes first, and capacities
are those of `capacity_for`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcomp.kv.cache import Cache, LayerCache, resized, rewound
from jaxcomp.models.attention import Context
from jaxcomp.models.decoder import (
    Block,
    Decoder,
    advanced,
    block_apply,
    cache_context,
    empty_cache,
    extend,
    head_logits,
)
from jaxcomp.models.layers import embed_tokens
from jaxcomp.models.sampling import Sampling, sample

BUCKET = 64  # tokens; prompts and chunks are multiples of it
CHUNK_ROWS = 4096  # tokens of all sequences that a chunk has at most, and
CHUNK = 512  # those of one; both bound what attention and the feed-forward unit hold at once
ROOMY = 256  # slots; a cache that will not need more is made for all it will need
HALVES_FROM = 1024  # slots; beyond, doubling would waste too much, and the halves between help
NOT_FINITE = -1  # stands for the token where logits are NaN or infinite


class Choices(NamedTuple):
    """What was chosen last, and what the next choice depends on besides the logits.

    Attributes:
      token: the newest token of each sequence.
      over: whether it ended the sequence, or one before it did.
      keys: random keys of the sequences; None where the choice is greedy.
      count: tokens chosen so far.
      seen: tokens that the repetition penalty falls on; None where there is none.
    """

    token: Int[Array, " batch"]
    over: Bool[Array, " batch"]
    keys: Key[Array, " batch"] | None
    count: Int[Array, ""]
    seen: Bool[Array, "batch vocab"] | None


class Session:
    """Sequences that are generated together. Each call uses up the cache and leaves a longer one.

    Attributes:
      filled: slots of the cache that hold something, padding included.
      prompt_end: what `filled` was behind the last prompts.
      compilations, compile_seconds: programs compiled for it, or read from the compilation cache,
        and what the calls took that needed one.
    """

    def __init__(
        self,
        model: Decoder,
        batch: int,
        *,
        horizon: int | None = None,
        sampling: Sampling = Sampling(),
        eos_ids: Sequence[int] = (),
        rows: Sequence[int] | None = None,
    ):
        """
        Args:
          model: with its blocks in memory.
          batch: sequences.
          horizon: positions that a sequence will have, for rotary embeddings that depend on it; by
            default the model's context.
          sampling: how tokens are chosen.
          eos_ids: tokens that end a sequence.
          rows: numbers of the sequences, by which they draw other random numbers; by default 0, 1 …
        """
        self.model, self.batch = model, batch
        self.horizon = horizon or model.config.context_length
        self.filled = self.prompt_end = self.compilations = 0
        self.compile_seconds = 0.0
        self._sampling = sampling
        self._settings = dataclasses.replace(sampling, seed=0)  # a seed is no reason to compile
        self._eos_ids = jnp.asarray(eos_ids, jnp.int32).reshape(-1)
        self._keys = None
        if not sampling.greedy:
            rows = jnp.arange(batch) if rows is None else jnp.asarray(rows)
            fold = jax.vmap(jax.random.fold_in, (None, 0))
            self._keys = fold(jax.random.key(sampling.seed), rows)
        self._cache: Cache | None = None
        self._choices: Choices | None = None

    def prefill(
        self,
        tokens: Int[np.ndarray, "batch time"],
        valid: Bool[np.ndarray, "batch time"] | None = None,
        ahead: int = 0,
        before: Sequence[int] = (),
    ) -> Int[Array, " batch"]:
        """Feeds prompts, and chooses the token after each.

        Args:
          tokens: prompts; with `valid`, padded on the left. One without a token is over.
          ahead: steps that will follow at most; a small cache is made for all of them at once.
          before: tokens in the cache already, which a repetition penalty falls on as well.

        Returns:
          The first tokens, int32, `NOT_FINITE` where logits were not; the host does not wait.

        Raises:
          ValueError: padding behind what the cache holds already.
        """
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        if not self.filled:
            logits = self._feed_first(tokens, valid, ahead)
        elif valid.all():
            logits = self._feed_behind(tokens, ahead)
        else:
            raise ValueError("prompts of other lengths can only be fed to an empty cache")
        self.prompt_end = self.filled
        self._choices = Choices(
            jnp.zeros(self.batch, jnp.int32),
            jnp.asarray(~valid.any(axis=1)),
            self._keys,
            jnp.zeros((), jnp.int32),
            self._seen(tokens, valid, before),
        )
        return self._choose(logits)

    def step(self) -> Int[Array, " batch"]:
        """Feeds the newest tokens and chooses the next ones, as `prefill` returns them.

        A sequence that is over repeats its last token and adds nothing to the cache.
        """
        self._make_room(1)
        newest = self._choices.token, self._choices.over
        logits, self._cache = self._call(_feed_newest, self.model, *newest, self._cache)
        self.filled += 1
        return self._choose(logits)

    def rewind(self, filled: int) -> None:
        """Forgets all slots but the first `filled`."""
        self._cache = rewound(self._cache, jnp.int32(filled)) if filled else None
        self.filled = filled

    @property
    def capacity(self) -> int:
        """Slots of the cache as it is now."""
        return 0 if self._cache is None else self._cache.valid.shape[1]

    @property
    def cache(self) -> Cache | None:
        """The cache; the next call will use it up."""
        return self._cache

    def _feed_first(self, tokens: np.ndarray, valid: np.ndarray, ahead: int) -> Array:
        """Prompts of any lengths, with more padding on the left."""
        pad = -tokens.shape[1] % BUCKET
        tokens, valid = (np.pad(a, ((0, 0), (pad, 0))) for a in (tokens, valid))
        self._make_room(tokens.shape[1], ahead)
        return self._feed_chunks(tokens, valid)

    def _feed_behind(self, tokens: np.ndarray, ahead: int) -> Array:
        """All but the last token with padding on the right, which is forgotten; then the last one.

        So no padding stands between tokens: decoding would have to mask it.
        """
        time = tokens.shape[1]
        if time > 1:
            pad = (1 - time) % BUCKET
            self._make_room(time - 1 + pad, ahead)
            most = np.pad(tokens[:, :-1], ((0, 0), (0, pad)))
            self._feed_chunks(most, np.arange(most.shape[1]) < np.full((len(most), 1), time - 1))
            self.rewind(self.filled - pad)
        self._make_room(1, ahead)
        last = jnp.asarray(tokens[:, -1]), jnp.zeros(self.batch, bool)
        logits, self._cache = self._call(_feed_newest, self.model, *last, self._cache)
        self.filled += 1
        return logits

    def _feed_chunks(self, tokens: np.ndarray, valid: np.ndarray) -> Array:
        """Logits behind the last token; what is beyond whole chunks comes first."""
        width, chunk = tokens.shape[1], chunk_tokens(self.batch)
        start = 0
        for stop in range(width % chunk or chunk, width + 1, chunk):
            piece = (jnp.asarray(a[:, start:stop]) for a in (tokens, valid))
            fresh = self.filled == 0
            logits = self._feed_chunk(*piece, fresh=fresh)
            self.filled += stop - start
            start = stop
        return logits

    def _feed_chunk(
        self, tokens: Int[Array, "batch time"], valid: Bool[Array, "batch time"], fresh: bool
    ) -> Float[Array, "batch vocab"]:
        """Logits behind the last token of a chunk, which enters the cache."""
        cache, ends = self._cache, self.model.replace(blocks=())
        x, ctx = self._call(_enter, ends, tokens, valid, cache.replace(layers=()), fresh=fresh)
        layers = []
        for block, layer in zip(self.model.blocks, cache.layers, strict=True):
            x, layer = self._call(_pass, block, x, ctx, layer)
            layers.append(layer)
        self._cache = advanced(cache, tuple(layers), ctx)
        return self._call(_leave, ends, x)

    def _make_room(self, tokens: int, ahead: int = 0) -> None:
        needed = self.filled + tokens
        if needed <= self.capacity:
            return
        capacity = capacity_for(needed + ahead)
        if capacity > ROOMY:
            capacity = max(ROOMY, capacity_for(needed + min(ahead, BUCKET)))
        if self._cache is None:
            self._cache = empty_cache(self.model, self.batch, capacity, self.horizon)
        else:
            self._cache = self._call(_resize, self._cache, capacity)

    def _choose(self, logits: Array) -> Array:
        token, self._choices = self._call(
            _choose, logits, self._choices, self._eos_ids, self._settings
        )
        return token

    def _seen(self, tokens: np.ndarray, valid: np.ndarray, before: Sequence[int]) -> Array | None:
        if self._sampling.repetition_penalty == 1:
            return None
        seen = np.zeros((len(tokens), self.model.config.vocab_size), bool)
        rows, _ = np.nonzero(valid)
        seen[rows, tokens[valid]] = True
        seen[:, np.asarray(before, np.int32)] = True
        return jnp.asarray(seen)

    def _call(self, program: Callable, *args: Any, **static: Any) -> Any:
        """Calls a compiled function; the call returns at once unless it has to compile."""
        before, start = _compiled()[0], time.perf_counter()
        result = program(*args, **static)
        if (more := _compiled()[0] - before) > 0:
            self.compilations += more
            self.compile_seconds += time.perf_counter() - start
        return result


def capacity_for(slots: int) -> int:
    """The least capacity of the list that holds `slots`: 128, 256, 512, 1024, 1536, 2048, 3072 …"""
    capacity = 128
    while capacity < slots:
        half = capacity * 3 // 2
        if capacity >= HALVES_FROM and half >= slots:
            return half
        capacity *= 2
    return capacity


def chunk_tokens(batch: int) -> int:
    """Tokens a sequence that `batch` sequences are fed at a time, a multiple of `BUCKET`."""
    return max(BUCKET, min(CHUNK, CHUNK_ROWS // batch) // BUCKET * BUCKET)


@functools.partial(jax.jit, static_argnames="fresh")
def _enter(
    ends: Decoder,
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
    cache: Cache,
    fresh: bool,
) -> tuple[Float[Array, "batch time d_model"], Context]:
    """What the first block reads; `ends` is the model without its blocks."""
    x = embed_tokens(ends.embed, tokens, ends.config.compute_dtype)
    # Padding on the right, which is forgotten, comes after all that reads real tokens.
    return x, cache_context(cache, valid, left_padded=True, fresh=fresh)


@functools.partial(jax.jit, donate_argnames=("x", "layer"))
def _pass(
    block: Block, x: Float[Array, "batch time d_model"], ctx: Context, layer: LayerCache
) -> tuple[Float[Array, "batch time d_model"], LayerCache]:
    return block_apply(block, x, ctx, cache=layer)


@jax.jit
def _leave(ends: Decoder, x: Float[Array, "batch time d_model"]) -> Float[Array, "batch vocab"]:
    return head_logits(ends, x[:, -1])


@functools.partial(jax.jit, donate_argnames="cache")
def _feed_newest(
    model: Decoder, token: Int[Array, " batch"], over: Bool[Array, " batch"], cache: Cache
) -> tuple[Float[Array, "batch vocab"], Cache]:
    valid = ~over[:, None]
    logits, cache = extend(model, token[:, None], cache, valid, last_only=True, left_padded=True)
    return logits[:, -1], cache


@functools.partial(jax.jit, static_argnames="settings")
def _choose(
    logits: Float[Array, "batch vocab"],
    choices: Choices,
    eos_ids: Int[Array, " n"],
    settings: Sampling,
) -> tuple[Int[Array, " batch"], Choices]:
    keys = choices.keys
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, choices.count)
    token = sample(logits, keys, settings, choices.seen)
    token = jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), token, NOT_FINITE)
    token = jnp.where(choices.over, choices.token, token)
    over = choices.over | jnp.isin(token, eos_ids)
    seen = choices.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return token, Choices(token, over, choices.keys, choices.count + 1, seen)


@functools.partial(jax.jit, static_argnames="capacity")
def _resize(cache: Cache, capacity: int) -> Cache:
    return resized(cache, capacity)


@functools.cache
def _compiled() -> list[int]:
    """One number: the programs that JAX has compiled since this was first asked."""
    count = [0]

    def listen(event: str, _: float, **__: Any) -> None:
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    return count
