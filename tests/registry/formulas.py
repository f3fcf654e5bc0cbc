"""Exact references: the textbook formulas in mpmath, and their derivatives by differences that lose nothing.

A formula takes the logits z and how often each of them occurs, n, as lists of numbers, so that 50257 classes of a few
distinct logits cost no more than a few. Written without regard to cancellation: there are digits enough. The first and
second derivatives of every formula are differences with a step of 1e-28 at over 140 digits: exact to some 25 of them.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from mpmath import mp, mpf

STEP = mpf(10) ** -28
Numbers = Sequence


def digits(z: Numbers) -> int:
    """Decimal digits for second differences of numbers as small as the product of two probabilities of a slice."""
    return 150 + int(0.9 * min(float(max(z) - min(z)), 800))


def exp(x):
    return _exp(x, mp.prec)


@functools.lru_cache(maxsize=4096)
def _exp(x, _):
    return mp.exp(x)


def total(terms) -> mpf:
    return mp.fsum(terms)


def derivatives(formula: Callable, z: list, order: int = 2) -> tuple[np.ndarray, ...]:
    """Value (m,), first (m, M) and second (m, M, M) derivatives of `formula` in M numbers, up to `order`."""

    def at(*moved: int) -> np.ndarray:
        x = list(z)
        for i in moved:
            x[i] = x[i] + STEP
        out = formula(x)
        return np.array(out if isinstance(out, list) else [out], object)

    def clean(x: np.ndarray, power: int) -> np.ndarray:
        """`x`, with 0 for what the last of the digits leaves of a derivative that is 0."""
        noise = (1 + max(abs(b) for b in base)) * mpf(10) ** (10 - mp.dps) / STEP**power
        return np.where(abs(x) < noise, mpf(0), x)

    size, base = len(z), at()
    if order == 0:
        return (base,)
    first = [at(i) for i in range(size)]
    jacobian = np.stack([(f - base) / STEP for f in first], -1)
    if order == 1:
        return base, clean(jacobian, 1)
    second = np.empty((len(base), size, size), object)
    for i in range(size):
        for j in range(i + 1):
            second[:, i, j] = second[:, j, i] = (at(i, j) - first[i] - first[j] + base) / STEP**2
    return base, clean(jacobian, 1), clean(second, 2)


def longdouble(x: np.ndarray) -> np.ndarray:
    """Rounded to the widest floats that numpy has."""
    high = np.array([float(v) for v in x.ravel()])
    low = np.array([float(v - mpf(h)) if np.isfinite(h) else 0.0 for v, h in zip(x.ravel(), high)])
    return (high.astype(np.longdouble) + low).reshape(x.shape)


# Maps.


def softmax(z, n):
    e = [exp(x) for x in z]
    s = total(k * x for k, x in zip(n, e))
    return [x / s for x in e]


def logsumexp(z, n):
    return mp.log(total(k * exp(x) for k, x in zip(n, z)))


def log_softmax(z, n):
    lse = logsumexp(z, n)
    return [x - lse for x in z]


def mean(p, n, v):
    return total(k * a * b for k, a, b in zip(n, p, v))


@functools.lru_cache(maxsize=256)
def threshold(z: tuple, n: tuple, power: int) -> tuple[float, tuple]:
    """τ and the support of Σ n max(z/r - τ, 0)^r = 1 in double precision."""
    top = max(z)
    u = [(x - top) / power for x in z]
    low, high = -1.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        above = sum(k * max(x - middle, 0) ** power for k, x in zip(n, u)) > 1
        low, high = (middle, high) if above else (low, middle)
    return low, tuple(x > high for x in u)


def entmax_root(z, n, power: int):
    """p^(α-1) = max((α - 1)(z - τ), 0) of α-entmax, 1/(α - 1) = power whole: Newton from double precision."""
    top = max(z)
    guess, support = threshold(tuple(float(x - top) for x in z), tuple(n), power)
    tau = mpf(guess)
    for _ in range(8):
        u = [max((x - top) / power - tau, 0) if s else mpf(0) for x, s in zip(z, support)]
        excess = total(k * x**power for k, x in zip(n, u)) - 1
        tau += excess / (power * total(k * x ** (power - 1) for k, x, s in zip(n, u, support) if s))
    return [(x - top) / power - tau if s else mpf(0) for x, s in zip(z, support)]


def entmax(z, n, power: int):
    return [u**power for u in entmax_root(z, n, power)]


# Products with the Jacobian and the operator.


def jacobian_product(z, n, v):
    p = softmax(z, n)
    m = mean(p, n, v)
    return [a * (b - m) for a, b in zip(p, v)]


def second_derivative(z, n, u, v):
    p = softmax(z, n)
    a, b = mean(p, n, u), mean(p, n, v)
    y = [(x - a) * (w - b) for x, w in zip(u, v)]
    m = mean(p, n, y)
    return [q * (x - m) for q, x in zip(p, y)]


def third_derivative(z, n, u, v, w):
    p = softmax(z, n)
    u, v, w = ([x - mean(p, n, t) for x in t] for t in (u, v, w))
    uv, uw, vw = (mean(p, n, [a * b for a, b in zip(s, t)]) for s, t in ((u, v), (u, w), (v, w)))
    uvw = mean(p, n, [a * b * c for a, b, c in zip(u, v, w)])
    return [q * (a * b * c - uvw - a * vw - b * uw - c * uv) for q, a, b, c in zip(p, u, v, w)]


def dense_jacobian(z, n):
    p = softmax(z, n)
    return [a * (1 - a) if i == j else -a * b for i, a in enumerate(p) for j, b in enumerate(p)]


def quadratic_form(z, n, v):
    p = softmax(z, n)
    m = mean(p, n, v)
    return mean(p, n, [(x - m) ** 2 for x in v])


def trace(z, n):
    p = softmax(z, n)
    return mean(p, n, [1 - x for x in p])


def frobenius_norm(z, n):
    p = softmax(z, n)
    s2, s3 = mean(p, n, p), mean(p, n, [x * x for x in p])
    return mp.sqrt(s2 - 2 * s3 + s2 * s2)


def spectral_norm(z, n):
    rows = np.array(dense_jacobian(z, n)).reshape(len(z), len(z))
    return max(mp.eigsy(mp.matrix(rows.tolist()), eigvals_only=True))


def solve(z, n, v, damping):
    """By Sherman and Morrison."""
    p = softmax(z, n)
    dv, dp = [x / (a + damping) for x, a in zip(v, p)], [a / (a + damping) for a in p]
    factor = mean(p, n, dv) / (1 - mean(p, n, dp))
    return [a + factor * b for a, b in zip(dv, dp)]


def logdet(z, n, damping):
    p = softmax(z, n)
    diagonal = total(k * mp.log(x + damping) for k, x in zip(n, p))
    return diagonal + mp.log(1 - mean(p, n, [x / (x + damping) for x in p]))


def pseudo_logdet(z, n):
    return mp.log(sum(n)) + total(k * x for k, x in zip(n, log_softmax(z, n)))


def pinv_product(z, n, v):
    size = sum(n)
    m = total(k * x for k, x in zip(n, v)) / size
    y = [(x - m) / p for x, p in zip(v, softmax(z, n))]
    m = total(k * x for k, x in zip(n, y)) / size
    return [x - m for x in y]


def factor_product(z, n, v):
    p = softmax(z, n)
    m = total(k * mp.sqrt(a) * b for k, a, b in zip(n, p, v))
    return [mp.sqrt(a) * b - a * m for a, b in zip(p, v)]


def factor_transposed_product(z, n, v):
    p = softmax(z, n)
    m = mean(p, n, v)
    return [mp.sqrt(a) * (b - m) for a, b in zip(p, v)]


# Losses; c is a class, y weights of the classes, x other logits.


def label_loss(z, n, c, label_smoothing=0, class_weights=None, ignore_index=None, z_loss=0):
    if c == ignore_index:
        return mpf(0)
    lse, weights = logsumexp(z, n), [1] * len(z) if class_weights is None else class_weights
    smooth = total(k * w * (lse - x) for k, w, x in zip(n, weights, z)) / sum(n) if label_smoothing else 0
    return (1 - label_smoothing) * weights[c] * (lse - z[c]) + label_smoothing * smooth + z_loss * lse**2


def soft_label_loss(z, n, y, label_smoothing=0, class_weights=None):
    lse, weights = logsumexp(z, n), [1] * len(z) if class_weights is None else class_weights
    y = [a * ((1 - label_smoothing) * b + mpf(label_smoothing) / sum(n)) for a, b in zip(weights, y)]
    return total(k * w * (lse - x) for k, w, x in zip(n, y, z) if w)


def focal(z, n, c, gamma=2, ignore_index=None):
    if c == ignore_index:
        return mpf(0)
    return (1 - softmax(z, n)[c]) ** gamma * label_loss(z, n, c)


def missed(z, n, y, epsilon=2):
    return epsilon * total(k * w * (1 - p) for k, w, p in zip(n, y, softmax(z, n)) if w)


def poly(z, n, y, epsilon=2):
    return soft_label_loss(z, n, y) + missed(z, n, y, epsilon)


def natural_gradient_norm(z, n, c, ignore_index=None):
    return mpf(0) if c == ignore_index else 1 / softmax(z, n)[c] - 1


def divided(z, temperature):
    return [a / mpf(temperature) for a in z]


def kl(z, n, x, temperature=1):
    z, x = divided(z, temperature), divided(x, temperature)
    q, logq, logp = softmax(x, n), log_softmax(x, n), log_softmax(z, n)
    return total(k * a * (b - c) for k, a, b, c in zip(n, q, logq, logp))


def jensen_shannon(z, n, x, temperature=1):
    z, x = divided(z, temperature), divided(x, temperature)
    return total(
        k * (p * mp.log(2 * p / (p + q)) + q * mp.log(2 * q / (p + q))) / 2
        for k, p, q in zip(n, softmax(z, n), softmax(x, n))
    )


def entropy(z, n, temperature=1):
    z = divided(z, temperature)
    return -total(k * p * q for k, p, q in zip(n, softmax(z, n), log_softmax(z, n)))


def brier(z, n, y):
    return total(k * (p - t) ** 2 for k, p, t in zip(n, softmax(z, n), y)) / 2


def entmax_loss(z, n, c, alpha=1.5, ignore_index=None):
    if c == ignore_index:
        return mpf(0)
    power = round(1 / (alpha - 1))
    root = entmax_root(z, n, power)
    tsallis = total(k * (u**power - u ** (power + 1)) for k, u in zip(n, root)) / (alpha * (alpha - 1))
    return total(k * u**power * (x - z[c]) for k, u, x in zip(n, root, z)) + tsallis


def multiclass_sparsemax(z, n, c, ignore_index=None):
    return entmax_loss(z, n, c, 2, ignore_index)


def xlogx(t):
    return t * mp.log(t) if t else mpf(0)


def log_kl(z, n, t):
    return total(k * (xlogx(a) - a * x) for k, a, x in zip(n, t, z) if a)


def log_targets_kl(z, n, logt):
    return total(k * exp(a) * (a - x) for k, a, x in zip(n, logt, z))


def generalized_kl(z, n, t):
    return log_kl(z, n, t) + total(k * (exp(x) - a) for k, a, x in zip(n, t, z))


def sum_squared_error(z, n, x):
    return total(k * (a - b) ** 2 for k, a, b in zip(n, z, x))


# Element by element: of lists of one number.


def softplus(x):
    return mp.log(1 + exp(x))


def sigmoid(x):
    return 1 / (1 + exp(-x))


def logistic(z, n, y, pos_weight=1):
    return (pos_weight * y[0] * softplus(-z[0]) if y[0] else 0) + ((1 - y[0]) * softplus(z[0]) if y[0] != 1 else 0)


def sigmoid_focal(z, n, y, alpha=None, gamma=2):
    balance = 1 if alpha is None else alpha * y[0] + (1 - alpha) * (1 - y[0])
    return balance * ((1 - y[0]) * sigmoid(z[0]) + y[0] * sigmoid(-z[0])) ** gamma * logistic(z, n, y)


def sparse_logistic(z, n, y):
    s = min(max((z[0] + 1) / 2, 0), 1)
    return (s - y[0]) ** 2 + abs(s - y[0]) * max(abs(z[0]) - 1, 0)


def squared_error(z, n, x):
    return (z[0] - x[0]) ** 2


def l2_loss(z, n, x):
    return (z[0] - x[0]) ** 2 / 2


def huber(z, n, x, delta=1):
    e = abs(z[0] - x[0])
    return e * e / 2 if e <= delta else delta * (e - delta / mpf(2))


def log_cosh(z, n, x):
    return mp.log((exp(z[0] - x[0]) + exp(x[0] - z[0])) / 2)


def softcap(z, n, cap):
    e = exp(2 * z[0] / cap)
    return cap * (e - 1) / (e + 1)
