"""Fenchel-Young losses: accuracy against their definition in long double; rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax.losses.entmax_losses import entmax_loss, multiclass_sparsemax_loss, sparsemax_loss
from tests.helpers import one_in
from tests.losses.test_entmax_losses import definition
from tests.maps.test_entmax import EPS

pytestmark = pytest.mark.optimized


def problems():
    """(logits, labels) of 6 classes in float32: labels on the top class and off it, sparse, dense, near p."""
    rng = np.random.default_rng(0)
    for gap in (0.0, 1.0, 3.0, 9.0, 20.0, 60.0):
        z = np.float32(rng.normal(size=6) + gap * (np.arange(6) == 2))
        near = np.exp(z - z.max(), dtype=np.float32)
        dense = rng.dirichlet(np.ones(6))
        for y in (np.eye(6)[2], np.eye(6)[5], np.array([0, 0.5, 0.5, 0, 0, 0]), dense, near / near.sum()):
            yield z, np.float32(y)


@pytest.mark.parametrize("alpha", one_in(3, [1.0, 1.0001, 2.0, 1.2, 1.5, 3.0]))
def test_values_and_gradients(alpha):
    """Errors of a few eps in L and in its terms' condition number Σ |p - y| gap; L ≥ 0 and the gradient is p - y."""
    alpha = np.float32(alpha)
    f = jax.jit(jax.value_and_grad(entmax_loss))
    for z, y in problems():
        want, p = definition(z, y, alpha)
        loss, gradient = f(z, y, alpha)
        residual = np.abs(p - y)
        scale = want + np.sum(residual * (1 + z.max() - z))
        assert abs(float(loss) - want) <= 4 * EPS * scale + 4 * np.finfo(np.longdouble).eps and loss >= 0
        np.testing.assert_allclose(gradient, (p - y).astype(float), rtol=0, atol=1.5 * EPS)
        if np.count_nonzero(y) == 1:
            label = int(y.argmax())
            np.testing.assert_allclose(entmax_loss(z, label, alpha), loss, rtol=4 * EPS)
    assert alpha == 1 or entmax_loss(jnp.array([1 / (alpha - 1), 0, 0]), 0, alpha) <= EPS


def test_digits_of_a_small_loss_survive():
    """At α = 1 and a gap of 20 the loss is 4e-9; the gradient at the label is minus the sum of the others."""
    z = jnp.array([20.0, 0.0, 0.0])
    loss, gradient = jax.value_and_grad(entmax_loss)(z, 0, 1.0)
    small = float(np.exp(np.longdouble(-20)))
    np.testing.assert_allclose(loss, np.log1p(2 * small), rtol=2 * EPS)
    np.testing.assert_allclose(gradient, np.array([-2, 1, 1]) * small / (1 + 2 * small), rtol=2 * EPS)


@pytest.mark.parametrize("dtype", one_in(2, ["bfloat16", "float16"]))
def test_half_precision(dtype):
    """float32 losses from half-precision logits, gradients in the logits' dtype, class indices above 256 intact."""
    z = jnp.asarray(np.random.default_rng(3).normal(size=(2, 400)), dtype)
    c = jnp.array([399, 257])
    for f in (
        lambda z: entmax_loss(z, c),
        lambda z: multiclass_sparsemax_loss(z, c),
        lambda z: sparsemax_loss(z[:, 0], c * 0),
    ):
        loss, gradient = jax.jit(lambda z, f=f: (f(z), jax.grad(lambda z: jnp.sum(f(z)))(z)))(z)
        wide, wide_gradient = jax.jit(lambda z, f=f: (f(z), jax.grad(lambda z: jnp.sum(f(z)))(z)))(
            z.astype(jnp.float32)
        )
        assert loss.dtype == jnp.float32 and gradient.dtype == dtype
        np.testing.assert_allclose(loss, wide, rtol=2 * EPS)
        np.testing.assert_array_equal(gradient, wide_gradient.astype(dtype))
