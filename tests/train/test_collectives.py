"""Bytes of collectives: of programs whose bytes are known, and of text as the TPU compiler writes it."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from cola_jax import sharding
from cola_jax.config import TrainConfig
from cola_jax.train import collectives

SIZE = (16, 24)
BYTES = 4 * math.prod(SIZE)


def all_gather(x):
    return jax.lax.all_gather(x, "fsdp", tiled=True)[: len(x)] * 2


def reduce_scatter(x):
    return jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), (4, 1))


def all_reduce(x):
    return jax.lax.psum(x, "fsdp")


def all_to_all(x):
    return jax.lax.all_to_all(x.reshape(4, -1), "fsdp", 0, 0).reshape(x.shape)


def permute(x):
    return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])


@functools.cache
def mesh():
    return sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=4))


@pytest.mark.parametrize(
    ("function", "kind", "whole"),
    [
        (all_gather, "all-gather", 3 / 4 * 4 * BYTES),  # four parts of this size, of which a device has one
        (reduce_scatter, "reduce-scatter", 3 / 4 * BYTES),
        (all_reduce, "all-reduce", 2 * 3 / 4 * BYTES),
        (all_to_all, "all-to-all", 3 / 4 * BYTES),
        (permute, "collective-permute", BYTES),
    ],
)
def test_a_loop_s_collectives_count_as_often_as_it_turns(function, kind, whole):
    """On groups of four of eight devices, five turns of an outer and three of an inner loop."""

    def turns(x):
        inner = lambda x, _: (function(x), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, None, 3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, 5)[0]

    part = PartitionSpec(("data", "fsdp"))
    mapped = jax.jit(jax.shard_map(turns, mesh=mesh(), in_specs=part, out_specs=part, check_vma=False))
    rows = jax.ShapeDtypeStruct((8 * SIZE[0], SIZE[1]), jnp.float32)
    found = collectives.count(mapped.lower(rows).compile().as_text())
    assert found == {name: 15 * whole if name == kind else 0 for name in collectives.KINDS}


TPU = """HloModule jit_traced

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum.1 = f32[] add(%a, %b)
}

%cond (p: (bf16[8,2], u32[])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(8), metadata={op_name="x"}
  %p = (bf16[8,2]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%body (p: (bf16[8,2], u32[])) -> (bf16[8,2], u32[]) {
  %p.2 = (bf16[8,2]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.2 = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.2), index=0
  %get-tuple-element.3 = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  %constant.2 = u32[]{:T(128)} constant(2)
  %add.2 = u32[]{:T(128)} add(%get-tuple-element.3, %constant.2)
  %start = (bf16[8,2]{1,0}, bf16[8,2]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%p.2), channel_id=1
  %done = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%start)
  ROOT %tuple.1 = (bf16[8,2]{1,0}, u32[]{:T(128)}) tuple(%done, %add.2)
}

%all-reduce-scatter.1 (x: f32[16]) -> f32[4] {
  %x = f32[16]{0} parameter(0)
  %all-reduce.1 = f32[16]{0} all-reduce(%x), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %slice.1 = f32[4]{0} dynamic-slice(%all-reduce.1)
}

%fused_computation.1 (y: f32[4]) -> f32[8] {
  %y = f32[4]{0} parameter(0)
  ROOT %ag.1 = f32[8]{0} all-gather(%y), channel_id=7, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
}

%fused_computation.2 (y: f32[4]) -> f32[8] {
  %y.2 = f32[4]{0} parameter(0)
  ROOT %ag.2 = f32[8]{0} all-gather(%y.2), channel_id=7, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
}

%wrapped (z: f32[4]) -> f32[16] {
  %z = f32[4]{0} parameter(0)
  ROOT %ag.3 = f32[16]{0} all-gather(%z), channel_id=8, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

ENTRY %main (q: bf16[8,2]) -> bf16[8,2] {
  %q = (bf16[8,2]{1,0}, u32[]) parameter(0)
  %while.1 = (bf16[8,2]{1,0}, u32[]) while(%q), condition=%cond, body=%body
  %fusion.1 = f32[4]{0} fusion(%while.1), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = f32[8]{0} fusion(%fusion.1), kind=kCustom, calls=%fused_computation.1
  %fusion.3 = f32[8]{0} fusion(%fusion.1), kind=kCustom, calls=%fused_computation.2
  %async.1 = ((f32[4]{0}), f32[16]{0}, s32[]) async-start(%fusion.1), calls=%wrapped
  ROOT %async.2 = f32[16]{0} async-done(%async.1), calls=%wrapped
}
"""


def test_the_text_of_the_tpu_compiler_is_read():
    found = collectives.count(TPU)
    assert found["collective-permute"] == 4 * 32  # counts by 2 to 8; 8 x 2 numbers of bfloat16
    assert found["reduce-scatter"] == 3 / 4 * 64 and found["all-reduce"] == 0
    assert found["all-gather"] == 1 / 2 * 32 + 3 / 4 * 64  # the first one goes on in a second fusion
