"""What training needs on devices that are not there: memory, FLOPs, tokens per second, traffic between devices.

The steps of a config are compiled ahead of time for a described slice or node. TPU slices are compiled by the TPU
compiler itself, which needs no TPU (`pip install libtpu`); GPUs, and TPUs where it is not installed, by XLA's CPU
compiler for as many virtual devices.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from cola_jax import families, sharding
from cola_jax.config import Config
from cola_jax.data import pipeline
from cola_jax.nn import attention
from cola_jax.train import collectives, devices, step
from cola_jax.train import state as states
from cola_jax.types import PyTree, UserError


class Chip(NamedTuple):
    """One device: its kind (see `devices.PEAK_FLOPS`), memory in bytes (data sheets), whether it is a TPU, its links.

    ``links`` is what all links of a chip to the others of its slice or node send together, bytes/s in one direction.
    """

    kind: str
    memory: float
    tpu: bool
    links: float

    @property
    def flops(self) -> float:
        """Peak bfloat16 FLOP/s."""
        return devices.peak_flops(self.kind)


# Links: half of the bidirectional bandwidth in the makers' tables. TPUs: cloud.google.com/tpu/docs/v5e (400 GB/s; in
# older editions 1600 Gbps of one direction), v5p (1200), v6e (800), v4 (2400 Gbps of one direction). NVLink: data
# sheets of A100 (600), H100 and H200 SXM (900), B200 (1800).
CHIPS = {
    "v4": Chip("TPU v4", 32 * 2**30, True, 300e9),
    "v5e": Chip("TPU v5e", 16 * 2**30, True, 200e9),
    "v5p": Chip("TPU v5", 95 * 2**30, True, 600e9),
    "v6e": Chip("TPU v6", 32 * 2**30, True, 400e9),
    "a100": Chip("NVIDIA A100", 80e9, False, 300e9),
    "h100": Chip("NVIDIA H100", 80e9, False, 450e9),
    "h200": Chip("NVIDIA H200", 141e9, False, 450e9),
    "b200": Chip("NVIDIA B200", 180e9, False, 900e9),
}


class Cluster(NamedTuple):
    """A described slice or node: its chips and their number; ``shape`` is a TPU slice's."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class Report(NamedTuple):
    """What one stage needs, on the device that needs most; bytes.

    Attributes:
      stage: its number, from 1.
      parameters: of the groups that the stage holds.
      state: parameters, moments, average, frozen trees.
      batch: tokens of a step.
      peak: of the compiled training step, state and batch included; None where it does not fit and the compiler gave
        no number.
      evaluation_peak: of the evaluation step, with the whole state beside it; None as for ``peak``.
      fits: whether both are below the chip's memory.
      flops_per_token: by the cost model (`Stage.flops_per_token`).
      compiler: "TPU" or "CPU".
      seconds: compilation took.
      collectives: bytes that a device sends in a training step, by kind (`collectives.count`); None where the compiler
        made no program.
    """

    stage: int
    parameters: int
    state: int
    batch: int
    peak: int | None
    evaluation_peak: int | None
    fits: bool
    flops_per_token: float
    compiler: str
    seconds: float
    collectives: dict[str, float] | None


def parse_cluster(text: str) -> Cluster:
    """``v5e:4x4``, ``v4:2x2x2``, ``h100:8``: chip and how many, or how they are laid out.

    Raises:
      UserError: an unknown chip, or no positive numbers.
    """
    name, _, size = text.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(
            f"--plan = {text}: must be CHIP:COUNT or CHIP:AxB, as v5e:4x4 or h100:8, with one of {', '.join(CHIPS)}"
        )
    return Cluster(text, CHIPS[name], tuple(int(part) for part in size.split("x")))


def has_tpu_compiler() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def prepare(cluster: Cluster) -> None:
    """Sets JAX up for the cluster; must come before JAX's first use of a device."""
    jax.config.update("jax_platforms", "cpu")
    if cluster.chip.tpu and has_tpu_compiler():
        # What the TPU's library would ask the machine for, and complain about where there is none.
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v4-16",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }.items():
            os.environ.setdefault(name, value)
    else:
        jax.config.update("jax_num_cpu_devices", cluster.count)


