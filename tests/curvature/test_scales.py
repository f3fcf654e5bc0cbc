"""Solutions, eigenvalues and estimates scale with the matrix over the whole range of the dtype, and claim no more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax.curvature import damped_solve, estimators, gauss_newton, ggn_vp, last_layer_laplace
from jaxsoftmax.network import Layer
from tests.curvature.test_second_order import laplace, log_evidence, logits, probabilities, with_best_prior
from tests.helpers import assert_close, enable_x64

D, U = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, -2.0, 3.0, 0.5])
SINGLE, DOUBLE = (1e-37, 1e-30, 1e-20, 1e19, 1e30, 1e37), (1e-300, 1e-160, 1e160, 1e300)
SCALES = [*((scale, jnp.float32) for scale in SINGLE), *((scale, jnp.float64) for scale in DOUBLE)]
over_scales = pytest.mark.parametrize(("scale", "dtype"), SCALES, ids=lambda x: getattr(x, "__name__", str(x)))
over_inner_scales = pytest.mark.parametrize(  # of matrices whose small entries are still in the range
    ("scale", "dtype"),
    [*SCALES[1:5], *(pytest.param(*case, marks=pytest.mark.slow) for case in SCALES[7:9])],
    ids=lambda x: getattr(x, "__name__", str(x)),
)


@pytest.fixture(autouse=True)
def precision(request):
    wide = "dtype" in request.fixturenames and request.getfixturevalue("dtype") == jnp.float64
    if wide:
        with enable_x64():
            yield
    else:
        yield


@jax.jit
def solved(d, b, damping=0.0):
    return damped_solve(lambda v: d * v, b, damping)


@jax.jit
def preconditioned(d, b, m):
    return damped_solve(lambda v: d * v, b, 0.0, preconditioner=lambda r: m * r)


@functools.partial(jax.jit, static_argnums=2)
def three_eigenpairs(A, key, steps):
    return estimators.top_eigenpairs(lambda v: A @ v, A[0], key, 3, steps)


@jax.jit
def estimates(A, key):
    product, like = lambda v: A @ v, A[0]
    methods = estimators.hutchinson_trace, estimators.hutchinson_diagonal, estimators.hutchpp_trace
    found = [method(product, like, key, 12) for method in methods]
    return found, estimators.spectral_density(product, like, key, 5)


def assert_solution(solution, x, dtype):
    np.testing.assert_allclose(np.asarray(solution.x, float) / x, 1.0, rtol=20 * jnp.finfo(dtype).eps)
    assert solution.converged and solution.residual <= 1e-5 and solution.steps == 4


@over_scales
def test_solutions_scale_with_b(scale, dtype):
    d, b = jnp.asarray(D, dtype), jnp.asarray(scale * U, dtype)
    assert_solution(solved(d, b), scale * U / D, dtype)


@over_scales
def test_solutions_scale_with_the_inverse_of_the_matrix(scale, dtype):
    """Also where b has the scale of the matrix, and where the damping has."""
    d, b = jnp.asarray(scale * D, dtype), jnp.asarray(U, dtype)
    if 1e-37 < scale < 1e37:
        assert_solution(solved(d, b), U / D / scale, dtype)
    assert_solution(solved(d, jnp.asarray(scale, dtype) * b), U / D, dtype)
    assert_solution(solved(d, jnp.asarray(scale, dtype) * b, 4.0 * scale), U / (D + 4), dtype)


@over_scales
def test_the_scale_of_a_preconditioner_does_not_matter(scale, dtype):
    d, b = jnp.asarray(D, dtype), jnp.asarray(U, dtype)
    assert_solution(preconditioned(d, b, jnp.full(4, scale, dtype)), U / D, dtype)
    exact = preconditioned(d, b, jnp.asarray(scale, dtype) / d)
    assert exact.steps == 1 and exact.converged


def test_converged_is_what_b_minus_Ax_says():
    """Ill-conditioned in float32, where the recurrence drifts; solutions beyond the range; NaN."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    solve = jax.jit(lambda A, b, tol: damped_solve(lambda v: A @ v, b, 0.0, tol=tol, max_steps=400))
    for condition in (1e2, 1e4, 1e6):
        A, b = jnp.asarray((Q * np.geomspace(1, condition, 60)) @ Q.T, jnp.float32), jnp.asarray(Q.sum(1), jnp.float32)
        for tol in (1e-3, 1e-5, 1e-7):
            solution = solve(A, b, tol)
            x, A64, b64 = (np.asarray(a, float) for a in (solution.x, A, b))
            true = np.linalg.norm(b64 - A64 @ x) / np.linalg.norm(b64)
            slack = 4 * 2.0**-23 * condition * np.linalg.norm(x) / np.linalg.norm(b64)
            assert abs(solution.residual - true) <= slack
            assert not solution.converged or true <= tol + slack
    d = jnp.asarray(D, jnp.float32)
    assert solved(d, jnp.asarray(U, jnp.float32)).converged
    beyond, beneath = solved(1e-10 * d, jnp.full(4, 1e35)), solved(1e10 * d, jnp.full(4, 1e-35))
    unknown = solved(d, jnp.array([1.0, jnp.nan, 1.0, 1.0]))
    singular = solved(0 * d, jnp.ones(4))
    assert not any(s.converged for s in (beyond, beneath, unknown, singular))
    assert singular.residual == 1 and jnp.all(singular.x == 0)


