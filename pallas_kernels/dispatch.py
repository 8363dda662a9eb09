"""Choose an implementation: the first of the chip's that does not refuse the call.

An operation lists, by platform, the modules of its package that implement it, fastest first; each
has a function of the operation's name. One refuses with `NotImplementedError` and a reason, which
is logged once; every other error is the caller's or ours and passes through. The reference, plain
jnp, is always last and refuses nothing. A kernel that was never run on its chip while it was
written is tried first (`pallas_kernels.trial`).

The chip is that of JAX's default device, at the time of tracing. `use` replaces it, to compile for
a chip that is not there, and forces the reference or an interpreter. As a compiled function does
not know which setting it was traced under, `use` drops all of them whenever it changes anything.

JAXCOMP_KERNELS=reference in the environment begins with the reference for everything.
"""

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels.chips import CHIPS, Chip, default_chip
from pallas_kernels.trial import passes

log = logging.getLogger(__name__)
Implementations = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What `use` says; None and False leave the choice to the device."""

    chip: str | None = None
    reference: bool = False
    interpret: Any = False


_setting = Setting(reference=os.environ.get("JAXCOMP_KERNELS") == "reference")


@contextlib.contextmanager
def use(chip: str | None = None, *, reference: bool = False, interpret: Any = False) -> Iterator:
    """Chooses implementations otherwise than by the default device, for all threads.

    Args:
      chip: a name in `CHIPS`.
      reference: plain jnp for everything.
      interpret: what `pl.pallas_call` takes, handed to every kernel of a TPU; for a GPU see
        `plgpu.force_gpu_interpret_mode`.

    Raises:
      ValueError: an unknown chip.
    """
    global _setting
    if chip is not None and chip not in CHIPS:
        raise ValueError(f"chip={chip!r} is unknown; use one of {', '.join(CHIPS)}")
    before, _setting = _setting, Setting(chip, reference, interpret)
    if _setting != before:
        jax.clear_caches()
    try:
        yield
    finally:
        if _setting != before:
            jax.clear_caches()
        _setting = before


def current_chip() -> Chip:
    """The chip that kernels are chosen for."""
    return CHIPS[_setting.chip] if _setting.chip else default_chip()


def first_supported(
    package: str,
    implementations: Implementations,
    reference: Callable,
    *args: Any,
    function: str | None = None,
    **static: Any,
) -> Any:
    """The result of the first implementation that takes these arguments.

    Args:
      package: of the operation, as in `pallas_kernels.quant_matmul`.
      implementations: platform → names of its modules.
      reference: differentiated in place of an implementation, which has no gradient of its own.
      *args: pytrees of arrays.
      function: its name in a module; None for that of the operation.
      **static: the rest; an implementation also gets `chip` and `interpret`.
    """
    op = function or package.rpartition(".")[2]
    chip = current_chip()
    names = () if _setting.reference else implementations.get(chip.platform, ())
    for name in names:
        module = importlib.import_module(f"{package}.{name}")
        if not hasattr(module, op):  # an operation of two functions, of which this has the other
            continue
        f = functools.partial(
            getattr(module, op), **static, chip=chip, interpret=_setting.interpret
        )
        try:
            # An interpreter runs where the chip is not, and has nothing to be tried against.
            if _setting.interpret or passes(module, op, reference, chip, args, static):
                return with_gradient(f, functools.partial(reference, **static))(*args)
        except NotImplementedError as refusal:
            tell_once(f"{op}: {module.__name__} does not take this call ({refusal})")
    return reference(*args, **static)


def with_gradient(implementation: Callable, reference: Callable) -> Callable:
    """`implementation` with the gradient of `reference`; both take pytrees of arrays alone."""

    @jax.custom_vjp
    def f(*args):
        return implementation(*args)

    def backward(args: tuple, cotangent: Any) -> tuple:
        return jax.vjp(reference, *args)[1](cotangent)

    f.defvjp(lambda *args: (f(*args), args), backward)
    return f


@functools.cache
def tell_once(message: str) -> None:
    """Logs a message the first time it is given."""
    log.info(message)
