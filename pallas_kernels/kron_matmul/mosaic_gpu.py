"""`kron_matmul` and `kron_quantize` on Hopper: two products of the tensor core, a token at a time.

    V [n1, n2] ──· right──▸ t [n1, n2] ──▸ on-chip memory ──leftᵀ ·──▸ r [n1, n2] ──▸ codes

The factors are copied once a program, which then walks over its tokens; V of the next one is on its
way meanwhile, and so is the last result. A token's range is a reduction in registers, and its codes
never see the card's memory as floats: 2 n bytes in, n / 2 or n out, which is what bounds it.

Where codes are packed, right is two factors, of the columns with even and with odd numbers: both
nibbles of a byte are then in the same place of two arrays. Above `PACKED` channels that takes more
registers than there are, and XLA packs codes in bytes. The rows of V are padded to 64s.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.packing import pack_rows
from pallas_kernels.trial import Example
from pallas_kernels.tuning_hopper import PROCESSORS, SHARED

ROWS = 64  # of a product
PACKED = 64 * 128
MAGIC = 12_582_912.0  # 1.5 · 2^23: adding it leaves the nearest integer in the lowest bits
MAGIC_BITS = 0x4B400000


class Form(NamedTuple):
    """What is fixed when the kernel is compiled.

    Attributes:
      rows, cols: of V, padding included.
      left: whether there is a left factor.
      bits: of a code; 0 for floats.
      packed, clip: as in `kron_quantize`.
      gain: multiplies floats, in float32.
    """

    rows: int
    cols: int
    left: bool
    bits: int = 0
    packed: bool = False
    clip: bool = False
    gain: float = 1.0


def kron_matmul(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: Form | None = None,
) -> Float[Array, "*tokens channels"]:
    """See `pallas_kernels.kron_matmul.kron_matmul`; `tile` None is what follows from the shapes."""
    form = tile or form_of(x, left, right, chip)
    y, _ = _call(x, left, right, None, form, interpret)
    return y


def kron_quantize(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
    clip: Float[Array, "2"] | None,
    bits: int,
    packed: bool,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: Form | None = None,
) -> tuple[Array, Array]:
    """See `pallas_kernels.kron_matmul.kron_quantize`; `tile` None follows from the shapes."""
    form = tile or form_of(x, left, right, chip, bits, packed, clip is not None)
    codes, scale = _call(x, left, right, clip, form, interpret)
    return pack_rows(codes, 4) if packed and not form.packed else codes, scale


def form_of(
    x: Array,
    left: Array | None,
    right: Array | None,
    chip: Chip,
    bits: int = 0,
    packed: bool = False,
    clip: bool = False,
) -> Form:
    """The form of a call.

    Raises:
      NotImplementedError: activations of 32 bits, factors that are no multiples of 64 or do not fit
        into on-chip memory, no tokens, another chip.
    """
    if chip.name not in ("h100", "h200"):
        raise NotImplementedError(f"{chip.name} is no Hopper GPU")
    if x.dtype not in (jnp.bfloat16, jnp.float16) or not x.size:
        raise NotImplementedError(f"activations {x.shape} of {x.dtype}")
    n1 = x.shape[-1] // len(right) if left is None else len(left)
    n2 = x.shape[-1] // n1
    rows = -(-n1 // ROWS) * ROWS
    # Two of V, the middle, two of the result, and the factors; sums are 128 registers at most.
    held = 2 * rows * n2 * 5 + 2 * n2 * n2 + (2 * rows * rows if left is not None else 0)
    if n2 not in (64, 128) or rows * n2 > 128 * 128 or held > SHARED:
        raise NotImplementedError(f"factors of orders {n1} and {n2}")
    packed = packed and rows * n2 <= PACKED
    return Form(rows, n2, left is not None, bits, packed, clip)


def _call(
    x: Array,
    left: Array | None,
    right: Array | None,
    clip: Array | None,
    form: Form,
    interpret: Any,
) -> tuple[Array, Array | None]:
    *lead, channels = x.shape
    n1, tokens = channels // form.cols, x.size // channels
    each = -(-tokens // (2 * PROCESSORS))  # tokens of a program
    count = -(-tokens // each)
    v = jnp.pad(
        x.reshape(tokens, n1, form.cols),
        [(0, count * each - tokens), (0, form.rows - n1), (0, 0)],
    )
    right = jnp.eye(form.cols, dtype=x.dtype) if right is None else right.astype(x.dtype)
    parts, width = (2, form.cols // 2) if form.packed else (1, form.cols)
    operands = [right.reshape(form.cols, width, parts).transpose(2, 1, 0)]  # [parts, width, cols]
    if left is not None:
        more = form.rows - n1
        operands.append(jnp.pad(left.T.astype(x.dtype), [(0, more), (0, more)]))
    if clip is not None:
        operands.append(clip.astype(jnp.float32))
    dtype = x.dtype if not form.bits else jnp.uint8 if form.packed else jnp.int8
    shape = (count * each, form.rows, width)
    out = [jax.ShapeDtypeStruct(shape, dtype)]
    if form.bits:
        out.append(jax.ShapeDtypeStruct((count * each,), jnp.float32))
    scratch = {
        "right_tile": hopper.buffer((parts, width, form.cols), x.dtype),
        "middle": [hopper.buffer((form.rows, width), x.dtype) for _ in range(parts)],
        "y_tile": hopper.buffer((form.rows, width), dtype),
        "barrier": plgpu.Barrier(num_barriers=1, num_arrivals=1 + form.left),
    }
    if form.left:
        scratch["left_tile"] = hopper.buffer((form.rows, form.rows), x.dtype, 2 * width)
    name = "kron_quantize" if form.bits else "kron_matmul"
    kernel = plgpu.kernel(
        functools.partial(_kernel, form=form, each=each, interpret=interpret),
        out_type=out,
        scratch_types=scratch,
        grid=(count,),
        grid_names=("program",),
        kernel_name=name,
        interpret=interpret,
    )
    y, *scale = kernel(v, *operands)
    y = y[:tokens, :n1].reshape(*lead, n1 * width)
    return y, scale[0][:tokens].reshape(*lead, 1) if scale else None


def _kernel(
    x_ref, right_ref, *refs, form, each, interpret, right_tile, middle, y_tile, barrier, **tiles
):
    left_ref, *refs = refs if form.left else (None, *refs)
    clip_ref, *refs = refs if form.clip else (None, *refs)
    y_ref, *scale_ref = refs
    program, f32 = jax.lax.axis_index("program"), jnp.float32
    plgpu.copy_gmem_to_smem(right_ref, right_tile, barrier.at[0])
    if form.left:
        plgpu.copy_gmem_to_smem(left_ref, tiles["left_tile"], barrier.at[0])
    plgpu.barrier_wait(barrier.at[0])

    def transformed(v_tile):
        sums = [
            hopper.product(None, v_tile, right_tile.at[i], f32, interpret)
            for i in range(len(middle))
        ]
        if not form.left:
            return sums
        for t, kept in zip(sums, middle, strict=True):
            kept[...] = t.astype(v_tile.dtype)
        plgpu.commit_smem()
        rows = [
            hopper.product(None, tiles["left_tile"], kept, f32, interpret, transposed=False)
            for kept in middle
        ]
        return rows

    def step(index, v_tile):
        r, token = transformed(v_tile.at[0]), program * each + index[0]
        plgpu.wait_smem_to_gmem(0)  # the last result has left
        if form.bits:
            qmax = 2 ** (form.bits - 1) - 1
            scale = scale_of(r, qmax)
            scale_ref[0][token] = scale
            codes = lambda i: _rounded(r[i] * (1.0 / scale), qmax, form.clip)  # noqa: E731
            if form.packed:  # one after the other, for want of registers
                y_tile[...] = ((codes(1) & 15) << 4).astype(jnp.uint8)
                y_tile[...] = y_tile[...] | (codes(0) & 15).astype(jnp.uint8)
            else:
                y_tile[...] = codes(0).astype(jnp.int8)
        else:
            y_tile[...] = (r[0] * form.gain).astype(y_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_tile, y_ref.at[token])

    def scale_of(r, qmax):
        high = functools.reduce(jnp.maximum, [jnp.max(jnp.max(a, axis=1)) for a in r])
        low = functools.reduce(jnp.maximum, [jnp.max(jnp.max(-a, axis=1)) for a in r])
        if form.clip:
            high, low = high * clip_ref[1], low * clip_ref[0]
        most = jnp.maximum(high, low)
        return jnp.where(most > 0, most / qmax, 1.0)

    plgpu.emit_pipeline(
        step,
        grid=(each,),
        in_specs=[
            plgpu.BlockSpec(
                (1, form.rows, form.cols),
                lambda i: (program * each + i, 0, 0),
                transforms=hopper.transforms(form.cols, 16),
            )
        ],
        max_concurrent_steps=2,
    )(x_ref)
    plgpu.wait_smem_to_gmem(0)


def _rounded(v: Array, qmax: int, clip: bool) -> Array:
    """The nearest code; within the range of all values none is beyond qmax, but for rounding."""
    v = jnp.maximum(jnp.minimum(v, float(qmax)), float(-qmax - 1)) if clip else v
    return jax.lax.bitcast_convert_type(v + MAGIC, jnp.int32) - MAGIC_BITS


def _operands(x: Array, left: Array | None, right: Array | None) -> tuple:
    rng = np.random.default_rng(0)
    make = lambda m: None if m is None else rng.standard_normal(m.shape).astype(m.dtype)  # noqa: E731
    return (rng.standard_normal((3, x.shape[-1])).astype(x.dtype), make(left), make(right))


def example(
    x: Array,
    left: Array | None,
    right: Array | None,
    clip: Array | None = None,
    bits: int = 0,
    packed: bool = False,
) -> Example:
    """Operands of a call like this one, for `pallas_kernels.trial`."""
    form = form_of(x, left, right, CHIPS["h100"], bits, packed, clip is not None)
    clips = () if not bits else (None if clip is None else np.array([0.8, 0.9], np.float32),)
    return Example((form, x.dtype.name, x.shape[-1]), (*_operands(x, left, right), *clips), form)


EXAMPLES = {"kron_matmul": example, "kron_quantize": example}
