"""P, Pᵀ and J against their definitions in long doubles, where p is spread, where it is nearly one-hot, and between.

Rounded probabilities do not sum to 1. What they stand for is the nearest point of the simplex: where one is above 1/2,
the others say how far it is from 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax._core.centring import (
    about_centred,
    centred,
    centred_transpose,
    complement,
    jacobian_product,
    rounded_one,
)
from jaxsoftmax._core.classes import ClassAxis
from tests.helpers import DERIVATIVE_RTOL, assert_close

EPS = float(jnp.finfo("float32").eps)
K = 6
GAPS = (0.0, 0.5, 3.0, 9.0, 16.0, 30.0, 80.0)
AXIS = ClassAxis((-1,))
OTHERS = 1 - np.eye(K, dtype=np.longdouble)
optimized = pytest.mark.optimized


def points(gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(p, q, v): float32 probabilities of a logit that stands `gap` above others, what they stand for, and vectors."""
    rng = np.random.default_rng(int(gap))
    z = rng.normal(size=(40, K))
    z[:, 1] = z.max(-1) + gap
    p = np.exp(z - z.max(-1, keepdims=True))
    p = np.float32(p / p.sum(-1, keepdims=True))
    q = p.astype(np.longdouble)
    q[:, 1] = np.where(q[:, 1] > 0.5, 1 - (q @ OTHERS)[:, 1], q[:, 1])
    q /= q.sum(-1, keepdims=True)
    v = np.float32(rng.normal(size=p.shape) * 10.0 ** rng.uniform(-3, 3, size=p.shape))
    return p, q, v


def projection(q: np.ndarray) -> np.ndarray:
    """P = I - 1qᵀ, of each example, with 1 - q as the sum of the others."""
    return (q @ OTHERS)[:, None, :] * np.eye(K) - q[:, None, :] * OTHERS


PRODUCTS = {
    "P": (about_centred, projection),
    "P transposed": (centred_transpose, lambda q: np.swapaxes(projection(q), -1, -2)),
    "J": (lambda v, p: jacobian_product(v, p, AXIS), lambda q: q[:, :, None] * projection(q)),
}


@optimized
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_to_a_few_eps(name, gap):
    """Every entry, in units of eps times the sum of the sizes of its terms."""
    product, matrix = PRODUCTS[name]
    p, q, v = points(gap)
    got, M = np.asarray(jax.jit(product)(v, p), np.longdouble), matrix(q)
    want, sizes = np.einsum("bij,bj->bi", M, v), np.einsum("bij,bj->bi", abs(M), abs(v))
    tiny = float(jnp.finfo("float32").tiny)
    assert np.all(abs(got - want) <= 3 * EPS * sizes + 2 * tiny * abs(v).max())


@optimized
@pytest.mark.parametrize("gap", GAPS)
def test_centred_is_close_to_its_own_size(gap):
    """A constant a thousand times as large as what varies costs no digits."""
    p, q, v = points(gap)
    v = np.float32(1000 + np.round(1024 * np.clip(v, -1, 1)) / 1024)
    got, want = np.asarray(jax.jit(centred)(v, p)), np.einsum("bij,bj->bi", projection(q), v)
    assert np.all(abs(got - want) <= 2 * EPS * abs(want).max(-1, keepdims=True))


@optimized
@pytest.mark.parametrize("gap", GAPS)
def test_complement(gap):
    p, q, _ = points(gap)
    want = np.einsum("bii->bi", projection(q))
    assert np.all(abs(np.asarray(jax.jit(complement)(p), np.longdouble) - want) <= 4 * EPS * want)


def test_a_constant_has_no_product():
    """J1 = 0 to the last bit where the total that rounding left is given."""
    p = points(3.0)[0]
    total = jnp.sum(p, -1, keepdims=True)
    assert not np.any(jax.jit(lambda p, total: jacobian_product(jnp.full_like(p, 7.0), p, AXIS, total))(p, total))


@pytest.mark.parametrize("gap", GAPS[:4])
def test_derivatives_are_those_of_the_definition(gap, x64):
    """In v and in p, forward and reverse, and of the second order: the rule says J is its own transpose.

    p may leave the simplex on its way: what is differentiated is v's distance from its mean, <p,v> / Σp.
    """
    _, q, v = points(gap)
    p, v = jnp.asarray(q, float), jnp.asarray(v, float)
    u = jnp.cos(jnp.arange(v.size, dtype=float)).reshape(v.shape)

    def plain(v, p):
        return p * (v - jnp.sum(p * v, -1, keepdims=True) / jnp.sum(p, -1, keepdims=True))

    def ours(v, p):
        return jacobian_product(v, p, AXIS, rounded_one(p, AXIS))

    def everything(f):
        pair = lambda v, p: jnp.sum(u * f(v, p))
        gradient = jax.grad(pair, (0, 1))
        return jax.jit(lambda: (gradient(v, p), jax.jvp(gradient, (v, p), (u, p * u)), jax.jvp(f, (v, p), (u, u))))()

    assert_close(everything(ours), everything(plain), DERIVATIVE_RTOL["float64"])
