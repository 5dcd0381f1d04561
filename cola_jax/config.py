"""The settings that every run has, as frozen dataclasses; each field says its default, meaning and range.

A model family adds groups of its own: its config is a subclass of `Config` (`cola_jax.families`). `configs/*.py` build
an `ml_collections.ConfigDict`, so that the command line can override fields; `families.parse` converts it once.
"""

import dataclasses

from cola_jax.fields import check, require, setting


@dataclasses.dataclass(frozen=True)
class StoriesConfig:
    """Difficulty of the embedded corpus (`cola_jax.data.stories`)."""

    values: int = setting(0, "values kept of each factor (who, where, goal, mood, ending); 0: all", at_least=0)
    variants: int = setting(0, "wordings kept for each kind of sentence; 0: all", at_least=0)
    choices: int = setting(0, "words kept in each list of local choices; 0: all", at_least=0)
    min_sentences: int = setting(4, "sentences of the shortest story", at_least=2, at_most=6)
    max_sentences: int = setting(6, "sentences of the longest story", at_least=2, at_most=6)
    aligned: bool = setting(False, "each sentence has exactly 8 tokens (7 words and a full stop); else 4 to 14")

    def validate(self) -> None:
        check(self, "config.data.stories.")

    def check_together(self, prefix: str) -> None:
        low, high = self.min_sentences, self.max_sentences
        require(low <= high, f"{prefix}max_sentences", high, f"from min_sentences = {low} to 6")


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """Difficulty of the embedded corpus of pictures (`cola_jax.data.scenes`)."""

    max_shapes: int = setting(4, "shapes of a picture at most", at_least=1, at_most=4)
    colours: int = setting(6, "colours kept", at_least=1, at_most=6)
    kinds: int = setting(5, "kinds of shapes kept", at_least=1, at_most=5)
    sizes: bool = setting(True, "shapes are small or large, and captions may say so; else all are large")
    relations: bool = setting(True, "captions say where shapes are")

    def validate(self) -> None:
        check(self, "config.data.scenes.")

    def check_together(self, prefix: str) -> None:
        most = self.colours * self.kinds  # a caption means a shape by its colour and kind
        require(self.max_shapes <= most, f"{prefix}max_shapes", self.max_shapes, f"at most colours * kinds = {most}")