@over_inner_scales
def test_eigenvalues_scale_with_the_matrix_and_bounds_hold(scale, dtype, key):
    """1…10 times the scale; what is claimed bounds the distance to an eigenvalue, up to the rounding of the product."""
    eigenvalues = np.arange(1.0, 11.0)
    Q, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((10, 10)))
    A = jnp.asarray(scale * (Q * eigenvalues) @ Q.T, dtype)
    eps = float(jnp.finfo(dtype).eps)
    for steps in (4, 10):
        found, _, bounds = three_eigenpairs(A, key, steps)
        found, bounds = np.asarray(found, float) / scale, np.asarray(bounds, float) / scale
        nearest = np.abs(found[:, None] - eigenvalues).min(1)
        assert np.all(nearest <= bounds + 20 * eps * eigenvalues[-1])
        assert np.all(bounds < 2)
    np.testing.assert_allclose(found, eigenvalues[:-4:-1], rtol=100 * eps)


@over_inner_scales
def test_estimates_and_their_errors_scale_with_the_matrix(scale, dtype, key):
    A = np.random.default_rng(2).standard_normal((8, 8))
    A = A + A.T
    (wanted, one), (found, other) = (estimates(jnp.asarray(factor * A, dtype), key) for factor in (1.0, scale))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        assert np.all(np.asarray(b) != 0)
        np.testing.assert_allclose(np.asarray(a, float) / scale, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(other.nodes, float) / scale, one.nodes, rtol=1e-3)
    np.testing.assert_allclose(other.weights, one.weights, rtol=1e-3, atol=1e-5)


