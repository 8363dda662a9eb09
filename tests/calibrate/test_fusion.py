import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration
from jaxcomp.calibrate.fusion import Fusion, attach, check_matching, folded_block, fused_block
from jaxcomp.calibrate.group_fit import (
    backward_fused,
    fit_group,
    forward_fused,
    group_states,
    loss_and_gradients,
)
from jaxcomp.core.tree import get_at, named_leaves, replace_at
from jaxcomp.models.decoder import forward
from jaxcomp.models.depth import drop
from jaxcomp.parallel import Placement
from jaxcomp.solvers.fusion import group_loss
from tests import tiny

SPEC = Fusion(rank=4, lora_rank=3, batch=4, epochs=2)
CALIB = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 12)), batch=4)


@pytest.fixture(scope="module")
def model():
    """With biases on queries, keys and values."""
    return tiny.model("qwen2", jax.random.key(0), num_hidden_layers=4)


def random_terms(spec, block):
    """Additions that are zero nowhere."""
    draw = np.random.default_rng(3)
    some = lambda a: jnp.asarray(0.1 * draw.standard_normal(a.shape), jnp.float32)  # noqa: E731
    terms = attach(spec, block, (0,))
    added = {name: jax.tree.map(some, terms[name]) for name in terms if name != "norms"}
    return added | {"norms": terms["norms"]}


@pytest.mark.parametrize("kind", ["low_rank", "row", "full"])
def test_attached_and_not_fitted_the_model_is_the_pruned_one_to_the_bit(kind, model):
    spec, tokens = dataclasses.replace(SPEC, coefficient=kind), tiny.tokens(jax.random.key(2))
    donor, pruned = model.blocks[1], drop(model, (1,))
    blocks = tuple(
        fused_block(b, donor, attach(spec, b, (i,))) for i, b in enumerate(pruned.blocks)
    )
    found = forward(pruned.replace(blocks=blocks), tokens)
    np.testing.assert_array_equal(found, forward(pruned, tokens))


