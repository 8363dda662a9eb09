"""From checkpoints to our tree: Hugging Face directories and GGUF files, and their tokenizers."""

from jaxcomp.hub.read import Checkpoint, open_checkpoint
from jaxcomp.hub.tokenizer import encode, load_tokenizer

__all__ = ["Checkpoint", "encode", "load_tokenizer", "open_checkpoint"]
