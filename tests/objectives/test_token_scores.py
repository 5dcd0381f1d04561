"""Cross-entropy in chunks: equal to the plain one, and never the logits of a whole batch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import VOCAB, abstract, apply, assert_close, assert_trees_close, create, normal, tokens

from cola_jax import families, rng
from cola_jax.models import cola
from cola_jax.objectives import common, stage1, stage2
from configs import paper_2b


@pytest.mark.parametrize(("length", "patch", "chunk"), [(12, 1, 4), (7, 2, 3), (5, 1, 1)])
def test_chunks_change_neither_values_nor_gradients(length, patch, chunk):
    """Against NumPy on the whole logits, and against the gradient through them."""
    model, params = create({"patch_size": patch, "logit_chunk": chunk})
    plain, _ = create({"patch_size": patch, "logit_chunk": 0})
    z, targets = normal(2, length, 4), tokens(2, length * patch)
    segments = jnp.asarray(np.random.default_rng(length).integers(0, 3, (2, length)))
    weights = normal(2, length * patch, seed=3)

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(model, params, z):
        def total(params, z):
            scores = common.token_scores(model, params, z, targets, segments)
            return jnp.sum(weights * scores.cross_entropy), scores

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, z)

    (_, scores), gradients = evaluate(model, params, z)
    logits = np.asarray(apply(model, params, z, segments, method="decode"), np.float64)
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    assert_close(scores.cross_entropy, np.log(np.exp(logits).sum(-1)) - picked, 1e-5)
    np.testing.assert_array_equal(scores.accuracy, logits.argmax(-1) == targets)
    _, (expected, expected_z) = evaluate(plain, params, z)
    parts = [tree["params"]["vae"]["decoder"] for tree in (gradients[0], expected)]
    assert_trees_close(*parts, 1e-5)
    assert_close(gradients[1], expected_z, 1e-5)


def arrays(jaxpr):
    """Shapes of everything that a program computes, loops and branches included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


def largest_logits(model, config, terms, batch: int, length: int) -> int:
    """Elements of the largest array with an axis of the vocabulary in the gradient of a stage's loss."""
    row = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    params = abstract(model)

    def loss(params, tokens, segments, keys, reference):
        extra = (reference,) if terms is stage2.terms else ()
        stage = config.stage2 if terms is stage2.terms else config.stage1
        found = terms(model, stage, params, {"tokens": tokens, "segment_ids": segments}, keys, *extra)
        return sum(jnp.sum(term.value) for term in found.values())

    keys = jax.eval_shape(lambda: rng.key(0, "train", 0, jnp.arange(batch)))
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params, row, row, keys, params).jaxpr
    vocab = model.vae_config.vocab_size
    own = {math.prod(leaf.shape) for leaf in jax.tree.leaves(params)}  # weights, also transposed
    return max(size for shape in arrays(jaxpr) if vocab in shape and (size := math.prod(shape)) not in own)


JOINT = dataclasses.replace(families.cola.ColaConfig(), stage2=stage2.Stage2Config(strategy="joint"))


@pytest.mark.parametrize("terms", [stage1.terms, stage2.terms], ids=["stage1", "stage2"])
def test_logits_of_a_whole_batch_never_exist(terms):
    model, _ = create({"logit_chunk": 4})
    assert largest_logits(model, JOINT, terms, 3, 24) == 3 * 4 * VOCAB
    whole, _ = create({"logit_chunk": 0})
    assert largest_logits(whole, JOINT, terms, 3, 24) == 3 * 24 * VOCAB


def test_logits_of_a_whole_batch_never_exist_at_full_size():
    config = families.parse(paper_2b.get_config())
    model = cola.create(config.vae, config.dit, config.train.compute_dtype)
    rows, vocab = config.vae.logit_rows, config.vae.vocab_size
    assert 4 * config.vae.logit_chunk < rows  # so few rows that a chunk has more positions of each
    assert largest_logits(model, config, stage2.terms, 4, 512) == rows * vocab < 4 * 512 * vocab
