"""What tracing and compiling takes: the cross-entropy against optax's, rules of `custom_vjp` against those of JAX's."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax
from benchmarks import Row, benchmark
from benchmarks.bench_heads import arguments
from benchmarks.timing import compare, compile_time, trace_time
from jaxsoftmax.autodiff import custom_vjp

NAME = "softmax_cross_entropy_with_integer_labels"


def value_and_grad(loss):
    return jax.value_and_grad(lambda logits, labels: loss(logits, labels).mean())


@benchmark("compile")
def compile_cross_entropy() -> Iterator[Row]:
    """From a jitted function to an executable; optax's is plain jnp, without rules of its own."""
    both = {who: value_and_grad(getattr(of, NAME)) for who, of in (("ours", jaxsoftmax), ("theirs", optax))}
    times = compare(both, arguments((128, 64), "labels"), rounds=21, measure=compile_time)
    yield times.row("cross-entropy trace+compile", (128, 64), goal=1.25)


def softmax(decorator: Callable) -> Callable:
    f = decorator(lambda x: jax.nn.softmax(x))
    f.defvjp(lambda x: (lambda p: (p, p))(f(x)), lambda p, ct: (p * (ct - jnp.sum(p * ct, -1, keepdims=True)),))
    return lambda x, labels: jnp.sum(f(x) ** 2)


def loss(decorator: Callable) -> Callable:
    """Of logits and integer labels, with values that are not differentiated."""
    mean = lambda x, y, axis, scale: (
        scale * jnp.mean(jax.nn.logsumexp(x, axis) - jnp.take_along_axis(x, y[:, None], axis)[:, 0])
    )
    f = decorator(mean, nondiff_argnums=(2, 3))

    def bwd(axis, scale, residuals, ct):
        x, y = residuals
        return scale * ct / len(y) * (jax.nn.softmax(x, axis) - jax.nn.one_hot(y, x.shape[axis], dtype=x.dtype)), None

    f.defvjp(lambda x, y, axis, scale: (f(x, y, axis, scale), (x, y)), bwd)
    return lambda x, labels: f(x, labels, -1, 0.5)


def layers(decorator: Callable) -> Callable:
    """Of pytrees, with a residual that is neither argument nor result."""
    hidden = lambda params, x: jnp.tanh(x["x"] @ params["w"] + params["b"])
    f = decorator(lambda params, x: hidden(params, x) @ params["v"])

    def bwd(residuals, ct):
        params, x, h = residuals
        dh = ct @ params["v"].T * (1 - h * h)
        return {"w": x["x"].T @ dh, "b": dh.sum(0), "v": h.T @ ct}, {"x": dh @ params["w"].T}

    f.defvjp(lambda params, x: (f(params, x), (params, x, hidden(params, x))), bwd)
    weights = {"w": jnp.ones((64, 8)), "b": jnp.ones(8), "v": jnp.ones((8, 4))}
    return lambda x, labels: jnp.sum(f(weights, {"x": x}) ** 2)


def twenty_sines(decorator: Callable) -> Callable:
    f = decorator(lambda x: jnp.sin(x))
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * jnp.cos(x),))
    return lambda x, labels: jnp.sum(functools.reduce(lambda x, _: f(x), range(20), x))


@benchmark("trace")
def trace_gradients() -> Iterator[Row]:
    """The gradient of functions with a rule, to a jaxpr; with rules that exist, and with rules made while tracing."""
    both = {"ours": custom_vjp, "theirs": jax.custom_vjp}
    made = lambda make, decorator: lambda *args: jax.grad(make(decorator))(*args)
    for make in (softmax, loss, layers, twenty_sines):
        old = {who: jax.grad(make(decorator)) for who, decorator in both.items()}
        new = {who: made(make, decorator) for who, decorator in both.items()}
        for name, contestants in (("", old), (", new", new)):
            times = compare(contestants, arguments((128, 64), "labels"), rounds=41, measure=trace_time)
            yield times.row(f"gradient of {make.__name__.replace('_', ' ')}{name}: trace", (128, 64), goal=1.25)
