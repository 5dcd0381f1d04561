import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.tiny_image_vae import abstract, config, create, pictures
from models.tiny_models import apply, assert_close, normal

from cola_jax import fields, rng, sharding
from cola_jax.config import TrainConfig
from cola_jax.flow import schedule
from cola_jax.models import image_vae
from cola_jax.models.image_vae import ImageVAEConfig, MiddleAttention, ResidualBlock, to_float, to_uint8
from cola_jax.objectives import image_stage
from cola_jax.types import UserError

PAPER = ImageVAEConfig(
    latent_dim=64,
    downsampling=16,
    patch_size=2,
    widths=(128, 256, 512, 512),
    encoder_blocks=2,
    decoder_blocks=3,
    num_heads=8,
    remat=True,
)


def images(batch: int, height: int, width: int, seed: int = 0) -> jax.Array:
    return jnp.tanh(normal(batch, height, width, 3, seed=seed))


def decode(model, params, latents, grid):
    return jax.jit(lambda params, latents: model.apply(params, latents, grid, method="decode"))(params, latents)


@pytest.mark.parametrize("changes", [{}, {"num_heads": 2}, {"downsampling": 8, "widths": (8, 8, 12)}])
def test_the_same_weights_serve_several_resolutions(changes):
    model, params = create(**changes)
    factor = model.config.downsampling
    for rows, columns in ((2, 2), (3, 3), (2, 5)):
        x = images(2, rows * factor, columns * factor)
        posterior = apply(model, params, x, method="encode")
        assert posterior.mean.shape == posterior.logvar.shape == (2, rows * columns, 4)
        decoded = decode(model, params, posterior.mean, (rows, columns))
        assert decoded.shape == x.shape and np.std(decoded) > 0.05


def test_latents_are_row_by_row():
    """With convolutions of patches that are latents alone, what changes is a square and those around it."""
    sizes = {"patch_size": 4, "widths": (8,), "encoder_blocks": 0, "decoder_blocks": 0}
    model, params = create(**sizes)
    near, x, z = np.zeros((4, 6), bool), images(1, 16, 24), normal(1, 24, 4)
    near[0:3, 3:6] = True  # around row 1, column 4
    means = (apply(model, params, x, method="encode").mean for x in (x, x.at[0, 4:8, 16:20].add(1.0)))
    np.testing.assert_array_equal(np.any(np.subtract(*means) != 0, axis=-1)[0], near.ravel())
    decoded = (decode(model, params, z, (4, 6)) for z in (z, z.at[0, 10].add(2.0)))
    changed = np.any(np.subtract(*decoded)[0].reshape(4, 4, 6, 4, 3) != 0, axis=(1, 3, 4))
    np.testing.assert_array_equal(changed, near)


def test_a_translation_by_a_square_moves_the_latents_by_one():
    """Away from the border, which reaches 3.5 squares far; the same for the decoder. By less it is another picture."""
    model, params = create()
    z = apply(model, params, images(1, 56, 56), method="encode").mean.reshape(1, 14, 14, 4)
    for shift, is_same in ((4, True), (2, False)):
        moved = jnp.roll(images(1, 56, 56), shift, axis=2)
        found = apply(model, params, moved, method="encode").mean.reshape(1, 14, 14, 4)[:, 4:10, 5:10]
        difference = np.max(np.abs(found - z[:, 4:10, 4:9]))
        assert difference < 1e-4 if is_same else difference > 0.5
    z = normal(1, 14, 14, 4)
    picture = decode(model, params, z.reshape(1, 196, 4), (14, 14))
    moved = decode(model, params, jnp.roll(z, 1, axis=1).reshape(1, 196, 4), (14, 14))
    assert_close(moved[:, 20:40, 16:40], picture[:, 16:36, 16:40], 1e-4)


def test_attention_reaches_everywhere_and_convolutions_do_not():
    x = images(1, 56, 56)
    for heads in (0, 2):
        model, params = create(num_heads=heads)

        def far(x, model=model, params=params):
            return model.apply(params, x, method="encode").mean[0, -1].sum()

        gradient = np.asarray(jax.jit(jax.grad(far))(x))[0, :8, :8]
        assert np.all(gradient != 0) if heads else np.all(gradient == 0)


