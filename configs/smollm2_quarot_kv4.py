"""Rotated keys, values as they are, KV4 alone, of SmolLM2-135M (QuaRot-KV).

Run: jaxcomp compress demo:smollm2 configs/smollm2_quarot_kv4.py --out OUT
Expect: not measured yet.
"""

from jaxcomp import RTN, Perplexity, QuantSpec, QuaRot, Recipe


def recipe() -> Recipe:
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            QuaRot(residual=False, values=False, ffn=False, head_mix="none"),
            RTN(weight=None, kv=kv, kv_clip=0.95),
        ),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
