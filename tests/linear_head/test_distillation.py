"""Divergences of two linear heads against the same on full logits, with excluded and nearly excluded words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import linear_softmax_kl_divergence, linear_softmax_top_k_kl_divergence
from tests.linear_head.test_cross_entropy import CHUNK, arguments, assert_close

EXCLUDED = [0.0, 0.0, 0.0, -np.inf]


def divergence(z, target, beta):
    """As it is defined, with 0 log 0 = 0; in float64."""
    logp, logq = jax.nn.log_softmax(z), jax.nn.log_softmax(target)
    p, q = jnp.exp(logp), jnp.exp(logq)
    mixture = beta * q + (1 - beta) * p
    there = lambda w, x: jnp.where(w > 0, x, 0.0)
    weighed = lambda w, a, b: jnp.sum(w * (there(w, a) - there(w, b)), -1)
    if beta in (0, 1):
        return weighed(q, logq, logp) if beta == 0 else weighed(p, logp, logq)
    logm = jnp.log(jnp.where(mixture > 0, mixture, 1.0))
    return beta * weighed(q, logq, logm) + (1 - beta) * weighed(p, logp, logm)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_full_logits(beta, x64):
    """Value, gradient and their derivative, in all that is not the teacher's."""
    (x, weights, bias, a), _, _ = arguments()
    target_x, target_weights = jnp.cos(x[:, :2]).at[0].mul(9), jnp.sin(weights[:2])
    cap = lambda z, c: c * jnp.tanh(z / c)

    def full(x, weights, bias, a, temperature, c):
        z, target = cap(x @ weights + bias[None], c), cap(target_x @ target_weights, 4.0)
        return jnp.sum(a * divergence(z / temperature, target / temperature, beta))

    def fused(x, weights, bias, a, temperature, c):
        return linear_softmax_kl_divergence(
            x, target_x, weights, target_weights, bias=bias, temperature=temperature, beta=beta, token_weights=a,
            logit_softcap=c, target_softcap=4.0, chunk_size=CHUNK,
        )  # fmt: skip

    args = x, weights, bias, a, jnp.array(1.5), jnp.array(3.0)

    def derivatives(f):
        return jax.jvp(jax.value_and_grad(f, range(6)), args, jax.tree.map(jnp.cos, args))

    assert_close(*(jax.jit(functools.partial(derivatives, f))() for f in (fused, full)))


def words_of_a_teacher(n, k, num_classes):
    """Distinct classes of each token and their log q, which leave a tail."""
    words = jnp.stack([jnp.arange(k) * (i + 1) % num_classes for i in range(n)])
    log_probs = jax.nn.log_softmax(jnp.cos(jnp.arange(n * (k + 1), dtype=jnp.float64)).reshape(n, k + 1) * 3)[:, :k]
    return words, log_probs


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_top_k_equals_full_logits(beta, x64):
    """Value, gradient and their derivative, the other words lumped on full logits."""
    (x, weights, bias, a), _, _ = arguments()
    words, log_probs = words_of_a_teacher(len(x), 3, weights.shape[1])
    rows = jnp.arange(len(x))[:, None]
    is_known = jnp.zeros((len(x), weights.shape[1]), bool).at[rows, words].set(True)
    target = jnp.concatenate([log_probs, jnp.log1p(-jnp.sum(jnp.exp(log_probs), 1, keepdims=True))], 1)

    def full(x, weights, bias, temperature, c):
        z = c * jnp.tanh((x @ weights + bias[None]) / c) / temperature
        others = jax.nn.logsumexp(jnp.where(is_known, -jnp.inf, z), 1, keepdims=True)
        return jnp.sum(a * divergence(jnp.concatenate([z[rows, words], others], 1), target, beta))

    def fused(x, weights, bias, temperature, c):
        return linear_softmax_top_k_kl_divergence(
            x, words, log_probs, weights, bias=bias, temperature=temperature, beta=beta, token_weights=a,
            logit_softcap=c, chunk_size=CHUNK,
        )  # fmt: skip

    args = x, weights, bias, jnp.array(1.5), jnp.array(3.0)

    def derivatives(f):
        return jax.jvp(jax.value_and_grad(f, range(5)), args, jax.tree.map(jnp.cos, args))

    assert_close(*(jax.jit(functools.partial(derivatives, f))() for f in (fused, full)))


