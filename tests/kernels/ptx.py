"""PTX as Mosaic GPU writes it, run by NumPy: one program of 128 threads, all in step.

What threads do alone is here; copies and the tensor core are in `hopper_emulator.py`. Threads take
every branch together, or an error says where they do not. Copies and products are done when they
are issued, so a missing wait is not found; values, layouts, addresses and bounds are. A register
that was never written holds a pattern, shared memory starts as NaN.
"""

import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

THREADS = 128
LANE = np.arange(THREADS) % 32
WARP = np.arange(THREADS) // 32 * 32
SHARED = 1024  # where shared memory begins
GLOBAL = 1 << 40  # where the first array begins; each has as much
MAPS = 1 << 60  # where tensor maps begin
UNWRITTEN = 0xABCDABCDABCDABCD
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
NO_EFFECT = {"bar", "fence", "griddepcontrol", "membar", "nanosleep"}


class Statement(NamedTuple):
    """An instruction: ``@guard op operands``, with the operation's name in parts."""

    guard: str | None
    negated: bool
    op: tuple[str, ...]
    operands: tuple[str, ...]


class Code(NamedTuple):
    """Statements, the labels' places among them (a label may be in several blocks), parameters."""

    statements: list[Statement]
    labels: dict[str, list[int]]
    parameters: list[str]


