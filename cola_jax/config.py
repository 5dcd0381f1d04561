"""The settings that every run has, as frozen dataclasses that check themselves.

A model family adds groups of its own: its config is a subclass of `Config` (`cola_jax.families`). `configs/*.py` build
an `ml_collections.ConfigDict`, so that the command line can override fields; `families.parse` converts it once.
"""

import dataclasses

from cola_jax.fields import require, require_at_least, require_choice


@dataclasses.dataclass(frozen=True)
class StoriesConfig:
    """Difficulty of the embedded corpus (`cola_jax.data.stories`)."""

    values: int = 0  # values kept for each factor of a story (who, where, goal, mood, ending); 0: all
    variants: int = 0  # wordings kept for each kind of sentence; 0: all
    choices: int = 0  # words kept in each list of local choices; 0: all
    min_sentences: int = 4
    max_sentences: int = 6
    aligned: bool = False  # True: each sentence has exactly 8 tokens (7 words and a full stop); False: 4 to 14

    def validate(self, part: str = "data.stories") -> None:
        require_at_least(0, part, self, "values", "variants", "choices")
        low, high = self.min_sentences, self.max_sentences
        require(2 <= low <= 6, f"{part}.min_sentences", low, "from 2 to 6")
        require(low <= high <= 6, f"{part}.max_sentences", high, f"from min_sentences = {low} to 6")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, and how documents become rows of ``sequence_length`` tokens."""

    corpus: str = "stories"  # stories | text
    files: str = ""  # corpus "text": a file or a glob of UTF-8 files
    document_separator: str = "\n\n"  # corpus "text": what divides a file into documents; "": one document a file
    tokenizer: str = "sentencepiece"  # sentencepiece | bytes | huggingface
    tokenizer_path: str = ""  # SentencePiece model or tokenizer.json; "": trained on the corpus, kept in the workdir
    eos_id: int = -1  # tokenizer "huggingface": the end of text; -1: found in its file
    pad_id: int = -1  # and the padding
    vocab_size: int = 1024  # at most, for a tokenizer trained here
    sequence_length: int = 64  # T
    packing: str = "concat"  # concat (rows full, documents cut at their ends) | pad (one document a row)
    random_offset: int = (
        0  # packing "pad": at most this many tokens of padding before a document; P - 1 shows all parities
    )
    align: int = 1  # each document is filled up with end-of-text to a multiple of this many tokens
    holdout: float = 0.02  # share of the documents that is never trained on
    num_stories: int = 200_000  # corpus "stories": training documents (an epoch)
    stories: StoriesConfig = StoriesConfig()
    batch_size: int = 32  # B, over all devices and processes
    num_workers: int = 0  # Grain worker processes

    def validate(self) -> None:
        require_choice("data", self, "corpus", ("stories", "text"))
        require_choice("data", self, "tokenizer", ("sentencepiece", "bytes", "huggingface"))
        require_choice("data", self, "packing", ("concat", "pad"))
        require(
            self.corpus != "text" or bool(self.files), "data.files", self.files, "a file or a glob (corpus = 'text')"
        )
        require_at_least(1, "data", self, "sequence_length", "align", "num_stories", "batch_size")
        require_at_least(0, "data", self, "num_workers", "random_offset")
        require(
            not self.random_offset or self.packing == "pad",
            "data.random_offset",
            self.random_offset,
            "0 unless packed by 'pad'",
        )
        require_at_least(-1, "data", self, "eos_id", "pad_id")
        require(self.vocab_size >= 300, "data.vocab_size", self.vocab_size, "at least 300 (256 bytes and symbols)")
        require(0 < self.holdout < 1, "data.holdout", self.holdout, "a number between 0 and 1")
        require(
            self.sequence_length % self.align == 0,
            "data.align",
            self.align,
            f"a divisor of data.sequence_length = {self.sequence_length}",
        )
        self.stories.validate()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (SPEC 7)."""

    learning_rate: float = 3e-3  # at the end of the warm-up
    initial_learning_rate: float = 0.0
    final_learning_rate: float = 0.0
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulation: int = 1  # microbatches a step
    ema: float = 0.0  # decay of the parameters' moving average, used for evaluation and sampling; 0: none
    spike_factor: float = 0.0  # a gradient norm above this many times its running average is a spike; 0: none is
    max_skipped: int = 0  # updates in a row that a spike or a value that is not finite may cost; one more stops the run

    def validate(self, part: str) -> None:
        require(self.learning_rate > 0, f"{part}.learning_rate", self.learning_rate, "a positive number")
        require_at_least(0, part, self, "initial_learning_rate", "final_learning_rate", "warmup_steps", "weight_decay")
        require(self.clip_norm > 0, f"{part}.clip_norm", self.clip_norm, "a positive number")
        require_at_least(1, part, self, "accumulation")
        require_at_least(0, part, self, "max_skipped")
        allowed = "0 or a number above 1"
        require(self.spike_factor == 0 or self.spike_factor > 1, f"{part}.spike_factor", self.spike_factor, allowed)
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{part}.{name}", value, "a number from 0 to below 1")


MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class AxesConfig:
    """Which axis of the mesh divides each logical axis of the parameters and activations; "": none.

    The examples of a batch are over data and fsdp, so that channels of activations can only be over tensor.
    """

    embed: str = "fsdp"  # width of the parameters' residual stream; that of activations is whole
    vocab: str = "tensor"
    mlp: str = "tensor"
    heads: str = "tensor"
    kv: str = ""  # channels of a head
    latent: str = ""
    time: str = ""  # the time embedding

    def validate(self, part: str = "train.axes") -> None:
        for name in ("embed", "vocab", "latent", "time"):
            require_choice(part, self, name, ("", *MESH_AXES))
        for name in ("mlp", "heads", "kv"):
            require_choice(part, self, name, ("", "tensor"))
        for name, others in {"embed": ("vocab", "mlp", "heads", "latent", "time"), "heads": ("kv",)}.items():
            value = getattr(self, name)
            shared = [other for other in others if value and getattr(self, other) == value]
            require(not shared, f"{part}.{name}", value, f"another axis than that of {', '.join(shared)}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop around the steps."""

    log_every: int = 20
    eval_every: int = 200
    eval_batches: int = 4
    sample_every: int = 0  # steps between generated samples in stage 2; 0: at the end only
    num_samples: int = 4
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    compute_dtype: str = "float32"  # float32 | bfloat16
    init_from: str = ""  # a run's directory or a released checkpoint whose parameters the first stage begins from
    mesh_data: int = 0  # devices along each mesh axis; 0 (one axis at most): all that are left
    mesh_fsdp: int = 1
    mesh_tensor: int = 1
    axes: AxesConfig = AxesConfig()
    hang_timeout: float = 0.0  # seconds without the end of a step (the first one compiles) that end a process; 0: never
    peak_flops: float = 0.0  # FLOP/s of a device in bfloat16, for the MFU; 0: known devices only

    def validate(self) -> None:
        require_at_least(1, "train", self, "log_every", "eval_every", "eval_batches", "checkpoint_every")
        require_at_least(1, "train", self, "keep_checkpoints")
        require_at_least(0, "train", self, "sample_every", "num_samples", "mesh_data", "mesh_fsdp", "mesh_tensor")
        require_at_least(0, "train", self, "hang_timeout", "peak_flops")
        require_choice("train", self, "compute_dtype", ("float32", "bfloat16"))
        self.axes.validate()
        axes = (self.mesh_data, self.mesh_fsdp, self.mesh_tensor)
        require(axes.count(0) <= 1, "train.mesh_*", axes, "at most one axis of 0 (all devices that are left)")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How the run generates its samples and its closing report; families add what is theirs."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    report_stories: int = 0  # corpus "stories": generated for the report at the end of the run; 0: no report

    def validate(self) -> None:
        require_at_least(1, "sample", self, "max_new_tokens")
        require_at_least(0, "sample", self, "temperature", "report_stories")
        require(self.repetition_penalty > 0, "sample.repetition_penalty", self.repetition_penalty, "a positive number")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of any family; a family's own config adds the groups of its model and stages."""

    family: str = ""
    seed: int = 0
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()

    def validate(self) -> None:
        """Raises UserError for the first field that is out of range or at odds with another."""
        require(self.seed >= 0, "seed", self.seed, "a number of at least 0")
        for name in ("data", "train", "sample"):
            getattr(self, name).validate()

    def validate_accumulation(self, *optimizers: str) -> None:
        """Raises UserError unless the microbatches of these optimizer groups divide the batch."""
        for name in optimizers:
            accumulation = getattr(self, name).accumulation
            require(
                self.data.batch_size % accumulation == 0,
                f"{name}.accumulation",
                accumulation,
                f"a divisor of data.batch_size = {self.data.batch_size}",
            )


def to_dict(config) -> dict:
    """The nested plain dict of a config dataclass, as JSON can hold it."""
    return dataclasses.asdict(config)
