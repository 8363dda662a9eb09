"""FlatQuant W4A4KV4 of Llama-3-8B; settings of the authors' script (arXiv 2410.09426).

Run: jaxcomp compress DIR configs/llama3_8b_flatquant_w4a4kv4.py --out OUT
Needs: one accelerator of 40 GB or more.
Paper: perplexity 6.98 on WikiText-2, 11.13 on C4 (dense 6.14, 9.45); 0.9 hours on one GPU.
Ours: not run yet.
"""

from jaxcomp import CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    int4 = QuantSpec(bits=4)
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            FlatQuant(
                weight=int4, act=act, kv=kv, epochs=15, lr=5e-3, clip_lr=5e-2, dtype="bfloat16"
            ),
        ),
        calib=CalibSpec("wikitext2", samples=128, length=2048, batch=4),
        evals=(Perplexity("wikitext2", context=2048), Perplexity("c4", context=2048)),
    )
