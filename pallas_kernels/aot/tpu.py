"""The TPU compiler, libtpu, on a machine without a TPU, and its schedules.

A TPU program is straight-line VLIW code: every bundle takes one cycle, so that the bundles of a
kernel without inner loops are about the cycles of one step of its grid (a prologue is counted, too,
and waits for memory are not). Beside them stands what each unit does: operations over what the
unit takes in a bundle is the least number of cycles that it could take.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.aot import Kernel
from pallas_kernels.chips import Chip

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}  # the smallest that libtpu knows
# libtpu asks a metadata server where it is, and locks the machine's TPUs, unless told otherwise.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=true"
UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"
FILE = re.compile(rf"\d+-(?P<name>[A-Za-z_][\w.]*)-\d+-{UTILIZATION}")
SPILL, FILL = "VSTORE:SPILL", "VLOAD:FILL"


def lacking() -> list[str]:
    """The packages that have to be installed."""
    return [] if importlib.util.find_spec("libtpu") else ["libtpu"]


@contextlib.contextmanager
def dumped(directory: str | os.PathLike | None) -> Iterator[list[Kernel]]:
    """A list that on leaving holds the kernels compiled inside; empty without a directory.

    Raises:
      ValueError: libtpu was loaded with another directory, or none.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if directory is None:
        yield []
        return
    directory = pathlib.Path(directory).resolve(strict=True)
    flags, given = FLAGS.format(directory), os.environ.get("LIBTPU_INIT_ARGS", "")
    if flags not in given:
        if topology.cache_info().currsize:
            raise ValueError(
                f"dump={str(directory)!r} comes too late: libtpu reads it when it is loaded; give "
                "it at the first compilation of the process, and the same ever after"
            )
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {flags}".strip()
    before = set(directory.glob(f"*{UTILIZATION}"))
    kernels: list[Kernel] = []
    yield kernels
    for path in sorted(set(directory.glob(f"*{UTILIZATION}")) - before):
        match = FILE.fullmatch(path.name)
        if match and match["name"] != "TLP":  # the top-level program, which only calls kernels
            kernels.append(Kernel(match["name"], bundles(path.read_text())))


def sharding(chip: Chip) -> jax.sharding.Sharding:
    """One device of the chip."""
    devices = np.array(topology(TOPOLOGIES[chip.name]).devices[:1])
    return jax.sharding.NamedSharding(
        jax.sharding.Mesh(devices, ("x",)), jax.sharding.PartitionSpec()
    )


@functools.cache
def topology(name: str) -> topologies.TopologyDescription:
    """Devices that are not there; loads libtpu."""
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def bundles(text: str) -> dict[str, int | float]:
    """Reads a table of units by bundle.

    Returns:
      `bundles`, how many; `spills` and `fills`, registers stored and loaded for want of registers;
      and for every unit (MXU, XLU, VALU, …) the cycles it takes at least.
    """
    head, _, table = text.partition("== UTILIZATION:")
    names, capacity = head.strip().splitlines()[-2:]
    names = [name.strip() for name in names.split(",")]
    used = np.array([row.split() for row in table.strip().splitlines()], int)
    used = used.reshape(-1, len(names))
    total = dict(zip(names, used.sum(axis=0).tolist(), strict=True))
    found = {
        "bundles": len(used),
        "spills": total[SPILL],
        "fills": total[FILL],
    }
    for name, most in zip(names, capacity.split(), strict=True):
        if name not in (SPILL, FILL):
            found[name] = total[name] / int(most)
    return found
