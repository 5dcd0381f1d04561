"""Text from a model: continuations, whole or block by block, infilling, editing.

All are one thing, `blocks.run` on a layout of what is known (`conditioning`). Noise is a pure function of (key,
sample id, block): a sample depends neither on its batch nor on its place there.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cola_jax import rng, sharding
from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_layer import Before
from cola_jax.models.unified import before_in, with_before
from cola_jax.sampling import blocks, conditioning, places
from cola_jax.sampling.blocks import Generation
from cola_jax.sampling.conditioning import Ids
from cola_jax.sampling.settings import Settings
from cola_jax.sampling.transport import Plan
from cola_jax.types import Key, Params, UserError


class Piece(NamedTuple):
    """One more block of every sequence, from `stream`.

    Attributes:
      tokens: the new tokens of each sequence; an empty list for one that is done.
      estimates: for each step, the tokens that the decoder makes of where the step points to; None unless asked for.
    """

    tokens: list[list[int]]
    estimates: list[list[list[int]]] | None


def _keys(key: Key | None, settings: Settings, count: int, sample_ids, noise) -> Key:
    if sample_ids is not None and len(sample_ids) != count:
        raise UserError(f"sampling sample_ids: {len(sample_ids)} given, there must be one for each of {count} prompts")
    if key is None:
        if noise is None or settings.temperature or settings.churn or settings.conditioning == "repaint":
            raise UserError("sampling key = None: only with explicit noise, temperature 0, churn 0 and no repainting")
        key = jax.random.key(0)
    ids = jnp.arange(count) if sample_ids is None else jnp.asarray(sample_ids)
    return rng.fold_in(key, ids)


def _run(model, params, layout, settings, count: int, keys, noise, mesh: Mesh | None) -> Generation:
    if noise is not None:
        size = (model.dit_config.block_size, model.dit_config.latent_dim)
        if noise.shape[0] != len(layout.tokens) or noise.shape[2:] != size:
            raise UserError(
                f"sampling noise has shape {noise.shape}: must be ({len(layout.tokens)}, blocks, {size[0]}, {size[1]})"
            )
        count = min(count, noise.shape[1])
    model, params = blocks.prepare(model, params)
    plan = Plan(model, settings, count)
    if mesh is None:
        return blocks.run(plan, params, layout, keys, noise)
    layout, keys, noise = jax.device_put((layout, keys, noise), sharding.batch_sharding(mesh))
    with sharding.activate(mesh):
        return blocks.run(plan, params, layout, keys, noise)


def generate(
    model: ColaDLM,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key | None = None,
    noise: Float[Array, "B G K D"] | None = None,
    sample_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continues each prompt. A sample depends on (key, its id) alone, not on the rest of its batch.

    Args:
      model: the Cola DLM.
      params: its variables.
      prompts: token ids; an empty prompt generates from nothing.
      settings: see `Settings`.
      key: source of all draws; may be None with ``noise``, where nothing else is drawn.
      noise: the noise of every block, in place of the key's. Fewer blocks than the budget needs end the output.
      sample_ids: identity of each sample in the random stream; its index by default.
      mesh: sequences over its axes data and fsdp, heads over tensor; the parameters must be there. The number of
        prompts must be a multiple of data * fsdp.

    Returns:
      A `Generation` with L = max_new_tokens (fewer if ``noise`` ends earlier).

    Raises:
      UserError: a setting or prompt that cannot be used.
    """
    settings.validate()
    conditioning.check_prompts(model, prompts, settings)
    keys = _keys(key, settings, len(prompts), sample_ids, noise)
    layout = conditioning.prompts(model, prompts, settings)
    count = conditioning.block_count(model, settings, settings.max_new_tokens)
    return _run(model, params, layout, settings, count, keys, noise, mesh)


