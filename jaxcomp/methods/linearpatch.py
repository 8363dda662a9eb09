"""LinearPatch: a linear map at every cut of a layer-pruned model, from one dense pass.

With X_s before the blocks [s, e) that are gone and X_e behind them, x → x P at the cut:
    hadamard    P = H diag(c) Hᵀ,  c_k = mean |X_e H|_k / mean |X_s H|_k
    diag        the same with H = I
    scalar      P = α I,  α = mean ‖X_e‖ / ‖X_s‖ over tokens; folds: behind the cut the
                stream is α times smaller than it should be, and so is all that is added to it;
                norms see no difference
    lstsq       P = I + argmin_M ‖X_s M − (X_e − X_s)‖² + λ‖M‖², in closed form
    mlp_branch  the same for what the feed-forward unit before the cut adds, M ← M T, which folds
                into ffn.down
Scalar and mlp_branch leave a model that stock classes load; the others leave a patch, which runs in
its factors (rotate, scale, rotate back) or as one matrix, the form to fine-tune.

    Recipe((PruneBlocks(5), LinearPatch()))        the cuts of what was pruned before
    Recipe((LinearPatch(remove=5),))               chooses itself, as the paper: the likest span

A cut through the block that makes a massive activation is not repaired by any of them.

Source: Chen et al., LinearPatch, arXiv 2505.24680, and the authors' code: `reduction` is the
paper's by default and the code's on request, and a run of removed blocks gets one patch, where the
paper's appendix gives every block its own. Scalar follows Prune&Comp, 2507.18212; lstsq Ghosted
Layers, 2605.15491; mlp_branch ReplaceMe, 2505.02819. Departures: the ridge pulls towards the
identity and is measured by the median channel; scalar's α is a mean over tokens, which one massive
token cannot bend, and it folds behind the cut; scaling what stands before it, as the paper does,
takes the embedding too, and with it a head of its own where the two are tied.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.calibrate.cuts import Inputs, fit_cuts
from jaxcomp.calibrate.importance import Selection, choose_blocks, plan_rows, plan_selection
from jaxcomp.calibrate.patch_fit import (
    Fitting,
    Form,
    Kind,
    Reduction,
    Rotation,
    fit_patch,
    patch_like,
)
from jaxcomp.calibrate.plan import ModelPlan, Program, tree_bytes
from jaxcomp.calibrate.stream import (
    BlockStep,
    Calibration,
    Metrics,
    Result,
    Run,
    blockwise,
    check_one_process,
    check_text,
)
from jaxcomp.core.hadamard import hadamard_base, no_hadamard
from jaxcomp.core.metrics import Row
from jaxcomp.core.tree import get_at, replace_at
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.depth import DepthPlan, check_removed, cuts, drop, missing_at_end
from jaxcomp.models.fold import check_dense, check_scalable, scale_stream
from jaxcomp.models.patch import Patch, patch_matrix
from jaxcomp.models.stream import block_step

NAME = "LinearPatch"
CHOICE = "LinearPatch choice"  # the step's name in rows about what is removed


@dataclasses.dataclass(frozen=True)
class LinearPatch:
    """Settings. Without `remove` and `blocks` it patches the cuts of a model pruned before.

    Attributes:
      kind: of the map; see the top of the file.
      remove: how many blocks to choose and remove first.
      blocks: which blocks to remove first.
      reduction: of hadamard and diag, how windows come together.
      skip_first: leave the first token of a sequence out, where the map is found and where it is
        applied; not for what folds into weights.
      inputs: find the map on the original's states, or on what the pruned model has there.
      fold: fold scalar into the weights.
      form: of hadamard, diag and scalar: as factors, or one dense matrix.
      rotation: of hadamard: H of all channels, of "block"s of the largest power of two that divides
        them, or a random "orthogonal" matrix in its place.
      ridge: λ of lstsq and mlp_branch, in units of the median of the diagonal of XᵀX.
      eps: added to the magnitudes whose ratios hadamard and diag take.
      allow_first: patch a cut before all blocks, where the map acts on the embedding.
      metric, contiguous, protect, avoid_outliers, seed, windows: of the choice; see `Selection`.
    """

    kind: Kind = "hadamard"
    remove: int | None = None
    blocks: tuple[int, ...] = ()
    reduction: Reduction = "ratio_of_means"
    skip_first: bool = False
    inputs: Inputs = "original"
    fold: bool = True
    form: Form = "factors"
    rotation: Rotation = "hadamard"
    ridge: float = 1e-3
    eps: float = 0.0
    allow_first: bool = False
    metric: str = "block_cos"
    contiguous: bool = False
    protect: tuple[int, int] = (1, 1)
    avoid_outliers: bool = False
    seed: int = 0
    windows: int | None = None

    needs_text: typing.ClassVar[bool] = True

    def __post_init__(self):
        assert self.fitting  # refuses what means nothing
        if self.inputs not in typing.get_args(Inputs):
            known = ", ".join(typing.get_args(Inputs))
            raise ValueError(f"inputs={self.inputs!r} is none of {known}")
        if self.remove is not None and self.blocks:
            raise ValueError(f"remove={self.remove} and blocks={self.blocks}: give one of them")
        if self.folds and self.skip_first:
            raise ValueError(
                f"skip_first=True, and kind={self.kind!r} folds into weights, which see all tokens"
                + ("; keep it as a patch with fold=False" if self.kind == "scalar" else "")
            )
        if self.remove is not None:
            assert self.selection

    @property
    def folds(self) -> bool:
        """Whether the map ends in the weights and leaves no patch."""
        return self.kind == "mlp_branch" or (self.kind == "scalar" and self.fold)

    @property
    def fitting(self) -> Fitting:
        """How a map is found."""
        names = (f.name for f in dataclasses.fields(Fitting))
        return Fitting(**{name: getattr(self, name) for name in names})

    @property
    def selection(self) -> Selection:
        """How blocks are chosen."""
        names = (f.name for f in dataclasses.fields(Selection))
        return Selection(**{name: getattr(self, name) for name in names})

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        rows: list[Row] = []
        if self.remove is None and not self.blocks:
            original = run.needs_original(NAME)
            if not cuts(model, original):
                raise ValueError(
                    "nothing is missing between the original and the model; prune in the same "
                    "recipe, or hand in the dense model with Run(original=…)"
                )
        else:
            original, plan, warnings = model, self._by_hand(len(model.blocks)), ()
            if self.remove is not None:
                plan, warnings = choose_blocks(NAME, model, calib, self.selection, run)
            model, rows = drop(model, plan.removed), plan_rows(CHOICE, plan, warnings)
            self._check_cuts(model, original)
        patches, found = self._fits(model, original, calib, run)
        put = functools.partial(put_patch, self, patches, found)
        inner = dataclasses.replace(run, store=run.store and run.store.part("put"))
        result = blockwise(NAME, model, None, put, None, inner)
        rows, model = [*rows, *result.rows], result.model
        if self.folds:
            model = model.replace(stream=self.stream_scales(patches, len(model.blocks)))
        if behind := missing_at_end(model, original):
            why = (
                f"blocks {behind.start} to {behind.stop - 1} are removed at the very end, where no "
                "block is left to carry a patch"
            )
            rows.append(Row(NAME, None, None, {"warning 1": why}))
        return Result(model, rows)

    def stream_scales(self, patches: dict[int, Patch], n_blocks: int) -> tuple[float, ...]:
        """What `Decoder.stream` says of the model whose cuts these maps mend."""
        if self.kind != "scalar":
            return (1.0,) * n_blocks
        before = [
            [float(p.transforms[0].scale[0]) for at, p in patches.items() if at <= i]
            for i in range(n_blocks)
        ]
        return tuple(1 / math.prod(factors) for factors in before)

    def _fits(
        self, model: Decoder, original: Decoder, calib: Calibration | None, run: Run
    ) -> tuple[dict[int, Patch], dict[int, dict[str, Any]]]:
        """The maps and what was measured, both by the block behind the cut; kept in the store."""
        check_text(NAME, calib)
        check_one_process(NAME, run.place)
        found: dict[int, dict[str, Any]] = {}

        def fit() -> dict[str, Patch]:
            told = run.progress or (lambda *args: None)
            last = max(end for _, end in cuts(model, original).values())
            tick = lambda done: told(NAME, done, last, [])  # noqa: E731
            tick(0)
            fitted = functools.partial(fit_patch, self.fitting, found)
            how = self.inputs, self.kind == "mlp_branch", run.place, tick
            patches = fit_cuts(model, original, calib, fitted, *how)
            if run.store:  # written before the maps, so it is there when they are
                run.store.keep("cuts", lambda: {str(i): numbers for i, numbers in found.items()})
            return {str(block): patch for block, patch in patches.items()}

        patches = run.store.keep_tree("patches", fit) if run.store else fit()
        if run.store:
            found = {int(i): numbers for i, numbers in run.store.keep("cuts", dict).items()}
        return {int(i): patch for i, patch in patches.items()}, found

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        if self.remove is not None:
            self.selection.check(model)
        elif self.blocks:
            self._check_cuts(drop(model, self.blocks), model)
        else:
            self._check_cuts(model)
        if self.kind == "hadamard" and self.rotation == "hadamard":
            width = model.config.d_model
            if hadamard_base(width) is None:
                ways = "rotation='block', rotation='orthogonal' or another kind"
                raise ValueError(f"d_model={width}: {no_hadamard(width, ways)}")
        if model.stream is not None:
            raise ValueError("the maps of cuts are folded into the model already; patch it once")
        first = self._first_cut(model)
        for i, block in enumerate(map(block_struct, model.blocks)):
            if block.patch is not None:
                raise ValueError(f"block {i} carries a patch already; patch a model once")
            try:
                if i >= first:
                    self._check_folding(block)
            except ValueError as error:
                raise ValueError(f"block {i}, {error}") from None
        if self.kind == "scalar" and self.folds and model.norm is None:
            raise ValueError(
                "anatomy: no norm stands before the head to take the scale back; use fold=False"
            )

    def _check_cuts(self, model: Decoder, original: Decoder | None = None) -> None:
        there = cuts(model, original)
        if not there:
            raise ValueError(
                "the model has no cut with a block behind it; remove blocks before the last first, "
                "with PruneBlocks, or here with `remove` or `blocks`"
            )
        if 0 in there and (self.kind == "mlp_branch" or not self.allow_first):
            raise ValueError(
                "the first block is removed, and the map would act on the embedding; "
                + (
                    "kind='mlp_branch' has no unit there"
                    if self.kind == "mlp_branch"
                    else "allow it with allow_first=True"
                )
            )

    def _first_cut(self, model: Decoder) -> int:
        """No block before it is changed, whatever is chosen."""
        first = self.protect[0] if self.remove is not None else min(self.blocks or cuts(model))
        return first - (self.kind == "mlp_branch")

    def _check_folding(self, block: Block) -> None:
        if self.kind == "scalar" and self.folds:
            check_scalable(block)
        if self.kind != "mlp_branch":
            return
        if block.ffn_post_norm is not None:
            raise ValueError(
                "anatomy: a norm stands between ffn.down and the residual stream, so no map of "
                "what the unit adds folds; use another kind"
            )
        for path in anatomy(block)["ffn_mid"].consumers:
            check_dense(get_at(block, path), path)

    def plan_model(self, model: Decoder, hidden: Any, batches: int) -> ModelPlan:
        """The programs of the choice and the dense pass, and the patched structure."""
        programs, kept, pruned = [], 0, model
        if self.remove is not None:
            programs, kept, pruned = plan_selection(model, hidden, batches, self.selection)
        elif self.blocks:
            pruned = drop(model, self.blocks)
        block = block_struct(model.blocks[0])
        walks = len(pruned.blocks) if self.inputs == "compressed" else 0
        passes = (max(pruned.kept) + walks) * batches
        programs = [*programs, Program(block_step, (block, hidden), passes)]
        patch = jax.eval_shape(lambda: patch_like(self.fitting, model.config.d_model))
        blocks = [block_struct(b) for b in pruned.blocks]
        missing = cuts(pruned, None if pruned is model else model)
        for i in missing if not self.folds else ():
            blocks[i] = blocks[i].replace(patch=patch)
        result = pruned.replace(blocks=tuple(blocks))
        return ModelPlan(programs, kept + 2 * batches * tree_bytes(hidden), result)

    def found(self, rows: Iterable[Row]) -> "LinearPatch":
        """The same with the blocks that were chosen, from the rows of a run."""
        if self.remove is None:
            return self
        gone = (r.block for r in rows if r.step == CHOICE and r.metrics.get("removed") == 1)
        return dataclasses.replace(self, remove=None, blocks=tuple(gone))

    def _by_hand(self, n_blocks: int) -> DepthPlan:
        return DepthPlan(n_blocks, check_removed(self.blocks, n_blocks))


def put_patch(
    cfg: LinearPatch,
    patches: dict[int, Patch],
    found: dict[int, dict[str, Any]],
    step: BlockStep,
) -> tuple[Block, Metrics]:
    """The block with its patch, or with its share of what folds."""
    block, i = step.block, step.index
    metrics: Metrics = {"": found.get(i, {})}
    if cfg.kind == "scalar" and cfg.folds:
        scale = cfg.stream_scales(patches, i + 1)[i]
        return (block if scale == 1 else scale_stream(block, scale)), metrics
    if cfg.kind == "mlp_branch":
        if (after := patches.get(i + 1)) is None:
            return block, metrics
        writers = {path: get_at(block, path) for path in anatomy(block)["ffn_mid"].consumers}
        for path, p in writers.items():
            t = patch_matrix(after, p.w.shape[-1])
            mapped = lambda a, t=t: (jnp.asarray(a, jnp.float32) @ t).astype(a.dtype)  # noqa: E731
            block = replace_at(block, path, jax.tree.map(mapped, p))
        return block, metrics
    patch = patches.get(i)
    return (block if patch is None else block.replace(patch=patch)), metrics
