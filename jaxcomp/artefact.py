"""The artefact: a model on disk as the tree it is, with what made it and what it was measured at.

    OUT/manifest.json       format and version; per part its nodes, their static fields, and shape,
                            dtype and sha256 of each leaf; size and sha256 of every other file;
                            the digest of itself
    OUT/params/root/        embedding, final norm, head: one orbax checkpoint
    OUT/params/blocks.0/    one orbax checkpoint a block
    OUT/recipe.json, OUT/report.json, OUT/tokenizer/…, OUT/config.json, …

One checkpoint a block, where one for the whole model would be the obvious layout: so a block is
written and read while no other is in memory, and a block that is already stored (in a work store or
in another artefact) is linked instead of written again.

The manifest rebuilds the tree, so a model loads with no code knowing what was done to it, and
nothing is pickled. An artefact is written beside its place and renamed, so a killed run leaves
nothing that loads. Two runs gave the same model when their `leaf_hashes` are equal; the names that
orbax gives its files always differ.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from jaxcomp.core.files import new_directory, read_sealed, sha256_file, write_sealed
from jaxcomp.core.plain import Json
from jaxcomp.core.store import (
    Contents,
    StoredTree,
    contents_from_json,
    contents_to_json,
    link_tree,
    write_tree,
)

# Importing the decoder registers every node class that an artefact may hold.
from jaxcomp.models.decoder import BlockHandle, Decoder, load_block

FORMAT, VERSION = "jaxcomp-artefact", 1
MANIFEST = "manifest.json"
RESERVED = (MANIFEST, "recipe.json", "report.json", "params")


def save(
    model: Decoder,
    path: os.PathLike | str,
    *,
    recipe: dict | None = None,
    report: dict | None = None,
    files: Mapping[str, bytes | pathlib.Path] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `model` as the directory `path`, one block in memory at a time.

    Args:
      model: blocks may be behind handles; those stored in our own form are linked.
      path: absent or empty, or with `overwrite` an older artefact, which stays until the new one
        is complete.
      recipe, report: JSON values kept as `recipe.json` and `report.json`.
      files: further files, path inside the artefact → content or the file to copy.

    Raises:
      ValueError: `path` is taken (see `check_output`), or a part has no stored form.
      OSError: it cannot be written; nothing is left behind and an older artefact is untouched.
    """
    path = pathlib.Path(path).resolve()
    check_output(path, overwrite)
    extra = {name: _checked_source(name, source) for name, source in (files or {}).items()}
    for name, data in (("recipe.json", recipe), ("report.json", report)):
        if data is not None:
            extra[name] = json.dumps(data, indent=2, allow_nan=False).encode() + b"\n"
    with new_directory(path, replace=overwrite) as out:
        parts = {"root": _write_part(out / "params" / "root", model.replace(blocks=()))}
        for i, block in enumerate(model.blocks):
            parts[f"blocks.{i}"] = _write_part(out / "params" / f"blocks.{i}", block)
        for name, source in extra.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                (out / name).write_bytes(source)
            else:
                shutil.copyfile(source, out / name)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "parts": {name: contents_to_json(contents) for name, contents in parts.items()},
            "files": {
                name: {"bytes": (out / name).stat().st_size, "sha256": sha256_file(out / name)}
                for name in _files_in(out)
            },
        }
        write_sealed(out / MANIFEST, manifest)


def load(
    path: os.PathLike | str,
    *,
    lazy: bool = False,
    compute_dtype: str | None = None,
    verify: bool = True,
) -> Decoder:
    """The model of an artefact, with numpy leaves on the host.

    Args:
      path: the directory.
      lazy: leave the blocks on disk as handles, each read when it is used.
      compute_dtype: replaces the stored one; weights keep their stored dtype.
      verify: hash every file first. Without it damaged weights are still found, when they are read.

    Raises:
      ValueError: not an artefact, a later version, an unknown node, or any changed, missing or
        added file; the message names it.
    """
    path = pathlib.Path(path)
    manifest = read_manifest(path)
    if verify:
        verify_files(path, manifest)
    parts = {
        name: StoredTree(path / "params" / name, contents)
        for name, contents in _contents(manifest).items()
    }
    for part in parts.values():
        part.struct()  # an unknown node is found here and not in the middle of the model
    root = parts.pop("root").load()
    blocks = tuple(parts[f"blocks.{i}"] for i in range(len(parts)))
    model = root.replace(blocks=blocks if lazy else tuple(load_block(b) for b in blocks))
    if compute_dtype is None:
        return model
    return model.replace(config=dataclasses.replace(model.config, compute_dtype=compute_dtype))


