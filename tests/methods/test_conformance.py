"""What every method in METHODS promises on every family; a new method is tested by being there.

A method needs a line in CASES; the only way to be excused from a family is a line in REFUSALS. A
method that changes the model without quantizing is followed in its cases by one that quantizes, and
has lines in TRANSFORMS too; one that changes more than blocks says what in REWRITES. A method that
removes a block is in DEPTH: its model has a third block, in the middle, that does nothing.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration, Result, Run, StepStore
from jaxcomp.calibrate.descent import Descent
from jaxcomp.calibrate.losses import TopKLoss
from jaxcomp.calibrate.mask_search import MaskSearch
from jaxcomp.calibrate.plan import check_steps
from jaxcomp.calibrate.trainable import Trainable
from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.store import save_tree
from jaxcomp.core.tree import get_at, named_leaves, replace_many
from jaxcomp.methods import GPTQ, METHODS, RTN, AutoBits
from jaxcomp.methods.e3pruner import Recovery
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import forward, iter_blocks, load_block, map_blocks
from jaxcomp.models.families import FAMILIES
from tests import tiny

Q8 = QuantSpec(8, granularity="token", dynamic=True)
KV8 = QuantSpec(8, granularity="head", symmetric=False, dynamic=True)
STATIC8 = QuantSpec(8, granularity="tensor", symmetric=False)
EVERY_SITE = ("attn_in", "attn_out", "ffn_in", "ffn_mid")
INSIDE = ("attn_out", "ffn_mid")
K8 = QuantSpec(8, granularity="channel", symmetric=False)

# method → setting → bits → the method, or a tuple of steps in order. Every setting quantizes the
# weights of all blocks.
CASES = {
    "RTN": {
        "per-channel": lambda m, bits: m(weight=QuantSpec(bits)),
        "per-tensor asym": lambda m, bits: m(
            weight=QuantSpec(bits, granularity="tensor", symmetric=False)
        ),
        "grouped clip": lambda m, bits: m(weight=QuantSpec(bits, group_size=8), clip=True),
        "with activations and cache": lambda m, bits: m(
            weight=QuantSpec(bits, group_size=16, symmetric=False),
            act=Q8,
            kv=KV8,
        ),
        "with static ranges": lambda m, bits: m(
            weight=QuantSpec(bits), act=STATIC8, k=K8, v=KV8, act_clip=0.99
        ),
    },
    "GPTQ": {
        "per-channel act-order": lambda m, bits: m(weight=QuantSpec(bits)),
        "grouped asym in order": lambda m, bits: m(
            weight=QuantSpec(bits, group_size=16, symmetric=False),
            act_order=False,
            sequential=False,
        ),
        "per-tensor clip": lambda m, bits: m(
            weight=QuantSpec(bits, granularity="tensor"), clip="output"
        ),
        "for quantized activations": lambda m, bits: (
            RTN(weight=None, act=Q8, kv=KV8),
            m(weight=QuantSpec(bits), quantized_activations=True),
        ),
    },
    "QuaRot": {
        "then RTN": lambda m, bits: (m(), RTN(QuantSpec(bits), act=Q8, kv=KV8)),
        "orthogonal, then GPTQ": lambda m, bits: (
            m(head_mix="orthogonal", rotation="orthogonal"),
            GPTQ(QuantSpec(bits)),
            RTN(weight=None, act=Q8, kv=KV8),
        ),
        "all but the stream, then RTN": lambda m, bits: (m(residual=False), RTN(QuantSpec(bits))),
    },
    "SmoothQuant": {
        "then RTN": lambda m, bits: (m(), RTN(QuantSpec(bits), act=Q8, kv=KV8)),
        "inside the units, then RTN": lambda m, bits: (m(0.5, INSIDE), RTN(QuantSpec(bits))),
        "everywhere, then GPTQ": lambda m, bits: (m(0.85, EVERY_SITE), GPTQ(QuantSpec(bits))),
    },
    "FlatQuant": {
        "round": lambda m, bits: m(QuantSpec(bits), act=Q8, kv=KV8, epochs=2, init="hadamard"),
        "direct, one quantizer a linear": lambda m, bits: m(
            QuantSpec(bits, group_size=16, symmetric=False),
            act=Q8,
            epochs=2,
            form="direct",
            shared_quantizer=False,
        ),
        "keep, then GPTQ": lambda m, bits: (
            m(QuantSpec(bits), act=Q8, kv=KV8, epochs=2, finish="keep"),
            GPTQ(QuantSpec(bits)),
        ),
    },
    "AWQ": {
        "grouped asym": lambda m, bits: m(
            weight=QuantSpec(bits, group_size=16, symmetric=False), grid=5
        ),
        "per-channel without clip": lambda m, bits: m(weight=QuantSpec(bits), clip=False),
        "clip alone, then activations": lambda m, bits: (
            m(weight=QuantSpec(bits, granularity="tensor"), scale=False),
            RTN(weight=None, act=Q8, kv=KV8),
        ),
    },
}
CASES |= {
    "Sensitivity": {
        "by linear, then RTN": lambda m, bits: (m(QuantSpec(bits)), RTN(QuantSpec(bits))),
        "by site, then GPTQ": lambda m, bits: (
            m(QuantSpec(bits, group_size=16, symmetric=False), bits=(2, bits), by="site"),
            GPTQ(QuantSpec(bits)),
        ),
        "by block, then RTN": lambda m, bits: (m(by="block"), RTN(QuantSpec(bits))),
    },
    # One width to choose from: every weight must then have it.
    "AutoBits": {
        "by site": lambda m, bits: m(RTN(QuantSpec(bits)), bits + 2.0, bits=(bits,)),
        "by linear, for GPTQ": lambda m, bits: m(
            GPTQ(QuantSpec(bits, group_size=16)), bits + 2.0, bits=(bits,), by="linear"
        ),
    },
}
CASES |= {
    "PruneBlocks": {
        "by influence, then RTN": lambda m, bits: (m(1), RTN(QuantSpec(bits), act=Q8, kv=KV8)),
        "one by one, then GPTQ": lambda m, bits: (m(1, "sleb"), GPTQ(QuantSpec(bits))),
    },
    "MergeBlocks": {
        "last, then RTN": lambda m, bits: (
            m("last", 1, alpha=1.0, protect=(0, 1)),
            RTN(QuantSpec(bits), act=Q8, kv=KV8),
        ),
    },
    "LinearPatch": {
        "hadamard, then RTN": lambda m, bits: (m(remove=1), RTN(QuantSpec(bits), act=Q8, kv=KV8)),
        "scalar, then GPTQ": lambda m, bits: (m("scalar", blocks=(1,)), GPTQ(QuantSpec(bits))),
        "dense, then GPTQ": lambda m, bits: (
            m(remove=1, form="dense", inputs="compressed"),
            GPTQ(QuantSpec(bits)),
        ),
    },
}
# The original is the model itself: what it says is learned already, and little may change.
LESSON = Descent(batch=2, lr=1e-5, validation=2, every=2)
RELEARN = Recovery(Trainable("blocks"), fit=LESSON)
CASES |= {
    "Distill": {
        "additions, then RTN": lambda m, bits: (
            m(Trainable("lora", rank=2), fit=LESSON, k=8),
            RTN(QuantSpec(bits), act=Q8, kv=KV8),
        ),
        "blocks, then GPTQ": lambda m, bits: (
            m(Trainable("blocks"), TopKLoss("renorm", "up"), LESSON, k=8),
            GPTQ(QuantSpec(bits)),
        ),
        "norms of the last block, after its weights are rounded": lambda m, bits: (
            RTN(QuantSpec(bits)),
            m(Trainable("norms", blocks=(1,)), TopKLoss(text=0.1), LESSON, k=8),
        ),
    },
}
HUNT = MaskSearch(steps=6, batch=2, lr=0.3, init_windows=4, validation=2, every=3, dtype="float32")
CASES |= {
    "E3Pruner": {
        "both stages, then RTN": lambda m, bits: (
            m(1, search=HUNT, recover=RELEARN, k=8, protect=(0, 0)),
            RTN(QuantSpec(bits), act=Q8, kv=KV8),
        ),
        "the search alone, then GPTQ": lambda m, bits: (
            m(1, search=HUNT, recover=None, k=8, protect=(0, 0)),
            GPTQ(QuantSpec(bits)),
        ),
    },
}
CASES |= {
    "FuseGPT": {
        "then RTN": lambda m, bits: (
            m(1, rank=4, lora_rank=4, batch=4, epochs=2),
            RTN(QuantSpec(bits), act=Q8, kv=KV8),
        ),
        "LoRA alone, then GPTQ": lambda m, bits: (
            m(1, control="lora", lora_rank=4, batch=4, epochs=2),
            GPTQ(QuantSpec(bits)),
        ),
    },
}
# method → setting → the method with all quantization off: the model computes what it did.
TRANSFORMS = {
    "QuaRot": {
        "hadamard": lambda m: m(),
        "orthogonal": lambda m: m(head_mix="orthogonal", rotation="orthogonal", seed=1),
        "cache alone": lambda m: m(residual=False, values=False, ffn=False, head_mix="none"),
        "stream alone": lambda m: m(values=False, keys=False, ffn=False, head_mix="none"),
        "all but the stream": lambda m: m(residual=False),
    },
    "SmoothQuant": {
        "everywhere": lambda m: m(sites=EVERY_SITE),
        "inside the units": lambda m: m(sites=INSIDE),
    },
    "Sensitivity": {"by site": lambda m: m(by="site")},
    "PruneBlocks": {
        "by angle": lambda m: m(1, "angular"),
        "by hand": lambda m: m(blocks=(1,)),
    },
    "LinearPatch": {
        kind: lambda m, kind=kind: m(kind, remove=1)
        for kind in ("hadamard", "diag", "scalar", "lstsq", "mlp_branch")
    },
    "MergeBlocks": {"last, all of the former": lambda m: m("last", 1, alpha=1.0, protect=(0, 1))},
    "E3Pruner": {"alone": lambda m: m(1, search=HUNT, recover=None, protect=(0, 0))},
    "FuseGPT": {
        kind: lambda m, kind=kind: m(
            1, coefficient=kind, rank=4, lora_rank=4, batch=4, epochs=1, group_size=3
        )
        for kind in ("low_rank", "row", "full")
    },
}
# Methods whose cases remove one block, and the steps whose rows are about what they were given.
DEPTH = ("PruneBlocks", "MergeBlocks", "LinearPatch", "E3Pruner", "FuseGPT")
BEFORE = ("PruneBlocks", "MergeBlocks", "LinearPatch choice", "E3Pruner choice", "FuseGPT")
# Methods that train the whole model at once.
WHOLE = ("Distill",)
# method → the parts of the model outside the blocks that it changes, in function-preserving ways.
REWRITES = {"QuaRot": ("embed", "norm", "lm_head")}
# (method/setting, family) → why the anatomy of the family does not allow it.
REFUSALS: dict[tuple[str, str], str] = {
    (f"QuaRot/{setting}", family): "a norm stands between a unit and the residual stream"
    for setting in ("then RTN", "orthogonal, then GPTQ", "hadamard", "orthogonal", "stream alone")
    for family in ("gemma3_text", "olmo2")
} | {
    (f"SmoothQuant/{setting}", "olmo2"): "no norm stands before a unit to absorb a scale"
    for setting in ("then RTN", "everywhere, then GPTQ", "everywhere")
}
REFUSALS |= {
    ("LinearPatch/mlp_branch", family): "a norm stands between a unit and the residual stream"
    for family in ("gemma3_text", "olmo2")
}

# Tied with biases; windowed with a wide head; norms on queries and keys. The rest is slow.
CI_FAMILIES = ("qwen2", "mistral", "qwen3")
FITS = ("FlatQuant", "Distill", "E3Pruner", "FuseGPT", "AutoBits")  # on the first of them alone
CI_CASES = (
    "RTN/per-channel",
    "RTN/with activations and cache",
    "GPTQ/per-channel act-order",
    "QuaRot/then RTN",
    "SmoothQuant/then RTN",
    "FlatQuant/round",
    "AWQ/grouped asym",
    "Sensitivity/by linear, then RTN",
    "AutoBits/by site",
    "Distill/additions, then RTN",
    "PruneBlocks/by influence, then RTN",
    "MergeBlocks/last, then RTN",
    "LinearPatch/hadamard, then RTN",
    "E3Pruner/both stages, then RTN",
    "FuseGPT/then RTN",
)
GRID = [
    pytest.param(
        family,
        method,
        setting,
        id=f"{family}-{method}-{setting}",
        marks=()
        if family in (CI_FAMILIES[:1] if method in FITS else CI_FAMILIES)
        and f"{method}/{setting}" in CI_CASES
        else pytest.mark.slow,
    )
    for family in FAMILIES
    for method, settings in CASES.items()
    for setting in settings
]
everywhere = pytest.mark.parametrize(("family", "method", "setting"), GRID)
once = pytest.mark.parametrize(
    ("family", "method", "setting"),
    [("qwen2", name, next(iter(settings))) for name, settings in CASES.items()],
)


@pytest.fixture(scope="module")
def calib():
    return Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 16)), batch=4)


def make(method, setting, bits):
    """The steps of a case."""
    steps = CASES[method][setting](METHODS[method], bits)
    return steps if isinstance(steps, tuple) else (steps,)


def inner(step):
    """The method that a method calls after its own walk over the blocks, if it has one."""
    return (step.method,) if isinstance(step, AutoBits) else ()


def model_of(family, method=None):
    """All families with heads of 16 channels, so that they share the compilations of solvers."""
    if method not in DEPTH:
        return tiny.model(family, jax.random.key(0), head_dim=16)
    model = tiny.model(family, jax.random.key(0), head_dim=16, num_hidden_layers=3)
    idle = {
        path: jnp.zeros_like(get_at(model.blocks[1], path)) for path in ("attn.o.w", "ffn.down.w")
    }
    return model.replace(
        blocks=(model.blocks[0], replace_many(model.blocks[1], idle), model.blocks[2])
    )


def apply(steps, model, calib, store=None, progress=None):
    """The result of all steps, with the rows of all."""
    rows, original = [], model
    for i, step in enumerate(steps):
        run = Run(StepStore(store / f"{i}") if store else None, progress, original=original)
        step.check(model)
        model, new = step(model, calib, run)
        rows += new
    return Result(model, rows)


def compress(family, method, setting, bits, calib):
    """The result of a case on a family."""
    steps, model = make(method, setting, bits), model_of(family, method)
    return unless_refused(method, setting, family, lambda: apply(steps, model, calib))


def unless_refused(method, setting, family, run):
    """What `run` gives, or a skip where REFUSALS excuses the setting, which then must refuse."""
    reason = REFUSALS.get((f"{method}/{setting}", family))
    try:
        result = run()
    except ValueError as refusal:
        if reason is None:
            raise
        assert "anatomy" in str(refusal)
        pytest.skip(reason)
    assert reason is None, "a refusal is listed and does not happen"
    return result


def hashes(tree):
    return {
        name: hashlib.sha256(np.asarray(x).tobytes() + str((x.shape, x.dtype)).encode()).hexdigest()
        for name, x in named_leaves(tree).items()
    }


def in_memory(model):
    return model.replace(blocks=tuple(iter_blocks(model)))


def linears(block):
    """Paths of the linears of a block, found by walking it."""
    is_linear = lambda x: isinstance(x, Linear)  # noqa: E731
    return {k for k, x in named_leaves(block, is_leaf=is_linear).items() if is_linear(x)}


def test_every_method_has_cases_and_every_case_and_refusal_a_method():
    assert CASES.keys() == METHODS.keys()
    assert TRANSFORMS.keys() | REWRITES.keys() <= METHODS.keys()
    settings = {f"{m}/{s}" for table in (CASES, TRANSFORMS) for m in table for s in table[m]}
    assert {setting for setting, _ in REFUSALS} <= settings
    assert {family for _, family in REFUSALS} <= FAMILIES.keys()
    assert set(CI_CASES) <= {f"{m}/{s}" for m, settings in CASES.items() for s in settings}
    assert {c.split("/")[0] for c in CI_CASES} == METHODS.keys()  # none is left to slow runs alone


@everywhere
def test_more_bits_come_closer_to_the_original_and_eight_come_close(family, method, setting, calib):
    tokens = tiny.tokens(jax.random.key(2))
    expected, errors = forward(model_of(family, method), tokens), {}
    for bits in (8, 4, 2):
        result = compress(family, method, setting, bits, calib)
        difference = forward(result.model, tokens) - expected
        errors[bits] = float(jnp.sum(difference**2) / jnp.sum(expected**2))
        check_weights(result, bits)
        check_rest(result.model, model_of(family, method), REWRITES.get(method, ()))
    # 8-bit steps are about 1 % of a weight; a range fixed on 128 tokens cuts some later ones.
    assert errors[8] < (1e-2 if "static" in setting else 3e-3)
    assert errors[8] < errors[4] < errors[2]


def check_weights(result, bits):
    """Every weight of the blocks is quantized as asked and has its row, or a row says why not."""
    rows = {(row.block, row.linear): row for row in result.rows if row.linear}
    assert len(rows) == sum(row.linear is not None for row in result.rows)  # one step quantizes it
    for i, block in enumerate(result.model.blocks):
        paths = linears(block)
        assert paths == set(anatomy(block).linears)
        assert {path for b, path in rows if b == i} == paths
        for path in paths:
            row, w = rows[i, path], get_at(block, path).w
            if "skipped" in row.metrics:
                assert row.metrics["skipped"] and not isinstance(w, QTensor)
                continue
            assert isinstance(w, QTensor) and w.bits == bits == row.metrics["bits"]
            assert all(np.isfinite(v) for v in row.metrics.values() if isinstance(v, float))
    for step in {row.step for row in result.rows}:
        rows = [row for row in result.rows if row.step == step and row.linear is None]
        given = len(result.model.blocks) + (step in BEFORE)
        assert [row.block for row in rows if row.block is not None] == list(range(given))


def check_rest(model, original, rewritten):
    """Embedding, final norm and head are as they were, or keep their dtype; so do the facts."""
    for name in ("embed", "norm", "lm_head"):
        old, new = getattr(original, name), getattr(model, name)
        if name in rewritten:
            dtypes = {x.dtype for x in jax.tree.leaves(new)}
            assert dtypes <= {x.dtype for x in jax.tree.leaves((old, original.embed))}
        else:
            assert hashes(new) == hashes(old)
    assert model.config == original.config


@once
def test_the_same_input_gives_the_same_bits_and_is_left_alone(family, method, setting, calib):
    model = model_of(family, method)
    before, tokens = hashes(model), calib.tokens.copy()
    first, second = (apply(make(method, setting, 4), model, calib) for _ in range(2))
    assert hashes(first.model) == hashes(second.model)
    assert [r.metrics for r in first.rows] == [r.metrics for r in second.rows]
    assert hashes(model) == before and np.array_equal(calib.tokens, tokens)


@once
def test_blocks_behind_handles_give_what_blocks_in_memory_give(
    family, method, setting, calib, tmp_path
):
    model = model_of(family, method)
    stored = map_blocks(
        model, lambda _, block: block, lambda i, block: save_tree(tmp_path / f"{i}", block)
    )
    expected = apply(make(method, setting, 4), model, calib)
    found = apply(make(method, setting, 4), stored, calib, tmp_path / "work")
    assert hashes(in_memory(found.model)) == hashes(expected.model)
    assert [r.metrics for r in found.rows] == [r.metrics for r in expected.rows]
    assert not any(block is load_block(block) for block in found.model.blocks)


@once
def test_what_is_not_quantized_keeps_its_stored_dtype(family, method, setting, calib):
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model_of(family, method))
    before = named_leaves(model)
    after = named_leaves(apply(make(method, setting, 4), model, calib).model)
    kept = before.keys() & after.keys()
    assert "blocks.1.ffn_norm.weight" in kept and "blocks.0.attn.q.b" in kept
    assert {after[name].dtype for name in kept} == {jnp.dtype(jnp.bfloat16)}


@once
def test_the_structure_that_a_method_gives_is_known_before_it_runs(family, method, setting, calib):
    model, steps = model_of(family, method), make(method, setting, 4)
    found, expected = check_steps(model, steps, calib), apply(steps, model, calib).model
    shapes = lambda block: jax.tree.map(lambda a: (a.shape, a.dtype), block)  # noqa: E731
    assert [*map(shapes, found.blocks)] == [*map(shapes, iter_blocks(expected))]


@once
def test_progress_is_told_after_every_block(family, method, setting, calib):
    told, steps = [], make(method, setting, 4)
    progress = lambda step, done, total, rows: told.append((step, done, total))  # noqa: E731
    apply(steps, model_of(family, method), calib, progress=progress)
    names = [type(part).__name__ for step in steps for part in (step, *inner(step))]
    assert list(dict.fromkeys(name for name, _, _ in told)) == names
    for name in names:
        seen = [(done, total) for step, done, total in told if step == name]
        if name not in (*DEPTH, *WHOLE):
            assert seen == [(done, 2) for done in range(3)]
        while seen:  # of such a method: each of its walks over blocks, text or steps
            total = seen[0][1]
            assert seen[: total + 1] == [(done, total) for done in range(total + 1)]
            seen = seen[total + 1 :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "setting"), [(m, s) for m, settings in TRANSFORMS.items() for s in settings]
)
def test_with_quantization_off_the_model_computes_what_it_did(method, setting, family, calib):
    model = model_of(family, method) if method in DEPTH else tiny.model(family, jax.random.key(0))
    tokens = tiny.tokens(jax.random.key(2))
    step = TRANSFORMS[method][setting](METHODS[method])
    result = unless_refused(method, setting, family, lambda: step(model, calib))
    found, expected = forward(result.model, tokens), forward(model, tokens)
    spread = float(jnp.max(expected) - jnp.min(expected))
    np.testing.assert_allclose(found, expected, atol=1e-4 * spread, rtol=0)
