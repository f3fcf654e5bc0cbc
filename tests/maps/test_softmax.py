"""softmax, log_softmax and logsumexp: accuracy, special values, masks, residuals, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js

INF, NAN = np.inf, np.nan


SPECIAL = [
    # logits, softmax, log_softmax, logsumexp
    ([-INF, 0.0, 0.0], [0, 0.5, 0.5], [-INF, -np.log(2), -np.log(2)], np.log(2)),
    ([INF, 0.0, -INF], [1, 0, 0], [0, -INF, -INF], INF),
    ([INF, INF, 0.0], [0.5, 0.5, 0], [-np.log(2), -np.log(2), -INF], INF),
    ([-INF, -INF, -INF], [NAN] * 3, [NAN] * 3, -INF),
    ([NAN, 0.0, 1.0], [NAN] * 3, [NAN] * 3, NAN),
    ([3e38, -3e38, 0.0], [1, 0, 0], [0, -INF, -3e38], 3e38),
]


MAPS = "softmax", "log_softmax", "logsumexp"


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("logits, p, logp, lse", SPECIAL)
def test_special_values(wrap, logits, p, logp, lse):
    z = jnp.array([logits, [0.0, 0.0, 0.0]])  # the second slice must stay untouched
    for f, want, plain in (
        (js.softmax, p, [1 / 3] * 3),
        (js.log_softmax, logp, [-np.log(3)] * 3),
        (lambda z: js.logsumexp(z, -1), lse, np.log(3)),
    ):
        np.testing.assert_allclose(wrap(f)(z), np.array([want, plain], np.float32), rtol=3e-7)


def derivatives(f):
    return jax.jit(lambda z: (f(z), jax.jacfwd(f)(z), jax.jacrev(f)(z), jax.hessian(f)(z)))


KEPT = np.array([True, False, True, True, False])
MASKED = {name: derivatives(functools.partial(getattr(js, name), where=KEPT)) for name in MAPS}


def test_an_excluded_class_has_no_derivative():
    z = jnp.array([1.0, -INF, 0.0])
    for f in (js.softmax, lambda z: js.log_softmax(z)[::2], js.logsumexp):
        _, forward, reverse, second = map(np.asarray, derivatives(f)(z))
        assert np.all(forward[..., 1] == 0) and np.all(reverse[..., 1] == 0)
        assert np.all(second[..., 1, :] == 0) and not np.any(np.isnan(second))


@pytest.mark.parametrize("behind", [0.0, NAN, INF, -INF])
@pytest.mark.parametrize("name", MAPS)
def test_masked_equals_compressed(name, behind):
    """Where a class is masked, everything is as if it were not there, whatever stands behind the mask."""
    kept, small = KEPT, np.array([0.3, -1.0, 2.0], np.float32)
    z = np.full(5, behind, np.float32)
    z[kept] = small
    absent = 0.0 if name == "softmax" else -INF
    f, z = getattr(js, name), jnp.asarray(z)
    with jax.debug_nans(True):
        got, *grads, hessian = map(np.asarray, MASKED[name](z))
    want, jacobian, _, second = map(np.asarray, derivatives(f)(jnp.asarray(small)))
    if name != "logsumexp":
        assert np.all(got[~kept] == absent)
        got, grads, hessian = got[kept], [g[kept] for g in grads], hessian[kept]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for g in grads:
        np.testing.assert_allclose(g[..., kept], jacobian, rtol=1e-5, atol=1e-7)
        assert np.all(g[..., ~kept] == 0)
    assert np.all(hessian[..., ~kept, :] == 0) and np.all(hessian[..., ~kept] == 0)
    np.testing.assert_allclose(hessian[..., kept, :][..., kept], second, rtol=1e-5, atol=1e-6)


def test_fully_masked_slice():
    z, mask = jnp.full((2, 3), NAN).at[1].set(0.0), np.array([[False] * 3, [True] * 3])
    with jax.debug_nans(True):
        assert np.all(np.asarray(js.softmax(z, where=mask))[0] == 0)
        assert np.all(np.asarray(js.log_softmax(z, where=mask))[0] == -INF)
        assert js.logsumexp(z, 1, where=mask)[0] == -INF
        for derivative in derivatives(lambda z: js.softmax(z, where=mask))(z)[1:]:
            assert np.all(np.asarray(derivative)[0] == 0)


def test_axes_and_shapes():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    of = lambda package, axis: (
        package.softmax(z, axis=axis),
        package.log_softmax(z, axis=axis),
        *(package.logsumexp(z, axis, keepdims=keepdims) for keepdims in (False, True)),
    )
    for axis in (1, -1, (2, 0), None):
        for got, want in zip(*jax.jit(lambda: (of(js, axis), of(jax.nn, axis)))()):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=2e-6)
    assert js.softmax(jnp.zeros((3, 0))).shape == (3, 0) and js.softmax(jnp.zeros((0, 3))).shape == (0, 3)
    assert np.all(np.asarray(js.logsumexp(jnp.zeros((2, 0)), 1)) == -INF)
    assert js.softmax(jnp.float32(3.0), axis=None) == 1.0
    assert js.softmax([1, 2]).dtype == js.log_softmax(np.arange(3)).dtype == jnp.float32


def test_logsumexp_with_factors(x64):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    b[0, 2] = 0.0
    value, sign = js.logsumexp(a, 1, b=b, return_sign=True)
    total = (b * np.exp(a)).sum(1)
    np.testing.assert_allclose(sign * np.exp(value), total, rtol=1e-13)
    np.testing.assert_array_equal(np.isnan(js.logsumexp(a, 1, b=b)), total < 0)
    gradient = jax.grad(lambda a, b: js.logsumexp(a, 1, b=b, return_sign=True)[0].sum(), (0, 1))(a, b)
    np.testing.assert_allclose(gradient[0], b * np.exp(a) / total[:, None], rtol=1e-12)
    np.testing.assert_allclose(gradient[1], np.exp(a) / total[:, None], rtol=1e-12)
    assert js.logsumexp(jnp.array([800.0, 1.0]), b=jnp.array([0.0, 1.0])) == 1.0


def test_the_rule_runs():
    """The jaxpr holds the custom rule, under jit and vmap too."""
    for f in (js.softmax, js.log_softmax, lambda z: js.logsumexp(z, -1)):
        assert "custom_jvp_call" in str(jax.make_jaxpr(jax.vmap(f))(jnp.ones((2, 3))))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64"])
def test_integers_become_the_float_that_jnp_exp_makes_of_them(dtype, x64):
    x = np.array([1, 2, 3], dtype)
    for f in (js.softmax, js.log_softmax, js.logsumexp, js.sparsemax, js.entmax):
        np.testing.assert_allclose(f(x), f(x.astype(float)), rtol=1e-6)
        assert f(x).dtype == jnp.exp(x).dtype