def check_output(path: os.PathLike | str, overwrite: bool = False) -> None:
    """Refuses a place where `save` would destroy something.

    Raises:
      ValueError: `path` is a file; or holds something that is not an artefact's; or holds an
        artefact and `overwrite` is False.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; name a directory that is new, empty or an artefact")
    if not any(path.iterdir()):
        return
    if not is_artefact(path):
        names = sorted(entry.name for entry in path.iterdir())
        raise ValueError(
            f"{path} holds {', '.join(names[:3])}{', …' if len(names) > 3 else ''} and is no "
            "artefact; nothing there is touched: choose another directory or empty this one"
        )
    if foreign := set(_files_in(path)) - set(read_manifest(path)["files"]):
        raise ValueError(
            f"{path} is an artefact but also holds {', '.join(sorted(foreign)[:3])}, which is not "
            "part of it; move that away or choose another directory"
        )
    if not overwrite:
        raise ValueError(
            f"{path} holds an artefact already; use overwrite=True (--overwrite) to replace it, or "
            "choose another directory"
        )


def is_artefact(path: os.PathLike | str) -> bool:
    """True for a directory that `save` made, intact or not."""
    try:
        return f'"{FORMAT}"' in (pathlib.Path(path) / MANIFEST).read_text(errors="replace")
    except OSError:
        return False


def read_manifest(path: os.PathLike | str) -> dict[str, Json]:
    """The manifest, its digest checked.

    Raises:
      ValueError: there is none, it is damaged, or a later version wrote it.
    """
    file = pathlib.Path(path) / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{path} is not an artefact: there is no {MANIFEST} in it; give a directory that "
            "`jaxcomp compress --out` wrote"
        )
    manifest = read_sealed(file)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} has format {manifest.get('format')!r}; known: {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{file} has version {manifest.get('version')!r}; known: {VERSION}. "
            "Install the version of jaxcomp that wrote it, or make it again"
        )
    return manifest


def verify_files(path: os.PathLike | str, manifest: dict[str, Json] | None = None) -> None:
    """Hashes every file of an artefact.

    Raises:
      ValueError: one is missing, added or changed; the message names it.
    """
    path = pathlib.Path(path)
    known, found = (manifest or read_manifest(path))["files"], set(_files_in(path))
    again = "copy the artefact again from its source or make it again"
    if missing := sorted(set(known) - found):
        raise ValueError(f"{path} lacks {', '.join(missing[:3])} ({len(missing)} in all); {again}")
    if added := sorted(found - set(known)):
        raise ValueError(
            f"{path} holds {', '.join(added[:3])} ({len(added)} in all), which its manifest does "
            "not list; move it away, or load with verify=False"
        )
    for name, info in known.items():
        size = (path / name).stat().st_size
        if size != info["bytes"]:
            raise ValueError(f"{path / name} has {size} bytes instead of {info['bytes']}; {again}")
        if sha256_file(path / name) != info["sha256"]:
            raise ValueError(
                f"{path / name} has changed: its sha256 is not the manifest's; {again}"
            )


def leaf_hashes(path: os.PathLike | str) -> dict[str, str]:
    """sha256 of every leaf under its path in the model; equal for equal models."""
    return {
        leaf if part == "root" else f"{part}.{leaf}": info.sha256
        for part, contents in _contents(read_manifest(path)).items()
        for leaf, info in contents.leaves.items()
    }


def read_json(path: os.PathLike | str, name: str) -> Any:
    """`recipe.json`, `report.json` or another JSON file of an artefact.

    Raises:
      ValueError: the artefact holds no such file, or it has changed; the message lists the files.
    """
    path = pathlib.Path(path)
    files = read_manifest(path)["files"]
    if name not in files:
        there = ", ".join(f for f in files if not f.startswith("params/")) or "only the parameters"
        raise ValueError(f"{path} has no {name!r}; there is: {there}")
    if not (path / name).is_file() or sha256_file(path / name) != files[name]["sha256"]:
        raise ValueError(f"{path / name} is missing or has changed since it was written")
    return json.loads((path / name).read_bytes())


def _write_part(path: pathlib.Path, part: Any) -> Contents:
    path.mkdir(parents=True)
    if isinstance(part, StoredTree):
        return link_tree(part, path)
    return write_tree(path, part.load() if isinstance(part, BlockHandle) else part)


def _contents(manifest: dict[str, Json]) -> dict[str, Contents]:
    return {name: contents_from_json(data) for name, data in manifest["parts"].items()}


def _files_in(path: pathlib.Path) -> list[str]:
    """Every file under `path` but the manifest, relative, sorted."""
    files = (p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir())
    return sorted(name for name in files if name != MANIFEST)


def _checked_source(name: str, source: bytes | pathlib.Path) -> bytes | pathlib.Path:
    pure = pathlib.PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or pure.parts[0] in RESERVED:
        raise ValueError(
            f"files has the name {name!r}; use a relative path that does not start with one of "
            f"{', '.join(RESERVED)}"
        )
    if not isinstance(source, bytes) and not pathlib.Path(source).is_file():
        raise ValueError(f"files[{name!r}] is {source}, which is no file")
    return source
