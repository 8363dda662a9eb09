import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.models import sampling
from jaxcomp.models.sampling import Sampling, filtered

VOCAB = 700
sample = jax.jit(sampling.sample, static_argnames="settings")
SETTINGS = [
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.3, top_k=1),
    Sampling(1.0, top_k=40),
    Sampling(1.0, top_k=VOCAB + 5),
    Sampling(0.8, top_p=0.9),
    Sampling(2.0, top_p=0.35),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, min_p=0.1),
    Sampling(1.0, min_p=1.0),
    Sampling(0.0, repetition_penalty=1.4),
    Sampling(0.9, repetition_penalty=0.8),
    Sampling(0.7, top_k=50, top_p=0.8, min_p=0.02, repetition_penalty=1.2),
]


def random_logits(rows=8, spread=3.0):
    return np.random.default_rng(0).normal(0, spread, (rows, VOCAB)).astype(np.float32)


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def by_transformers(logits, seen_ids, settings):
    """What its own `generate` would draw from, as it puts its processors together."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GenerationConfig(
        do_sample=not settings.greedy,
        temperature=None if settings.greedy else settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p or None,
        repetition_penalty=settings.repetition_penalty,
    )
    config._eos_token_tensor = None
    tiny = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    owner = transformers.LlamaForCausalLM(tiny)
    process = owner._get_logits_processor(config, input_ids_seq_length=seen_ids.shape[1])
    return process(torch.tensor(seen_ids), torch.tensor(logits)).numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_filters_are_those_of_transformers(settings):
    logits = random_logits()
    ids = np.random.default_rng(1).integers(0, VOCAB, (len(logits), 30))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    found = np.asarray(filtered(logits, settings, seen))
    wanted = by_transformers(logits, ids, settings)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
    p, q = (np.asarray(jax.nn.softmax(x, axis=-1)) for x in (found, wanted))
    np.testing.assert_allclose(p, q, atol=1e-6)


def test_without_a_temperature_the_most_likely_token_is_taken_and_no_filter_matters():
    logits = random_logits()
    for settings in (Sampling(), Sampling(0.0, top_k=3, top_p=0.1, min_p=0.9, seed=5)):
        found = sample(logits, keys(8), settings)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, logits.argmax(-1))


def test_tokens_come_as_often_as_their_probabilities_say():
    logits = np.zeros((1, VOCAB), np.float32) - np.inf
    logits[0, [3, 255, 256, 600, 699]] = np.log([0.1, 0.2, 0.4, 0.25, 0.05])
    draws = 10_000
    found = sample(jnp.broadcast_to(logits, (draws, VOCAB)), keys(draws), Sampling(1.0))
    shares = np.bincount(found, minlength=VOCAB) / draws
    assert shares.sum() == pytest.approx(shares[[3, 255, 256, 600, 699]].sum())
    np.testing.assert_allclose(
        shares[[3, 255, 256, 600, 699]], np.exp(logits[0][logits[0] > -9]), atol=0.016
    )


def test_what_the_filters_drop_is_never_drawn():
    logits = jnp.broadcast_to(random_logits(1), (1000, VOCAB))
    settings = Sampling(1.5, top_k=30, top_p=0.9, min_p=0.01)
    found = sample(logits, keys(1000), settings)
    allowed = np.flatnonzero(np.isfinite(filtered(logits[:1], settings)[0]))
    assert len(set(found.tolist())) > 1 and set(found.tolist()) <= set(allowed.tolist())


def test_a_row_does_not_depend_on_the_others_and_a_key_fixes_it():
    logits, settings = random_logits(), Sampling(1.0, top_k=100, top_p=0.95)
    together = sample(logits, keys(8), settings)
    alone = [int(sample(logits[i : i + 1], keys(8)[i : i + 1], settings)[0]) for i in range(8)]
    assert together.tolist() == alone
    assert together.tolist() != sample(logits, keys(8, seed=1), settings).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-0.1), r"temperature=-0.1 is not possible; it is 0 \(greedy\) or more"),
        (dict(temperature=float("nan")), r"temperature=nan is not possible"),
        (dict(temperature=float("inf")), r"temperature=inf is not possible"),
        (dict(top_k=-1), r"top_k=-1 is not possible; it is 0 \(all tokens\) or more"),
        (dict(top_p=0.0), r"top_p=0.0 is not possible; it is above 0 and at most 1"),
        (dict(top_p=1.5), r"top_p=1.5 is not possible"),
        (dict(min_p=-0.5), r"min_p=-0.5 is not possible; it is 0 \(all tokens\) to 1"),
        (dict(repetition_penalty=0.0), r"repetition_penalty=0.0 .*1.1 discourages"),
        (dict(seed=-1), r"seed=-1 is not possible; it is 0 to 4294967295"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
