"""Every kernel on the device at hand: right, and how fast beside XLA and the device's limits.

First each implementation of the platform, compiled, runs the cases of the tests against float64.
Then medians of one call at the shapes of real models, the most common first, until the budget is
spent; what was left out is listed. A timed program makes the same call with as many weights as
it takes to overflow the caches, several programs are under way at once, so that neither a cached
weight nor the host's dispatch is measured.

Run: python benchmarks/kernels.py [--budget 540] [--quick]
"""

import argparse
import dataclasses
import functools
import importlib
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch may need some
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from pallas_kernels.chips import Chip, default_chip
from pallas_kernels.packing import packed_rows
from pallas_kernels.prepare import prepare
from pallas_kernels.shapes import MODELS, TOKENS
from pallas_kernels.weight import Weight, codes_of
from tests.kernels import cases

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "torch", "qwix", "tokamax")
OVERFLOW = 160e6  # bytes of weights a program reads: three times the largest cache of a GPU
MODULE = {"kron_quantize": "kron_matmul"}  # operations in the package of another
SCHEMES = {  # name → operation, bits of the weight, group (None: a channel), bits of activations
    "W4A16": ("quant_matmul", 4, 128, 16),
    "W8A8": ("quant_matmul_int", 8, None, 8),
    "W8A16": ("quant_matmul", 8, None, 16),
    "W4A8": ("quant_matmul_int", 4, 128, 8),
    "W4A4": ("quant_matmul_int", 4, None, 4),
}
CACHES = {"KV4": 4, "KV8": 8, "KV16": None}  # name → bits of a code; None: bfloat16


class Clock:
    """The time that may be spent."""

    def __init__(self, budget: float) -> None:
        self.began, self.budget = time.perf_counter() - _age(), budget

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.began)


def _age() -> float:
    """Seconds since this process began: imports take their time, too; 0 where Linux is not."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return max(0.0, up - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return 0.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of one model.

    Attributes:
      contestants: name → ``time(repeats)``, microseconds of one call by repeat.
      bytes: read and written at the least, with the weight packed.
      operations: multiplications and additions.
      rate: of the matrix unit that the maths of the call uses, a field of `Chip`.
    """

    name: str
    tokens: int
    contestants: dict[str, Callable[[int], list[float]]]
    bytes: float
    operations: float
    rate: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--share", type=float, default=0.4, help="most of it spent on checking")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--models", nargs="+", default=["llama-3-8b", "qwen2.5-7b", "llama-3-70b"])
    parser.add_argument("--only", nargs="+", help="operations; default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few cases, a small model, a minute")
    parser.add_argument("--json", help="default: benchmarks/results/<device>/kernels.json")
    args = parser.parse_args()
    if args.quick:
        args.models, args.tokens, args.repeats = ["smollm2-135m"], [1, 16], 3
    clock, chip = Clock(args.budget), default_chip()
    facts = common.environment(PACKAGES) | {"chip": chip.name, "budget_s": args.budget}
    common.header("Kernels", facts)
    checks, unchecked = check(chip, args, clock)
    common.table(("operation", "implementation", "right", "refused", "wrong"), summary(checks))
    for row in checks:
        if row["result"] == "wrong":
            print(f"WRONG {row['operation']} {row['case']}: {row['reason']}")
    rows, left_out = measure(chip, args, clock)
    columns = ("call", "tokens", "contestant", "us", "best us", "bound us", "of bound")
    common.table(columns, [[row.get(c) for c in columns] for row in rows])
    for name, what in (("unchecked", unchecked), ("left out", left_out)):
        print(f"{name}, for want of time: {', '.join(what) or 'nothing'}")
    results = {"checks": checks, "unchecked": unchecked, "times": rows, "left_out": left_out}
    common.write_results("kernels", facts, results, args.json)
    if any(row["result"] == "wrong" for row in checks):
        raise SystemExit("an implementation is wrong")


# ---------------------------------------------------------------- correctness


def implementation(op: str, name: str) -> Callable:
    """The function of an operation in one of its modules."""
    return getattr(importlib.import_module(f"pallas_kernels.{MODULE.get(op, op)}.{name}"), op)


def implementations(op: str, chip: Chip) -> tuple[str, ...]:
    """Modules of the chip's platform, and the reference."""
    package = importlib.import_module(f"pallas_kernels.{MODULE.get(op, op)}")
    return (*package.IMPLEMENTATIONS.get(chip.platform, ()), "reference")


