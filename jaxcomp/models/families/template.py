"""A template: a `Decoder` whose leaves say which checkpoint tensor belongs there.

Structure and names are said once, by the tree itself. A reader fills a template with arrays, a
writer walks it beside the filled tree. Names are those of Hugging Face checkpoints.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxcomp.core.linear import Linear
from jaxcomp.core.tree import named_leaves
from jaxcomp.models.attention import GQA
from jaxcomp.models.config import ModelConfig
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.ffn import DenseFFN
from jaxcomp.models.layers import Embed, JointNorm, RMSNorm
from jaxcomp.models.rope import Rope

# Norms of a block: field of `Block` → name under `model.layers.<i>`.
PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@dataclasses.dataclass(frozen=True)
class Param:
    """A leaf of a template.

    Attributes:
      name: the tensor's name in a Hugging Face checkpoint.
      shape: its shape in our tree, `[in_ch, out_ch]` for a weight.
      transpose: the checkpoint stores it as `[out_ch, in_ch]`.
      rows: first row and end of what this leaf is of the stored tensor; None for all of it. The
        leaves of one name cover the tensor, each row once.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    rows: tuple[int, int] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint of what this leaf is."""
        return self.shape[::-1] if self.transpose else self.shape

    @property
    def first_row(self) -> int:
        """Where it begins in the stored tensor."""
        return self.rows[0] if self.rows else 0


def stored_tensors(template: Any) -> dict[str, dict[str, Param]]:
    """Name of a stored tensor → path of each leaf in it → the leaf, in the order of the rows."""
    found: dict[str, dict[str, Param]] = {}
    for path, param in named_leaves(template).items():
        found.setdefault(param.name, {})[path] = param
    for name, params in found.items():
        order = sorted(params.items(), key=lambda item: item[1].first_row)
        found[name] = dict(order)
        ends = [0]
        for _, param in order:
            assert param.first_row == ends[-1], f"the leaves of {name} overlap or leave rows out"
            ends.append(param.first_row + param.stored_shape[0])
    return found


def stored_shape(params: Mapping[str, Param]) -> tuple[int, ...]:
    """The shape of a stored tensor, from the leaves that it holds."""
    shapes = [param.stored_shape for param in params.values()]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


@dataclasses.dataclass(frozen=True)
class DenseShape:
    """The numbers that shape a dense Llama-like decoder; families read them from their configs.

    Attributes:
      windows: attention window of each block, None for all positions; its length is the depth.
      window_rope: rotary embedding of the blocks with a window; None for the same as the others.
      qkv_bias, o_bias, mlp_bias: which projections have one.
      qk_norm: q and k are normalised per head, over all heads together, or not.
      norms: which norms a block has; see `PRE_NORMS`.
      norm_offset: 1 where the weights of all norms are stored as w of (1 + w).
      scale: of the attention scores; None for head_dim^(−1/2).
      embed_scale: of what is read from the embedding.
      fused: q, k and v are rows of one tensor, and so are gate and up.
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
    qk_norm: Literal["none", "head", "joint"] = "none"
    tied: bool = False
    window_rope: Rope | None = None
    norms: Mapping[str, str] = dataclasses.field(default_factory=lambda: PRE_NORMS)
    norm_offset: int = 0
    scale: float | None = None
    embed_scale: float | None = None
    fused: bool = False


def dense_decoder(shape: DenseShape) -> Decoder:
    """The template of a decoder with gated feed-forward units."""
    d_model, vocab = shape.config.d_model, shape.config.vocab_size
    head = None if shape.tied else _linear("lm_head", d_model, vocab)
    return Decoder(
        embed=Embed(Param("model.embed_tokens.weight", (vocab, d_model)), shape.embed_scale),
        blocks=tuple(_block(shape, i, window) for i, window in enumerate(shape.windows)),
        norm=_norm(shape, "model.norm", d_model),
        lm_head=head,
        config=shape.config,
    )


def _block(shape: DenseShape, index: int, window: int | None) -> Block:
    at, d_model = f"model.layers.{index}", shape.config.d_model
    norms = dict.fromkeys(PRE_NORMS) | {
        field: _norm(shape, f"{at}.{name}", d_model) for field, name in shape.norms.items()
    }
    return Block(
        attn=_attention(shape, f"{at}.self_attn", window), ffn=_ffn(shape, f"{at}.mlp"), **norms
    )


def _attention(shape: DenseShape, at: str, window: int | None) -> GQA:
    d_model, dim, bias = shape.config.d_model, shape.head_dim, shape.qkv_bias
    q_ch, kv_ch = shape.n_heads * dim, shape.n_kv_heads * dim
    q, k, v = _beside(shape, at, "qkv", {"q": q_ch, "k": kv_ch, "v": kv_ch}, bias)
    local = window is not None and shape.window_rope is not None
    return GQA(
        q=q,
        k=k,
        v=v,
        o=_linear(f"{at}.o_proj", q_ch, d_model, shape.o_bias),
        q_norm=_qk_norm(shape, f"{at}.q_norm", q_ch),
        k_norm=_qk_norm(shape, f"{at}.k_norm", kv_ch),
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=dim,
        rope=shape.window_rope if local else shape.rope,
        window=window,
        scale=1 / math.sqrt(dim) if shape.scale is None else shape.scale,
    )


def _ffn(shape: DenseShape, at: str) -> DenseFFN:
    d_model, d_ff, bias = shape.config.d_model, shape.d_ff, shape.mlp_bias
    gate, up = _beside(shape, at, "gate_up", {"gate": d_ff, "up": d_ff}, bias)
    return DenseFFN(gate, up, _linear(f"{at}.down_proj", d_ff, d_model, bias), shape.activation)


def _beside(
    shape: DenseShape, at: str, joined: str, out_chs: dict[str, int], bias: bool
) -> list[Linear]:
    """Linears that read the same: each a tensor of its own, or rows of the one called `joined`."""
    d_model = shape.config.d_model
    if not shape.fused:
        return [_linear(f"{at}.{name}_proj", d_model, n, bias) for name, n in out_chs.items()]
    assert not bias, "no family has biases there"
    linears, start = [], 0
    for n in out_chs.values():
        rows = (start, start := start + n)
        w = Param(f"{at}.{joined}_proj.weight", (d_model, n), transpose=True, rows=rows)
        linears.append(Linear(w))
    return linears


def _linear(name: str, in_ch: int, out_ch: int, bias: bool = False) -> Linear:
    w = Param(f"{name}.weight", (in_ch, out_ch), transpose=True)
    return Linear(w, Param(f"{name}.bias", (out_ch,)) if bias else None)


def _norm(shape: DenseShape, name: str, channels: int) -> RMSNorm:
    return RMSNorm(Param(f"{name}.weight", (channels,)), shape.eps, shape.norm_offset)


def _qk_norm(shape: DenseShape, name: str, channels: int) -> RMSNorm | JointNorm | None:
    if shape.qk_norm == "none":
        return None
    if shape.qk_norm == "joint":
        return JointNorm(_norm(shape, name, channels))
    return _norm(shape, name, shape.head_dim)