# Corpora of pictures with captions.
PAIRED = ("scenes", "images")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, and how documents become rows of ``sequence_length`` tokens."""

    corpus: str = setting(
        "stories",
        "where documents come from; 'scenes' and 'images' are pictures with captions",
        choices=("stories", "text", "tfds", "prepared", *PAIRED),
    )
    files: str = setting(
        "",
        "'text': a file or a glob of UTF-8 files; 'tfds': name of a data set; 'prepared': DIR or DIR=SHARE,... of "
        "launch/prepare.py, and with '; STEP: DIR=SHARE,...' other shares from a step on; 'images': a JSONL file",
    )
    tfds_split: str = setting("train", "corpus 'tfds': split that is read")
    text_field: str = setting("text", "corpora 'tfds' and 'images': field that holds the text")
    image_field: str = setting("image", "corpora 'tfds' and 'images': field that holds the image, or its path")
    group_field: str = setting(
        "", "images with captions: field whose equal values are never parted by the hold-out; '': the text's"
    )
    document_separator: str = setting(
        "\n\n", "corpus 'text': what divides a file into documents; '': one document a file"
    )
    tokenizer: str = setting("sentencepiece", "kind", choices=("sentencepiece", "bytes", "huggingface"))
    tokenizer_path: str = setting("", "SentencePiece model or tokenizer.json; '': trained on the corpus")
    eos_id: int = setting(-1, "tokenizer 'huggingface': the end of text; -1: found in its file", at_least=-1)
    pad_id: int = setting(-1, "tokenizer 'huggingface': the padding; -1: found in its file", at_least=-1)
    vocab_size: int = setting(
        1024, "entries at most, for a tokenizer trained here (256 bytes and symbols included)", at_least=300
    )
    sequence_length: int = setting(64, "tokens of a row, T", at_least=1)
    packing: str = setting(
        "concat",
        "rows are full and cut documents at their ends; have one document each; or hold whole documents (prepared)",
        choices=("concat", "pad", "best_fit"),
    )
    shuffle: str = setting(
        "documents",
        "packing 'concat', corpus 'prepared': what is shuffled; 'rows' keeps neighbours together and needs no memory",
        choices=("documents", "rows"),
    )
    random_offset: int = setting(
        0, "most tokens of padding before the text of a row; P - 1 shows all parities", at_least=0
    )
    align: int = setting(1, "each document is filled up with end-of-text to a multiple of so many tokens", at_least=1)
    holdout: float = setting(0.02, "share of the documents that is never trained on", above=0, below=1)
    num_stories: int = setting(200_000, "corpus 'stories': training documents (an epoch)", at_least=1)
    stories: StoriesConfig = StoriesConfig()
    num_scenes: int = setting(200_000, "corpus 'scenes': training pictures (an epoch)", at_least=1)
    scenes: ScenesConfig = ScenesConfig()
    image_size: int = setting(0, "side of the images of a batch, in pixels; 0: text only", at_least=0, at_most=4096)
    on_bad_image: str = setting(
        "fail", "corpora of image files: what a bad line or image does; 'skip' counts it", choices=("fail", "skip")
    )
    instructions: tuple[str, ...] = setting(
        (
            "Describe the picture.",
            "What does the picture show?",
            "Write a caption for this image.",
            "Say what can be seen here.",
            "Tell me what is in the image.",
        ),
        "of captioning; each row has one of them",
    )
    instruction_length: int = setting(0, "tokens of the instruction of a row; 0: rows have none", at_least=0)
    task_shares: tuple[float, ...] = setting(
        (),
        "shares of the batches that train the tasks text, image and caption (family 'unified'); empty: none is told",
        at_least=0,
    )
    batch_size: int = setting(32, "rows a step, B, over all devices and processes", at_least=1)
    num_workers: int = setting(0, "Grain worker processes", at_least=0)
    seed: int | None = setting(None, "of the order of the data and of the stories; None: the run's seed", at_least=0)

    def check_together(self, prefix: str) -> None:
        needs = {"text": "a file or a glob", "tfds": "a name of a data set", "prepared": "a directory"}
        needs["images"] = "a JSONL file with images and captions"
        named = self.corpus not in needs or bool(self.files)
        require(named, f"{prefix}files", "", f"{needs.get(self.corpus)} (corpus = {self.corpus!r})")
        prepared = self.corpus == "prepared"
        require(prepared or self.packing != "best_fit", f"{prefix}packing", self.packing, "'concat' or 'pad' online")
        by_rows = self.shuffle == "rows"
        need = "'documents' unless corpus = 'prepared' and packing = 'concat'"
        require(not by_rows or (prepared and self.packing == "concat"), f"{prefix}shuffle", self.shuffle, need)
        need = f"below data.sequence_length = {self.sequence_length}"
        require(self.random_offset < self.sequence_length, f"{prefix}random_offset", self.random_offset, need)
        need = f"a divisor of data.sequence_length = {self.sequence_length}"
        require(self.sequence_length % self.align == 0, f"{prefix}align", self.align, need)
        self._check_images(prefix)

    def _check_images(self, prefix: str) -> None:
        """Corpora of pictures have images, one with its caption a row; others have none, but for 'tfds'."""
        paired, least = self.corpus in PAIRED, 32 if self.corpus == "scenes" else 1
        need = f"at least {least} (corpus = {self.corpus!r})" if paired else f"0 with corpus = {self.corpus!r}"
        fits = self.image_size >= least if paired else not self.image_size or self.corpus == "tfds"
        require(fits, f"{prefix}image_size", self.image_size, need)
        need = "'pad' for pictures, a caption and its picture a row"
        require(self.packing == "pad" or not self.image_size, f"{prefix}packing", self.packing, need)
        need = "empty, or numbers of which one is above 0"
        require(not self.task_shares or sum(self.task_shares) > 0, f"{prefix}task_shares", self.task_shares, need)
        if self.instruction_length:
            need = "0 without pictures (data.image_size = 0)"
            require(bool(self.image_size), f"{prefix}instruction_length", self.instruction_length, need)
            given = bool(self.instructions) and all(text.strip() for text in self.instructions)
            require(given, f"{prefix}instructions", self.instructions, "one text or more, none of them empty")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up and cosine decay (SPEC 7)."""

    name: str = setting(
        "adamw",
        "the method; 'muon' orthogonalises the updates of matrices, and AdamW does the rest at the same rate",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(3e-3, "at the end of the warm-up", above=0)
    initial_learning_rate: float = setting(0.0, "at the first step", at_least=0)
    final_learning_rate: float = setting(0.0, "at the last step", at_least=0)
    warmup_steps: int = setting(20, "steps from the initial rate to the full one", at_least=0)
    beta1: float = setting(0.9, "decay of the first moment", at_least=0, below=1)
    momentum: float = setting(0.95, "'muon': decay of the first moment of matrices", at_least=0, below=1)
    beta2: float = setting(0.99, "decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.01, "decoupled, times the rate", at_least=0)
    clip_norm: float = setting(1.0, "largest global norm of a gradient", above=0)
    accumulation: int = setting(1, "microbatches a step", at_least=1)
    ema: float = setting(
        0.0, "decay of the parameters' moving average, for evaluation and sampling; 0: none", at_least=0, below=1
    )
    spike_factor: float = setting(
        0.0,
        "a gradient norm above this many times its running average is a spike; 0: none is",
        where=(lambda value: value == 0 or value > 1, "0 or a number above 1"),
    )
    max_skipped: int = setting(
        0, "updates in a row that spikes and non-finite values may cost; one more stops the run", at_least=0
    )

    def check_together(self, prefix: str) -> None:
        need = f"at most learning_rate = {self.learning_rate}"
        for name in ("initial_learning_rate", "final_learning_rate"):
            require(getattr(self, name) <= self.learning_rate, f"{prefix}{name}", getattr(self, name), need)


MESH_AXES = ("data", "fsdp", "tensor")
_ANY_AXIS, _TENSOR_AXIS = ("", *MESH_AXES), ("", "tensor")


@dataclasses.dataclass(frozen=True)
class AxesConfig:
    """Which axis of the mesh divides each logical axis of the parameters and activations; "": none.

    The examples of a batch are over data and fsdp, so that channels of activations can only be over tensor.
    """

    embed: str = setting("fsdp", "width of the parameters' residual stream; activations' is whole", choices=_ANY_AXIS)
    vocab: str = setting("tensor", "vocabulary", choices=_ANY_AXIS)
    mlp: str = setting("tensor", "hidden width of the MLPs", choices=_TENSOR_AXIS)
    heads: str = setting("tensor", "heads of attention", choices=_TENSOR_AXIS)
    kv: str = setting("", "channels of a head", choices=_TENSOR_AXIS)
    latent: str = setting("", "channels of a latent", choices=_ANY_AXIS)
    time: str = setting("", "the time embedding", choices=_ANY_AXIS)

    def validate(self) -> None:
        check(self, "config.train.axes.")

    def check_together(self, prefix: str) -> None:
        for name, others in {"embed": ("vocab", "mlp", "heads", "latent", "time"), "heads": ("kv",)}.items():
            value = getattr(self, name)
            shared = [other for other in others if value and getattr(self, other) == value]
            require(not shared, f"{prefix}{name}", value, f"another axis than that of {', '.join(shared)}")


def _is_source(value) -> bool:
    """Whether ``value`` is a path, or names a path for each of some groups."""
    return isinstance(value, str) or all(isinstance(x, str) and x for pair in value.items() for x in pair)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop around the steps."""

    log_every: int = setting(20, "steps between lines of the log", at_least=1)
    eval_every: int = setting(200, "steps between evaluations", at_least=1)
    eval_batches: int = setting(4, "held-out batches of an evaluation", at_least=1)
    sample_every: int = setting(0, "steps between generated samples in the last stage; 0: at the end only", at_least=0)
    num_samples: int = setting(4, "texts generated each time", at_least=0)
    checkpoint_every: int = setting(200, "steps between checkpoints", at_least=1)
    checkpoint_minutes: float = setting(0.0, "and minutes since the last one; 0: any number", at_least=0)
    keep_checkpoints: int = setting(3, "newest checkpoints that are kept", at_least=1)
    milestone_steps: tuple[int, ...] = setting(
        (), "checkpoints after these steps of a stage are kept for good", at_least=1
    )
    milestone_exaflops: tuple[float, ...] = setting((), "and the first ones at these EFLOPs", above=0)
    compute_dtype: str = setting("float32", "of activations", choices=("float32", "bfloat16"))
    init_from: str | dict = setting(
        "",
        "a run's directory or a released checkpoint whose parameters the run begins from; {group: path}: some groups",
        where=(_is_source, "a path, or a path for each of some groups"),
    )
    mesh_data: int = setting(
        0, "devices along the mesh's data axis; 0 (one axis at most): all that are left", at_least=0
    )
    mesh_fsdp: int = setting(1, "devices along the fsdp axis; 0: all that are left", at_least=0)
    mesh_tensor: int = setting(1, "devices along the tensor axis; 0: all that are left", at_least=0)
    axes: AxesConfig = AxesConfig()
    hang_timeout: float = setting(
        0.0, "seconds without the end of a step (the first one compiles) that end a process; 0: never", at_least=0
    )
    peak_flops: float = setting(0.0, "FLOP/s of a device in bfloat16, for the MFU; 0: known devices only", at_least=0)

    def check_together(self, prefix: str) -> None:
        axes = (self.mesh_data, self.mesh_fsdp, self.mesh_tensor)
        require(axes.count(0) <= 1, f"{prefix}mesh_*", axes, "at most one axis of 0 (all devices that are left)")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How the run generates its samples and its closing report; families add what is theirs."""

    max_new_tokens: int = setting(64, "budget of new tokens; the prompt does not count", at_least=1)
    temperature: float = setting(0.0, "0: the most likely token of each position", at_least=0, at_most=100)
    repetition_penalty: float = setting(1.0, "of tokens that were generated before; 1: none", above=0)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The evaluations at the end of a run."""

    evaluators: tuple[str, ...] = setting((), "by name; empty: those that suit the run's family and corpus")
    count: int = setting(256, "generated texts or held-out documents of each; 0: no report", at_least=0)
    scorer: str = setting("", "evaluator 'perplexity': run whose family scores the generated texts; '': none")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of any family; a family's own config adds the groups of its model and stages."""

    family: str = setting("", "of models")
    seed: int = setting(0, "of everything that is drawn", at_least=0)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def data_seed(self) -> int:
        """Seed of the order of the data and of the stories."""
        return self.seed if self.data.seed is None else self.data.seed

    def validate(self) -> None:
        """Raises UserError for the first field that is out of range or at odds with another."""
        check(self, "config.")

    def check_together(self, prefix: str) -> None:
        """Microbatches divide the batch; families add what their groups must have in common."""
        need = f"a divisor of data.batch_size = {self.data.batch_size}"
        for field in dataclasses.fields(self):
            group = getattr(self, field.name)
            if isinstance(group, OptimizerConfig):
                fits = self.data.batch_size % group.accumulation == 0
                require(fits, f"{prefix}{field.name}.accumulation", group.accumulation, need)


def to_dict(config) -> dict:
    """The nested plain dict of a config dataclass, as JSON holds it."""
    return _plain(dataclasses.asdict(config))


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value
