import jax
import numpy as np
import pytest

from jaxcomp.core.tree import get_at, named_leaves, replace_at, replace_many
from tests import heterogeneous


@pytest.fixture(scope="module")
def model():
    return heterogeneous.model()


def test_every_leaf_has_a_path_that_leads_to_it(model):
    leaves = named_leaves(model)
    assert list(map(id, leaves.values())) == list(map(id, jax.tree.leaves(model)))
    assert all(get_at(model, path) is leaf for path, leaf in leaves.items())
    assert {"embed.weight", "blocks.1.attn.q.w.packed", "blocks.0.attn.q.b"} <= leaves.keys()
    assert "blocks.1.sites.ffn_in.quantizer.scale" in leaves


def test_replacing_a_place_changes_it_alone_and_shares_the_rest(model):
    for path in (
        "blocks.1.attn.q.w.packed",
        "norm.weight",
        "blocks.1.sites.ffn_in.quantizer.scale",
    ):
        changed = replace_at(model, path, "new")
        before, after = named_leaves(model), named_leaves(changed)
        assert after.pop(path) == "new" and before.pop(path) is not None
        assert all(after[k] is before[k] for k in before)


def test_reading_what_was_put_and_putting_what_was_read(model):
    path = "blocks.2.ffn.down"
    assert get_at(replace_at(model, path, 5), path) == 5
    same = replace_at(model, path, get_at(model, path))
    assert jax.tree.structure(same) == jax.tree.structure(model)


def test_several_places_at_once(model):
    values = {"norm.weight": np.zeros(2), "blocks.0.attn.q.b": None, "blocks.1.gate": np.ones(())}
    changed = replace_many(model, values)
    assert all(get_at(changed, path) is value for path, value in values.items())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("blocks.3", r"no '3' on the way to 'blocks\.3'; there is: 0\.\.2"),
        ("blocks.0.attn.query", "no 'query' .*there is: q, k, v, o"),
        ("blocks.1.sites.ffn_out.quantizer", "no 'ffn_out' .*attn_in, ffn_in, ffn_mid"),
        ("embed.weight.T", "no 'T' .*a leaf of type"),
    ],
)
def test_a_path_that_leads_nowhere_lists_what_is_there(path, message, model):
    for look in (lambda: get_at(model, path), lambda: replace_at(model, path, 1)):
        with pytest.raises(KeyError, match=message):
            look()
