"""The teacher on disk: what is read is what it said, and nothing else is ever served."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import teacher as module
from jaxcomp.calibrate.teacher import (
    bytes_per_token,
    teacher_cache,
    teacher_digest,
    top_words,
)
from jaxcomp.core.store import save_tree
from jaxcomp.models.decoder import forward, map_blocks
from jaxcomp.models.head import Head
from tests import tiny

K, WINDOWS, TIME = 5, 7, 8


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama", jax.random.key(0))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_TOKENS", 3 * TIME)  # three windows: shards of 3, 3 and 1


def windows():
    return np.array(tiny.tokens(jax.random.key(1), WINDOWS, TIME))


def test_any_window_reads_what_the_teacher_says_there(model, small_shards, tmp_path):
    cache = teacher_cache(tmp_path / "c", model, windows(), K, batch=2)
    log_p = jax.nn.log_softmax(forward(model, jnp.asarray(windows())))
    for chosen in ([6, 0, 3], [2]):
        found = cache.read(chosen)
        best, words = jax.lax.top_k(log_p[np.asarray(chosen)], K)
        np.testing.assert_array_equal(found.words, words)
        np.testing.assert_allclose(found.log_p, best, rtol=1e-3)
        mass = np.exp(found.log_p).sum(-1) + np.exp(found.log_rest)
        np.testing.assert_allclose(mass, 1, atol=5e-3)


def test_a_token_takes_the_bytes_of_the_formula(model, small_shards, tmp_path):
    cache = teacher_cache(tmp_path / "c", model, windows(), K, batch=2)
    stored = sum(p.stat().st_size for p in (tmp_path / "c").glob("shard.*"))
    assert stored == cache.bytes + 3 * module.DIGEST  # three shards
    assert cache.bytes == WINDOWS * TIME * (4 * K + 2)
    assert bytes_per_token(100, 50_000) == 402 and bytes_per_token(10, 151_936) == 62


@pytest.mark.parametrize("words", [61, 4000])
def test_the_best_words_are_found_among_few_and_among_many(words):
    rng = np.random.default_rng(0)
    head = Head(None, jnp.asarray(rng.standard_normal((words, 4)), jnp.float32), None)
    x = jnp.asarray(rng.standard_normal((2, 70, 4)), jnp.float32)  # more than a tile of rows
    found, log_p, rest = top_words(head, x, 20)
    expected, at = jax.lax.top_k(jax.nn.log_softmax(x @ head.w.T), 20)
    np.testing.assert_array_equal(found, at)
    np.testing.assert_allclose(log_p, expected, atol=1e-5)
    np.testing.assert_allclose(rest, jnp.log(1 - jnp.exp(expected).sum(-1)), atol=1e-4)


def test_a_killed_pass_continues_at_the_next_shard(model, small_shards, tmp_path, monkeypatch):
    path, told, real = tmp_path / "c", [], module._top_words

    def killed(*args):
        if (path / "shard.00001.bin").exists():
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_top_words", killed)
    with pytest.raises(KeyboardInterrupt):
        teacher_cache(path, model, windows(), K, batch=2)
    passes = []
    monkeypatch.setattr(module, "_top_words", lambda *a: passes.append(len(a[2])) or real(*a))
    cache = teacher_cache(path, model, windows(), K, batch=2, progress=lambda *n: told.append(n))
    assert passes == [1] and told == [(done, 3) for done in range(4)]
    fresh = teacher_cache(tmp_path / "d", model, windows(), K, batch=2)
    jax.tree.map(np.testing.assert_array_equal, cache.read(range(7)), fresh.read(range(7)))


@pytest.mark.parametrize("what", ["model", "text", "k", "windows", "vocabulary", "dtype"])
def test_a_cache_of_something_else_is_refused(what, model, tmp_path):
    teacher_cache(tmp_path, model, windows(), K)
    tokens, k = windows(), K
    if what == "model":
        model = tiny.model("llama", jax.random.key(5))
    elif what == "vocabulary":
        model = tiny.model("llama", jax.random.key(0), vocab_size=400)
    elif what == "dtype":
        config = dataclasses.replace(model.config, compute_dtype="bfloat16")
        model, what = model.replace(config=config), "float32 instead of bfloat16"
    elif what == "text":
        tokens = tokens[:, ::-1].copy()
    elif what == "windows":
        tokens = tokens[:-1]
    else:
        k, what = K + 1, "k=5 instead of 6"
    with pytest.raises(ValueError, match=f"{what}.*another directory"):
        teacher_cache(tmp_path, model, tokens, k)


@pytest.mark.parametrize(("damage", "said"), [("cut", "is cut"), ("flipped", "damaged")])
def test_a_damaged_shard_is_refused_and_made_again_once_removed(damage, said, model, tmp_path):
    teacher_cache(tmp_path, model, windows(), K)
    shard = tmp_path / "shard.00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3] if damage == "cut" else bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match=said):
        teacher_cache(tmp_path, model, windows(), K)
    shard.unlink()
    teacher_cache(tmp_path, model, windows(), K)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (([[400, 1]], [[-1.0, -2.0]]), "the word 400 of a vocabulary"),
        (([[1, 2]], [[0.5, -2.0]]), "above 0"),
        (([[1, 2]], [[-2.0, -1.0]]), "that rise"),
        (([[1, 2]], [[-0.1, -0.2]]), "a mass of"),
        (([[1, 2]], [[np.nan, -1.0]]), "NaN"),
    ],
)
def test_what_is_no_distribution_is_refused(found, said):
    words, log_p = map(np.array, found)
    with pytest.raises(ValueError, match=said):
        module._check_distribution(module.TopWords(words, log_p, np.zeros(1)), 320, "window 0")


@pytest.mark.parametrize(("k", "token"), [(1, 0), (321, 0), (5, 320), (5, -1)])
def test_impossible_numbers_of_words_and_foreign_tokens_are_refused(k, token, model, tmp_path):
    tokens = windows()
    tokens[0, 0] = token
    with pytest.raises(ValueError, match="vocabulary"):
        teacher_cache(tmp_path, model, tokens, k)


def test_a_directory_of_other_things_is_left_alone(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt.*no teacher's cache"):
        teacher_cache(tmp_path, model, windows(), K)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_the_digest_is_of_the_weights_wherever_the_blocks_live(model, tmp_path):
    stored = map_blocks(model, lambda _, b: b, lambda i, b: save_tree(tmp_path / f"{i}", b))
    assert teacher_digest(stored) == teacher_digest(model)
    other = model.replace(blocks=model.blocks[:1])
    assert teacher_digest(other) != teacher_digest(model)
