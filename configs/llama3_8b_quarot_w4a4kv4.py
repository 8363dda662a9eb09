"""QuaRot W4A4KV4 of Llama-3-8B with GPTQ, as FlatQuant's paper compares it (arXiv 2410.09426).

Run: jaxcomp compress DIR configs/llama3_8b_quarot_w4a4kv4.py --out OUT
Needs: one accelerator of 40 GB or more.
Paper: perplexity 8.16 on WikiText-2, 13.38 on C4 (with RTN 10.60, 17.19).
Ours: not run yet.
"""

from jaxcomp import GPTQ, RTN, CalibSpec, Perplexity, QuantSpec, QuaRot, Recipe


def recipe() -> Recipe:
    int4 = QuantSpec(bits=4)
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            QuaRot(seed=0),
            GPTQ(weight=int4, act_order=False, clip="weight"),
            RTN(weight=None, act=act, kv=kv, act_clip=0.9, kv_clip=0.95),
        ),
        calib=CalibSpec("wikitext2", samples=128, length=2048, batch=4),
        evals=(Perplexity("wikitext2", context=2048), Perplexity("c4", context=2048)),
    )