def check(chip: Chip, args: argparse.Namespace, clock: Clock) -> tuple[list[dict], list[str]]:
    """Runs the cases round-robin, so that a short budget still reaches every operation."""
    queues = {
        (op, name): cases.names(op)
        for op in cases.CASES
        if not args.only or op in args.only
        for name in implementations(op, chip)
        if name != "reference"
    }
    rows, unchecked, longest = [], [], 0.0
    for turn in range(max(map(len, queues.values()), default=0)):
        for (op, name), todo in queues.items():
            if turn >= len(todo) or (args.quick and turn >= 2):
                continue
            began, spent = time.perf_counter(), clock.budget - clock.left()
            if spent + longest > args.share * clock.budget:
                unchecked.append(f"{op}/{name}/{todo[turn]}")
                continue
            rows.append(check_one(op, name, todo[turn], chip))
            longest = max(longest, time.perf_counter() - began)
    return rows, unchecked


def check_one(op: str, name: str, case_name: str, chip: Chip) -> dict[str, Any]:
    """One case of one implementation, prepared and compiled."""
    case = cases.build(op, case_name)
    f = functools.partial(implementation(op, name), **case.static, chip=chip, interpret=False)
    found = {"operation": op, "implementation": name, "case": case_name}
    try:
        given = [
            prepared(x, op, case.args, chip) if isinstance(x, Weight) else x for x in case.args
        ]
        case.check(jax.block_until_ready(jax.jit(f)(*given)))
    except NotImplementedError as refusal:
        return found | {"result": "refused", "reason": str(refusal)}
    except Exception as error:  # a compiler's or a driver's, or a failed check
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return found | {"result": "wrong", "reason": reason}
    return found | {"result": "right"}


def prepared(w: Weight, op: str, args: tuple, chip: Chip) -> Weight:
    """The weight in the form of the chip for what it is multiplied by."""
    if op != "quant_matmul_int":
        return prepare(w, chip)
    return prepare(w, chip, "codes" if args[2] is None else "shifted codes")


def summary(checks: list[dict]) -> list[list[Any]]:
    """Results counted by operation and implementation."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in checks:
        each = counts.setdefault((row["operation"], row["implementation"]), {})
        each[row["result"]] = each.get(row["result"], 0) + 1
    return [[*k, *(c.get(r, 0) for r in ("right", "refused", "wrong"))] for k, c in counts.items()]


# ---------------------------------------------------------------- times


def measure(chip: Chip, args: argparse.Namespace, clock: Clock) -> tuple[list[dict], list[str]]:
    """Times jobs in order; one is begun only if the longest so far would fit."""
    rows, left_out, longest = [], [], 0.0
    for job in jobs(chip, args):
        for contestant, timed in job.contestants.items():
            label = f"{job.name}/{job.tokens}/{contestant}"
            if clock.left() < longest + 5:
                left_out.append(label)
                continue
            began = time.perf_counter()
            row = {"call": job.name, "tokens": job.tokens, "contestant": contestant}
            try:
                runs = timed(args.repeats)
                row |= {"us": statistics.median(runs), "best us": min(runs), "runs_us": runs}
                if bound := limit(job, chip):
                    row |= {"bound us": bound * 1e6, "of bound": bound * 1e6 / row["us"]}
            except NotImplementedError as refusal:
                row["refused"] = str(refusal)
            except Exception as error:  # one contestant's failure is a row, not the end
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            rows.append(row)
            print(f"{label}: {row.get('us') or row.get('refused') or row.get('error')}", flush=True)
            longest = max(longest, time.perf_counter() - began)
    return rows, left_out


def limit(job: Job, chip: Chip) -> float | None:
    """Seconds that bytes or operations take at the vendor's peak; None where that is not known."""
    rate = getattr(chip, job.rate) or chip.int8
    return max(job.bytes / chip.bandwidth, job.operations / rate) if chip.bandwidth else None


def time_calls(f: Callable, operands: list[tuple], repeats: int) -> list[float]:
    """Microseconds of one call, by repeat."""
    program = jax.jit(lambda sets: [f(*each) for each in sets])
    began = time.perf_counter()
    jax.block_until_ready(program(operands))
    once = time.perf_counter()
    jax.block_until_ready(program(operands))
    once = min(time.perf_counter() - once, once - began)
    under_way, runs = max(1, min(20, round(0.02 / once))), []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([program(operands) for _ in range(under_way)])
        runs.append((time.perf_counter() - began) / under_way / len(operands) * 1e6)
    return runs


def copies(size: float, chip: Chip) -> int:
    """Operands that together overflow the caches."""
    return max(1, min(16, round((OVERFLOW if chip.bandwidth else size) / size)))


