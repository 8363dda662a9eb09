"""Writes docs/methods/: a page for each method, from its module and the recipes that use it.

What a method does is said once, at the top of its file; what it reaches is said once, in the
docstring of each recipe. These pages only bring the two together. A test holds them up to date.

Run: python docs/generate.py
"""

import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
FIELDS = ("Run", "Needs", "Expect", "Paper", "Ours")


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    wanted = pages()
    for path in PAGES.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (PAGES / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name → text of every page."""
    sys.path.insert(0, str(ROOT))
    from jaxcomp.methods import METHODS

    recipes = recipes_by_method()
    found = {f"{n.lower()}.md": page(n, cls, recipes.get(n, [])) for n, cls in METHODS.items()}
    lines = [f"- [{n}]({n.lower()}.md): {summary(cls)}" for n, cls in METHODS.items()]
    return {"README.md": "# Methods\n\n" + "\n".join(lines) + "\n"} | found


def page(name: str, cls: type, recipes: list[tuple[pathlib.Path, dict[str, str]]]) -> str:
    """The page of one method."""
    module = importlib.import_module(cls.__module__)
    title, _, body = inspect.getdoc(module).partition("\n")
    source = pathlib.Path(module.__file__).relative_to(ROOT)
    parts = [f"# {name}", title.partition(": ")[2].capitalize(), fenced(body.strip("\n"))]
    parts += [f"The code: [`{source}`](../../{source}).", "## Settings", settings(cls)]
    parts += ["## Recipes and what they reach", table(recipes)] if recipes else []
    return "\n\n".join(parts) + "\n"


def summary(cls: type) -> str:
    """The first sentence of a method's module."""
    doc = inspect.getdoc(importlib.import_module(cls.__module__))
    first = doc.partition("\n\n")[0].partition(": ")[2]
    return " ".join(first.split()).partition(". ")[0].rstrip(".")


def settings(cls: type) -> str:
    """Settings, defaults and what they mean, from the class and its docstring."""
    told = attributes(inspect.getdoc(cls))
    rows = ["| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        default = "" if field.default is dataclasses.MISSING else f"`{short(field.default)}`"
        rows.append(
            f"| `{field.name}` | {default} | {told.get(field.name, '')} |".replace(r"\|", "|")
        )
    return "\n".join(rows)


def short(value: Any) -> str:
    """`repr` without the later fields of a dataclass that have their defaults."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = dataclasses.fields(value)
    said = [(f, getattr(value, f.name)) for f in fields]
    shown = [f"{f.name}={short(v)}" for f, v in said if v != f.default or f is fields[0]]
    return f"{type(value).__name__}({', '.join(shown)})"


def fenced(text: str) -> str:
    """The text with its indented formulas as blocks of code."""
    lines, inside = [], False
    for line in [*text.split("\n"), ""]:
        formula = line.startswith("    ") or (inside and not line and lines[-1] != "")
        if formula != inside and line.strip():
            lines += ["```", ""] if inside else ["", "```"]
            inside = formula
        elif inside and not line:
            lines.append("```")
            inside = False
        lines.append(line.removeprefix("    ") if inside else line)
    return "\n".join(lines).strip()


def attributes(doc: str) -> dict[str, str]:
    """Name → text of the entries under `Attributes:`; names that share an entry share its text."""
    block = doc.partition("Attributes:\n")[2]
    found = {}
    for names, text in re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", block, re.M):
        for name in names.split(", "):
            found[name] = " ".join(text.split()).replace("|", r"\|")
    return found


def table(recipes: list[tuple[pathlib.Path, dict[str, str]]]) -> str:
    """One row a recipe."""
    rows = ["| recipe | what | measured |", "|---|---|---|"]
    for path, facts in recipes:
        link = f"[`{path.name}`](../../{path})"
        parts = [facts.get(name) for name in FIELDS[2:]]
        parts = [
            p if n == "Expect" else f"{n.lower()}: {p}"
            for n, p in zip(FIELDS[2:], parts, strict=True)
            if p
        ]
        measured = "; ".join(p.rstrip(".") for p in parts)
        rows.append(f"| {link} | {facts['title'].rstrip('.')} | {measured} |")
    return "\n".join(rows)


def recipes_by_method() -> dict[str, list[tuple[pathlib.Path, dict[str, str]]]]:
    """Method → the recipes under configs/ with it as a step, and what they say of themselves."""
    from jaxcomp.recipe import load_recipe

    found: dict[str, list] = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        facts = told(path)
        for step in used(load_recipe(path).steps):
            found.setdefault(step, []).append((path.relative_to(ROOT), facts))
    return found


def used(steps: tuple[Any, ...]) -> list[str]:
    """Names of the methods of a recipe, those inside other methods too, each once."""
    names = [type(s).__name__ for step in steps for s in (step, getattr(step, "method", None)) if s]
    return list(dict.fromkeys(names))


def told(path: pathlib.Path) -> dict[str, str]:
    """`title` and the fields of a recipe's docstring, each on one line."""
    doc = path.read_text(encoding="utf-8").split('"""')[1]
    facts = {"title": " ".join(doc.partition("\n\n")[0].split())}
    for field, text in re.findall(rf"^({'|'.join(FIELDS)}): (.*(?:\n(?!\w+:).+)*)", doc, re.M):
        facts[field] = " ".join(text.split())
    return facts


if __name__ == "__main__":
    main()
