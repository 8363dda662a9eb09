"""A Hopper GPU in NumPy, to run what Mosaic GPU compiled where there is no such card.

    emulated(module, f, args)     f(*args), with the kernel that `module` calls run from its PTX

An interpreter runs a kernel's jaxpr and knows no layouts of registers, no swizzled memory, no
descriptors; all that is in PTX. Copies count bytes as the tensor maps do that Mosaic makes (from
its host code, which is among what it dumps), products read shared memory as descriptors say
(PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions").
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.aot import compile_for
from tests.kernels import ptx

BITS = {0: 4, 1: 8, 2: 16, 3: 32, 5: 16, 6: 32, 7: 16}  # of an element, by Mosaic's number of it
PRODUCTS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "s8": np.int8}
BEFORE, AFTER = (
    "GpuAssemblyToBinaryPass",
    "GpuLaunchLoweringPass",
)  # the host's code, at its plainest


class Map(NamedTuple):
    """A tensor map, the last axis contiguous; `array` is an index of the kernel's operands."""

    array: int
    element: int
    sizes: list[int]
    strides: list[int]
    swizzle: int
    box: list[int]


class Host(NamedTuple):
    """What the host's code says of a launch; `values` are the kernel's parameters."""

    grid: tuple[int, ...]
    shared: int
    values: list[int]
    maps: dict[int, Map]


def read_host(text: str) -> Host:
    """Follows the pointers through the host's code."""
    known: dict[str, Any] = {}
    cells: dict[tuple[str, int], Any] = {}
    maps: dict[int, Map] = {}
    for line in text.splitlines():
        names = re.findall(r"%[\w#]+", line)
        index = re.search(r"\[(-?\d+)", line)
        if "mlir.constant(" in line:
            known[names[0]] = int(re.search(r"constant\((-?\d+)", line)[1])
        elif "llvm.alloca" in line:
            known[names[0]] = (names[0], 0)
        elif "getelementptr" in line:
            base, offset = known.get(names[1], ("%arg1", 0)) or (None, 0)
            known[names[0]] = (base, offset + int(index[1])) if index else (base, offset)
        elif "llvm.load" in line:
            base, offset = known.get(names[1], ("%arg1", 0))
            known[names[0]] = ("array", offset) if base == "%arg1" else None
        elif "llvm.store" in line:
            cells[known[names[1]]] = known.get(names[0])
        elif "insertvalue" in line:
            inserted = known.get(names[1])
            known[names[0]] = inserted if isinstance(inserted, tuple) else known.get(names[2])
        elif "call @mosaic_gpu_init_tma_desc" in line:
            place, base, element, rank, sizes, strides, swizzle, box = names[-8:]
            read = lambda at: [cells[known[at][0], i] for i in range(known[rank])]  # noqa: B023, E731
            maps[known[place][1]] = Map(
                *(known[base][1], known[element], read(sizes), read(strides)),
                *(known[swizzle], read(box)),
            )
        elif "gpu.launch_func" in line:
            grid = [
                known[n] for n in re.findall(r"%\w+", re.search(r"blocks in \((.*?)\)", line)[1])
            ]
            shared = known[re.search(r"memory_size (%\w+)", line)[1]]
            arguments = [known.get(n) for n in re.findall(r"(%\w+) :", line.split("args(")[1])]
        elif " = " in line and len(names) > 1 and "undef" not in line:
            known[names[0]] = known.get(names[1])
    places = [a if isinstance(a, tuple) and a[0] == "array" else None for a in arguments]
    values = [ptx.MAPS if a is None else (a[1] + 1) * ptx.GLOBAL for a in places]
    return Host(tuple(grid), shared, values, maps)


def swizzled(at: np.ndarray, run: int) -> np.ndarray:
    """Where a byte of shared memory lies, in memory swizzled in runs of so many bytes."""
    return at ^ ((at >> 3) & (run - 16)) if run > 16 else at


