"""What a training step needs on devices that are not there: memory, FLOPs, tokens per second.

The step of a config is compiled ahead of time for a described slice or node. TPU slices are compiled by the TPU
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
from cola_jax.nn import attention
from cola_jax.train import devices, step
from cola_jax.train import state as states
from cola_jax.types import PyTree, UserError


class Chip(NamedTuple):
    """One device: its kind (see `devices.PEAK_FLOPS`), memory in bytes (data sheets), and whether it is a TPU."""

    kind: str
    memory: float
    tpu: bool

    @property
    def flops(self) -> float:
        """Peak bfloat16 FLOP/s."""
        return devices.peak_flops(self.kind)


CHIPS = {
    "v4": Chip("TPU v4", 32 * 2**30, True),
    "v5e": Chip("TPU v5e", 16 * 2**30, True),
    "v5p": Chip("TPU v5", 95 * 2**30, True),
    "v6e": Chip("TPU v6", 32 * 2**30, True),
    "a100": Chip("NVIDIA A100", 80e9, False),
    "h100": Chip("NVIDIA H100", 80e9, False),
    "h200": Chip("NVIDIA H200", 141e9, False),
    "b200": Chip("NVIDIA B200", 180e9, False),
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
    """What one stage's step needs, on the device that needs most; bytes.

    Attributes:
      stage: its number, from 1.
      parameters: of the groups that the stage holds.
      state: parameters, moments, average, frozen trees.
      batch: tokens of a step.
      peak: of the compiled program, state and batch included; None where it does not fit and the compiler gave no
        number.
      fits: whether the peak is below the chip's memory.
      flops_per_token: by the cost model (`Stage.flops_per_token`).
      compiler: "TPU" or "CPU".
      seconds: compilation took.
    """

    stage: int
    parameters: int
    state: int
    batch: int
    peak: int | None
    fits: bool
    flops_per_token: float
    compiler: str
    seconds: float


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


def compile_step(config: Config, index: int, mesh: Mesh, chip: Chip, compiler: str) -> Report:
    """Compiles the training step of a stage for ``mesh`` and reports what it needs; nothing is computed.

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
    row = jax.ShapeDtypeStruct((config.data.batch_size, config.data.sequence_length), jnp.int32, sharding=home)
    train_step = step.make_train_step(stage, target, mesh, seed=config.seed, rules=rules)
    began, peak, fits = time.monotonic(), None, False
    try:
        compiled = train_step.lower(target, dict.fromkeys(("tokens", "segment_ids"), row)).compile()
        memory = compiled.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        fits = peak <= chip.memory
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak = _used(str(error))
    return Report(
        stage=index + 1,
        parameters=sum(x.size for x in jax.tree.leaves(target.params)),
        state=_bytes(target),
        batch=row.size,
        peak=peak,
        fits=fits,
        flops_per_token=stage.flops_per_token,
        compiler=compiler,
        seconds=time.monotonic() - began,
    )


def describe(report: Report, cluster: Cluster, mfu: float) -> str:
    """The report in a few lines; tokens per second at a model FLOP utilisation of ``mfu``."""
    gib, peak_flops = 2**30, cluster.chip.flops
    rate = mfu * peak_flops * cluster.count / report.flops_per_token
    peak = "more than there is" if report.peak is None else f"{report.peak / gib:.2f} GiB"
    return (
        f"stage {report.stage}: {report.parameters:,} parameters, {report.batch:,} tokens a step\n"
        f"  per device: state {report.state / gib:.2f} GiB, peak {peak} of {cluster.chip.memory / gib:.1f} GiB: "
        f"{'fits' if report.fits else 'DOES NOT FIT'} ({report.compiler} compiler, {report.seconds:.0f} s)\n"
        f"  {report.flops_per_token / 1e9:.2f} GFLOP a token: {rate:,.0f} tokens/s, {report.batch / rate:.2f} s "
        f"a step, at {100 * mfu:.0f} % of {cluster.count} x {peak_flops / 1e12:.0f} TFLOP/s"
    )


def show(config: Config, name: str, mfu: float, log: Callable[[str], None]) -> None:
    """Compiles the step of each stage for described devices and logs what it needs.

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
