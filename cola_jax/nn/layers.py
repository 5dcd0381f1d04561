"""Linear maps and norms with named axes, and the scan over layers that both networks use."""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from cola_jax.types import Params

zeros = nn.initializers.zeros_init


class Linear(nn.Module):
    """``x @ kernel + bias`` over the last axis, to one or several output axes.

    Attributes:
      features: size of each output axis.
      names: logical names of the kernel's axes: input, then outputs.
      zero: kernel starts at zero (bias always does).
    """

    features: Sequence[int]
    names: Sequence[str | None]
    use_bias: bool = True
    zero: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, fan_in = tuple(self.features), x.shape[-1]
        if self.zero:
            init = zeros()
        else:
            init = nn.initializers.truncated_normal(1.0 / math.sqrt(fan_in))
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, tuple(self.names)), (fan_in, *features), jnp.float32
        )
        # Two-dimensional on the left: XLA's CPU backend is twice as slow on more.
        y = jnp.tensordot(x.reshape(-1, fan_in).astype(self.dtype), kernel.astype(self.dtype), axes=1)
        if self.use_bias:
            init = nn.with_logical_partitioning(zeros(), tuple(self.names[1:]))
            bias = self.param("bias", init, features, jnp.float32)
            y = y + bias.astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], *features)


def unstack_axis(x: jax.Array, axis: int) -> list[jax.Array]:
    """The parts of ``x`` along an axis; their gradients are put together in one pass, those of slices in many."""
    return [jnp.squeeze(part, axis) for part in jnp.split(x, x.shape[axis], axis)]


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, computed in float32 (or wider), returned in the input's type."""

    eps: float
    affine: bool = True
    name_of_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            names, shape = (self.name_of_axis,), (x.shape[-1],)
            scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones_init(), names), shape)
            bias = self.param("bias", nn.with_logical_partitioning(zeros(), names), shape)
            broadcast = (1,) * (x.ndim - 1) + shape
            y = y * scale.reshape(broadcast) + bias.reshape(broadcast)
        return y.astype(x.dtype)


_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_layers(
    layer: type[nn.Module], length: int, remat: str = "none", unroll: int = 1, methods: Sequence[str] = ("__call__",)
) -> type[nn.Module]:
    """``length`` copies of ``layer``, parameters stacked on a leading axis "layers".

    The layer's call is ``(carry, history, context) -> (carry, output)``: ``history`` has a leading layer axis
    on every leaf (or is None), ``context`` is shared by all layers, outputs are stacked.

    Args:
      remat: what the backward pass computes again: "none", "full" (all), "attention" (all but attention's output, and
        with the splash kernel its sums), "dots" (all but matmul results).
      unroll: layers compiled one after another in each turn of the loop.
      methods: of the layer that the scan offers, all with the arguments and results of a call.
    """
    if remat != "none":
        layer = nn.remat(layer, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=length,
        unroll=unroll,
        methods=list(methods),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def separate_layers(layer: nn.Module, params: Params, length: int, remat: str = "none") -> list[Callable]:
    """The layers of `scan_layers` one by one, as functions with the arguments of the layer's call.

    Args:
      layer: without a parent.
      params: of all layers, stacked.
      remat: as in `scan_layers`.
    """

    def call(index: int, *args, **options):
        def apply(own, *args):
            return layer.apply({"params": own}, *args, **options)

        if remat != "none":
            apply = jax.checkpoint(apply, policy=_REMAT_POLICIES[remat])
        return apply(jax.tree.map(lambda x: x[index], params), *args)

    return [functools.partial(call, index) for index in range(length)]


def apply_scanned(layer: nn.Module, params: Params, carry, inputs, context, remat: str = "none", unroll: int = 1):
    """The loop of `scan_layers` over parameters that may come from several modules.

    Args:
      layer: without a parent.
      params: of all layers, stacked.
      carry, inputs, context: of the layer's call; ``inputs`` with a leading layer axis, or None.
      remat, unroll: as in `scan_layers`.

    Returns:
      The carry behind the last layer, and the stacked outputs.
    """

    def apply(own, carry, given):
        return layer.apply({"params": own}, carry, given, context)

    if remat != "none":
        apply = jax.checkpoint(apply, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(lambda carry, given: apply(given[0], carry, given[1]), carry, (params, inputs), unroll=unroll)
