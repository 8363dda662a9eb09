"""FlatQuant W3A3KV3 of SmolLM2-135M: three bits everywhere.

Run: jaxcomp compress demo:smollm2 configs/smollm2_flatquant_w3a3kv3.py --out OUT
Expect: perplexity 154.4 without GPTQ, dense 20.12 (2026-11-25, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    act = QuantSpec(bits=3, granularity="token", dynamic=True)
    kv = QuantSpec(bits=3, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            FlatQuant(
                weight=QuantSpec(bits=3),
                act=act,
                kv=kv,
                epochs=2,
                init="hadamard",
                lr=4e-2,
                clip_lr=0.4,
                token_limit=10.0,
            ),
        ),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=1),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
