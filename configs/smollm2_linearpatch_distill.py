"""SmolLM2-135M without five of its thirty blocks, a least-squares map at the cut, blocks distilled.

The most similar span goes, blocks 14 to 18. The blocks left learn the original's top 20 words on
131,072 tokens, read once.

Run: jaxcomp compress demo:smollm2 configs/smollm2_linearpatch_distill.py --out OUT
Expect: perplexity 23.07, dense 20.12; 15 minutes (2026-11-27, 2 CPU cores shared with a test for
three minutes, jax 0.10.2).
"""

from jaxcomp import CalibSpec, Descent, Distill, LinearPatch, Perplexity, Recipe, Trainable


def recipe() -> Recipe:
    fit = Descent(lr=2e-4, batch=2, remat=False, validation=4)
    patch = LinearPatch("lstsq", remove=5, windows=16)
    return Recipe(
        steps=(patch, Distill(Trainable("blocks"), fit=fit)),
        calib=CalibSpec("wiki_calib", samples=260, length=512, batch=2),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
