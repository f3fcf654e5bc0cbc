"""Fenchel-Young losses against their definition in long double, against optax, and at every edge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxsoftmax.losses.entmax_losses import entmax_loss, multiclass_sparsemax_loss, sparsemax_loss
from jaxsoftmax.maps.entmax import entmax
from tests.helpers import assert_close, one_in
from tests.maps.test_entmax import EPS, reference, slopes

Z = np.array([0.3, -0.2, 0.9, 0.17, -3.0])
Y = np.array([0.1, 0.25, 0.3, 0.05, 0.3])


def deformed(p, alpha):
    """(p^β - 1)/β in long double, β = α - 1; 0 where p = 0."""
    log_p, beta = np.log(np.where(p > 0, p, 1)), np.longdouble(alpha) - 1
    return log_p if beta == 0 else np.expm1(beta * log_p) / beta


def definition(z, y, alpha):
    """(L, p): max_p (<p, z> + H(p)) - <y, z> - H(y), H(p) = Σ (p - p^α)/(α(α-1)), with z measured from its maximum.

    Where Σy ≠ 1 (rounding, say), L is the Bregman divergence, which does not change when z is shifted.
    """
    z, y = np.asarray(z, np.longdouble) - np.max(z), np.asarray(y, np.longdouble)
    p = reference(z, alpha)
    gain = np.sum((p - y) * z + (y * deformed(y, alpha) - p * deformed(p, alpha)) / alpha)
    return gain - (y.sum() - 1) * (1 / np.longdouble(alpha) + deformed(p.max(), alpha)), p


def test_twins_in_optax():
    rng = np.random.default_rng(1)
    z, c = jnp.asarray(rng.normal(size=(4, 6)) * 2, jnp.float32), jnp.array([0, 5, 2, 2])
    binary, signs = jnp.linspace(-3, 3, 14), jnp.array([0, 1] * 7)
    y = jax.nn.softmax(jnp.asarray(rng.normal(size=(4, 6)), jnp.float32))
    ours = jax.jit(
        lambda: [
            multiclass_sparsemax_loss(z, c),
            entmax_loss(z, c, 2.0),
            sparsemax_loss(binary, signs),
            sparsemax_loss(binary, signs == 1),
            entmax_loss(z, c, 1.0),
            entmax_loss(z, y, 1.0),
        ]
    )()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        sparse, log_loss = optax.losses.multiclass_sparsemax_loss, optax.losses.softmax_cross_entropy
        theirs = jax.jit(
            lambda: [
                *[sparse(z, c)] * 2,
                *[optax.losses.sparsemax_loss(binary, signs)] * 2,
                optax.losses.softmax_cross_entropy_with_integer_labels(z, c),
                log_loss(z, y) + jnp.sum(y * jnp.log(y), -1),
            ]
        )()
    for got, want in zip(ours, theirs):
        np.testing.assert_allclose(got, want, rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0, 2.6])
def test_first_three_derivatives(alpha, x64):
    """Along a line in (logits, soft labels, α), in both modes, against differences of the definition; H symmetric."""
    v, u, step = np.array([0.2, -0.1, -0.3, 0.25, 0.1]), np.array([0.01, -0.05, 0.02, 0.04, -0.02]), 0.3
    for chain in _chains(v, u, step):
        want = slopes(lambda t: definition(Z + t * v, Y + t * u, alpha + t * step)[0])
        np.testing.assert_allclose(chain(Z, Y, alpha), want, rtol=0, atol=1e-9)
    full = _hessian()(Z, Y, alpha)
    hessian = np.block([[np.asarray(b).reshape(n, -1) for b in row] for row, n in zip(full, (5, 5, 1))])
    assert_close(hessian, hessian.T)
    jacobian = jax.jit(jax.jacfwd(entmax))(Z, alpha)
    assert_close(hessian[:5, :5], jacobian)
    assert_close(hessian[:5, 5:10], -np.eye(5) + _escort(alpha)[:, None])


@functools.cache
def _hessian():
    return jax.jit(jax.hessian(entmax_loss, (0, 1, 2)))


@functools.cache
def _chain(mode):
    def along(f, point, direction):
        if mode == "forward":
            return jax.jvp(f, point, direction)[1]
        return sum(jnp.vdot(g, t) for g, t in zip(jax.grad(f, (0, 1, 2))(*point), direction))

    def derivatives(point, direction):
        first = lambda *p: along(entmax_loss, p, direction)
        second = lambda *p: along(first, p, direction)
        return jnp.stack([first(*point), second(*point), along(second, point, direction)])

    return jax.jit(derivatives)


def _chains(*direction):
    direction = tuple(jnp.asarray(d) for d in direction)
    return [lambda *point, m=m: _chain(m)(tuple(map(jnp.asarray, point)), direction) for m in ("forward", "reverse")]


def _escort(alpha):
    p = reference(Z, alpha).astype(float)
    q = np.where(p > 0, np.where(p > 0, p, 1) ** (2 - alpha), 0)
    return q / q.sum()


def test_labels_that_are_no_distribution(x64):
    """Σy = s ≠ 1: the Bregman divergence goes on, with gradient p - y + (s - 1)π (sp - y at α = 1), never negative."""
    f, h, d = jax.jit(jax.value_and_grad(entmax_loss, (0, 1, 2))), 1e-5, np.array([0.3, 0.2, -0.1, 0.4, 0.1])
    for alpha in (1.0 + h, 1.5, 2.0):
        loss, (in_logits, in_labels, in_alpha) = f(Z, 1.3 * Y, alpha)
        np.testing.assert_allclose(in_logits, reference(Z, alpha).astype(float) - 1.3 * Y + 0.3 * _escort(alpha))
        ahead, behind = (f(Z + t * d, 1.3 * Y + t * d[::-1], alpha + t)[0] for t in (h, -h))
        np.testing.assert_allclose(
            (ahead - behind) / (2 * h), in_logits @ d + in_labels @ d[::-1] + in_alpha, atol=1e-8
        )
        assert loss > 0
    assert np.isnan(entmax_loss(Z, Y - 0.2, 1.5))


def test_axes_and_batches_of_alpha():
    z = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)), jnp.float32)
    c = np.array([[0, 1, 2, 2], [1, 0, 0, 2]])
    alpha = np.float32([[1.2], [2.4]])
    got = entmax_loss(z, c, alpha, axis=1)
    np.testing.assert_allclose(got, entmax_loss(jnp.moveaxis(z, 1, 2), c, alpha), rtol=4 * EPS)
    np.testing.assert_allclose(got[1, 2], entmax_loss(z[1, :, 2], c[1, 2], alpha[1, 0]), rtol=4 * EPS)
    merged = entmax_loss(z, np.array([3, 11]), axis=(1, 2))
    np.testing.assert_allclose(merged, entmax_loss(z.reshape(2, 12), np.array([3, 11])), rtol=4 * EPS)
    np.testing.assert_allclose(
        jax.vmap(entmax_loss)(z[:, :, 0], c[:, 0]), entmax_loss(z[:, :, 0], c[:, 0]), rtol=4 * EPS
    )


def test_binary_loss(x64):
    """Sparsemax of the two logits (z, 0), for every label in [0, 1]; both modes, every order; edges and infinities."""
    z = np.array([-2.5, -1.0, -0.4, 0.0, 0.7, 1.0, 3.0])
    modes = jax.grad, jax.jacfwd, jax.hessian
    found = jax.jit(lambda z, y: (sparsemax_loss(z, y), *(jax.vmap(mode(sparsemax_loss))(z, y) for mode in modes)))
    for y in (0.0, 0.3, 1.0):
        labels = np.full(7, y)
        loss, reverse, forward, curvature = found(z, labels)
        want = entmax_loss(np.stack([z, 0 * z], -1), np.stack([labels, 1 - labels], -1), 2.0)
        assert_close(loss, want)
        for gradient in (reverse, forward):
            assert_close(gradient, np.clip((z + 1) / 2, 0, 1) - y)
        np.testing.assert_array_equal(curvature, np.where(np.abs(z) < 1, 0.5, 0.0))
    check_grads(jax.jit(sparsemax_loss), (np.array([0.3, -2.0, 0.7, 4.0]), np.array([0.3, 0.1, 0.9, 0.2])), order=2)
    inf = np.inf
    np.testing.assert_array_equal(
        sparsemax_loss(np.array([inf, -inf, inf, -inf, np.nan, 0.0, 0.0]), np.array([1, 0, 0, 1, 1, 2, -1])),
        [0, 0, inf, inf, np.nan, np.nan, np.nan],
    )
    np.testing.assert_array_equal(jax.grad(sparsemax_loss)(inf, 1), 0.0)
    assert sparsemax_loss(jnp.zeros(2, jnp.float32), np.array([0, 1])).dtype == jnp.float32


def problems():
    """(logits, labels) of 6 classes in float32: labels on the top class and off it, sparse, dense, near p."""
    rng = np.random.default_rng(0)
    for gap in (0.0, 1.0, 3.0, 9.0, 20.0, 60.0):
        z = np.float32(rng.normal(size=6) + gap * (np.arange(6) == 2))
        near = np.exp(z - z.max(), dtype=np.float32)
        dense = rng.dirichlet(np.ones(6))
        for y in (np.eye(6)[2], np.eye(6)[5], np.array([0, 0.5, 0.5, 0, 0, 0]), dense, near / near.sum()):
            yield z, np.float32(y)


@pytest.mark.optimized
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


@pytest.mark.optimized
def test_digits_of_a_small_loss_survive():
    """At α = 1 and a gap of 20 the loss is 4e-9; the gradient at the label is minus the sum of the others."""
    z = jnp.array([20.0, 0.0, 0.0])
    loss, gradient = jax.value_and_grad(entmax_loss)(z, 0, 1.0)
    small = float(np.exp(np.longdouble(-20)))
    np.testing.assert_allclose(loss, np.log1p(2 * small), rtol=2 * EPS)
    np.testing.assert_allclose(gradient, np.array([-2, 1, 1]) * small / (1 + 2 * small), rtol=2 * EPS)


@pytest.mark.optimized
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
