"""Gauss-Newton steps against the closed form, and the Laplace approximation against Bayesian linear regression."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxsoftmax as js
from jaxsoftmax import network
from jaxsoftmax.curvature import LastLayerLaplace, gauss_newton, last_layer_laplace
from jaxsoftmax.training import TrainState, make_train_step
from tests.helpers import assert_close

CROSS_ENTROPY = js.softmax_cross_entropy_with_integer_labels
init = jax.jit(network.init, static_argnums=1)
laplace = jax.jit(last_layer_laplace, static_argnames=("loss", "batch_size"))
logits, log_evidence = jax.jit(LastLayerLaplace.logits), jax.jit(LastLayerLaplace.log_evidence)
probabilities = jax.jit(LastLayerLaplace.probabilities, static_argnames="num_samples")
with_best_prior = jax.jit(LastLayerLaplace.with_best_prior)


def linear(W, x):
    return x @ W.T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def data(count=40, d=5, k=3):
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (count, d))
    W = jax.random.normal(keys[1], (k, d))
    return x, jnp.argmax(x @ W.T + 0.5 * jax.random.normal(keys[2], (count, k)), -1), W


def objective(f, loss):
    return lambda params, x, y: loss(f(params, x), y).mean()


# Gauss-Newton


def test_one_step_solves_least_squares(x64):
    """On a quadratic the model is the loss: one undamped step ends at the solution of the normal equations."""
    x, _, W = data()
    y = x @ W.T + jnp.sin(jnp.arange(120.0)).reshape(40, 3)
    optimizer = gauss_newton(linear, js.sum_squared_error, damping=0.0, tol=1e-13, adapt=1.0)
    state = TrainState.create(jnp.zeros((3, 5)), optimizer)
    state, _ = make_train_step(objective(linear, js.sum_squared_error), optimizer)(state, x, y)
    np.testing.assert_allclose(state.params, np.linalg.lstsq(np.asarray(x), np.asarray(y))[0].T, rtol=1e-10)


def test_the_step_is_the_damped_natural_gradient(x64):
    """d = -(G + λI)⁻¹ g, for a network and a loss of the caller's, against the dense solve."""
    x, labels, _ = data()
    loss = lambda z, y: jax.nn.logsumexp(z, -1) - jnp.sum(z * jax.nn.one_hot(y, 3), -1)
    params = init(jax.random.key(0), (5, 4, 3))
    flat, unravel = ravel_pytree(params)
    value_fn = lambda params: loss(network.forward(params, x), labels).mean()
    optimizer = gauss_newton(network.forward, loss, damping=0.1, tol=1e-12, max_steps=200, learning_rate=0.5)

    @jax.jit
    def both(params):
        value, grads = jax.value_and_grad(value_fn)(params)
        extra = {"batch": (x, labels), "value": value, "value_fn": value_fn}
        step, state = optimizer.update(grads, optimizer.init(params), params, **extra)
        change = value_fn(jax.tree.map(jnp.add, params, step)) - value
        J = jax.jacrev(lambda flat: network.forward(unravel(flat), x))(flat)
        p = jax.nn.softmax(network.forward(params, x))
        H = jnp.einsum("bk,kl->bkl", p, jnp.eye(3)) - jnp.einsum("bk,bl->bkl", p, p)
        G = jnp.einsum("bki,bkl,blj->ij", J, H, J) / 40
        return ravel_pytree(step)[0], state, change, ravel_pytree(grads)[0], G

    step, state, change, g, G = both(params)
    wanted = -0.5 * np.linalg.solve(G + 0.1 * np.eye(len(G)), g)
    assert_close(step, wanted, rtol=1e-8)
    np.testing.assert_allclose(state.ratio, change / (g @ wanted + wanted @ G @ wanted / 2), rtol=1e-8)
    assert state.ratio > 0.75
    assert_close(state.damping, 0.1 / 1.5)


def test_damping_rises_where_the_model_fails_and_bad_steps_are_not_taken(x64):
    """exp(3w) with a far target: the first step overshoots and is refused, later ones are taken, to the solution."""
    f = lambda w, x: jnp.exp(3 * w) * x
    x, y = jnp.ones((1, 1)), jnp.full((1, 1), 400.0)
    value_fn = lambda w: js.sum_squared_error(f(w, x), y).mean()
    optimizer = gauss_newton(f, js.sum_squared_error, damping=1e-6)

    @jax.jit
    def forty_steps(w):
        def one(at, _):
            w, state = at
            value, grads = jax.value_and_grad(value_fn)(w)
            step, new = optimizer.update(grads, state, w, batch=(x, y), value=value, value_fn=value_fn)
            seen = value, value_fn(w + step), ~jnp.any(step), new.damping / state.damping
            return (w + step, new), seen

        return jax.lax.scan(one, (w, optimizer.init(w)), length=40)

    (w, _), (before, after, refused, factor) = jax.tree.map(np.asarray, forty_steps(jnp.zeros((1, 1))))
    assert refused[0] and np.all(after <= before)
    np.testing.assert_allclose(factor[refused & (before > 1e-12)], 1.5**4, rtol=1e-12)
    assert_close(w[0, 0], np.log(400) / 3)


