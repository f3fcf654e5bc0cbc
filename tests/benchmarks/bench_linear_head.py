"""The fused linear head against bare matrix products of the same work, and against optax on full logits.

Rows whose name ends in MiB compare bytes of temporary memory: read MiB for ms. `LINEAR_HEAD_GPU_SIZES=1` in the
environment adds the sizes of large models, in bfloat16.
"""

import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

from jaxsoftmax.linear_head import linear_softmax_cross_entropy_loss
from tests.benchmarks import Row, benchmark
from tests.benchmarks.timing import compare, temp_bytes

SIZES = (2048, 512, 32768), (2048, 512, 50257), (1024, 1024, 65536), (4096, 256, 128256)
GPU_SIZES = (32768, 2560, 128256), (8192, 2304, 256000)
ROUNDS = 5


def full(x, weights, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x @ weights, labels).sum()


def fused(x, weights, labels, token_weights=None):
    return linear_softmax_cross_entropy_loss(x, labels, weights, token_weights=token_weights)


def value_and_grad(loss):
    return jax.value_and_grad(loss, (0, 1))


def hvp(loss):
    def product(x, weights, labels):
        gradient = lambda x, weights: jax.grad(loss, (0, 1))(x, weights, labels)
        return jax.jvp(gradient, (x, weights), (x, weights))[1]

    return product


def bare_products():
    """xW, gWᵀ and xᵀg, each compiled on its own."""
    forward, to_x, to_weights = (jax.jit(f) for f in (lambda x, w: x @ w, lambda g, w: g @ w.T, lambda x, g: x.T @ g))

    def run(x, weights, _):
        g = forward(x, weights)
        return g, to_x(g, weights), to_weights(x, g)

    return run


def arguments(size, dtype=jnp.float32):
    n, d, v = size
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x, weights = jax.random.normal(k1, (n, d), dtype), jax.random.normal(k2, (d, v), dtype) / d**0.5
    return x, weights.astype(dtype), jax.random.randint(k3, (n,), 0, v)


def memory_row(name: str, size, ours, theirs, goal: float, args) -> Row:
    ours, theirs = (
        temp_bytes(ours, *args) / 2**20,
        (theirs if isinstance(theirs, float) else temp_bytes(theirs, *args) / 2**20),
    )
    return Row(f"{name} temp, MiB", "×".join(map(str, size)), ours, theirs, ours / theirs, goal)


def rows(size, dtype=jnp.float32) -> Iterator[Row]:
    args = arguments(size, dtype)
    ours = jax.jit(value_and_grad(fused))
    yield memory_row("value+grad, against 64 MiB,", size, value_and_grad(fused), 64.0, 1.0, args)
    yield memory_row("HVP, against full logits' bytes,", size, hvp(fused), size[0] * size[2] / 2**18, 0.25, args)
    contest = {"ours": ours, "theirs": bare_products()}
    yield compare(contest, args, ROUNDS).row("value+grad, against three products", size, goal=1.15)
    yield compare({"ours": ours, "theirs": jax.jit(value_and_grad(full))}, args, ROUNDS).row(
        "value+grad, against optax on full logits", size, goal=1.0
    )
    few = (jnp.arange(size[0]) % 10 == 0).astype(jnp.float32)
    skipping = jax.jit(value_and_grad(lambda *args: fused(*args, few)))
    yield compare({"ours": skipping, "theirs": ours}, args, ROUNDS).row("10 % valid, against all", size, goal=0.3)
    yield compare({"ours": jax.jit(hvp(fused)), "theirs": jax.jit(hvp(full))}, args, 3).row(
        "HVP, against full logits", size, goal=1.1
    )


@benchmark("linear_head")
def linear_head() -> Iterator[Row]:
    for size in SIZES:
        yield from rows(size)
    if os.environ.get("LINEAR_HEAD_GPU_SIZES"):
        for size in GPU_SIZES:
            args = arguments(size, jnp.bfloat16)
            contest = {"ours": jax.jit(value_and_grad(fused)), "theirs": bare_products()}
            yield memory_row("value+grad, against 5 GiB,", size, value_and_grad(fused), 5.0 * 1024, 1.0, args)
            yield compare(contest, args, ROUNDS).row("value+grad, against three products", size, goal=1.25)
