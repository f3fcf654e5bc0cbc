"""α-entmax: accuracy of values, of the derivative in α and of products."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsoftmax.maps.entmax import deformed_log, entmax, entmax15, sparsemax
from jaxsoftmax.maps.softmax import softmax
from tests.helpers import one_in
from tests.maps.test_entmax import EPS, on_support, reference, slopes

pytestmark = pytest.mark.optimized

ALPHAS = [1.0, 1.001, 1.2, 1.5, 1.8, 2.0, 2.5, 4.0]


def hard_inputs():
    """Batches of logits in float32, each of one size, so that little is compiled."""
    rng = np.random.default_rng(0)
    for size in (2, 1000):
        yield (rng.normal(size=(4, size)) * [[0.01], [0.3], [1.0], [5.0]]).astype(np.float32)
    ties, groups, staircase = np.zeros(60), np.repeat([1.0, 0.9, -0.5], 20), 2.0 ** -np.arange(60.0)
    far, one = 1e4 + rng.normal(size=60), 20.0 * (np.arange(60) == 3)
    yield np.array([ties, groups, staircase, far, one], np.float32)


@pytest.mark.parametrize("alpha", one_in(2, ALPHAS))
def test_values(alpha):
    """p to eps, relative to p plus what an error of eps in the gap does, through q = p^(2-α); Σp = 1; exact zeros."""
    for batch in hard_inputs():
        want = np.array([reference(z, np.float32(alpha)) for z in batch])
        gap = batch.max(-1, keepdims=True).astype(np.longdouble) - batch
        scale = want + on_support(want, 2 - np.float32(alpha)) * (1 + gap)
        maps = [entmax(batch, jnp.float32(alpha))]
        maps += {1.0: [softmax(batch)], 1.5: [entmax15(batch)], 2.0: [sparsemax(batch)]}.get(alpha, [])
        for got in (np.asarray(p, np.longdouble) for p in maps):
            error = np.abs(got - want)
            assert np.all(error <= 2 * EPS * scale) and error.max() <= 1.5 * EPS
            assert np.max(np.abs(got.sum(-1) - 1)) <= 3 * EPS
            assert np.all(got[want == 0] == 0)


def test_values_in_float64(x64):
    z = np.random.default_rng(1).normal(size=(3, 60))
    for alpha in ALPHAS:
        want = np.array([reference(row, alpha) for row in z])
        np.testing.assert_allclose(np.asarray(entmax(z, alpha), np.longdouble), want, rtol=0, atol=4e-16)


def test_derivative_in_alpha_keeps_its_digits_in_float32():
    """No cancellation near α = 1 (where the textbook formula divides by (α-1)²), nor for classes with small p."""
    z = np.array([0.0, -1.0, -4.0, -12.0, 0.2], np.float32)
    slope = jax.jit(jax.jacfwd(entmax, 1))
    for alpha in np.float32([1.0, 1.0 + EPS, 1.0001, 1.01, 1.2, 1.5, 2.0]):
        want = slopes(lambda t, a=alpha: reference(z, a + t))[0]
        np.testing.assert_allclose(slope(z, alpha), want, rtol=0, atol=8 * EPS * np.abs(want).max())


@pytest.mark.parametrize("order", one_in(4, range(4), 1))
def test_deformed_log(order, x64):
    """∂ⁿ/∂βⁿ ln_β(p) = ∫_1^p t^(β-1) logⁿ t dt, an incomplete gamma function, here by mpmath."""
    logp = -np.concatenate([[0.0], np.logspace(-12, 2.8, 40)])
    for beta in (0.0, 1e-12, 1e-3, 0.5, 1.0):
        got = deformed_log(jnp.asarray(logp), jnp.asarray(beta), order)
        for value, x in zip(got, logp):
            t = mpmath.mpf(-beta * x)
            moment = mpmath.gammainc(order + 1, 0, t) / t ** (order + 1) if t else mpmath.mpf(1) / (order + 1)
            want = mpmath.mpf(x) ** (order + 1) * moment
            assert abs(mpmath.mpf(float(value)) - want) <= 1e-15 * abs(want)
    check_grads(lambda x, b: deformed_log(x, b, order), (jnp.asarray(-1.7), jnp.asarray(0.3)), order=1)


def test_products_keep_their_digits():
    """Jv within 4 eps of |J||v| in float32, also with one π near 1, in both modes; exactly 0 on constants there."""
    rng = np.random.default_rng(2)
    modes = (
        jax.jit(lambda z, a, v: jax.jvp(lambda z: entmax(z, a), (z,), (v,))[1]),
        jax.jit(lambda z, a, v: jax.vjp(lambda z: entmax(z, a), z)[1](v)[0]),
    )
    v = np.float32(1 + 1e-3 * rng.normal(size=40))
    for alpha in np.float32([1.0, 1.05, 1.3, 1.5, 2.0]):
        for gap in np.float32([0.0, 3.0, 8.0, 20.0]):
            z = np.float32(rng.normal(size=40) + gap * (np.arange(40) == 7))
            p = np.asarray(entmax(z, alpha), np.longdouble)  # the error of p is measured by test_values
            q = on_support(p, 2 - alpha)
            jacobian = -np.outer(q, q) * (1 - np.eye(40)) / q.sum()
            jacobian -= np.diag(jacobian.sum(1))  # each diagonal entry from the others: Σq - q would cancel
            for product in modes:
                error = np.abs(np.asarray(product(z, alpha, v), np.longdouble) - jacobian @ v)
                assert np.all(error <= 4 * EPS * (np.abs(jacobian) @ np.abs(v)))
                if product is modes[1] and q.max() > 0.501 * q.sum():
                    assert np.all(product(z, alpha, np.ones_like(v)) == 0)


def test_half_precision_is_rounded_once():
    z = np.random.default_rng(5).normal(size=(3, 50))
    for dtype, function in (("float16", sparsemax), ("bfloat16", entmax15)):
        both = jax.jit(lambda x, f=function: (f(x), jax.vjp(f, x)[1](x)[0]))
        half = jnp.asarray(z, dtype)
        for got, single in zip(both(half), both(half.astype(jnp.float32))):
            np.testing.assert_array_equal(got, single.astype(dtype))
    assert entmax(jnp.arange(3)).dtype == jnp.float32
    slope = jax.jit(jax.grad(lambda a: entmax(half, a)[0, 0].astype(jnp.float32)))
    assert slope(jnp.asarray(1.5, "float16")).dtype == jnp.float16
