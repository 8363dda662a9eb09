"""A flat dict of arrays, dotted path → array, as one orbax checkpoint.

Orbax does not notice a flipped bit in its data, so every array is checked against its hash. It
refuses arrays without elements; they are not written and come back from their shape.
"""

import contextlib
import errno
import hashlib
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("uint8", "int8", "float32", "bfloat16", "float16", "int32", "bool")


class LeafInfo(NamedTuple):
    """What is known of a leaf without reading it; `sha256` is over its bytes in C order."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


def leaf_info(name: str, leaf: np.ndarray) -> LeafInfo:
    """Shape, dtype and hash of an array.

    Raises:
      ValueError: a dtype with no stored form; the message says which have one.
    """
    if str(leaf.dtype) not in DTYPES:
        raise ValueError(
            f"leaf {name!r} is {leaf.dtype}, which has no stored form; cast it to one of "
            f"{', '.join(DTYPES)}"
        )
    raw = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return LeafInfo(leaf.shape, str(leaf.dtype), hashlib.sha256(raw).hexdigest())


def write_arrays(path: pathlib.Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Writes a flat dict of arrays as one orbax checkpoint; nothing at all when it is empty.

    Raises:
      OSError: orbax cannot write it; the message names the leaf where orbax does.
    """
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.size}
    if not leaves:
        return
    try:
        with _quiet():
            _checkpointer().save(path.absolute(), leaves)
    except Exception as error:
        reason = _reason(error)
        code = errno.ENOSPC if "No space left" in reason else errno.EIO
        raise OSError(code, f"writing{_culprit(reason, leaves)} failed: {reason}") from error


def read_arrays(path: pathlib.Path, infos: Mapping[str, LeafInfo]) -> dict[str, np.ndarray]:
    """Reads every leaf of an orbax checkpoint and checks it.

    Raises:
      OSError: orbax cannot read it; the message names the leaf where orbax does.
      ValueError: a leaf differs in shape, dtype or hash from what was stored.
    """
    import orbax.checkpoint as ocp

    written = [name for name, info in infos.items() if 0 not in info.shape]
    leaves = {n: np.zeros(i.shape, i.dtype) for n, i in infos.items() if 0 in i.shape}
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in written}
    if written:
        try:
            with _quiet():
                leaves |= _checkpointer().restore(path.absolute(), restore_args=as_numpy)
        except Exception as error:
            reason = _reason(error)
            raise OSError(
                errno.EIO,
                f"reading{_culprit(reason, written)} from {path} failed: {reason}; a file is "
                "missing, cut or damaged: copy it again from its source or make it again",
            ) from error
    if differ := set(leaves) ^ set(infos):
        raise ValueError(f"{path} and its description differ in the leaves {sorted(differ)}")
    for name, leaf in leaves.items():
        if (found := leaf_info(name, leaf)) != infos[name]:
            raise ValueError(
                f"leaf {name!r} in {path} is {_short(found)} but was stored as "
                f"{_short(infos[name])}: the data was changed or damaged; copy it again from its "
                "source or make it again"
            )
    return leaves


def _short(info: LeafInfo) -> str:
    return f"{info.dtype}{list(info.shape)} sha256 {info.sha256[:12]}…"


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of orbax: what matters comes as an exception."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    return str(error).partition(" [tensorstore_spec")[0] or type(error).__name__


def _culprit(reason: str, names: Iterable[str]) -> str:
    return next((f" leaf {name!r}" for name in names if f'"{name}/' in reason), "")
