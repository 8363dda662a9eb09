"""The model card of an export: where it is from, what was done, what it cost, how to load it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcomp.hub.gguf import GGUFFile
from jaxcomp.hub.locate import HUB_ID, locate

LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "NOTICE", "USE_POLICY.md")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a checkpoint says of itself.

    Attributes:
      source: as its user named it.
      name: what it calls itself.
      base_model: its id on the hub, or that of the model it was made from; "" where it says none.
      licence: an identifier such as "apache-2.0"; "" where it states none.
      files: files with the terms, name → path.
    """

    source: str
    name: str = ""
    base_model: str = ""
    licence: str = ""
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


def find_origin(source: str) -> Origin:
    """What can be learnt of a source without a network: from its model card, or its GGUF header."""
    base = source if HUB_ID.fullmatch(source) and not Path(source).exists() else ""
    try:
        place = locate(source) if source.startswith("demo:") else Path(source).expanduser()
    except (ValueError, ModuleNotFoundError):
        return Origin(source)
    if place.is_dir():
        said = _front_matter(place / "README.md")
        files = {name: place / name for name in LICENCE_FILES if (place / name).is_file()}
        above = said.get("base_model") or ""
        above = above[0] if isinstance(above, list) else above
        return Origin(source, place.name, str(above), str(said.get("license") or ""), files)
    if place.is_file() and place.suffix == ".gguf":
        said = GGUFFile(place).metadata
        return Origin(
            source, str(said.get("general.name", "")), "", str(said.get("general.license", ""))
        )
    return Origin(source, base, base)


def model_card(
    title: str,
    origin: Origin,
    made_by: str,
    load: str,
    notes: Sequence[str] = (),
    tags: Sequence[str] = (),
    recipe: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> str:
    """The card as markdown with the header that model hubs read.

    Args:
      title: first heading.
      origin: of the model before anything was done to it.
      made_by: the program and its version.
      load: how to load it.
      notes: what its user should know.
      tags: for the header.
      recipe, report: `recipe.json` and `report.json` of an artefact.
    """
    header = {
        "base_model": origin.base_model,
        "license": origin.licence,
        "pipeline_tag": "text-generation",
        "tags": list(tags),
    }
    head = "".join(f"{k}: {json.dumps(v)}\n" for k, v in header.items() if v)
    named = f" ({origin.name})" if origin.name not in ("", origin.source) else ""
    parts = [
        f"---\n{head}---\n",
        f"# {title}\n",
        f"Made from `{origin.source}`{named} by {made_by}.\n",
    ]
    parts.append(f"Load it with `{load}`.\n")
    parts += [f"- {note}" for note in notes] + [""] * bool(notes)
    parts += _measured(report or {})
    if recipe:
        shown = json.dumps(recipe, indent=1)
        parts.append(f"## What was done\n\n```json\n{shown}\n```\n")
    terms = f"The source states `{origin.licence}`" if origin.licence else "The source states none"
    where = f"; see {', '.join(origin.files)}" if origin.files else ""
    parts.append(f"## Licence\n\n{terms}{where}.")
    return "\n".join(parts) + "\n"


def _measured(report: Mapping[str, Any]) -> list[str]:
    """Evaluations before and after, bits, and on what they were measured."""
    before, after = report.get("evals_before") or {}, report.get("evals_after") or {}
    rows = [
        (f"{name}: {key}", before.get(name, {}).get(key), value)
        for name, numbers in after.items()
        for key, value in numbers.items()
    ]
    if bits := (report.get("sizes") or {}).get("quantized_bits"):
        rows.append(("bits per quantized weight", None, bits))
    if not rows:
        return []
    lines = ["## What was measured\n", "| | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {_number(a)} | {_number(b)} |" for name, a, b in rows]
    place = report.get("environment") or {}
    on = ", ".join(f"{k} {place[k]}" for k in ("device", "jax", "jaxlib") if k in place)
    when = str(report.get("started", ""))[:10]
    return [
        *lines,
        f"\nMeasured by the run that compressed it ({', '.join(filter(None, (on, when)))}).\n",
    ]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML header of a model card, {} where there is none to be read."""
    if not path.is_file():
        return {}
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError):  # a header that is none states nothing
        return {}
