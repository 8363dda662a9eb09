"""Generation: prompts in, the tokens that follow each of them out.

`generate_tokens` is for prompts that are known at once, `Conversation` for prompts each of which
begins as the one before went on. The work is `Session`'s; here sequences end and are collected.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.finite import explain_not_finite
from jaxcomp.models.prepare import prepare
from jaxcomp.models.rope import depends_on_length
from jaxcomp.models.sampling import Sampling
from jaxcomp.models.session import NOT_FINITE, Session

Stop = Literal["end", "length", "caller"]
OnToken = Callable[[np.ndarray], bool | None]


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a generation took, on the clock of the host.

    Attributes:
      prompt_tokens: fed, without padding and without those that a cache held already.
      new_tokens: of all sequences.
      first_token_seconds: until the first token of every sequence was there, compiling included.
      decode_tokens, decode_seconds: those after the first, and their time without compiling.
      compilations, compile_seconds: programs compiled or read from the compilation cache.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compilations: int = 0
    compile_seconds: float = 0.0

    def __add__(self, other: "Speed") -> "Speed":
        """Of two generations, one after the other; the first token is the earlier one's."""
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        first = self.first_token_seconds or other.first_token_seconds
        return dataclasses.replace(Speed(*(a + b for a, b in both)), first_token_seconds=first)


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """What follows each prompt.

    Attributes:
      tokens: of each prompt the new ones, int32, the token that ended it included.
      stops: why each ended: at an end token, at `max_tokens`, or because the caller said so.
    """

    tokens: tuple[np.ndarray, ...]
    stops: tuple[Stop, ...]
    speed: Speed


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray] | Int[np.ndarray, "batch time"],
    max_tokens: int,
    *,
    eos_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    on_token: OnToken | None = None,
    valid: Bool[np.ndarray, "batch time"] | None = None,
    rows: Sequence[int] | None = None,
) -> Generated:
    """Continues every prompt, greedily or by `sampling`; all of them are one batch.

    The batch is padded to a power of two, so that few sizes are compiled.

    Args:
      model: any; unless it is already, it is loaded and prepared for the kernels of the device
        (`models.prepare`).
      prompts: token ids of each, of any lengths; or an array, whose padding on either side `valid`
        marks with False.
      max_tokens: new tokens of a sequence at most.
      eos_ids: a sequence is over at any of these.
      on_token: called with the newest token of each sequence, int32 `[batch]`, where one that is
        over repeats its last; True ends them all.
      rows: numbers of the prompts, by which they draw their random numbers; by default 0, 1 …
        With the same number a prompt is continued alike in any batch.

    Raises:
      ValueError: an empty prompt, a prompt and `max_tokens` beyond the model's context, or logits
        that are not finite; then the message names the first block that gives no numbers.
    """
    if valid is not None:
        prompts = [row[real] for row, real in zip(prompts, valid, strict=True)]
    prompts = [np.asarray(ids, np.int32) for ids in prompts]
    for i, ids in enumerate(prompts):
        check_length(
            model, len(ids), max_tokens, f"prompt {i}" if len(prompts) > 1 else "the prompt"
        )
    if not prompts:
        return Generated((), (), Speed())
    model = prepare(model)
    longest = max(map(len, prompts))
    batch = 1 << (len(prompts) - 1).bit_length()
    session = Session(
        model,
        batch,
        horizon=longest + max_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        rows=_fill(list(range(len(prompts)) if rows is None else rows), batch),
    )
    return _run(session, prompts, prompts, max_tokens, eos_ids, on_token)


class Conversation:
    """Prompts each of which goes on where the one before ended, over one cache.

    What a prompt shares with the tokens in the cache is not computed again.
    """

    def __init__(
        self, model: Decoder, sampling: Sampling = Sampling(), eos_ids: Sequence[int] = ()
    ):
        self._session = Session(prepare(model), 1, sampling=sampling, eos_ids=eos_ids)
        self._eos_ids = eos_ids
        self._ids: list[int] = []  # tokens in the cache
        self._ends: list[int] = []  # slots filled when each of them was there

    def reply(
        self, ids: Sequence[int], max_tokens: int, on_token: OnToken | None = None
    ) -> Generated:
        """What follows `ids`, the whole conversation so far; as `generate_tokens` gives it."""
        session, ids = self._session, list(map(int, ids))
        check_length(session.model, len(ids), max_tokens, "the conversation")
        shared = self._shared(ids)
        session.rewind(self._ends[shared - 1] if shared else 0)
        session.horizon = len(ids) + max_tokens
        self._ids, self._ends = self._ids[:shared], self._ends[:shared]
        rest, whole = np.asarray(ids[shared:], np.int32), np.asarray(ids, np.int32)
        try:
            found = _run(session, [rest], [whole], max_tokens, self._eos_ids, on_token)
        except BaseException:  # an interrupt, too: what the cache holds is then unknown
            self._ids, self._ends = [], []
            raise
        (new,) = found.tokens
        fed = [*rest.tolist(), *new[:-1].tolist()]  # the last one was chosen and not fed
        end = session.prompt_end
        self._ids += fed
        self._ends += range(end - len(rest) + 1, end + len(new))
        return found

    def _shared(self, ids: list[int]) -> int:
        """Leading tokens that need not be fed again; the last one always is, for its logits."""
        if any(depends_on_length(b.attn.rope) for b in self._session.model.blocks):
            return 0
        pairs = zip(self._ids, ids[:-1], strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._ids), len(ids) - 1)
        )