def describe_devices(cluster: Cluster) -> tuple[list, str]:
    """The cluster's devices, described or virtual, and the compiler that they have: "TPU" or "CPU"."""
    if not (cluster.chip.tpu and has_tpu_compiler()):
        return jax.devices("cpu")[: cluster.count], "CPU"
    try:
        options = {"chip_config_name": "megacore"} if cluster.name.startswith("v4") else {}  # its two cores as one
        topology = topologies.get_topology_desc(platform="tpu", topology_name=cluster.name, **options)
        return list(topology.devices), "TPU"
    except Exception as error:  # libtpu raises its own
        reason = " ".join(str(error).split())[:200]
        allowed = f"must be a slice that the TPU compiler knows ({reason})"
        raise UserError(f"--plan = {cluster.name}: {allowed}") from error


def _bytes(tree: PyTree) -> int:
    """Largest share of a device in a tree of abstract arrays with shardings."""

    def leaf(x):
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(leaf(x) for x in jax.tree.leaves(tree))


def _used(message: str) -> int | None:
    """Bytes that a program needs, from the TPU compiler's complaint that they are too many."""
    found = re.search(r"Used ([\d.]+)([KMG]) of", message)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]]) if found else None


def with_kernels(config: Config, platform: str) -> Config:
    """The config with the attention kernels that "auto" means on a platform, not on this machine's."""
    length = config.data.sequence_length // families.of(config).tokens_per_latent(config)
    chosen = {}
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        if hasattr(group, "attention_kernel"):
            kernel = attention.choose_kernel(group.attention_kernel, group.head_dim, length, platform)
            chosen[field.name] = dataclasses.replace(group, attention_kernel=kernel)
    return dataclasses.replace(config, **chosen)


def check_kernels(config: Config) -> None:
    """Raises UserError for an attention kernel that this machine cannot run."""
    platform = jax.default_backend()
    for field in dataclasses.fields(config):
        if getattr(getattr(config, field.name), "attention_kernel", "") == "splash" and platform != "tpu":
            need = f"'auto', 'xla' or 'splash_interpreted' on this machine's {platform}"
            raise UserError(f"config.{field.name}.attention_kernel = 'splash': must be {need}")


