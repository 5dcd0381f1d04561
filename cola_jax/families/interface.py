"""What a model family is: a value that the trainer and the binaries use without knowing which model it is.

The trainer walks `Family.stages` and optimizes the sum of each stage's terms; the binaries generate and score through
`Family.generate`, `Family.stream` and `Family.score`. A new family is one module with one such value, and one entry in
`families.FAMILIES`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cola_jax.config import Config, OptimizerConfig
from cola_jax.types import Key, Params, PyTree, Term

# (variables, batch, keys [B], frozen trees by name) -> terms per example
TermsFn = Callable[[Params, dict, Key, Mapping[str, Params]], dict[str, Term]]


class Group(NamedTuple):
    """How a stage trains one group of parameters (a top-level entry of the variables).

    Attributes:
      ratio: its learning rate over that of the stage.
      active: step -> whether the group is updated in that step; None: in every step. A group that is not active keeps
        its parameters and moments, and its gradient does not enter the clipping norm.
    """

    ratio: float = 1.0
    active: Callable[[jax.Array], jax.Array] | None = None


class Stage(NamedTuple):
    """One stage of training.

    Attributes:
      name: directory of its checkpoints: "stage1", "stage2" and so on, in the order of the stages.
      steps: updates; 0: the stage is skipped.
      optimizer: rates, decay, clipping, accumulation.
      optimizer_field: the config group of ``optimizer``, for errors.
      groups: parameter groups that its state holds.
      trained: those of them that have gradients, and how each is trained.
      frozen: name -> path in the parameters; what stands there when the stage begins is kept as it is, and handed to
        ``terms`` under this name.
      terms: of the loss.
      flops_per_token: model FLOPs of a training step per token of the batch.
      begin: (boxed variables, groups that were given to the stage) -> the variables that it begins with; None: as they
        are.
    """

    name: str
    steps: int
    optimizer: OptimizerConfig
    optimizer_field: str
    groups: tuple[str, ...]
    trained: Mapping[str, Group]
    frozen: Mapping[str, tuple[str, ...]]
    terms: TermsFn
    flops_per_token: float
    begin: Callable[[Params, Collection[str]], Params] | None = None


class Scores(NamedTuple):
    """Log-probabilities of texts, nats, float64.

    Attributes:
      log_prob: [B], of the scored tokens: exact, or a lower bound in expectation.
      error: [B], Monte-Carlo standard error of ``log_prob``; 0 where it is exact, nan where it is not known.
      bound: "exact" or "lower".
      tokens: [B], scored tokens.
    """

    log_prob: np.ndarray
    error: np.ndarray
    bound: str
    tokens: np.ndarray


class Piece(NamedTuple):
    """What `Family.stream` yields: the next tokens of every sequence, an empty list for one that has ended."""

    tokens: list[list[int]]


class Engine(NamedTuple):
    """Generation of a batch whose sequences come and go: what a server needs to batch continuously.

    A state is a tree whose sequences `sampling.places` inserts and selects; `sampling.jobs` has Job and Progress. A
    sequence's tokens depend on its job alone, not on the others of the batch.

    Attributes:
      unit: (model, settings) -> what is generated between two boundaries, in tokens.
      prepare: (model, params, settings) -> program, for sequences of at most ``settings.context`` tokens, of which at
        most ``settings.max_new_tokens`` are new.
      start: (program, jobs) -> state of these sequences at their beginning. Where ``chunk`` is not 0, also (program,
        jobs, state, n), with the state at its beginning of sequences whose prompts have the first n tokens in common
        with those of the jobs: they are not read again.
      rename: (program, state at its beginning, jobs with the same `Job.known`) -> state of those jobs, or None.
      advance: (program, state, more) -> (state, `Progress`, estimates [steps, B, unit] or None): one unit further.
        Estimates and log-probabilities are there only if some sequence wants ``more`` than tokens.
      own: settings that each sequence has for itself, those of `Choice`; all others are the program's.
      fills: settings -> whether jobs may have a suffix.
      chunk: program -> tokens of a prompt that are read at a time; beginnings are shared by whole chunks. 0: a prompt
        is read as a whole, and beginnings are shared by equal jobs only.
      log_probs: of how many most likely tokens log-probabilities are told; 0: the family has none for each token.
    """

    unit: Callable[[Any, Any], int]
    prepare: Callable[[Any, Params, Any], Any]
    start: Callable[..., PyTree]
    rename: Callable[[Any, PyTree, Sequence[Any]], PyTree | None]
    advance: Callable[[Any, PyTree, bool], tuple[PyTree, Any, Any]]
    own: tuple[str, ...]
    fills: Callable[[Any], bool] = lambda settings: False
    chunk: Callable[[Any], int] = lambda program: 0
    log_probs: int = 0


class Pictures(NamedTuple):
    """How a run's pictures stand beside its texts.

    Attributes:
      size: pixels on a side.
      words: text -> the token ids of it as a whole text, with its end: for which an image is drawn, or which is said
        before one.
      length: most tokens of a text for which an image is drawn.
      instruction: token ids of what is said before a picture unless something else is; empty: nothing.
      instruction_length: most tokens of what is said; 0: nothing may be.
      settings: how images are drawn (`sampling.images.ImageSettings`).
      texts: engine of texts whose jobs may have a picture.
      images: engine of images, with ``settings``: its jobs may have a drawing, its `Progress` has pictures.
    """

    size: int
    words: Callable[[str], list[int]]
    length: int
    instruction: list[int]
    instruction_length: int
    settings: Any
    texts: Engine
    images: Engine


class Family(NamedTuple):
    """A model family.

    Attributes:
      name: as in ``config.family``.
      config: its config: `Config` with the groups of its model and stages.
      resolve: (config, vocabulary size) -> config whose model knows its vocabulary.
      model: resolved config -> Flax module.
      init: (model, config) -> function from a key to boxed variables.
      stages: (model, config) -> the stages of training, in order.
      settings: class of the generation settings; its fields are flags of the binaries.
      default_settings: (config, tokenizer) -> settings with which a run of this config generates.
      generate: (model, params, prompts, settings, key, sample_ids, mesh), the last three by name, too -> tokens [B, L]
        and lengths [B] of one batch; sample i depends on (key, i) alone. The key may also be one for each prompt [B].
      generate_batches: (model, params, prompts, settings, key, batch_size) -> iterator of (index of the prompt, its new
        tokens), in order.
      stream: (model, params, prompts, settings, key, sample_ids) -> iterator of `Piece`s.
      score_settings: class of the scoring settings.
      score: (model, params, tokens [B, T], segment_ids [B, T], settings, key, prefix [B] or None) -> `Scores`.
      scorer: (model, params, settings, key, context, batch_size, mesh) -> scorer of JSON lines (`likelihood.requests`).
      check_scorable: (model, params); raises UserError for a model without a likelihood.
      generation_flops: (config, settings) -> multiplications by weights, in FLOPs, per new token.
      bound: of ``score``: "exact" or "lower".
      tokens_per_latent: config -> P: prompts and prefixes that are scored must be multiples of it.
      infill, edit: as `sampling.infill` and `sampling.edit`; None for a family that only continues texts.
      reconstruct: (model, params, batch, keys) -> (tokens recovered, tokens), or None for a family without latents.
      engine: see `Engine`; None for a family that generates whole batches only.
      pictures: (config, tokenizer) -> `Pictures` of a run; None for a family of texts alone.
    """

    name: str
    config: type[Config]
    resolve: Callable[[Config, int], Config]
    model: Callable[[Config], Any]
    init: Callable[[Any, Config], Callable[[Key], PyTree]]
    stages: Callable[[Any, Config], tuple[Stage, ...]]
    settings: type
    default_settings: Callable[[Config, Any], Any]
    generate: Callable[..., Any]
    generate_batches: Callable[..., Iterator[tuple[int, list[int]]]]
    stream: Callable[..., Iterator[Any]]
    score_settings: type
    score: Callable[..., Scores]
    scorer: Callable[..., Any]
    check_scorable: Callable[[Any, Params], None]
    generation_flops: Callable[[Config, Any], float]
    bound: str = "lower"
    tokens_per_latent: Callable[[Config], int] = lambda config: 1
    infill: Callable[..., Any] | None = None
    edit: Callable[..., Any] | None = None
    reconstruct: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    engine: Engine | None = None
    pictures: Callable[[Config, Any], Pictures] | None = None


def make_init(model: Any, config: Config) -> Callable[[Key], PyTree]:
    """A function from a key to the variables of a model that is called with rows of tokens."""
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    return lambda key: model.init(key, tokens)


def first_steps(stages: Sequence[Stage]) -> list[int]:
    """For each stage, the updates of all stages before it: what keeps the stages' random streams apart."""
    totals = [0]
    for stage in stages:
        totals.append(totals[-1] + stage.steps)
    return totals[:-1]
