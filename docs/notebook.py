"""Runs the cells of docs/tour.ipynb in order, in an empty directory, and stores what they print.

No Jupyter is needed, nor a network. A slow test runs the cells too.

Run: python docs/notebook.py
"""

import contextlib
import io
import json
import os
import pathlib
import tempfile
from typing import Any

NOTEBOOK = pathlib.Path(__file__).resolve().parent / "tour.ipynb"


def main() -> None:
    notebook = run(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its outputs; an error in a cell is raised."""
    names: dict[str, Any] = {}
    here, cells, count = os.getcwd(), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    count += 1
                    source, printed = "".join(cell["source"]), io.StringIO()
                    with contextlib.redirect_stdout(printed):
                        exec(compile(source, f"cell {count}", "exec"), names)
                    cell = cell | {"execution_count": count, "outputs": _outputs(printed)}
                cells.append(cell)
        finally:
            os.chdir(here)
    return notebook | {"cells": cells}


def _outputs(printed: io.StringIO) -> list[dict[str, Any]]:
    lines = printed.getvalue().splitlines(keepends=True)
    return [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []


if __name__ == "__main__":
    main()
