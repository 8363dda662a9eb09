"""FlatQuant of the KV cache alone at 2 bits, of SmolLM2-135M.

Run: jaxcomp compress demo:smollm2 configs/smollm2_flatquant_kv2.py --out OUT
Expect: perplexity 49.32, dense 20.12 (2026-11-25, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    kv = QuantSpec(bits=2, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            FlatQuant(
                weight=None,
                kv=kv,
                epochs=1,
                init="hadamard",
                lr=4e-2,
                clip_lr=0.4,
                token_limit=10.0,
            ),
        ),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=1),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
