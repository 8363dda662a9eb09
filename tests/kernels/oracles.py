"""What each operation of `pallas_kernels` means, entry by entry in float64 numpy.

Nothing here is shared with the package, so that a mistake in its packing or its reference shows.
Where a contract rounds in the middle (`kron_matmul` with bfloat16), so does the oracle.
"""

import numpy as np

F64 = np.float64


def dense_weight(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """``(q − z) · s``; codes `[*experts, in_ch, out_ch]`, grids `[*experts, groups, cols]`."""
    size = codes.shape[-2] // scale.shape[-2]
    each = lambda a: np.repeat(np.asarray(a, F64), size, -2)  # noqa: E731
    return (codes.astype(F64) - (0 if zero is None else each(zero))) * each(scale)


def grouped_matmul(x: np.ndarray, dense: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """Rows sorted by expert times the expert's matrix; rows beyond the last group are zeros."""
    y, start = np.zeros((len(x), dense.shape[-1])), 0
    for expert, size in enumerate(group_sizes):
        rows = slice(start, start + size)
        y[rows], start = np.asarray(x, F64)[rows] @ dense[expert], start + size
    return y


def kron(x: np.ndarray, left: np.ndarray | None, right: np.ndarray | None) -> np.ndarray:
    """``x (left ⊗ right)`` with factors and middle rounded to the dtype of `x`."""
    to = lambda a: np.asarray(a).astype(x.dtype).astype(F64)  # noqa: E731
    y = np.asarray(x, F64)
    if right is not None:
        y = (y.reshape(-1, len(right)) @ to(right)).reshape(x.shape)
    if left is not None:
        runs = to(y).reshape(-1, len(left), x.shape[-1] // len(left))
        y = np.einsum("tic,ij->tjc", runs, to(left)).reshape(x.shape)
    return y


def token_codes(r: np.ndarray, clip: np.ndarray | None, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes before packing, and the scale, of `kron_quantize`."""
    qmax = 2 ** (bits - 1) - 1
    low, high = r.min(-1, keepdims=True), r.max(-1, keepdims=True)
    if clip is not None:
        low, high = low * clip[0], high * clip[1]
    scale = np.maximum(-low, high) / qmax
    scale = np.where(scale > 0, scale, 1.0)
    return np.clip(np.rint(r / scale), -qmax - 1, qmax).astype(np.int8), scale


def hadamard(x: np.ndarray, base: np.ndarray | None, doublings: int, inner: int) -> np.ndarray:
    """The explicit matrix, run by run."""
    matrix = np.ones((1, 1)) if base is None else np.asarray(base, F64)
    for _ in range(doublings):
        matrix = np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]]))
    matrix = np.kron(matrix / np.sqrt(len(matrix)), np.eye(inner))
    return (np.asarray(x, F64).reshape(-1, len(matrix)) @ matrix).reshape(x.shape)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    scale: float,
) -> np.ndarray:
    """``softmax(scale · q Kᵀ) V`` over the slots a sequence sees; k and v are floats already."""
    y = np.zeros(q.shape)
    for b, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if stop <= start:
            continue
        keys, values = (np.asarray(a, F64)[b, :, start:stop] for a in (k, v))
        scores = np.einsum("hgd,hsd->hgs", np.asarray(q, F64)[b], keys) * scale
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y[b] = np.einsum("hgs,hsd->hgd", p / p.sum(-1, keepdims=True), values)
    return y
