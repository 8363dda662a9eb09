"""FlatQuant W4A4KV4 of Qwen2.5-7B-Instruct; the authors fit it in float32 by direct inversion
(arXiv 2410.09426).

Run: jaxcomp compress DIR configs/qwen2_5_7b_flatquant_w4a4kv4.py --out OUT
Needs: one accelerator of 40 GB or more.
Paper: perplexity 8.46 on WikiText-2, 13.94 on C4 (dense 8.36, 14.37).
Ours: not run yet.
"""

from jaxcomp import CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    int4 = QuantSpec(bits=4)
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            FlatQuant(weight=int4, act=act, kv=kv, epochs=15, lr=5e-3, clip_lr=5e-2, form="direct"),
        ),
        calib=CalibSpec("wikitext2", samples=128, length=2048, batch=4),
        evals=(Perplexity("wikitext2", context=2048), Perplexity("c4", context=2048)),
    )
