"""Which linears of SmolLM2-135M can bear three bits: each quantized alone, KL of the next token.

Nothing is compressed; the numbers are in the report.

Run: jaxcomp compress demo:smollm2 configs/smollm2_sensitivity.py --out OUT
Expect: not measured yet.
"""

from jaxcomp import CalibSpec, QuantSpec, Recipe, Sensitivity


def recipe() -> Recipe:
    return Recipe(
        steps=(Sensitivity(QuantSpec(bits=3, group_size=64)),),
        calib=CalibSpec("wiki_calib", samples=2, length=1024, batch=1),
    )
