"""A template: a `Decoder` whose leaves say which checkpoint tensor belongs there.

Structure and names are said once, by the tree itself. A reader fills a template with arrays, a
writer walks it beside the filled tree. Names are those of Hugging Face checkpoints.
"""

import dataclasses
import math

from jaxcomp.core.linear import Linear
from jaxcomp.models.attention import GQA
from jaxcomp.models.config import ModelConfig
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.ffn import DenseFFN
from jaxcomp.models.layers import Embed, RMSNorm
from jaxcomp.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class Param:
    """A leaf of a template.

    Attributes:
      name: the tensor's name in a Hugging Face checkpoint.
      shape: its shape in our tree, `[in_ch, out_ch]` for a weight.
      transpose: the checkpoint stores it as `[out_ch, in_ch]`.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in the checkpoint."""
        return self.shape[::-1] if self.transpose else self.shape


@dataclasses.dataclass(frozen=True)
class DenseShape:
    """The numbers that shape a dense Llama-like decoder; families read them from their configs.

    Attributes:
      windows: attention window of each block, None for all positions; its length is the depth.
      qkv_bias, o_bias, mlp_bias: which projections have one.
      head_norm: q and k are normalised per head.
    """

    config: ModelConfig
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    tied: bool = False


def dense_decoder(shape: DenseShape) -> Decoder:
    """The template of a pre-norm decoder with gated feed-forward units."""
    d_model, vocab = shape.config.d_model, shape.config.vocab_size
    head = None if shape.tied else _linear("lm_head", d_model, vocab)
    return Decoder(
        embed=Embed(Param("model.embed_tokens.weight", (vocab, d_model))),
        blocks=tuple(_block(shape, i, window) for i, window in enumerate(shape.windows)),
        norm=_norm("model.norm", d_model, shape.eps),
        lm_head=head,
        config=shape.config,
    )


def _block(shape: DenseShape, index: int, window: int | None) -> Block:
    at, d_model = f"model.layers.{index}", shape.config.d_model
    return Block(
        attn_norm=_norm(f"{at}.input_layernorm", d_model, shape.eps),
        attn=_attention(shape, f"{at}.self_attn", window),
        ffn_norm=_norm(f"{at}.post_attention_layernorm", d_model, shape.eps),
        ffn=DenseFFN(
            gate=_linear(f"{at}.mlp.gate_proj", d_model, shape.d_ff, shape.mlp_bias),
            up=_linear(f"{at}.mlp.up_proj", d_model, shape.d_ff, shape.mlp_bias),
            down=_linear(f"{at}.mlp.down_proj", shape.d_ff, d_model, shape.mlp_bias),
            activation=shape.activation,
        ),
    )


def _attention(shape: DenseShape, at: str, window: int | None) -> GQA:
    d_model, dim = shape.config.d_model, shape.head_dim
    q_ch, kv_ch = shape.n_heads * dim, shape.n_kv_heads * dim
    return GQA(
        q=_linear(f"{at}.q_proj", d_model, q_ch, shape.qkv_bias),
        k=_linear(f"{at}.k_proj", d_model, kv_ch, shape.qkv_bias),
        v=_linear(f"{at}.v_proj", d_model, kv_ch, shape.qkv_bias),
        o=_linear(f"{at}.o_proj", q_ch, d_model, shape.o_bias),
        q_norm=_norm(f"{at}.q_norm", dim, shape.eps) if shape.head_norm else None,
        k_norm=_norm(f"{at}.k_norm", dim, shape.eps) if shape.head_norm else None,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=dim,
        rope=shape.rope,
        window=window,
        scale=1 / math.sqrt(dim),
    )


def _linear(name: str, in_ch: int, out_ch: int, bias: bool = False) -> Linear:
    w = Param(f"{name}.weight", (in_ch, out_ch), transpose=True)
    return Linear(w, Param(f"{name}.bias", (out_ch,)) if bias else None)


def _norm(name: str, channels: int, eps: float) -> RMSNorm:
    return RMSNorm(Param(f"{name}.weight", (channels,)), eps)
