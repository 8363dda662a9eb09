"""QuaRot: rotate activations so that no channel stands out; the model computes what it did.

Offline, with R = diag(±1) H/√d_model from a seed:
    residual stream   x → x R: embedding E R; what reads the stream R⁻¹ W, after the weights of the
                      norms have moved into it; what writes it W R; head R⁻¹ W
    values            v → v H/√head_dim per head, in attn.v and attn.o
Online, with the inverse in the weights behind it:
    attn_out          heads are mixed by H/√n_heads, which with the values gives H of all channels
    ffn_mid           x → x H/√d_ff
    keys and queries  k → k H/√head_dim after RoPE and q likewise; every score is what it was
Nothing is quantized here: GPTQ or RTN follow in the recipe. Caches alone, "QuaRot-KV", are
`QuaRot(residual=False, values=False, ffn=False, head_mix="none")`.

Source: Ashkboos et al., arXiv 2404.00456, and the authors' code. Departures: float32, where the
authors fold in float64; Hadamard matrices come from Paley's constructions (`core.hadamard`), which
reach orders that the authors' tables lack; where there is none, a random orthogonal matrix may
stand in. A model whose head is tied to the embedding gets a head of its own.
"""

import dataclasses
import functools
import typing
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.calibrate.plan import BlockPlan, Program, tree_bytes
from jaxcomp.calibrate.stream import BlockStep, Calibration, Metrics, Result, Run, blockwise
from jaxcomp.core.hadamard import hadamard_base, no_hadamard
from jaxcomp.core.linear import Linear
from jaxcomp.core.transforms import (
    Diag,
    Hadamard,
    Kron,
    Transform,
    transform_columns,
    transform_rows,
)
from jaxcomp.core.tree import get_at, replace_at
from jaxcomp.models.anatomy import anatomy, channels
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.fold import check_dense, fold_norm, insert_online, rotate_keys, rotate_values
from jaxcomp.models.patch import rotate_patch
from jaxcomp.models.scaling import as_float32
from jaxcomp.solvers.orthogonal import random_orthogonal

Rotation = Literal["hadamard", "orthogonal"]
HeadMix = Literal["hadamard", "orthogonal", "none"]


@dataclasses.dataclass(frozen=True)
class QuaRot:
    """Settings of QuaRot.

    Attributes:
      seed: of the signs, and of the orthogonal matrices where they are asked for.
      residual, values, keys, ffn: which of the rotations to make; see the top of the file.
      head_mix: how heads are mixed at `attn_out`. A random "orthogonal" matrix fits any number of
        heads and costs n_heads products a channel.
      rotation: of the residual stream; "orthogonal" fits any width.
    """

    seed: int = 0
    residual: bool = True
    values: bool = True
    keys: bool = True
    ffn: bool = True
    head_mix: HeadMix = "hadamard"
    rotation: Rotation = "hadamard"
    needs_text: ClassVar[bool] = False

    def __post_init__(self):
        for name, choices in (("head_mix", HeadMix), ("rotation", Rotation)):
            if getattr(self, name) not in typing.get_args(choices):
                known = ", ".join(typing.get_args(choices))
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")

    def __call__(
        self, model: Decoder, calib: Calibration | None = None, run: Run = Run()
    ) -> Result:
        self.check(model)
        residual = residual_rotation(self, model.config.d_model)
        visit = functools.partial(rotate_block, self, residual)
        result = blockwise("QuaRot", model, calib, visit, None, run)
        return Result(rotate_ends(result.model, residual), result.rows)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        if self.residual:
            for name, p in (("embed", Linear(model.embed.weight)), ("lm_head", model.lm_head)):
                if p is not None:
                    check_dense(p, name)
        if self.residual and self.rotation == "hadamard":
            _check_order("d_model", model.config.d_model, "rotation='orthogonal' or residual=False")
        for i, block in enumerate(map(block_struct, model.blocks)):
            try:
                self._check_block(block)
            except ValueError as error:
                raise ValueError(f"block {i}, {error}") from None

    def _check_block(self, block: Block) -> None:
        parts, attn = anatomy(block), block.attn
        for path in parts.linears:
            check_dense(get_at(block, path), path)
        for name, site in block.sites.items():
            if site.transforms:
                raise ValueError(
                    f"site {name} has a transform already: the model was rotated before, by QuaRot "
                    "or by another method; start from the model as it was"
                )
            if site.quantizer is not None:
                raise ValueError(
                    f"site {name} has a quantizer, made for what passed it before a rotation; put "
                    "QuaRot before the step that quantizes"
                )
        if self.residual and not parts.rotatable:
            raise ValueError(
                "anatomy: a norm between attn.o or ffn.down and the residual stream lets no "
                "rotation of the stream pass; use residual=False"
            )
        if self.values:
            _check_order("the values: head_dim", attn.head_dim, "values=False")
        if self.keys and attn.head_dim & (attn.head_dim - 1):
            raise ValueError(
                f"site k_cache: head_dim={attn.head_dim} is no power of two; use keys=False"
            )
        if self.head_mix == "hadamard":
            ways = "head_mix='orthogonal' or head_mix='none'"
            _check_order("site attn_out: n_heads", attn.n_heads, ways)
        if self.ffn:
            _check_order("site ffn_mid: d_ff", channels(block, "ffn_mid"), "ffn=False")

    def plan_block(self, block: Block, hidden: Any, batches: int, n_blocks: int) -> BlockPlan:
        """The programs of one block and what they make of it, for a dry run."""
        width = channels(block, "attn_in")
        args = jax.eval_shape(lambda: (residual_rotation(self, width), head_mix(self, block)))
        static = dict(cfg=dataclasses.replace(self, seed=0))
        program = Program(_rotate, (block, *args), 1, static)
        return BlockPlan([program], tree_bytes(block), program.result()[0])


