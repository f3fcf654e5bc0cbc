"""Sums over the class axis against sums of long doubles, near one-hot and with infinite logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax._core import classes

EPS = float(jnp.finfo("float32").eps)
AXIS = classes.ClassAxis((-1,))
INF = np.inf


@pytest.mark.optimized
@pytest.mark.parametrize("rows", [3, 5000])
@pytest.mark.parametrize("gap", [0.0, 2.0, 17.0, 40.0])
def test_leave_top_out(gap, rows):
    """Σ exp(z - m) - 1 to a few eps of itself, many examples or few; a second maximum counts."""
    z = np.float32(np.random.default_rng(0).normal(size=(rows, 5)))
    z[:, 2] = z.max(-1) + np.float32(gap)
    z[0, 4] = z[0, 2]
    e = np.exp(z.astype(np.longdouble) - z[:, 2:3])
    want = np.delete(e, 2, -1).sum(-1)
    found = jax.jit(lambda z: classes.leave_top_out(z, classes.top(z, AXIS), AXIS))(z)
    away = 1 + np.max(z[:, 2:3] - z, -1)  # the rounding of a difference of logits
    assert np.all(abs(np.asarray(found)[:, 0] - want) <= 4 * EPS * away * want)


@pytest.mark.parametrize("shift", [classes.shift, classes.below], ids=lambda f: f.__name__)
def test_infinite_logits_have_their_limits(shift):
    """0 where a logit and the maximum are +inf, NaN where both are -inf; exponentials of the rest are as ever."""
    rows = np.float32([[INF, 0.0, -INF], [0.0, 1.0, -INF], [-INF, -INF, -INF], [INF, INF, 0.0]])
    got = jax.jit(lambda z: shift(z, classes.top(z, AXIS)))(rows)
    with np.errstate(invalid="ignore"):
        want = np.where(rows == INF, 0.0, rows - rows.max(-1, keepdims=True))
    np.testing.assert_allclose(np.exp(got), np.exp(want), rtol=EPS)


def test_sums_over_several_axes_and_labels_through_them():
    """A class axis of two parts counts its classes row by row."""
    z = jnp.arange(24.0).reshape(2, 3, 4)
    axis = classes.ClassAxis((0, 2))
    np.testing.assert_array_equal(classes.sum(z, axis), np.asarray(z).sum((0, 2), keepdims=True))
    np.testing.assert_array_equal(classes.max(z, axis), np.asarray(z).max((0, 2), keepdims=True))
