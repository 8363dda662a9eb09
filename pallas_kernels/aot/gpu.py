"""XLA's compiler for Hopper with NVIDIA's ptxas, on a machine without a GPU, and what they say.

Mosaic GPU hands PTX to ptxas, which reports registers and spills and, with nvdisasm, the machine
code. Counted in that are the instructions that tell whether a kernel became what it was meant to
be: tensor-core products (HGMMA of floats, IGMMA of integers), asynchronous copies (UTMALDG), and
conversions of integers one by one (I2F), which a loop that dequantizes should do without.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.aot import Kernel
from pallas_kernels.chips import Chip

# bandwidth in bytes/s, memory in bytes; the rest is the same silicon.
CARDS = {
    "h100": ("NVIDIA H100 80GB HBM3", 3_352_320_000_000, 84_942_979_072),
    "h200": ("NVIDIA H200", 4_800_000_000_000, 150_754_820_096),
}
TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{name}" """
DUMP = "MOSAIC_GPU_DUMP_TO"
SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)")
INSTRUCTIONS = ("HGMMA", "IGMMA", "UTMALDG", "UTMASTG", "I2F", "F2I", "LDL", "STL")


def lacking() -> list[str]:
    """The packages that have to be installed."""
    found = {
        "jax-cuda13-plugin": importlib.util.find_spec("jax_cuda13_plugin"),
        "jax-cuda13-pjrt": importlib.util.find_spec("jax_plugins.xla_cuda13")
        if importlib.util.find_spec("jax_plugins")
        else None,
        "nvidia-cuda-nvcc (ptxas)": tool("ptxas"),
    }
    return [name for name, there in found.items() if not there]


def tool(name: str) -> pathlib.Path | None:
    """A program of the CUDA toolkit: of its Python packages, else wherever PATH has it."""
    spec = importlib.util.find_spec("nvidia")
    for root in [] if spec is None else spec.submodule_search_locations or []:
        for path in sorted(pathlib.Path(root).glob(f"*/bin/{name}"), reverse=True):
            return path
    found = shutil.which(name)
    return pathlib.Path(found) if found else None


@contextlib.contextmanager
def dumped(directory: str | os.PathLike | None) -> Iterator[list[Kernel]]:
    """A list that on leaving holds the kernels compiled inside; empty without a directory.

    A process compiles a kernel once: the same one in a second program is not in its list.
    """
    before = {name: os.environ.get(name) for name in ("PATH", DUMP)}
    programs = filter(None, (tool("ptxas"), tool("nvdisasm")))
    folders = dict.fromkeys(str(path.parent) for path in programs)
    os.environ["PATH"] = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    kernels: list[Kernel] = []
    reports = set()
    if directory is not None:
        directory = pathlib.Path(directory).resolve(strict=True)
        os.environ[DUMP] = str(directory)
        reports = set(directory.glob("*.ptxas"))
    try:
        yield kernels
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    if directory is not None:
        for path in sorted(set(directory.glob("*.ptxas")) - reports):
            kernels.append(Kernel(path.stem.rpartition("_")[0], figures(path)))


def sharding(chip: Chip) -> jax.sharding.Sharding:
    """One device of the chip."""
    devices = np.array(topology(chip.name).devices[:1])
    return jax.sharding.NamedSharding(
        jax.sharding.Mesh(devices, ("x",)), jax.sharding.PartitionSpec()
    )


@functools.cache
def topology(name: str) -> topologies.TopologyDescription:
    """Devices that are not there; loads the CUDA plugin."""
    card, bandwidth, memory = CARDS[name]
    target = TARGET.format(name=card, bandwidth=bandwidth, memory=memory)
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")


def figures(report: pathlib.Path) -> dict[str, int]:
    """What ptxas wrote about one kernel, with what lies beside it.

    Returns:
      `registers` of a thread; `spills`, bytes stored for want of registers; `shared`, bytes of
      on-chip memory of a program; and where nvdisasm is there, counts of `INSTRUCTIONS`.
    """
    text = report.read_text()
    found = {
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "spills": int(re.search(r"(\d+) bytes spill stores", text)[1]),
    }
    passes = report.with_suffix(".mlir-passes.log")
    sizes = SHARED.findall(passes.read_text()) if passes.exists() else []
    if sizes:
        found["shared"] = int(sizes[-1])
    for code in report.parent.glob(f"{report.stem}.sass*"):
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code.read_text())
        found |= {name: sum(n.startswith(name) for n in names) for name in INSTRUCTIONS}
        break
    return found
