"""Compile for a chip that is not there, with its vendor's compiler, and read what that says.

The compilers refuse what the chip would refuse (tilings, operations, memory) and report memory,
registers and schedules; the time a kernel takes is the one thing that needs the chip. They come
with the extras `tpu-aot` and `gpu-aot`. On a machine without an accelerator set JAX_PLATFORMS=cpu
before jax is imported, or jax looks for one first.
"""

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.dispatch import use

# Each has a module here with the functions `lacking`, `dumped` and `sharding` of `tpu.py`.
PLATFORMS = ("tpu", "gpu")


class Kernel(NamedTuple):
    """What a compiler says of one kernel.

    Attributes:
      name: as the compiler calls it, which begins with the `name` of its `pallas_call`.
      figures: `spills` and, for a TPU, what `tpu.bundles` says; for a GPU, what `gpu` reads.
    """

    name: str
    figures: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compilation says.

    Attributes:
      seconds: to trace, lower and compile.
      arguments, outputs, temporaries: bytes of the chip's memory.
      kernels: empty without a `dump`.
    """

    chip: str
    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    kernels: tuple[Kernel, ...] = ()


class Compiled(NamedTuple):
    """A program of a chip that is not there, which therefore cannot be called."""

    executable: Any
    report: Report


def compile_for(
    chip_name: str, f: Callable, *structs: Any, dump: str | os.PathLike | None = None
) -> Compiled:
    """Compiles `f` for one device of the chip; its operations choose that chip's kernels.

    Args:
      f: a function of pytrees of arrays.
      *structs: its arguments, arrays or `jax.ShapeDtypeStruct`s.
      dump: an existing directory for what the compiler writes about its kernels. A process has one
        for each platform, from its first compilation on.

    Raises:
      ValueError: a chip without such a compiler, or another `dump` than the process has.
      ImportError: the compiler is not installed; the message says what to install.
      jax.errors.JaxRuntimeError: what the chip's compiler refuses, in its own words.
    """
    absent = missing(chip_name)
    if absent:
        raise ImportError(absent)
    chip = CHIPS[chip_name]
    compiler = importlib.import_module(f"pallas_kernels.aot.{chip.platform}")
    with compiler.dumped(dump) as kernels:
        place = compiler.sharding(chip)
        structs = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), structs
        )
        started = time.perf_counter()
        with use(chip_name):
            executable = jax.jit(f).lower(*structs).compile()
        seconds = time.perf_counter() - started
        memory = executable.memory_analysis()
    report = Report(
        chip_name,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        tuple(kernels),
    )
    return Compiled(executable, report)


def missing(chip_name: str) -> str | None:
    """What has to be installed to compile for the chip, None when nothing: a reason to skip.

    Raises:
      ValueError: a chip that has no compiler of this kind.
    """
    chip: Chip | None = CHIPS.get(chip_name)
    if chip is None or chip.platform not in PLATFORMS:
        known = [name for name, c in CHIPS.items() if c.platform in PLATFORMS]
        raise ValueError(f"chip_name={chip_name!r} cannot be compiled for; use one of {known}")
    compiler = importlib.import_module(f"pallas_kernels.aot.{chip.platform}")
    lacking = compiler.lacking()
    if not lacking:
        return None
    return (
        f"compiling for {chip_name} needs {' and '.join(lacking)}: "
        f"pip install 'jaxcomp[{chip.platform}-aot]'"
    )
