"""The documents say what the code says, and point at what is there."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import pytest

from jaxcomp.methods import METHODS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_of_the_methods_are_those_that_the_code_gives(generate):
    found = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs/methods").glob("*.md")}
    assert found == generate.pages(), "run python docs/generate.py"


def test_a_page_has_every_setting_with_its_meaning(generate):
    for name, cls in METHODS.items():
        rows = generate.settings(cls).splitlines()[2:]
        assert len(rows) == len(dataclasses.fields(cls))
        silent = [row.split("`")[1] for row in rows if row.endswith("|  |")]
        assert not silent, f"{name}: the docstring says nothing of {silent}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    inside = [link for link in links if "://" not in link]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_document_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b((?:configs|benchmarks|tests|docs)/[\w/.]+\.(?:py|md|json|png))\b", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_the_notebook_runs_offline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import notebook

    stored = json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))
    found = notebook.run(stored)
    ran = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    assert all(cell["outputs"] for cell in ran)
    printed = "".join("".join(out["text"]) for cell in ran for out in cell["outputs"])
    rtn, gptq = (float(x) for x in re.findall(r"relative error of the logits ([\d.]+)", printed))
    assert gptq < 0.7 * rtn
