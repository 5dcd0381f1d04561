"""What generation compiles, and where it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, VOCAB, assert_close, create, normal

from cola_jax import sampling, sharding
from cola_jax.config import TrainConfig
from cola_jax.sampling import Settings, blocks

SETTINGS = Settings(steps=2, guidance_scale=3.0, max_new_tokens=5)
OPTIONS = ({"num_heads": 2}, {"num_heads": 2, "no_history_vector": True})


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    """Sequences over data and fsdp, heads over tensor, parameters sharded as in training."""
    model, params = create(*OPTIONS)
    prompts = [[1, 2, 3], [], [4] * 6, [5] * 9]
    noise = normal(4, 2, BLOCK, 4)
    alone = sampling.generate(model, params, prompts, SETTINGS, noise=noise)
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, BLOCK), jnp.int32))
    placed = jax.device_put(params, sharding.shardings(boxed, mesh))
    together = sampling.generate(model, placed, prompts, SETTINGS, noise=noise, mesh=mesh)
    assert len(together.latents.sharding.device_set) == 8
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    assert_close(together.latents, alone.latents, 1e-5)


@pytest.mark.slow
def test_fifty_prompts_of_random_length_compile_nothing_after_a_warm_up():
    model, params = create(*OPTIONS)
    draw = np.random.default_rng(0)

    def continue_one(length):
        prompt = draw.integers(0, VOCAB, length).tolist()
        sampling.generate(model, params, [prompt], SETTINGS, key=jax.random.key(0))

    for blocks_of_prompt in (1, 2, 4, 8):
        continue_one(blocks_of_prompt * BLOCK)
    before = blocks.run._cache_size()
    for length in draw.integers(0, 8 * BLOCK + 1, 50):
        continue_one(int(length))
    assert blocks.run._cache_size() == before
