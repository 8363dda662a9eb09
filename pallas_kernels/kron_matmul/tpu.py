"""`kron_matmul` and `kron_quantize` for TPUs: both products and the rounding in one pass over x.

With V the row of a token as `[n1, n2]`, the right product is one over rows of 128 lanes (or n2,
where that is a multiple). The left one mixes rows of the same token, which lie in different
registers, and tokens lie along the sublanes of each: reordering either costs more than both
products. So nothing is reordered. The rows of c tokens, taken as they lie, (run, token), are
multiplied by leftᵀ ⊗ I_c, which wastes a factor c of the matrix unit's work and no vector
instruction:

    c = 8    a register of float32, the tokens of its 8 sublanes
    c = 4    half of one: two registers of x exchange halves (a rotation and a selection, on 2-byte
             values), and codes exchange them back once four of them share a register

    grid (tokens,)                            one step: three tiles, each in another stage
    x   [tile, n]  ──right──▶ middle          tile s
        middle (VMEM)  ──left──▶ r            tile s − 1
        r (VMEM) ──largest, scale, round──▶   tile s − 2

The stages of a step do not depend on each other, so the compiler fills the matrix unit and the
vector unit at once. Bound at n = 4096 as 32·128 and 4-bit codes: the memory; see
`benchmarks/static`.

A value that is not finite spreads to the other tokens of its c.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.kron_matmul import prepare
from pallas_kernels.kron_matmul.prepare import LANES
from pallas_kernels.tuning import KronTile, tile_for

SUBLANES = 8
BLOCK = 16  # tokens that go through the products together: the rows of a register of bfloat16
CODE_BLOCK = 32  # tokens whose codes share registers
MAGIC = 12582912.0  # 1.5·2^23: adding it leaves the nearest integer in the low bits of a float32
LOW = 0x0F0F0F0F
SMALLEST = float(np.finfo(np.float32).tiny)
MOST_WIDTH = 512


def kron_matmul(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: KronTile | None = None,
    gain: float = 1.0,
) -> Float[Array, "*tokens channels"]:
    """See `pallas_kernels.kron_matmul.kron_matmul`; the float32 product times `gain`."""
    plan = dataclasses.replace(plan_of(x, left, right, chip, tile), gain=gain)
    return _call(plan, x, left, right, None, interpret).reshape(x.shape)


def kron_quantize(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
    clip: Float[Array, "2"] | None,
    *,
    bits: int,
    packed: bool,
    chip: Chip,
    interpret: Any = False,
    tile: KronTile | None = None,
) -> tuple[Array, Array]:
    """See `pallas_kernels.kron_matmul.kron_quantize`."""
    plan = plan_of(x, left, right, chip, tile, 2 ** (bits - 1) - 1, packed, clip is not None)
    codes, scale = _call(plan, x, left, right, clip, interpret)
    return codes.reshape(*x.shape[:-1], -1), scale.reshape(*x.shape[:-1], 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is laid out.

    Attributes:
      tokens: of the call.
      runs: that the left factor mixes, its order; 1 without one.
      width: lanes of a run, at least 128: with 64 in the right factor, two share them.
      doubled: the right factor has 64 lanes, and its runs come out twice.
      c: tokens of a left product.
      tile: tokens of a grid step.
      qmax: the largest code; 0 for floats.
      gain: what floats are multiplied by.
    """

    tokens: int
    channels: int
    runs: int
    left: bool
    width: int
    doubled: bool
    c: int
    tile: int
    qmax: int
    packed: bool
    clip: bool
    dtype: jnp.dtype
    gain: float = 1.0

    @property
    def steps(self) -> int:
        """Tiles of tokens."""
        return -(-self.tokens // self.tile)

    @property
    def late(self) -> int:
        """Steps from a tile's arrival to its result; a call of one tile does everything in one."""
        return (1 + self.left) * (self.steps > 1)

    @property
    def units(self) -> int:
        """Sets of c tokens in a block."""
        return BLOCK // self.c

    @property
    def together(self) -> int:
        """Sets of tokens that lie side by side in the lanes of a left product."""
        return 2 if self.width == LANES and self.left else 1

    @property
    def rows(self) -> int:
        """Of a left product: every run of c tokens; in registers of 8."""
        return self.channels * (1 + self.doubled) // self.width * self.c

    @property
    def order(self) -> np.ndarray:
        """The runs as they lie in the rows of a left product."""
        runs = np.arange(self.runs)
        if self.c == 4 and self.doubled:  # of two registers of x, two runs each
            runs = runs.reshape(-1, 2, 2).swapaxes(1, 2).reshape(-1)
        return runs


def plan_of(
    x: Array,
    left: Array | None,
    right: Array | None,
    chip: Chip,
    tile: KronTile | None = None,
    qmax: int = 0,
    packed: bool = False,
    clip: bool = False,
) -> Plan:
    """The layout of a call.

    Raises:
      NotImplementedError: dtypes, widths and sizes that the kernel does not take.
    """
    channels, tokens = x.shape[-1], math.prod(x.shape[:-1])
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"activations of {x.dtype}; bfloat16 or float32")
    if channels % LANES or not tokens:
        raise NotImplementedError(f"{tokens} tokens of {channels} channels; whole runs of {LANES}")
    n1 = 1 if left is None else len(left)
    n2 = len(right) if right is not None else channels // n1
    if left is None and right is None:
        n2 = LANES  # any will do
    doubled = left is not None and n2 == LANES // 2
    width = LANES if LANES % n2 == 0 and (doubled or left is None) else n2
    if width % LANES or width > MOST_WIDTH:
        raise NotImplementedError(
            f"a right factor of order {n2}: it takes 64, 128, 256 and 512, and without a left "
            "factor also less"
        )
    tile = tile or tile_for("kron_matmul", chip, n1=n1, channels=channels, tokens=tokens)
    exchange = x.dtype == jnp.bfloat16 and left is not None and channels // width % 2 == 0
    plan = Plan(
        tokens=tokens,
        channels=channels,
        runs=n1,
        left=left is not None,
        width=width,
        doubled=doubled,
        c=tile.c if exchange else SUBLANES,
        tile=tile.rows,
        qmax=qmax,
        packed=packed,
        clip=clip,
        dtype=x.dtype,
    )
    if plan.rows > tile.most and plan.left:
        raise NotImplementedError(f"a left factor of order {n1}; {plan.rows} rows of a product")
    return plan


