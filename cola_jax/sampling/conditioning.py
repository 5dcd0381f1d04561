"""What is known before generation begins: a layout of tokens, known latents and new tokens for each sequence.

Every way to condition is such a layout: a prompt (after which everything is unknown), a gap between two texts
(unknown in the middle), a span to be rewritten (unknown, but with latents to start from). `generate` does the rest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cola_jax.models.cola import ColaDLM
from cola_jax.sampling.settings import Settings
from cola_jax.types import UserError

Ids = Sequence[int]


class Layout(NamedTuple):
    """Sequences of W tokens, W / P latents. Padding before a text makes it end with a patch (or with a block).

    Attributes:
      tokens: [B, W], the encoder's input: known tokens in their places, the mask token in gaps and padding.
      visible: [B, W / P], latents that attention may see in the encoder.
      attended: [B, W / P], latents that later blocks may see, where they are history.
      known: [B, W / P], latents that are pinned to what the encoder makes of them.
      first: [B], the first block that is generated.
      begin, end: [B], the new tokens are those from begin up to end.
    """

    tokens: np.ndarray | jax.Array
    visible: np.ndarray | jax.Array
    attended: np.ndarray | jax.Array
    known: np.ndarray | jax.Array
    first: np.ndarray | jax.Array
    begin: np.ndarray | jax.Array
    end: np.ndarray | jax.Array


def check_tokens(model: ColaDLM, name: str, ids: Ids) -> None:
    """Raises UserError for ids outside the vocabulary."""
    vocabulary = model.vae_config.vocab_size
    if len(ids) and not (0 <= min(ids) and max(ids) < vocabulary):
        raise UserError(f"{name} has a token outside the vocabulary of {vocabulary}")


def check_prompts(model: ColaDLM, prompts: Sequence[Ids], settings: Settings) -> None:
    """Raises UserError for prompts that cannot be continued."""
    if not len(prompts):
        raise UserError("prompts: none given; at least one is needed")
    for index, prompt in enumerate(prompts):
        if settings.context is not None and len(prompt) + settings.max_new_tokens > settings.context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens: must be at most {settings.context} (context) "
                f"minus {settings.max_new_tokens} (max_new_tokens)"
            )
        check_tokens(model, f"prompt {index}", prompt)


def bucket(model: ColaDLM, tokens: int) -> int:
    """The width for sequences of at most ``tokens`` tokens: a power of two of blocks, so that few programs compile."""
    per_block = model.vae_config.patch_size * model.dit_config.block_size
    return per_block * 2 ** (-(-max(tokens, 1) // per_block) - 1).bit_length()


def block_count(model: ColaDLM, settings: Settings, new_tokens: int) -> int:
    """Blocks that ``new_tokens`` new tokens need, whatever part of the first one is known."""
    per_block = model.dit_config.block_size * model.vae_config.patch_size
    aligned = settings.conditioning in ("left_pad", "right_pad")
    return -(-(new_tokens + (0 if aligned else per_block - 1)) // per_block)


def padding(model: ColaDLM, tokens: int, settings: Settings) -> int:
    """Padding before a text of ``tokens`` tokens: with it, the text ends with a patch; "left_pad": with a block."""
    patch = model.vae_config.patch_size
    unit = patch * model.dit_config.block_size if settings.conditioning == "left_pad" else patch
    return -tokens % unit


def _empty(model: ColaDLM, count: int, width: int, settings: Settings) -> Layout:
    """A layout in which nothing is known; padding and gaps are the mask token."""
    pad = model.vae_config.vocab_size if settings.pad_id is None else settings.pad_id
    latents = (count, width // model.vae_config.patch_size)
    flags = [np.zeros(latents, bool) for _ in range(3)]
    return Layout(np.full((count, width), pad, np.int32), *flags, *np.zeros((3, count), np.int32))


def prompts(model: ColaDLM, texts: Sequence[Ids], settings: Settings, width: int = 0) -> Layout:
    """Continues each text (none: from nothing).

    Args:
      width: of the layout, at least; 0: what the longest text needs.
    """
    patch, block = model.vae_config.patch_size, model.dit_config.block_size
    per_block = patch * block
    offsets = [padding(model, len(text), settings) for text in texts]
    width = max(width, bucket(model, max(len(t) + o for t, o in zip(texts, offsets, strict=True))))
    layout = _empty(model, len(texts), width, settings)
    for row, (text, offset) in enumerate(zip(texts, offsets, strict=True)):
        stop = offset + len(text)
        layout.tokens[row, offset:stop] = text
        whole_block = -(-stop // per_block) * block
        hidden = 0 if settings.pad_id is not None else offset // patch
        layout.known[row, offset // patch : stop // patch] = True
        seen = whole_block if settings.pad_id is not None else stop // patch
        layout.visible[row, hidden:seen] = True
        begin = stop
        if settings.conditioning == "right_pad":
            begin = whole_block * patch
        layout.first[row] = begin // per_block
        layout.attended[row, hidden:seen] = True
        layout.attended[row, layout.first[row] * block :] = True  # what is generated
        layout.begin[row], layout.end[row] = begin, begin + settings.max_new_tokens
    return layout


def gaps(model: ColaDLM, texts: Sequence[tuple[Ids, int, Ids]], settings: Settings, width: int = 0) -> Layout:
    """Fills a gap of given length between two texts, (before, length, after).

    The encoder sees the gap as mask tokens. Latents on both sides are pinned where they share a block with the gap.

    Args:
      width: of the layout, at least; 0: what the longest text needs.
    """
    patch, block = model.vae_config.patch_size, model.dit_config.block_size
    offsets = [-len(before) % patch for before, _, _ in texts]
    totals = [o + len(b) + n + len(a) for o, (b, n, a) in zip(offsets, texts, strict=True)]
    layout = _empty(model, len(texts), max(width, bucket(model, max(totals))), settings)
    for row, ((before, length, after), offset, total) in enumerate(zip(texts, offsets, totals, strict=True)):
        begin = offset + len(before)
        end = begin + length
        layout.tokens[row, offset:begin], layout.tokens[row, begin:end] = before, model.vae_config.vocab_size
        layout.tokens[row, end:total] = after
        layout.visible[row, : -(-total // patch)] = True
        layout.attended[row] = True
        layout.known[row, : begin // patch] = True
        layout.known[row, -(-end // patch) : total // patch] = True
        layout.first[row] = begin // (patch * block)
        layout.begin[row], layout.end[row] = begin, end
    return layout


def spans(model: ColaDLM, texts: Sequence[tuple[Ids, int, int]], settings: Settings) -> Layout:
    """Rewrites tokens start to stop of each text, (text, start, stop), from their own latents.

    Latents that hold tokens outside of the span too are rewritten with it.
    """
    patch, block = model.vae_config.patch_size, model.dit_config.block_size
    layout = _empty(model, len(texts), bucket(model, max(len(text) for text, _, _ in texts)), settings)
    for row, (text, start, stop) in enumerate(texts):
        latents = -(-len(text) // patch)
        layout.tokens[row, : len(text)] = text
        layout.visible[row, :latents] = True
        layout.attended[row] = True
        layout.known[row, :latents] = True
        layout.known[row, start // patch : -(-stop // patch)] = False
        layout.first[row] = start // (patch * block)
        layout.begin[row], layout.end[row] = start, stop
    return layout
