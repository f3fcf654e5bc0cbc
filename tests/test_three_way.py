"""jacrev, jacfwd and the analytic form of every closed derivative, three ways, and plain numpy as the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js

REGIMES = {
    "normal": np.random.default_rng(0).normal(size=6),
    "sure": np.array([15.0, 0.0, 1.0, -2.0]),
    "ties": np.zeros(5),
    "offset": np.random.default_rng(1).normal(size=4) + 1e4,
    "two classes": np.array([0.3, -0.7]),
    "one class": np.array([2.5]),
    "excluded": np.array([1.0, -np.inf, 0.0]),
}


def reference(z):
    """softmax in extended precision, by the definition."""
    e = np.exp(np.asarray(z, np.longdouble) - np.max(z))
    return e / e.sum()


def jacobian(p):
    return np.diag(p) - np.outer(p, p)


FORMS = {
    "softmax": (js.softmax, lambda z, p: jacobian(p)),
    "log_softmax": (
        lambda z: jnp.where(z > -jnp.inf, js.log_softmax(z), 0.0),
        lambda z, p: (np.eye(len(p)) - p) * (z > -np.inf)[:, None],
    ),
    "logsumexp": (js.logsumexp, lambda z, p: p),
    "label loss": (lambda z: js.softmax_cross_entropy_with_integer_labels(z, 0), lambda z, p: p - np.eye(len(p))[0]),
    "soft label loss": (
        lambda z: js.softmax_cross_entropy(z, jnp.where(z > -jnp.inf, 0.5, 0.0).at[0].set(1.0)),
        lambda z, p: (y := np.where(np.arange(len(p)) == 0, 1.0, 0.5) * (z > -np.inf)).sum() * p - y,
    ),
    "squared error": (lambda z: js.sum_squared_error(jnp.exp(z), 0.5 * jnp.ones_like(z)),
                      lambda z, p: 2 * (np.exp(z) - 0.5) * np.exp(z)),
}


MODES = jax.jacfwd, jax.jacrev
FIRST = {
    form: jax.jit(lambda z, f=f: [differentiate(f)(z) for differentiate in MODES]) for form, (f, _) in FORMS.items()
}
SECOND = jax.jit(lambda z: [outer(inner(js.softmax))(z) for outer in MODES for inner in MODES])
HESSIANS = jax.jit(lambda z: [jax.hessian(FORMS[form][0])(z) for form in ("label loss", "logsumexp")])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", FORMS)
def test_jacobian_three_ways(form, regime, x64):
    _, analytic = FORMS[form]
    z = REGIMES[regime]
    if form == "squared error" and regime == "offset":
        pytest.skip("exp(1e4) overflows")
    want = np.asarray(analytic(z, reference(z)), np.float64)
    forward, reverse = FIRST[form](jnp.asarray(z))
    np.testing.assert_allclose(forward, want, rtol=2e-13, atol=1e-15 + 1e-13 * np.abs(want).max())
    np.testing.assert_allclose(reverse, want, rtol=2e-13, atol=1e-15 + 1e-13 * np.abs(want).max())
    np.testing.assert_allclose(forward, reverse, rtol=1e-14, atol=1e-15 * np.abs(want).max())


@pytest.mark.parametrize("regime", [r for r in REGIMES if r != "excluded"])
def test_second_derivative_three_ways(regime, x64):
    """D²σ_ijk = p_i [(δ_ij - p_j)(δ_ik - p_k) - p_j (δ_jk - p_k)], and the Hessian of every cross-entropy is J."""
    z = REGIMES[regime]
    p = reference(z)
    eye = np.eye(len(p))
    want = p[:, None, None] * ((eye - p)[:, :, None] * (eye - p)[:, None, :] - jacobian(p)[None]).astype(np.float64)
    want = np.asarray(want, np.float64)
    for second in SECOND(jnp.asarray(z)):
        np.testing.assert_allclose(second, want, rtol=1e-12, atol=2e-15)
    for hessian in HESSIANS(jnp.asarray(z)):
        np.testing.assert_allclose(hessian, np.asarray(jacobian(p), np.float64), rtol=1e-12, atol=1e-15)
