"""Speed of one model on this machine, and the bytes and bandwidth to read it against.

Decoding a few sequences reads all weights and all cached keys and values for every token, and does
little with them: bytes a step over the bandwidth of memory is the time that no program can beat.
"""

import concurrent.futures
import dataclasses
import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.generate import generate_tokens
from jaxcomp.models.sizes import cache_sizes


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed: `batch` prompts of `prompt` random tokens, then `new` tokens of each."""

    batch: int = 1
    prompt: int = 512
    new: int = 64

    def __post_init__(self):
        for name, least in (("batch", 1), ("prompt", 1), ("new", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")


def measure(model: Decoder, work: Workload) -> dict[str, float]:
    """One run of greedy generation; the first of a workload also compiles.

    Args:
      model: prepared by `models.prepare`, or that is done anew in every run.

    Returns:
      `first_token_s`; `prefill_tokens_per_s` of all sequences, the first new token included;
      `decode_tokens_per_s` of all sequences, without compiling; `step_s` of one token of each;
      `compile_s`.

    Raises:
      ValueError: the workload does not fit the model's context.
    """
    rng = np.random.default_rng(0)
    shape = work.batch, work.prompt
    tokens = rng.integers(0, model.config.vocab_size, shape, dtype=np.int32)
    speed = generate_tokens(model, tokens, work.new).speed
    return {
        "first_token_s": speed.first_token_seconds,
        "prefill_tokens_per_s": speed.prompt_tokens / speed.first_token_seconds,
        "decode_tokens_per_s": speed.decode_tokens / speed.decode_seconds,
        "step_s": speed.decode_seconds / (work.new - 1),
        "compile_s": speed.compile_seconds,
    }


def weight_bytes(model: Decoder) -> int:
    """Bytes of the weights that a decoding step reads, in the form they are held in.

    All but the embedding's table, of which a token reads one row; unless the head is tied to it.
    """
    head = model.embed if model.lm_head is None else model.lm_head
    return sum(map(leaf_bytes, jax.tree.leaves((model.blocks, model.norm, head))))


def step_bytes(model: Decoder, work: Workload) -> float:
    """Bytes that a decoding step has to read: weights once, and the caches as they are half way."""
    filled = work.prompt + work.new // 2
    return weight_bytes(model) + work.batch * cache_sizes(model, filled)["cache_bytes"]


def leaf_bytes(a: Any) -> int:
    """Bytes of an array in memory, where two int4 share one."""
    bits = jnp.iinfo(a.dtype).bits if jnp.issubdtype(a.dtype, jnp.integer) else 8 * a.dtype.itemsize
    return -(-a.size * bits // 8)


def bandwidth(size: int, repeats: int = 5) -> dict[str, float]:
    """Bytes a second that this machine's memory gives: the best of `repeats`.

    Args:
      size: bytes of each of three arrays, more than any cache holds.

    Returns:
      `triad`: a = b + s·c on the default device, three arrays' bytes; on a CPU also `read`, the
      largest number of an array, looked for by a thread a core.
    """
    length = size // 4
    a, b, c = (jnp.full(length, value, jnp.float32) for value in (0.0, 1.0, 2.0))
    best = {"triad": 0.0}
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a = jax.block_until_ready(_triad(a, b, c))
        best["triad"] = max(best["triad"], 3 * 4 * length / (time.perf_counter() - start))
    if b.devices().pop().platform == "cpu":
        best["read"] = max(_read(np.asarray(b)) for _ in range(repeats + 1))
    return best


@functools.partial(jax.jit, donate_argnums=0)
def _triad(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return b + 3.0 * c


def _read(x: np.ndarray) -> float:
    cores = usable_cores()
    parts = np.array_split(x, 8 * cores)
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        list(pool.map(len, parts))  # the threads are there
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return x.nbytes / (time.perf_counter() - start)


def usable_cores() -> int:
    """Cores that this process may run on, which a container can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
