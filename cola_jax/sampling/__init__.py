"""Generation of text: `Settings`, and `generate`, `stream`, `infill`, `edit`, `generate_batches`."""

from cola_jax.sampling.blocks import Generation
from cola_jax.sampling.generate import Piece, edit, generate, generate_batches, infill, stream
from cola_jax.sampling.settings import Settings

__all__ = ["Generation", "Piece", "Settings", "edit", "generate", "generate_batches", "infill", "stream"]
