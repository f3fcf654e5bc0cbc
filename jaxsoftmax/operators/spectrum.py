"""Eigenvalues and eigenvectors of diag(p) - ppᵀ by the secular equation: O(K) for the largest, O(K²) for all.

    g(λ) = Σ_j p_j / (p_j - λ) = 0,    p₍ᵢ₎ ≥ λ_i ≥ p₍ᵢ₊₁₎,    eigenvector ∝ p / (p - λ).

g grows monotonically between its poles, so every interval between neighbouring probabilities holds one root; where
the two are equal, the root is their common value. A root is kept as λ = o + x, with o the nearer of the two poles: the
distances (p_j - o) - x then have a small relative error, which is all that eigenvalues, eigenvectors and derivatives
are made of. Everything here takes one probability vector; `jnp.vectorize` makes the batch.

Reference: docs/mathematics.md, section 2; Bunch, Nielsen and Sorensen 1978 (the iteration); Gu and Eisenstat 1994
(orthogonal eigenvectors).
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.maps.entmax import log1p

# Roots scale with p. Multiplied by 2⁶⁴, float32 probabilities from 1 to 1e-38 neither overflow nor underflow below.
SCALE = 2.0**64
BLOCK = 2**16  # entries of one block of the roots × poles array: small enough for a cache
MAX_PASSES = 60  # 7 suffice; a bisection of the whole range would end before


@functools.partial(jnp.vectorize, signature="(k)->()")
def largest_eigenvalue(p: Array) -> Array:
    """The largest eigenvalue of diag(p) - ppᵀ, in about 6 passes of O(K)."""
    p = SCALE * p
    upper = jnp.max(p, keepdims=True)
    second = jnp.where(jnp.sum(p == upper) > 1, upper, jnp.max(jnp.where(p < upper, p, 0)))
    return _eigenvalue(second, *_roots(p, second, upper))[0]


@functools.partial(jnp.vectorize, signature="(k)->(k)")
def eigenvalues(p: Array) -> Array:
    """All eigenvalues of diag(p) - ppᵀ, ascending, in about 7 passes of O(K²), with O(K) memory."""
    p = -jnp.sort(-SCALE * p)
    return _with_zero(_eigenvalue(p[1:], *_roots(p, p[1:], p[:-1])))


@functools.partial(jnp.vectorize, signature="(k)->(k),(k,k)")
def eigenpairs(p: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors as columns; O(K²)."""
    order = jnp.argsort(-p)
    p = SCALE * p[order]
    o, x = _roots(p, p[1:], p[:-1])
    rows = _eigenvectors(p, o, x)
    return _with_zero(_eigenvalue(p[1:], o, x)), rows[::-1, jnp.argsort(order)].T


def _eigenvalue(lower: Array, o: Array, x: Array) -> Array:
    """λ = o + x in units of p; 0 where the lower pole is a class of probability 0."""
    return jnp.where(lower == 0, 0, (o + x) / SCALE)


def _with_zero(descending: Array) -> Array:
    """Ascending, with the eigenvalue 0 of the null vector 1."""
    return jnp.concatenate([descending, jnp.zeros_like(descending, shape=1)])[::-1]


