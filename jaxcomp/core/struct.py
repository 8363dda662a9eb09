"""`node`: the frozen pytree dataclass every part of a model is made of.

One decorator does three jobs: it registers the class as a pytree, it records the tag under which
the class is written to disk, and it exempts the constructor from run-time type checks, because JAX
puts placeholders into the fields of a pytree (`vmap`, `eval_shape`, `tree_map`).
"""

import dataclasses
import typing

import flax.struct

NODES: dict[str, type] = {}  # tag → class; what an artefact may contain
STATICS: dict[str, type] = {}  # tag → frozen dataclass allowed as the value of a static field

T = typing.TypeVar("T", bound=type)


@typing.dataclass_transform(frozen_default=True)
def node(cls: T) -> T:
    """Makes `cls` a frozen pytree dataclass known to the artefact under its class name.

    Fields are children unless marked `static()`; static values must be hashable and equal for
    blocks that should share a compilation, so a block's index is never one.
    """
    cls = flax.struct.dataclass(cls)
    cls.__init__ = typing.no_type_check(cls.__init__)
    NODES[_register(cls, NODES)] = cls
    return cls


def static(**kwargs) -> typing.Any:
    """A field that is part of the structure and not of the data."""
    return flax.struct.field(pytree_node=False, **kwargs)


@typing.dataclass_transform(frozen_default=True)
def static_value(cls: T) -> T:
    """Makes `cls` a frozen dataclass that may be the value of a static field and of a setting."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    cls.__init__ = typing.no_type_check(cls.__init__)  # it checks its values itself, in words
    STATICS[_register(cls, STATICS)] = cls
    return cls


def is_static(field: dataclasses.Field) -> bool:
    """True for a field that `static()` made."""
    return not field.metadata.get("pytree_node", True)


def _register(cls: type, table: dict[str, type]) -> str:
    tag = cls.__name__
    known = table.get(tag)
    if known is not None and (known.__module__, known.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ValueError(f"two classes want the tag {tag!r}: {known.__module__}, {cls.__module__}")
    return tag
