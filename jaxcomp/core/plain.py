"""Frozen dataclasses as plain JSON values and back.

A dataclass becomes `{"class": "QuantSpec", "bits": 4, …}`: `class` is no possible field name, so
nothing is ambiguous. Tuples become arrays. Which classes may come back is a table the caller hands
in; nothing is imported by name and nothing is pickled.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Json = Any  # None, bool, int, float, str, lists and str-keyed dicts of these


def to_plain(value: Any, known: Mapping[str, type], place: str) -> Json:
    """`value` as JSON values.

    Args:
      value: None, bool, int, finite float, str, and tuples, str-keyed dicts and frozen dataclasses
        of these.
      known: tag → dataclass; what `from_plain` will be able to build.
      place: where the value stands, for errors.

    Raises:
      ValueError: something else; the message names the place.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place}={value} is not finite and JSON has no word for it; use None")
        return float(value)
    if isinstance(value, tuple):
        return [to_plain(x, known, f"{place}.{i}") for i, x in enumerate(value)]
    if isinstance(value, Mapping):
        if bad := [k for k in value if not isinstance(k, str) or k == "class"]:
            raise ValueError(f"{place} has the key {bad[0]!r}; use strings other than 'class'")
        return {k: to_plain(x, known, f"{place}.{k}") for k, x in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag = type(value).__name__
        if known.get(tag) is not type(value):
            raise ValueError(f"{place} is a {tag}, which is not one of: {', '.join(sorted(known))}")
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"class": tag} | {k: to_plain(x, known, f"{place}.{k}") for k, x in fields.items()}
    hint = "use a tuple" if isinstance(value, list) else "use numbers, strings, tuples, dataclasses"
    raise ValueError(f"{place}={value!r} is a {type(value).__name__} and has no JSON form; {hint}")


def from_plain(data: Json, known: Mapping[str, type], place: str) -> Any:
    """The value that `to_plain` wrote; absent fields take their default.

    Raises:
      ValueError: an unknown tag or field, or a missing one without default; the message lists what
        is known.
    """
    if isinstance(data, list):
        return tuple(from_plain(x, known, f"{place}.{i}") for i, x in enumerate(data))
    if not isinstance(data, dict):
        return data
    if "class" not in data:
        return {k: from_plain(x, known, f"{place}.{k}") for k, x in data.items()}
    cls = find_class(data["class"], known, place)
    values = {k: x for k, x in data.items() if k != "class"}
    check_fields(cls, values, place)
    return cls(**{k: from_plain(x, known, f"{place}.{k}") for k, x in values.items()})


def find_class(tag: Any, known: Mapping[str, type], place: str) -> type:
    """The class under `tag`, or an error that lists the known ones."""
    if not isinstance(tag, str) or tag not in known:
        raise ValueError(
            f"{place or 'the tree'} is a {tag!r}, which this version does not know; "
            f"known: {', '.join(sorted(known))}"
        )
    return known[tag]


def check_fields(cls: type, values: Mapping[str, Any], place: str) -> None:
    """Refuses names that are no fields of `cls`, and the absence of fields without a default."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    at = f" at {place}" if place else ""
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(
            f"{cls.__name__}{at} has no field {unknown[0]!r}; its fields are: {', '.join(fields)}"
        )
    missing = dataclasses.MISSING
    needed = [n for n, f in fields.items() if f.default is missing and f.default_factory is missing]
    if absent := [name for name in needed if name not in values]:
        raise ValueError(f"{cls.__name__}{at} lacks {', '.join(absent)}, which have no default")