def _compile(lowered) -> tuple[int | None, bool, str | None]:
    """(bytes that a program needs, whether the compiler finds that they fit, its text if so)."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _used(str(error)), False, None
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return peak + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes, True, compiled.as_text()


def compile_step(config: Config, index: int, mesh: Mesh, chip: Chip, compiler: str) -> Report:
    """Compiles the steps of a stage, training and evaluation, for ``mesh`` and reports what they need.

    Nothing is computed.

    Args:
      config: whose model knows its vocabulary.
      index: of the stage, from 0.
      mesh: of described or virtual devices.
      chip: what one of them is.
      compiler: for the report.

    Raises:
      UserError: mesh and batch do not fit together.
    """
    family, config = families.of(config), with_kernels(config, "tpu" if compiler == "TPU" else "cpu")
    model = family.model(config)
    stage = family.stages(model, config)[index]
    sharding.check_batch(
        config.data.batch_size, stage.optimizer.accumulation, mesh, f"{stage.optimizer_field}.accumulation"
    )
    rules = sharding.make_rules(config.train.axes)
    target = states.abstract(states.make_init(family.init(model, config), stage), mesh, rules)
    home = sharding.batch_sharding(mesh)
    shapes = pipeline.shapes(config.data, config.data.batch_size)
    batch = {name: jax.ShapeDtypeStruct(*each, sharding=home) for name, each in shapes.items()}
    began = time.monotonic()
    train_step = step.make_train_step(stage, target, mesh, seed=config.seed, rules=rules)
    peak, fits, text = _compile(train_step.lower(target, batch))
    parts = stage.optimizer.accumulation
    evaluate = step.make_eval_step(stage.terms, mesh, seed=config.seed, rules=rules, microbatches=parts)
    read = (states.evaluation_params(target), target.frozen)
    evaluation_peak, evaluation_fits, _ = _compile(evaluate.lower(*read, batch, jax.ShapeDtypeStruct((), jnp.int32)))
    if evaluation_peak is not None:
        evaluation_peak += _bytes(target) - _bytes(read)
    return Report(
        stage=index + 1,
        parameters=sum(x.size for x in jax.tree.leaves(target.params)),
        state=_bytes(target),
        batch=math.prod(shapes["tokens"][0]),
        peak=peak,
        evaluation_peak=evaluation_peak,
        fits=fits and evaluation_fits and max(peak, evaluation_peak) <= chip.memory,
        flops_per_token=stage.flops_per_token,
        compiler=compiler,
        seconds=time.monotonic() - began,
        collectives=text and collectives.count(text),
    )


def describe(report: Report, cluster: Cluster, mfu: float) -> str:
    """The report in a few lines; tokens per second at a model FLOP utilisation of ``mfu``."""
    peak_flops = cluster.chip.flops
    rate = mfu * peak_flops * cluster.count / report.flops_per_token
    return (
        f"stage {report.stage}: {report.parameters:,} parameters, {report.batch:,} tokens a step\n"
        f"  per device: state {_gib(report.state)}, peak {_gib(report.peak)}, in evaluation "
        f"{_gib(report.evaluation_peak)}, of {cluster.chip.memory / 2**30:.1f} GiB: "
        f"{'fits' if report.fits else 'DOES NOT FIT'} ({report.compiler} compiler, {report.seconds:.0f} s)\n"
        f"  {report.flops_per_token / 1e9:.2f} GFLOP a token: {rate:,.0f} tokens/s, {report.batch / rate:.2f} s "
        f"a step, at {100 * mfu:.0f} % of {cluster.count} x {peak_flops / 1e12:.0f} TFLOP/s"
        f"{_describe_collectives(report, cluster)}"
    )


def _gib(size: int | None) -> str:
    return "more than there is" if size is None else f"{size / 2**30:.2f} GiB"


def utilisation_limits(report: Report, cluster: Cluster) -> tuple[float, float]:
    """The most that the links let the model FLOP utilisation be: where a device computes while it sends, and where not.

    All links of the chips are taken to be busy whenever one sends, and arithmetic to run at the peak rate.
    """
    sending = sum(report.collectives.values()) / cluster.chip.links
    computing = report.batch * report.flops_per_token / (cluster.count * cluster.chip.flops)
    return computing / max(computing, sending), computing / (computing + sending)


def _describe_collectives(report: Report, cluster: Cluster) -> str:
    """A line, or nothing where nothing is sent."""
    moved = {kind: size for kind, size in (report.collectives or {}).items() if size}
    if not moved:
        return ""
    kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in moved.items())
    at_once, apart = utilisation_limits(report, cluster)
    return (
        f"\n  collectives send {sum(moved.values()) / 1e9:.2f} GB a device and step ({kinds}): MFU at most "
        f"{100 * at_once:.0f} %, or {100 * apart:.0f} % if nothing is computed meanwhile, at "
        f"{cluster.chip.links / 1e9:.0f} GB/s"
    )


def show(config: Config, name: str, mfu: float, log: Callable[[str], None]) -> None:
    """Compiles the steps of each stage for described devices and logs what it needs.

    Args:
      config: of the run; a vocabulary that it leaves open is as large as the tokenizer may be.
      name: of the cluster (`parse_cluster`).
      mfu: model FLOP utilisation, for tokens per second.
      log: prints a line.

    Raises:
      UserError: the mesh does not use all devices, or a stage does not fit.
    """
    cluster = parse_cluster(name)
    family = families.of(config)
    config = family.resolve(config, config.data.vocab_size)
    prepare(cluster)
    devices, compiler = describe_devices(cluster)
    mesh = sharding.make_mesh(config.train, devices)
    if mesh.size != cluster.count:
        need = f"all {cluster.count} devices of --plan = {name}"
        raise UserError(f"config.train.mesh_* takes {mesh.size} devices: must take {need}")
    log(f"{cluster.name}: {cluster.count} devices, mesh {', '.join(f'{k} {v}' for k, v in mesh.shape.items())}")
    stages = family.stages(None, config)
    found = [
        compile_step(config, index, mesh, cluster.chip, compiler) for index, stage in enumerate(stages) if stage.steps
    ]
    for report in found:
        log(describe(report, cluster, mfu))
    if not all(report.fits for report in found):
        raise UserError(
            f"--plan = {name}: does not fit; more of config.train.mesh_fsdp, the optimizer's accumulation or the "
            "model's remat, or less of config.data.batch_size, may help"
        )