def test_folded_is_as_fused_has_no_more_parameters_and_folds_again_to_itself(model):
    block, donor = model.blocks[2], model.blocks[1]
    terms, x = random_terms(SPEC, block), jax.random.normal(jax.random.key(4), (2, 12, 32))
    folded = folded_block(block, donor, terms)
    zero = attach(SPEC, folded, (0,))
    expected = forward_fused(block, donor, terms, x)
    assert float(jnp.max(jnp.abs(expected - forward_fused(block, donor, zero, x)))) > 1e-3
    np.testing.assert_allclose(forward_fused(folded, donor, zero, x), expected, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(folded, block)
    chex.assert_trees_all_equal(folded_block(folded, donor, zero), folded)


def test_additions_are_exactly_those_of_the_formula(model):
    block, donor = model.blocks[2], model.blocks[1]
    terms = random_terms(SPEC, block)
    new = fused_block(block, donor, terms)
    c, lora = terms["coefficients"], terms["lora"]["attn.q.w"]
    q = block.attn.q.w + (c["attn.q.w"]["down"] @ c["attn.q.w"]["up"]) * donor.attn.q.w
    np.testing.assert_allclose(new.attn.q.w, q + lora["a"] @ lora["b"], atol=1e-5)
    bias = block.attn.q.b + c["attn.q.b"]["row"] * donor.attn.q.b
    np.testing.assert_allclose(new.attn.q.b, bias, atol=1e-6)
    assert new.ffn_norm.weight is not donor.ffn_norm.weight


def test_the_gradient_of_a_group_block_by_block_is_that_of_the_whole(model):
    group, donor = (model.blocks[0], model.blocks[2]), model.blocks[1]
    terms = tuple(random_terms(SPEC, block) for block in group)
    x, y = jax.random.normal(jax.random.key(5), (2, 4, 12, 32))

    def whole(terms):
        h = x
        for block, t in zip(group, terms, strict=True):
            h = forward_fused(block, donor, t, h)
        return group_loss(SPEC.loss, h, y, SPEC.token_limit)

    expected = jax.value_and_grad(whole)(terms)
    found = loss_and_gradients(SPEC, group, donor, terms, x, y)
    chex.assert_trees_all_close(found, expected, atol=1e-6, rtol=1e-4)
    assert backward_fused(group[0], donor, terms[0], x, x)[0].keys() == terms[0].keys()


def test_a_fit_lowers_the_error_and_leaves_what_is_frozen_alone(model):
    spec = dataclasses.replace(SPEC, epochs=10, lr=1e-2, lora_lr=1e-2, norm_lr=1e-3)
    x, y = group_states(model, CALIB, (0, 1, 2), "float32", Placement())
    group, donor = (model.blocks[0], model.blocks[2]), model.blocks[1]
    before, told = jax.tree.map(np.array, (group, donor)), []
    fit = fit_group(spec, group, donor, x, y, (0,), tick=told.append)
    assert fit.after < 0.7 * fit.before and told == [*range(1, 21)] and len(fit.losses) == 20
    chex.assert_trees_all_equal((group, donor), before)
    control = dataclasses.replace(spec, donors=False, norm_lr=0.0, epochs=1)
    (first, _) = fit_group(control, group, donor, x, y, (0,)).blocks
    moved = {n for n, a in named_leaves(first).items() if np.any(a != get_at(group[0], n))}
    assert moved == {f"attn.{n}.w" for n in "qkvo"} | {f"ffn.{n}.w" for n in ("gate", "up", "down")}


def test_one_number_to_learn_is_learned_to_the_optimum(model):
    """Of the donor only `down` is left, twice the survivor's: 4 w = w + c 2 w gives c = 1.5."""
    survivor = model.blocks[0]
    target = replace_at(survivor, "ffn.down.w", 4.0 * survivor.ffn.down.w)
    nothing = jax.tree.map(jnp.zeros_like, survivor)
    donor = replace_at(nothing, "ffn.down.w", 2.0 * survivor.ffn.down.w)
    spec = Fusion(
        coefficient="row", lora_rank=0, norm_lr=0.0, lr=0.1, batch=4, epochs=150, token_limit=None
    )
    x = np.asarray(jax.random.normal(jax.random.key(7), (8, 12, 32)))
    y = np.asarray(forward_fused(target, donor, attach(spec, target, (0,)), x))
    fit = fit_group(spec, (survivor,), donor, x, y, (0,))
    c = (fit.blocks[0].ffn.down.w - survivor.ffn.down.w) / donor.ffn.down.w
    np.testing.assert_allclose(c, 1.5, atol=0.02)
    assert fit.after < 1e-5 * fit.before


def test_the_control_sees_the_same_windows_in_the_same_order(model):
    x, y = group_states(model, CALIB, (0, 1), "float32", Placement())
    runs = [
        fit_group(
            dataclasses.replace(SPEC, donors=d), model.blocks[:1], model.blocks[1], x, y, (0,)
        )
        for d in (True, False)
    ]
    assert runs[0].losses[0] == runs[1].losses[0] and runs[0].before == runs[1].before
    assert runs[0].losses[1:] != runs[1].losses[1:]


def test_products_in_bfloat16_give_nearly_what_float32_gives(model):
    x, y = group_states(model, CALIB, (0, 1), "float32", Placement())
    half = dataclasses.replace(SPEC, dtype="bfloat16")
    group, donor = model.blocks[:1], model.blocks[1]
    a, b = (fit_group(spec, group, donor, x, y, (0,)) for spec in (SPEC, half))
    np.testing.assert_allclose(b.losses, a.losses, rtol=0.05)
    assert a.losses != b.losses


def test_blocks_that_are_unlike_are_refused_by_the_leaf_that_differs(model):
    block = model.blocks[0]
    without = replace_at(block, "attn.q", block.attn.q.replace(b=None))
    with pytest.raises(
        ValueError, match=r"attn\.q\.b is not there in block 1 and \(32,\) in block"
    ):
        check_matching(without, block, "block 1", "block 0")
    narrow = replace_at(block, "ffn.up", block.ffn.up.replace(w=block.ffn.up.w[:, :40]))
    with pytest.raises(ValueError, match=r"ffn\.up\.w is \(32, 40\) in block 1"):
        SPEC.check([block, narrow])
    dataclasses.replace(SPEC, donors=False).check(
        [block, narrow]
    )  # nothing of another block enters


def test_a_loss_that_is_not_finite_is_refused_with_its_step(model):
    x, y = group_states(model, CALIB, (0, 1), "float32", Placement())
    spec = dataclasses.replace(SPEC, lr=1e30, epochs=4)
    with pytest.raises(
        ValueError, match=r"epoch \d, step \d: the loss is (nan|inf).*Lower lr=1e\+30"
    ):
        fit_group(spec, model.blocks[:1], model.blocks[1], x, y, (0,))
