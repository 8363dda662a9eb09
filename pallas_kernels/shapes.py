"""Argument shapes from real models, the same for tests and benchmarks.

    for name, (in_ch, out_ch) in MODELS["llama-3-8b"].products().items(): ...

From the models' published configs. Products that read the same activations are fused, as an engine
does that waits for memory: q, k and v along their output channels, gate and up likewise.
"""

import dataclasses

TOKENS = (1, 16, 64, 256, 2048)  # decode of one sequence and of batches; prefill


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes."""

    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int

    def products(self) -> dict[str, tuple[int, int]]:
        """Input and output channels of each product of a block."""
        heads = self.n_heads * self.head_dim
        return {
            "qkv": (self.d_model, heads + 2 * self.n_kv_heads * self.head_dim),
            "attn_out": (heads, self.d_model),
            "gate_up": (self.d_model, 2 * self.d_ff),
            "down": (self.d_ff, self.d_model),
        }

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.n_heads // self.n_kv_heads


MODELS = {
    "smollm2-135m": ModelShape(576, 1536, 9, 3, 64, 49_152),
    "llama-3-8b": ModelShape(4096, 14_336, 32, 8, 128, 128_256),
    "llama-3-70b": ModelShape(8192, 28_672, 64, 8, 128, 128_256),
    "qwen2.5-7b": ModelShape(3584, 18_944, 28, 4, 128, 152_064),
}
