"""softmax, log_softmax and logsumexp: axes, factors, and what their rules keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from tests.helpers import assert_close


def test_axes_and_shapes():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    of = lambda package, axis: (
        package.softmax(z, axis=axis),
        package.log_softmax(z, axis=axis),
        *(package.logsumexp(z, axis, keepdims=keepdims) for keepdims in (False, True)),
    )
    for axis in (1, -1, (2, 0), None):
        for got, want in zip(*jax.jit(lambda: (of(js, axis), of(jax.nn, axis)))()):
            assert got.shape == want.shape
            assert_close(got, want)
    assert js.softmax(jnp.zeros((3, 0))).shape == (3, 0) and js.softmax(jnp.zeros((0, 3))).shape == (0, 3)
    assert np.all(np.asarray(js.logsumexp(jnp.zeros((2, 0)), 1)) == -np.inf)
    assert js.softmax(jnp.float32(3.0), axis=None) == 1.0
    assert js.softmax([1, 2]).dtype == js.log_softmax(np.arange(3)).dtype == jnp.float32


def test_logsumexp_with_factors(x64):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    b[0, 2] = 0.0
    value, sign = js.logsumexp(a, 1, b=b, return_sign=True)
    total = (b * np.exp(a)).sum(1)
    assert_close(sign * np.exp(value), total)
    np.testing.assert_array_equal(np.isnan(js.logsumexp(a, 1, b=b)), total < 0)
    gradient = jax.grad(lambda a, b: js.logsumexp(a, 1, b=b, return_sign=True)[0].sum(), (0, 1))(a, b)
    assert_close(gradient[0], b * np.exp(a) / total[:, None])
    assert_close(gradient[1], np.exp(a) / total[:, None])
    assert js.logsumexp(jnp.array([800.0, 1.0]), b=jnp.array([0.0, 1.0])) == 1.0


def test_the_rule_runs():
    """The jaxpr holds the custom rule, under jit and vmap too."""
    for f in (js.softmax, js.log_softmax, lambda z: js.logsumexp(z, -1)):
        assert "custom_jvp_call" in str(jax.make_jaxpr(jax.vmap(f))(jnp.ones((2, 3))))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64"])
def test_integers_become_the_float_that_jnp_exp_makes_of_them(dtype, x64):
    x = np.array([1, 2, 3], dtype)
    for f in (js.softmax, js.log_softmax, js.logsumexp, js.sparsemax, js.entmax):
        np.testing.assert_allclose(f(x), f(x.astype(float)), rtol=1e-6)
        assert f(x).dtype == jnp.exp(x).dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residuals(dtype):
    """softmax and log_softmax keep one array, their output; logsumexp keeps its argument and two numbers a row."""
    z = jnp.ones((4, 5), dtype)
    for f in (js.softmax, js.log_softmax):
        assert [r.shape for r in jax.tree.leaves(jax.vjp(f, z)[1])] == [(4, 5)]
    shapes = [r.shape for r in jax.tree.leaves(jax.vjp(lambda z: js.logsumexp(z, 1), z)[1])]
    assert shapes.count((4, 5)) == 1 and set(shapes) == {(4, 1), (4, 5)}


@pytest.mark.optimized
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="the CPU backend of JAX 0.6 keeps it in every program")
def test_half_precision_is_not_copied_to_float32():
    z = jnp.zeros((256, 8192), jnp.bfloat16)
    program = jax.jit(lambda z: js.logsumexp(z, -1)).lower(z).compile()
    assert program.memory_analysis().temp_size_in_bytes < z.size
