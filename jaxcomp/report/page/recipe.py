"""The recipe on the page: every step in words, the command to run it again, and its JSON."""

import json
import shlex
from typing import Any

from jaxcomp.core.struct import STATICS
from jaxcomp.report.page.markup import Html, el
from jaxcomp.report.page.tables import facts, text_of
from jaxcomp.report.record import Report


def recipe_section(report: Report) -> list[Html]:
    """Steps, calibration and evaluations; the command; the JSON to copy."""
    recipe = report.recipe
    parts = [*enumerate(recipe.get("steps") or (), 1)]
    cards = [_card(f"Step {i}", part) for i, part in parts]
    if recipe.get("calib"):
        cards.append(_card("Calibration text", recipe["calib"]))
    cards += [_card("Evaluation", part) for part in recipe.get("evals") or ()]
    return [
        el("div", cards, class_="steps") if cards else None,
        el("h3", "Run it again"),
        el(
            "p",
            "With the recipe below as ",
            el("code", "recipe.json"),
            ", which an artefact holds beside this page:",
        ),
        copyable(command(report), "command"),
        el(
            "details",
            el("summary", "recipe.json"),
            copyable(json.dumps(recipe, indent=2), "recipe"),
            id="json",
        ),
    ]


def command(report: Report) -> str:
    """The command that makes the same model from the recipe's JSON."""
    words = ["jaxcomp", "compress", report.source, "recipe.json", "--out", "again"]
    dtype = report.environment.get("compute_dtype", "float32")
    words += ["--dtype", dtype] if dtype != "float32" else []
    words += ["--data-parallel"] if "data_parallel" in report.environment else []
    return shlex.join(words)


def copyable(text: str, name: str) -> Html:
    """Text as it is, with a button to copy it, which the script brings to life."""
    button = el("button", "Copy", type="button", class_="copy", aria_label=f"Copy the {name}")
    return el("div", el("pre", el("code", text), tabindex=0), button, class_="copyable")


def setting_text(value: Any) -> str:
    """A setting in words: a grid as it calls itself, other classes as Python would write them."""
    if isinstance(value, dict):
        given = {k: v for k, v in value.items() if k != "class"}
        if (cls := STATICS.get(value.get("class"))) is not None and "__str__" in vars(cls):
            try:
                return str(cls(**given))
            except (TypeError, ValueError):  # of another version
                pass
        shown = ", ".join(f"{k}={setting_text(v)}" for k, v in given.items() if v not in (None, []))
        return f"{value.get('class', '')}({shown})"
    if isinstance(value, list):
        return f"({', '.join(map(setting_text, value))})" if value else "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value) if isinstance(value, int) else text_of(value)


def _card(kind: str, part: Any) -> Html:
    part = part if isinstance(part, dict) else {"class": setting_text(part)}
    settings = [(name, setting_text(value)) for name, value in part.items() if name != "class"]
    name = str(part.get("class", ""))
    return el("section", el("h3", el("span", kind, class_="quiet"), " ", name), facts(settings))