def test_a_fixed_logsnr_is_the_logsnr():
    model, params = create(logsnr=1.5)
    posterior = apply(model, params, images(2, 16, 16), method="encode")
    assert abs(float(schedule.logsnr(posterior)) - 1.5) < 1e-4
    np.testing.assert_array_equal(posterior.logvar, -1.5)
    np.testing.assert_allclose(np.mean(np.square(posterior.mean), -1), 1.0, atol=1e-3)


def test_a_learned_variance_differs_between_latents():
    model, params = create(logsnr=None)
    assert np.std(apply(model, params, images(2, 16, 16), method="encode").logvar) > 0.1


def test_normalize_shifts_then_scales():
    model, _ = create(shift=0.5, scale=3.0)
    np.testing.assert_allclose(model.normalize(jnp.array([[[0.5, 1.5]]])), [[[0.0, 3.0]]])


@pytest.mark.parametrize("changes", [{"num_heads": 2, "logsnr": None}, {"remat": True}])
def test_gradients_reach_every_parameter(changes):
    model, params = create(**changes)

    @jax.jit
    def gradient(params):
        def loss(params):
            posterior = model.apply(params, images(2, 12, 8), method="encode")
            z = posterior.mean + jnp.exp(0.5 * posterior.logvar) * normal(2, 6, 4)
            return jnp.sum(normal(2, 12, 8, 3, seed=3) * model.apply(params, z, (3, 2), method="decode"))

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.mean(np.asarray(leaf) != 0) > 0.99, jax.tree_util.keystr(path)


def test_rematerialised_gradients_are_the_same():
    found = []
    for remat in (False, True):
        model, params = create(remat=remat)
        found.append(jax.jit(jax.grad(lambda p, m=model: jnp.sum(jnp.sin(m.apply(p, images(1, 8, 8))))))(params))
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), *found)


@pytest.mark.parametrize("kind", [ResidualBlock, MiddleAttention])
def test_blocks_begin_as_the_identity(kind):
    """So that the depth of a new model does not matter."""
    x, block = normal(1, 3, 4, 12), kind(config(num_heads=2), jnp.dtype("float32"))
    np.testing.assert_array_equal(block.apply(block.init(jax.random.key(0), x), x), x)


def test_bfloat16_is_close_and_its_results_float32():
    (model, params), (half, _) = create(num_heads=2), create("bfloat16", num_heads=2)
    x = images(2, 16, 16)
    expected, actual = (apply(m, params, x, method="encode").mean for m in (model, half))
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, 0.1)
    assert np.max(np.abs(actual - expected)) > 1e-4  # it did compute in bfloat16
    expected, actual = (decode(m, params, normal(2, 16, 4), (4, 4)) for m in (model, half))
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, 0.05)
    assert {x.dtype for x in jax.tree.leaves(abstract(half))} == {jnp.dtype("float32")}


def test_every_parameter_is_partitioned_and_a_mesh_changes_nothing():
    model, params = create(num_heads=2)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    assert all(isinstance(x, nn.Partitioned) for x in jax.tree.leaves(boxed, is_leaf=lambda x: hasattr(x, "names")))
    places = sharding.shardings(boxed, mesh)
    kernel = places["params"]["decoder"]["level_0_block_0"]["conv_in"]["kernel"]
    assert kernel.spec == jax.sharding.PartitionSpec(None, None, "fsdp", "tensor")
    x = images(4, 8, 8)

    def call(params, x):
        with sharding.activate(mesh):
            return model.apply(params, x)

    spread = jax.jit(call, in_shardings=(places, sharding.batch_sharding(mesh)))
    assert_close(spread(params, x), apply(model, params, x, method="__call__"), 1e-4)


@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_flops_are_those_that_the_compiler_counts(heads, size):
    sizes = {"latent_dim": 16, "downsampling": 8, "patch_size": 2, "widths": (64, 96, 128), "num_heads": heads}
    model, params = create(**sizes, decoder_blocks=2)
    encoder, decoder = image_vae.forward_flops(model.config, *size)
    grid = model.config.grid(*size)

    def count(function, *shape):
        lowered = jax.jit(function).lower(abstract(model), jax.ShapeDtypeStruct(shape, jnp.float32))
        return lowered.compile().cost_analysis()["flops"]

    assert encoder == pytest.approx(count(lambda p, x: model.apply(p, x, method="encode").mean, 1, *size, 3), rel=0.1)
    found = count(lambda p, z: model.apply(p, z, grid, method="decode"), 1, grid[0] * grid[1], 16)
    assert decoder == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("side", [256, 384, 640, 1024])
