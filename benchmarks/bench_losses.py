"""The cross-entropies against optax: value with gradient, and what tracing and compiling that takes."""

from collections.abc import Iterator

import jax
import optax

import jaxsoftmax
from benchmarks import Row, benchmark
from benchmarks.timing import compare, compile_time

SIZES = (1024, 32768), (65536, 64)


def value_and_grad(loss):
    return jax.value_and_grad(lambda logits, labels: loss(logits, labels).mean())


def contestants(name: str):
    return {"ours": value_and_grad(getattr(jaxsoftmax, name)), "theirs": value_and_grad(getattr(optax, name))}


def logits_and_labels(size, *, integer: bool):
    k1, k2 = jax.random.split(jax.random.key(0))
    logits = 3 * jax.random.normal(k1, size)
    if integer:
        return logits, jax.random.randint(k2, size[:-1], 0, size[-1])
    return logits, jax.nn.softmax(jax.random.normal(k2, size))


def contest(name: str, *, integer: bool) -> Iterator[Row]:
    jitted = {who: jax.jit(fn) for who, fn in contestants(name).items()}
    for size in SIZES:
        args = logits_and_labels(size, integer=integer)
        yield compare(jitted, args).row(f"{name} value+grad", size, goal=1.1)


@benchmark("cross_entropy")
def cross_entropy() -> Iterator[Row]:
    yield from contest("softmax_cross_entropy", integer=False)
    yield from contest("softmax_cross_entropy_with_integer_labels", integer=True)


@benchmark("compile")
def compile_cross_entropy() -> Iterator[Row]:
    """From a jitted function to an executable; optax's is plain jnp, without rules of its own."""
    args = logits_and_labels((128, 64), integer=True)
    both = contestants("softmax_cross_entropy_with_integer_labels")
    yield compare(both, args, rounds=21, measure=compile_time).row("cross-entropy trace+compile", (128, 64), goal=1.25)
