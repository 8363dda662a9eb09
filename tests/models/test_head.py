import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QuantSpec, dequantize, quantize
from jaxcomp.models import head
from jaxcomp.models.decoder import head_logits
from jaxcomp.models.head import next_token_gap, open_head, token_scores
from tests import tiny

TARGETS = np.asarray(tiny.tokens(jax.random.key(1), 3, 7))
X, Y = (jax.random.normal(jax.random.key(i), (3, 7, 32)) for i in (2, 3))


@pytest.fixture(params=[7, 64, 10**6])
def chunk(request, monkeypatch):
    """Words a chunk; 320 is no multiple of 7, and all fit the last."""
    monkeypatch.setattr(head, "VOCAB_CHUNK", request.param)
    for function in (token_scores, next_token_gap):
        function.clear_cache()  # the chunk is not part of the compilation key
    yield request.param
    for function in (token_scores, next_token_gap):
        function.clear_cache()


@pytest.fixture(scope="module", params=["qwen2", "mistral"], ids=["tied head", "own head"])
def models(request):
    return [tiny.model(request.param, jax.random.key(i)) for i in (0, 1)]


def log_probabilities(model, x):
    """log softmax of the whole logits, float64."""
    logits = np.asarray(head_logits(model, x), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def at(log_p, targets):
    return np.take_along_axis(log_p, targets[..., None], -1)[..., 0]


def test_scores_are_those_of_the_whole_softmax_whatever_the_chunk(models, chunk):
    log_p = log_probabilities(models[0], X)
    best = log_p.argmax(-1).astype(np.int32)
    mixed = np.where(TARGETS % 2, TARGETS, best)
    found = token_scores(open_head(models[0]), X, mixed)
    np.testing.assert_allclose(found.nll, -at(log_p, mixed), rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found.greedy, mixed == best)
    assert 0 < found.greedy.mean() < 1


def test_the_gap_of_two_models_is_that_of_their_whole_distributions(models, chunk):
    p, q = log_probabilities(models[0], X), log_probabilities(models[1], Y)
    found = next_token_gap(*map(open_head, models), X, Y, TARGETS)
    np.testing.assert_allclose(found.kl, np.sum(np.exp(p) * (p - q), -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.agree, p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(found.teacher_nll, -at(p, TARGETS), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found.student_nll, -at(q, TARGETS), rtol=2e-5, atol=2e-5)


def test_a_model_has_no_gap_to_itself(models):
    here = open_head(models[0])
    found = next_token_gap(here, here, X, X, TARGETS)
    assert found.agree.all() and float(found.kl.max()) < 1e-5 and float(found.kl.min()) >= 0


def test_a_head_may_be_quantized_and_have_a_bias():
    model = tiny.model("mistral", jax.random.key(0))
    w = quantize(model.lm_head.w, QuantSpec(4))
    bias = jax.random.normal(jax.random.key(3), (model.config.vocab_size,))
    log_p = log_probabilities(model.replace(lm_head=Linear(dequantize(w), bias)), X)
    found = token_scores(open_head(model.replace(lm_head=Linear(w, bias))), X, TARGETS)
    np.testing.assert_allclose(found.nll, -at(log_p, TARGETS), rtol=2e-5, atol=2e-5)


def test_nan_in_a_hidden_state_stays_nan(models):
    found = token_scores(open_head(models[0]), X.at[1, 2, 3].set(jnp.nan), TARGETS)
    assert np.isnan(found.nll).sum() == 1 and np.isnan(found.nll[1, 2])
