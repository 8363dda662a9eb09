"""Exact changes of a block: move scales and transforms between a site, its producer, its consumers.

Every function returns a block that computes what the given one computes. Arithmetic is float32;
results have the dtype they were stored in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import CONSUMER_SITES, Site, transform_site
from jaxcomp.core.transforms import (
    Diag,
    Transform,
    inverse_transpose,
    transform,
    transform_columns,
    transform_rows,
)
from jaxcomp.core.tree import get_at, replace_at
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.attention import GQA
from jaxcomp.models.decoder import Block
from jaxcomp.models.layers import RMSNorm


def fold_scale(block: Block, site: str, scale: Float[Array, " channels"]) -> Block:
    """Multiplies the site's activation by `scale` in its producer and divides it out again.

    Args:
      scale: finite and not 0; where value heads are repeated at the site, equal over the repeats.

    Raises:
      ValueError: nothing before the site can absorb a scale, or a weight is quantized already.
    """
    part = anatomy(block)[site]
    if part.producer is None:
        raise ValueError(f"the anatomy has nothing before {site} that could absorb a scale")
    per_producer = scale
    if part.repeats > 1:
        head_dim = block.attn.head_dim
        heads = scale.reshape(-1, part.repeats, head_dim)
        per_producer = heads[:, 0].reshape(-1)
    producer = get_at(block, part.producer)
    block = replace_at(block, part.producer, scale_output(producer, per_producer, part.producer))
    return absorb(block, site, Diag(scale))


def scale_output(
    producer: RMSNorm | Linear, scale: Float[Array, " channels"], where: str = "the producer"
) -> RMSNorm | Linear:
    """The node with each output channel multiplied by its scale."""
    if isinstance(producer, RMSNorm):
        weight = (producer.offset + _float32(producer.weight)) * scale - producer.offset
        return producer.replace(weight=weight.astype(producer.weight.dtype))
    check_dense(producer, where)
    w, b = producer.w, producer.b
    scaled = (_float32(w) * scale).astype(w.dtype)
    return Linear(scaled, None if b is None else (_float32(b) * scale).astype(b.dtype))


def scale_stream(block: Block, scale: float) -> Block:
    """The block in a residual stream that is `scale` times what it was, to which it adds as much.

    What it reads through a norm it reads as before, but for the norm's epsilon; what reads the
    stream itself is divided. A norm behind a unit takes the scale in place of the weights.

    Raises:
      ValueError: see `check_scalable`.
    """
    check_scalable(block)
    for path in (path for site in _bare_sites(block) for path in anatomy(block)[site].consumers):
        p = get_at(block, path)
        block = replace_at(block, f"{path}.w", (_float32(p.w) / scale).astype(p.w.dtype))
    for path in _writers(block):
        producer = get_at(block, path)
        weight = producer.weight if isinstance(producer, RMSNorm) else producer.w
        each = jnp.full(weight.shape[-1], scale, jnp.float32)
        block = replace_at(block, path, scale_output(producer, each, path))
    return block


def check_scalable(block: Block) -> None:
    """Refuses a block that `scale_stream` cannot change exactly; shapes are enough.

    Raises:
      ValueError: a weight to scale is quantized, or a range was measured on the stream as it is.
    """
    parts, bare = anatomy(block), _bare_sites(block)
    paths = (*(path for site in bare for path in parts[site].consumers), *_writers(block))
    for path in paths:
        if isinstance(p := get_at(block, path), Linear):
            check_dense(p, path)
    own = (CONSUMER_SITES.get(path, "") for site in bare for path in parts[site].consumers)
    for site in (*bare, *own):
        quantizer = block.sites.get(site, Site()).quantizer
        if quantizer is not None and not quantizer.spec.dynamic:
            raise ValueError(
                f"{site} reads the residual stream itself, and its range was measured on the "
                "stream as it is; put the step that scales the stream before the one that measures"
            )


def _bare_sites(block: Block) -> tuple[str, ...]:
    """Sites that read the residual stream through no norm."""
    norms = {"attn_in": block.attn_norm, "ffn_in": block.ffn_norm}
    return tuple(site for site, norm in norms.items() if norm is None)


def _writers(block: Block) -> tuple[str, ...]:
    """What adds to the residual stream: the last linears of both units, or the norms behind."""
    parts, norms = anatomy(block), {"attn_out": "attn_post_norm", "ffn_mid": "ffn_post_norm"}
    ends = (
        parts[site].consumers if getattr(block, norm) is None else (norm,)
        for site, norm in norms.items()
    )
    return tuple(path for unit in ends for path in unit)


def absorb(block: Block, site: str, t: Transform, inverse: Transform | None = None) -> Block:
    """Every consumer of the site gets T⁻¹ in front; the site must come to give x T by other means.

    Args:
      inverse: T⁻ᵀ where the caller has it at hand.
    """
    inverse = inverse_transpose(t) if inverse is None else inverse
    for path in anatomy(block)[site].consumers:
        p = get_at(block, path)
        check_dense(p, path)
        w = transform_rows(inverse, _float32(p.w)).astype(p.w.dtype)
        block = replace_at(block, f"{path}.w", w)
    return block


def insert_online(block: Block, site: str, t: Transform, inverse: Transform | None = None) -> Block:
    """Puts `t` at the site, after what is there and online, and T⁻¹ into the consumers."""
    return append_transform(absorb(block, site, t, inverse), site, t)


def rotate_keys(block: Block, t: Transform, inverse: Transform | None = None) -> Block:
    """Keys become k T and queries q T⁻ᵀ, per head and after RoPE; every score stays what it was."""
    inverse = inverse_transpose(t) if inverse is None else inverse
    return append_transform(append_transform(block, "k_cache", t), "query", inverse)


def rotate_values(block: Block, t: Transform, inverse: Transform | None = None) -> Block:
    """Values become v T per head, inside `attn.v`, and `attn.o` reads them through T⁻¹.

    `t` is for head_dim channels. The site `attn_out` sees the transformed values.
    """
    attn = block.attn
    assert isinstance(attn, GQA)
    check_dense(attn.v, "attn.v")
    check_dense(attn.o, "attn.o")
    inverse = inverse_transpose(t) if inverse is None else inverse
    dim = attn.head_dim
    # [in_ch, heads · head_dim] seen as rows of head_dim.
    columns = lambda w: transform_columns(t, w.reshape(-1, dim)).reshape(w.shape)  # noqa: E731
    v = attn.v.replace(
        w=columns(_float32(attn.v.w)).astype(attn.v.w.dtype),
        b=None if attn.v.b is None else columns(_float32(attn.v.b)).astype(attn.v.b.dtype),
    )
    rows = _float32(attn.o.w).T
    o = transform(inverse, rows.reshape(-1, dim)).reshape(rows.shape).T
    o = attn.o.replace(w=o.astype(attn.o.w.dtype))
    return block.replace(attn=attn.replace(v=v, o=o))


def fold_norm(block: Block, site: str) -> Block:
    """Moves the weight of the norm before a site into the site's consumers; the norm keeps ones.

    A block without such a norm is returned as it is.
    """
    part = anatomy(block)[site]
    norm = None if part.producer is None else get_at(block, part.producer)
    if not isinstance(norm, RMSNorm):
        return block
    weight = norm.offset + _float32(norm.weight)
    for path in part.consumers:
        p = get_at(block, path)
        check_dense(p, path)
        block = replace_at(block, f"{path}.w", (_float32(p.w) * weight[:, None]).astype(p.w.dtype))
    return replace_at(block, f"{part.producer}.weight", jnp.full_like(norm.weight, 1 - norm.offset))


def take_back(
    block: Block, path: str, w: Float[Array, "in_ch out_ch"]
) -> Float[Array, "in_ch out_ch"]:
    """T W in float32: what the linear at `path` with weight `w` does to x, its site giving x T.

    The other direction of `insert_online`: with T W for W and no transform at the sites, the block
    computes what it did.
    """
    sites = (anatomy(block).linears[path], CONSUMER_SITES.get(path, ""))
    transforms = [t for name in sites for t in block.sites.get(name, Site()).transforms]
    w = _float32(w)
    if not transforms:
        return w

    def enter(x: Array) -> Array:
        return functools.reduce(lambda x, t: transform(t, x), transforms, x)

    _, transposed = jax.vjp(enter, w.T)  # of x → x T, which is y → y Tᵀ
    return transposed(w.T)[0].T


def keeps_scores(block: Block) -> bool:
    """Whether the transforms of queries and keys cancel in every score: k T, q T⁻ᵀ, or none."""
    eye = jnp.eye(block.attn.head_dim)
    q, k = (transform_site(block.sites.get(name, Site()), eye) for name in ("query", "k_cache"))
    return bool(jnp.allclose(q @ k.T, eye, atol=1e-4))


def append_transform(block: Block, site: str, t: Transform) -> Block:
    """The block with one more transform at a site; nothing makes up for it."""
    old = block.sites.get(site, Site())
    new = old.replace(transforms=(*old.transforms, t))
    return block.replace(sites={**block.sites, site: new})


def check_dense(p: Linear, path: str) -> None:
    """Refuses a weight that is quantized: folding into codes would not be exact.

    Raises:
      ValueError: names the linear and the bits.
    """
    if isinstance(p.w, QTensor):
        raise ValueError(
            f"{path} is already quantized to {p.w.bits} bits and can absorb nothing; "
            "put the step that transforms the model before the one that quantizes it"
        )


def _float32(a: Array | np.ndarray) -> Array:
    return jnp.asarray(a, jnp.float32)
