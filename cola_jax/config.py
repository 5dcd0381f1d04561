"""Every setting of a run, as frozen dataclasses that check themselves.

`configs/*.py` build an `ml_collections.ConfigDict` (so that the command line can override fields);
`parse` converts it once into a `Config`. An unknown field, a value of the wrong type or an inconsistent
pair of values raises `UserError` with one line that names the field, the value and what it must be.
"""

import dataclasses
from collections.abc import Mapping

import ml_collections

from cola_jax.fields import build, require, require_at_least, require_choice, require_fraction


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


ATTENTION_KERNELS = ("auto", "xla", "splash", "splash_interpreted")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Text VAE (SPEC 2, 9). Options that the released checkpoints have keep their meaning and default."""

    vocab_size: int = 0  # V; 0: the tokenizer's. The embedding has one more row, the mask token
    dim: int = 64
    ffn_dim: int = 256  # with activation "swiglu" value and gate together
    num_heads: int = 4
    encoder_layers: int = 1
    decoder_layers: int = 1
    latent_dim: int = 16  # D
    patch_size: int = 1  # P
    block_size: int = 8  # K, for block-causal attention
    attention: str = "causal"  # causal | block_causal
    post_norm: bool = True
    qk_norm: bool = True  # over the whole width, before heads are split
    qk_norm_affine: bool = True
    qkv_bias: bool = False
    bias: bool = True  # of the other linear layers; those that make and undo patches always have one
    activation: str = "swiglu"  # swiglu | silu | gelu
    clip_qkv: float | None = None
    norm_affine: bool = True  # of the norm at the attention; the others always have scale and bias
    norm_eps: float = 1e-6
    rope_theta: float = 500_000.0
    rope_full_precision: bool = True  # False: rotations in the compute type
    normalize_mean: bool = True  # LayerNorm without affine on the posterior mean
    variational: bool = True  # False: no variance head, a deterministic autoencoder (always with that LayerNorm)
    logsnr: float | None = None  # None: learnable; a number: log(E[mean^2] / E[variance]) is fixed at it (16.2)
    attention_kernel: str = "auto"  # xla | splash (TPU) | splash_interpreted | auto: splash where it suits
    logit_chunk: int = 64  # positions of each sequence whose logits exist at one time in training; 0: all
    shift: float = 0.0  # latents are normalised as (z - shift) * scale
    scale: float = 1.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def validate(self) -> None:
        require_choice("vae", self, "attention", ("causal", "block_causal"))
        require_choice("vae", self, "attention_kernel", ATTENTION_KERNELS)
        require_at_least(
            1, "vae", self, "dim", "num_heads", "encoder_layers", "decoder_layers", "latent_dim", "patch_size"
        )
        require_at_least(1, "vae", self, "block_size")
        require_at_least(0, "vae", self, "vocab_size", "logit_chunk")
        require(self.dim % self.num_heads == 0, "vae.num_heads", self.num_heads, f"a divisor of dim = {self.dim}")
        require(self.head_dim % 2 == 0, "vae.num_heads", self.num_heads, "one that makes dim / num_heads even")
        require_choice("vae", self, "activation", ("swiglu", "silu", "gelu"))
        gated = self.activation == "swiglu"
        ok = self.ffn_dim >= 2 and self.ffn_dim % 2 == 0 if gated else self.ffn_dim >= 1
        require(ok, "vae.ffn_dim", self.ffn_dim, "an even number (value and gate)" if gated else "at least 1")
        require(self.scale != 0, "vae.scale", self.scale, "any number but 0")
        if self.logsnr is not None:
            require(self.normalize_mean, "vae.normalize_mean", False, "True where vae.logsnr is fixed")
            require(self.variational, "vae.variational", False, "True where vae.logsnr is fixed")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Block-causal diffusion transformer (SPEC 2, 9)."""

    latent_dim: int = 16  # D
    block_size: int = 8  # K
    dim: int = 128
    num_heads: int = 4
    head_dim: int = 32
    num_layers: int = 3
    mlp_ratio: int = 4
    time_dim: int = 128  # width of the time embedding that the modulations read
    rope_dim: int = 16  # channels of a head that are rotated
    rope_theta: float = 10_000.0
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    block_position: bool = False  # learned embedding of the index inside the block [ours]
    no_history_vector: bool = False  # marks blocks whose history was dropped [ours]
    attention_kernel: str = "auto"  # xla | splash (TPU) | splash_interpreted | auto: splash where it suits
    remat: str = "none"  # none | full | attention | dots: what the backward pass computes again (`scan_layers`)
    unroll: int = 1  # layers compiled one after another; all of them: longer compilation, 13 % less work a step

    def validate(self) -> None:
        require_at_least(
            1, "dit", self, "latent_dim", "block_size", "dim", "num_heads", "head_dim", "num_layers", "mlp_ratio"
        )
        require_at_least(1, "dit", self, "time_dim", "unroll")
        require_choice("dit", self, "remat", ("none", "full", "attention", "dots"))
        require_choice("dit", self, "attention_kernel", ATTENTION_KERNELS)
        require(
            0 <= self.rope_dim <= self.head_dim and self.rope_dim % 2 == 0,
            "dit.rope_dim",
            self.rope_dim,
            f"an even number of at most head_dim = {self.head_dim}",
        )


