"""Reading the `quantization_config` of compressed-tensors: its groups as grids of ours.

Every field is used, known to be harmless or refused by name; so is every scheme that a `QTensor`
or the quantizer of a site cannot hold. Which module is in which group is `ct_config.match_modules`.

Source: compressed-tensors 0.20, `QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.hub.packed import DENSE
from jaxcomp.models.families.fields import Fields

WHERE = "config.json: quantization_config"
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
)  # the last is the second's old name
HARMLESS = ("quant_method", "global_compression_ratio")
HOW_IT_WAS_MADE = ("observer", "observer_kwargs", "zp_dtype")  # of arguments
ORDERS = (None, False, "weight", "static")  # of channels in calibration; they leave no trace
WAY_OUT = (
    f"{DENSE}: transformers' from_pretrained with CompressedTensorsConfig(dequantize=True), then "
    "save_pretrained"
)


class Group(NamedTuple):
    """One of `config_groups`: how weights are stored, their grid, and that of their input."""

    format: str
    weight: QuantSpec
    act: QuantSpec | None


class ParsedConfig(NamedTuple):
    """A whole config.

    Attributes:
      groups: name → group.
      kv_cache: the static grid of keys and values; see `packed.Packed`.
      version: (major, minor) of the library that wrote it, None where it does not say.
    """

    groups: dict[str, Group]
    kv_cache: QuantSpec | None
    version: tuple[int, int] | None


def parse_config(config: Mapping[str, Any], allow: tuple[str, ...] = ()) -> ParsedConfig:
    """The grids of a config.

    Args:
      config: the `quantization_config`.
      allow: unknown fields that the caller vouches change nothing.

    Raises:
      ValueError: a field that is wrong, missing or unknown, or a scheme that is not read; the
        message names it and a way out.
    """
    fields = Fields(config, WHERE)
    status = fields.get("quantization_status", "missing")
    if status != "compressed":
        raise ValueError(
            f"{WHERE}: quantization_status is {status!r} and only 'compressed' says that codes are "
            "stored; other readers take the codes for weights without an error. Write it there if "
            f"the files hold codes, or {WAY_OUT}"
        )
    _check_patterns(fields.get("ignore", []), "ignore")
    sparsity = _object(fields.get("sparsity_config", {}), "sparsity_config")
    if (kind := sparsity.get("format", "dense")) != "dense":
        raise ValueError(
            f"{WHERE}: sparsity_config has format {kind!r}, and weights whose zeros are left out "
            f"are not read: {WAY_OUT}"
        )
    transforms = _object(fields.get("transform_config", {}), "transform_config")
    if names := transforms.get("config_groups"):
        raise ValueError(
            f"{WHERE}: transform_config has {', '.join(names)}, and transforms are not read from "
            f"this format; {DENSE}, or from the artefact that was exported"
        )
    groups, default = (
        _object(fields.get("config_groups"), "config_groups"),
        fields.get("format", None),
    )
    if not groups:
        raise ValueError(f"{WHERE}: config_groups is empty, so nothing says what is quantized")
    found = {name: _group(group, default, f"group {name}", allow) for name, group in groups.items()}
    cache = fields.get("kv_cache_scheme", None)
    version = re.match(r"(\d+)\.(\d+)", str(fields.get("version", "")))
    fields.finish(HARMLESS, allow)
    return ParsedConfig(
        found,
        None if cache is None else _cache(cache, allow),
        None if version is None else (int(version[1]), int(version[2])),
    )


def _group(group: Any, default: str | None, name: str, allow: tuple[str, ...]) -> Group:
    where = f"{WHERE}: {name}"
    if isinstance(group, list):
        raise ValueError(f"{where} is a preset for {group}; write its scheme out")
    fields = Fields(_object(group, name), where)
    _check_patterns(fields.get("targets"), "targets")
    format = fields.get("format", default)
    if format not in FORMATS:
        said = "no format" if format is None else f"format {format!r}"
        raise ValueError(
            f"{where} has {said}, which is not read; there is {', '.join(FORMATS[:2])}: {WAY_OUT}"
        )
    weight = fields.get("weights", None)
    if weight is None:
        raise ValueError(f"{where} has no weights, and only modules with codes are read; {WAY_OUT}")
    act = fields.get("input_activations", None)
    fields.finish((), allow)  # output_activations among the rest
    return Group(
        "pack-quantized" if format == FORMATS[0] else "int-quantized",
        _weight(weight, f"{where}, weights", allow),
        None if act is None else _input(act, f"{where}, input_activations", allow),
    )


def _weight(args: Any, where: str, allow: tuple[str, ...]) -> QuantSpec:
    fields, spec = _arguments(args, where)
    order = fields.get("actorder", None)
    if order not in ORDERS:
        raise ValueError(
            f"{where}: actorder={order!r} gives every input channel a group of its own choice, "
            f"which no QTensor holds; there is weight, static and null: {WAY_OUT}"
        )
    strategy, group_size = _strategy(fields)
    if strategy not in ("tensor", "channel", "group") or spec["dynamic"]:
        how = "dynamic" if spec["dynamic"] else f"of strategy {strategy!r}"
        raise ValueError(
            f"{where} is {how}, which no QTensor holds; there is tensor, channel and group, "
            f"static: {WAY_OUT}"
        )
    fields.finish((*HOW_IT_WAS_MADE, "scale_dtype"), allow)
    granularity = "tensor" if strategy == "tensor" else "channel"
    return QuantSpec(
        granularity=granularity, group_size=group_size if strategy == "group" else None, **spec
    )


def _input(args: Any, where: str, allow: tuple[str, ...]) -> QuantSpec:
    fields, spec = _arguments(args, where)
    strategy, _ = _strategy(fields)
    fields.finish(HOW_IT_WAS_MADE, allow)
    if (strategy, spec["dynamic"]) not in (("token", True), ("tensor", True), ("tensor", False)):
        raise ValueError(
            f"{where} is {_moment(spec)} of strategy {strategy!r}, which no site has; there is "
            f"token, dynamic, and tensor, dynamic or static: {WAY_OUT}"
        )
    return QuantSpec(granularity=strategy, **spec)


def _cache(args: Any, allow: tuple[str, ...]) -> QuantSpec:
    where = f"{WHERE}: kv_cache_scheme"
    fields, spec = _arguments(args, where)
    strategy, _ = _strategy(fields)
    fields.finish(HOW_IT_WAS_MADE, allow)
    if strategy not in ("tensor", "attn_head") or spec["dynamic"]:
        raise ValueError(
            f"{where} is {_moment(spec)} of strategy {strategy!r}, which no cache here has; there "
            f"is tensor and attn_head, static: {WAY_OUT}"
        )
    return QuantSpec(granularity="tensor" if strategy == "tensor" else "channel", **spec)


def _arguments(args: Any, where: str) -> tuple[Fields, dict[str, Any]]:
    """The fields, and what a `QuantSpec` has of them whatever the strategy."""
    fields = Fields(_object(args, where.removeprefix(f"{WHERE}: ")), where)
    bits, kind = fields.integer("num_bits", 8), str(fields.get("type", "int")).lower()
    if kind != "int" or not 2 <= bits <= 8:
        raise ValueError(
            f"{where}: type {kind!r} with {bits} bits is not read; there is int with 2 to 8: "
            f"{WAY_OUT}"
        )
    dynamic = fields.get("dynamic", False)
    if type(dynamic) is not bool:
        raise ValueError(f"{where}: dynamic={dynamic!r} is not read; there is true and false")
    return fields, dict(bits=bits, symmetric=fields.flag("symmetric", True), dynamic=dynamic)


def _strategy(fields: Fields) -> tuple[str, int | None]:
    """The strategy and the size of its groups; where only the size is given, it says both."""
    size, named = fields.get("group_size", None), fields.get("strategy", None)
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise ValueError(
            f"{fields.where}: group_size={size!r} must be above 0, or -1 for a channel"
        )
    size = None if size == -1 and named is not None else size
    implied = {None: "tensor", -1: "channel"}.get(size, "group")
    strategy = implied if named is None else str(named).lower()
    if (strategy == "group") != (size is not None and size > 0):
        raise ValueError(
            f"{fields.where}: strategy={strategy!r} does not go with group_size={size}; groups "
            "have a size and nothing else has one"
        )
    return strategy, size


def _check_patterns(patterns: Any, name: str) -> None:
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{WHERE}: {name}={patterns!r} must be a list of strings")
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise ValueError(
                f"{WHERE}: {name} has {pattern!r}, which is no regular expression: {error}"
            ) from error


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{WHERE}: {name} is {value!r} and must be an object")
    return value


def _moment(spec: dict[str, Any]) -> str:
    return "dynamic" if spec["dynamic"] else "static"
