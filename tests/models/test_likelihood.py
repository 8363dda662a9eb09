import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import artefact
from jaxcomp.models import likelihood
from jaxcomp.models.decoder import forward
from jaxcomp.models.likelihood import Request, bucket, buckets, make_request, score
from jaxcomp.models.rope import depends_on_length
from jaxcomp.models.stream import block_step_at
from tests import tiny

LIMIT = 64
whole_forward = jax.jit(forward)


@pytest.fixture(scope="module", params=["llama", "mistral"], ids=["plain", "window"])
def model(request):
    return tiny.model(request.param, jax.random.key(0))


@pytest.fixture(scope="module")
def requests():
    """Of many lengths, some too long, some with equal inputs."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, tiny.VOCAB, n).tolist()  # noqa: E731
    sizes = [(1, 1), (3, 5), (14, 3), (20, 1), (40, 2), (60, 4), (70, 6), (2, 60), (17, 2)]
    pairs = [(draw(n), draw(m)) for n, m in sizes]
    same = draw(9)
    pairs += [(same, draw(1)) for _ in range(3)] + [(same[:7], [*same[7:], *draw(1)])]
    return [make_request(*pair, LIMIT) for pair in pairs]


@pytest.fixture
def embedded(monkeypatch):
    """Shapes of the batches of tokens that are embedded."""
    shapes, embed = [], likelihood.embed_batches

    def noted(model, tokens, batch):
        shapes.append(tokens.shape)
        return embed(model, tokens, batch)

    monkeypatch.setattr(likelihood, "embed_batches", noted)
    return shapes


def last_logits(model, ids, count=1):
    """Logits at the last positions, from the whole forward pass, padded on the left."""
    pad = LIMIT - len(ids)
    logits = whole_forward(model, np.pad(ids, (pad, 0))[None], (np.arange(LIMIT) >= pad)[None])
    return np.asarray(logits, np.float64)[0, -count:]


def brute_force(model, request):
    """Log-likelihood and greedy flag of one request by itself, from the whole softmax."""
    logits = last_logits(model, request.inputs, len(request.targets))
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    found = np.take_along_axis(log_p, request.targets[:, None], -1)
    return found.sum(), bool((logits.argmax(-1) == request.targets).all())


def test_scores_are_those_of_every_request_by_itself(model, requests):
    found = score(model, requests, batch=4)
    wanted = [brute_force(model, request) for request in requests]
    np.testing.assert_allclose(found.log_likelihood, [w for w, _ in wanted], atol=2e-4)
    assert found.greedy.tolist() == [greedy for _, greedy in wanted]


def test_the_greedy_continuation_is_recognised(model):
    ids = [5, 9, 200]
    for _ in range(3):
        ids.append(int(last_logits(model, ids)[-1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % tiny.VOCAB]
    found = score(model, [make_request(x[:3], x[3:], LIMIT) for x in (ids, other)])
    assert found.greedy.tolist() == [True, False]


def test_batches_and_chunks_change_nothing(model, requests, monkeypatch):
    whole = score(model, requests, batch=16)
    monkeypatch.setattr(likelihood, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(likelihood, "LEAST", 32)
    monkeypatch.setattr(likelihood, "HEAD_ROWS", 5)
    seen = []
    small = score(model, requests, batch=2, progress=lambda b: (seen.append(1) or x for x in b))
    np.testing.assert_allclose(small.log_likelihood, whole.log_likelihood, atol=1e-4)
    assert small.greedy.tolist() == whole.greedy.tolist()
    assert len(seen) > len(model.blocks)  # more than one chunk


def test_a_block_compiles_once_for_every_bucket(model, requests):
    rng = np.random.default_rng(1)
    many = [
        Request(rng.integers(0, tiny.VOCAB, n).astype(np.int32), np.array([1], np.int32))
        for n in rng.integers(1, LIMIT + 1, 100)
    ]
    block_step_at.clear_cache()
    score(model, many, batch=8)
    assert block_step_at._cache_size() == len(buckets(many, 8)) == 2
    score(model, many[::-1], batch=8)
    assert block_step_at._cache_size() == 2


def test_a_bucket_is_little_longer_than_what_it_holds():
    for n in range(1, 8193):
        assert n <= bucket(n) <= max(16, 1.25 * n + 15)
    assert len({bucket(n) for n in range(1, 8193)}) < 40


def test_what_requests_have_in_common_is_computed_once(model, embedded):
    few_shots = list(range(40))
    requests = [make_request([*few_shots, 40 + i], [i, i + 1], LIMIT) for i in range(20)]
    found = score(model, requests)
    wanted = [brute_force(model, request)[0] for request in requests]
    np.testing.assert_allclose(found.log_likelihood, wanted, atol=2e-4)
    assert embedded == [(1, bucket(40 + 20 * 2))]


def test_a_rope_that_depends_on_the_length_keeps_every_input_by_itself():
    model = tiny.model("phi3", jax.random.key(0))
    assert depends_on_length(model.blocks[0].attn.rope)
    short, long = [1, 2, 3], [1, 2, 3, *range(20)]  # on both sides of where factors change
    requests = [make_request(x, [4, i], LIMIT) for x in (short, long) for i in (5, 6)]
    assert buckets(requests, 2, alone=True) == [32, 16]
    found = score(model, requests, batch=2)
    np.testing.assert_allclose(
        found.log_likelihood, [brute_force(model, request)[0] for request in requests], atol=2e-4
    )


def test_inputs_that_are_equal_share_a_pass(model, embedded):
    context = [3, 4, 5]
    requests = [make_request(context, [token], LIMIT) for token in range(20)]
    found = score(model, requests)
    wanted = [brute_force(model, request)[0] for request in requests]
    np.testing.assert_allclose(found.log_likelihood, wanted, atol=1e-4)
    assert embedded == [(1, 16)]


def test_what_does_not_fit_is_cut_at_the_left():
    request = make_request(range(10), [10, 11], 6)
    assert request.inputs.tolist() == [5, 6, 7, 8, 9, 10] and request.targets.tolist() == [10, 11]
    assert request.cut == 5 and make_request(range(5), [10, 11], 6).cut == 0


@pytest.mark.parametrize(
    ("context", "targets", "message"),
    [
        ([], [1], "0 tokens of context and 1 to score"),
        ([1], [], "1 tokens of context and 0 to score"),
        ([1], range(7), r"7 tokens to score exceed the model's context of 6"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(context, targets, message):
    with pytest.raises(ValueError, match=message):
        make_request(context, targets, 6)


def test_nothing_to_score_and_nan_are_refused(model, requests):
    with pytest.raises(ValueError, match="0 requests in batches of 16"):
        score(model, [])
    broken = model.replace(norm=model.norm.replace(weight=model.norm.weight.at[3].set(jnp.nan)))
    with pytest.raises(ValueError, match=r"2 of 2 log-likelihoods are NaN .* inspect --check"):
        score(broken, requests[:2])


def test_blocks_on_disk_are_scored_as_blocks_in_memory(model, requests, tmp_path):
    artefact.save(model, tmp_path / "out")
    lazy = artefact.load(tmp_path / "out", lazy=True)
    assert all(dataclasses.is_dataclass(b) and hasattr(b, "load") for b in lazy.blocks)
    np.testing.assert_array_equal(
        score(lazy, requests).log_likelihood, score(model, requests).log_likelihood
    )
