"""A teacher's next-token distributions on disk: its top K words at every position of the windows.

    DIR/cache.json       which model, text, vocabulary and K; sealed
    DIR/shard.00000.bin  windows in order, and the sha256 of all that precedes it
        a window:  words [time, K] uint16 | log p [time, K] float16 | log of the rest [time] float16

Words are int32 where the vocabulary has more than 65,536. A token takes K·(2 + 2) + 2 bytes, or
K·(4 + 2) + 2. Every window has its place, so any of them is read alone. A shard is one streamed
pass of the teacher, block by block, and appears whole or not at all: a killed pass continues at the
next one.

Source: the offline top-K teacher of LinearPatch, arXiv 2505.24680. Departures: probabilities are
over the whole vocabulary and the mass outside is kept, so that more than one loss can be made of
them (`calibrate.losses`); random access, where the authors' code reads shards in order.
"""

import dataclasses
import functools
import hashlib
import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.calibrate.stream import write_whole
from jaxcomp.core.arrays import leaf_info
from jaxcomp.core.files import read_sealed, write_sealed
from jaxcomp.core.store import StoredTree
from jaxcomp.core.tree import named_leaves
from jaxcomp.models.decoder import Decoder, load_block
from jaxcomp.models.head import Head, open_head
from jaxcomp.models.layers import rms_norm
from jaxcomp.models.stream import embed_batches, map_batches, run_blocks

log = logging.getLogger(__name__)

HEADER = "cache.json"
VERSION = 1
SHARD_TOKENS = 2**15  # tokens whose hidden states are on the host at once, and of one shard
HEAD_ROWS = 128  # tokens whose logits exist at once
GROUP = 16  # words of which at first only the highest logit is looked at
LEAST_REST = 1e-7  # float32 cannot tell less outside from nothing
ROUNDING = 5e-3  # what float16 can add to the mass of a support
DIGEST = 32  # bytes of a sha256

Progress = Callable[[int, int], None]  # shards done, shards


class TopWords(NamedTuple):
    """Of some windows, in the order they were asked for: the teacher at every position."""

    words: Int[np.ndarray, "windows time k"]  # int32
    log_p: Float[np.ndarray, "windows time k"]  # float32, not increasing along k
    log_rest: Float[np.ndarray, "windows time"]  # float32


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """A complete cache; `read` gives any windows of it.

    Attributes:
      path: its directory.
      windows, time: how many windows, of how many tokens.
      k: words a position.
      vocab: size of the teacher's vocabulary.
      shard_windows: windows a shard; the last may have fewer.
    """

    path: pathlib.Path
    windows: int
    time: int
    k: int
    vocab: int
    shard_windows: int

    @property
    def bytes_per_token(self) -> int:
        """What a position takes on disk."""
        return bytes_per_token(self.k, self.vocab)

    @property
    def bytes(self) -> int:
        """What all windows take on disk."""
        return self.windows * self.time * self.bytes_per_token

    def read(self, windows: Sequence[int]) -> TopWords:
        """The teacher's words on these windows.

        Raises:
          ValueError: there is no such window, or what is stored cannot be a distribution.
        """
        return TopWords(*map(np.stack, zip(*map(self._window, windows), strict=True)))

    def _window(self, window: int) -> TopWords:
        if not 0 <= window < self.windows:
            raise ValueError(f"window {window} is not among the {self.windows} of {self.path}")
        shard, place = divmod(int(window), self.shard_windows)
        size = self.time * self.bytes_per_token
        with open(_shard(self.path, shard), "rb", buffering=0) as file:
            file.seek(place * size)
            found = _unpack(file.read(size), self.time, self.k, self.vocab)
        _check_distribution(found, self.vocab, f"window {window} of {self.path}")
        return found


def bytes_per_token(k: int, vocab: int) -> int:
    """Bytes of one position: K words and values, and the rest."""
    return k * (_word_type(vocab).itemsize + 2) + 2


