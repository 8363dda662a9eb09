"""`ModelConfig`: what is global about a model. Facts about a block live in the block's nodes."""

from typing import Literal

from jaxcomp.core.struct import static_value


@static_value
class ModelConfig:
    """Global facts of a decoder.

    Attributes:
      family: name in `jaxcomp.models.families.FAMILIES`.
      d_model: width of the residual stream.
      vocab_size: rows of the embedding; may exceed the tokenizer's by padding rows.
      context_length: longest sequence the model was trained for, in tokens.
      compute_dtype: dtype of activations and products; weights keep their stored dtype.
      bos: whether evaluation and calibration put a BOS token before each window.
      bos_token_id, eos_token_ids: as the checkpoint says; None or empty when it does not.
    """

    family: str
    d_model: int
    vocab_size: int
    context_length: int
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    bos: Literal["none", "window"] = "none"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"compute_dtype={self.compute_dtype!r} is not supported; use float32 or bfloat16"
            )
