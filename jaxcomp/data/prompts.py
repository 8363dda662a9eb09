"""Prompts from a file: one a line as text, or one JSON value a line (`.jsonl`)."""

import json
import pathlib


def read_prompts(path: str | pathlib.Path) -> list[str]:
    """The prompts of a file, in their order.

    Lines of a text are taken as they are, empty ones left out. A line of a `.jsonl` file is a
    string, or an object with one under "prompt"; there a prompt may have several lines.

    Raises:
      ValueError: no such file, none in it, or a line that is neither; the message has its number.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of prompts {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} is empty; write one prompt a line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_from_json(f"{path}, line {i}", line) for i, line in numbered]


def _from_json(place: str, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'{place} has no prompt; write "text" or {{"prompt": "text"}}')
    return prompt