def parse(text: str) -> Code:
    """The only kernel of a file."""
    text = re.sub(r"//.*|^\s*\.loc.*$", "", text[text.index(".entry") :], flags=re.M)
    parameters = re.findall(r"\.param\s[^,)\n]*?(\w+_param_\d+)", text)
    statements, labels = [], {}
    for part in text[text.index("\n{") + 2 :].split(";"):
        part = part.strip()
        while block := re.match(r"\{(?!\s*%)|\}|([$\w]+):", part):
            if block[1]:
                labels.setdefault(block[1], []).append(len(statements))
            part = part[block.end() :].strip()
        if part and not part.startswith("."):
            negated, guard, op, rest = re.match(
                r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", part, re.S
            ).groups()
            operands = re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|[^,\[{]+)+", rest)
            operands = tuple(operand.strip() for operand in operands)
            statements.append(Statement(guard, negated == "!", tuple(op.split(".")), operands))
    return Code(statements, labels, parameters)


def listed(operand: str) -> list[str]:
    """The registers of ``{a, b}``, or the only one."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


class Threads:
    """The registers and the memory of a program.

    Args:
      values: of the kernel's parameters.
      arrays: the card's memory, bytes.
      shared: bytes of shared memory.
      place: of the program in the grid, x first.
    """

    def __init__(self, code: Code, values: list[int], arrays: list, shared: int, place: tuple):
        self.code, self.arrays, self.registers = code, arrays, {}
        self.shared = np.full(SHARED + shared, 0xFF, np.uint8)
        self.fixed = dict(zip(code.parameters, values, strict=True)) | {"%ntid.x": THREADS}
        self.fixed |= {f"%ctaid.{axis}": at for axis, at in zip("xyz", place, strict=True)}
        self.fixed |= {"%tid.y": 0, "%tid.z": 0}
        self.mask = None

    def run(self) -> int:
        """Runs to the end; returns how many instructions that were."""
        at, count = 0, 0
        with np.errstate(all="ignore"):
            while at < len(self.code.statements):
                guard, negated, op, operands = self.code.statements[at]
                self.mask = None if guard is None else self.registers[guard] ^ negated
                at, count = at + 1, count + 1
                if op[0] == "ret":
                    break
                if op[0] == "bra":
                    if self.mask is not None and len(set(self.mask)) > 1:
                        raise RuntimeError(f"threads part at {op} {operands}")
                    if self.mask is None or self.mask[0]:
                        places = self.code.labels[operands[0]]
                        later = [place for place in places if place >= at]
                        at = places[0] if len(places) == 1 else later[0]
                elif self.mask is None or self.mask.any():
                    try:
                        self.step(op, operands)
                    except Exception as error:
                        raise RuntimeError(f"{'.'.join(op)} {operands}: {error!r}") from error
        return count

    # ------------------------------------------------------------ operands

    def get(self, operand: str, kind: str) -> np.ndarray:
        """The values of an operand, as a type of PTX: u32, s16, f32, bf16, b64, pred …

        Those of ``bf16x2`` have an axis of two, low halves first.
        """
        if kind == "pred":
            values = self.registers.get(operand.lstrip("!"))
            if values is None:
                values = np.full(THREADS, bool(self.constant(operand)))
            return values ^ operand.startswith("!")
        if kind.endswith("x2"):
            return self.get(operand, "b32").view(dtype_of(kind)).reshape(THREADS, 2)
        bits = int(re.search(r"\d+", kind)[0])
        if operand in self.registers:
            values = self.registers[operand]
            values = values if values.dtype.itemsize * 8 == bits else values.astype(UNSIGNED[bits])
        elif operand == "%tid.x":
            values = np.arange(THREADS, dtype=UNSIGNED[bits])
        else:
            values = np.full(THREADS, self.constant(operand) & (2**bits - 1), UNSIGNED[bits])
        return np.ascontiguousarray(values).view(dtype_of(kind))

    def constant(self, operand: str) -> int:
        """A value that all threads share."""
        if operand in self.fixed:
            return self.fixed[operand]
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        if operand.startswith("__dynamic_shmem__"):
            return SHARED + int(operand.partition("+")[2] or 0)
        return UNWRITTEN if operand.startswith("%") else int(operand.rstrip("U"), 0)

    def put(self, register: str, values: np.ndarray) -> None:
        """Writes a register of the threads that are not masked."""
        if values.ndim == 2:
            values = np.ascontiguousarray(values).view(np.uint32)[:, 0]
        elif values.dtype != bool and values.dtype.kind != "u":
            values = np.ascontiguousarray(values).view(UNSIGNED[values.dtype.itemsize * 8])
        if self.mask is not None and register in self.registers:
            values = np.where(self.mask, values, self.registers[register])
        if register != "_":
            self.registers[register] = values

    def bytes_at(self, operand: str, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each array that ``[operand]`` is in: the array and, by thread, indices of bytes."""
        base, _, offset = operand.strip("[]").rpartition("+")
        base, offset = (base, int(offset)) if base else (offset, 0)
        at = self.get(base, "b64").astype(np.int64) + offset
        active = np.arange(THREADS) if self.mask is None else np.flatnonzero(self.mask)
        found = []
        for array in np.unique(at[active] // GLOBAL):
            threads = active[at[active] // GLOBAL == array]
            memory = self.arrays[array - 1] if array else self.shared
            index = at[threads] % GLOBAL
            low = 0 if array else SHARED
            if index.min() < low or index.max() + size > len(memory) or np.any(index % size):
                raise IndexError(f"address {operand} is outside its memory or not aligned")
            found.append((memory, threads, index[:, None] + np.arange(size)))
        return found

    # ------------------------------------------------------------ instructions

    def step(self, op: tuple[str, ...], operands: tuple[str, ...]) -> None:
        """One instruction."""
        name, kind = op[0], op[-1]
        if name in NO_EFFECT:
            return
        special = getattr(self, f"do_{name}", None)
        if special is not None:
            special(op, operands)
        else:
            self.put(operands[0], self.computed(op, [self.get(x, kind) for x in operands[1:]]))

    def do_mbarrier(self, op, operands):
        if "try_wait" in op:  # everything is done when it is issued
            self.put(operands[0], np.ones(THREADS, bool))

    def do_elect(self, op, operands):
        lane, elected = operands[0].split("|")
        self.put(lane, np.zeros(THREADS, np.uint32))
        self.put(elected, LANE == 0)

    def do_shfl(self, op, operands):
        lane = self.get(operands[2], "s32")
        source = WARP + {"bfly": LANE ^ lane, "idx": lane % 32}[op[2]]
        self.put(operands[0].partition("|")[0], self.get(operands[1], "b32")[source])

    def do_cvta(self, op, operands):
        self.put(operands[0], self.get(operands[1], "b64"))

    def do_mov(self, op, operands):
        target, source = operands
        if target.startswith("{"):
            parts = listed(target)
            values = self.get(source, op[-1]).view(UNSIGNED[int(op[-1][1:]) // len(parts)])
            for part, value in zip(parts, values.reshape(THREADS, -1).T, strict=True):
                self.put(part, value.copy())
        elif source.startswith("{"):
            kind = f"b{int(op[-1][1:]) // len(listed(source))}"
            values = np.stack([self.get(part, kind) for part in listed(source)], 1)
            self.put(target, values.view(dtype_of(op[-1]))[:, 0])
        else:
            self.put(target, self.get(source, op[-1]).copy())

    def do_ld(self, op, operands):
        if "param" in op:
            self.put(operands[0], self.get(operands[1].strip("[]"), "b64"))
            return
        targets, dtype = listed(operands[0]), dtype_of(op[-1])
        raw = np.zeros((THREADS, len(targets) * dtype().itemsize), np.uint8)
        for memory, threads, index in self.bytes_at(operands[1], raw.shape[1]):
            raw[threads] = memory[index]
        for target, values in zip(targets, raw.view(dtype).T, strict=True):
            bits = 64 if target.startswith("%rd") else 16 if target.startswith("%rs") else 32
            wide = SIGNED[bits] if op[-1][0] == "s" else UNSIGNED[bits]
            self.put(target, values.astype(wide) if dtype().itemsize * 8 < bits else values.copy())

    def do_st(self, op, operands):
        values = np.stack([self.get(source, op[-1]) for source in listed(operands[1])], 1)
        values = values.view(np.uint8).reshape(THREADS, -1)
        for memory, threads, index in self.bytes_at(operands[0], values.shape[1]):
            memory[index] = values[threads]

    def do_cvt(self, op, operands):
        to, source = op[-2:]
        if to.endswith("x2"):  # the first operand is the high half
            halves = [self.get(x, source).astype(dtype_of(to)) for x in operands[:0:-1]]
            self.put(operands[0], np.stack(halves, 1))
            return
        values = self.get(operands[1], source)
        if "f" in source and "f" not in to:
            values = values.astype(np.float64)
            values = (np.rint if "rni" in op else np.trunc)(values).astype(np.int64)
        values = values.astype(np.float32) if "bf16" in (to, source) else values
        self.put(operands[0], values.astype(dtype_of(to)))

    def do_selp(self, op, operands):
        yes, no = (self.get(x, op[-1]) for x in operands[1:3])
        self.put(operands[0], np.where(self.get(operands[3], "pred"), yes, no))

    def do_setp(self, op, operands):
        a, b = (self.get(x, op[-1]) for x in operands[1:3])
        if "f" in op[-1]:
            a, b = a.astype(np.float64), b.astype(np.float64)
        unordered = np.isnan(a) | np.isnan(b) if "f" in op[-1] else np.zeros(THREADS, bool)
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(op[1], op[1])
        if name == "nan":
            found = unordered
        elif name == "num":
            found = ~unordered
        else:
            compare = {"eq": a == b, "ne": a != b, "lt": a < b}
            compare |= {"le": a <= b, "gt": a > b, "ge": a >= b}
            found = compare[name[:2]] & ~unordered
            found = found | unordered if name.endswith("u") else found
        if op[2] in ("and", "or"):
            other = self.get(operands[3], "pred")
            found = found & other if op[2] == "and" else found | other
        self.put(operands[0], found)

    def do_shl(self, op, operands):
        self._shift(op, operands, lambda values, by: values << by)

    def do_shr(self, op, operands):
        self._shift(op, operands, lambda values, by: values >> by)

    def _shift(self, op, operands, shifted):
        values, by = self.get(operands[1], op[-1]), self.get(operands[2], "u32")
        bits = values.dtype.itemsize * 8
        found = shifted(values, np.minimum(by, bits - 1).astype(values.dtype))
        gone = (by >= bits) & (op[-1][0] != "s")
        self.put(operands[0], np.where(gone, 0, found).astype(values.dtype))

    def do_bfe(self, op, operands):
        values, bits = self.get(operands[1], op[-1]), int(op[-1][1:])
        at, length = (self.constant(x) for x in operands[2:])
        left, right = (values.dtype.type(n) for n in (bits - at - length, bits - length))
        self.put(operands[0], (values << left) >> right)

    def do_prmt(self, op, operands):
        a, b, choice = (self.get(x, "b32") for x in operands[1:4])
        source = np.stack([a, b], 1).view(np.uint8)
        found = np.zeros((THREADS, 4), np.uint8)
        for i in range(4):
            which = (choice >> np.uint32(4 * i)) & np.uint32(15)
            byte = source[np.arange(THREADS), which & 7]
            found[:, i] = np.where(which & 8, np.where(byte & 128, 255, 0), byte)
        self.put(operands[0], found.view(np.uint32)[:, 0])

    def do_lop3(self, op, operands):
        inputs = [self.get(x, "b32") for x in operands[1:4]]
        table = eval(operands[4], {"__builtins__": {}}) & 255  # (0xf0 & 0xcc) ^ 0xaa
        found = np.zeros(THREADS, np.uint32)
        for row in range(8):
            if table >> row & 1:
                bits = [x if row >> (2 - i) & 1 else ~x for i, x in enumerate(inputs)]
                found |= bits[0] & bits[1] & bits[2]
        self.put(operands[0], found)

    def do_mul(self, op, operands):
        if op[1] == "wide":
            wide = f"{op[-1][0]}{2 * int(op[-1][1:])}"
            a, b = (self.get(x, op[-1]).astype(dtype_of(wide)) for x in operands[1:])
            self.put(operands[0], a * b)
        elif op[1] == "hi":
            bits = int(op[-1][1:])
            pairs = zip(*(self.get(x, op[-1]).tolist() for x in operands[1:]), strict=True)
            high = [((a * b) >> bits) & (2**bits - 1) for a, b in pairs]
            self.put(operands[0], np.array(high, UNSIGNED[bits]))
        else:
            values = [self.get(x, op[-1]) for x in operands[1:]]
            self.put(operands[0], self.computed(op, values))

    def computed(self, op: tuple[str, ...], values: list[np.ndarray]) -> np.ndarray:
        """The result of arithmetic on values of one type."""
        name, dtype = op[0], values[0].dtype
        if dtype == ml_dtypes.bfloat16 or "f16" in op[-1]:
            exact = [x.astype(np.float32) for x in values]
            return arithmetic(name, exact, op).astype(dtype)
        if name == "fma":
            values = [x.astype(np.float64) for x in values]
        found = arithmetic(name, values, op)
        return np.maximum(found, 0) if "relu" in op else np.asarray(found).astype(dtype)


def dtype_of(kind: str) -> Any:
    """NumPy's type for one of PTX; of a pair of floats, that of each."""
    if kind.startswith("bf16"):
        return ml_dtypes.bfloat16
    bits = int(re.search(r"\d+", kind)[0])
    return {"s": SIGNED, "f": FLOATS}.get(kind[0], UNSIGNED)[bits]


def arithmetic(name: str, values: list[np.ndarray], op: tuple[str, ...]) -> np.ndarray:
    """One operation, of floats or integers."""
    a, b, c = (*values, None, None)[:3]
    floats = a.dtype.kind == "f"
    plain = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "mad": lambda: a * b + c,
        "fma": lambda: a * b + c,
        "and": lambda: a & b,
        "or": lambda: a | b,
        "xor": lambda: a ^ b,
        "not": lambda: ~a,
        "neg": lambda: -a,
        "abs": lambda: np.abs(a),
        "min": lambda: np.fmin(a, b) if floats and "NaN" not in op else np.minimum(a, b),
        "max": lambda: np.fmax(a, b) if floats and "NaN" not in op else np.maximum(a, b),
        "div": lambda: a / b if floats else np.trunc(a / b),
        "ex2": lambda: np.exp2(a),
        "lg2": lambda: np.log2(a),
        "rcp": lambda: 1 / a,
    }
    return plain[name]()