def test_the_full_size_has_the_grids_of_the_paper(side):
    fields.check(PAPER, "")
    model, rows = image_vae.create(PAPER, "bfloat16"), side // 16
    params = abstract(model)
    assert 50e6 < sum(x.size for x in jax.tree.leaves(params)) < 150e6
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    posterior = jax.eval_shape(lambda p, x: model.apply(p, x, method="encode"), params, x)
    assert posterior.logvar.shape == (2, rows**2, 64) and rows in (16, 24, 40, 64)
    decoded = jax.eval_shape(lambda p, z: model.apply(p, z, (rows, rows), method="decode"), params, posterior.mean)
    assert decoded.shape == x.shape and decoded.dtype == jnp.float32


def test_pixels_go_to_floats_and_back():
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    values = to_float(x)
    assert (float(values.min()), float(values.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(values), x)
    np.testing.assert_array_equal(to_uint8(jnp.array([[[[-1.7, 1.2, 0.0]]]])), [[[[0, 255, 128]]]])


@pytest.mark.parametrize("size", [(30, 32), (32, 6), (0, 32)])
def test_a_size_that_is_not_divided_is_refused_in_one_line(size):
    model, params = create()
    message = f"{size[0]} x {size[1]} pixels: height and width must be multiples of 4, the downsampling of the image"
    with pytest.raises(UserError, match=message) as error:
        model.apply(params, jnp.zeros((1, *size, 3)), method="encode")
    assert "\n" not in str(error.value)


def test_other_channels_and_other_grids_are_refused():
    model, params = create()
    with pytest.raises(UserError, match="channels of an image = 4: must be 3"):
        model.apply(params, jnp.zeros((1, 8, 8, 4)), method="encode")
    with pytest.raises(ValueError, match="a grid of 2 x 3 latents: must hold 4"):
        model.apply(params, jnp.zeros((1, 4, 4)), (2, 3), method="decode")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsampling": 12}, "downsampling = 12: must be at least 1 and a power of two"),
        ({"patch_size": 8}, "patch_size = 8: must be at most downsampling = 4"),
        ({"widths": (8,)}, r"widths = \(8,\): must be 2 widths \(downsampling / patch_size = 2\)"),
        ({"widths": (8, 0)}, r"widths = \(8, 0\): must be each at least 1"),
        ({"num_heads": 5}, r"num_heads = 5: must be a divisor of the last of widths = \(8, 12\)"),
        ({"normalize_mean": False}, "normalize_mean = False: must be True where logsnr is fixed"),
        ({"scale": 0.0}, "scale = 0.0: must be a number that is not 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=f"config.image_vae.{message}"):
        config(**changes).validate()


def test_defaults_fit():
    ImageVAEConfig().validate()


def test_it_learns_eight_pictures():
    """Through the noise of the posterior, better than the best picture of flat patches."""
    model = image_vae.create(config(latent_dim=16, widths=(32, 48), logsnr=4.0))
    batch, stage = {"image": pictures(8, 16, 16)}, image_stage.ImageStageConfig(kl_weight=0.0)
    params = nn.unbox(model.init(jax.random.key(0), images(1, 16, 16)))
    optimizer = optax.adam(4e-3, b2=0.99)

    def losses(params, n):
        found = image_stage.terms(model, stage, params, batch, rng.key(0, "train", n, jnp.arange(8)))
        return tuple(found[name].value.sum() / found[name].weight.sum() for name in ("reconstruction", "pixel_error"))

    @jax.jit
    def step(params, state, n):
        (_, error), gradient = jax.value_and_grad(losses, has_aux=True)(params, n)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, error

    state, errors = optimizer.init(params), []
    for n in range(150):
        params, state, error = step(params, state, n)
        errors.append(float(error))
    patches = batch["image"].reshape(8, 8, 2, 8, 2, 3) / 255
    flat = np.abs(patches - np.median(patches, (2, 4), keepdims=True)).mean()
    assert 0.035 < flat < 0.045 and errors[0] > 5 * flat
    assert np.mean(errors[-10:]) < 0.75 * flat
