"""FlatQuant: fit small invertible transforms until weights and activations are flat, then round.

At each site with input x and consumers W, with P = P1 ⊗ P2 invertible and c a scale a channel,
    x W = ((x ⊙ c) P) · (P⁻¹ (W / c)),
and both sides are quantized. P, c and the clipping factors of all ranges are fitted block by block
so that the quantized block gives what the original block gives on the original inputs; the weights
themselves are never trained. Where each transform sits is `calibrate.learnable`, how it is fitted
is `calibrate.fit`. Only P stays online; everything else is folded.

Source: Sun et al., arXiv 2410.09426, and the authors' code, whose settings are the defaults: AdamW
with 5e-3 (clipping 5e-2), cosine to 5e-6, 15 epochs in fixed order, batches of 4, the logarithm of
the mean squared error. Departures: one activation quantizer a site where the code has one for each
linear (`shared_quantizer=False` for that); those listed in the two files named above. `token_limit`
is ours, off by default; with it the `loss_curve` and the `mse_` numbers of a row are weighted too.
"""

import dataclasses
import functools
import logging
import typing
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.calibrate.capture import capture, capture_batch
from jaxcomp.calibrate.fit import FitSpec, fit_init, fit_step, run_fit
from jaxcomp.calibrate.learnable import (
    BlockSetting,
    Finish,
    Params,
    block_loss,
    factor_shapes,
    init_clips,
    init_transforms,
    merge,
)
from jaxcomp.calibrate.plan import BlockPlan, Program, tree_bytes
from jaxcomp.calibrate.stats import magnitude_init, magnitude_update
from jaxcomp.calibrate.stream import (
    BlockStep,
    Calibration,
    Metrics,
    Result,
    Run,
    blockwise,
    check_finite,
)
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.scheme import Override, Scheme
from jaxcomp.core.tree import get_at, named_leaves
from jaxcomp.models.anatomy import anatomy, channels, check_grid
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.scaling import as_float32, consumer_amax
from jaxcomp.models.stream import block_step
from jaxcomp.solvers.invertible import Form, Init, condition
from jaxcomp.solvers.smoothing import flatquant_scale

log = logging.getLogger(__name__)

SCALED = ("attn_in", "ffn_in", "ffn_mid")  # sites with a scale, where something can absorb it
MAX_CONDITION = 1e4
CURVE = 100  # points of a loss curve in the report


