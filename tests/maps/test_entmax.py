"""α-entmax against an independent reference in long double: values, derivatives in x and α, special values."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsoftmax import softmax_entropy
from jaxsoftmax._core.classes import ClassAxis
from jaxsoftmax.maps import entmax_solver
from jaxsoftmax.maps.entmax import deformed_log, entmax, entmax15, entmax_jacobian_product, sparsemax
from jaxsoftmax.maps.softmax import softmax
from tests.helpers import assert_close, one_in

EPS = float(np.finfo(np.float32).eps)
Z = np.array([0.3, -0.2, 0.9, 0.17, -3.0])


def reference(z, alpha):
    """p in long double, by bisection on c = ln_β(max p); also for α slightly below 1."""
    z, beta = np.asarray(z, np.longdouble), np.longdouble(alpha) - 1
    d = z - z.max()

    def p_of(c):
        if beta == 0:
            return np.exp(c + d)
        with np.errstate(divide="ignore"):
            return np.exp(np.log1p(np.maximum(beta * (c + d), -1)) / beta)

    low, high = (
        -np.log(np.longdouble(d.size)) if beta <= 0 else np.expm1(-beta * np.log(np.longdouble(d.size))) / beta,
        0,
    )
    low -= 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if p_of(middle).sum() > 1 else (middle, high)
    return p_of(high)


def slopes(curve, steps=4e-3):
    """The first three derivatives of `curve` at 0, in long double, by differences of high order."""
    k = np.arange(-6, 7)
    samples = np.array([curve(np.longdouble(steps) * i) for i in k])
    # The weights that are exact on polynomials of degree 12.
    inverse = np.linalg.inv(np.vander(k.astype(float), increasing=True)).astype(np.longdouble)
    vander = np.vander(k.astype(np.longdouble), increasing=True)
    inverse = inverse @ (2 * np.eye(13, dtype=np.longdouble) - vander @ inverse)  # one step of refinement
    return [(m * (inverse @ samples)[i] / np.longdouble(steps) ** i).astype(float) for i, m in ((1, 1), (2, 2), (3, 6))]


def on_support(p, power):
    return np.where(p > 0, np.where(p > 0, p, 1) ** np.longdouble(power), 0)


def test_python_number_and_array_agree():
    """1.5 and 2.0 have code of their own, chosen by a Python or numpy number; it is that of entmax15 and sparsemax."""
    z = jnp.asarray(Z, jnp.float32)
    for alpha, own in ((1.5, entmax15), (2, sparsemax), (np.float64(2.0), sparsemax)):
        np.testing.assert_array_equal(entmax(z, alpha), own(z))
        np.testing.assert_allclose(entmax(z, jnp.float32(alpha)), own(z), rtol=0, atol=2 * EPS)
    assert sparsemax(jnp.array([2.0, 1.0])).tolist() == [1.0, 0.0]
    np.testing.assert_array_equal(sparsemax(jnp.array([0.25, 0.0])), [0.625, 0.375])


def closed_forms(alpha):
    """J = diag(q) - qqᵀ/Σq and D²p[u, v] = r∘ũṽ - q<r, ũṽ>/Σq with r = (2-α) p^(3-2α), at Z."""
    p = reference(Z, alpha)
    q, r = on_support(p, 2 - alpha), (2 - alpha) * on_support(p, 3 - 2 * np.longdouble(alpha))
    centred = np.eye(5) - (q / q.sum())[:, None]  # row u: the unit vector minus its mean under π
    product = centred.T[:, :, None] * centred.T[:, None, :]  # [class, u, v]
    second = r[:, None, None] * product - q[:, None, None] * np.tensordot(r, product, 1) / q.sum()
    return p, (np.diag(q) - np.outer(q, q) / q.sum()).astype(float), second.astype(float)


@pytest.mark.parametrize("function", [sparsemax, entmax15, entmax])
def test_jacobian_and_second_derivative(function, x64):
    """In both modes, with exact zeros outside the support."""
    derivatives = [jax.jit(jax.jacrev(function)), jax.jit(jax.jacfwd(jax.jacrev(function)))]
    if function is not entmax15:
        derivatives += [jax.jit(jax.jacfwd(function)), jax.jit(jax.jacrev(jax.jacfwd(function)))]
    for alpha in {sparsemax: [2.0], entmax15: [1.5], entmax: [1.0, 1.3, 1.5, 2.0, 2.5]}[function]:
        p, *forms = closed_forms(alpha)
        for derivative, form in zip(derivatives, 2 * forms):
            got = np.asarray(derivative(Z, alpha) if function is entmax else derivative(Z))
            np.testing.assert_allclose(got, form, rtol=0, atol=1e-14 * abs(form).max())
            assert np.all(got[p == 0] == 0) and np.all(got[:, p == 0] == 0)


def test_order_three_in_both_modes(x64):
    """Along a line in (x, α), through α = 1 and 2 too, against differences of the reference."""
    v, w, step = np.array([0.2, -0.1, -0.3, 0.25, 0.1]), np.array([0.7, -1.0, 0.4, 1.1, -0.2]), 0.3
    value = lambda z, a: jnp.dot(w, entmax(z, a))
    forward = lambda f: lambda z, a: jax.jvp(f, (z, a), (v, step))[1]
    reverse = lambda f: lambda z, a: sum(jnp.vdot(g, t) for g, t in zip(jax.grad(f, (0, 1))(z, a), (v, step)))
    chains = [
        (m, n(m), k(n(m))) for k, n, m in ((forward, forward, forward(value)), (reverse, reverse, reverse(value)))
    ]
    chains = [jax.jit(lambda z, a, c=c: jnp.stack([f(z, a) for f in c])) for c in chains]
    for alpha in (1.0, 1 + 1e-9, 1.4, 2.0, 2.7):
        want = slopes(lambda t, a=alpha: reference(Z + t * v, a + t * step) @ w)
        for chain in chains:
            np.testing.assert_allclose(chain(Z, alpha), want, rtol=0, atol=1e-9)


def test_derivative_in_alpha_is_continuous_through_softmax_and_sparsemax(x64):
    slope = jax.jit(jax.jacfwd(entmax, 1))
    for alpha in (1.0, 1 + 1e-14, 1 + 1e-9, 1 + 1e-5, 1.003, 1.3, 2 - 1e-9, 2.0, 2 + 1e-9, 2.6):
        want = slopes(lambda t, a=alpha: reference(Z, a + t))[0]
        assert_close(slope(Z, alpha), want)
    p, logp = jax.nn.softmax(Z), jax.nn.log_softmax(Z)  # Correia et al. 2019: ½ (p <p, log²p> - p log²p) at α = 1
    assert_close(slope(Z, 1.0), (p * jnp.dot(p, logp**2) - p * logp**2) / 2)


def test_jacobian_product_from_probabilities():
    """q = p^(2-α) stays 0 where p is 0, also for α > 2."""
    p, v = np.float32([0.5, 0.0, 0.3, 0.2]), np.float32([1.0, 5.0, -2.0, 0.5])
    for alpha in (1.0, 2.0, 3.5):
        q = on_support(p, 2 - alpha)
        got = entmax_jacobian_product(jnp.asarray(v), jnp.asarray(p), jnp.full(1, alpha), 0)
        np.testing.assert_allclose(got, (q * (v - q @ v / q.sum())).astype(float), rtol=0, atol=4 * EPS * q.max())


def test_alpha_broadcasts_over_the_batch(x64):
    """A scalar, an array that broadcasts against the leading axes, vmap, and the gradient in each."""
    z = np.random.default_rng(3).normal(size=(2, 3, 4))
    alpha = np.array([[1.0], [2.3]])  # (2, 1) against (2, 3): one row on each solver
    want = np.array([[reference(row, a) for row in rows] for rows, a in zip(z, alpha[:, 0])], float)
    assert_close(entmax(z, alpha), want)
    assert_close(jax.jit(jax.vmap(entmax))(z, alpha[:, 0]), want)
    moved = entmax(z.transpose(2, 0, 1), alpha, axis=0)
    assert_close(moved, want.transpose(2, 0, 1))
    w = np.arange(24.0).reshape(2, 3, 4)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(w * entmax(z, a))))(alpha)
    for i in range(2):
        slope = slopes(lambda t, i=i: sum(w[i, j] @ reference(z[i, j], alpha[i, 0] + t) for j in range(3)))[0]
        assert_close(gradient[i, 0], slope)


def test_alpha_that_could_be_read_in_two_ways_is_refused():
    """(4, 1) is a row of the examples (4, 4), and in NumPy a number for each place of the second of (4, 4, 5)."""
    z, alpha = jnp.zeros((4, 4, 5)), jnp.full((4, 1), 1.5)
    with pytest.raises(ValueError, match=r"alpha has shape \(4, 1\).*broadcast it to \(4, 4\)"):
        entmax(z, alpha)
    with pytest.raises(ValueError, match="temperature has shape"):
        softmax_entropy(z, temperature=alpha)
    assert entmax(z, jnp.broadcast_to(alpha, (4, 4))).shape == entmax(z, alpha[0]).shape == z.shape


def test_axes():
    z = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 4)), jnp.float32)
    np.testing.assert_allclose(sparsemax(jnp.moveaxis(z, 2, 0), axis=-3), jnp.moveaxis(sparsemax(z), 2, 0), atol=EPS)
    merged = sparsemax(z.reshape(2, 12)).reshape(2, 3, 4)
    np.testing.assert_allclose(sparsemax(z, axis=(1, -1)), merged, atol=EPS)
    np.testing.assert_allclose(entmax(z, np.float32([1.5, 1.2]), axis=(2, 1))[0], entmax15(z[0], None), atol=2 * EPS)
    np.testing.assert_allclose(entmax15(z, axis=None), entmax15(z.ravel()).reshape(z.shape), atol=EPS)


def test_traced_alpha_out_of_range_is_nan():
    for alpha in (0.999, np.nan, np.inf, -1.0):
        assert np.isnan(jax.jit(entmax)(jnp.arange(3.0), jnp.float32(alpha))).all()


def test_transformations_compose():
    z = jnp.asarray(np.random.default_rng(6).normal(size=(3, 6)), jnp.float32)
    f = lambda z, a: jnp.sum(entmax(z, a) ** 2, -1)
    want = jax.jit(jax.vmap(jax.grad(f), (0, None)))(z, 2.4)
    carried = jax.jit(lambda z, a: jax.lax.scan(lambda a, row: (a, jax.grad(jax.checkpoint(f))(row, a)), a, z)[1])
    np.testing.assert_allclose(carried(z, 2.4), want, atol=4 * EPS)


@pytest.mark.parametrize("exact, alpha", [(2.0, 2.0), (1.5, 1.5), ("at most 2", 1.25)])
def test_rounds_written_out_and_the_loop_agree(exact, alpha, monkeypatch):
    """Where so many rounds are not enough p is NaN, in that slice alone."""
    inf, nan = np.inf, np.nan
    rng = np.random.default_rng(3)
    hard = [[-inf, 0.5, 1, 0], [inf, 0, 1, 2], [inf, inf, 0, 1], [-inf] * 4, [nan, 0, 1, 2], [0] * 4, [1e4, 0, 0, 9e3]]
    z = np.concatenate([np.pad(np.float32(hard), ((0, 0), (0, 96)), constant_values=-inf), rng.normal(size=(9, 100))])
    z, alphas = jnp.asarray(z, jnp.float32), jnp.full((16, 1), alpha, jnp.float32)
    solution = functools.partial(entmax_solver._solution, z=z, alpha=alphas, exact=exact, axis=ClassAxis((1,)))
    loop = solution(entmax_solver._until_settled)
    np.testing.assert_allclose(solution(entmax_solver._written_out), loop, rtol=8 * EPS, atol=2 * EPS)
    monkeypatch.setattr(entmax_solver, "ROUNDS", 1)
    few, start = np.asarray(solution(entmax_solver._written_out)), np.sum(loop > 0, -1) == 1
    assert np.isnan(few[~start]).all() and start.any()
    np.testing.assert_array_equal(few[start], loop[start])


ALPHAS = [1.0, 1.001, 1.2, 1.5, 1.8, 2.0, 2.5, 4.0]


def hard_inputs():
    """Batches of logits in float32, each of one size, so that little is compiled."""
    rng = np.random.default_rng(0)
    for size in (2, 1000):
        yield (rng.normal(size=(4, size)) * [[0.01], [0.3], [1.0], [5.0]]).astype(np.float32)
    ties, groups, staircase = np.zeros(60), np.repeat([1.0, 0.9, -0.5], 20), 2.0 ** -np.arange(60.0)
    far, one = 1e4 + rng.normal(size=60), 20.0 * (np.arange(60) == 3)
    yield np.array([ties, groups, staircase, far, one], np.float32)


@pytest.mark.optimized
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


@pytest.mark.optimized
def test_values_in_float64(x64):
    z = np.random.default_rng(1).normal(size=(3, 60))
    for alpha in ALPHAS:
        want = np.array([reference(row, alpha) for row in z])
        np.testing.assert_allclose(np.asarray(entmax(z, alpha), np.longdouble), want, rtol=0, atol=4e-16)


@pytest.mark.optimized
def test_derivative_in_alpha_keeps_its_digits_in_float32():
    """No cancellation near α = 1 (where the textbook formula divides by (α-1)²), nor for classes with small p."""
    z = np.array([0.0, -1.0, -4.0, -12.0, 0.2], np.float32)
    slope = jax.jit(jax.jacfwd(entmax, 1))
    for alpha in np.float32([1.0, 1.0 + EPS, 1.0001, 1.01, 1.2, 1.5, 2.0]):
        want = slopes(lambda t, a=alpha: reference(z, a + t))[0]
        np.testing.assert_allclose(slope(z, alpha), want, rtol=0, atol=8 * EPS * np.abs(want).max())


@pytest.mark.optimized
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


@pytest.mark.optimized
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


@pytest.mark.optimized
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
