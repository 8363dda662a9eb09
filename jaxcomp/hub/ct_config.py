"""`quantization_config` of compressed-tensors: which module is on which grid, and back again.

A config names its modules by patterns. A reader that matches one module too many or too few loads
without an error and computes nonsense, so a config is checked by matching it as readers do.

Source: compressed-tensors 0.20, `QuantizationConfig` and `utils.match`: a target or an entry of
`ignore` is a module's name, its class, or "re:" and a regular expression matched from the start of
the name; `ignore` wins, then names, then expressions, then classes.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxcomp.core.quantize import QuantSpec

LAYOUT_VERSION = "0.20.0"  # of the format; from 0.18 on odd widths are packed without gaps
LINEAR = "Linear"  # the class of every module that is listed here


@dataclasses.dataclass(frozen=True)
class ModuleScheme:
    """The grids of one linear module.

    Attributes:
      bits, group_size, symmetric: of its weight; `group_size` None is one group a channel.
      act: grid of its input, None for none.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    act: QuantSpec | None = None

    @property
    def format(self) -> str:
        """How its weight is stored: codes of 8 bits for integer products as bytes, else packed."""
        eight = self.bits == 8 and self.act is not None and self.act.bits == 8
        as_bytes = eight and self.symmetric and self.group_size is None
        return "int-quantized" if as_bytes else "pack-quantized"

    def __str__(self) -> str:
        groups = "per channel" if self.group_size is None else f"groups of {self.group_size}"
        act = "" if self.act is None else f", input {self.act}"
        return f"{self.bits} bits, {groups}, {'' if self.symmetric else 'a'}symmetric{act}"


Schemes = Mapping[str, ModuleScheme | None]  # module → its grids, None for a dense one


def quantization_config(
    schemes: Schemes,
    kv_cache: QuantSpec | None = None,
    transforms: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The config that puts every module on its grid.

    Args:
      schemes: every linear module of the class, also those that are not quantized.
      kv_cache: the static grid of keys and values.
      transforms: `config_groups` of the transforms.
    """
    groups: dict[ModuleScheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None:
            groups.setdefault(scheme, []).append(name)
    formats = sorted({scheme.format for scheme in groups})
    config_groups = {}
    for i, (scheme, names) in enumerate(groups.items()):
        config_groups[f"group_{i}"] = {
            "targets": [LINEAR] if len(groups) == 1 else patterns(names),
            "format": scheme.format,
            "weights": _weights(scheme),
            "input_activations": None if scheme.act is None else activations(scheme.act),
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": LAYOUT_VERSION,
        "global_compression_ratio": None,
        "ignore": sorted(name for name, scheme in schemes.items() if scheme is None),
        "kv_cache_scheme": None if kv_cache is None else activations(kv_cache),
        "config_groups": config_groups,
        "sparsity_config": {},
        "transform_config": {"config_groups": dict(transforms)} if transforms else {},
    }


def activations(spec: QuantSpec) -> dict[str, Any]:
    """The arguments of an activation's grid."""
    strategy = "token" if spec.granularity == "token" else "tensor"
    return _arguments(spec.bits, spec.symmetric, strategy, None, spec.dynamic)


def patterns(names: Iterable[str]) -> list[str]:
    """Expressions that match these modules and no others of the model; few where names repeat."""
    layers: dict[tuple[str, str], list[str]] = {}
    exact = []
    for name in names:
        if found := re.fullmatch(r"(.*\.)(\d+)(\..*)", name):
            layers.setdefault((found[1], found[3]), []).append(found[2])
        else:
            exact.append(name)
    return exact + [
        f"re:^{re.escape(head)}({'|'.join(numbers)}){re.escape(tail)}$"
        for (head, tail), numbers in layers.items()
    ]


def match_modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str | None]:
    """Module → the name of the group that a reader of `config` puts it in, None for none.

    Args:
      config: a `quantization_config`.
      names: the linear modules of the class.
    """
    targets = {
        target: group
        for group, scheme in config["config_groups"].items()
        for target in scheme["targets"]
    }
    order = sorted(targets, key=lambda target: (target == LINEAR, target.startswith("re:"), target))
    found = {}
    for name in names:
        ignored = any(_matches(pattern, name) for pattern in config.get("ignore") or ())
        hits = [] if ignored else [target for target in order if _matches(target, name)]
        found[name] = targets[hits[0]] if hits else None
    return found


def check_matches(config: Mapping[str, Any], schemes: Schemes) -> None:
    """Matches a config as readers do and compares with what the modules are.

    Raises:
      ValueError: a module would be read as something else; readers would compute nonsense.
    """
    for name, group in match_modules(config, schemes).items():
        scheme = schemes[name]
        found = None if group is None else config["config_groups"][group]
        if (found is None) != (scheme is None):
            is_what = "is dense" if scheme is None else f"is quantized ({scheme})"
            taken = "quantized" if found else "dense"
            raise ValueError(
                f"module {name!r} {is_what} and targets and ignore of the quantization_config "
                f"make it {taken}: readers would load it without an error and compute nonsense"
            )
        if found is None:
            continue
        act = found.get("input_activations")
        wanted = (_weights(scheme), None if scheme.act is None else activations(scheme.act))
        if (found["weights"], act) != wanted or found.get("format") != scheme.format:
            raise ValueError(
                f"module {name!r} is quantized ({scheme}) and the quantization_config puts it in "
                f"{group}, which is {found['weights']}, {act}, {found.get('format')}"
            )


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in (name, LINEAR)


def _weights(scheme: ModuleScheme) -> dict[str, Any]:
    strategy = "channel" if scheme.group_size is None else "group"
    return _arguments(scheme.bits, scheme.symmetric, strategy, scheme.group_size, False)


def _arguments(
    bits: int, symmetric: bool, strategy: str, group_size: int | None, dynamic: bool
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }
