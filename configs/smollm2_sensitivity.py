"""Which linears of SmolLM2-135M can bear three bits: each quantized alone, KL of the next token.

Nothing is compressed; the numbers are in the report.

Run: jaxcomp compress demo:smollm2 configs/smollm2_sensitivity.py --out OUT
Expect: the dearest are `down` of block 29 (KL 0.112 nats), its `gate` and `up` (0.061, 0.054) and
`down` of block 11 (0.048), the cheapest `q` and `k` of block 0 (0.0005, 0.0003) (2026-11-25, 2 CPU
cores, jax 0.10.2; 9 minutes).
"""

from jaxcomp import CalibSpec, QuantSpec, Recipe, Sensitivity


def recipe() -> Recipe:
    return Recipe(
        steps=(Sensitivity(QuantSpec(bits=3, group_size=64)),),
        calib=CalibSpec("wiki_calib", samples=2, length=1024, batch=1),
    )
