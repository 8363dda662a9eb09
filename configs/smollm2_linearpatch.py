"""SmolLM2-135M without five of its thirty blocks, a least-squares map at every cut.

Run: jaxcomp compress demo:smollm2 configs/smollm2_linearpatch.py --out OUT
"""

from jaxcomp import CalibSpec, LinearPatch, Perplexity, PruneBlocks, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(PruneBlocks(5, "bi"), LinearPatch("lstsq")),
        calib=CalibSpec("wiki_calib", samples=16, length=512, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=4092),),
    )
