"""Curvature products and per-example gradient norms on a 784-512-512-10 network, batch 1024."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax
from benchmarks import Row, benchmark
from benchmarks.timing import compare
from jaxsoftmax import curvature, network

SIZES, BATCH, DAMPING = (784, 512, 512, 10), 1024, 1e-2
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
    contests = ("ggn_vp", curvature.ggn_vp, plain_ggn_vp, 1.05), ("hvp", curvature.hvp, plain_hvp, 1.05)
    for name, ours, theirs, goal in contests:
        bound = jax.jit(lambda *args, product=ours: product(network.forward, OURS, *args))
        times = compare({"ours": bound, "theirs": jax.jit(theirs)}, problem())
        yield times.row(name, SIZES, goal)


@benchmark("curvature_reuse")
def reuse() -> Iterator[Row]:
    """Ten products after one linearization, the linearization included, against ten separate ones.

    Of the multiplications of matrices 0.763 are left: the forward pass is 26 % of a product, and is done once for ten.
    """
    params, x, labels, v = problem()
    bound = lambda params: functools.partial(curvature.ggn_vp, network.forward, OURS, params, x, labels)
    linearize = jax.jit(lambda params: curvature.linearized(bound(params), params))
    apply, separate = jax.jit(lambda product, v: product(v)), jax.jit(lambda params, v: bound(params)(v))

    def ours(params, v):
        product = linearize(params)
        return [apply(product, v) for _ in range(10)]

    theirs = lambda params, v: [separate(params, v) for _ in range(10)]
    yield compare({"ours": ours, "theirs": theirs}, (params, v)).row("ten ggn_vp, linearized once", SIZES, 0.75)


@benchmark("curvature_solve")
def solve() -> Iterator[Row]:
    """(G + λI) x = b to 1e-5, by `damped_solve` and by JAX's own conjugate gradients on the same product.

    On a quarter of the batch: on all of it JAX's return 0 or NaN on the CPU (0.10.2), where ours are right.
    """
    params, x, labels, b = problem()
    x, labels = x[:256], labels[:256]

    def system(params):
        product = functools.partial(curvature.ggn_vp, network.forward, OURS, params, x, labels)
        return curvature.linearized(product, params)

    ours = jax.jit(lambda params, b: curvature.damped_solve(system(params), b, DAMPING, max_steps=500).x)

    @jax.jit
    def theirs(params, b):
        product = system(params)
        damped = lambda v: jax.tree.map(lambda v, Gv: DAMPING * v + Gv, v, product(v))
        return jax.scipy.sparse.linalg.cg(damped, b, tol=1e-5, maxiter=500)[0]

    yield compare({"ours": ours, "theirs": theirs}, (params, b)).row("damped_solve", SIZES, 1.05)


@benchmark("per_example_norms")
def norms() -> Iterator[Row]:
    ours = jax.jit(lambda *args: network.per_example_gradient_norms(*args, OURS))
    times = compare({"ours": ours, "theirs": jax.jit(plain_norms)}, problem()[:3])
    yield times.row("per-example gradient norms", SIZES, goal=0.25)
