"""Files that are whole or not there, and JSON that notices damage.

A directory is filled beside its place, synced and renamed. A sealed file carries the sha256 of its
own content and is written in one form, so that any changed byte, white space included, is found.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

from jaxcomp.core.plain import Json


@contextlib.contextmanager
def new_directory(path: pathlib.Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """A temporary sibling to fill; it is synced and renamed to `path` when the body ends well.

    `path` must be absent or an empty directory, or with `replace` any directory, which is removed
    after the new one is complete. A failed body leaves what was there; a killed one leaves
    `.NAME.tmp` besides, which the next attempt removes.

    Raises:
      OSError: with the place and the way out when the disk is full.
    """
    path = path.absolute()
    temporary, older = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    for left in (temporary, older):
        if left.exists() and (left == temporary or path.exists()):
            shutil.rmtree(left)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _sync(temporary)
        if replace and path.exists():
            path.rename(older)
        temporary.rename(path)
        _sync_one(path.parent)
        shutil.rmtree(older, ignore_errors=True)
    except BaseException as error:
        if older.exists() and not path.exists():
            older.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                errno.ENOSPC,
                f"the disk of {path.parent} is full; what was written of {path.name} is removed, "
                f"{free} bytes are free now; free some more or choose another place "
                f"({error.strerror:.200})",
            ) from error
        raise


def sha256_file(path: pathlib.Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(data: Json) -> bytes:
    """The one byte string for `data`: sorted keys, no white space, ASCII."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def write_sealed(path: pathlib.Path, data: dict[str, Json]) -> None:
    """Writes `data` with the digest of its canonical form as one more key, `sha256`."""
    path.write_bytes(_sealed(data))


def read_sealed(path: pathlib.Path) -> dict[str, Json]:
    """Reads what `write_sealed` wrote.

    Raises:
      ValueError: the file is not JSON or any byte of it has changed.
    """
    raw = path.read_bytes()
    try:
        data = json.loads(raw)
        data.pop("sha256")
        intact = _sealed(data) == raw
    except (ValueError, KeyError, AttributeError, RecursionError, TypeError):
        intact = False
    if not intact:
        raise ValueError(
            f"{path} does not have the sha256 it was written with: it was edited, cut or damaged; "
            "copy it again from its source or make it again"
        )
    return data


def _sealed(data: dict[str, Json]) -> bytes:
    digest = hashlib.sha256(canonical(data)).hexdigest()
    text = json.dumps({**data, "sha256": digest}, sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _sync(directory: pathlib.Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync_one(pathlib.Path(folder, name))
        _sync_one(pathlib.Path(folder))


def _sync_one(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
