"""What tracing and compiling the cross-entropy takes, against optax's."""

from collections.abc import Iterator

import jax
import optax

import jaxsoftmax
from benchmarks import Row, benchmark
from benchmarks.bench_heads import arguments
from benchmarks.timing import compare, compile_time

NAME = "softmax_cross_entropy_with_integer_labels"


def value_and_grad(loss):
    return jax.value_and_grad(lambda logits, labels: loss(logits, labels).mean())


@benchmark("compile")
def compile_cross_entropy() -> Iterator[Row]:
    """From a jitted function to an executable; optax's is plain jnp, without rules of its own."""
    both = {who: value_and_grad(getattr(of, NAME)) for who, of in (("ours", jaxsoftmax), ("theirs", optax))}
    times = compare(both, arguments((128, 64), "labels"), rounds=21, measure=compile_time)
    yield times.row("cross-entropy trace+compile", (128, 64), goal=1.25)
