"""FlatQuant W4A16 of SmolLM2-135M, per channel and symmetric: for weights alone, then GPTQ.

Run: jaxcomp compress demo:smollm2 configs/smollm2_flatquant_w4.py --out OUT
Expect: perplexity 21.98; GPTQ alone 23.97, dense 20.12; 171 s of fit and 105 s of GPTQ (2026-11-25,
2 CPU cores, jax 0.10.2).
"""

from jaxcomp import GPTQ, CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    int4 = QuantSpec(bits=4)
    return Recipe(
        steps=(
            FlatQuant(
                weight=int4,
                epochs=1,
                init="hadamard",
                lr=4e-2,
                clip_lr=0.4,
                token_limit=10.0,
                finish="keep",
            ),
            GPTQ(weight=int4, clip="output", first_token_weight=16.0),
        ),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=1),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