@dataclasses.dataclass(frozen=True)
class Stage1Config:
    """Text VAE alone (3.16)."""

    steps: int = 300
    kl_weight: float = 1e-3  # beta; the KL is summed over the D channels of a latent
    mask_weight: float = 0.1  # lambda_mask
    mask_ratio: float = 0.3  # share of the input tokens that is replaced by the mask token
    noisy_decoding: float = 0.5  # share of the sequences that is decoded from z_t [ours]
    noisy_decoding_max_time: float = 0.3  # with t uniform from 0 to this

    def validate(self) -> None:
        require_at_least(0, "stage1", self, "steps", "kl_weight", "mask_weight")
        require_fraction("stage1", self, "mask_ratio", "noisy_decoding", "noisy_decoding_max_time")


@dataclasses.dataclass(frozen=True)
class Stage2Config:
    """VAE and DiT together (3.18, SPEC 3 and 4)."""

    steps: int = 1000
    strategy: str = "fix_vae"  # joint | fix_vae | scratch | interval
    vae_learning_rate_ratio: float = 1.0
    interval: int = 0  # strategy "interval": joint steps, then as many with the VAE frozen
    vae_weight: float = 1.0  # lambda_VAE
    entropy_weight: float = 1e-3  # beta, on E_q[log q]
    mask_weight: float = 0.1  # lambda_mask
    mask_ratio: float = 0.3
    flow_weight: float = 1.0  # lambda_fm
    reference_weight: float = 0.01  # lambda_ref
    encoder_gradient: bool = True  # gradient of the flow-matching loss into the encoder, through z_t and the target
    time_distribution: str = "logit_normal"  # logit_normal | uniform
    time_loc: float = 1.0
    time_scale: float = 1.0
    time_per: str = "block"  # block | sequence
    prompt_blocks: float = 0.05  # share of the blocks that keep a random proper prefix clean
    history_dropout: float = 0.0  # share of the blocks that see no history
    noise_copies: int = 1  # noisy copies for each clean pass

    def validate(self) -> None:
        require_choice("stage2", self, "strategy", ("joint", "fix_vae", "scratch", "interval"))
        require_choice("stage2", self, "time_distribution", ("logit_normal", "uniform"))
        require_choice("stage2", self, "time_per", ("block", "sequence"))
        require_at_least(0, "stage2", self, "steps", "vae_weight", "mask_weight", "flow_weight", "reference_weight")
        require_at_least(0, "stage2", self, "vae_learning_rate_ratio", "entropy_weight")
        require_at_least(1, "stage2", self, "noise_copies")
        require_fraction("stage2", self, "mask_ratio", "prompt_blocks", "history_dropout")
        require(self.time_scale > 0, "stage2.time_scale", self.time_scale, "a positive number")
        if self.strategy == "interval":
            require(self.interval >= 1, "stage2.interval", self.interval, "at least 1 (strategy = 'interval')")


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
    """How the run generates its samples and its closing report."""

    steps: int = 16
    guidance_scale: float = 2.0
    max_new_tokens: int = 64
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    pad_prompts: bool = False  # fill a prompt's last block with padding that the model sees, as released code does
    report_stories: int = 0  # corpus "stories": generated for the report at the end of the run; 0: no report

    def validate(self) -> None:
        require_at_least(1, "sample", self, "steps", "max_new_tokens")
        require_at_least(0, "sample", self, "guidance_scale", "temperature", "report_stories")
        require(self.repetition_penalty > 0, "sample.repetition_penalty", self.repetition_penalty, "a positive number")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    data: DataConfig = DataConfig()
    vae: VAEConfig = VAEConfig()
    dit: DiTConfig = DiTConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    optimizer1: OptimizerConfig = OptimizerConfig()
    optimizer2: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()

    def validate(self) -> None:
        """Raises UserError for the first field that is out of range or at odds with another."""
        require(self.seed >= 0, "seed", self.seed, "a number of at least 0")
        for name in ("data", "vae", "dit", "stage1", "stage2", "train", "sample"):
            getattr(self, name).validate()
        self.optimizer1.validate("optimizer1")
        self.optimizer2.validate("optimizer2")
        require(
            self.dit.latent_dim == self.vae.latent_dim,
            "dit.latent_dim",
            self.dit.latent_dim,
            f"vae.latent_dim = {self.vae.latent_dim}",
        )
        tokens_per_block = self.dit.block_size * self.vae.patch_size
        require(
            self.data.sequence_length % tokens_per_block == 0,
            "data.sequence_length",
            self.data.sequence_length,
            f"a multiple of dit.block_size * vae.patch_size = {tokens_per_block}",
        )
        require(
            self.vae.attention == "causal" or self.dit.block_size % self.vae.block_size == 0,
            "vae.block_size",
            self.vae.block_size,
            f"a divisor of dit.block_size = {self.dit.block_size}",
        )
        require(
            self.data.align % self.vae.patch_size == 0,
            "data.align",
            self.data.align,
            f"a multiple of vae.patch_size = {self.vae.patch_size}",
        )
        for name in ("optimizer1", "optimizer2"):
            accumulation = getattr(self, name).accumulation
            require(
                self.data.batch_size % accumulation == 0,
                f"{name}.accumulation",
                accumulation,
                f"a divisor of data.batch_size = {self.data.batch_size}",
            )
        self._validate_strategy()

    def _validate_strategy(self) -> None:
        strategy, pretrained = self.stage2.strategy, self.stage1.steps > 0 or bool(self.train.init_from)
        if self.stage2.steps and strategy in ("joint", "fix_vae"):
            require(pretrained, "stage1.steps", 0, f"at least 1 (stage2.strategy = {strategy!r} starts from stage 1)")
        if strategy == "scratch":
            require(not self.stage1.steps, "stage1.steps", self.stage1.steps, "0 (stage2.strategy = 'scratch')")
            allowed = "'' (stage2.strategy = 'scratch')"
            require(not self.train.init_from, "train.init_from", self.train.init_from, allowed)
        if not pretrained and strategy in ("scratch", "interval"):
            weight = self.stage2.reference_weight
            require(weight == 0, "stage2.reference_weight", weight, "0 where there is no stage 1 to refer to")
        require(
            not self.stage2.history_dropout or self.dit.no_history_vector,
            "dit.no_history_vector",
            False,
            "True where stage2.history_dropout > 0 (a dropped history must be distinguished from a first block)",
        )


def parse(values: Mapping | ml_collections.ConfigDict) -> Config:
    """A validated `Config` from a ConfigDict or any nested mapping; absent fields keep their defaults.

    Raises:
      UserError: an unknown field, a wrong type, an inconsistent value.
    """
    plain = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else dict(values)
    config = build(Config, plain)
    config.validate()
    return config


def to_dict(config) -> dict:
    """The nested plain dict of a config dataclass, as JSON can hold it."""
    return dataclasses.asdict(config)


def default() -> dict:
    """Every field with its default, as a nested dict: what `configs/*.py` start from."""
    return to_dict(Config())
