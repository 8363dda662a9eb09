"""What a GGUF export tells its user: what the file holds, and what happened to which tensors."""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxcomp.hub.gguf_blocks import FLOATS, Loss
from jaxcomp.hub.gguf_container import Entry


def contents(path: Path, entries: Sequence[Entry]) -> str:
    """Tensors by type, sizes, and where there is room for less."""
    kinds = collections.Counter(entry.type for entry in entries)
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    size = path.stat().st_size
    told = f"{path.name} holds {len(entries)} tensors ({counts}) in {size / 1e6:.1f} MB."
    matrices = [entry for entry in entries if entry.type in FLOATS and len(entry.shape) > 1]
    floats = sum(entry.nbytes for entry in matrices)
    if 2 * floats < size:
        return told
    smaller = "F16 or Q8_0" if any(entry.type == "F32" for entry in matrices) else "Q8_0"
    return f"{told} Dense matrices are {floats / 1e6:.1f} MB of it, and less as {smaller} (dense)."


def changes(done: Mapping[str, str], losses: Mapping[str, Loss]) -> list[str]:
    """A sentence for each thing that was done to tensors, with the worst that came of it.

    Args:
      done: name of a tensor → what was done to it.
      losses: name → what it cost.
    """
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name, what in done.items():
        groups[what].append(name)
    notes = []
    for what, names in groups.items():
        worst = max(names, key=lambda name: losses[name].relative)
        error = f"relative error up to {losses[worst].relative:.1e}, in {worst}"
        notes.append(f"{', '.join(folded(names))}: {what} ({error}).")
    return notes


def folded(names: Iterable[str]) -> list[str]:
    """The names with the numbers of blocks drawn together: `blk.0-29.attn_q.weight`."""
    found: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=^blk\.)\d+", name)
        key = name if number is None else f"blk.*{name[number.end() :]}"
        found.setdefault(key, []).extend([] if number is None else [int(number[0])])
    return [name.replace("*", _ranges(numbers), 1) for name, numbers in found.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ",".join("-".join(map(str, run)) for run in runs)
