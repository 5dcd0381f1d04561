"""Generation of text: `Settings`, `generate`."""

from cola_jax.sampling.generate import Generation, Settings, generate

__all__ = ["Generation", "Settings", "generate"]