def test_gauss_newton_refuses():
    optimizer = gauss_newton(linear, CROSS_ENTROPY)
    W = jnp.ones((3, 5))
    with pytest.raises(ValueError, match="needs the arguments params, batch, value, value_fn"):
        optimizer.update(W, optimizer.init(W))
    with pytest.raises(TypeError, match="params must be a pytree of floating-point arrays"):
        optimizer.init({"W": W, "steps": jnp.int32(0)})


# Laplace


def test_laplace_is_exact_for_linear_regression(x64):
    """l = ½‖Wφ + b - y‖² is Gaussian: posterior covariance and evidence in closed form, batch size without effect."""
    x, _, W = data(30)
    y = x @ W.T + jnp.cos(jnp.arange(90.0)).reshape(30, 3)
    phi, delta = np.concatenate([x, np.ones((30, 1))], 1), 0.7
    inverse = np.linalg.inv(phi.T @ phi + delta * np.eye(6))
    mean = (inverse @ phi.T @ y).T
    layer = network.Layer(jnp.asarray(mean[:, :-1]), jnp.asarray(mean[:, -1]))
    posterior = laplace(layer, x, y, loss=js.l2_loss, prior_precision=delta, batch_size=7)
    mean_logits, covariance = logits(posterior, x[:4])
    assert_close(mean_logits, phi[:4] @ mean.T)
    variance = np.einsum("bi,ij,bj->b", phi[:4], inverse, phi[:4])
    assert_close(covariance, variance[:, None, None] * np.eye(3), rtol=1e-10)
    # y ~ N(0, I + φφᵀ/δ) for each output, without the constant that -l leaves out
    marginal = np.eye(30) + phi @ phi.T / delta
    wanted = -0.5 * np.sum(y * np.linalg.solve(marginal, y)) - 1.5 * np.linalg.slogdet(marginal)[1]
    assert_close(log_evidence(posterior), wanted)


def test_laplace_for_classification_against_dense(x64):
    x, labels, W = data(30)
    posterior = laplace((W, None), x, labels, loss=CROSS_ENTROPY, prior_precision=2.0, batch_size=8)
    total = jax.jit(lambda w: CROSS_ENTROPY(x @ w.reshape(3, 5).T, labels).sum())
    G = np.asarray(jax.jit(jax.hessian(total))(W.reshape(-1)))
    precision = G + 2 * np.eye(15)
    wide = np.einsum("kl,bi->bkli", np.eye(3), np.asarray(x[:4])).reshape(4, 3, 15)
    wanted = np.einsum("bki,ij,blj->bkl", wide, np.linalg.inv(precision), wide)
    np.testing.assert_allclose(logits(posterior, x[:4])[1], wanted, rtol=1e-10)
    evidence = -total(W.reshape(-1)) - np.sum(W**2) + 7.5 * np.log(2) - np.linalg.slogdet(precision)[1] / 2
    assert_close(log_evidence(posterior), evidence)


def test_best_prior_is_a_maximum_of_the_evidence(x64):
    x, labels, W = data(30)
    posterior = with_best_prior(laplace(network.Layer(W), x, labels, loss=CROSS_ENTROPY))
    best = posterior.prior_precision
    evidence = jax.jit(jax.value_and_grad(posterior.log_evidence))
    value, slope = evidence(best)
    assert abs(slope * best) < 1e-8
    assert value > max(evidence(best * factor)[0] for factor in (0.5, 0.9, 1.1, 2.0))


def test_predictive_probabilities(key, x64):
    """Draws of z agree with draws of W; without a posterior width all is softmax; far away the doubt grows."""
    x, labels, W = data(30)
    layer = network.Layer(W, jnp.zeros(3))
    posterior = laplace(layer, x, labels, loss=CROSS_ENTROPY, prior_precision=3.0)
    sharp = laplace(layer, x, labels, loss=CROSS_ENTROPY, prior_precision=1e12)
    np.testing.assert_allclose(probabilities(sharp, x), jax.nn.softmax(x @ W.T), rtol=1e-8)
    V = posterior.eigenvectors.reshape(18, 18)
    scale = 1 / np.sqrt(posterior.eigenvalues + 3.0)
    draws = (np.asarray(V) * np.asarray(scale)) @ np.random.default_rng(0).standard_normal((18, 40_000))
    weights = np.concatenate([W, np.zeros((3, 1))], 1)[..., None] + draws.reshape(3, 6, -1)
    z = np.einsum("bd,kds->sbk", np.concatenate([x[:3], np.ones((3, 1))], 1), weights)
    wanted = jax.nn.softmax(jnp.asarray(z)).mean(0)
    found = probabilities(posterior, x[:3], key, num_samples=40_000)
    np.testing.assert_allclose(found, wanted, atol=4 * 0.5 * np.sqrt(2 / 40_000))
    found = probabilities(posterior, x)
    assert_close(found.sum(-1), np.ones(len(x)))
    assert_close(found[:3], posterior.probabilities(x[:3]))
    far = probabilities(posterior, 50 * x)
    assert jnp.all(far.max(-1) < jax.nn.softmax(50 * x @ W.T).max(-1) + 1e-12)
