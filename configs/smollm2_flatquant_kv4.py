"""FlatQuant of the KV cache alone at 4 bits, of SmolLM2-135M.

Run: jaxcomp compress demo:smollm2 configs/smollm2_flatquant_kv4.py --out OUT
Expect: perplexity 20.65, dense 20.12, 22.34 without FlatQuant; 16 steps a block, `calib.samples=16
steps.0.epochs=1`, give 20.81 (2026-11-25, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            FlatQuant(
                weight=None,
                kv=kv,
                epochs=2,
                init="hadamard",
                lr=1e-2,
                clip_lr=0.1,
                token_limit=10.0,
            ),
        ),
        calib=CalibSpec("wiki_calib", samples=40, length=1024, batch=1),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