def infill(
    model: ColaDLM,
    params: Params,
    texts: Sequence[tuple[Ids, int, Ids]],
    settings: Settings,
    key: Key | None = None,
    noise: Float[Array, "B G K D"] | None = None,
    sample_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Fills the gap of each text: (tokens before, length of the gap, tokens after).

    What stands after the gap reaches it only inside a block: known positions that share a block with the gap are
    pinned and the block attends to itself in both directions. Later blocks cannot: the prior is causal over blocks,
    p(gap, after | before) = p(gap | before) p(after | before, gap), and generation draws from the first factor. To
    weigh fills by the second, draw several and rank them by likelihood.

    Args:
      texts: either side may be empty.
      settings: ``max_new_tokens`` is replaced by the length of each gap, ``eos_id`` by None.
      model, params, key, noise, sample_ids, mesh: as in `generate`.

    Returns:
      A `Generation` whose tokens are those of the gaps, L the longest.

    Raises:
      UserError: a setting or text that cannot be used.
    """
    settings.validate()
    if settings.conditioning in ("left_pad", "right_pad"):
        raise UserError(f"sampling conditioning = {settings.conditioning!r}: for gaps must be 'clean' or 'repaint'")
    if not len(texts):
        raise UserError("texts: none given; at least one is needed")
    for index, (before, length, after) in enumerate(texts):
        if length < 1:
            raise UserError(f"text {index} has a gap of length {length}: must be at least 1")
        total = len(before) + length + len(after)
        if settings.context is not None and total > settings.context:
            most = f"must be at most {settings.context} (context)"
            raise UserError(f"text {index} has {total} tokens with its gap: {most}")
        for side in (before, after):
            conditioning.check_tokens(model, f"text {index}", side)
    longest = max(length for _, length, _ in texts)
    settings = dataclasses.replace(settings, max_new_tokens=longest, eos_id=None)
    keys = _keys(key, settings, len(texts), sample_ids, noise)
    layout = conditioning.gaps(model, texts, settings)
    return _run(model, params, layout, settings, conditioning.block_count(model, settings, longest), keys, noise, mesh)


def edit(
    model: ColaDLM,
    params: Params,
    texts: Sequence[tuple[Ids, int, int]],
    settings: Settings,
    strength: float | int,
    key: Key | None = None,
    noise: Float[Array, "B G K D"] | None = None,
    sample_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Rewrites a span of each text, (tokens, start, stop): its latents are noised to a time and transported back.

    Args:
      texts: the span is tokens[start:stop].
      settings: ``max_new_tokens`` is replaced by the length of each span, ``eos_id`` by None.
      strength: the time to which the span is noised, in (0, 1]; towards 0 the text stays as it is, at 1 nothing
        of the span is left.
      model, params, key, noise, sample_ids, mesh: as in `generate`.

    Returns:
      A `Generation` whose tokens are those of the spans, L the longest.

    Raises:
      UserError: a setting, text or span that cannot be used.
    """
    if not len(texts):
        raise UserError("texts: none given; at least one is needed")
    for index, (text, start, stop) in enumerate(texts):
        if not 0 <= start < stop <= len(text):
            raise UserError(f"text {index}: span {start}:{stop}: must be 0 <= start < stop <= {len(text)} (tokens)")
        if settings.context is not None and len(text) > settings.context:
            raise UserError(f"text {index} has {len(text)} tokens: must be at most {settings.context} (context)")
        conditioning.check_tokens(model, f"text {index}", text)
    if not 0 < strength <= 1:
        raise UserError(f"sampling strength = {strength}: must be above 0 and at most 1")
    longest = max(stop - start for _, start, stop in texts)
    settings = dataclasses.replace(
        settings, conditioning="clean", start_time=strength, max_new_tokens=longest, eos_id=None
    )
    settings.validate()
    keys = _keys(key, settings, len(texts), sample_ids, noise)
    layout = conditioning.spans(model, texts, settings)
    return _run(model, params, layout, settings, conditioning.block_count(model, settings, longest), keys, noise, mesh)


def stream(
    model: ColaDLM,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key,
    sample_ids: Sequence[int] | None = None,
    estimates: bool = False,
) -> Iterator[Piece]:
    """`generate`, block by block: yields the new tokens of each block as soon as it is decoded.

    Args:
      estimates: also decode, for every step, the latents that the velocity points to.
      model, params, prompts, settings, key, sample_ids: as in `generate`.

    Raises:
      UserError: as `generate`, before the first block.
    """
    settings.validate()
    conditioning.check_prompts(model, prompts, settings)
    keys = _keys(key, settings, len(prompts), sample_ids, None)
    layout = conditioning.prompts(model, prompts, settings)
    model, params = blocks.prepare(model, params)
    plan = Plan(model, settings, conditioning.block_count(model, settings, settings.max_new_tokens))
    return _stream(plan, blocks.tabulate(plan, params), blocks.start(plan, params, layout, keys), estimates)


def _stream(plan: Plan, weights, state, estimates: bool) -> Iterator[Piece]:
    sent = np.zeros(len(state.done), int)
    for index in range(plan.blocks):
        first = index == 0 and plan.settings.conditioning == "repaint"
        state, guesses = blocks.advance_once(plan, weights, state, first=first, estimates=estimates)
        out = blocks.cut(plan, state)
        shape = state.tokens.shape
        ready = np.minimum(out.lengths, _ready(state, index + 1, shape[2]))
        tokens = [row[a:b].tolist() for row, a, b in zip(np.asarray(out.tokens), sent, ready, strict=True)]
        yield Piece(tokens, None if guesses is None else np.asarray(guesses).tolist())
        sent = np.maximum(sent, ready)
        if np.all(state.done):
            return


def _ready(state, count: int, per_block: int) -> np.ndarray:
    """New tokens of each sequence that ``count`` blocks hold."""
    layout = state.layout
    return np.asarray((layout.first + count) * per_block - layout.begin)


def generate_batches(
    model: ColaDLM,
    params: Params,
    prompts: Sequence[Ids],
    settings: Settings,
    key: Key,
    batch_size: int = 64,
    before: Callable[[Sequence[int]], Before] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continuations of any number of prompts, in order, as they come: (index of the prompt, its new tokens).

    Sequences that are done give their place in the batch to the next prompts, so that they cost nothing more. All
    prompts are checked before the first is generated.

    Args:
      batch_size: prompts generated at a time; it does not change the result.
      before: indices of prompts -> what stands before each of them, found when it is their turn; None: row i of what
        the variables have (`models.unified.with_before`), if they have any.
      model, params, prompts, settings, key: as in `generate`.

    Raises:
      UserError: as `generate`, a batch size below 1, or variables in which not each prompt has something before it.
    """
    settings.validate()
    if batch_size < 1:
        raise UserError(f"sampling batch_size = {batch_size}: must be at least 1")
    conditioning.check_prompts(model, prompts, settings)
    given = before_in(params)
    if before is None and given is not None:
        if given.ids.shape[0] != len(prompts):
            need = f"must be one for each of {len(prompts)} prompts"
            raise UserError(f"what stands before the texts has {given.ids.shape[0]} rows: {need}")
        before = lambda indices: places.select(given, jnp.asarray(indices))  # noqa: E731
    params = with_before(params, None)
    return _refilled(model, params, prompts, settings, key, min(batch_size, len(prompts)), before)


def _refilled(model, params, prompts, settings, key, size: int, before) -> Iterator[tuple[int, list[int]]]:
    width = max(conditioning.prompts(model, [prompt], settings).tokens.shape[1] for prompt in prompts)
    count = conditioning.block_count(model, settings, settings.max_new_tokens)
    model, params = blocks.prepare(model, params)
    plan = Plan(model, settings, count)
    weights = blocks.tabulate(plan, params)

    def begun(indices: list[int]):
        layout = conditioning.prompts(model, [prompts[i] for i in indices], settings, width)
        keys, earlier = _keys(key, settings, len(indices), indices, None), before and before(indices)
        return blocks.begin(plan, weights, layout, keys, before=earlier)

    waiting = collections.deque(range(len(prompts)))
    prompt_at = [waiting.popleft() for _ in range(size)]  # index of the prompt in each place of the batch
    state, finished, following = begun(prompt_at), {}, itertools.count()
    refill = max(1, size // 4)  # places that are filled at a time, so that few programs are needed
    expected = next(following)
    active = np.ones(size, bool)
    while np.any(active):
        state, _ = blocks.advance_once(plan, weights, state)
        done = np.asarray(state.done)
        if np.any(done & active):
            out = blocks.cut(plan, state)
            tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
            for row in np.flatnonzero(done & active):
                finished[prompt_at[row]] = tokens[row, : lengths[row]].tolist()
            active &= ~done
        while expected in finished:
            yield expected, finished.pop(expected)
            expected = next(following)
        free = np.flatnonzero(~active)
        while waiting and len(free) >= min(refill, len(waiting)):
            rows = free[: min(refill, len(waiting))]
            for row in rows:
                prompt_at[row] = waiting.popleft()
            # Always as many: the last prompt again where there are too few, into the same place.
            rows = np.pad(rows, (0, refill - len(rows)), mode="edge")
            state = places.insert(state, begun([prompt_at[row] for row in rows]), jnp.asarray(rows))
            active[rows] = True
            free = np.flatnonzero(~active)
