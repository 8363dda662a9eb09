"""SmolLM2-135M without five of its thirty blocks, a least-squares map at every cut.

Blocks 12 to 15 and 17 go. Nothing is trained: the maps come from 4,096 tokens in one dense pass.

Run: jaxcomp compress demo:smollm2 configs/smollm2_linearpatch.py --out OUT
Expect: perplexity 28.67; without the maps 35.70, dense 18.62 (2026-11-26, 2 CPU cores, jax 0.10.2;
also rows of `jaxcomp study configs/studies/block_removal.py --out OUT calib.samples=8`).
"""

from jaxcomp import CalibSpec, LinearPatch, Perplexity, PruneBlocks, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(PruneBlocks(5, "bi"), LinearPatch("lstsq")),
        calib=CalibSpec("wiki_calib", samples=8, length=512, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=4092),),
    )
