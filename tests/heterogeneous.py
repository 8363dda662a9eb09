"""A tiny decoder whose blocks differ in everything that storing a model must keep."""

import functools

import jax
import jax.numpy as jnp

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QuantSpec, quantize
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.models.attention import GQA
from jaxcomp.models.config import ModelConfig
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.ffn import DenseFFN
from jaxcomp.models.layers import Embed, RMSNorm
from jaxcomp.models.rope import Rope

D, HIDDEN, VOCAB = 16, 24, 50
TOKEN8 = QuantSpec(bits=8, granularity="token", dynamic=True)
STATIC8 = QuantSpec(bits=8, granularity="tensor", symmetric=False)


@functools.cache
def model(seed: int = 0) -> Decoder:
    """Three blocks: dense bfloat16; 4 bit with a static quantizer; 3 bit gated and windowed."""
    return _build(jax.random.key(seed))


@jax.jit  # one compilation instead of one for every small operation
def _build(key: jax.Array) -> Decoder:
    keys = jax.random.split(key, 4)
    static = ActQuantizer(STATIC8, jnp.float32(0.25), jnp.int8(-3))
    blocks = (
        block(keys[0], None),
        block(keys[1], QuantSpec(bits=4, group_size=8)).replace(
            sites={"attn_in": Site(ActQuantizer(TOKEN8)), "ffn_in": Site(static), "ffn_mid": Site()}
        ),
        block(keys[2], QuantSpec(bits=3, symmetric=False)).replace(
            gate=jnp.float32(0.5), ffn_post_norm=RMSNorm(jnp.ones(D, jnp.float16), 1e-5, offset=1)
        ),
    )
    blocks = (*blocks[:2], blocks[2].replace(attn=blocks[2].attn.replace(window=7)))
    embed = Embed(jax.random.normal(keys[3], (VOCAB, D)), scale=4.0)
    config = ModelConfig("llama", D, VOCAB, 64, eos_token_ids=(1, 2))
    return Decoder(embed, blocks, RMSNorm(jnp.ones(D)), None, config)


def block(key: jax.Array, spec: QuantSpec | None) -> Block:
    """A block of 4 heads over 2 key heads; weights bfloat16, or quantized by `spec`."""
    keys = iter(jax.random.split(key, 7))

    def linear(in_ch: int, out_ch: int, bias: bool = False) -> Linear:
        w = jax.random.normal(next(keys), (in_ch, out_ch)) / in_ch**0.5
        w = w.astype(jnp.bfloat16) if spec is None else quantize(w, spec)
        return Linear(w, jnp.zeros(out_ch) if bias else None)

    q, k, v, o = linear(D, D, True), linear(D, D // 2), linear(D, D // 2), linear(D, D)
    rope = Rope(theta=1e5, kind="linear", factor=2.0)
    attn = GQA(q, k, v, o, n_heads=4, n_kv_heads=2, head_dim=4, rope=rope, scale=0.5)
    ffn = DenseFFN(linear(D, HIDDEN), linear(D, HIDDEN), linear(HIDDEN, D))
    return Block(RMSNorm(jnp.ones(D)), attn, RMSNorm(jnp.ones(D)), ffn)
