"""Rotated keys, values as they are, KV4 alone, of SmolLM2-135M (QuaRot-KV).

Run: jaxcomp compress demo:smollm2 configs/smollm2_quarot_kv4.py --out OUT
Expect: perplexity 21.27; 22.34 without rotation, dense 20.12 (2026-11-25, 2 CPU cores, jax 0.10.2).
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