def test_gauss_newton_on_a_sure_network():
    """A logit gap of 60: gradient and curvature are about e^-60, their quotient, the undamped step, about 1."""
    x, labels, params = jnp.ones((1, 1)), jnp.zeros(1, int), jnp.array([[60.0], [0.0]])
    f, loss = lambda W, x: x @ W.T, js.softmax_cross_entropy_with_integer_labels
    value_fn = lambda W: loss(f(W, x), labels).mean()
    value, gradient = jax.jit(jax.value_and_grad(value_fn))(params)
    tiny = np.exp(-60.0)
    assert_close(gradient[:, 0], np.array([-tiny, tiny]))
    solution = jax.jit(lambda b: damped_solve(lambda v: ggn_vp(f, loss, params, x, labels, v), b, 0.0))(-gradient)
    assert_close(solution.x[:, 0], np.array([0.5, -0.5]))
    assert solution.converged

    @functools.partial(jax.jit, static_argnums=1)
    def update(damping, adapt):
        optimizer = gauss_newton(f, loss, adapt=adapt, tol=1e-5)
        state = optimizer.init(params)._replace(damping=damping)
        return optimizer.update(gradient, state, params, batch=(x, labels), value=value, value_fn=value_fn)

    for damping, wanted in ((0.0, 0.5), (tiny, tiny / (2 * tiny + tiny)), (1.0, tiny)):
        np.testing.assert_allclose(update(damping, 1.0)[0][:, 0], [wanted, -wanted], rtol=1e-4)
    step, state = update(jnp.float32(1e-28), 1.5)
    np.testing.assert_allclose(step[:, 0], [0.5, -0.5], rtol=1e-1)
    wanted = (value_fn(params + step) - value) / (-0.5 * tiny)
    np.testing.assert_allclose(state.ratio, wanted, rtol=1e-1)


# Laplace


def layer_and_data():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((20, 3)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 2, 20))


def test_best_prior_where_the_evidence_has_no_maximum_inside():
    """At W = 0 the evidence rises with the precision for ever; without curvature it falls from 0 on."""
    loss = js.softmax_cross_entropy_with_integer_labels
    x, labels = layer_and_data()
    posterior = with_best_prior(laplace(Layer(jnp.zeros((2, 3))), x, labels, loss=loss))
    assert posterior.prior_precision == jnp.inf
    assert_close(log_evidence(posterior), -20 * np.log(2))
    assert_close(probabilities(posterior, x), np.full((20, 2), 0.5))
    sure = Layer(jnp.array([[200.0, 0, 0], [-200.0, 0, 0]]))
    posterior = with_best_prior(laplace(sure, jnp.ones((20, 3)), jnp.zeros(20, int), loss=loss))
    assert posterior.prior_precision == 0.0
    assert not jnp.any(jnp.isnan(log_evidence(posterior, 1.0)))
    assert not jnp.any(jnp.isnan(probabilities(posterior, x)))


def test_predictive_of_each_head(x64):
    from scipy.integrate import quad

    x = jnp.array([[1.0], [0.0], [-1.0]])
    bits = jnp.array([[1.0], [0.0], [0.0]])
    posterior = laplace(Layer(jnp.array([[2.0]])), x, bits, loss=js.sigmoid_binary_cross_entropy)
    np.testing.assert_allclose(probabilities(posterior, x)[:, 0], [0.8504, 0.5, 0.1496], atol=5e-5)
    mean, covariance = map(np.asarray, logits(posterior, x))
    sampled = probabilities(posterior, x, jax.random.key(0), num_samples=20_000)[:, 0]
    for m, v, p in list(zip(mean[:, 0], covariance[:, 0, 0], sampled))[::2]:
        density = lambda z, m=m, v=v: np.exp(-((z - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v) / (1 + np.exp(-z))
        np.testing.assert_allclose(p, quad(density, -20, 20)[0], atol=4 * 0.5 / np.sqrt(20_000))
    for loss, noise in ((js.l2_loss, 1.0), (js.squared_error, 0.5), (js.sum_squared_error, 0.5)):
        posterior = laplace(Layer(jnp.array([[2.0]])), x, bits, loss=loss)
        mean, covariance = posterior.predictive(x)
        np.testing.assert_allclose(mean, 2 * x)
        assert_close(covariance, logits(posterior, x)[1] + noise)
        with pytest.raises(TypeError, match="probabilities .*predictive"):
            posterior.probabilities(x)
    with pytest.raises(TypeError, match="loss must be .*softmax_cross_entropy.*got focal_loss_with_integer_labels"):
        last_layer_laplace(Layer(jnp.ones((2, 1))), x, jnp.zeros(3, int), js.focal_loss_with_integer_labels)
