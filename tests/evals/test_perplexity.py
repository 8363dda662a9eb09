import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.data.batches import evaluation_windows
from jaxcomp.evals import perplexity
from jaxcomp.evals.perplexity import Perplexity, window_nll
from jaxcomp.models.decoder import forward, map_blocks
from tests import tiny

TOKENS = np.asarray(tiny.tokens(jax.random.key(1), 5, 16))


def naive_nll(model, tokens):
    """−log softmax of the full forward at the next token, float64."""
    logits = np.asarray(jax.jit(forward)(model, tokens), np.float64)[:, :-1]
    highest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    return log_sum - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]


@pytest.fixture(params=["qwen2", "mistral"], ids=["tied head", "own head"])
def model(request):
    made = tiny.model(request.param, jax.random.key(0))
    assert (made.lm_head is None) == (request.param == "qwen2")
    return made


def test_the_loss_is_that_of_the_whole_softmax(model):
    found = window_nll(model, TOKENS, batch=2)
    np.testing.assert_allclose(found, naive_nll(model, TOKENS), rtol=2e-5, atol=2e-5)


def test_batches_and_chunks_of_tokens_change_nothing(model, monkeypatch):
    whole = window_nll(model, TOKENS, batch=5)
    monkeypatch.setattr(perplexity, "CHUNK_TOKENS", 32)
    np.testing.assert_allclose(window_nll(model, TOKENS, batch=2), whole, rtol=1e-5, atol=1e-5)


def test_perplexity_counts_just_the_predictions_of_its_windows(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x" * 100)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 100).astype(np.int32)
    for stride, tokens in ((None, None), (None, 45), (8, None), (5, 33)):
        numbers = Perplexity(str(text), context=16, stride=stride, tokens=tokens)(
            model, lambda _: ids
        )
        windows = evaluation_windows(ids, 16, stride, tokens)
        mean = naive_nll(model, windows.tokens)[windows.score].mean()
        assert (
            numbers["tokens"] == windows.score.sum() == (tokens or 99 if stride else tokens or 93)
        )
        assert numbers["nll"] == pytest.approx(mean, rel=1e-5)
        assert numbers["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)


def test_a_model_that_makes_nan_is_refused_with_a_way_to_find_the_block(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x" * 100)
    broken = model.replace(norm=model.norm.replace(weight=model.norm.weight * jnp.nan))
    with pytest.raises(ValueError, match=r"text\.txt.*nan.*inspect --check"):
        Perplexity(str(text), context=16)(broken, lambda _: np.arange(100, dtype=np.int32))


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_loss_through_a_packed_cache_is_that_of_the_simulation(model, chunk):
    spec = QuantSpec(3, granularity="head", symmetric=False, dynamic=True)
    sites = dict.fromkeys(("k_cache", "v_cache"), Site(ActQuantizer(spec)))
    packed = map_blocks(model, lambda _, b: b.replace(sites=sites))
    found = window_nll(packed, TOKENS, batch=5, through_cache=chunk)
    np.testing.assert_allclose(found, naive_nll(packed, TOKENS), atol=1e-3)


def test_perplexity_through_a_cache_tells_its_bits_and_its_name(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x" * 100)
    evaluation = Perplexity(str(text), context=16, through_cache=4)
    numbers = evaluation(model, lambda _: np.arange(100, dtype=np.int32))
    whole = Perplexity(str(text), context=16)(model, lambda _: np.arange(100, dtype=np.int32))
    assert numbers["nll"] == pytest.approx(whole["nll"], rel=1e-4)
    assert numbers["bits_per_cached_value"] == 32 and "bits_per_cached_value" not in whole
    assert evaluation.name == "perplexity text.txt @16 by 4 through the cache"
    with pytest.raises(ValueError, match="through_cache=0 is below 1"):
        Perplexity(through_cache=0)


def test_the_name_tells_apart_what_gives_other_numbers():
    assert Perplexity().name == "perplexity wiki_eval @1024"
    assert (
        Perplexity(stride=512, tokens=99).name == "perplexity wiki_eval @1024 stride 512 first 99"
    )
    assert Perplexity(batch=4).name == Perplexity().name
    cached = Perplexity(through_cache=8, tokens=99)
    assert cached.name == "perplexity wiki_eval @1024 by 8 through the cache first 99"
