"""The chips that kernels are written for, and what bounds them.

Figures are the vendors' peaks; what a machine reaches is measured by `benchmarks/`. Those of TPUs
are what `jax.experimental.pallas.tpu.get_tpu_info_for_chip` says.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
      name: how dispatch and tile tables call it.
      platform: of JAX's backend: "cpu", "tpu" or "gpu".
      kinds: beginnings of `device_kind`, lower case, that mean this chip.
      bandwidth: of its memory, bytes a second; 0 where it has to be measured.
      bf16, int8, int4: operations a second of the matrix unit; 0 where there is none.
      tile_bytes: on-chip memory that one program may hold.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    bandwidth: float = 0.0
    bf16: float = 0.0
    int8: float = 0.0
    int4: float = 0.0
    tile_bytes: int = 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("cpu", "cpu", ("cpu",)),
        Chip("v5e", "tpu", ("tpu v5 lite", "tpu v5e"), 820e9, 197e12, 394e12, 788e12, 128 << 20),
        Chip("v6e", "tpu", ("tpu v6 lite", "tpu v6e"), 1640e9, 920e12, 1840e12, 3680e12, 128 << 20),
        Chip("h100", "gpu", ("nvidia h100",), 3350e9, 989e12, 1979e12, 0.0, 232_448),
        Chip("h200", "gpu", ("nvidia h200",), 4800e9, 989e12, 1979e12, 0.0, 232_448),
    )
}


def chip_of(kind: str, platform: str) -> Chip:
    """The chip of a device's kind; one not in the table has its platform and no figures."""
    kind = kind.lower()
    for chip in CHIPS.values():
        if kind.startswith(chip.kinds):
            return chip
    return Chip(kind, platform, ())


def default_chip() -> Chip:
    """The chip of the device that computations go to unless they are told otherwise."""
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return chip_of(device.device_kind, device.platform)
