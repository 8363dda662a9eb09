"""Shapes and dtypes are checked in tests: in the numeric layers annotations hold at every call.

Functions that take JAX arrays take numpy's as well, so for the checks `Array` is either.
"""

import itertools
import pathlib

import jax
import jaxtyping
import numpy as np
import pytest

NUMERIC = (
    "pallas_kernels",
    "jaxcomp.core.activation",
    "jaxcomp.core.linear",
    "jaxcomp.core.qarray",
    "jaxcomp.core.quantize",
    "jaxcomp.core.site",
    "jaxcomp.core.transforms",
    "jaxcomp.hub.bits",
    "jaxcomp.hub.ct_pack",
    "jaxcomp.kv",
    "jaxcomp.solvers",
    "jaxcomp.calibrate.stats",
    "jaxcomp.models.attention",
    "jaxcomp.models.decoder",
    "jaxcomp.models.ffn",
    "jaxcomp.models.fold",
    "jaxcomp.models.generate",
    "jaxcomp.models.head",
    "jaxcomp.models.layers",
    "jaxcomp.models.patch",
    "jaxcomp.models.likelihood",
    "jaxcomp.models.rope",
    "jaxcomp.models.sampling",
    "jaxcomp.models.session",
    "jaxcomp.models.stream",
    "jaxcomp.models.support",
    "jaxcomp.calibrate.losses",
    "jaxcomp.models.text",
)

jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(list(NUMERIC), "beartype.beartype")


MAPS = pathlib.Path("/proc/self/maps")
MANY, MOST = 20_000, 40_000  # Linux allows 65,530 mappings; each compiled program keeps a few
EVERY = 10  # tests between two looks: to count takes milliseconds
TESTS = itertools.count()


def mappings() -> int:
    """Memory mappings of this process; 0 where the system does not tell."""
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Drops compiled programs before the process runs out of memory mappings and is killed."""
    yield
    if mappings() > MANY:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def not_too_many_mappings():
    """The same inside a long module, whose programs are kept as long as may be."""
    yield
    if next(TESTS) % EVERY == 0 and mappings() > MOST:
        jax.clear_caches()
