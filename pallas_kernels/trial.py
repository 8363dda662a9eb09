"""Kernels written without their chip at hand run once beside the reference before they are used.

Compilers and interpreters prove much of a kernel, but not its numbers on the chip. A module of such
kernels has `EXAMPLES`: by function, what makes small operands of the kind that a call has, with the
tile that the call would get. The first call of each kind on a device runs both on these, in some
seconds; a kernel that fails or disagrees is not used in this process, and a warning says so.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import jax
import numpy as np

from pallas_kernels.chips import Chip, default_chip

log = logging.getLogger(__name__)
FLOATS = 1e-2  # of the largest entry: 16-bit floats, sums in another order
CODES = 1e-2  # share of integers that may be off by one, where another order tips a tie
_passed: dict[Hashable, bool] = {}


@dataclasses.dataclass(frozen=True)
class Example:
    """A call like another one.

    Attributes:
      kind: equal for calls that run the same kernel, but for sizes.
      args: operands, NumPy arrays or what was made of them.
      tile: as the call's.
    """

    kind: Hashable
    args: tuple
    tile: Any


def passes(
    module: ModuleType, function: str, reference: Callable, chip: Chip, args: tuple, static: dict
) -> bool:
    """Whether a kernel may be used for a call; its first of a kind on a present chip runs a trial.

    Raises:
      NotImplementedError: the kernel does not take such a call.
    """
    make = getattr(module, "EXAMPLES", {}).get(function)
    if make is None or default_chip() != chip:  # nothing to run it on: somebody only compiles
        return True
    with jax.ensure_compile_time_eval():
        example: Example = make(*args, **static)
        settings = tuple((name, str(value)) for name, value in sorted(static.items()))
        kind = (module.__name__, function, chip.name, example.kind, settings)
        if kind not in _passed:
            kernel = functools.partial(getattr(module, function), chip=chip, tile=example.tile)
            problem = _problem(kernel, reference, example, static)
            _passed[kind] = problem is None
            if problem:
                log.warning(
                    "%s of %s is not used on this %s: %s (%s)",
                    *(function, module.__name__, chip.name, problem, example.kind),
                )
    return _passed[kind]


def _problem(kernel: Callable, reference: Callable, example: Example, static: dict) -> str | None:
    """What is wrong with the kernel's result, None if nothing is."""
    try:
        found = jax.jit(functools.partial(kernel, **static))(*example.args)
        found = jax.tree.map(np.asarray, found)
    except Exception as error:  # whatever a compiler or a driver raises, the reference still works
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    expected = jax.jit(functools.partial(reference, **static))(*example.args)
    expected = jax.tree.map(np.asarray, expected)
    problems = map(_difference, jax.tree.leaves(found), jax.tree.leaves(expected))
    return next(filter(None, problems), None)


def _difference(found: np.ndarray, expected: np.ndarray) -> str | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {found.shape} instead of {expected.dtype} {expected.shape}"
    if np.issubdtype(found.dtype, np.integer):
        if found.dtype == np.uint8:  # two codes a byte
            found, expected = (np.stack([a & 15, a >> 4]) for a in (found, expected))
            off = (found.astype(int) - expected + 8) % 16 - 8
        else:
            off = found.astype(int) - expected
        if np.abs(off).max(initial=0) > 1 or np.mean(off != 0) > CODES:
            return f"{np.mean(off != 0):.1%} of codes are off, by up to {np.abs(off).max()}"
        return None
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    limit = FLOATS * np.abs(expected).max(initial=0)
    off = np.abs(found - expected).max(initial=0)
    return None if off <= limit else f"off by {off:.3g}, where {limit:.3g} is allowed"
