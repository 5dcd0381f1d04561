"""The autoregressive model: its size, its maths, who depends on whom, its cache."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_autoregressive as tiny
from models.tiny_models import VOCAB, apply, assert_close, assert_trees_close, normal, tokens

from cola_jax import sharding
from cola_jax.config import TrainConfig
from cola_jax.fields import check
from cola_jax.models import autoregressive, transformer
from cola_jax.models.transformer import TransformerConfig
from cola_jax.train import optimizer
from cola_jax.types import UserError

PAPER = TransformerConfig(vocab_size=100_278, dim=2048, ffn_dim=8192, num_heads=16, head_dim=128, num_layers=27)
DOCUMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])


def test_the_papers_model_has_the_papers_size():
    """Table 9: core and embeddings."""
    check(PAPER, "transformer.")
    counts = transformer.count_parameters(tiny.boxed(autoregressive.create(PAPER)))
    assert counts.core == 1_811_939_328
    assert counts.embeddings == 410_738_688
    assert counts.rest == (2 * 27 + 1 + 1) * 2048  # norms, "begin"


def test_flops_are_two_for_each_weight_and_those_of_attention():
    counts = transformer.count_parameters(tiny.boxed(autoregressive.create(PAPER)))
    attention = 27 * 4 * (512 / 2) * 2048
    expected = 2 * (counts.core + counts.embeddings / 2) + attention
    assert transformer.forward_flops(PAPER, 512) == expected


@pytest.mark.parametrize("changes", [{}, {"norm": "layernorm", "qk_norm": True}, {"norm": "rmsnorm", "qk_norm": True}])
def test_logits_are_those_of_the_network_written_in_numpy(changes):
    model, params = tiny.create(**changes)
    rows = tokens(2, 9)
    logits = apply(model, params, rows, method="logits")
    assert logits.dtype == jnp.float32
    assert_close(logits, [tiny.reference(model.config, params, row) for row in np.asarray(rows)], 1e-5)


def test_bfloat16_is_close():
    model, params = tiny.create()
    rounded = apply(tiny.create("bfloat16")[0], params, tokens(2, 9), method="logits")
    exact = apply(model, params, tokens(2, 9), method="logits")
    assert rounded.dtype == jnp.float32 and np.any(rounded != exact)
    assert_close(rounded, exact, 0.05)


@functools.cache
def dependence():
    """segment_ids -> what the logits at each position depend on: [T, V] tokens, [T] the vector "begin"."""
    model, params = tiny.create()
    row = jnp.arange(DOCUMENTS.shape[1])[None]  # every token once, so that its embedding is its position's

    def outputs(own, segment_ids):
        variables = {"params": {"transformer": params["params"]["transformer"] | own}}
        return model.apply(variables, row, segment_ids, method="logits")[0] @ normal(VOCAB)

    jacobian = jax.jit(jax.jacrev(outputs))
    own = {name: params["params"]["transformer"][name] for name in ("wte", "begin")}
    return lambda segment_ids: {name: np.any(x != 0, axis=-1) for name, x in jacobian(own, segment_ids).items()}


@pytest.mark.parametrize("segment_ids", [jnp.ones_like(DOCUMENTS), DOCUMENTS], ids=["one", "three"])
def test_a_token_depends_on_earlier_ones_of_its_document_and_on_nothing_else(segment_ids):
    found, document = dependence()(segment_ids), np.asarray(segment_ids[0])
    index = np.arange(len(document))
    allowed = np.greater.outer(index, index) & np.equal.outer(document, document)
    np.testing.assert_array_equal(found["wte"][:, : len(index)], allowed)
    assert not np.any(found["wte"][:, len(index) :])
    assert np.all(found["begin"])


def test_documents_of_a_row_are_as_alone():
    model, params = tiny.create()
    row = tokens(1, 12)
    packed = apply(model, params, row, DOCUMENTS, method="logits")
    for begin, end in ((0, 5), (5, 9)):
        alone = apply(model, params, row[:, begin:end], method="logits")
        assert_close(packed[:, begin:end], alone, 1e-5)


@pytest.mark.parametrize("chunk", [4, 0])
def test_reduced_logits_are_those_of_the_whole_row(chunk):
    model, params = tiny.create(logit_chunk=chunk)
    row, weights = tokens(2, 10), normal(2, 10)

    def reduce(logits, tokens):
        return jnp.sum(jnp.sin(logits), axis=-1) * (1 + tokens)

    def chunked(params):
        return jnp.sum(weights * model.apply(params, row, reduce, method="logits_reduced"))

    def whole(params):
        return jnp.sum(weights * reduce(model.apply(params, row, method="logits"), row))

    assert_trees_close(*(jax.jit(jax.value_and_grad(f))(params) for f in (chunked, whole)), 1e-5)


@pytest.mark.parametrize(("piece", "changes"), [(1, {}), (3, {"norm": "layernorm", "qk_norm": True})])
def test_the_cache_gives_what_the_whole_row_gives(piece, changes):
    """Prompts of 0, 2 and 5 tokens in one batch."""
    model, params = tiny.create(**changes)
    row, lengths, total = tokens(3, 11), np.array([0, 2, 5]), 6
    whole = np.asarray(apply(model, params, row, method="logits"))
    real = jnp.asarray(np.arange(5)[None] < lengths[:, None], jnp.int32)
    prompts = jnp.where(real > 0, row[:, :5], 30)  # padding is not seen
    cache = apply(model, params, prompts, real, method="prefill")
    k, v = (np.pad(x, ((0, 0), (0, 0), (0, 0), (0, total), (0, 0)), constant_values=9.0) for x in cache)
    for begin in range(0, total, piece):
        positions = lengths[:, None] + np.arange(begin, begin + piece)[None]
        before = np.take_along_axis(np.asarray(row), np.maximum(positions - 1, 0), axis=1)
        before = jnp.asarray(np.where(positions > 0, before, VOCAB))
        earlier = jnp.asarray(np.arange(k.shape[3])[None] < positions[:, :1])
        arguments = (before, jnp.asarray(positions), (jnp.asarray(k), jnp.asarray(v)), earlier)
        logits, new = apply(model, params, *arguments, method="extend")
        assert_close(logits, whole[np.arange(3)[:, None], positions], 1e-5)
        for b, place in enumerate(positions):
            k[:, b, :, place], v[:, b, :, place] = (np.moveaxis(x[:, b], 2, 0) for x in new)


def test_every_matrix_and_no_vector_decays_and_every_axis_has_a_rule():
    boxed = tiny.boxed(tiny.create(qk_norm=True, norm="layernorm")[0])
    sharding.shardings(boxed, sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2)))
    decayed = {}
    for path, x in jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)):
        decayed[tuple(entry.key for entry in path[2:])] = optimizer.is_decayed(path, x)
    assert {name for name, yes in decayed.items() if yes} == {
        ("wte",),
        ("head", "kernel"),
        *(("layers", part, "kernel") for part in ("qkv", "out", "mlp_in", "mlp_out")),
    }
    assert ("begin",) in decayed and ("layers", "norm_q", "bias") in decayed


def test_initial_loss_is_about_that_of_a_uniform_guess():
    model = autoregressive.create(tiny.config(dim=64, num_layers=1))
    params = jax.jit(model.init)(jax.random.key(0), tokens(1, 4))
    logits = apply(model, params, tokens(8, 16), method="logits")
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])
    assert abs(loss - np.log(VOCAB)) < 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("head_dim", 5),
        ("norm", "batchnorm"),
        ("norm_eps", 0.0),
        ("rope_theta", -1.0),
        ("logit_chunk", -1),
        ("attention_kernel", "flash"),
        ("remat", "some"),
        ("unroll", 0),
    ],
)
def test_a_field_out_of_range_is_named(field, value):
    with pytest.raises(UserError, match=rf"transformer\.{field} = .*: must be "):
        check(TransformerConfig(**{field: value}), "transformer.")
