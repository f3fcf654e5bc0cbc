"""Curvature products and per-example gradient norms on a 784-512-512-10 network, batch 1024."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax
from benchmarks import Row, benchmark
from benchmarks.timing import compare
from jaxsoftmax import curvature, network

SIZES, BATCH = (784, 512, 512, 10), 1024
OURS = jaxsoftmax.softmax_cross_entropy_with_integer_labels
THEIRS = optax.softmax_cross_entropy_with_integer_labels


def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params, v = network.init(keys[0], SIZES), network.init(keys[1], SIZES)
    return params, jax.random.normal(keys[2], (BATCH, SIZES[0])), jax.random.randint(keys[3], (BATCH,), 0, SIZES[-1]), v


def plain_ggn_vp(params, x, labels, v):
    """Forward mode, the loss's Hessian by forward over reverse, reverse mode."""
    f = lambda params: network.forward(params, x)
    z, jv = jax.jvp(f, (params,), (v,))
    _, hjv = jax.jvp(jax.grad(lambda z: THEIRS(z, labels).mean()), (z,), (jv,))
    return jax.vjp(f, params)[1](hjv)[0]


def plain_hvp(params, x, labels, v):
    gradient = jax.grad(lambda params: THEIRS(network.forward(params, x), labels).mean())
    return jax.jvp(gradient, (params,), (v,))[1]


def plain_norms(params, x, labels):
    """Every gradient, then its norm."""
    loss = lambda params, x, label: THEIRS(network.forward(params, x), label)
    gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, labels)
    return jnp.sqrt(sum(jnp.sum(g**2, range(1, g.ndim)) for g in jax.tree.leaves(gradients)))


@benchmark("curvature")
def products() -> Iterator[Row]:
    contests = ("ggn_vp", curvature.ggn_vp, plain_ggn_vp, 0.95), ("hvp", curvature.hvp, plain_hvp, 1.0)
    for name, ours, theirs, goal in contests:
        bound = jax.jit(lambda *args, product=ours: product(network.forward, OURS, *args))
        times = compare({"ours": bound, "theirs": jax.jit(theirs)}, problem())
        yield times.row(name, SIZES, goal)


@benchmark("per_example_norms")
def norms() -> Iterator[Row]:
    ours = jax.jit(lambda *args: network.per_example_gradient_norms(*args, OURS))
    times = compare({"ours": ours, "theirs": jax.jit(plain_norms)}, problem()[:3])
    yield times.row("per-example gradient norms", SIZES, goal=0.25)