def teacher_cache(
    path: pathlib.Path,
    teacher: Decoder,
    tokens: Int[np.ndarray, "windows time"],
    k: int,
    batch: int = 4,
    progress: Progress | None = None,
) -> TeacherCache:
    """The cache at `path`, written by the teacher as far as it is not there yet.

    Args:
      path: a directory that is absent, or holds a cache of the same model, text and K, perhaps
        unfinished.
      teacher: its blocks may be behind handles; it computes in its compute dtype.
      batch: windows that go through a block at once.

    Raises:
      ValueError: K is no number of words; a token outside the vocabulary; the directory holds
        something else, or a damaged shard.
    """
    vocab = teacher.config.vocab_size
    if not 2 <= k <= vocab:
        raise ValueError(f"k={k} is outside 2 to {vocab}, the words of the vocabulary")
    if not (tokens.size and tokens.min() >= 0 and tokens.max() < vocab):
        raise ValueError(
            f"windows of shape {tokens.shape} with token ids up to {tokens.max(initial=-1)} for a "
            f"vocabulary of {vocab}; the text was tokenized for another model, or is empty"
        )
    windows, time = tokens.shape
    per_shard = max(SHARD_TOKENS // time, 1)
    header = {
        "version": VERSION,
        "teacher_sha256": teacher_digest(teacher),
        "tokens_sha256": tokens_digest(tokens),
        "windows": windows,
        "time": time,
        "k": k,
        "vocab": vocab,
        "dtype": teacher.config.compute_dtype,
        "shard_windows": per_shard,
    }
    path = pathlib.Path(path)
    _claim(path, header)
    cache = TeacherCache(path, windows, time, k, vocab, per_shard)
    shards, head = -(-windows // per_shard), None
    if progress:
        progress(0, shards)
    for shard in range(shards):
        here = tokens[shard * per_shard : (shard + 1) * per_shard]
        if not _shard(path, shard).exists():
            head = head or open_head(teacher)
            data = _pack(_top_words(teacher, head, here, k, batch), vocab)
            whole = lambda file, data=data: file.write(data + hashlib.sha256(data).digest())  # noqa: E731
            write_whole(_shard(path, shard), whole)
        else:
            _check_shard(_shard(path, shard), here.size * cache.bytes_per_token)
        if progress:
            progress(shard + 1, shards)
    log.info(
        "teacher's top %d words of %d tokens: %d bytes a token, %.1f MB",
        *(k, tokens.size, cache.bytes_per_token, cache.bytes / 1e6),
    )
    return cache


def teacher_digest(model: Decoder) -> str:
    """sha256 of the names and hashes of all leaves; wherever a block lives, the same."""
    digest = hashlib.sha256()

    def add(prefix: str, hashes: dict[str, str]) -> None:
        for name in sorted(hashes):
            digest.update(f"{prefix}{name} {hashes[name]}\n".encode())

    add("", _hashes(model.replace(blocks=())))
    for i, block in enumerate(model.blocks):
        stored = isinstance(block, StoredTree)
        known = {n: info.sha256 for n, info in block.contents.leaves.items()} if stored else None
        add(f"blocks.{i}.", known or _hashes(load_block(block)))
    return digest.hexdigest()


def tokens_digest(tokens: Int[np.ndarray, "windows time"]) -> str:
    """sha256 of the shape and the token ids."""
    return hashlib.sha256(f"{tokens.shape}".encode() + tokens.astype("<i4").tobytes()).hexdigest()


def _hashes(tree: Any) -> dict[str, str]:
    return {n: leaf_info(n, np.asarray(leaf)).sha256 for n, leaf in named_leaves(tree).items()}


def _top_words(
    teacher: Decoder, head: Head, tokens: np.ndarray, k: int, batch: int
) -> list[TopWords]:
    """One streamed pass; batches in order."""
    hidden = run_blocks(teacher, embed_batches(teacher, tokens, batch))
    return map_batches(lambda x: TopWords(*map(np.asarray, top_words(head, x, k))), hidden)


@functools.partial(jax.jit, static_argnames="k")
def top_words(
    head: Head, x: Float[Array, "batch time d_model"], k: int
) -> tuple[Int[Array, "batch time k"], Float[Array, "batch time k"], Float[Array, "batch time"]]:
    """The k most likely next words, their log-probabilities, and the log of the mass outside.

    Logits exist for `HEAD_ROWS` positions at a time. The highest of every `GROUP` words decides
    which k groups can hold one of the k words; only these are sorted.
    """
    batch, time, width = x.shape
    rows = rms_norm(head.norm, x).reshape(-1, width)
    tile = min(HEAD_ROWS, len(rows))
    rows = jnp.pad(rows, ((0, -len(rows) % tile), (0, 0)))

    def one(h: Array) -> tuple[Array, Array, Array]:
        axes = ((1,), (1,)), ((), ())
        logits = jax.lax.dot_general(h, head.w, axes, preferred_element_type=jnp.float32)
        logits = logits if head.b is None else logits + head.b
        best, words = _top(logits, k)
        # The support holds the highest logit, so this sum cannot overflow.
        total = jnp.sum(jnp.exp(logits - best[:, :1]), axis=1, keepdims=True)
        log_p = best - best[:, :1] - jnp.log(total)
        rest = jnp.maximum(1 - jnp.sum(jnp.exp(log_p), axis=1), LEAST_REST)
        return words, log_p, jnp.log(rest)

    def whole(a: Array) -> Array:
        flat = a.reshape(-1, *a.shape[2:])[: batch * time]
        return flat.reshape(batch, time, *flat.shape[1:])

    return tuple(map(whole, jax.lax.map(one, rows.reshape(-1, tile, width))))


def _top(logits: Float[Array, "rows vocab"], k: int) -> tuple[Array, Array]:
    """`jax.lax.top_k` of many words."""
    rows, vocab = logits.shape
    if vocab <= GROUP * k:
        return jax.lax.top_k(logits, k)
    grouped = jnp.pad(logits, ((0, 0), (0, -vocab % GROUP)), constant_values=-jnp.inf)
    grouped = grouped.reshape(rows, -1, GROUP)
    _, groups = jax.lax.top_k(jnp.max(grouped, axis=2), k)
    candidates = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(rows, -1)
    best, at = jax.lax.top_k(candidates, k)
    return best, jnp.take_along_axis(groups, at // GROUP, axis=1) * GROUP + at % GROUP


def _pack(batches: list[TopWords], vocab: int) -> bytes:
    """All windows in their order on disk."""
    word = _word_type(vocab)
    return b"".join(
        part.astype(kind).tobytes()
        for batch in batches
        for window in zip(*batch, strict=True)
        for part, kind in zip(window, (word, "<f2", "<f2"), strict=True)
    )


def _unpack(data: bytes, time: int, k: int, vocab: int) -> TopWords:
    word = _word_type(vocab)
    ends = np.cumsum([time * k * word.itemsize, time * k * 2])
    words = np.frombuffer(data[: ends[0]], word).reshape(time, k).astype(np.int32)
    log_p = np.frombuffer(data[ends[0] : ends[1]], "<f2").reshape(time, k).astype(np.float32)
    return TopWords(words, log_p, np.frombuffer(data[ends[1] :], "<f2").astype(np.float32))


def _word_type(vocab: int) -> np.dtype:
    return np.dtype("<u2" if vocab <= 2**16 else "<i4")


def _shard(path: pathlib.Path, shard: int) -> pathlib.Path:
    return path / f"shard.{shard:05d}.bin"


def _claim(path: pathlib.Path, header: dict[str, Any]) -> None:
    """Makes the directory this cache's own, or finds that it is."""
    path.mkdir(parents=True, exist_ok=True)
    place = path / HEADER
    if not place.exists():
        if others := [p.name for p in path.iterdir() if not p.name.endswith(".tmp")]:
            raise ValueError(
                f"{path} holds {others[0]} and no {HEADER}: it is no teacher's cache; choose an "
                "empty directory"
            )
        part = place.with_suffix(".tmp")
        write_sealed(part, header)
        part.rename(place)
        return
    found = read_sealed(place)
    names = {
        "teacher_sha256": "another model",
        "tokens_sha256": "another text",
        "vocab": f"a vocabulary of {found.get('vocab')} words instead of {header['vocab']}",
        "k": f"k={found.get('k')} instead of {header['k']}",
        "windows": f"{found.get('windows')} windows instead of {header['windows']}",
        "time": f"windows of {found.get('time')} tokens instead of {header['time']}",
        "dtype": f"a teacher in {found.get('dtype')} instead of {header['dtype']}",
        "version": f"version {found.get('version')} of the format instead of {VERSION}",
    }
    if differs := [said for name, said in names.items() if found.get(name) != header[name]]:
        raise ValueError(
            f"{path} is the cache of a teacher with {', '.join(differs)}; choose another directory "
            "or remove this one"
        )
    if found["shard_windows"] != header["shard_windows"]:
        raise ValueError(f"{path} was written in shards of another size; remove it")
    stray = [p.name for p in path.iterdir() if not re.fullmatch(r"shard\.\d{5}\.bin", p.name)]
    if unknown := [n for n in stray if n != HEADER and not n.endswith(".tmp")]:
        raise ValueError(f"{path} holds {unknown[0]}, which is no part of a cache; move it away")


def _check_shard(path: pathlib.Path, size: int) -> None:
    data = path.read_bytes()
    if len(data) != size + DIGEST:
        raise ValueError(
            f"{path} has {len(data)} bytes and should have {size + DIGEST}: it is cut or from "
            "another cache; remove the file, and only this shard is made again"
        )
    if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
        raise ValueError(
            f"{path} is not what was written: it is damaged; remove the file, and only this shard "
            "is made again"
        )


def _check_distribution(found: TopWords, vocab: int, where: str) -> None:
    words, log_p, _ = found
    mass = np.exp(log_p).sum(-1)
    problems = {
        f"the word {words.max()} of a vocabulary of {vocab}": words.max() >= vocab,
        "a word below 0": words.min() < 0,
        "a log-probability that is NaN": np.isnan(log_p).any(),
        "a log-probability above 0": (log_p > 0).any(),
        "log-probabilities that rise": (np.diff(log_p) > 0).any(),
        f"a mass of {mass.max():.4f} on {log_p.shape[-1]} words": (mass > 1 + ROUNDING).any(),
    }
    if said := [what for what, wrong in problems.items() if wrong]:
        raise ValueError(f"{where} holds {said[0]}; the cache is no teacher's output, remove it")
