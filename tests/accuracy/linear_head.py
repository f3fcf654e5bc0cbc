"""How many digits the linear heads keep: values, statistics, and gradients in x, W and b.

The logits z = xW + b are rounded in units of s = |x||W| + |b|, so values are measured in units of
eps (|f| + Σ_k |∂f/∂z_k| s_k), and gradients in eps |x|ᵀγ, eps γ|W|ᵀ and eps Σγ with γ = |g| + |∂g/∂z| s: products of
absolute values, since a matrix product cannot do better.
"""

import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from mpmath import mp, mpf

import jaxsoftmax as js
from jaxsoftmax.linear_head import stream
from jaxsoftmax.linear_head.plan import Plan
from tests.registry import formulas as exact

FEATURES, TEMPERATURE = 4, 2.0
GAPS = {"normal": 0, "gap to 60": 20, "gap to 100": 80}
ARGUMENTS = ("x", "weights", "bias")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Tokens, a head and a teacher, as numbers of a dtype in float64, and integer labels."""

    x: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    labels: np.ndarray
    target_x: np.ndarray
    target_weights: np.ndarray


def problem(gap: float, num_classes: int, second: bool, round_to: Callable) -> Problem:
    """Four tokens, each with a class that leads by `gap`; `second`: another label, and a teacher near the student."""
    rng = np.random.default_rng(num_classes)
    basis, _ = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))
    others = 0.15 * rng.normal(size=(FEATURES, num_classes - FEATURES))
    x, weights = basis, np.concatenate([basis.T, others], 1)
    if gap:
        x = x * (gap / np.min(1 - np.max(x @ others, 1)))
    else:
        x, weights = 2 * rng.normal(size=x.shape), rng.normal(size=weights.shape)
    bias = 0.1 * rng.normal(size=num_classes)
    top = np.argmax(x @ weights + bias, 1)
    labels = (top + 1) % num_classes if second else top
    noise, new = 1e-2 * rng.normal(size=x.shape), rng.normal(size=weights.shape)
    target = (x + noise, weights) if second else (rng.normal(size=x.shape), new)
    return Problem(*(round_to(a) for a in (x, weights, bias)), labels, *(round_to(a) for a in target))


# What should come out: per quantity the number and its size, of a token or of all.


def exactly(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda v: mpf(float(v)) + mpf(float(v - float(v))), otypes=[object])(x)


def logits(x, weights, bias) -> tuple[np.ndarray, np.ndarray]:
    """z and s of each token. The products are of long doubles: 2000 times as precise as the unit of float64."""
    x = x.astype(np.longdouble)
    return exactly(x @ weights + bias), exactly(abs(x) @ abs(weights) + abs(bias))


def through_jacobian(p, s) -> np.ndarray:
    """|J| s."""
    return p * ((1 - p) * s + (p @ s - p * s))


def of_loss(z, s, n, c, target) -> tuple[dict, np.ndarray, np.ndarray]:
    """({quantity: (number, size)}, g, γ) of one token."""
    p = np.array(exact.softmax(z, n), object)
    g = p - np.array([mpf(int(k == c)) for k in range(len(z))], object)
    loss = exact.label_loss(z, n, c)
    return {"value": (loss, loss + abs(g) @ s)}, g, abs(g) + through_jacobian(p, s)


def of_statistics(z, s, n, c, target) -> tuple[dict, None, None]:
    p, logp = (np.array(f(z, n), object) for f in (exact.softmax, exact.log_softmax))
    lse, entropy, top = exact.logsumexp(z, n), exact.entropy(z, n), max(range(len(z)), key=lambda k: z[k])
    return {
        "logsumexp": (lse, abs(lse) + p @ s),
        "probability": (p[top], p[top] + through_jacobian(p, s)[top]),
        "entropy": (entropy, entropy + abs(p * (logp + entropy)) @ s),
    }, None, None  # fmt: skip


def of_divergence(z, s, n, c, target) -> tuple[dict, np.ndarray, np.ndarray]:
    T = mpf(TEMPERATURE)
    zt, st = target
    z, s, zt, st = ([x / T for x in row] for row in (z, s, zt, st))
    p, logp, q, logq = (np.array(f(a, n), object) for a in (z, zt) for f in (exact.softmax, exact.log_softmax))
    kl, g = exact.kl(z, n, zt), (p - q) / T
    size = kl + abs(p - q) @ s + abs(q * (logq - logp - kl)) @ st
    jacobians = through_jacobian(p, np.array(s)) + through_jacobian(q, np.array(st))
    return {"value": (kl, size)}, g, abs(g) + jacobians / T


def expected(formula: Callable, given: Problem) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """The number, its size, and how many of the smallest normal number may be missing."""
    with mp.workdps(80):
        z, s = logits(given.x, given.weights, given.bias)
        targets = zip(*logits(given.target_x, given.target_weights, np.zeros_like(given.bias)))
        n = [1] * z.shape[1]
        tokens = [formula(*row, n, c, target) for *row, c, target in zip(z, s, given.labels.tolist(), targets)]
        out = {q: tuple(np.array([t[0][q][i] for t in tokens], object) for i in (0, 1)) for q in tokens[0][0]}
        out = {q: tuple(exact.longdouble(part) for part in parts) for q, parts in out.items()}
        if tokens[0][1] is not None:
            g, size = (exact.longdouble(np.stack([t[i] for t in tokens])) for i in (1, 2))
            x, weights = given.x, given.weights
            out["x"] = g @ weights.T, size @ abs(weights).T
            out["weights"] = x.T @ g, abs(x).T @ size
            out["bias"] = g.sum(0), size.sum(0)
    flushed = {"x": np.sum(abs(given.weights), 1).max(), "weights": np.sum(abs(given.x), 0).max()}
    return {q: (number, size.astype(float), flushed.get(q, len(given.bias))) for q, (number, size) in out.items()}


# What does come out.


def loss(args, labels, target, reduction):
    return js.linear_softmax_cross_entropy_loss(args[0], labels, args[1], bias=args[2], reduction=reduction)


def divergence(args, labels, target, reduction):
    options = {"bias": args[2], "reduction": reduction, "temperature": TEMPERATURE}
    return js.linear_softmax_kl_divergence(args[0], target[0], args[1], target[1], **options)


def value_and_gradient(head: Callable) -> Callable:
    def quantities(args, labels, target):
        of = lambda args: head(args, labels, target, "sum")
        return {"value": head(args, labels, target, "none")} | dict(zip(ARGUMENTS, jax.grad(of)(args)))

    return quantities


def statistics(args, labels, target):
    _, found = js.linear_softmax_cross_entropy_with_statistics(args[0], labels, args[1], bias=args[2])
    return {name: getattr(found, name) for name in ("logsumexp", "probability", "entropy")}


# name -> formula, call
HEADS = {
    "linear_cross_entropy": (of_loss, value_and_gradient(loss)),
    "linear_statistics": (of_statistics, statistics),
    "linear_kl": (of_divergence, value_and_gradient(divergence)),
}


@functools.cache
def compiled(name: str) -> Callable:
    """A function of its own for each name: what is compiled depends on how the vocabulary is streamed."""
    return jax.jit(lambda *args: HEADS[name][1](*args))


def results(name: str, given: Problem, dtype: str, jit: bool) -> dict[str, np.ndarray]:
    _, call = HEADS[name]
    cast = lambda x: jnp.asarray(x.astype(jnp.dtype(dtype)))
    args, target = tuple(cast(getattr(given, n)) for n in ARGUMENTS), (cast(given.target_x), cast(given.target_weights))
    with mock.patch.object(stream, "plan", lambda *_: Plan(3, 10**9)):
        found = (compiled(name) if jit else call)(args, jnp.asarray(given.labels, jnp.int32), target)
    return {name: np.asarray(x) for name, x in found.items()}
