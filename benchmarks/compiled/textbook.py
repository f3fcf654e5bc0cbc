"""The plain formulas, for what neither jax.nn nor optax has: written with nothing in mind but the mathematics."""

import math

import jax
import jax.numpy as jnp
import optax.losses as theirs


def mean(p, v):
    return jnp.sum(p * v, -1, keepdims=True)


def integer_labels(z, y):
    return theirs.softmax_cross_entropy_with_integer_labels(z, y)


# Maps.


def softcap(z, cap=30.0):
    return cap * jnp.tanh(z / cap)


def threshold(z, tau_of):
    """τ for the largest k for which z_(k) > τ(k), by sorting."""
    top = -jnp.sort(-z, -1)
    k = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    taus = tau_of(top, k)
    last = jnp.sum((top > taus).astype(jnp.int32), -1, keepdims=True) - 1
    return jnp.take_along_axis(taus, last, -1)


def sparsemax(z):
    """Martins & Astudillo 2016, algorithm 1."""
    return jnp.maximum(z - threshold(z, lambda top, k: (jnp.cumsum(top, -1) - 1) / k), 0)


def entmax15(z):
    """Peters et al. 2019, algorithm 2."""
    z = z / 2

    def tau(top, k):
        average, square = jnp.cumsum(top, -1) / k, jnp.cumsum(top**2, -1)
        return average - jnp.sqrt(jnp.maximum((1 - (square - k * average**2)) / k, 0))

    return jnp.maximum(z - threshold(z, tau), 0) ** 2


def entmax(z, alpha=1.25, rounds=25):
    """Blondel et al. 2019, algorithm 1: bisection, a bit of τ a round."""
    z = (alpha - 1) * z
    m = jnp.max(z, -1, keepdims=True)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        above = jnp.sum(jnp.maximum(z - middle, 0) ** (1 / (alpha - 1)), -1, keepdims=True) >= 1
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    tau, _ = jax.lax.fori_loop(0, rounds, halve, (m - 1, m))
    p = jnp.maximum(z - tau, 0) ** (1 / (alpha - 1))
    return p / jnp.sum(p, -1, keepdims=True)


# The Jacobian of softmax and what comes after it, from the logits or from p.


def jvp(v, p):
    return p * (v - mean(p, v))


def jacobian(z):
    p = jax.nn.softmax(z)
    return p[..., None] * (jnp.eye(z.shape[-1], dtype=z.dtype) - p[..., None, :])


def second_derivative(u, v, p):
    u, v = u - mean(p, u), v - mean(p, v)
    return jvp(u * v, p)


def third_derivative(u, v, w, p):
    u, v, w = (x - mean(p, x) for x in (u, v, w))
    return jvp(u * v * w - u * mean(p, v * w) - v * mean(p, u * w) - w * mean(p, u * v), p)


def mv(z, v):
    return jvp(v, jax.nn.softmax(z))


def quadratic_form(z, v):
    p = jax.nn.softmax(z)
    return jnp.sum(p * (v - mean(p, v)) ** 2, -1)


def solve(z, v, damping=0.125):
    """Sherman and Morrison."""
    p = jax.nn.softmax(z)
    a, b = v / (p + damping), p / (p + damping)
    return a + b * mean(p, a) / (1 - mean(p, b))


def logdet(z, damping=0.125):
    p = jax.nn.softmax(z)
    return jnp.sum(jnp.log(p + damping), -1) + jnp.log1p(-jnp.sum(p * p / (p + damping), -1))


def pinv_mv(z, v):
    w = (v - jnp.mean(v, -1, keepdims=True)) / jax.nn.softmax(z)
    return w - jnp.mean(w, -1, keepdims=True)


def factor_mv(z, v):
    p = jax.nn.softmax(z)
    return jnp.sqrt(p) * v - p * mean(jnp.sqrt(p), v)


def factor_rmv(z, v):
    p = jax.nn.softmax(z)
    return jnp.sqrt(p) * (v - mean(p, v))


def trace(z):
    return 1 - jnp.sum(jax.nn.softmax(z) ** 2, -1)


def frobenius_norm(z):
    p = jax.nn.softmax(z)
    square = jnp.sum(p * p, -1)
    return jnp.sqrt(square - 2 * jnp.sum(p**3, -1) + square**2)


# Losses.


def smoothed(z, y):
    return theirs.softmax_cross_entropy(z, theirs.smooth_labels(jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype), 0.125))


def weighted(z, y, weights):
    return weights[y] * integer_labels(z, y)


def ignoring(z, y):
    return jnp.where(y == 3, 0, integer_labels(z, y))


def with_z_loss(z, y):
    return integer_labels(z, y) + 0.0625 * jax.nn.logsumexp(z, -1) ** 2


def natural_gradient_norm(z, y):
    return jnp.expm1(integer_labels(z, y))


def softmax_kl(z, x, temperature=1.0):
    x, z = jax.nn.log_softmax(x / temperature), jax.nn.log_softmax(z / temperature)
    return theirs.kl_divergence_with_log_targets(z, x)


def jensen_shannon(z, x):
    p, q = jax.nn.log_softmax(z), jax.nn.log_softmax(x)
    middle = jnp.logaddexp(p, q) - math.log(2.0)
    return (theirs.kl_divergence_with_log_targets(middle, p) + theirs.kl_divergence_with_log_targets(middle, q)) / 2


def entropy(z):
    logp = jax.nn.log_softmax(z)
    return -jnp.sum(jnp.exp(logp) * logp, -1)


def brier(z, y):
    return jnp.sum((jax.nn.softmax(z) - y) ** 2, -1) / 2


def focal(z, y, gamma=2.0):
    loss = integer_labels(z, y)
    return (1 - jnp.exp(-loss)) ** gamma * loss


def entmax15_loss(z, y):
    """<p, z> - z_y + (1 - Σ p^1.5) / (α (α - 1))."""
    p = entmax15(z)
    return jnp.sum(p * z + (p - p**1.5) / 0.75, -1) - jnp.take_along_axis(z, y[..., None], -1)[..., 0]


def sum_squared_error(z, y):
    return jnp.sum((z - y) ** 2, -1)


def binary(z, y, pos_weight=2.5):
    return -pos_weight * y * jax.nn.log_sigmoid(z) - (1 - y) * jax.nn.log_sigmoid(-z)


# The linear head: the logits, whole.


def linear_head(x, y, w):
    return jnp.sum(integer_labels(x @ w, y))