class Program(ptx.Threads):
    """A program with copies and the tensor core; `beyond` counts elements copied from nowhere."""

    def __init__(self, *args, maps: dict[int, Map]):
        super().__init__(*args)
        self.maps, self.beyond = maps, 0

    def do_cp(self, op, operands):
        if "tensor" not in op:
            return
        (thread,) = np.flatnonzero(self.mask)
        out = op[op.index("tensor") + 2] == "global"
        there, here = operands[:2] if out else operands[1::-1]
        base, at = re.match(r"\[(.*?),\s*\{(.*?)\}\s*\]", there).groups()
        at = [self.get(x, "s32")[thread] for x in ptx.listed(at)][::-1]
        shared = int(self.get(here.strip("[]"), "b32")[thread])
        self._copy(self.maps[int(self.get(base, "b64")[thread]) - ptx.MAPS], at, shared, out)

    def _copy(self, of: Map, at: list[int], shared: int, out: bool) -> None:
        """A box between the card's memory, where indices of 4 bits count bytes, and shared."""
        sizes, strides, box = (np.array(x) for x in (of.sizes, of.strides, of.box))
        width = max(BITS[of.element], 8) // 8
        if BITS[of.element] == 4:
            sizes[-1], box[-1], strides[:-1] = sizes[-1] // 2, box[-1] // 2, strides[:-1] // 2
        if strides[-1] != 1 or np.any(strides[:-1] * width % 16) or shared % 128:
            raise ValueError(f"no copy has strides {strides} of {width} bytes, to {shared}")
        if (
            box.max() > 256
            or box[-1] * width % 16
            or of.swizzle > 16 < box[-1] * width > of.swizzle
        ):
            raise ValueError(f"no copy has a box of {box} elements of {width} bytes")
        index = np.indices(box).reshape(len(box), -1).T
        place, part = index + np.array(at), np.arange(width)
        inside = np.all((place >= 0) & (place < sizes), axis=1)
        here = swizzled(shared + np.arange(len(index))[:, None] * width + part, of.swizzle)
        there = (place @ strides)[:, None] * width + part
        array = self.arrays[of.array]
        if out:
            array[there[inside]] = self.shared[here[inside]]
        else:
            self.beyond += int(np.sum(~inside))
            self.shared[here] = 0
            self.shared[here[inside]] = array[there[inside]]

    def do_wgmma(self, op, operands):
        if "mma_async" not in op:
            return
        n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", op[4]).groups())
        dtype, exact = PRODUCTS[op[6]], np.float64 if op[5] == "f32" else np.int64
        width, registers = np.dtype(dtype).itemsize, operands[1].startswith("{")
        # Of 16-bit floats the last ones say which operands of shared memory are transposed.
        flags = [int(x) for x in operands[6:]] if width == 2 else [0, 0]
        flags = [0, *flags] if registers and width == 2 else flags
        row = ptx.WARP // 2 + ptx.LANE // 4
        if registers:
            a, each = np.zeros((64, k), dtype), 4 // width
            for i, register in enumerate(ptx.listed(operands[1])):
                values = self.get(register, "b32").view(dtype).reshape(ptx.THREADS, each)
                column = i // 2 * (k // 2) + each * (ptx.LANE % 4)
                for j in range(each):
                    a[row + 8 * (i % 2), column + j] = values[:, j]
        else:
            a = self._matrix(operands[1], 64, k, dtype, flags[0])
        b = self._matrix(operands[2], n, k, dtype, flags[1])
        product, total = a.astype(exact) @ b.astype(exact).T, ptx.dtype_of(op[5])
        keep = self.get(operands[3], "pred")
        for i, register in enumerate(ptx.listed(operands[0])):
            column = i // 4 * 8 + 2 * (ptx.LANE % 4) + i % 2
            old = np.where(keep, self.get(register, op[5]), 0).astype(exact)
            self.put(register, (old + product[row + i // 2 % 2 * 8, column]).astype(total))

    def _matrix(self, operand: str, rows: int, k: int, dtype: Any, transposed: int) -> np.ndarray:
        """The rows of an operand in shared memory, by its descriptor."""
        (descriptor,) = set(self.get(operand, "u64").tolist())
        start, lead, stride = ((descriptor >> n & 0x3FFF) << 4 for n in (0, 16, 32))
        run, width = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62], np.dtype(dtype).itemsize
        row, column, part = np.indices((rows, k, width))
        if transposed:
            each = run // width
            at = row // each * lead + column // 8 * stride + column % 8 * run
            at = at + row % each * width + part
        else:
            byte = column * width + part
            at = row // 8 * stride + row % 8 * run
            at = at + (byte if run > 16 else byte // 16 * lead + byte % 16)
        found = self.shared[swizzled(start + at, run)]
        return np.ascontiguousarray(found).view(dtype)[..., 0]


def emulate(folder: pathlib.Path, operands: list, outs: list) -> tuple[list[np.ndarray], int]:
    """Runs the only kernel dumped in a folder; also returns how many elements no copy found."""
    (source,) = folder.glob("*.ptx")
    log = source.with_suffix(".mlir-passes.log").read_text()
    host = read_host(log[log.index(f"Before {BEFORE}") : log.index(f"Before {AFTER}")])
    arrays = [stored(a).view(np.uint8).reshape(-1).copy() for a in operands]
    arrays += [np.full(out.size * out.dtype.itemsize, 0xFF, np.uint8) for out in outs]
    code, beyond = ptx.parse(source.read_text()), 0
    for z, y, x in np.ndindex(host.grid[::-1]):
        program = Program(code, host.values, arrays, host.shared, (x, y, z), maps=host.maps)
        program.run()
        beyond += program.beyond
    found = arrays[len(operands) :]
    return [
        a.view(out.dtype).reshape(out.shape) for a, out in zip(found, outs, strict=True)
    ], beyond


def stored(a: Any) -> np.ndarray:
    """An array as the card has it: two 4-bit integers a byte."""
    a = np.ascontiguousarray(a)
    if a.dtype != ml_dtypes.int4:
        return a
    low, high = a.reshape(-1).astype(np.int8).view(np.uint8).reshape(-1, 2).T & 15
    return low | high << 4


def emulated(module: Any, f: Callable, args: tuple, folder: pathlib.Path, monkeypatch: Any) -> Any:
    """``f(*args)`` with its only kernel compiled for an H100 and emulated.

    Args:
      module: that calls `plgpu.kernel`.
      folder: an empty one.

    Raises:
      AssertionError: a copy from beyond an array; the kernels here pad theirs.
    """
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.asarray(a).dtype), args)
    compile_for("h100", functools.partial(f, interpret=False), *structs, dump=folder)

    def kernel(_, *, out_type, **__):
        outs = jax.tree.leaves(out_type)

        def call(*operands):
            found, beyond = emulate(folder, operands, outs)
            assert not beyond, f"{beyond} elements are copied from beyond an array"
            return jax.tree.unflatten(jax.tree.structure(out_type), map(jnp.asarray, found))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module.plgpu, "kernel", kernel)
        return f(*args)
