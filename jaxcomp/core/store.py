"""Nodes and leaves to disk and back: a skeleton in JSON, the arrays in one orbax checkpoint.

    DIR/tree.json     per node its tag and static fields, per leaf its shape, dtype and sha256
    DIR/arrays/       orbax: a flat dict, dotted path → array

The skeleton rebuilds any tree of nodes, tuples, dicts and None from the classes that `node` and
`static_value` registered, so heterogeneous trees load with no code knowing what was done to them.
Nothing is pickled.
"""

import dataclasses
import errno
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp.core.arrays import LeafInfo, leaf_info, read_arrays, write_arrays
from jaxcomp.core.files import new_directory, read_sealed, write_sealed
from jaxcomp.core.plain import Json, check_fields, find_class, from_plain, to_plain
from jaxcomp.core.struct import NODES, STATICS, is_static
from jaxcomp.core.tree import named_leaves

TREE_FILE = "tree.json"
ARRAYS = "arrays"  # the orbax checkpoint inside a stored tree
VERSION = 1


class Contents(NamedTuple):
    """A tree without its arrays."""

    skeleton: Json
    leaves: dict[str, LeafInfo]


def skeleton(tree: Any, path: str = "") -> Json:
    """The structure of `tree` as JSON values; leaves are references to their dotted path.

    Raises:
      ValueError: a part is no node, tuple, str-keyed dict, None or array.
    """
    if tree is None:
        return None
    if isinstance(tree, tuple):
        return [skeleton(x, _join(path, i)) for i, x in enumerate(tree)]
    if isinstance(tree, Mapping):
        if bad := [k for k in tree if not isinstance(k, str) or not k or "." in k]:
            raise ValueError(f"{path} has the key {bad[0]!r}; use strings without a dot")
        return {"dict": {k: skeleton(tree[k], _join(path, k)) for k in sorted(tree)}}
    tag = type(tree).__name__
    if NODES.get(tag) is type(tree):
        out = {"class": tag}
        for field in dataclasses.fields(tree):
            value, place = getattr(tree, field.name), _join(path, field.name)
            out[field.name] = (
                to_plain(value, STATICS, place) if is_static(field) else skeleton(value, place)
            )
        return out
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return {"leaf": path}
    hint = "; use a tuple" if isinstance(tree, list) else ", which is no array and no known node"
    raise ValueError(f"{path or 'the tree'} is a {tag}{hint}")


def rebuild(structure: Json, leaves: Mapping[str, Any], path: str = "") -> Any:
    """The tree that `skeleton` described, with `leaves[path]` at each leaf.

    Node fields absent from `structure` take their default.

    Raises:
      ValueError: an unknown tag or field (the message lists the known), or a leaf that is absent.
    """
    if structure is None:
        return None
    if isinstance(structure, list):
        return tuple(rebuild(x, leaves, _join(path, i)) for i, x in enumerate(structure))
    if not isinstance(structure, dict):
        raise ValueError(f"{path} is {structure!r}, which describes no part of a tree")
    if "class" in structure:
        cls = find_class(structure["class"], NODES, path)
        parts = {k: x for k, x in structure.items() if k != "class"}
        check_fields(cls, parts, path)
        statics = {f.name for f in dataclasses.fields(cls) if is_static(f)}
        values = {
            k: from_plain(x, STATICS, _join(path, k))
            if k in statics
            else rebuild(x, leaves, _join(path, k))
            for k, x in parts.items()
        }
        return cls(**values)
    if "dict" in structure:
        return {k: rebuild(x, leaves, _join(path, k)) for k, x in structure["dict"].items()}
    if structure.get("leaf") not in leaves:
        raise ValueError(f"{path} refers to leaf {structure.get('leaf')!r}, which is not stored")
    return leaves[structure["leaf"]]


@dataclasses.dataclass(frozen=True)
class StoredTree:
    """A tree on disk, standing for itself: a block of a model may be one of these.

    Attributes:
      path: directory with the orbax checkpoint `arrays/`.
      contents: the rest of the tree; read from `tree.json` when not given.
    """

    path: pathlib.Path
    contents: Contents = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "path", pathlib.Path(self.path))
        if self.contents is None:
            object.__setattr__(self, "contents", read_contents(self.path))

    def struct(self) -> Any:
        """The tree with `jax.ShapeDtypeStruct` leaves; no array is read."""
        leaves = {
            name: jax.ShapeDtypeStruct(info.shape, np.dtype(info.dtype))
            for name, info in self.contents.leaves.items()
        }
        return rebuild(self.contents.skeleton, leaves)

    def load(self) -> Any:
        """The tree with numpy leaves, each checked against its hash.

        Raises:
          ValueError: a leaf is not what was stored.
          OSError: the arrays cannot be read.
        """
        leaves = read_arrays(self.path / ARRAYS, self.contents.leaves)
        return rebuild(self.contents.skeleton, leaves)


def save_tree(path: os.PathLike | str, tree: Any) -> StoredTree:
    """Writes `tree` as a new directory, which appears whole or not at all.

    Raises:
      ValueError: `path` exists, or a part of the tree has no stored form.
      OSError: it cannot be written; nothing is left behind.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists already; remove it or choose another name")
    with new_directory(path) as temporary:
        contents = write_tree(temporary, tree)
        write_sealed(temporary / TREE_FILE, contents_to_json(contents) | {"version": VERSION})
    return StoredTree(path, contents)


def write_tree(path: pathlib.Path, tree: Any) -> Contents:
    """Writes the arrays of `tree` under the existing directory `path` and returns the rest."""
    structure = skeleton(tree)
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    infos = {name: leaf_info(name, leaf) for name, leaf in leaves.items()}
    write_arrays(path / ARRAYS, leaves)
    return Contents(structure, infos)


def link_tree(stored: StoredTree, path: pathlib.Path) -> Contents:
    """Puts the arrays of `stored` under the existing directory `path` without writing them again.

    Files are hard links where the file system allows it, copies otherwise; stored files are never
    written in place, so sharing them is safe. The arrays are read once and checked, so that damage
    is found here and not handed on.
    """
    stored.load()
    source = stored.path / ARRAYS
    for file in source.rglob("*"):
        if file.is_file():
            target = path / ARRAYS / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(file, target)
    return stored.contents


def read_contents(path: pathlib.Path) -> Contents:
    """Reads `tree.json` of a stored tree.

    Raises:
      ValueError: there is none, it is damaged, or a later version wrote it.
    """
    if not (path / TREE_FILE).is_file():
        raise ValueError(f"{path} is no stored tree: it has no {TREE_FILE}")
    data = read_sealed(path / TREE_FILE)
    if data.pop("version", None) != VERSION:
        raise ValueError(f"{path / TREE_FILE} has a version other than {VERSION}, the one known")
    return contents_from_json(data)


def contents_to_json(contents: Contents) -> Json:
    """`contents` as JSON values."""
    leaves = {
        name: {**info._asdict(), "shape": list(info.shape)}
        for name, info in contents.leaves.items()
    }
    return {"skeleton": contents.skeleton, "leaves": leaves}


def contents_from_json(data: Json) -> Contents:
    """The inverse of `contents_to_json`."""
    leaves = {
        name: LeafInfo(tuple(info["shape"]), info["dtype"], info["sha256"])
        for name, info in data["leaves"].items()
    }
    return Contents(data["skeleton"], leaves)


def _join(path: str, word: str | int) -> str:
    return f"{path}.{word}" if path else str(word)


def _link_or_copy(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        shutil.copyfile(source, target)