def test_top_k_of_all_words_is_the_whole_divergence():
    """And the tail is then of no class; a word out of range makes its token NaN, a sure tail keeps its digits."""
    x, weights = jnp.array([[1.0, 2.0], [0.5, -1.0]]), jnp.array([[0.3, -1.0, 2.0], [1.0, 0.0, -0.5]])
    words = jnp.array([[2, 0, 1], [0, 1, 2]])
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(x @ (2 * weights)), words, 1)
    call = functools.partial(linear_softmax_top_k_kl_divergence, x, reduction="none")
    whole = linear_softmax_kl_divergence(x, x, weights, 2 * weights, reduction="none")
    np.testing.assert_allclose(call(words, log_probs, weights), whole, rtol=1e-5)
    gradient = jax.grad(lambda w: call(words, log_probs, w).sum())(weights)
    np.testing.assert_allclose(
        gradient, jax.grad(lambda w: linear_softmax_kl_divergence(x, x, w, 2 * weights))(weights), rtol=1e-5
    )
    assert np.isnan(call(words.at[1, 0].set(3), log_probs, weights)).tolist() == [False, True]
    bias = jnp.array([0.0, -30.0, -31.0])  # the tail has 1e-13 of both
    found = linear_softmax_top_k_kl_divergence(
        jnp.zeros((1, 2)), jnp.array([[0]]), jnp.log1p(-jnp.array([[1e-7]])), weights, bias=bias
    )
    p, q = np.exp(-30.0) + np.exp(-31.0), -np.expm1(np.float64(np.log1p(-np.float32(1e-7))))
    np.testing.assert_allclose(found, q * np.log(q / p) + (1 - q) * np.log1p(-q) - (1 - q) * np.log1p(-p), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("excluded", [-np.inf, -1e30, -1e9, -1e6, -1e4, -100.0])
def test_excluded_words(excluded, dtype):
    """A word that the teacher, or both, exclude: the divergence of the others, and its gradient."""
    x = jnp.array([[1.0, 2.0, 3.0, 0.0]], dtype)
    bias = jnp.array([0.0, 0.0, 0.0, excluded])
    out = [0.0, 0.0, 0.0, -np.inf]
    for of_student in (None, bias):
        call = lambda x: linear_softmax_kl_divergence(
            x, jax.lax.stop_gradient(x) / 2, jnp.eye(4, dtype=dtype), jnp.eye(4, dtype=dtype), bias=of_student,
            target_bias=bias,
        )  # fmt: skip
        value, gradient = jax.value_and_grad(call)(x)
        with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
            z = np.array([1.0, 2.0, 3.0, 0.0]) + (0 if of_student is None else np.array(out))
            target = np.array([0.5, 1.0, 1.5, 0.0]) + np.array(out)
            wanted = float(divergence(jnp.asarray(z), jnp.asarray(target), 0))
            g = jax.nn.softmax(jnp.asarray(z)) - jax.nn.softmax(jnp.asarray(target))
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        rtol = 1e-5 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(np.asarray(gradient[0], np.float64), np.asarray(g), rtol=rtol, atol=1e-7)


def test_excluded_in_the_student_alone():
    x, eye = jnp.array([[1.0, 2.0, 3.0, 0.0]]), jnp.eye(4)
    bias = jnp.array([0.0, 0.0, 0.0, -jnp.inf])
    assert linear_softmax_kl_divergence(x, x, eye, eye, bias=bias) == jnp.inf
    assert np.isfinite(linear_softmax_kl_divergence(x, x, eye, eye, bias=bias, beta=1.0))
    assert np.isfinite(linear_softmax_kl_divergence(x, x, eye, eye, bias=bias, beta=0.5))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_words_beyond_float32(beta):
    """Teacher and student agree but for words of which one has a probability below every float32."""
    x, eye = jnp.array([[1.0, 2.0, 3.0, 0.0]]), jnp.eye(4)
    far = lambda k: jnp.zeros(4).at[k].set(-400.0)
    call = lambda x: linear_softmax_kl_divergence(x, x, eye, eye, bias=far(0), target_bias=far(3), beta=beta)
    value, gradient = jax.value_and_grad(call)(x)
    z, target = (np.array([1.0, 2.0, 3.0, 0.0]) + np.asarray(far(k), np.float64) for k in (0, 3))
    p, q = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (z, target))
    mixture = beta * q + (1 - beta) * p
    weighed = lambda w, a, b: sum(w[k] * (np.log(a[k]) - np.log(b[k])) for k in range(4))
    wanted = weighed(q, q, p) if beta == 0 else weighed(p, p, q)
    if beta == 0.5:
        wanted = 0.5 * (weighed(q, q, mixture) + weighed(p, p, mixture))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_small_divergence_beside_a_far_word(beta):
    """2.5e-7 between the words that count, with one 40 below them that differs by 35."""
    z = np.array([0.1, 0.0, -0.2, -40.0], np.float32)
    target = np.array([0.101, 0.0, -0.2, -75.0], np.float32)
    got, gradient = jax.value_and_grad(
        lambda z: linear_softmax_kl_divergence(z, target[None], jnp.eye(4), jnp.eye(4), beta=beta)
    )(jnp.asarray(z)[None])
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        f = jax.value_and_grad(lambda z: divergence(z, jnp.asarray(target, jnp.float64), beta))
        wanted, g = f(jnp.asarray(z, jnp.float64))
    np.testing.assert_allclose(got, wanted, rtol=2e-3)  # a logit is known to 4e-9, the difference of 1e-3 to 6e-6
    np.testing.assert_allclose(gradient[0], g, atol=2e-8)