def rotate_block(
    cfg: QuaRot, residual: tuple[Transform, ...], step: BlockStep
) -> tuple[Block, Metrics]:
    """Rotates one block; it reads and writes the rotated residual stream."""
    # The seed is in the arrays; without it every seed shares one compilation.
    static = dataclasses.replace(cfg, seed=0)
    block, before, after = _rotate(step.block, residual, head_mix(cfg, step.block), cfg=static)
    return block, {"": {"weight_peak_before": float(before), "weight_peak_after": float(after)}}


def residual_rotation(cfg: QuaRot, d_model: int) -> tuple[Transform, ...]:
    """R as transforms to be applied in turn; empty where the stream is left alone."""
    if not cfg.residual:
        return ()
    key, _ = jax.random.split(jax.random.key(cfg.seed))
    if cfg.rotation == "orthogonal":
        return (Kron(right=random_orthogonal(key, d_model)),)
    return (Diag(jax.random.rademacher(key, (d_model,), jnp.float32)), Hadamard(d_model))


def head_mix(cfg: QuaRot, block: Block) -> Transform | None:
    """What mixes the heads at `attn_out`."""
    heads = block.attn.n_heads
    if cfg.head_mix == "none":
        return None
    if cfg.head_mix == "hadamard":
        return Hadamard(heads, inner=block.attn.head_dim)
    _, key = jax.random.split(jax.random.key(cfg.seed))
    return Kron(left=random_orthogonal(key, heads))


@functools.partial(jax.jit, static_argnames="cfg")
def _rotate(
    block: Block, residual: tuple[Transform, ...], mix: Transform | None, cfg: QuaRot
) -> tuple[Block, Array, Array]:
    stored, block = block, as_float32(block)  # rounded once, at the end
    before = weight_peak(block)
    if residual:
        block = rotate_stream(fold_norm(fold_norm(block, "attn_in"), "ffn_in"), residual)
    if cfg.values:
        block = rotate_values(block, Hadamard(block.attn.head_dim))
    if mix is not None:
        block = insert_online(block, "attn_out", mix, inverse=mix)
    if cfg.ffn:
        block = insert_online(block, "ffn_mid", Hadamard(channels(block, "ffn_mid")))
    if cfg.keys:
        block = rotate_keys(block, Hadamard(block.attn.head_dim))
    after, sites, patch = weight_peak(block), block.sites, block.patch
    rest = block.replace(sites=stored.sites, patch=stored.patch)
    block = jax.tree.map(lambda new, old: new.astype(old.dtype), rest, stored)
    return block.replace(sites=sites, patch=patch), before, after


def rotate_stream(block: Block, rotation: tuple[Transform, ...]) -> Block:
    """The float32 block in the rotated basis of the stream; its norms must have no weights."""
    parts = anatomy(block)
    for path in parts.readers:
        w = _rotate_rows(get_at(block, path).w, rotation)
        block = replace_at(block, f"{path}.w", w)
    for path in parts.writers:
        p = get_at(block, path)
        b = None if p.b is None else _rotate_columns(p.b, rotation)
        block = replace_at(block, path, Linear(_rotate_columns(p.w, rotation), b))
    if block.patch is None:
        return block
    width = get_at(block, parts.readers[0]).w.shape[-2]
    return block.replace(patch=rotate_patch(block.patch, rotation, width))


def rotate_ends(model: Decoder, rotation: tuple[Transform, ...]) -> Decoder:
    """The model with embedding, final norm and head in the rotated basis; the head is untied.

    `embed.scale` is one number and commutes with the rotation. It does not apply to a tied head.
    """
    if not rotation:
        return model
    table, norm = model.embed.weight, model.norm
    head = Linear(jnp.asarray(table).T) if model.lm_head is None else model.lm_head
    w = as_float32(head.w)
    if norm is not None:
        w = w * (norm.offset + as_float32(norm.weight))[:, None]
        norm = norm.replace(weight=jnp.full_like(norm.weight, 1 - norm.offset))
    return model.replace(
        embed=model.embed.replace(weight=_rotate_columns(table, rotation).astype(table.dtype)),
        norm=norm,
        lm_head=head.replace(w=_rotate_rows(w, rotation).astype(head.w.dtype)),
    )


def weight_peak(block: Block) -> Float[Array, ""]:
    """The largest |w| / rms(w) among the linears: what makes a grid coarse."""
    peaks = []
    for path in anatomy(block).linears:
        w = get_at(block, path).w
        peaks.append(jnp.max(jnp.abs(w)) / jnp.maximum(jnp.sqrt(jnp.mean(w * w)), 1e-30))
    return jnp.max(jnp.stack(peaks))


def _rotate_rows(w: Array, rotation: tuple[Transform, ...]) -> Array:
    """R⁻¹ W in float32; every part of R is its own inverse transpose."""
    return functools.reduce(lambda w, t: transform_rows(t, w), rotation, as_float32(w))


def _rotate_columns(a: Array, rotation: tuple[Transform, ...]) -> Array:
    """A R in float32; a weight, a bias or the embedding."""
    return functools.reduce(lambda a, t: transform_columns(t, a), rotation, as_float32(a))


def _check_order(what: str, order: int, instead: str) -> None:
    if hadamard_base(order) is None:
        raise ValueError(f"{what}={order}: {no_hadamard(order, instead)}")
