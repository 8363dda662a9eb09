"""The learnable affine transforms of a block: parameters, and the block that they make.

Parameters are a dict of groups, each a dict of places:
    transform    site → factors of P, each invertible by construction (`solvers.invertible`)
    scale        site → c, one positive number a channel
    weight_clip  linear → logits of the factors of its ranges, [2, groups, out_ch]
    act_clip     site, or what one consumer sees of it → logits of the factors of its range, [2]

`flat_block(params, block, setting)` folds all of it into the block, exactly: with the quantizers
off it computes what `block` computes.

    attn_in    x → (x ⊙ c)(P1 ⊗ P2)     c into the norm, P online, P⁻¹/c into q, k, v
    v_cache    v → v Pv per head          into v's columns, its inverse into o
    k_cache    k → k Ph, q → q Ph⁻ᵀ       online, after RoPE
    attn_out   o → o (Po ⊗ I)             online, a mix of heads; inverse into o
    ffn_in     as attn_in, for gate and up
    ffn_mid    x → (x ⊙ c)(P1 ⊗ P2)     c into up's columns, P online, P⁻¹/c into down

The same function serves the fit, with gradients, and the merge at its end, so that both agree.

Source: Sun et al., FlatQuant, arXiv 2410.09426, §3. Departures: Pv without Po (cache only) is
undone inside o instead of online; v's clip comes after Pv, on the weight that is quantized; the
bias of `up` is scaled like its columns.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import (
    dequantize,
    fake_quantize,
    quantize_with,
    range_to_grid,
    weight_range,
)
from jaxcomp.core.scheme import Scheme
from jaxcomp.core.site import CONSUMER_SITES, ActQuantizer, Site
from jaxcomp.core.transforms import Kron
from jaxcomp.core.tree import get_at, replace_at
from jaxcomp.models import fold
from jaxcomp.models.anatomy import anatomy, channels
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import Block, block_forward
from jaxcomp.solvers.invertible import SVD, Direct, Form, Init, init_matrix, materialize
from jaxcomp.solvers.kronecker import check_pair, factor_pair

CACHE = ("k_cache", "v_cache")  # their grids are of keys and values, not of linears
CLIP_INIT = 4.0  # logit: the ratio starts at 0.982
Params = dict[str, dict[str, Any]]
Finish = Literal["round", "clip", "keep"]


@dataclasses.dataclass(frozen=True)
class BlockSetting:
    """What is static about one block's fit; equal for blocks that share a compilation.

    Attributes:
      grids: (site, grids at it) for every site with linears, and for k_cache and v_cache.
      shared_quantizer: one activation quantizer a site, or one for each linear that reads it.
      token_limit: see `block_loss`.
      dtype: of products and activations in the fit; parameters and losses are float32.
    """

    grids: tuple[tuple[str, Scheme], ...]
    shared_quantizer: bool = True
    token_limit: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __getitem__(self, site: str) -> Scheme:
        return dict(self.grids)[site]

    @property
    def quantizes_linears(self) -> bool:
        """Whether any weight or any linear's input has a grid."""
        return any(g.weight or g.act for site, g in self.grids if site not in CACHE)


def factor_shapes(
    block: Block, setting: BlockSetting, factors: dict[str, tuple[int, int]]
) -> dict[str, tuple[int | None, int | None]]:
    """Orders of the left and right factor at each site that gets a transform.

    Args:
      factors: pairs that replace the balanced one.

    Raises:
      ValueError: a site whose channels have no balanced pair, or a pair that does not fit.
    """
    shapes: dict[str, tuple[int | None, int | None]] = {}
    attn, paired = block.attn, [site for site in anatomy(block).sites if site != "attn_out"]
    if unknown := [site for site in factors if site not in paired]:
        raise ValueError(
            f"site {unknown[0]!r} takes no factor pair; those that do are {', '.join(paired)}"
        )
    for site in anatomy(block).sites if setting.quantizes_linears else ():
        width = channels(block, site)
        if site == "attn_out":
            if width != attn.n_heads * attn.head_dim:
                raise ValueError(
                    f"attn.o reads {width} channels, which are not {attn.n_heads} heads of "
                    f"{attn.head_dim}"
                )
            shapes[site] = attn.n_heads, None
            continue
        try:
            own = factors.get(site)
            shapes[site] = check_pair(own, width) if own else factor_pair(width)
        except ValueError as error:
            raise ValueError(f"site {site}: {error}") from None
    if setting["k_cache"].k:
        shapes["k_cache"] = None, attn.head_dim
    if setting["v_cache"].v or setting.quantizes_linears:
        shapes["v_cache"] = None, attn.head_dim
    return shapes


def init_transforms(
    shapes: dict[str, tuple[int | None, int | None]], key: PRNGKeyArray, form: Form, init: Init
) -> dict[str, dict[str, SVD | Direct | None]]:
    """Group `transform` at its initial value."""
    keys = iter(jax.random.split(key, 2 * len(shapes)))

    def one(order: int | None) -> SVD | Direct | None:
        key = next(keys)
        return None if order is None else init_matrix(order, key, form, init)

    return {
        site: {"left": one(left), "right": one(right)} for site, (left, right) in shapes.items()
    }


def init_clips(block: Block, setting: BlockSetting) -> tuple[dict[str, Array], dict[str, Array]]:
    """Groups `weight_clip` and `act_clip` at their initial value."""
    weights = {}
    for path, site in anatomy(block).linears.items():
        if grid := setting[site].weight:
            ranges = functools.partial(weight_range, spec=grid)
            shape = jax.eval_shape(ranges, get_at(block, path).w)[0].shape
            weights[path] = jnp.full((2, *shape), CLIP_INIT, jnp.float32)
    sites = quantizers(block, setting)
    return weights, {name: jnp.full(2, CLIP_INIT, jnp.float32) for name in sites}


