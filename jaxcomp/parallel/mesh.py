"""Data parallelism: a batch over the devices of a 1-D mesh, everything else on all of them.

Three passes over the calibration text know the mesh: `models.stream.step_batches`,
`calibrate.capture.capture` and `calibrate.fit.run_fit`. Each spreads the block, shares out the
batches, and hands back what a caller without a mesh would get: hidden states on the host, and
statistics or parameters on the first device of the process. What a method does between the passes
is the same code, on one device.

The compiler inserts the sums over devices: a program sees whole batches, so a mean of the loss is
the mean over all windows, and its gradient the gradient of that mean.

With several processes (`jax.distributed.initialize`) a host holds its own rows of every batch, and
the statistics, being sums over all devices, are the same in every process to the last bit.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

AXIS = "data"

Tree = TypeVar("Tree")
Batch = Shaped[np.ndarray, "batch *rest"]


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, "data", over `devices`; by default over all of all processes."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Between the host and the devices of a mesh; without a mesh every method is the identity.

    Attributes:
      mesh: from `data_mesh`, or None.
    """

    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """Devices a batch is shared among."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def processes(self) -> int:
        """Processes a batch is shared among."""
        return 1 if self.mesh is None else len({d.process_index for d in self.mesh.devices.flat})

    def check_batch(self, windows: int, what: str, instead: str) -> None:
        """Refuses a batch that the devices cannot share evenly.

        Raises:
          ValueError: names `what`, the devices, and `instead`.
        """
        if windows % self.devices:
            raise ValueError(
                f"{what} is {windows}, which {self.devices} devices cannot share evenly; {instead}"
            )

    def share(self, batch: Batch) -> Batch:
        """The rows of a batch that this process holds."""
        if self.mesh is None:
            return batch
        rows = self._rows.addressable_devices_indices_map(batch.shape).values()
        return np.concatenate([batch[r] for r, *_ in sorted(rows, key=lambda r: r[0].start or 0)])

    def put(self, share: Batch) -> Batch | Array:
        """The whole batch on the devices, of which this process holds `share`."""
        if self.mesh is None:
            return share
        return jax.make_array_from_process_local_data(self._rows, share)

    def get(self, batch: Array) -> Batch:
        """This process's rows of a batch on the devices; the inverse of `put`."""
        if self.mesh is None:
            return np.asarray(batch)
        assert batch.sharding.is_equivalent_to(self._rows, batch.ndim), batch.sharding
        shards = sorted(batch.addressable_shards, key=lambda s: s.index[0].start or 0)
        return np.concatenate([np.asarray(s.data) for s in shards])

    def replicate(self, tree: Tree) -> Tree:
        """The arrays of a tree on every device; all processes must hold equal ones.

        On its own device an array is not copied: who donates the result loses the original.
        """
        return tree if self.mesh is None else jax.tree.map(self._replicate, tree)

    def local(self, tree: Tree) -> Tree:
        """The inverse of `replicate`: the arrays on the first device of this process alone."""
        return tree if self.mesh is None else jax.tree.map(_first, tree)

    def _replicate(self, a: Array) -> Array:
        # device_put would compare the values between processes before it believed them equal.
        copies = [jax.device_put(a, device) for device in self.mesh.local_devices]
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.make_array_from_single_device_arrays(a.shape, everywhere, copies)

    @property
    def _rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(AXIS))


def as_replicated(tree: Tree, batch: Array) -> Tree:
    """Inside a jitted function: the tree on every device that shares `batch`.

    The compiler is left no choice about results that the next call takes as donated arguments.
    """
    mesh = jax.typeof(batch).sharding.mesh
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def as_batch(y: Array, batch: Array) -> Array:
    """Inside a jitted function: `y` shared among the devices as `batch` is."""
    mesh = jax.typeof(batch).sharding.mesh
    if mesh.empty:
        return y
    return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, PartitionSpec(AXIS)))


def _first(a: Array) -> Array:
    assert a.is_fully_replicated, a.sharding
    return a.addressable_data(0)