def _call(
    plan: Plan,
    x: Array,
    left: Array | None,
    right: Array | None,
    clip: Array | None,
    interpret: Any,
) -> Any:
    """The kernel on all tokens: floats, or codes and scales."""
    x = x.reshape(plan.tokens, plan.channels)
    if plan.tokens < plan.tile:
        x = jnp.pad(x, ((0, plan.tile - plan.tokens), (0, 0)))
    rows, last, late = len(x), plan.steps - 1, plan.late
    order_of_right = LANES // 2 if plan.doubled else plan.width
    if right is not None and len(right) < order_of_right:
        right = jnp.kron(jnp.eye(order_of_right // len(right), dtype=right.dtype), right)
    operands = [prepare.right_operand(right, order_of_right, plan.packed, x.dtype)]
    if left is not None:
        operands.append(prepare.left_operand(left, plan.order, plan.c, x.dtype))
    if plan.clip:
        operands.append(clip.astype(jnp.float32))
    whole = lambda a: pl.BlockSpec(a.shape, lambda s: (0,) * a.ndim)  # noqa: E731
    specs = [whole(a) for a in operands]
    if plan.clip:
        specs[-1] = pl.BlockSpec(memory_space=pltpu.SMEM)
    done = lambda s: (jnp.maximum(s - late, 0), 0)  # noqa: E731
    if plan.qmax:
        columns, dtype = (
            (plan.channels // 2, jnp.uint8) if plan.packed else (plan.channels, jnp.int8)
        )
        outputs = [
            (jax.ShapeDtypeStruct((rows, columns), dtype), (plan.tile, columns)),
            (
                jax.ShapeDtypeStruct((plan.steps * SUBLANES, LANES), jnp.float32),
                (SUBLANES, LANES),
            ),
        ]
    else:
        outputs = [(jax.ShapeDtypeStruct(x.shape, x.dtype), (plan.tile, plan.channels))]
    blocks = plan.tile // BLOCK
    sums = (blocks, plan.units // plan.together, plan.rows, plan.together * plan.width)
    result = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(plan.steps + late,),
        in_specs=[
            pl.BlockSpec((plan.tile, plan.channels), lambda s: (jnp.minimum(s, last), 0)),
            *specs,
        ],
        out_specs=[pl.BlockSpec(block, done) for _, block in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=[
            pltpu.VMEM(sums if plan.left else (1, 1, SUBLANES, LANES), x.dtype),
            pltpu.VMEM(sums, jnp.float32),
            pltpu.VMEM((blocks, plan.units, 1 + plan.clip, SUBLANES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=100 << 20),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * (plan.width + plan.runs),
            bytes_accessed=x.nbytes
            + sum(shape.size * shape.dtype.itemsize for shape, _ in outputs),
            transcendentals=0,
        ),
        interpret=interpret,
        name="kron_quantize" if plan.qmax else "kron_matmul",
    )(x, *operands)
    if not plan.qmax:
        return result[0][: plan.tokens]
    codes, scales = result
    # [step, token of a set, set] → [step, set, token of a set]
    sets = plan.tile // plan.c
    scales = scales.reshape(plan.steps, SUBLANES, LANES)[:, : plan.c, :sets].swapaxes(1, 2)
    return codes[: plan.tokens], scales.reshape(-1)[: plan.tokens]


def _kernel(plan: Plan, x_ref, right_ref, *refs) -> None:
    refs = list(refs)
    left_ref = refs.pop(0) if plan.left else None
    clip_ref = refs.pop(0) if plan.clip else None
    *out_refs, mid_ref, r_ref, most_ref = refs
    keep = functools.partial(_keep, plan, r_ref, most_ref)
    if plan.left:
        middle = functools.partial(_keep_middle, mid_ref)
        products = [
            functools.partial(_right, plan, x_ref, right_ref, middle),
            functools.partial(_left, plan, mid_ref, left_ref, keep),
        ]
    else:
        products = [functools.partial(_right, plan, x_ref, right_ref, keep)]
    if plan.qmax:
        last = functools.partial(_codes, plan, r_ref, most_ref, clip_ref, *out_refs)
    else:
        last = functools.partial(_floats, plan, r_ref, *out_refs)
    stages = [*products, last]
    if not plan.late:
        for stage in stages:
            for part in range(plan.tile // CODE_BLOCK):
                stage(part)
        return
    # What a stage reads is a tile older than what the stage before it writes.
    for part in range(plan.tile // CODE_BLOCK):
        for stage in reversed(stages):
            stage(part)


def _blocks(part: int) -> range:
    """The blocks of a part of CODE_BLOCK tokens."""
    return range(part * CODE_BLOCK // BLOCK, (part + 1) * CODE_BLOCK // BLOCK)


def _precision(plan: Plan) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if plan.dtype == jnp.float32 else None


def _dot(plan: Plan, a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=_precision(plan))


# ---------------------------------------------------------------- the products


def _right(plan: Plan, x_ref, right_ref, keep, part: int) -> None:
    """Runs of x times the right factor, to the place where the left product finds them."""
    runs = plan.channels // plan.width
    for h in _blocks(part):
        tokens = slice(h * BLOCK, (h + 1) * BLOCK)
        x = x_ref[tokens]
        z = [x[:, i * plan.width : (i + 1) * plan.width] for i in range(runs)]
        if plan.tokens % plan.tile and plan.steps > 1:
            z = [_existing(plan, a, h) for a in z]
        if plan.c == 4:
            words = [pltpu.bitcast(a, jnp.int32) for a in z]
            pairs = [_exchange(*words[e : e + 2]) for e in range(0, runs, 2)]
            words = [a for a, _ in pairs] + [b for _, b in pairs]
            z = [pltpu.bitcast(jnp.concatenate(words), jnp.bfloat16)]
        t = _dot(plan, jnp.concatenate(z), right_ref[...])
        # Registers of 8 rows: [exchanged, run, half]. A set of tokens is one half of one kind.
        columns = t.shape[-1]
        kinds = (1, runs) if plan.c == 8 else (2, runs // 2)
        t = t.reshape(*kinds, 2, SUBLANES, columns)
        sets = []
        for u in range(plan.units):
            # With c = 4 the sets of a block are, in turn, halves of the one kind and of the other.
            own = t[0, :, u] if plan.c == 8 else t[u % 2, :, u // 2]  # [run, 8, columns]
            if plan.doubled:
                own = jnp.concatenate(
                    [own[i, :, o : o + LANES] for i in range(len(own)) for o in (0, LANES)]
                )
            sets.append(own.reshape(-1, plan.width))
        for p in range(0, plan.units, plan.together):
            keep(h, p // plan.together, jnp.concatenate(sets[p : p + plan.together], axis=1))


def _left(plan: Plan, mid_ref, left_ref, keep, part: int) -> None:
    """Runs of c tokens, mixed."""
    for h in _blocks(part):
        for p in range(plan.units // plan.together):
            keep(h, p, _dot(plan, left_ref[...], mid_ref[h, p]))


def _keep_middle(mid_ref, h: int, p: int, t: Array) -> None:
    mid_ref[h, p] = t.astype(mid_ref.dtype)


def _keep(plan: Plan, r_ref, most_ref, h: int, p: int, r: Array) -> None:
    """The results of a product, and what their scales will be made of, while they are at hand."""
    r_ref[h, p] = r
    if not plan.qmax:
        return
    for u in range(p * plan.together, (p + 1) * plan.together):
        registers = [_read(plan, r, u, *at) for _, *at in _registers(plan)]
        if plan.clip:
            most_ref[h, u, 0] = -functools.reduce(jnp.minimum, registers)
            most_ref[h, u, 1] = functools.reduce(jnp.maximum, registers)
        else:
            most_ref[h, u, 0] = functools.reduce(jnp.maximum, [jnp.abs(a) for a in registers])


def _existing(plan: Plan, rows: Array, h: int) -> Array:
    """Zeros for tokens beyond the last, which hold anything: 0 · NaN would reach the others."""
    left = plan.tokens - pl.program_id(0) * plan.tile - h * BLOCK
    index = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    if rows.dtype == jnp.float32:
        return jnp.where(index < left, rows, 0.0)
    words = pltpu.bitcast(rows, jnp.int32)  # two tokens each
    first = 2 * jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
    keep = jnp.where(first + 1 < left, -1, jnp.where(first < left, 0xFFFF, 0))
    return pltpu.bitcast(words & keep, jnp.bfloat16)


def _exchange(a: Array, b: Array) -> tuple[Array, Array]:
    """Words of 2 tokens, `[8, lanes]`: sets 0 and 2 of both registers, and sets 1 and 3.

    Its own inverse.
    """
    even = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0) & 2 == 0
    return (
        jnp.where(even, a, pltpu.roll(b, 2, 0)),
        jnp.where(even, pltpu.roll(a, SUBLANES - 2, 0), b),
    )


# ---------------------------------------------------------------- the results


def _registers(plan: Plan) -> list[tuple[tuple[int, ...], int, int]]:
    """For every register of a set of tokens: chunks of 128 lanes it holds, its row, its lane.

    With c = 4 there are two chunks, in the halves of its sublanes. A row is that of the first of
    two registers where runs come out doubled.
    """
    parts, found = plan.width // LANES, []
    each = 1 + plan.doubled
    for row in range(plan.channels // plan.width * plan.c // SUBLANES):
        for lane in range(parts):
            runs = (row,) if plan.c == 8 else (2 * row, 2 * row + 1)
            chunks = tuple(run * parts + lane for run in runs)
            found.append((chunks, row * each * SUBLANES, lane * LANES))
    return found


def _read(plan: Plan, r: Array, u: int, row: int, lane: int) -> Array:
    """One register of results of a set of tokens, `[8, 128]`, out of those of its product."""
    lane += (u % plan.together) * plan.width
    r = r[row : row + SUBLANES * (1 + plan.doubled), lane : lane + LANES]
    if not plan.doubled:
        return r
    index = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    first = index & (LANES // 4) == 0 if plan.packed else index < LANES // 2
    return jnp.where(first, r[:SUBLANES], r[SUBLANES:])


def _floats(plan: Plan, r_ref, out_ref, part: int) -> None:
    """The products in the dtype of x."""
    for h in _blocks(part):
        tokens = slice(h * BLOCK, (h + 1) * BLOCK)
        products = [r_ref[h, p] for p in range(plan.units // plan.together)]
        chunks_found = {}
        for chunks, row, lane in _registers(plan):
            r = [_read(plan, products[u // plan.together], u, row, lane) for u in range(plan.units)]
            if plan.gain != 1.0:
                r = [a * plan.gain for a in r]
            if plan.c == 8:
                found = [jnp.concatenate(r).astype(plan.dtype)]
            else:
                kinds = [jnp.concatenate(r[k::2]).astype(plan.dtype) for k in range(2)]
                words = _exchange(*(pltpu.bitcast(a, jnp.int32) for a in kinds))
                found = [pltpu.bitcast(a, plan.dtype) for a in words]
            chunks_found.update(zip(chunks, found, strict=True))
        out_ref[tokens] = _in_order(chunks_found)


def _codes(plan: Plan, r_ref, most_ref, clip_ref, codes_ref, scale_ref, part: int) -> None:
    """Largest value, scale, rounding and packing of 32 tokens."""
    sets = [(h, u) for h in _blocks(part) for u in range(plan.units)]
    registers = _registers(plan)
    scales = scale_ref[...] if part else jnp.zeros((SUBLANES, LANES), jnp.float32)
    lanes = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    inverse = {}
    for i, (h, u) in enumerate(sets):
        scale = _scale(plan, most_ref[h, u], clip_ref)
        inverse[h, u] = 1.0 / scale
        scales = jnp.where(lanes == part * len(sets) + i, scale, scales)
    scale_ref[...] = scales

    products = {(h, u): r_ref[h, u // plan.together] for h, u in sets[:: plan.together]}

    def rounded(h: int, u: int, row: int, lane: int) -> Array:
        product = products[h, u // plan.together * plan.together]
        v = _read(plan, product, u, row, lane) * inverse[h, u]
        if plan.clip:
            v = jnp.clip(v, -plan.qmax - 1, plan.qmax)
        # Bits, not (v + MAGIC) − MAGIC, which a compiler may fold; the low byte is the code.
        return jax.lax.bitcast_convert_type(v + MAGIC, jnp.int32)

    words = {}  # chunk of 128 lanes → int32 [8, 128]: 4 tokens each
    for chunks, row, lane in registers:
        r = [rounded(h, u, row, lane) for h, u in sets]
        kinds = [r] if plan.c == 8 else [r[::2], r[1::2]]
        found = [pltpu.bitcast(jnp.concatenate(k).astype(jnp.int8), jnp.int32) for k in kinds]
        if plan.c == 4:
            a, b = found
            even = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0) & 1 == 0
            found = [
                jnp.where(even, a, pltpu.roll(b, 1, 0)),
                jnp.where(even, pltpu.roll(a, SUBLANES - 1, 0), b),
            ]
        words.update(zip(chunks, found, strict=True))
    if plan.packed:
        words = {
            chunk: _nibbles(a, words[chunk + 1])
            if chunk + 1 in words
            else _nibbles(a, a)[:, : LANES // 2]  # the last of an odd number of chunks
            for chunk, a in words.items()
            if chunk % 2 == 0
        }
    tokens = slice(part * CODE_BLOCK, (part + 1) * CODE_BLOCK)
    codes_ref[tokens] = pltpu.bitcast(_in_order(words), codes_ref.dtype)


def _in_order(chunks: dict[int, Array]) -> Array:
    """Chunks of lanes, side by side."""
    return jnp.concatenate([chunks[i] for i in sorted(chunks)], axis=1)


def _scale(plan: Plan, most: Array, clip_ref) -> Array:
    """The scale of every token of a set, `[8, 128]` with equal lanes."""
    if plan.clip:
        most = most * jnp.stack([jnp.full_like(most[0], clip_ref[i]) for i in range(2)])
    most = jnp.max(most, axis=0)
    if plan.c == 4:  # two chunks of the same four tokens
        most = jnp.maximum(most, pltpu.roll(most, SUBLANES // 2, 0))
    scale = jnp.max(most, axis=1, keepdims=True) * (1.0 / plan.qmax)
    # Below the smallest normal number a reciprocal is infinite.
    return jnp.broadcast_to(jnp.where(scale >= SMALLEST, scale, 1.0), (SUBLANES, LANES))


def _nibbles(a: Array, b: Array) -> Array:
    """Bytes of two neighbouring chunks, whose lanes are codes of low nibbles, then of high ones."""
    first = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1) < LANES // 2
    low = jnp.where(first, a, pltpu.roll(b, LANES // 2, 1))
    high = jnp.where(first, pltpu.roll(a, LANES // 2, 1), b)
    return (low & LOW) | ((high & LOW) << 4)