@dataclasses.dataclass(frozen=True)
class FlatQuant:
    """Settings of FlatQuant.

    Attributes:
      weight: grid of every linear in the blocks; None leaves weights alone.
      act: dynamic grid of the linears' inputs; None leaves them alone.
      kv: dynamic grid of cached keys and values; None leaves them alone.
      k, v: grids of the keys and of the values where they differ from `kv`.
      learn_transform, learn_scale, learn_clip: what is fitted: P, c, clipping factors. What is not
        fitted is absent.
      form: parametrisation of P, "svd" or "direct".
      init: first P: "cayley" as the authors', "haar", "hadamard" or "identity".
      alpha: exponent of the first c; None starts from ones.
      factors: (site, (n1, n2)) where the balanced pair is not wanted; (1, n) is a full matrix.
      epochs: passes over the calibration text.
      lr, clip_lr: first learning rates of P and c, and of the clipping factors' logits.
      warmup: steps of linear growth before the cosine.
      weight_decay: of AdamW.
      shared_quantizer: one activation quantizer a site; False has one for each linear, as the
        authors' code, which then quantizes q's, k's and v's input separately.
      token_limit: a token whose update by the block has more than so many times the energy of the
        median token's counts for less in the loss, so that an attention sink does not decide it;
        None as published.
      dtype: of products in the fit, "float32" or "bfloat16"; parameters stay float32.
      finish: "round" the weights to codes within their learned ranges; or leave them to a later
        step, "clip"ped to those ranges or as they are ("keep").
      seed: of the random rotations.
      overrides: other widths at some sites or blocks.
    """

    weight: QuantSpec | None = QuantSpec(bits=4)
    act: QuantSpec | None = None
    kv: QuantSpec | None = None
    k: QuantSpec | None = None
    v: QuantSpec | None = None
    learn_transform: bool = True
    learn_scale: bool = True
    learn_clip: bool = True
    form: Form = "svd"
    init: Init = "cayley"
    alpha: float | None = 0.3
    factors: tuple[tuple[str, tuple[int, int]], ...] = ()
    epochs: int = 15
    lr: float = 5e-3
    clip_lr: float = 5e-2
    warmup: int = 0
    weight_decay: float = 0.01
    shared_quantizer: bool = True
    token_limit: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    finish: Finish = "round"
    seed: int = 0
    overrides: tuple[Override, ...] = ()
    needs_text: ClassVar[bool] = True

    def __post_init__(self):
        choices = {"form": Form, "init": Init, "finish": Finish}
        choices |= {"dtype": Literal["float32", "bfloat16"]}
        for name, kind in choices.items():
            if getattr(self, name) not in typing.get_args(kind):
                known = ", ".join(typing.get_args(kind))
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")
        for name in ("act", "kv", "k", "v"):
            spec = getattr(self, name)
            if spec is not None and not spec.dynamic:
                raise ValueError(f"{name}={spec} is static; FlatQuant clips ranges of every token")
            wanted = "token" if name == "act" else "head"
            if spec is not None and spec.granularity != wanted:
                raise ValueError(
                    f"{name}={spec} has no range of its own a {wanted}; use {wanted!r}"
                )
        if self.weight is not None and self.weight.granularity not in ("channel", "tensor"):
            raise ValueError(f"weight={self.weight} is a grid for activations; use 'channel'")
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} is below 1")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; the authors use 0.3")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError(
                f"warmup={self.warmup} and weight_decay={self.weight_decay} are 0 or more"
            )
        for name in ("lr", "clip_lr", "token_limit"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")

    @property
    def scheme(self) -> Scheme:
        """All grids."""
        k, v = self.k or self.kv, self.v or self.kv
        return Scheme(self.weight, self.act, k, v, self.overrides)

    def setting(self, block: Block, index: int, n_blocks: int) -> BlockSetting:
        """What is static about the fit of one block."""
        sites = (*anatomy(block).sites, "k_cache", "v_cache")
        grids = tuple((site, self.scheme.at(site, index, n_blocks)) for site in sites)
        return BlockSetting(grids, self.shared_quantizer, self.token_limit, self.dtype)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        self.scheme.check(len(model.blocks))
        if named := self.scheme.linears:
            raise ValueError(
                f"an override names {named[0]}; FlatQuant has one width for all linears at a site, "
                "give the site"
            )
        if self.weight is not None:
            check_grid(model, self.weight)
        for i, block in enumerate(map(block_struct, model.blocks)):
            for path in anatomy(block).linears:
                if isinstance(get_at(block, path).w, QTensor):
                    raise ValueError(
                        f"block {i}, {path} is quantized already; FlatQuant needs the weight as it "
                        "was, put it before the step that quantizes"
                    )
            for name, site in block.sites.items():
                if site.transforms:
                    raise ValueError(
                        f"block {i} has a transform at {name} already; transforms of two methods "
                        "do not go together, use one of them"
                    )
                if site.quantizer is not None:
                    raise ValueError(
                        f"block {i} has a quantizer at {name}, made for what passes there now; put "
                        "FlatQuant before the step that quantizes, or give it that grid itself"
                    )
            try:
                setting = self.setting(block, i, len(model.blocks))
                factor_shapes(block, setting, dict(self.factors))
            except ValueError as error:
                raise ValueError(f"block {i}, {error}") from None

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        if calib is not None:
            _check_windows(calib)
        visit = functools.partial(fit_block, self, len(model.blocks))
        return blockwise("FlatQuant", model, calib, visit, "original", run)

    def plan_block(self, block: Block, hidden: Any, batches: int, n_blocks: int) -> BlockPlan:
        """The programs of one block and what they make of it, for a dry run."""
        dense = jax.eval_shape(as_float32, block)
        setting = self.setting(block, 0, 1)
        states = jax.eval_shape(lambda: _magnitudes(self, block, setting))
        shapes = {site: s.amax for site, s in states.items()}
        init = functools.partial(_init, self, setting=setting, index=0)
        params = jax.eval_shape(lambda block, amax: init(block=block, amax=amax), dense, shapes)
        spec, steps = _spec(self, batches), self.epochs * batches
        state = jax.eval_shape(lambda p: fit_init(p, spec), params)
        kinds = dict(loss=block_loss, setting=setting, spec=spec)
        programs = [Program(block_step, (block, hidden), batches)]
        if states:
            update = dict(update=magnitude_update, stage="raw")
            programs.append(Program(capture_batch, (states, dense, hidden), batches, update))
        if any(params.values()):
            programs.append(Program(fit_step, (state, (dense, hidden, hidden)), steps, kinds))
        merged = dict(setting=setting, finish=self.finish)
        merging = Program(merge, (params, dense), 1, merged)
        programs.append(merging)
        result = jax.eval_shape(_restore_dtypes, merging.result()[0], block)
        return BlockPlan(programs, tree_bytes(dense), result)


def fit_block(cfg: FlatQuant, n_blocks: int, step: BlockStep) -> tuple[Block, Metrics]:
    """Fits one block's transforms to its own outputs and folds them in."""
    block, setting = as_float32(step.block), cfg.setting(step.block, step.index, n_blocks)
    amax = {}
    if init := _magnitudes(cfg, block, setting):
        states = capture(block, step.hidden, init, magnitude_update, "raw", step.place)
        amax = {site: state.amax for site, state in states.items()}
        check_finite(amax, f"the activations of block {step.index}, site")
    params = _init(cfg, block, setting, amax, step.index)
    mse = functools.partial(_mse, step, setting, block)
    numbers: dict[str, Any] = {"mse_rounding": mse(_nothing()), "mse_before": mse(params)}
    if any(params.values()):
        try:
            params, losses = run_fit(
                params,
                list(zip(step.hidden, step.outputs, strict=True)),
                (block,),
                loss=block_loss,
                setting=setting,
                spec=_spec(cfg, len(step.hidden)),
                place=step.place,
            )
        except ValueError as error:
            raise ValueError(
                f"FlatQuant, block {step.index}, {error}; finished blocks are kept. Fit in "
                f"float32, or with less than lr={cfg.lr:g} and clip_lr={cfg.clip_lr:g}"
            ) from None
        numbers["loss_curve"] = _curve(losses, len(step.hidden))
    numbers |= _check_params(params, step.index) | {"mse_after": mse(params)}
    for name, logits in params["act_clip"].items():
        low, high = jax.nn.sigmoid(logits)
        numbers |= {f"clip_low:{name}": float(low), f"clip_high:{name}": float(high)}
    flat, linears = merge(params, block, setting=setting, finish=cfg.finish)
    metrics: Metrics = {"": numbers}
    # A step that leaves the weights to another one has nothing to say about them.
    for path, site in anatomy(block).linears.items() if cfg.finish == "round" else ():
        grid = setting[site].weight
        metrics[path] = {k: float(v) for k, v in linears.get(path, {}).items()}
        metrics[path] |= {"bits": grid.bits} if grid else {"skipped": "no grid for it"}
    return _restore_dtypes(flat, step.block), metrics


def _init(
    cfg: FlatQuant, block: Block, setting: BlockSetting, amax: dict[str, Any], index: int
) -> Params:
    """All parameters of a block; `amax` gives the largest activations where scales need them."""
    params = _nothing()
    if cfg.learn_transform:
        shapes = factor_shapes(block, setting, dict(cfg.factors))
        key = jax.random.fold_in(jax.random.key(cfg.seed), index)
        params["transform"] = init_transforms(shapes, key, cfg.form, cfg.init)
    if cfg.learn_scale and setting.quantizes_linears:
        for site, channels in _scaled(block).items():
            params["scale"][site] = jnp.ones(channels)
            if cfg.alpha is not None:
                w_amax = consumer_amax(block, site)
                params["scale"][site] = flatquant_scale(amax[site], w_amax, cfg.alpha)
    if cfg.learn_clip:
        params["weight_clip"], params["act_clip"] = init_clips(block, setting)
    return params


def _nothing() -> Params:
    return {"transform": {}, "scale": {}, "weight_clip": {}, "act_clip": {}}


def _scaled(block: Block) -> dict[str, int]:
    """Sites that get a scale → channels."""
    parts = anatomy(block).sites
    return {s: channels(block, s) for s, part in parts.items() if s in SCALED and part.producer}


def _magnitudes(cfg: FlatQuant, block: Block, setting: BlockSetting) -> dict:
    """Statistics that the first scales need; none where there are no scales."""
    wanted = cfg.learn_scale and cfg.alpha is not None and setting.quantizes_linears
    return {s: magnitude_init(n) for s, n in _scaled(block).items()} if wanted else {}


def _spec(cfg: FlatQuant, batches: int) -> FitSpec:
    rates = {"transform": cfg.lr, "scale": cfg.lr, "weight_clip": cfg.clip_lr}
    rates |= {"act_clip": cfg.clip_lr}
    return FitSpec(cfg.epochs * batches, tuple(rates.items()), cfg.warmup, cfg.weight_decay)


def _mse(step: BlockStep, setting: BlockSetting, block: Block, params: Params) -> float:
    """The loss on the first batch."""
    x, y = (step.place.put(a) for a in (step.hidden[0], step.outputs[0]))
    return float(_jit_loss(*step.place.replicate((params, block)), x, y, setting=setting))


@functools.partial(jax.jit, static_argnames="setting")
def _jit_loss(params, block, x, y, setting):
    return block_loss(params, setting, block, x, y)


def _curve(losses: list[float], batches: int) -> list[float]:
    """The loss by epoch; with fewer than ten epochs, in `CURVE` equal stretches."""
    epochs = len(losses) // batches
    parts = min(CURVE, epochs if epochs >= 10 else len(losses))
    return [float(np.mean(part)) for part in np.array_split(losses, parts)]


def _check_params(params: Params, index: int) -> dict[str, float]:
    """Refuses what cannot be folded: the finished blocks stay on disk.

    Raises:
      ValueError: a scale is not positive, or a transform nearly singular or not finite.
    """
    what = f"FlatQuant, block {index}: the fitted parameters"
    for path, leaf in named_leaves(params).items():
        if not bool(jnp.isfinite(leaf).all()):
            raise ValueError(
                f"{what} at {path} are NaN or infinite; finished blocks are kept, continue with a "
                "smaller lr, in float32"
            )
    worst = 1.0
    for site, c in params["scale"].items():
        if not float(jnp.min(c)) > 0:
            bad = int(jnp.sum(~(c > 0)))
            raise ValueError(
                f"FlatQuant, block {index}, site {site}: {bad} scales came to 0 or below; "
                "finished blocks are kept, continue with a smaller lr"
            )
    for site, factors in params["transform"].items():
        for side, m in factors.items():
            found = 1.0 if m is None else float(condition(m))
            if not found < MAX_CONDITION:
                raise ValueError(
                    f"FlatQuant, block {index}, site {site}: the {side} factor has condition "
                    f"{found:.3g}, the limit is {MAX_CONDITION:g}; finished blocks are kept, "
                    "continue with a smaller lr"
                )
            worst = max(worst, found)
    return {"condition": worst} if params["transform"] else {}


def _check_windows(calib: Calibration) -> None:
    samples = len(calib.tokens)
    if samples < calib.batch:
        raise ValueError(
            f"{samples} calibration windows do not fill a batch of {calib.batch}; draw more "
            "windows, or set calib.batch lower"
        )
    if samples % calib.batch:
        log.warning("the last batch has %d of %d windows", samples % calib.batch, calib.batch)


def _restore_dtypes(block: Block, stored: Block) -> Block:
    """Dense weights, biases and norms in the dtypes they came in; codes and sites as fitted."""
    bare = dataclasses.replace(block, sites={})

    def restore(new: Any, old: Any) -> Any:
        return new if isinstance(new, QTensor) else new.astype(old.dtype)

    bare = jax.tree.map(
        restore,
        bare,
        dataclasses.replace(stored, sites={}),
        is_leaf=lambda x: isinstance(x, QTensor),
    )
    return dataclasses.replace(bare, sites=block.sites)
