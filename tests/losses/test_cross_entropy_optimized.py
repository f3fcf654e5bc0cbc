"""Softmax cross-entropy: accuracy over gaps, rounding of half precision, residuals."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxsoftmax as js
from tests.helpers import ulp

pytestmark = pytest.mark.optimized
ce = js.softmax_cross_entropy_with_integer_labels

EPS = float(np.finfo(np.float32).eps)

DIFFERENTIATED = {f: (jax.value_and_grad(f), jax.jit(jax.value_and_grad(f))) for f in (ce, js.softmax_cross_entropy)}


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("gap", [0.0, 0.5, 1.5, 5.0, 12.0, 20.0, 40.0, 60.0, 80.0])
def test_accuracy_over_gaps(gap, offset, label):
    """Loss and gradient within 2 eps (1 + κ), κ ≤ 2 max|z - m|, for the integer and the one-hot label."""
    z = np.array([gap, 0.0, -0.3, 0.1], np.float32) + np.float32(offset)
    with mpmath.workdps(60):
        e = [mpmath.exp(mpmath.mpf(float(v)) - float(z.max())) for v in z]
        total, rest = mpmath.fsum(e), mpmath.fsum(np.delete(e, label))
        loss = mpmath.log1p(rest / e[label])
        gradient = [-rest / total if k == label else e[k] / total for k in range(4)]
    bound = 2 * EPS * (1 + 2 * np.max(np.abs(z - z.max())))
    one_hot = jnp.asarray(np.eye(4, dtype=np.float32)[label])
    for f, target in ((ce, jnp.array(label)), (js.softmax_cross_entropy, one_hot)):
        for g in DIFFERENTIATED[f]:
            value, slope = g(jnp.asarray(z), target)
            assert abs(float((mpmath.mpf(float(value)) - loss) / loss)) <= bound
            assert all(abs(float((mpmath.mpf(float(s)) - w) / w)) <= bound for s, w in zip(slope, gradient))


def test_the_usual_formula_returns_zero_there():
    z = jnp.array([20.0, 0.0])
    assert -jax.nn.log_softmax(z)[0] == 0 and ce(z, 0) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype):
    z = jnp.asarray([[3.0, -1.0, 0.5], [9.0, 0.0, 0.25]], dtype)
    labels = jnp.array([1, 0])
    value, gradient = jax.value_and_grad(lambda z: ce(z, labels).sum())(z)
    wide, exact = jax.value_and_grad(lambda z: ce(z, labels).sum())(z.astype(jnp.float32))
    assert value.dtype == jnp.float32 and value == wide
    assert gradient.dtype == dtype and np.all(np.asarray(gradient) == np.asarray(exact.astype(dtype)))
    for got, want in zip(np.ravel(np.asarray(gradient, np.float64)), np.ravel(exact)):
        assert abs(got - want) <= 0.5 * ulp(float(want), dtype) * 1.001


def test_residuals():
    """The logits in their own dtype, the labels, and three numbers a row; no second array of their size."""
    z = jnp.ones((4, 5), jnp.bfloat16)
    leaves = jax.tree.leaves(jax.vjp(lambda z: ce(z, jnp.zeros(4, jnp.int32)), z)[1])
    assert [(r.shape, r.dtype) for r in leaves if r.shape == (4, 5)] == [((4, 5), jnp.bfloat16)]
    assert all(r.size <= 4 for r in leaves if r.shape != (4, 5))
