"""Paths into a tree of nodes: name every leaf, read one place, replace one place.

A path is what a person would type after the model: `blocks.3.attn.q.w.packed`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcomp.core.struct import NODES


def key_path(path: tuple) -> str:
    """A jax key path as dotted words."""
    return ".".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Every leaf of `tree` under its dotted path, in tree order; `None` is no leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {key_path(path): leaf for path, leaf in leaves}


def get_at(tree: Any, path: str) -> Any:
    """The subtree at `path`.

    Raises:
      KeyError: no such place; the message lists what is there.
    """
    for word in path.split("."):
        tree = _child(tree, word, path)
    return tree


def replace_at(tree: Any, path: str, value: Any) -> Any:
    """A copy of `tree` with the subtree at `path` replaced; everything else is shared."""
    return _replace(tree, path.split("."), value, path)


def replace_many(tree: Any, values: Mapping[str, Any]) -> Any:
    """`replace_at` for several disjoint places."""
    for path, value in values.items():
        tree = replace_at(tree, path, value)
    return tree


def _replace(tree: Any, words: list[str], value: Any, path: str) -> Any:
    if not words:
        return value
    child = _child(tree, words[0], path)
    return _with_child(tree, words[0], _replace(child, words[1:], value, path))


def _child(tree: Any, word: str, path: str) -> Any:
    if isinstance(tree, tuple | list) and word.isdigit() and int(word) < len(tree):
        return tree[int(word)]
    if isinstance(tree, Mapping) and word in tree:
        return tree[word]
    if type(tree) in NODES.values() and hasattr(tree, word):
        return getattr(tree, word)
    raise KeyError(f"no {word!r} on the way to {path!r}; there is: {', '.join(_words(tree))}")


def _with_child(tree: Any, word: str, value: Any) -> Any:
    if isinstance(tree, tuple | list):
        return type(tree)(value if i == int(word) else x for i, x in enumerate(tree))
    if isinstance(tree, Mapping):
        return {**tree, word: value}
    return dataclasses.replace(tree, **{word: value})


def _words(tree: Any) -> list[str]:
    if isinstance(tree, tuple | list):
        return [f"0..{len(tree) - 1}"]
    if isinstance(tree, Mapping):
        return [str(k) for k in tree]
    if dataclasses.is_dataclass(tree):
        return [f.name for f in dataclasses.fields(tree)]
    return [f"a leaf of type {type(tree).__name__}"]