def quantizers(block: Block, setting: BlockSetting) -> dict[str, Any]:
    """Site, or consumer's view of one → grid of the activation there."""
    grids = {}
    for site, part in anatomy(block).sites.items():
        if setting[site].act:
            own = [CONSUMER_SITES[path] for path in part.consumers if path in CONSUMER_SITES]
            for name in own if own and not setting.shared_quantizer else [site]:
                grids[name] = setting[site].act
    cache = {"k_cache": setting["k_cache"].k, "v_cache": setting["v_cache"].v}
    return grids | {name: grid for name, grid in cache.items() if grid}


def flat_block(params: Params, block: Block) -> Block:
    """The block with scales and transforms folded in and put online; no quantizer yet."""
    for site, c in params["scale"].items():
        block = fold.fold_scale(block, site, c)
    for site, factors in params["transform"].items():
        t, inverse = _kron(factors)
        if site == "k_cache":
            block = fold.rotate_keys(block, t, inverse)
        elif site == "v_cache":
            block = fold.rotate_values(block, t, inverse)
        else:
            block = fold.insert_online(block, site, t, inverse)
    return block


def quantized_sites(params: Params, block: Block, setting: BlockSetting) -> Block:
    """The block with activation quantizers at its sites, clipped as the parameters say."""
    sites = dict(block.sites)
    for name, grid in quantizers(block, setting).items():
        logits = params["act_clip"].get(name)
        clip = None if logits is None else jax.nn.sigmoid(logits)
        sites[name] = sites.get(name, Site()).replace(quantizer=ActQuantizer(grid, clip=clip))
    return block.replace(sites=sites)


def simulated_weights(params: Params, block: Block, setting: BlockSetting) -> Block:
    """The block with its weights quantized in simulation, with gradients."""
    for path, site in anatomy(block).linears.items():
        if grid := setting[site].weight:
            w = fake_quantize(get_at(block, path).w, grid, _weight_clip(params, path))
            block = replace_at(block, f"{path}.w", w)
    return block


def block_loss(
    params: Params, setting: BlockSetting, block: Block, x: Array, target: Array
) -> Float[Array, ""]:
    """Mean squared error of the quantized block's output, float32.

    With `setting.token_limit` a token whose update (target − x) has more than so many times the
    energy of the median token's weighs less in proportion. One massive token otherwise decides the
    loss of the block that makes it, and the others' errors stay as they were.

    Args:
      block: float32 leaves.
      x, target: input and wanted output, `[batch, time, d_model]`.
    """
    flat = quantized_sites(params, flat_block(params, block), setting)
    flat = simulated_weights(params, flat, setting)
    dtype = jnp.dtype(setting.dtype)
    y = block_forward(_cast_weights(flat, dtype), x.astype(dtype), plain_context(*x.shape[:2]))
    x, target = x.astype(jnp.float32), target.astype(jnp.float32)
    error = jnp.mean(jnp.square(y.astype(jnp.float32) - target), axis=-1)
    if setting.token_limit is None:
        return jnp.mean(error)
    update = jnp.mean(jnp.square(target - x), axis=-1)
    limit = setting.token_limit * jnp.median(update)
    return jnp.mean(error * jnp.minimum(1.0, limit / jnp.maximum(update, 1e-30)))


@functools.partial(jax.jit, static_argnames=("setting", "finish"))
def merge(
    params: Params, block: Block, setting: BlockSetting, finish: Finish
) -> tuple[Block, dict[str, dict[str, Array]]]:
    """The finished block, and numbers about each of its linears.

    Args:
      block: float32 leaves.
      finish: weights "round"ed to codes, dense and "clip"ped to their learned ranges, or dense and
        as the transforms left them ("keep").
    """
    flat = quantized_sites(params, flat_block(params, block), setting)
    numbers = {}
    for path, site in anatomy(block).linears.items():
        if (grid := setting[site].weight) is None:
            continue
        w, clip = get_at(flat, path).w, _weight_clip(params, path)
        low, high = weight_range(w, grid)
        if clip is not None:
            low, high = low * clip[0], high * clip[1]
        codes = quantize_with(w, *range_to_grid(low, high, grid), grid)
        error = jnp.sum(jnp.square(dequantize(codes) - w)) / jnp.maximum(jnp.sum(w * w), 1e-30)
        numbers[path] = {"weight_error": error}
        if clip is not None:
            numbers[path] |= {"clip_low": jnp.mean(clip[0]), "clip_high": jnp.mean(clip[1])}
        if finish == "round":
            flat = replace_at(flat, f"{path}.w", codes)
        elif finish == "clip" and clip is not None:
            groups = w.reshape(len(low), -1, w.shape[-1])
            clipped = jnp.clip(groups, low[:, None], high[:, None]).reshape(w.shape)
            flat = replace_at(flat, f"{path}.w", clipped)
    return flat, numbers


def _kron(factors: dict[str, SVD | Direct | None]) -> tuple[Kron, Kron]:
    """P and P⁻ᵀ."""
    pairs = [(None, None) if m is None else materialize(m) for m in factors.values()]
    return tuple(Kron(**dict(zip(factors, side, strict=True))) for side in zip(*pairs, strict=True))


def _weight_clip(params: Params, path: str) -> Array | None:
    logits = params["weight_clip"].get(path)
    return None if logits is None else jax.nn.sigmoid(logits)


def _cast_weights(block: Block, dtype: Any) -> Block:
    is_linear = lambda p: isinstance(p, Linear)  # noqa: E731
    cast = lambda p: p.replace(w=p.w.astype(dtype)) if is_linear(p) else p  # noqa: E731
    return jax.tree.map(cast, block, is_leaf=is_linear)
