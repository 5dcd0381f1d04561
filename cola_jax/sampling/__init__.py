"""Generation of text: `Settings`, `generate`, `generate_batches`."""

from cola_jax.sampling.generate import Generation, Settings, generate, generate_batches

__all__ = ["Generation", "Settings", "generate", "generate_batches"]