def _roots(p: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
    """(o, x) of the roots λ = o + x in the given intervals; only x carries the derivative in p."""
    fixed, lower, upper = lax.stop_gradient((p, lower, upper))
    # An interval that reaches down to 0 holds no root: one without width stands in for it.
    lower, upper = jnp.where(lower == 0, 1, lower), jnp.where(lower == 0, 1, upper)
    at_once = max(1, BLOCK // p.size) if isinstance(p.size, int) else None  # symbolic under jax.export: one by one
    o, x = lax.map(lambda ends: _locate(fixed, *ends), (lower, upper), batch_size=at_once)
    return o, _offset(p, o, x)


def _locate(p: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
    """One root, by rational interpolation: each pass fits r + s_a/(a - λ) + s_b/(b - λ), a and b the poles around λ, to
    the value and slope of the terms on either side, and moves to the root of that. A bracket guards the step.
    """
    eps = jnp.finfo(p.dtype).eps
    inverse = jnp.where(p > 0, 1 / jnp.where(p > 0, p, 1), 0)
    width = upper - lower
    tie = ~(width > 0)

    def improve(state):
        passes, x, low, high, _ = state
        to_a, to_b = (lower - o) - x, (upper - o) - x
        q = p / ((p - o) - x)
        g = jnp.sum(q)
        t_a = jnp.sum(jnp.minimum(q, 0) * (q * (inverse * to_a)))
        t_b = jnp.sum(jnp.maximum(q, 0) * (q * (inverse * to_b)))
        low, high = jnp.where(g > 0, low, x), jnp.where(g < 0, high, x)
        new = _interpolate(g, t_a, t_b, to_a / width, to_b / width, x, width, from_lower)
        slack = 8 * eps * jnp.abs(x)  # the sign of g at a converged root is noise: do not let it throw the root out
        new = jnp.where((new > low - slack) & (new < high + slack), new, (low + high) / 2)
        return passes + 1, new, low, high, jnp.abs(new - x) > slack

    # The sign in the middle tells which pole is nearer; that one becomes the origin.
    half = jnp.where(tie, 1, width / 2)
    from_lower = jnp.sum(p / ((p - lower) - half)) > 0
    o, x = jnp.where(from_lower, lower, upper), jnp.where(from_lower, half, -half)
    start = (0, x, jnp.minimum(x, 0), jnp.maximum(x, 0), ~tie)
    x = lax.while_loop(lambda state: state[-1] & (state[0] < MAX_PASSES), improve, start)[1]
    # At a tie the root is the pole; an x that vanishes beside it gives the formulas below their limits.
    return o, jnp.where(tie, upper * eps**2, x)


def _interpolate(g, t_a, t_b, alpha, beta, x, width, from_lower) -> Array:
    """One step: the new x. The slopes t come in units of 1/(a - λ) and 1/(b - λ), α = a - λ and β = b - λ in units of
    the width: nothing here over- or underflows.
    """
    r = g - t_a - t_b
    # A small step solves for the step k itself, in units of x.
    b = g * (alpha + beta) - (t_a * beta + t_b * alpha)
    a, c = r * (x / width), -g * jnp.where(from_lower, beta, alpha)
    root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, 0))
    k = jnp.where(b > 0, 2 * c / (b + root), (b - root) / (2 * a))
    # A large one solves for the distance y from the origin, so that no digit of it cancels.
    s_a, s_b = t_a * alpha, t_b * beta
    near, far = jnp.where(from_lower, s_a, s_b), jnp.where(from_lower, s_b, s_a)
    r = jnp.where(from_lower, r, -r)
    b = r + near + far
    root = jnp.sqrt((r - near + far) ** 2 + 4 * near * far)
    y = width * jnp.where(b > 0, 2 * near / (b + root), (b - root) / (2 * r))
    return jnp.where(jnp.abs(k) < 0.25, x + k * x, jnp.where(from_lower, y, -y))


@custom_vjp
def _offset(p: Array, o: Array, x: Array) -> Array:
    """x, as the function of p that it is: the root next to the pole o."""
    return x


def _offset_fwd(p, o, x):
    return _offset(p, o, x), (p, o, _offset(p, o, x))


def _offset_bwd(residuals, ct):
    # Implicitly, ∂λ/∂p_i = λ/(p_i - λ)² / Σ_j p_j/(p_j - λ)²; both squares in units of x². At a tie, where x vanishes,
    # that is 1/n for each of the n equal classes: the mean over every basis of their eigenspace.
    p, o, x = residuals
    p, o, x, ct = p[None, :], o[:, None], x[:, None], ct[:, None]
    near = (x / ((p - o) - x)) ** 2
    return jnp.sum(ct * ((o + x) / jnp.sum(p * near, -1, keepdims=True)) * near, 0), None, None


_offset.defvjp(_offset_fwd, _offset_bwd)


def _eigenvectors(p: Array, o: Array, x: Array) -> Array:
    """Rows: unit eigenvectors, of p sorted descending, for the K-1 roots and then for 0."""
    size, support = p.size, jnp.sum(p > 0)
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    weights = (p * lax.stop_gradient(_weight_correction(p, o, x)))[None, :]
    o, x = o[:, None], x[:, None]
    vectors = weights / ((p[None, :] - o) - x) * (x / (o + x))
    vectors = vectors / jnp.sqrt(jnp.sum(vectors**2, -1, keepdims=True))

    # Equal classes s, …, k, k+1 share their value as an eigenvalue: (1, …, 1, -n, 0, …) / √(n(n+1)), n = k+1-s ones.
    tied = (p[1:] == p[:-1])[:, None]
    start = lax.cummax(jnp.where(jnp.concatenate([jnp.zeros_like(tied, shape=(1, 1)), tied]), 0, row), 0)[:-1]
    ones = row[1:] - start
    contrast = jnp.where((column >= start) & (column < row[1:]), 1, jnp.where(column == row[1:], -ones, 0))
    contrast = contrast.astype(p.dtype) / jnp.sqrt((ones * (ones + 1)).astype(p.dtype))
    vectors = jnp.where(tied, contrast, vectors)

    # The eigenvalue 0: 1 on the support, and every class that has no probability.
    constant = (p > 0).astype(p.dtype) / jnp.sqrt(jnp.maximum(support, 1).astype(p.dtype))
    vectors = jnp.concatenate([vectors, constant[None, :]])
    vectors = jnp.where(row == support - 1, constant[None, :], vectors)
    return jnp.where(row >= support, jnp.eye(size, dtype=p.dtype), vectors)


def _weight_correction(p: Array, o: Array, x: Array) -> Array:
    """ẑ/p, where ẑ are the weights for which the computed roots are the exact ones (Löwner's formula).

    (ẑ_j/p_j)² = Σp/(p_0 - p_j) · Π_{k≠j-1} (p_j - λ_k)/(p_j - p_{k+1}) · (λ_{j-1} - p_j)/p_j, a product of about 1 in
    which every root goes with the pole below it: factors near 1 are summed as logarithms, the few others multiplied.
    Of n equal classes, each has the n-th part of what the formula gives for all of them.
    """
    pole, tied = p[1:, None], (p[1:] == p[:-1])[:, None]
    first, total, p, o, x = p[0], jnp.sum(p), p[None, :], o[:, None], x[:, None]
    same = p == pole
    left_out = (pole == 0) | (same & tied)
    distance = jnp.where(same | left_out, -p, p - pole)
    ratio = ((p - o) - x) / distance
    change = jnp.where(same, ratio - 1, ((pole - o) - x) / distance)
    near_one = jnp.abs(change) < 0.5
    logs = jnp.where(left_out | ~near_one, 0, log1p(change))
    factors = jnp.where(left_out | near_one, 1, ratio)
    p = p[0]
    count = jnp.sum((p[:, None] == p[None, :]).astype(p.dtype), 0)
    start = total / (count * jnp.where(p == first, p, first - p))
    return jnp.sqrt(start * jnp.prod(factors, 0) * jnp.exp(jnp.sum(logs, 0)))
