"""QuaRot W4A4KV4 of SmolLM2-135M: random rotations, then GPTQ.

SmolLM2 has nine heads, for which there is no Hadamard matrix: an orthogonal one mixes them.

Run: jaxcomp compress demo:smollm2 configs/smollm2_quarot_w4a4kv4.py --out OUT
Expect: perplexity 44.14; seeds 1 and 2 give 44.02 and 43.81; dense 20.12 (2026-11-25, 2 CPU
cores, jax 0.10.2; `jaxcomp study configs/studies/w4a4kv4.py`).
"""

from jaxcomp import GPTQ, RTN, CalibSpec, Perplexity, QuantSpec, QuaRot, Recipe


def recipe() -> Recipe:
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            QuaRot(seed=0, head_mix="orthogonal"),
            GPTQ(weight=QuantSpec(bits=4), clip="output", first_token_weight=16.0),
            RTN(weight=None, act=act, kv=kv),
        ),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
