"""softmax, log_softmax and logsumexp: accuracy of values and products, and what is kept for the backward pass."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxsoftmax as js

pytestmark = pytest.mark.optimized

EPS = float(np.finfo(np.float32).eps)


def exact(z):
    """(p, log p, logsumexp) of float32 logits with 60 digits."""
    with mpmath.workdps(60):
        z = [mpmath.mpf(float(v)) for v in z]
        e = [mpmath.exp(v - max(z)) for v in z]
        total = mpmath.fsum(e)
        rest = mpmath.fsum(sorted(e)[:-1])
        log_total = mpmath.log1p(rest) if mpmath.almosteq(total, 1 + rest) else mpmath.log(total)
        return [v / total for v in e], [v - max(z) - log_total for v in z], max(z) + log_total


def relative_error(got, want):
    return max((abs(float((mpmath.mpf(float(g)) - w) / w)) for g, w in zip(np.ravel(got), np.ravel(want)) if w != 0))


@pytest.mark.parametrize("offset", [0.0, -3.0, 1e4])
@pytest.mark.parametrize("gap", [0.0, 0.5, 5.0, 12.0, 20.0, 40.0, 60.0])
def test_accuracy_over_gaps(gap, offset):
    """Within 2 eps (1 + κ), κ the size of the shifted logits, which every entry's exponent is conditioned by."""
    z = np.array([gap, 0.0, -0.3, 0.1, -1.7], np.float32) + np.float32(offset)
    p, logp, lse = exact(z)
    condition = 1 + np.max(np.abs(z - z.max()))
    assert relative_error(js.softmax(z), p) <= 2 * EPS * condition
    assert relative_error(js.log_softmax(z), logp) <= 2 * EPS * condition
    weight = sum(float(a) * abs(float(b)) for a, b in zip(p, z)) / abs(float(lse))
    assert relative_error(js.logsumexp(z), lse) <= 2 * EPS * (1 + weight)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 60.0])
def test_products_keep_their_digits(gap):
    """JVP and VJP of softmax and log_softmax within 20 eps of |J||v|, where one p is all but 1."""
    z = np.array([gap, 0.0, -0.3, 0.1], np.float32)
    v = np.array([0.7, -1.3, 0.4, 2.0], np.float32)
    p = np.array(exact(z)[0])
    eye = np.array([[mpmath.mpf(int(i == j)) for i in range(4)] for j in range(4)])
    rest = [mpmath.fsum(np.delete(p, i)) for i in range(4)]  # 1 - p_i without cancellation
    J = np.array([[p[i] * (rest[i] if i == j else -p[j]) for j in range(4)] for i in range(4)])
    G = np.array([[rest[i] if i == j else -p[j] for j in range(4)] for i in range(4)])
    assert np.shape(eye) == (4, 4)
    mv = np.array([mpmath.mpf(float(x)) for x in v])
    for f, matrix in ((js.softmax, J), (js.log_softmax, G)):
        pushed, pulled = jax.jvp(f, (z,), (v,))[1], jax.vjp(f, z)[1](jnp.asarray(v))[0]
        for got, m in ((pushed, matrix), (pulled, matrix.T)):
            want, scale = m @ mv, np.abs(m) @ np.abs(mv)
            # p itself is only as good as the exponent: gap · eps / 2 more.
            bound = (20 + gap) * EPS
            assert all(abs(float(g) - w) <= bound * s for g, w, s in zip(np.asarray(got), want, scale))


def test_tangent_along_the_ones_vanishes():
    z = jnp.array([9.0, 0.0, 1.0])
    assert np.all(np.asarray(jax.vjp(js.softmax, z)[1](jnp.ones(3))[0]) == 0)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="the CPU backend of JAX 0.6 keeps it in every program")
def test_half_precision_is_not_copied_to_float32():
    z = jnp.zeros((256, 8192), jnp.bfloat16)
    program = jax.jit(lambda z: js.logsumexp(z, -1)).lower(z).compile()
    assert program.memory_analysis().temp_size_in_bytes < z.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residuals(dtype):
    """softmax and log_softmax keep one array, their output; logsumexp keeps its argument and two numbers a row."""
    z = jnp.ones((4, 5), dtype)
    for f in (js.softmax, js.log_softmax):
        assert [r.shape for r in jax.tree.leaves(jax.vjp(f, z)[1])] == [(4, 5)]
    shapes = [r.shape for r in jax.tree.leaves(jax.vjp(lambda z: js.logsumexp(z, 1), z)[1])]
    assert shapes.count((4, 5)) == 1 and set(shapes) == {(4, 1), (4, 5)}
