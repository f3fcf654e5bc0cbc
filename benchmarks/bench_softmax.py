"""The three maps against jax.nn: value, value with VJP, value with JVP."""

from collections.abc import Iterator

import jax

import jaxsoftmax
from benchmarks import Row, benchmark
from benchmarks.timing import compare

SIZES = (1024, 32768), (65536, 64), (8, 1_000_000)
THEIRS = {"softmax": jax.nn.softmax, "log_softmax": jax.nn.log_softmax, "logsumexp": jax.nn.logsumexp}


def modes(f):
    """The jitted ways to use `f(x, axis=-1)`, each a function of (x, tangent, cotangent)."""

    def value(x, tangent, cotangent):
        return f(x, axis=-1)

    def vjp(x, tangent, cotangent):
        out, pullback = jax.vjp(lambda x: f(x, axis=-1), x)
        return out, pullback(cotangent)

    def jvp(x, tangent, cotangent):
        return jax.jvp(lambda x: f(x, axis=-1), (x,), (tangent,))

    return {"value": jax.jit(value), "vjp": jax.jit(vjp), "jvp": jax.jit(jvp)}


def contest(name: str) -> Iterator[Row]:
    ours, theirs = modes(getattr(jaxsoftmax, name)), modes(THEIRS[name])
    for size in SIZES:
        k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
        x, tangent = 3 * jax.random.normal(k1, size), jax.random.normal(k2, size)
        cotangent = jax.random.normal(k3, size[:-1] if name == "logsumexp" else size)
        for mode in ours:
            goal = 1.3 if name == "softmax" and mode != "value" else 1.1
            times = compare({"ours": ours[mode], "theirs": theirs[mode]}, (x, tangent, cotangent))
            yield times.row(f"{name} {mode}", size, goal)


@benchmark("softmax")
def softmax() -> Iterator[Row]:
    return contest("softmax")


@benchmark("log_softmax")
def log_softmax() -> Iterator[Row]:
    return contest("log_softmax")


@benchmark("logsumexp")
def logsumexp() -> Iterator[Row]:
    return contest("logsumexp")
