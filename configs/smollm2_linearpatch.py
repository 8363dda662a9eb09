"""SmolLM2-135M without five of its thirty blocks, a least-squares map at the cut.

The most similar span goes, blocks 14 to 18. Nothing is trained: the map comes from 4,096 tokens in
one dense pass.

Run: jaxcomp compress demo:smollm2 configs/smollm2_linearpatch.py --out OUT
Expect: perplexity 26.36, dense 18.62 (2026-11-26, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import CalibSpec, LinearPatch, Perplexity, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(LinearPatch("lstsq", remove=5),),
        calib=CalibSpec("wiki_calib", samples=8, length=512, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=4092),),
    )
