import jax
import numpy as np
import pytest

from jaxcomp.core.store import save_tree
from jaxcomp.models.decoder import forward, head_logits, map_blocks
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.stream import block_step, embed_batches, run_blocks
from tests import tiny

logits_of = jax.jit(forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_gives_the_hidden_states_of_the_whole_forward(family):
    model = tiny.model(family, jax.random.key(0))
    tokens = np.asarray(tiny.tokens(jax.random.key(1), 4, 16))
    hidden = run_blocks(model, embed_batches(model, tokens, 2))
    assert [x.shape for x in hidden] == [(2, 16, 32)] * 2
    assert all(isinstance(x, np.ndarray) for x in hidden)
    logits = head_logits(model, np.concatenate(hidden))
    np.testing.assert_allclose(logits, logits_of(model, tokens), atol=1e-4)


def test_a_last_batch_that_is_not_full_is_not_lost():
    model = tiny.model("llama", jax.random.key(0))
    tokens = np.asarray(tiny.tokens(jax.random.key(1), 3, 16))
    hidden = run_blocks(model, embed_batches(model, tokens, 2))
    assert [len(x) for x in hidden] == [2, 1]
    alone = run_blocks(model, embed_batches(model, tokens[2:], 1))
    np.testing.assert_allclose(hidden[1], alone[0], atol=1e-5)


def test_blocks_of_one_structure_share_one_compilation_and_may_be_watched(tmp_path):
    model = tiny.model("llama", jax.random.key(0), num_hidden_layers=4)
    stored = map_blocks(model, lambda _, b: b, lambda i, b: save_tree(tmp_path / f"{i}", b))
    tokens = np.asarray(tiny.tokens(jax.random.key(1), 2, 10))  # a length of its own
    before, seen = block_step._cache_size(), []

    def each(blocks):
        for block in blocks:
            seen.append(block)
            yield block

    run_blocks(stored, embed_batches(stored, tokens, 2), each)
    assert block_step._cache_size() == before + 1 and len(seen) == 4


def test_activations_have_the_compute_dtype_and_weights_their_own():
    model = tiny.model("llama", jax.random.key(0))
    config = type(model.config)(**{**vars(model.config), "compute_dtype": "bfloat16"})
    tokens = np.asarray(tiny.tokens(jax.random.key(1), 2, 16))
    hidden = embed_batches(model.replace(config=config), tokens, 2)
    out = run_blocks(model, hidden)
    assert hidden[0].dtype == out[0].dtype == "bfloat16"
    exact = run_blocks(model, embed_batches(model, tokens, 2))[0]
    error = np.linalg.norm(out[0].astype(np.float32) - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02
