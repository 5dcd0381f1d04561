"""Converts a released checkpoint into a run's directory (Orbax), or a run into a released checkpoint.

    python launch/convert.py --from=released/cola --to=runs/cola
    python launch/convert.py --from=runs/cola --to=released/again
    python launch/convert.py --from=released/cola --to=runs/cola --mesh_fsdp=8     # sharded while it is read

The direction follows from what --from is. A directory made here is accepted wherever a run is; on the way back its
files are those that it came from, byte for byte.
"""

from absl import flags

from cola_jax import cli, config, sharding
from cola_jax.evaluation import conversion
from cola_jax.train import saved
from cola_jax.types import UserError

_FROM = flags.DEFINE_string("from", None, "a released checkpoint, or the directory of a run")
_TO = flags.DEFINE_string("to", None, "a directory that is new or empty")
_STEP = flags.DEFINE_integer("step", None, "to a released checkpoint: step of the run; default: the newest", 0)
_DTYPE = flags.DEFINE_string("dtype", None, "type of the tensors; default: float32, and on the way back what it was")
_EOS_ID = flags.DEFINE_integer("eos_id", -1, "to a run: end of text; default: from tokenizer.json", -1)
_PAD_ID = flags.DEFINE_integer("pad_id", -1, "to a run: padding; default: from tokenizer.json", -1)
_SHARD = flags.DEFINE_float("max_shard_gb", 50.0, "to a released checkpoint: largest weights file", 1e-6)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "to a released checkpoint: replace one that is there")
_MESH = {n: flags.DEFINE_integer(f"mesh_{n}", 1, "to a run: devices along this axis") for n in config.MESH_AXES}


def main() -> None:
    if not _FROM.value or not _TO.value:
        raise UserError(f"--{'to' if _FROM.value else 'from'} is missing: it must name a directory")
    source = str(saved.fetched(_FROM.value, "--from", _STEP.value))
    if not conversion.is_released(source):
        shard, overwrite = int(_SHARD.value * 1e9), _OVERWRITE.value
        conversion.to_released(source, _TO.value, _DTYPE.value, shard, overwrite, _STEP.value)
        return
    mesh = None
    if any(flag.value != 1 for flag in _MESH.values()):
        mesh = sharding.make_mesh(config.TrainConfig(**{f"mesh_{axis}": flag.value for axis, flag in _MESH.items()}))
    conversion.to_run(source, _TO.value, _DTYPE.value or "float32", mesh, _EOS_ID.value, _PAD_ID.value)


if __name__ == "__main__":
    cli.run(main)
