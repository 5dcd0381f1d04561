"""The map from hidden states to logits over the vocabulary, the largest array of a training step by far."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cola_jax import sharding
from cola_jax.nn.layers import zeros

_NAMES = ("embed", "vocab")


class VocabularyHead(nn.Module):
    """``x @ kernel + bias``, float32; whole, or reduced chunk by chunk.

    Attributes:
      dim: C, width of the hidden states.
      vocab_size: V.
      dtype: of the factors of the product. It is summed in float32, and not rounded to ``dtype`` after that.
      chunk, rows: a chunk in `reduced` has ``chunk`` positions of each sequence, or more, so that it has ``rows``
        positions of all sequences of a device. 0: all positions; no such bound.
    """

    dim: int
    vocab_size: int
    use_bias: bool
    dtype: jnp.dtype
    chunk: int
    rows: int

    def setup(self):
        init = nn.initializers.truncated_normal(self.dim**-0.5)
        shape = (self.dim, self.vocab_size)
        self.kernel = self.param("kernel", nn.with_logical_partitioning(init, _NAMES), shape, jnp.float32)
        init = nn.with_logical_partitioning(zeros(), _NAMES[1:])
        self.bias = self.param("bias", init, shape[1:], jnp.float32) if self.use_bias else None

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
        return _logits((self.kernel, self.bias), x, self.dtype)

    def reduced(
        self, hidden: Float[Array, "B T C"], tokens: Int[Array, "B T"], reduce: Callable[[Array, Array], Any]
    ) -> Any:
        """``reduce(self(hidden), tokens)``, some positions of each sequence at a time.

        The logits of a whole batch never exist: a chunk's are computed again for its gradient. On a mesh each device
        has the head's weights gathered once, before the first chunk, and the gradient of its own examples for them is
        summed over the devices once, after the last.

        Args:
          hidden: what the head reads.
          tokens: the target at each position, handed to ``reduce``.
          reduce: ``(logits [B, S, V], tokens [B, S]) -> tree of arrays [B, S]``, each position for itself. Where the
            mesh does not divide V, some logits of -inf stand behind them.

        Returns:
          What ``reduce`` returns, of arrays [B, T].
        """
        weights = (self.kernel, self.bias)

        def local(weights, hidden, tokens):
            weights = _divisible(weights)
            return _in_chunks(weights, hidden, tokens, reduce, self.dtype, self.chunk, self.rows)

        axes = sharding.active_batch_axes(len(hidden))
        if not axes:
            return local(weights, hidden, tokens)
        specs = tuple(
            None if x is None else _only(axes, sharding.active_spec(names, x.shape))
            for names, x in zip((_NAMES, _NAMES[1:]), weights, strict=True)
        )

        def on_device(weights, hidden, tokens):
            whole = tuple(
                None if x is None else _gather(x, spec, self.dtype) for x, spec in zip(weights, specs, strict=True)
            )
            return local(whole, hidden, tokens)

        rows = PartitionSpec(axes)
        return jax.shard_map(
            on_device, in_specs=(specs, rows, rows), out_specs=rows, axis_names=set(axes), check_vma=False
        )(weights, hidden, tokens)


def _only(axes: tuple[str, ...], spec: PartitionSpec) -> PartitionSpec:
    """``spec`` without the mesh axes that are not in ``axes``."""
    kept = (tuple(a for a in ((part,) if isinstance(part, str) else part or ()) if a in axes) for part in spec)
    return PartitionSpec(*(part or None for part in kept))


def _divisible(weights: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
    """Kernel and bias with entries behind the vocabulary's that no softmax sees, if the mesh does not divide that.

    Parameters are stored without them: over the width, all axes of the mesh divide them as they are
    (`sharding.partition_spec`). So devices along the tensor axis share the logits whatever the tokenizer's size is.
    """
    kernel, bias = weights
    axes, devices = sharding.active_axes(_NAMES[1])
    size = kernel.shape[1]
    if set(axes) & set(sharding.BATCH_AXES) or not size % devices:  # those that share examples have the whole kernel
        return weights
    more = -size % devices
    bias = jnp.zeros(size, kernel.dtype) if bias is None else bias
    kernel = jnp.pad(kernel, ((0, 0), (0, more)))
    kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec(None, axes))
    return kernel, jnp.pad(bias, (0, more), constant_values=-jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, spec: PartitionSpec, dtype: jnp.dtype) -> Array:
    """The whole of a weight whose parts lie as ``spec`` says, rounded to ``dtype``; inside `jax.shard_map`.

    It travels in ``dtype``. Its type stays, so that its gradient is summed in that.
    """
    y = x.astype(dtype)
    for axis, names in enumerate(spec):
        if names:
            y = jax.lax.all_gather(y, names, axis=axis, tiled=True)
    return y.astype(x.dtype)


def _gather_forward(x, spec, dtype):
    return _gather(x, spec, dtype), None


def _gather_backward(spec, dtype, _, gradient):
    for axis, names in enumerate(spec):
        if names:
            gradient = jax.lax.psum_scatter(gradient, names, scatter_dimension=axis, tiled=True)
    return (gradient,)


_gather.defvjp(_gather_forward, _gather_backward)


def _in_chunks(weights, hidden, tokens, reduce, dtype, chunk: int, rows: int):
    batch, length = tokens.shape
    chunk = max(chunk, -(-rows // batch)) if chunk else 0

    def one(weights, hidden, tokens):
        return reduce(_logits(weights, hidden, dtype), tokens)

    if not 0 < chunk < length:
        return one(weights, hidden, tokens)
    chunks = -(-length // chunk)
    parts = (jnp.pad(x, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, tokens))
    parts = tuple(jnp.swapaxes(x.reshape(batch, chunks, chunk, *x.shape[2:]), 0, 1) for x in parts)
    again = jax.checkpoint(one, prevent_cse=False)
    _, values = jax.lax.scan(lambda _, part: (None, again(weights, *part)), None, parts)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(batch, chunks * chunk)[:, :length], values)


def _logits(weights: tuple[Array, Array | None], x: Float[Array, "B S C"], dtype: jnp.dtype) -> Float[Array, "B S V"]:
    kernel, bias = weights
    # Two-dimensional on the left: XLA's CPU backend is twice as slow on more.
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if jnp.dtype(dtype).itemsize < 4:
        y = _narrow_product(rows, kernel)
    else:
        y = jnp.tensordot(rows, kernel.astype(dtype), axes=1).astype(jnp.float32)
    if bias is not None:
        y = y + bias[None]
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _narrow_product(x: Float[Array, "R C"], kernel: Float[Array, "C V"]) -> Float[Array, "R V"]:
    """``x @ kernel`` of factors in the type of ``x``, summed in float32 and left so.

    Its derivative would multiply by the gradient of the logits in float32, at a fraction of the rate. Here that is
    rounded to the type of ``x``, as if the logits were; the gradient of the kernel is summed in float32.
    """
    return _product(x, kernel.astype(x.dtype), 1, 0, jnp.float32)


def _narrow_forward(x, kernel):
    return _narrow_product(x, kernel), (x, kernel)


def _narrow_backward(kept, gradient):
    x, kernel = kept
    gradient = gradient.astype(x.dtype)
    back = _product(gradient, kernel.astype(x.dtype), 1, 1, x.dtype)
    return back, _product(x, gradient, 0, 0, jnp.float32).astype(kernel.dtype)


_narrow_product.defvjp(_narrow_forward, _narrow_backward)


def _product(a: Array, b: Array, axis_a: int, axis_b: int, dtype) -> Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=dtype)
