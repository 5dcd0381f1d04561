"""Speed of generation and of the training step, against the rate of matrix multiplication of the same device.

Repetitions of what is measured alternate with the matrix multiplication, so that both see the same machine. Rates
are those of the fastest repetition.
"""

import dataclasses
import functools
import math
import resource
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cola_jax import families, rng, sharding
from cola_jax.config import Config
from cola_jax.train import state, step
from cola_jax.types import Params


def matmul(dtype: str, size: int, repeats: int) -> tuple[Callable[[], jax.Array], float]:
    """(a function that multiplies square matrices, its FLOPs a call)."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)) / np.sqrt(size), dtype)
    run = jax.jit(lambda a: jax.lax.fori_loop(0, repeats, lambda _, x: x @ a, a))
    return functools.partial(run, a), 2.0 * size**3 * repeats


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def measure(call: Callable[[], object], dtype: str, repeats: int) -> dict[str, float]:
    """Seconds of a call and FLOP/s of matrix multiplication.

    Returns:
      first_call_s (with compilation), seconds (the fastest of ``repeats`` more), matmul_flops (a second).
    """
    multiply, flops = matmul(dtype, *((1024, 10) if jax.default_backend() == "cpu" else (8192, 20)))
    first = _seconds(call)
    _seconds(multiply)
    times, rates = [], []
    for _ in range(repeats):
        rates.append(flops / _seconds(multiply))
        times.append(_seconds(call))
    return {"first_call_s": first, "seconds": min(times), "matmul_flops": max(rates)}


def count_flops(function: Callable, *args) -> float:
    """FLOPs of the matrix multiplications that a call of ``function`` makes, from its traced program.

    The compiler's own count takes the body of a loop once; here it counts as often as it runs. Of branches the most
    expensive counts. Nothing is computed: ``args`` may be shapes.

    Raises:
      ValueError: the program has a loop whose number of turns is not known before it runs.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            continue
        leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [_jaxpr_flops(part) for x in leaves if hasattr(part := getattr(x, "jaxpr", x), "eqns")]
        if name == "while" and sum(inner):
            raise ValueError("count_flops: a while loop that multiplies matrices has no known number of turns")
        total += (
            params["length"] * sum(inner)
            if name == "scan"
            else max(inner, default=0.0)
            if name == "cond"
            else sum(inner)
        )
    return total


def peak_memory() -> float:
    """Bytes: of the device where it tells, else the largest resident size of the process so far."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _report(what: str, found: dict, tokens: int, flops: float, **more) -> dict:
    rate = tokens / found["seconds"]
    return {
        "what": what,
        **more,
        "tokens_per_s": rate,
        "seconds": found["seconds"],
        "flops_per_token": flops,
        "flops_per_s": rate * flops,
        "matmul_flops_per_s": found["matmul_flops"],
        "share_of_matmul": rate * flops / found["matmul_flops"],
        "compile_s": found["first_call_s"] - found["seconds"],
        "peak_memory_bytes": peak_memory(),
        "device": jax.devices()[0].device_kind,
    }


def random_params(config: Config, dtype: str) -> Params:
    """Initial variables of a config's model, in the type of the computation."""
    family = families.of(config)
    init = family.init(family.model(config), config)

    @jax.jit
    def make(key):
        return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(init(key)))

    return make(jax.random.key(0))


def generation(config: Config, dtype: str, batch: int, prompt: int, settings, repeats: int) -> dict:
    """Speed of generation with random weights and prompts, all sequences to the end of their budget.

    Args:
      config: of any family, whose model knows its vocabulary.
      settings: of that family's generation.
    """
    family, config = families.of(config), _in_dtype(config, dtype)
    model, params = family.model(config), random_params(config, dtype)
    prompts = np.random.default_rng(0).integers(0, vocabulary(config), (batch, prompt)).tolist()

    def call():
        return family.generate(model, params, prompts, settings, key=jax.random.key(0)).tokens

    found = measure(call, dtype, repeats)
    flops, tokens = family.generation_flops(config, settings), batch * settings.max_new_tokens
    return _report("generation", found, tokens, flops, dtype=dtype, batch=batch, prompt=prompt)


def training(config: Config, dtype: str, batch: int, repeats: int) -> dict:
    """Speed of a step of the last stage with random weights and tokens."""
    family, config = families.of(config), _in_dtype(config, dtype)
    model, mesh = family.model(config), sharding.make_mesh(config.train)
    rules, stage = sharding.make_rules(config.train.axes), family.stages(model, config)[-1]
    make = state.make_init(family.init(model, config), stage)
    target = state.abstract(make, mesh, rules)
    train_step = step.make_train_step(stage, target, mesh, seed=0, rules=rules)
    shape = (batch, config.data.sequence_length)
    ids = np.random.default_rng(0).integers(0, vocabulary(config), shape, dtype=np.int32)
    current = [state.create(make, target, rng.key(0, "init"))]
    placed = sharding.put_batch(mesh, {"tokens": ids, "segment_ids": np.ones_like(ids)})

    def call():
        current[0], values = train_step(current[0], placed)
        return values

    found = measure(call, dtype, repeats)
    return _report("training", found, ids.size, stage.flops_per_token, dtype=dtype, batch=batch)


def vocabulary(config: Config) -> int:
    """Tokens that the model of a config knows; 0: the config leaves it to a tokenizer."""
    groups = [getattr(config, field.name) for field in dataclasses.fields(config)]
    return next(
        group.vocab_size for group in groups if hasattr(group, "attention_kernel") and hasattr(group, "vocab_size")
    )


def _in_dtype(config: Config, dtype: str) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=dtype))
