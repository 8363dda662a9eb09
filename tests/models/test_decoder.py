import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.store import save_tree
from jaxcomp.core.tree import named_leaves
from jaxcomp.models import attention as attention_module
from jaxcomp.models.attention import masked_context, plain_context
from jaxcomp.models.decoder import (
    block_forward,
    block_struct,
    empty_cache,
    extend,
    forward,
    load_block,
    map_blocks,
)
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.layers import JointNorm, RMSNorm, embed_tokens, head_norm, rms_norm
from tests import tiny

logits_of, extend_jit = jax.jit(forward), jax.jit(extend)


@pytest.fixture(scope="module")
def model():
    return tiny.model("mistral", jax.random.key(0), num_hidden_layers=3)


@pytest.fixture(scope="module")
def tokens():
    return tiny.tokens(jax.random.key(1), 2, 12)


def with_gate(block, value):
    return block.replace(gate=None if value is None else jnp.float32(value))


@pytest.fixture
def stored(model, tmp_path):
    return map_blocks(model, lambda _, b: b, lambda i, b: save_tree(tmp_path / f"{i}", b))


def oracle(attn, x, valid):
    """Grouped-query attention over one sequence at a time, float64, by its definition.

    Only RoPE is taken from the library; tests/models/test_rope.py has its own oracle.
    """
    batch, time, _ = x.shape
    x, positions = x.astype(np.float64), np.maximum(np.cumsum(valid, 1) - 1, 0)
    heads = {}
    for name, n in (("q", attn.n_heads), ("k", attn.n_kv_heads), ("v", attn.n_kv_heads)):
        p = getattr(attn, name)
        y = x @ np.asarray(p.w, np.float64) + (0 if p.b is None else np.asarray(p.b, np.float64))
        heads[name] = y.reshape(batch, time, n, attn.head_dim)
    cos, sin = attention_module.rope_tables(attn.rope, attn.head_dim, jnp.asarray(positions))
    q, k = (attention_module.rotate(jnp.asarray(heads[n], jnp.float32), cos, sin) for n in "qk")
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    out = np.zeros(q.shape)
    for b, h, t in np.ndindex(batch, attn.n_heads, time):
        kv = h // (attn.n_heads // attn.n_kv_heads)
        near = attn.window is None or positions[b, t] - positions[b] < attn.window
        seen = (np.arange(time) <= t) & valid[b] & near
        if seen.any():
            scores = attn.scale * k[b, seen, kv] @ q[b, t, h]
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ heads["v"][b, seen, kv] / weights.sum()
    return out.reshape(batch, time, -1) @ np.asarray(attn.o.w, np.float64)


@pytest.mark.parametrize(
    ("tile", "window", "padding"),
    [(4, window, padding) for window in (None, 5) for padding in ("none", "left", "right")]
    + [(128, 5, "none"), (128, None, "left")],
)
def test_attention_agrees_with_its_definition_for_every_tiling(
    tile, window, padding, model, monkeypatch
):
    monkeypatch.setattr(attention_module, "QUERY_TILE", tile)
    attn = model.blocks[0].attn.replace(window=window)
    x = np.random.default_rng(0).standard_normal((2, 13, 32)).astype(np.float32)
    valid = np.ones((2, 13), bool)
    valid[1, {"none": slice(0), "left": slice(0, 6), "right": slice(9, 13)}[padding]] = False
    ctx = plain_context(2, 13) if padding == "none" else masked_context(jnp.asarray(valid))
    run = jax.jit(lambda x: attention_module.attention(attn, x, ctx, lambda _, h: h)[0])
    y = run(x)
    np.testing.assert_allclose(np.asarray(y)[valid], oracle(attn, x, valid)[valid], atol=1e-5)


def test_one_norm_over_all_heads_is_the_norm_of_the_projection():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    p = RMSNorm(weight, 1e-5)
    joint = head_norm(JointNorm(p), x)
    np.testing.assert_array_equal(joint, rms_norm(p, x.reshape(2, 3, 32)).reshape(x.shape))
    each = head_norm(RMSNorm(weight[:8], 1e-5), x)
    assert np.abs(each / weight[:8] - joint / weight.reshape(4, 8)).max() > 0.01
    assert head_norm(None, x) is x


def test_long_sequences_get_larger_tiles_and_the_same_result(model, monkeypatch):
    x = np.random.default_rng(1).standard_normal((1, 30, 32)).astype(np.float32)
    compiled = lambda: jax.jit(lambda b, x: block_forward(b, x, plain_context(1, 30)))  # noqa: E731
    whole = compiled()(model.blocks[0], x)
    monkeypatch.setattr(attention_module, "QUERY_TILE", 1)
    monkeypatch.setattr(attention_module, "MAX_TILES", 4)
    np.testing.assert_allclose(compiled()(model.blocks[0], x), whole, atol=1e-5)


def test_no_token_sees_the_future(model, tokens):
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % tiny.VOCAB)
    a, b = logits_of(model, tokens), logits_of(model, changed)
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert np.abs(a[:, 7:] - b[:, 7:]).max(axis=(0, 2)).min() > 1e-4