def check_length(model: Decoder, length: int, max_tokens: int, what: str = "the prompt") -> None:
    """Refuses what does not fit into the model's context.

    Raises:
      ValueError: with the lengths, and what would fit.
    """
    limit = model.config.context_length
    if length == 0:
        raise ValueError(f"{what} has no tokens; give at least one, a BOS token for example")
    if length >= limit:
        raise ValueError(
            f"{what} has {length} tokens, which leave nothing of the model's context of {limit} to "
            f"generate; shorten it to {limit - 1} tokens or fewer"
        )
    if max_tokens < 1 or length + max_tokens > limit:
        raise ValueError(
            f"{what} has {length} tokens, and max_tokens={max_tokens} is not 1..{limit - length}, "
            f"what the model's context of {limit} leaves; lower max_tokens (--max-tokens) or "
            "shorten the prompt"
        )


def _run(
    session: Session,
    prompts: list[np.ndarray],
    whole: list[np.ndarray],
    max_tokens: int,
    eos_ids: Sequence[int],
    on_token: OnToken | None,
) -> Generated:
    """Feeds the prompts and collects what follows; `whole` are they and what the cache held."""
    start, eos_ids = time.perf_counter(), set(eos_ids)
    compiled = session.compilations, session.compile_seconds
    new: list[list[int]] = [[] for _ in prompts]
    stops: list[Stop | None] = [None] * len(prompts)
    before = whole[0][: len(whole[0]) - len(prompts[0])].tolist()
    first = session.prefill(*_padded(prompts, session.batch), max_tokens - 1, before)
    for newest in _as_they_come(session, first, max_tokens):
        if not new[0]:
            first_at, first_compile = time.perf_counter(), session.compile_seconds
        newest = newest[: len(prompts)]
        for i in (i for i, stop in enumerate(stops) if stop is None):
            if newest[i] == NOT_FINITE:
                ids = np.concatenate([whole[i], np.asarray(new[i], np.int32)])
                raise ValueError(explain_not_finite(session.model, ids))
            new[i].append(int(newest[i]))
            stops[i] = "end" if new[i][-1] in eos_ids else None
        if (on_token is not None and on_token(newest)) or None not in stops:
            break
    finished = "length" if len(max(new, key=len)) == max_tokens else "caller"
    total = sum(map(len, new))
    speed = Speed(
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=total,
        first_token_seconds=first_at - start,
        decode_tokens=total - len(prompts),
        decode_seconds=time.perf_counter() - first_at - (session.compile_seconds - first_compile),
        compilations=session.compilations - compiled[0],
        compile_seconds=session.compile_seconds - compiled[1],
    )
    tokens = tuple(np.asarray(ids, np.int32) for ids in new)
    return Generated(tokens, tuple(stop or finished for stop in stops), speed)


def _as_they_come(session: Session, first: jax.Array, count: int) -> Iterator[np.ndarray]:
    """Up to `count` newest tokens of all sequences; each is read while the next step runs."""
    yield np.asarray(first)  # before the step is compiled
    pending = session.step() if count > 1 else None
    for left in range(count - 2, -1, -1):
        following = session.step() if left else None
        yield np.asarray(pending)
        pending = following


def _padded(prompts: list[np.ndarray], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts side by side, padded on the left, and rows without any token up to `batch`."""
    width = max(map(len, prompts))
    tokens, valid = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
    for i, ids in enumerate(prompts):
        tokens[i, width - len(ids) :], valid[i, width - len(ids) :] = ids, True
    return tokens, valid


def _fill(rows: list[int], batch: int) -> list[int]:
    return rows + [0] * (batch - len(rows))
