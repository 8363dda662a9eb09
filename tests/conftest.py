"""Shapes and dtypes are checked in tests: in the numeric layers annotations hold at every call.

Functions that take JAX arrays take numpy's as well, so for the checks `Array` is either.
"""

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
    "jaxcomp.models.likelihood",
    "jaxcomp.models.rope",
    "jaxcomp.models.stream",
    "jaxcomp.models.text",
)

jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(list(NUMERIC), "beartype.beartype")


MAPS = pathlib.Path("/proc/self/maps")
MANY = 20_000  # Linux allows 65,530 mappings; every compiled program takes a few, for good


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Drops compiled programs before the process runs out of memory mappings and is killed."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
