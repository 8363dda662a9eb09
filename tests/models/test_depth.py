import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.store import save_tree
from jaxcomp.core.transforms import Diag
from jaxcomp.models.decoder import forward, map_blocks
from jaxcomp.models.depth import (
    DepthPlan,
    cuts,
    drop,
    load_plan,
    model_digest,
    save_plan,
    with_gates,
)
from jaxcomp.models.patch import Patch
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model("gemma3_text", jax.random.key(0), num_hidden_layers=5)


@pytest.fixture(scope="module")
def tokens():
    return tiny.tokens(jax.random.key(1))


def test_a_dropped_block_is_a_block_behind_a_closed_gate(model, tokens):
    traces = []

    @jax.jit
    def gated(gates):
        traces.append(1)
        return forward(with_gates(model, gates), tokens)

    for removed in ((), (0,), (1, 2), (0, 3, 4)):
        gates = jnp.ones(5).at[jnp.array(removed, int)].set(0)
        np.testing.assert_allclose(gated(gates), forward(drop(model, removed), tokens), atol=1e-4)
    assert len(traces) == 1  # gates are data


def test_dropping_nothing_gives_the_model_itself(model):
    assert drop(model, ()) is model


def test_dropping_twice_is_dropping_both_and_places_are_those_of_the_first_model(model):
    twice, once = drop(drop(model, (1,)), (0, 2)), drop(model, (3, 1, 0))
    assert twice.kept == once.kept == (2, 4)
    assert all(a is b for a, b in zip(twice.blocks, once.blocks, strict=True))


def test_blocks_behind_handles_are_not_read(model, tmp_path):
    stored = map_blocks(model, lambda _, b: b, lambda i, b: save_tree(tmp_path / f"{i}", b))
    assert drop(stored, (1,)).blocks == stored.blocks[:1] + stored.blocks[2:]


def test_a_cut_is_known_by_the_block_behind_it(model):
    assert cuts(model) == {}
    assert cuts(drop(model, (1, 2))) == {1: (1, 3)}
    assert cuts(drop(model, (0, 3))) == {0: (0, 1), 2: (3, 4)}
    assert cuts(drop(model, (4,))) == {}  # nothing is behind it


def test_a_block_with_a_patch_is_not_dropped(model):
    patched = map_blocks(model, lambda i, b: b.replace(patch=Patch((Diag(jnp.ones(32)),))))
    with pytest.raises(ValueError, match="block 1 carries the patch"):
        drop(patched, (1,))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ((5,), "no block 5; the model has blocks 0..4"),
        ((-1,), "no block -1"),
        ((1, 1), "block 1 is named twice"),
        ((True,), "no block True"),
        (range(5), "all 5 blocks would be removed"),
    ],
)
def test_blocks_that_cannot_go_are_refused(model, removed, message):
    with pytest.raises(ValueError, match=message):
        drop(model, removed)
    with pytest.raises(ValueError, match=message):
        DepthPlan(5, tuple(removed))


def test_as_many_gates_as_blocks_are_wanted(model):
    with pytest.raises(ValueError, match=r"gates of shape \(4,\) for 5 blocks"):
        with_gates(model, jnp.ones(4))


def test_a_plan_survives_its_file_and_may_be_edited(model, tmp_path):
    plan = DepthPlan(5, (3, 1), model_digest(model), "bi", "ab", 64, (0.5, 0.25), 0.1, "1.0")
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan and plan.removed == (1, 3)
    data = json.loads((tmp_path / "plan.json").read_text())
    data["removed"] = [2]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    edited = load_plan(tmp_path / "plan.json")
    edited.check(model)
    assert edited.removed == (2,) and edited.metric == "bi"


def test_a_plan_for_another_model_is_refused(model):
    plan = DepthPlan(5, (1,), model_digest(model))
    other = tiny.model("gemma3_text", jax.random.key(9), num_hidden_layers=5)
    with pytest.raises(ValueError, match="made for another model"):
        plan.check(other)
    with pytest.raises(ValueError, match="for a model of 5 blocks, this one has 4"):
        plan.check(drop(model, (0,)))
    DepthPlan(5, (1,)).check(other)  # one written by hand fits any


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "plan.json"),
        ("[]", "no plan"),
        ('{"format": "jaxcomp-depth-plan", "n_blocks": 3}', "lacks removed"),
        ('{"format": "jaxcomp-depth-plan", "n_blocks": 3, "removed": [], "x": 1}', "no field 'x'"),
        ('{"format": "jaxcomp-depth-plan", "n_blocks": 3, "removed": ["1"]}', "no block '1'"),
        ('{"format": "jaxcomp-depth-plan", "n_blocks": "3", "removed": []}', "n_blocks='3' is no"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_name(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        load_plan(tmp_path / "plan.json")
    assert "plan.json" in str(refusal.value)
    with pytest.raises(ValueError, match="there is no plan"):
        load_plan(tmp_path / "other.json")
