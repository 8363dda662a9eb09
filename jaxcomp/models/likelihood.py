"""How likely a model finds given tokens after others: many requests, few compiled shapes.

    requests ─▶ inputs, equal ones once ─▶ those that begin alike in one sequence (`models.shared`)
    sequences, longest first, a batch at a time, padded to a bucket
    blocks outside, batches inside          one block in memory (`models.stream`)
    hidden states that predict a target ─▶ head, `HEAD_ROWS` at a time

A block compiles once for every bucket that occurs (`buckets`), the head once. Models whose rotary
embedding depends on the length of a sequence get every input in a call of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcomp.models.config import ModelConfig
from jaxcomp.models.decoder import Decoder, block_struct
from jaxcomp.models.head import open_head, token_scores
from jaxcomp.models.rope import depends_on_length
from jaxcomp.models.shared import Shared, padded, share
from jaxcomp.models.stream import Hidden, block_step_at, embed_batches, map_batches, run_blocks
from jaxcomp.models.text import Encode, Ids, encode_pair

CHUNK_TOKENS = 2**17  # tokens whose hidden states are on the host at once
HEAD_ROWS = 512  # hidden states that go through the head at once
SMALLEST = 16  # tokens of the smallest bucket
LEAST = 1024  # tokens of a sequence that texts may fill, where two of the longest are less

Batch = tuple[list[Shared], int]  # sequences, and the length they are padded to


class Request(NamedTuple):
    """Tokens to score: the last position of `inputs` predicts the last of `targets`, and so on.

    Attributes:
      inputs: what the model reads: context and targets, without the last target.
      targets: at least one, at most as many as `inputs`.
      cut: tokens of the context that were dropped to make `inputs` fit.
    """

    inputs: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " m"]
    cut: int = 0


class Scores(NamedTuple):
    """What `score` found.

    Attributes:
      log_likelihood: Σ log p(target) of each request in nats, float64.
      greedy: whether every target of a request is the most likely token in its place.
    """

    log_likelihood: Float[np.ndarray, " requests"]
    greedy: Bool[np.ndarray, " requests"]


class _Due(NamedTuple):
    """Predictions to look up, flat: of which request, where its hidden state is, and the token."""

    request: Int[np.ndarray, " due"]
    batch: Int[np.ndarray, " due"]
    row: Int[np.ndarray, " due"]
    position: Int[np.ndarray, " due"]
    target: Int[np.ndarray, " due"]


def make_request(context: Ids, targets: Ids, limit: int) -> Request:
    """The request that scores `targets` after `context`, which is cut to `limit` inputs in all.

    Raises:
      ValueError: no context or no target, or more targets than `limit`.
    """
    if not (len(context) and len(targets)):
        raise ValueError(
            f"{len(context)} tokens of context and {len(targets)} to score; it takes at least 1 of "
            "each"
        )
    if len(targets) > limit:
        raise ValueError(
            f"{len(targets)} tokens to score exceed the model's context of {limit}; only what "
            "comes before them can be cut"
        )
    inputs = np.asarray([*context, *targets[:-1]], np.int32)
    return Request(inputs[-limit:], np.asarray(targets, np.int32), max(len(inputs) - limit, 0))


def pair_requests(
    config: ModelConfig, encode: Encode, pairs: Iterable[tuple[str, str]]
) -> list[Request]:
    """The requests that score the continuation of every pair (context, continuation) of texts."""
    limit = config.context_length
    return [make_request(*encode_pair(config, encode, *pair), limit) for pair in pairs]


def score(
    model: Decoder,
    requests: Sequence[Request],
    batch: int = 16,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Scores:
    """Log-likelihoods of the targets of every request, in the order of `requests`.

    Args:
      model: blocks may be behind handles.
      requests: those with equal inputs, such as choices of one token, share a pass.
      batch: so many of the longest inputs are as much as a compiled call works on.
      progress: wraps the blocks to show how far it is, for every chunk of tokens anew.

    Raises:
      ValueError: no requests, or a loss that is not finite.
    """
    if not requests or batch < 1:
        raise ValueError(f"{len(requests)} requests in batches of {batch}; give at least 1 of each")
    inputs, askers = _unique(requests)
    head, alone = open_head(model), _alone(model)
    log_likelihood, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    groups = _batches(inputs, batch, alone)
    rows = max(len(sequences) for sequences, _ in groups)
    for batches in _chunks(groups):
        laid = [padded(sequences, rows, length) for sequences, length in batches]
        hidden = [h for tokens, _ in laid for h in embed_batches(model, tokens, rows)]
        contexts = [context for _, context in laid]
        hidden = run_blocks(model, hidden, progress, block_step_at, contexts)

        def look_up(due: _Due, hidden: Hidden = hidden) -> tuple[np.ndarray, np.ndarray]:
            places = zip(due.batch, due.row, due.position, strict=True)
            states = np.stack([hidden[b][r, p] for b, r, p in places])
            spare = HEAD_ROWS - len(states)
            states, targets = np.pad(states, ((0, spare), (0, 0))), np.pad(due.target, (0, spare))
            return tuple(
                np.asarray(a)[: len(due.target)] for a in token_scores(head, states, targets)
            )

        pieces = list(_pieces(batches, askers, requests))
        for due, (nll, best) in zip(pieces, map_batches(look_up, pieces), strict=True):
            np.subtract.at(log_likelihood, due.request, nll)
            np.logical_and.at(greedy, due.request, best)
    if bad := int(np.sum(~np.isfinite(log_likelihood))):
        raise ValueError(
            f"{bad} of {len(requests)} log-likelihoods are NaN or infinite: the model holds or "
            "makes such numbers; `jaxcomp inspect --check` names the block"
        )
    return Scores(log_likelihood, greedy)


def buckets(requests: Sequence[Request], batch: int, alone: bool = False) -> list[int]:
    """The lengths for which `score` has a block compiled, longest first.

    Args:
      alone: whether every input has a call of its own.
    """
    inputs, _ = _unique(requests)
    return list(dict.fromkeys(length for _, length in _batches(inputs, batch, alone)))


def bucket(tokens: int) -> int:
    """The length to which a sequence is padded, a quarter more at most."""
    step = max(SMALLEST, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


def _alone(model: Decoder) -> bool:
    return any(depends_on_length(block_struct(b).attn.rope) for b in model.blocks)


def _unique(requests: Iterable[Request]) -> tuple[list[np.ndarray], list[list[int]]]:
    """Inputs that differ, and for each the requests that ask it."""
    askers: dict[bytes, list[int]] = {}
    inputs = []
    for i, request in enumerate(requests):
        key = request.inputs.tobytes()
        if key not in askers:
            inputs.append(request.inputs)
        askers.setdefault(key, []).append(i)
    return inputs, list(askers.values())


def _batches(inputs: Sequence[np.ndarray], batch: int, alone: bool) -> list[Batch]:
    longest = max(map(len, inputs))
    capacity = 0 if alone else max(2 * longest, LEAST)
    rows = 1 if alone else max(batch * longest // capacity, 1)
    sequences = sorted(share(inputs, capacity), key=lambda s: -len(s.tokens))
    groups = [sequences[i : i + rows] for i in range(0, len(sequences), rows)]
    return [(group, bucket(len(group[0].tokens))) for group in groups]


def _chunks(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Batches whose hidden states are on the host together."""
    chunk, tokens = [], 0
    for sequences, length in batches:
        size = len(sequences) * length
        if chunk and tokens + size > CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append((sequences, length))
        tokens += size
    yield chunk


def _pieces(
    batches: Sequence[Batch],
    askers: Sequence[list[int]],
    requests: Sequence[Request],
) -> Iterator[_Due]:
    """All predictions that are due in these batches, `HEAD_ROWS` or fewer at a time."""
    due: list[list[np.ndarray]] = [[] for _ in _Due._fields]
    for b, (sequences, _) in enumerate(batches):
        for row, sequence in enumerate(sequences):
            for i, slots in sequence.slots.items():
                for r in askers[i]:
                    m = len(requests[r].targets)
                    facts = (r, b, row, slots[-m:], requests[r].targets)
                    for column, fact in zip(due, facts, strict=True):
                        column.append(np.broadcast_to(fact, m))
    whole = [np.concatenate(column) for column in due]
    for start in range(0, len(whole[0]), HEAD_ROWS):
        yield _Due(*(column[start : start + HEAD_ROWS] for column in whole))