def jobs(chip: Chip, args: argparse.Namespace) -> Iterator[Job]:
    """All calls, the most important first: few tokens, the first model."""
    wanted = lambda op: not args.only or op in args.only  # noqa: E731
    for model in args.models:
        for tokens in args.tokens:
            products = MODELS[model].products().items()
            for scheme, settings in SCHEMES.items():
                if wanted(settings[0]):
                    for name, shape in products:
                        yield product_job(f"{model} {name} {scheme}", scheme, shape, tokens, chip)
            if wanted("kron_quantize"):
                for name in ("qkv", "down"):
                    channels = MODELS[model].products()[name][0]
                    yield kron_job(f"{model} {name} kron int4", channels, tokens, chip)
            if wanted("quant_decode_attention") and tokens <= 64:
                for cache in CACHES:
                    name = f"{model} attention {cache}"
                    yield attention_job(name, cache, model, tokens, chip, args.quick)


def ours(op: str, chip: Chip) -> str:
    """The fastest implementation of the platform."""
    return implementations(op, chip)[0]


def product_job(name: str, scheme: str, shape: tuple[int, int], tokens: int, chip: Chip) -> Job:
    """A product with one weight, beside the dense one and beside XLA on the packed weight."""
    op, bits, group, x_bits = SCHEMES[scheme]
    (k, n), groups = shape, 1 if not group or shape[0] % group else shape[0] // group
    key = jax.random.key(0)
    x = jax.random.normal(key, (tokens, k), jnp.bfloat16)

    def weight(i: int) -> Weight:
        codes = jax.random.bits(jax.random.fold_in(key, i), (k * bits // 8, n), jnp.uint8)
        return Weight(codes, jnp.full((groups, n), 0.01), None, None, bits, k, n, k // groups)

    def call(module: str, w: Callable, repeats: int) -> list[float]:
        static = {"out_dtype": jnp.bfloat16}
        if module != "reference":
            static |= {"chip": chip, "interpret": False}
        f = functools.partial(implementation(op, module), **static)
        count = copies(k * n * bits / 8, chip)
        if op == "quant_matmul":
            return time_calls(f, [(x, w(i)) for i in range(count)], repeats)
        low = -(2 ** (x_bits - 1))
        codes = jax.random.randint(key, (tokens, k), low, -low, jnp.int8)
        scale = jnp.ones((tokens, 1))
        return time_calls(f, [(codes, scale, None, w(i)) for i in range(count)], repeats)

    def peer(product: Callable, repeats: int) -> list[float]:
        """A product of the package qwix or tokamax, on the same codes in their array."""
        f, count = product(), copies(k * n * bits / 8, chip)
        return time_calls(f, [(x, as_qarray(weight(i))) for i in range(count)], repeats)

    def dense(repeats: int) -> list[float]:
        count = copies(2 * k * n, chip)
        draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (k, n), jnp.bfloat16)  # noqa: E731
        f = lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)  # noqa: E731
        return time_calls(f, [(x, draw(i)) for i in range(count)], repeats)

    activations = "floats" if op == "quant_matmul" else "codes"
    form = jax.jit(lambda w: prepare(w, chip, activations))
    contestants = {"XLA packed": functools.partial(call, "reference", weight)}
    if (module := ours(op, chip)) != "reference":
        fast = functools.partial(call, module, lambda i: form(weight(i)))
        contestants = {module: fast} | contestants
    if op == "quant_matmul":
        contestants["qwix"] = functools.partial(peer, qwix_product)
        contestants["tokamax"] = functools.partial(peer, tokamax_product)
    if scheme == "W4A16":  # once a shape
        torch_bf16 = functools.partial(time_torch, tokens, k, n, False)
        contestants |= {"XLA bf16": dense, "torch bf16": torch_bf16}
    if scheme == "W8A8":
        contestants["torch int8"] = functools.partial(time_torch, tokens, k, n, True)
    moved = k * n * bits / 8 + groups * n * 4 + tokens * (k * x_bits / 8 + 2 * n)
    rate = {16: "bf16", 8: "int8", 4: "int4"}[x_bits]
    return Job(name, tokens, contestants, moved, 2 * tokens * k * n, rate)


def kron_job(name: str, channels: int, tokens: int, chip: Chip) -> Job:
    """A Kronecker transform of both factors near the square root, with packed 4-bit codes."""
    n2 = 128 if channels % 128 == 0 else 64
    n1 = channels // n2
    key = jax.random.key(0)
    x = jax.random.normal(key, (tokens, channels), jnp.bfloat16)
    left, right = (jax.random.normal(key, (m, m), jnp.bfloat16) / m**0.5 for m in (n1, n2))

    def call(module: str, repeats: int) -> list[float]:
        static = {"bits": 4, "packed": True}
        if module != "reference":
            static |= {"chip": chip, "interpret": False}
        f = functools.partial(implementation("kron_quantize", module), **static)
        return time_calls(f, [(x + i, left, right, None) for i in range(4)], repeats)

    modules = implementations("kron_quantize", chip)
    contestants = {m: functools.partial(call, m) for m in dict.fromkeys((modules[0], "reference"))}
    operations = 2 * tokens * channels * (n1 + n2)
    return Job(name, tokens, contestants, tokens * channels * 2.5, operations, "bf16")


def attention_job(name: str, cache: str, model: str, batch: int, chip: Chip, quick: bool) -> Job:
    """One query a sequence over 4,096 slots of codes, those of 4 bits with zero points; or floats.

    The job with floats has XLA's attention over them, to read the others beside.
    """
    shape, bits, slots = MODELS[model], CACHES[cache], 512 if quick else 4096
    rows = (batch, shape.n_kv_heads, slots)
    key, dim = jax.random.key(0), shape.head_dim
    q = jax.random.normal(key, (batch, shape.n_kv_heads, shape.group, dim), jnp.bfloat16)
    stored = packed_rows(dim, bits) if bits else 2 * dim  # bytes
    grid = (4 if bits else 0) + (bits == 4)

    def call(module: str, repeats: int) -> list[float]:
        static = {"scale": dim**-0.5, "k_bits": bits or 8, "v_bits": bits or 8}
        if module != "reference":
            static |= {"chip": chip, "interpret": False}
        f = functools.partial(implementation("quant_decode_attention", module), **static)

        def operands(i: int) -> tuple:
            k, v = (made(jax.random.fold_in(key, 2 * i + j)) for j in range(2))
            scale = jnp.full(rows, 0.1) if bits else None
            zero = jnp.zeros(rows, jnp.int8) if bits == 4 else None
            starts, stops = jnp.zeros(batch, jnp.int32), jnp.full(batch, slots, jnp.int32)
            return q, k, v, starts, stops, scale, zero, scale, zero

        count = copies(2 * float(np.prod(rows)) * stored, chip)
        return time_calls(f, [operands(i) for i in range(count)], repeats)

    def made(key: jax.Array) -> jax.Array:
        if bits:
            return jax.random.bits(key, (*rows, stored), jnp.uint8)
        return jax.random.normal(key, (*rows, dim), jnp.bfloat16)

    contestants = {"XLA packed" if bits else "XLA bf16": functools.partial(call, "reference")}
    if (module := ours("quant_decode_attention", chip)) != "reference":
        contestants = {module: functools.partial(call, module)} | contestants
    moved = 2 * float(np.prod(rows)) * (stored + grid)
    operations = 4.0 * np.prod(rows) * shape.group * dim
    return Job(name, batch, contestants, moved, operations, "bf16")


def as_qarray(w: Weight) -> Any:
    """The weight as qwix and tokamax take it: codes in int4 or int8."""
    from qwix import QArray

    dtype = jnp.int4 if w.bits == 4 else jnp.int8
    return QArray(jax.jit(codes_of)(w).astype(dtype), w.scale, None, dtype)


def qwix_product() -> Callable:
    """`x @ w` by qwix."""
    try:
        import qwix
    except ImportError:
        raise NotImplementedError("qwix is not installed") from None
    return lambda x, w: qwix.dot(x, w).astype(x.dtype)


def tokamax_product() -> Callable:
    """`x @ w` by tokamax, whose product with codes is one of ragged groups: here of one."""
    try:
        import tokamax
    except ImportError:
        raise NotImplementedError("tokamax is not installed") from None

    def f(x: jax.Array, w: Any) -> jax.Array:
        one = jax.tree.map(lambda a: a[None], w)
        return tokamax.ragged_dot(x, one, jnp.full(1, len(x), jnp.int32)).astype(x.dtype)

    return f


def time_torch(tokens: int, k: int, n: int, int8: bool, repeats: int) -> list[float]:
    """Microseconds of torch's product on the same kind of device."""
    try:
        import torch
    except ImportError:
        raise NotImplementedError("torch is not installed") from None
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise NotImplementedError("on a CPU the threads of torch and of XLA would compete")
    dtype, size = (torch.int8, 1) if int8 else (torch.bfloat16, 2)
    make = lambda *shape: torch.ones(shape, device="cuda").to(dtype)  # noqa: E731
    count = max(1, min(16, round(OVERFLOW / (k * n * size))))
    x, weights = make(tokens, k), [make(n, k).T for _ in range(count)]
    product = torch._int_mm if int8 else torch.matmul
    runs = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for w in weights:
            product(x, w)
        torch.cuda.synchronize()
        runs.append((time.perf_counter() - began) / count * 1e6)
    return runs[1:]


if __name__ == "__main__":
    main()
