"""What the families that model tokens with a transformer share: the autoregressive one and LLaDA."""

import dataclasses

from cola_jax.families.interface import Group, Stage, TermsFn
from cola_jax.fields import require
from cola_jax.models import transformer


def resolve(config, vocab_size: int):
    """The config with the tokenizer's vocabulary where it leaves it open.

    Raises:
      UserError: the model's vocabulary is smaller than the tokenizer's.
    """
    sizes = config.transformer
    if not sizes.vocab_size:
        return dataclasses.replace(config, transformer=dataclasses.replace(sizes, vocab_size=vocab_size))
    need = f"at least the tokenizer's {vocab_size}"
    require(sizes.vocab_size >= vocab_size, "config.transformer.vocab_size", sizes.vocab_size, need)
    return config


def only_stage(config, terms: TermsFn, causal: bool) -> Stage:
    """The one stage of training, of all parameters.

    Args:
      config: a resolved config with the groups transformer, stage1 and optimizer1.
      terms: of the loss.
      causal: whether a position sees only earlier ones.
    """
    return Stage(
        name="stage1",
        steps=config.stage1.steps,
        optimizer=config.optimizer1,
        optimizer_field="optimizer1",
        groups=("transformer",),
        trained={"transformer": Group()},
        frozen={},
        terms=terms,
        flops_per_token=3 * transformer.forward_flops(config.transformer, config.data.sequence_length, causal),
    )
