"""FlatQuant's ablation, part by part: learned transforms, per-channel scales, learned clipping.

SmolLM2-135M at W4A4KV4; the paper does the same on LLaMA-3-8B (arXiv 2410.09426, Table 3), where
the learned transforms make nearly all the difference, and scales or clipping alone none.

The fit is short, 8 steps of 1,024 tokens a block; more windows are more steps. Here too the learned
transforms do most: 10,536 without any part, 108.7 with them alone, where scales alone reach 3,817
and clipping alone 3,946. But with them the other parts matter as well: 91.40 with clipping, 56.57
with scales, 44.25 with both (2026-11-25, 2 CPU cores, jax 0.10.2; dense 20.12).

Run: jaxcomp study configs/studies/flatquant_ablation.py --out OUT
More: jaxcomp study configs/studies/flatquant_ablation.py --out OUT calib.samples=80
"""

import itertools

from jaxcomp import CalibSpec, Perplexity, QuantSpec, Recipe, Study, StudyRow
from jaxcomp.methods import FlatQuant

PARTS = ("LT", "PS", "LCT")  # as the paper calls them


def study() -> Study:
    return Study(
        model="demo:smollm2",
        title="FlatQuant part by part: SmolLM2-135M at W4A4KV4",
        rows=tuple(row(*on) for on in itertools.product((False, True), repeat=3)),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
        show=("perplexity",),
    )


def row(transform: bool, scale: bool, clip: bool) -> StudyRow:
    method = FlatQuant(
        weight=QuantSpec(bits=4),
        act=QuantSpec(bits=4, granularity="token", dynamic=True),
        kv=QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True),
        learn_transform=transform,
        learn_scale=scale,
        learn_clip=clip,
        init="hadamard",
        epochs=1,
        lr=4e-2,
        clip_lr=0.4,
        token_limit=10.0,
    )
    on = dict(zip(PARTS, (transform, scale, clip), strict=True))
    return StudyRow(
        name=" + ".join(part for part in PARTS if on[part]) or "none",
        recipe=Recipe((method,), CalibSpec("wiki_calib", samples=8, length=1024, batch=1)),
        labels={part: "✓" if on[part] else "–" for part in PARTS},
        group="transforms learned" if transform else "no transforms",
    )