def test_a_window_forgets_what_is_behind_it():
    model = tiny.model("mistral", jax.random.key(0), num_hidden_layers=1, sliding_window=4)
    tokens = tiny.tokens(jax.random.key(1), 1, 10)
    a, b = logits_of(model, tokens), logits_of(model, tokens.at[0, 2].set((tokens[0, 2] + 1) % 320))
    changed = np.abs(np.asarray(a - b)).max(axis=(0, 2)) > 1e-5
    assert changed.tolist() == [2 <= t < 6 for t in range(10)]


def test_a_gate_of_one_is_the_block_and_of_zero_is_no_block(model, tokens):
    first, *rest = model.blocks
    for value, blocks in ((1.0, model.blocks), (0.0, tuple(rest))):
        gated = model.replace(blocks=(with_gate(first, value), *rest))
        expected = logits_of(model.replace(blocks=blocks), tokens)
        np.testing.assert_allclose(logits_of(gated, tokens), expected, atol=1e-4)


def test_a_gate_between_is_a_mixture_and_has_a_gradient(model):
    x, ctx = jax.random.normal(jax.random.key(2), (1, 4, 32)), plain_context(1, 4)
    run = lambda gate: block_forward(with_gate(model.blocks[0], gate), x, ctx)  # noqa: E731
    y = block_forward(model.blocks[0], x, ctx)
    np.testing.assert_allclose(run(0.25), x + 0.25 * (y - x), atol=1e-5)
    slope = jax.grad(lambda g: run(g).sum())(0.25)
    assert float(slope) == pytest.approx(float((y - x).sum()), rel=1e-3)


def test_dropping_a_block_is_dropping_it_from_the_tuple(model, tokens):
    pruned = model.replace(blocks=model.blocks[:1] + model.blocks[2:])
    x = embed_tokens(model.embed, tokens, "float32")
    for i in (0, 2):
        x = block_forward(model.blocks[i], x, plain_context(*tokens.shape))
    w = np.asarray(model.lm_head.w)
    np.testing.assert_allclose(logits_of(pruned, tokens), rms_norm(model.norm, x) @ w, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_logits_of_real_tokens(side, model, tokens):
    width = (5, 0) if side == "left" else (0, 5)
    padded = jnp.pad(tokens, ((0, 0), width), constant_values=3)
    valid = jnp.pad(jnp.ones(tokens.shape, bool), ((0, 0), width))
    found = logits_of(model, padded, valid)[:, width[0] : width[0] + tokens.shape[1]]
    np.testing.assert_allclose(found, logits_of(model, tokens), atol=1e-4)


def test_positions_count_real_tokens():
    valid = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]], bool)
    found = np.asarray(masked_context(valid).positions)
    assert [found[i][valid[i]].tolist() for i in range(3)] == [[0, 1, 2]] * 3


def test_blocks_behind_handles_give_the_same_logits(model, stored, tokens):
    assert not any(hasattr(block, "attn") for block in stored.blocks)
    np.testing.assert_array_equal(forward(stored, tokens), forward(model, tokens))
    a, b = block_struct(stored.blocks[1]), model.blocks[1]
    assert {k: (x.shape, x.dtype) for k, x in named_leaves(a).items()} == {
        k: (x.shape, x.dtype) for k, x in named_leaves(b).items()
    }


def test_mapping_blocks_keeps_one_in_memory_and_stores_each_result(stored, model, tmp_path):
    alive, order = [], []

    class Watched:  # a handle that counts how many of its blocks are in use
        def __init__(self, handle):
            self.handle = handle

        def load(self):
            alive.append(self.handle)
            return self.handle.load()

        def struct(self):
            return self.handle.struct()

    def keep(i, block):
        alive.pop()
        return save_tree(tmp_path / f"new.{i}", block)

    def change(i, block):
        assert len(alive) == 1
        order.append(i)
        return with_gate(block, i)

    watched = stored.replace(blocks=tuple(map(Watched, stored.blocks)))
    result = map_blocks(watched, change, keep)
    assert order == [0, 1, 2] and [float(load_block(b).gate) for b in result.blocks] == order
    assert all(block.gate is None for block in model.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_filled_in_pieces_gives_the_logits_of_the_whole(family):
    model = tiny.model(family, jax.random.key(0))
    tokens = tiny.tokens(jax.random.key(1), 2, 12)
    cache, out = empty_cache(model, 2, 16, horizon=12), []
    for piece in (tokens[:, :4], tokens[:, 4:8], tokens[:, 8:]):
        logits, cache = extend_jit(model, piece, cache)
        out.append(logits)
    assert int(cache.length) == 12 and cache.valid.sum() == 24
    np.testing.assert_allclose(jnp.concatenate(out, 1), logits_of(model, tokens), atol=1e-4)


def test_a_norm_without_parameters_is_the_identity_and_an_offset_is_added():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    assert rms_norm(None, x) is x
    w = jax.random.normal(jax.random.key(1), (8,))
    expected = np.asarray(x) / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms_norm(RMSNorm(w), x), expected * w, rtol=1e-5)
    np.testing.assert_allclose(
        rms_norm(RMSNorm(w, offset=1), x), expected * (1 + w), rtol=1e-4, atol=1e-5
    )
