import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxcomp.core.struct import NODES, STATICS, is_static, node, static, static_value


@node
class Pair:
    left: jax.Array
    right: jax.Array | None = None
    size: int = static(default=3)


@static_value
class Setting:
    rate: float = 0.5


def test_a_node_is_registered_under_its_name_and_frozen():
    assert NODES["Pair"] is Pair and STATICS["Setting"] is Setting
    for value in (Pair(jnp.ones(2)), Setting()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, 1)


def test_static_fields_are_structure_and_the_others_are_leaves():
    pair = Pair(jnp.ones(2), size=7)
    assert len(jax.tree.leaves(pair)) == 1  # None is an empty subtree
    assert jax.tree.map(lambda x: x * 2, pair).size == 7
    assert jax.tree.structure(pair) != jax.tree.structure(Pair(jnp.ones(2), size=8))
    assert [is_static(f) for f in dataclasses.fields(Pair)] == [False, False, True]


def test_placeholders_may_stand_in_a_node():
    pair = Pair(jnp.arange(6.0).reshape(3, 2))
    assert jax.eval_shape(lambda p: p, pair).left.shape == (3, 2)
    assert jax.vmap(lambda p: p.left.sum())(pair).tolist() == [1, 5, 9]
    assert jax.tree.map(lambda _: "here", pair).left == "here"


def test_equal_statics_share_a_compilation_and_others_do_not():
    traces = []

    @jax.jit
    def size_of(pair):
        traces.append(pair.size)
        return pair.left * pair.size

    for size in (3, 3, 4):
        size_of(Pair(jnp.ones(2), size=size))
    assert traces == [3, 4]


def test_two_classes_cannot_share_a_tag():
    with pytest.raises(ValueError, match=r"two classes want the tag 'Linear'.*core\.linear"):
        import jaxcomp.core.linear  # noqa: F401

        node(type("Linear", (), {"__annotations__": {"x": jax.Array}}))
    assert NODES["Linear"].__module__ == "jaxcomp.core.linear"
