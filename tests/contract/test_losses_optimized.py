"""Every loss head: rounding of half precision, digits of second derivatives and what they keep in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from tests.contract.test_losses import cast
from tests.helpers import enable_x64, one_in
from tests.registry import HEADS
from tests.registry.samples import Z

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("head", one_in(3, HEADS), ids=lambda head: head.name)
def test_half_precision_logits(head):
    """The loss is that of the same logits in float32; its gradient comes back in their dtype, rounded once."""

    @jax.jit
    def every(arguments):
        def value_and_gradient(z, *args):
            value, pullback = jax.vjp(lambda z: head.loss(z, *args, **head.options[-1]), z)
            return value, pullback(jnp.ones_like(value))[0]

        return {dtype: value_and_gradient(*arguments[dtype]) for dtype in arguments}

    results = every({dtype: cast([Z, *head.args], dtype) for dtype in ("float32", "bfloat16", "float16")})
    wide, exact = results.pop("float32")
    for dtype, (loss, gradient) in results.items():
        assert loss.dtype == jnp.float32 and gradient.dtype == dtype
        np.testing.assert_allclose(loss, wide, rtol=2e-7, atol=1e-9)
        once = np.asarray(exact.astype(dtype), "float64")
        assert np.all(abs(np.asarray(gradient, "float64") - once) <= float(jnp.finfo(dtype).eps) * abs(once))


TWICE = "softmax_entropy", "brier_loss", "softmax_cross_entropy", "softmax_kl_divergence"


@pytest.mark.parametrize("head", [h for h in HEADS if h.name in TWICE], ids=lambda head: head.name)
def test_second_derivatives_in_half_precision(head):
    """Where a gradient uses the logits twice, the next one adds up in float32 as well, and is rounded once."""
    z, v = np.random.default_rng(11).normal(size=(2, 100, *Z.shape)) * np.array([4.0, 1.0])[:, None, None, None]

    def both(z, v, *args):
        gradient = jax.grad(lambda z: jnp.sum(head.loss(z, *args)))
        return jax.jvp(gradient, (z,), (v,))[1], jax.grad(lambda z: jnp.vdot(gradient(z), v))(z)

    products = jax.jit(jax.vmap(both, (0, 0, *(None for _ in head.args))))
    narrow = cast([z, v, *head.args], "bfloat16")
    want = np.asarray(products(*cast(narrow, "float32"))[0], "float64")
    for got in products(*narrow):
        error = abs(np.asarray(got, "float64") - want) / np.max(abs(want), -1, keepdims=True)
        assert np.max(error) <= float(jnp.finfo("bfloat16").eps)


@pytest.mark.parametrize("head", [h for h in HEADS if h.name in TWICE], ids=lambda head: head.name)
def test_every_entry_of_the_hessian(head):
    """In three compositions of the modes, by columns: a rare class beside the others keeps its digits."""
    z = np.array([[gap, 0.2, -0.3, -20.0] for gap in (0.0, 0.4, 12.0)])

    @jax.jit
    def hessians(z, *args):
        loss = lambda z: head.loss(z, *args)
        twice = jax.jacfwd(jax.grad(loss)), jax.jacrev(jax.grad(loss)), jax.jacfwd(jax.jacfwd(loss))
        return [jax.vmap(hessian)(z) for hessian in twice]

    def at(dtype):
        return [np.asarray(H, "float64") for H in hessians(*cast([z, *(a[0] for a in head.args)], dtype))]

    with enable_x64():
        exact = at("float64")
    for got, want in zip(at("float32"), exact):
        assert np.all(abs(got - want) <= 1e-4 * abs(want))


@pytest.mark.parametrize("head", [h for h in HEADS if h.name in TWICE], ids=lambda head: head.name)
def test_curvature_along_everything_that_moves(head):
    """Forward over forward is forward over reverse: no code of a gradient is differentiated in place of its rule."""
    args = cast([np.array([1.5, 0.2, -0.3, -20.0]), *(a[0] for a in head.args)], "float32")  # p = 0.7 at the top
    direction, everything = tuple(map(jnp.cos, args)), tuple(range(len(args)))

    def along(f):
        return lambda *args: jax.jvp(f, args, direction)[1]

    @jax.jit
    def both(*args):
        moved = along(jax.grad(head.loss, everything))(*args)
        return along(along(head.loss))(*args), sum(map(jnp.vdot, moved, direction))

    np.testing.assert_allclose(*both(*args), rtol=1e-5)


# In arrays of the logits' size, results and arguments left out.
KEPT_IN_AN_HVP = {"softmax": 1, "softmax_cross_entropy": 1, "softmax_entropy": 2, "brier_loss": 5}


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="the CPU backend of JAX 0.6 makes no such kernels")
@pytest.mark.parametrize("name", KEPT_IN_AN_HVP)
def test_memory_of_second_order(name):
    z = jax.ShapeDtypeStruct((65536, 64), "float32")
    f, labels = getattr(js, name), [z] if name in ("softmax_cross_entropy", "brier_loss") else []
    ct = jax.eval_shape(f, z, *labels)

    def product(z, v, ct, *labels):
        return jax.jvp(lambda z: jax.vjp(lambda z: f(z, *labels), z)[1](ct), (z,), (v,))

    memory = jax.jit(product).lower(z, z, ct, *labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= (KEPT_IN_AN_HVP[name] + 0.1) * z.size * 4
