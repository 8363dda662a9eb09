"""Builds `native.cpp` and registers its functions with XLA.

The library has no Python ABI and depends on the headers that jaxlib ships, so one build serves all
processes with the same jaxlib and compiler. It is kept under the user's cache directory, named by
what went into it, and written aside first: processes that start together do not disturb each other.

Environment:
    JAXCOMP_NATIVE=0          do without
    JAXCOMP_NATIVE_THREADS=N  threads of a call, by default one a core that the process may use
    JAXCOMP_CACHE=DIR         keep the library under DIR; by default $XDG_CACHE_HOME/jaxcomp
    CXX                       the compiler, by default c++, g++ or clang++
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import jax

log = logging.getLogger(__name__)
SOURCE = pathlib.Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")
TARGETS = (
    "jaxcomp_float_product",
    "jaxcomp_integer_product",
    "jaxcomp_dense_product",
    "jaxcomp_quantize",
    "jaxcomp_decode_attention",
    "jaxcomp_prefill_attention",
)
COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 300


def require() -> None:
    """Makes the functions callable through `jax.ffi.ffi_call`.

    Raises:
      NotImplementedError: they cannot be had here; the message says why.
    """
    if reason := _unavailable():
        raise NotImplementedError(reason)


def available() -> bool:
    """Whether `require` succeeds; builds the library if there is none yet."""
    return not _unavailable()


def threads() -> int:
    """Threads that a call is shared among."""
    require()
    return _load().jaxcomp_native_threads()


@functools.cache
def _unavailable() -> str:
    """Why the library cannot be used; empty when it can, and is then registered."""
    if os.environ.get("JAXCOMP_NATIVE", "1") == "0":
        return "JAXCOMP_NATIVE=0"
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return f"written for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    if " avx512_vnni" not in _processor_flags():
        return "the processor has no AVX-512 VNNI"
    try:
        library = _load()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"no native library: {error}"
    if not library.jaxcomp_native_supported():
        return "the processor lacks a part of AVX-512"
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return ""


@functools.cache
def _load() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise RuntimeError(f"no C++ compiler ({', '.join(COMPILERS)}); name one by CXX")
    found = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    parts = (SOURCE.read_text(), found.stdout, importlib.metadata.version("jaxlib"), *FLAGS)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    name = f"native-{digest}.so"
    path = _directory() / name
    if not path.exists():
        _build(compiler, path)
    return ctypes.CDLL(str(path))


def _build(compiler: str, path: pathlib.Path) -> None:
    log.info("compiling the CPU kernels, once: %s", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # `-isystem`: the warnings in the headers are not ours.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = pathlib.Path(scratch) / path.name
        command = [
            compiler,
            *FLAGS,
            "-isystem",
            jax.ffi.include_dir(),
            str(SOURCE),
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        made.replace(path)


def _directory() -> pathlib.Path:
    if (chosen := os.environ.get("JAXCOMP_CACHE", "off")) not in ("", "off"):
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jaxcomp"


def _processor_flags() -> str:
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
