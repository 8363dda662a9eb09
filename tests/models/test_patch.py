import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxcomp import artefact
from jaxcomp.core.transforms import Diag, Hadamard, Kron, transform
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, empty_cache, extend, forward
from jaxcomp.models.patch import Patch, apply_patch, dense_patch, patch_matrix, rotate_patch
from jaxcomp.models.prepare import prepare
from jaxcomp.report import structure_tree
from tests import tiny

SCALE = 1.2 ** jax.random.normal(jax.random.key(5), (32,))
FACTORED = (Hadamard(32), Diag(SCALE), Hadamard(32, transposed=True))
ODD = 12  # an order whose Hadamard matrix is not symmetric


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama", jax.random.key(0), num_hidden_layers=3)


def patched(model, patch, at=1):
    blocks = list(model.blocks)
    blocks[at] = blocks[at].replace(patch=patch)
    return model.replace(blocks=tuple(blocks))


def test_a_hadamard_matrix_is_undone_by_its_transpose():
    x = jax.random.normal(jax.random.key(0), (3, ODD))
    back = transform(Hadamard(ODD, transposed=True), transform(Hadamard(ODD), x))
    np.testing.assert_allclose(back, x, atol=1e-5)
    assert np.abs(transform(Hadamard(ODD), transform(Hadamard(ODD), x)) - x).max() > 0.1


def test_a_patch_of_ones_changes_nothing(model):
    ones = Patch((Hadamard(32), Diag(jnp.ones(32)), Hadamard(32, transposed=True)))
    tokens = tiny.tokens(jax.random.key(1))
    found, expected = forward(patched(model, ones), tokens), forward(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(patch_matrix(ones, 32), np.eye(32), atol=1e-6)


def test_the_matrix_has_the_scales_for_eigenvalues_and_the_dense_patch_is_the_same():
    patch = Patch(FACTORED)
    p = patch_matrix(patch, 32)
    np.testing.assert_allclose(p, p.T, atol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(p), np.sort(SCALE), atol=1e-5)
    x = jax.random.normal(jax.random.key(2), (2, 5, 32))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    dense = apply_patch(dense_patch(patch, 32), x, positions)
    np.testing.assert_allclose(apply_patch(patch, x, positions), dense, atol=1e-5)
    np.testing.assert_allclose(dense, x @ p, atol=1e-5)


def test_the_first_token_can_be_left_alone_padding_before_it_or_not():
    x = jax.random.normal(jax.random.key(2), (1, 4, 32))
    y = apply_patch(Patch(FACTORED, skip_first=True), x, jnp.array([[0, 0, 1, 2]]))
    np.testing.assert_array_equal(y[0, :2], x[0, :2])
    np.testing.assert_allclose(y[0, 2:], x[0, 2:] @ patch_matrix(Patch(FACTORED), 32), atol=1e-5)


def test_a_patch_acts_on_the_input_of_its_block_before_the_gate(model):
    block, ctx = model.blocks[1], plain_context(1, 4)
    x = jax.random.normal(jax.random.key(2), (1, 4, 32))
    closed = block.replace(patch=Patch(FACTORED), gate=jnp.float32(0))
    p = patch_matrix(Patch(FACTORED), 32)
    np.testing.assert_allclose(block_forward(closed, x, ctx), x @ p, atol=1e-5)
    opened = block_forward(block.replace(patch=Patch(FACTORED)), x, ctx)
    np.testing.assert_allclose(opened, block_forward(block, x @ p, ctx), atol=1e-4)


def test_a_rotated_stream_has_a_rotated_patch():
    rotation = (Diag(jnp.where(jnp.arange(32) % 3, 1.0, -1.0)), Hadamard(32))
    turn = lambda x: transform(rotation[1], transform(rotation[0], x))  # noqa: E731
    x = jax.random.normal(jax.random.key(2), (6, 32))
    turned = rotate_patch(
        Patch((Kron(right=jax.random.normal(jax.random.key(3), (32, 32))),)), (), 32
    )
    found = turn(x) @ patch_matrix(rotate_patch(turned, rotation, 32), 32)
    np.testing.assert_allclose(found, turn(x @ patch_matrix(turned, 32)), atol=1e-3)


@pytest.mark.parametrize("skip_first", [False, True])
def test_a_cache_and_prepared_weights_give_what_the_whole_sequence_gives(model, skip_first):
    model, tokens = patched(model, Patch(FACTORED, skip_first)), tiny.tokens(jax.random.key(1))
    expected = forward(model, tokens)
    for form in (model, prepare(model)):
        cache, out = empty_cache(form, 2, 16), []
        for piece in (tokens[:, :1], tokens[:, 1:9], tokens[:, 9:]):
            logits, cache = extend(form, piece, cache)
            out.append(logits)
        np.testing.assert_allclose(jnp.concatenate(out, 1), expected, atol=1e-3)


def test_an_artefact_keeps_the_patch_and_what_was_kept(model, tmp_path):
    model = patched(model, Patch(FACTORED, True)).replace(kept=(0, 2, 5))
    artefact.save(model, tmp_path / "out")
    back = artefact.load(tmp_path / "out")
    assert jax.tree.structure(back) == jax.tree.structure(model) and back.kept == (0, 2, 5)
    np.testing.assert_array_equal(back.blocks[1].patch.transforms[1].scale, SCALE)


def test_the_tree_for_a_terminal_names_the_patch_and_the_blocks_that_are_left(model):
    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    shown = patched(model, Patch(FACTORED, skip_first=True)).replace(kept=(0, 3, 4))
    console.print(structure_tree(shown))
    text = console.export_text()
    assert "Hadamard 32 → Diag 32 → Hadamardᵀ 32, the first token left alone" in text
    assert "0, 3, 4" in text
