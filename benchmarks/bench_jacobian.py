"""The Jacobian: dense against the time to write it, O(K) methods at a million classes, eigenvalues against LAPACK.

Rows whose name ends in MiB compare bytes of temporary memory: read MiB for ms. Rows whose name begins with "exponent"
fit time ~ K^e over the sizes named: ours is e, theirs the e of the theory.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import Row, benchmark
from benchmarks.timing import compare, run_time, temp_bytes
from jaxsoftmax import SoftmaxJacobian, softmax_jacobian

MILLION = 1_000_000


def logits(*shape: int) -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(0), shape)


def write(x: jax.Array) -> jax.Array:
    """An output of the Jacobian's size, and nothing else."""
    return jnp.broadcast_to(x[..., None, :1], (*x.shape, x.shape[-1]))


def autodiff(jacobian: Callable, x: jax.Array) -> Callable:
    return jax.jit(jacobian(jax.nn.softmax) if x.ndim == 1 else jax.vmap(jacobian(jax.nn.softmax)))


@benchmark("dense_jacobian")
def dense() -> Iterator[Row]:
    ours = jax.jit(softmax_jacobian)
    for shape in (256,), (2048,), (8192,), (256, 512):
        x, rounds = logits(*shape), 5 if shape == (8192,) else 11
        times = compare({"ours": ours, "theirs": jax.jit(write)}, (x,), rounds)
        yield times.row("dense, against writing it", shape, 1.15)
        for jacobian in jax.jacrev, jax.jacfwd:
            times = compare({"ours": ours, "theirs": autodiff(jacobian, x)}, (x,), rounds)
            yield times.row(f"dense, against {jacobian.__name__} of jax.nn.softmax", shape, None)


METHODS: dict[str, Callable] = {
    "quadratic_form": lambda J, v: J.quadratic_form(v),
    "trace": lambda J, v: J.trace(),
    "frobenius_norm": lambda J, v: J.frobenius_norm(),
    "pinv_mv": lambda J, v: J.pinv_mv(v),
    "solve": lambda J, v: J.solve(v, 0.1),
    "logdet": lambda J, v: J.logdet(0.1),
    "factor_mv": lambda J, v: J.factor_mv(v),
    "spectral_norm": lambda J, v: J.spectral_norm(),
    "sample": lambda J, v: J.sample(jax.random.key(0)),
}


def mv(J: SoftmaxJacobian, v: jax.Array) -> jax.Array:
    return J.mv(v)


@benchmark("jacobian_operator")
def operator() -> Iterator[Row]:
    x, v = logits(MILLION), jnp.flip(logits(MILLION))
    J, (_, pullback) = SoftmaxJacobian.from_logits(x), jax.vjp(jax.nn.softmax, x)
    ours = jax.jit(lambda x, v: SoftmaxJacobian.from_logits(x).mv(v))
    theirs = jax.jit(lambda x, v: jax.vjp(jax.nn.softmax, x)[1](v))
    yield compare({"ours": ours, "theirs": theirs}, (x, v)).row("from_logits + mv, against VJP", MILLION, 1.3)
    apply = jax.jit(lambda J, pullback, v: J.mv(v)), jax.jit(lambda J, pullback, v: pullback(v))
    times = compare(dict(zip(("ours", "theirs"), apply)), (J, pullback, v))
    yield times.row("mv, against the pullback", MILLION, 1.3)
    for name, method in METHODS.items():
        times = compare({"ours": jax.jit(method), "theirs": jax.jit(mv)}, (J, v), rounds=5)
        yield times.row(f"{name}, against mv", MILLION, None)
    for name, method in {"mv": mv, **METHODS}.items():
        temp, size = temp_bytes(method, J, v) / 2**20, 4 * MILLION / 2**20
        yield Row(f"{name}, against p, temp MiB", str(MILLION), temp, size, temp / size, None)


@benchmark("jacobian_spectrum")
def eigenvalues() -> Iterator[Row]:
    ours, theirs = jax.jit(lambda J: J.eigvalsh()), jax.jit(lambda J: jnp.linalg.eigvalsh(J.as_matrix()))
    for k, goal in (1024, None), (4096, 0.1):
        times = compare({"ours": ours, "theirs": theirs}, (SoftmaxJacobian.from_logits(logits(k)),), rounds=3)
        yield times.row("eigvalsh, against dense", k, goal)


def exponent(method: Callable, sizes: tuple[int, ...]) -> float:
    """e of time ~ K^e, by least squares over the medians of interleaved rounds."""
    jitted = jax.jit(method)
    args = [(SoftmaxJacobian.from_logits(logits(k)), logits(k)) for k in sizes]
    for a in args:
        run_time(jitted, a)
    rounds = [[run_time(jitted, a) for a in args] for _ in range(5)]
    return float(np.polyfit(np.log(sizes), np.log(np.median(rounds, 0)), 1)[0])


@benchmark("jacobian_cost")
def cost() -> Iterator[Row]:
    linear, square = tuple(2**i for i in range(17, 23)), tuple(2**i for i in range(8, 13))
    for name, method in {"mv": mv, **METHODS}.items():
        e = exponent(method, linear)
        yield Row(f"exponent of {name}", f"2^17..2^{int(math.log2(linear[-1]))}", e, 1.0, e, 1.15)
    e = exponent(lambda J, v: J.eigvalsh(), square)
    yield Row("exponent of eigvalsh", "2^8..2^12", e, 2.0, e / 2, 1.15)
