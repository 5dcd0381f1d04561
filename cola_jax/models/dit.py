"""Block-causal diffusion transformer: the velocity of noisy latent blocks given clean earlier ones (SPEC 2, 9)."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cola_jax.flow import prediction
from cola_jax.flow.path import PATHS
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.dit_layer import Before, DiTContext, DiTLayer, clean_positions
from cola_jax.nn import attention, embeddings, visibility
from cola_jax.nn.layers import LayerNorm, Linear, scan_layers, separate_layers
from cola_jax.nn.modulation import Modulation, ModulationTables, spread, table_rows
from cola_jax.nn.visibility import BlockPlan
from cola_jax.types import Params


class Extended(NamedTuple):
    """What `BlockCausalDiT.extend` finds.

    Attributes:
      velocity: of the new latents.
      keys_values: their keys and values, for the cache.
      output: of the network, before it becomes a velocity: the estimate of the means for the next step.
    """

    velocity: Float[Array, "B Q D"]
    keys_values: tuple
    output: Float[Array, "B Q D"]


class BlockCausalDiT(nn.Module):
    """Velocity field of the latent flow, factorised over blocks (3.3, 3.7).

    Its variables may say what stands before all rows (`Before`); every method then reads it. Where "kept" is mutable,
    `denoise` leaves there the keys and values of the clean copy.

    Attributes:
      config: sizes and options.
      dtype: of the computation.
      stacked: False: parameters come as from `unstack`, and caches and modulations as tuples with an entry a layer.
    """

    config: DiTConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    stacked: bool = True

    def setup(self):
        config, dtype = self.config, self.dtype
        self.in_layer = Linear((config.dim,), ("latent", "embed"), dtype=dtype)
        if config.self_conditioning:
            self.estimate_in = Linear((config.dim,), ("latent", "embed"), use_bias=False, dtype=dtype)
        self.time_in = Linear((config.dim,), (None, "time"), dtype=dtype)
        self.time_hidden = Linear((config.dim,), ("time", None), dtype=dtype)
        self.time_out = Linear((config.time_dim,), (None, "time"), dtype=dtype)
        if self.stacked:
            methods = ("__call__", "modulations")
            self.layers = scan_layers(DiTLayer, config.num_layers, config.remat, config.unroll, methods)(config, dtype)
        else:
            self.layers = [DiTLayer(config, dtype) for _ in range(config.num_layers)]
        self.out_norm = LayerNorm(config.norm_eps)
        self.out_modulation = Modulation((2, config.dim), dtype)
        self.out_layer = Linear((config.latent_dim,), ("embed", "latent"), zero=True, dtype=dtype)
        if config.prediction == "mixture":
            self.code_logits = Linear((config.num_codes,), ("embed", "vocab"), zero=True, dtype=dtype)
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "latent"))
            self.codes = self.param("codes", init, (config.num_codes, config.latent_dim))
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
            self.code_embedding = self.param("code_embedding", init, (config.num_codes, config.dim))
        small = nn.initializers.normal(0.02)
        if config.block_position:
            init = nn.with_logical_partitioning(small, (None, "embed"))
            self.block_position = self.param("block_position", init, (config.block_size, config.dim))
        if config.no_history_vector:
            init = nn.with_logical_partitioning(small, ("embed",))
            self.no_history = self.param("no_history", init, (config.dim,))

    def _time(self, times: Float[Array, "B M"]):
        """Of t = 0 and of the times: activated embeddings [B, 1 + M, E], and `_coefficients`."""
        times = jnp.concatenate([jnp.zeros_like(times[:, :1]), times], axis=1)
        return self._embed(times), self._coefficients(times)

    def _embed(self, times: Float[Array, "B M"]):
        h = self.time_in(embeddings.time_features(times, top=self.config.time_frequency))
        return nn.silu(self.time_out(nn.silu(self.time_hidden(nn.silu(h)))))

    def _coefficients(self, times: Float[Array, "B M"]):
        """What makes a velocity of the output, [B, M, parts, 1]: skip and gate, of a mixture also precision and signal.

        None where the output is the velocity.
        """
        config, path = self.config, PATHS[self.config.path]
        if config.prediction == "velocity":
            return None
        parts = prediction.mean_coefficients(path, times, config.prediction_variance)
        if config.prediction == "mixture":
            signal = path.signal(times)
            parts = (*parts, signal / prediction.spread(path, times, config.prediction_variance), signal)
        return jnp.stack(parts, axis=-1)[..., None]

    def _coefficients_of(self, context: DiTContext, tables: ModulationTables | None, length: int, clean: int = 0):
        """`_coefficients` of each of the last ``length`` positions of a row, and of ``clean`` ones before them."""
        values = context.coefficients if tables is None else table_rows(tables.coefficients, context.index)
        pinned = None if context.pinned is None else context.pinned[:, -(clean + length) :]
        return spread(values, pinned, length, clean, context.stretches)

    def _before(self) -> Before | None:
        return self.get_variable("before", "is") if self.has_variable("before", "is") else None

    def _layout(self, length: int, plan: BlockPlan, segment_ids) -> tuple[attention.RowLayout, tuple | None]:
        """Layout of a row, and what its layers are given: the keys and values of what stands before it."""
        before, kernel = self._before(), self.config.attention_kernel
        if before is None:
            return attention.RowLayout(length, plan, segment_ids, kernel), None
        if segment_ids is None:
            segment_ids = jnp.ones((1, length), jnp.int32)
        pairs = before.pair if self.stacked else tuple(zip(*before.pair, strict=True))
        return attention.RowLayout(length, plan, segment_ids, kernel, before.ids), (pairs, None)

    def _plan(self, plan: BlockPlan | None) -> BlockPlan:
        return plan or BlockPlan.equal(self.config.block_size)

    def _input(self, latents, positions, plan: BlockPlan, context, drop_history=None, estimate=None, tables=None):
        x = self.in_layer(latents)
        if self.config.prediction == "mixture":
            clean = clean_positions(x, context)
            _, _, *evidence = self._coefficients_of(context, tables, x.shape[1] - clean, clean)
            scores = prediction.code_scores(0.0, self.codes.astype(latents.dtype), latents, *evidence)
            x = x + jax.nn.softmax(scores, axis=-1).astype(x.dtype) @ self.code_embedding.astype(x.dtype)
        if estimate is not None:
            x = x + self.estimate_in(estimate)
        if self.config.block_position:
            index = plan.offset_of(positions) % self.config.block_size
            x = x + jnp.take(self.block_position.astype(x.dtype), index, axis=0)
        if drop_history is not None:
            vector = self.no_history.astype(x.dtype)[None, None]
            x = x + jnp.where(drop_history[..., None], vector, 0)
        return x

    def _apply_layers(self, carry, inputs, context, method: str = "__call__"):
        """All layers, one after another: (carry, their outputs, stacked or in a tuple)."""
        if self.stacked:
            return getattr(self.layers, method)(carry, inputs, context)
        outputs = []
        for index, layer in enumerate(self.layers):
            given = None if inputs is None else tuple(None if part is None else part[index] for part in inputs)
            carry, output = getattr(layer, method)(carry, given, context)
            outputs.append(output)
        return carry, tuple(outputs)

    def _separate(self):
        """The layers one by one, as functions; None where they are compiled as a loop."""
        config = self.config
        if not self.stacked:
            return self.layers
        if config.unroll < config.num_layers or self.is_initializing():
            return None
        layer = DiTLayer(config, self.dtype, parent=None)
        return separate_layers(layer, self.variables["params"]["layers"], config.num_layers, config.remat)

    def _fed_back(self, once: Callable, estimate, pinned=None):
        """``once(estimate)``; where there is none and the network wants one, with that of a first pass.

        Args:
          once: estimate or None -> (velocity, .., output), one pass.
          estimate: of the means; zero where there is none. Pinned positions never have one.
          pinned: see `denoise`.
        """
        if not self.config.self_conditioning:
            return once(None)
        if estimate is None:
            estimate = once(None)[-1]
        return once(estimate if pinned is None else jnp.where(pinned[..., None], 0.0, estimate))

    def _output(self, x, latents, context: DiTContext, tables: ModulationTables | None = None):
        """Velocity, and the output that it was made of."""
        values = self.out_modulation(context.time) if tables is None else table_rows(tables.output, context.index)
        pinned = None if context.pinned is None else context.pinned[:, -x.shape[1] :]
        shift, scale = spread(values, pinned, x.shape[1], 0, context.stretches)
        h = self.out_norm(x) * (1 + scale) + shift
        output = self.out_layer(h)
        precise = jnp.promote_types(output.dtype, jnp.float32)
        output = output.astype(precise)
        if self.config.prediction == "velocity":
            return output, output
        skip, gate, *evidence = self._coefficients_of(context, tables, x.shape[1])
        if self.config.prediction == "mixture":
            logits = self.code_logits(h).astype(precise)
            codes = self.codes.astype(precise)
            scores = prediction.code_scores(logits, codes, latents, *evidence)
            if not self.is_initializing():
                self.sow("scores", "codes", scores)
            output = output + jnp.matmul(jax.nn.softmax(scores, axis=-1), codes, precision="highest")
        return skip * latents + gate * output, output

    def _angles(self, positions):
        return embeddings.rope_angles(positions, self.config.rope_dim, self.config.rope_theta)

    def __call__(
        self,
        latents: Float[Array, "B N D"],
        times: Float[Array, "B M"],
        pinned: Bool[Array, "B N"] | None = None,
        segment_ids: Int[Array, "B N"] | None = None,
        plan: BlockPlan | None = None,
        estimate: Float[Array, "B N D"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Velocity of a whole sequence under block-causal self-attention.

        Args:
          latents: normalised latents.
          times: flow times in [0, 1], M of them for M equal stretches of the sequence; under a plan of given sizes
            M may also be the number of blocks: then each has its own.
          pinned: positions that are data: their time is 0.
          segment_ids: document of each latent; latents see their own document only.
          plan: blocks; None: equal ones of ``config.block_size``. In a longer block the learned embedding of the
            index inside the block repeats itself after ``config.block_size`` positions.
          estimate: see `denoise`.
        """

        def once(estimate):
            return self._sequence(latents, times, pinned, segment_ids, plan, estimate)

        return self._fed_back(once, estimate, pinned)[0]

    def prefill(
        self, latents: Float[Array, "B N D"], segment_ids: Int[Array, "B N"], plan: BlockPlan | None = None
    ) -> tuple:
        """Keys and values [layers, B, H, N, C] of clean latents: the start of a cache (see `extend`)."""
        return self._sequence(latents, jnp.zeros((1, 1)), None, segment_ids, plan)[1]

    def clean_stream(self, latents: Float[Array, "B N D"], positions: Int[Array, "1 N"]) -> tuple:
        """What layers elsewhere need of clean latents: input [B, N, C], embedding of t = 0 [1, 1, E], rotations."""
        context = DiTContext(*self._time(jnp.zeros((1, 1))), None, self._angles(positions))
        x = self._input(latents, positions, self._plan(None), context)
        return x, context.time[:, :1], context.angles

    def _sequence(self, latents, times, pinned, segment_ids, plan, estimate=None):
        """(velocity, keys and values, output) of one pass."""
        length, plan = latents.shape[1], self._plan(plan)
        positions = jnp.arange(length)[None]
        layout, before = self._layout(length, plan, segment_ids)
        stretches = plan.stretches(length, times.shape[1])
        context = DiTContext(*self._time(times), pinned, self._angles(positions), layout, stretches=stretches)
        x, kv = self._apply_layers(self._input(latents, positions, plan, context, None, estimate), before, context)
        velocity, output = self._output(x, latents, context)
        return velocity, kv, output

    def denoise(
        self,
        noisy: Float[Array, "B Q D"],
        times: Float[Array, "B M"],
        history: Float[Array, "B N D"],
        pinned: Bool[Array, "B Q"] | None = None,
        segment_ids: Int[Array, "B N"] | None = None,
        drop_history: Bool[Array, "B G"] | None = None,
        plan: BlockPlan | None = None,
        estimate: Float[Array, "B Q D"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """Velocity of noisy blocks, each against the clean blocks before it and itself (training layout).

        Args:
          noisy: one or several noisy copies of the sequence, one after another: Q = copies * N.
          times: flow times in [0, 1] of M equal stretches of ``noisy``, or of each of its G blocks.
          history: the clean latents; one pass over them serves all copies.
          pinned: positions of ``noisy`` that are data: their time is 0.
          segment_ids: document of each latent of ``history``.
          drop_history: noisy blocks, G in all copies, that see no history and carry the no-history vector.
          plan: blocks of a copy; see `__call__`.
          estimate: of the means of ``noisy``, which a network with ``config.self_conditioning`` reads (others ignore
            it); None: its own, from a first pass without one.
        """

        def once(estimate):
            return self._denoise(noisy, times, history, pinned, segment_ids, drop_history, plan, estimate)

        return self._fed_back(once, estimate, pinned)[0]

    def first_estimate(
        self, noisy, times, history, pinned=None, segment_ids=None, drop_history=None, plan=None
    ) -> Float[Array, "B Q D"]:
        """The network's output without an estimate; arguments as of `denoise`, without ``history`` as of `__call__`."""
        if history is None:
            return self._sequence(noisy, times, pinned, segment_ids, plan)[2]
        return self._denoise(noisy, times, history, pinned, segment_ids, drop_history, plan)[1]

    def _denoise(self, noisy, times, history, pinned, segment_ids, drop_history, plan, estimate=None):
        """(velocity, output) of one pass."""
        (batch, total), length, plan = noisy.shape[:2], history.shape[1], self._plan(plan)
        copies = total // length
        stretches = plan.stretches(length, times.shape[1], copies)
        if stretches is None and length % (total // times.shape[1]):  # stretches longer than a copy
            times = jnp.repeat(times, total // times.shape[1], axis=1)
        ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
        noisy_ids, dropped = jnp.tile(ids, (1, copies)), None
        if drop_history is not None:
            sizes = plan.stretches(length, drop_history.shape[1], copies)
            repeats = total // drop_history.shape[1] if sizes is None else np.array(sizes)
            dropped = jnp.repeat(drop_history, repeats, axis=1)
            noisy_ids = jnp.where(dropped, -1 - noisy_ids, noisy_ids)  # ids that no clean position has
            dropped = jnp.pad(dropped, ((0, 0), (length, 0)))
        if pinned is not None:
            pinned = jnp.pad(pinned, ((0, 0), (length, 0)))
        ids = jnp.concatenate([ids, noisy_ids], axis=1)
        positions = jnp.tile(jnp.arange(length)[None], (1, 1 + copies))
        layout, before = self._layout(length, plan, ids)
        keeps = self.is_mutable_collection("kept") and not self.is_initializing()
        shared = (pinned, self._angles(positions), layout)
        context = DiTContext(*self._time(times), *shared, stretches=stretches, keeps=keeps)
        if estimate is not None:
            estimate = jnp.pad(estimate, ((0, 0), (length, 0), (0, 0)))
        x = self._input(jnp.concatenate([history, noisy], axis=1), positions, plan, context, dropped, estimate)
        separate = self._separate()
        if separate is None:
            x, kept = self._apply_layers(x, before, context)
        else:
            kept = []
            for index, layer in enumerate(separate):
                given = None if before is None else (jax.tree.map(lambda part, i=index: part[i], before[0]), None)
                x, pair = layer(x, given, context, last=index + 1 == len(separate))
                kept.append(pair)
            kept = jax.tree.map(lambda *parts: jnp.stack(parts), *kept) if keeps else None
        if keeps:
            self.sow("kept", "keys_values", kept)
        return self._output(x[:, -total:], noisy, context)

    def modulations(self, times: Float[Array, " M"]) -> ModulationTables:
        """All modulations for a grid of times in [0, 1], whose last must be 0; for `extend`."""
        times = times[None]
        time = self._embed(times)
        _, layers = self._apply_layers(None, None, time, method="modulations")
        first = (lambda x: x[:, 0]) if self.stacked else (lambda x: x[0])
        coefficients = self._coefficients(times)
        return ModulationTables(
            jax.tree.map(first, layers), self.out_modulation(time)[0], None if coefficients is None else coefficients[0]
        )

    def extend(
        self,
        latents: Float[Array, "B Q D"],
        time: Float[Array, ""] | Float[Array, " B"] | Int[Array, ""],
        positions: Int[Array, "B Q"],
        cache: tuple,
        cache_mask: Bool[Array, "B S"],
        own_mask: Bool[Array, "#B N N"] | None = None,
        pinned: Bool[Array, "B Q"] | None = None,
        modulations: ModulationTables | None = None,
        plan: BlockPlan | None = None,
        estimate: Float[Array, "B Q D"] | None = None,
    ) -> Extended:
        """Velocity of new latents against cached clean blocks, and their keys and values.

        Args:
          latents: N latents that attend to the cache and, under ``own_mask``, to each other; behind them, if
            Q > N, one block that sees nothing but itself and carries the no-history vector, where the model has
            one: the unconditional branch of guidance.
          time: flow time of the latents that are not pinned, of all sequences or of each; with ``modulations``,
            its index in their grid.
          positions: index of each latent in its sequence.
          cache: keys (after norm and RoPE) and values [layers, B, H, S, C] of clean latents; where layers are
            not stacked, a pair [B, H, S, C] for each.
          cache_mask: True where the cache holds a latent that the N latents may see.
          own_mask: who sees whom among the N latents (`visibility.block_causal`); None: N = Q, they are one block.
          pinned: latents at time 0.
          modulations: of `modulations`.
          plan: blocks of the sequence, for the index of a position inside its block; see `__call__`.
          estimate: see `denoise`.
        """
        batch, length = latents.shape[:2]
        own_mask = visibility.block_causal(BlockPlan.equal(length), length) if own_mask is None else own_mask
        seen, before = own_mask.shape[1], self._before()
        if before is not None:
            cache, cache_mask = before.cached(cache, cache_mask)
        history_mask = visibility.of_cache(cache_mask, seen)
        embedded, index = (None, None), None
        if modulations is None:
            embedded = self._time(jnp.reshape(time, (-1, 1)))
        else:
            index = time
        context = DiTContext(*embedded, pinned, self._angles(positions), None, own_mask[:, None], history_mask, index)
        dropped = None
        if seen < length and self.config.no_history_vector:
            dropped = jnp.broadcast_to(jnp.arange(length)[None] >= seen, (batch, length))
        layers = None if modulations is None else modulations.layers
        layers = layers if self.stacked or layers is not None else (None,) * self.config.num_layers

        def once(estimate):
            x = self._input(latents, positions, self._plan(plan), context, dropped, estimate, modulations)
            x, kv = self._apply_layers(x, (cache, layers), context)
            velocity, output = self._output(x, latents, context, modulations)
            return Extended(velocity, kv, output)

        return self._fed_back(once, estimate, pinned)


def unstack(params: Params, num_layers: int) -> Params:
    """Variables of a model with its DiT's layers apart, for ``stacked=False``.

    XLA's CPU backend copies a layer's weights out of the stack at every use: a third of the time of small batches.
    """
    dit = dict(params["params"]["dit"])
    layers = dit.pop("layers")
    apart = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(num_layers)}
    return {**params, "params": {**params["params"], "dit": {**dit, **apart}}}
