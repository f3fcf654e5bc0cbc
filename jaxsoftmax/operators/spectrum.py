"""Eigenvalues and eigenvectors of diag(p) - ppᵀ by the secular equation: O(K) for the largest, O(K²) for all.

    g(λ) = Σ_j p_j / (p_j - λ) = 0,    p₍ᵢ₎ ≥ λ_i ≥ p₍ᵢ₊₁₎,    eigenvector ∝ p / (p - λ).

g grows monotonically between its poles, so every interval between neighbouring probabilities holds one root; where
the two are equal, the root is their common value. A root is kept as λ = o + x, with o the nearer of the two poles: the
distances (p_j - o) - x then have a small relative error, which is all that eigenvalues, eigenvectors and derivatives
are made of. Everything here takes one probability vector; `jnp.vectorize` makes the batch.

Reference: docs/mathematics.md, section 2.3, the equations (S1) to (S6); Bunch, Nielsen and Sorensen 1978, and LAPACK's
laed4 (the iteration); Gu and Eisenstat 1994, and LAPACK's laed3 (orthogonal eigenvectors).
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core.centring import AXIS, jacobian_product
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.maps.entmax_solver import log1p
from jaxsoftmax.operators.log_derivatives import quotient

# Roots scale with p. Multiplied by 2⁶⁴, float32 probabilities from 1 to 1e-38 neither overflow nor underflow below.
SCALE = 2.0**64
BLOCK = 2**16  # entries of one block of the roots × poles array: small enough for a cache
MAX_PASSES = 60  # 7 suffice; a bisection of the whole range would end before


@functools.partial(jnp.vectorize, signature="(k),(k)->()")
def largest_eigenvalue(p: Array, logs: Array) -> Array:
    """The largest eigenvalue of diag(p) - ppᵀ, in about 6 passes of O(K)."""
    p = SCALE * lax.stop_gradient(p)
    upper = jnp.max(p, keepdims=True)
    second = jnp.where(jnp.sum(p == upper) > 1, upper, jnp.max(jnp.where(p < upper, p, 0)))
    roots = _roots(p, second, upper)
    return _moving(roots.value / SCALE, _log_largest(logs, p, roots))[0]


@functools.partial(jnp.vectorize, signature="(k),(k)->(k)")
def eigenvalues(p: Array, logs: Array) -> Array:
    """All eigenvalues of diag(p) - ppᵀ, ascending, in about 7 passes of O(K²), with O(K) memory."""
    _, logs, p, roots = _in_order(p, logs)
    return _ascending(logs, p, roots)


@functools.partial(jnp.vectorize, signature="(k),(k)->(k),(k,k)")
def eigenpairs(p: Array, logs: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors as columns; O(K²)."""
    order, logs, p, roots = _in_order(p, logs)
    return _ascending(logs, p, roots), _eigenvectors(logs, p, roots)[::-1, jnp.argsort(order)].T


def _in_order(p: Array, logs: Array) -> tuple[Array, Array, Array, "Roots"]:
    """The order of falling p, log p and p in it, and all roots."""
    order = jnp.argsort(-lax.stop_gradient(p))
    p = SCALE * lax.stop_gradient(p)[order]
    return order, logs[order], p, _roots(p, p[1:], p[:-1])


def _ascending(logs: Array, p: Array, roots: "Roots") -> Array:
    """The eigenvalues, with the 0 of the null vector 1."""
    descending = _moving(roots.value / SCALE, _log_eigenvalues(logs, p, roots))
    return jnp.concatenate([descending, jnp.zeros_like(descending, shape=1)])[::-1]


class Roots(NamedTuple):
    """Roots λ = o + x of g between poles `lower` and `upper`: the pole where these are equal, 0 where `lower` is 0."""

    o: Array
    x: Array
    lower: Array
    upper: Array

    @property
    def value(self) -> Array:
        return jnp.where(self.lower == 0, 0, self.o + self.x)

    @property
    def at_pole(self) -> Array:
        return (self.lower == 0) | (self.lower == self.upper)


def _roots(p: Array, lower: Array, upper: Array) -> Roots:
    """The roots of (S1) in the given intervals."""
    at_once = max(1, BLOCK // p.size) if isinstance(p.size, int) else None  # symbolic under jax.export: one by one
    # An interval that reaches down to 0 holds no root: one without width stands in for it.
    ends = tuple(jnp.where(lower == 0, 1, end) for end in (lower, upper))
    o, x = lax.map(lambda ends: _locate(p, *ends), ends, batch_size=at_once)
    return Roots(o, x, lower, upper)


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
    return o, jnp.where(tie, 0, x)


def _interpolate(g, t_a, t_b, alpha, beta, x, width, from_lower) -> Array:
    """One step: the new x. The slopes t come in units of 1/(a - λ) and 1/(b - λ), α = a - λ and β = b - λ in units of
    the width: nothing here over- or underflows.
    """
    r = g - t_a - t_b
    # A small step solves a k² - b k + c = 0 for the step k itself, in units of x.
    b = g * (alpha + beta) - (t_a * beta + t_b * alpha)
    a, c = r * (x / width), -g * jnp.where(from_lower, beta, alpha)
    root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, 0))
    k = jnp.where(b > 0, 2 * c / (b + root), (b - root) / (2 * a))
    # A large one solves r y² - b y + near = 0 for the distance y from the origin, in widths, so that no digit cancels.
    s_a, s_b = t_a * alpha, t_b * beta
    near, far = jnp.where(from_lower, s_a, s_b), jnp.where(from_lower, s_b, s_a)
    r = jnp.where(from_lower, r, -r)
    b = r + near + far
    root = jnp.sqrt((r - near + far) ** 2 + 4 * near * far)
    y = width * jnp.where(b > 0, 2 * near / (b + root), (b - root) / (2 * r))
    return jnp.where(jnp.abs(k) < 0.25, x + k * x, jnp.where(from_lower, y, -y))


# (S4): derivatives of the largest eigenvalue, in O(K). With l = log p, r_j = λ/(p_j - λ) and
# q_j = p_j/(p_j - λ) = 1 + r_j, g(λ) = 0 gives implicitly
#
#     d log λ = <w, dl>,    dr = dq = -s∘(dl - <w, dl>),    s = q∘r ≥ 0,    w = s/Σs:
#
# no quotient but of s by its sum, at least 1, so that every further derivative is a polynomial in q, r and w.


@custom_vjp
def _ratios(logs: Array, p: Array, roots: Roots) -> tuple[Array, Array]:
    """q and r, a row for each root; 0 where the root is a pole."""
    distance = _distances(p, roots)
    return p[None, :] / distance, roots.value[:, None] / distance


def _distances(p: Array, roots: Roots) -> Array:
    """p - λ, a row for each root; inf where the root is a pole."""
    return jnp.where(roots.at_pole[:, None], jnp.inf, (p[None, :] - roots.o[:, None]) - roots.x[:, None])


def _ratios_fwd(logs, p, roots):
    out = _ratios(logs, p, roots)
    return out, out


def _ratios_bwd(residuals, ct):
    s, w = _weights(*residuals)
    return -jnp.sum(jacobian_product(ct[0] + ct[1], w, AXIS, weights=s), 0), None, None


_ratios.defvjp(_ratios_fwd, _ratios_bwd)


def _weights(q: Array, r: Array) -> tuple[Array, Array]:
    """s and w of (S4)."""
    s = q * r
    return s, quotient(s, jnp.maximum(jnp.sum(s, -1, keepdims=True), 1))


@custom_vjp
def _log_largest(logs: Array, p: Array, roots: Roots) -> Array:
    return _log_of(roots)


def _log_largest_bwd(residuals, ct):
    _, w = _weights(*_ratios(*residuals))
    return jnp.sum(ct[:, None] * (w + _tied(*residuals)), 0), None, None


_log_largest.defvjp(lambda *args: (_log_largest(*args), args), _log_largest_bwd)


def _log_of(roots: Roots) -> Array:
    """log λ; 0 for the eigenvalue 0."""
    return jnp.log(jnp.where(roots.lower == 0, 1, roots.value))


@custom_vjp
def _tied(logs: Array, p: Array, roots: Roots) -> Array:
    """w where n equal classes share the eigenvalue: 1/n there, the mean over every basis of its eigenspace."""
    tied = jnp.where(roots.at_pole[:, None] & (p[None, :] == roots.value[:, None]), 1, 0).astype(p.dtype)
    return tied / jnp.maximum(jnp.sum(tied, -1, keepdims=True), 1)


def _tied_bwd(residuals, ct):
    """(S5): the limit of two classes that become equal. For n > 2 there is none."""
    _, p, roots = residuals
    distance = p[None, :] - roots.value[:, None]
    others = jnp.sum(jnp.where(distance == 0, 0, p[None, :] / jnp.where(distance == 0, 1, distance)), -1, keepdims=True)
    return -jnp.sum((1 + others) * jacobian_product(ct, _tied(*residuals), AXIS), 0), None, None


_tied.defvjp(lambda *args: (_tied(*args), args), _tied_bwd)


def _moving(value: Array, log: Array) -> Array:
    """`value`, with the derivative of exp(log)."""
    return value * jnp.exp(log - lax.stop_gradient(log))


# (S2), (S3): derivatives of all of them. J = AᵀA with A = diag(√p) P; its singular values are √λ, its right singular
# vectors the eigenvectors u, its left ones b = √λ u/√p, orthogonal to √p. With N = B diag(dl) Bᵀ, over the roots,
#
#     d log λ_k = N_kk,    du_k = Σ_j h_kj N_kj u_j,    db_k = Σ_j f_kj N_kj b_j - ½ <b_k∘√p, dl> √p,
#     h = 1/(2 sinh(δ/2)),    f = coth(δ/2)/2,    δ_kj = log λ_k - log λ_j,    dh = -f h dδ,    df = -h² dδ.


@custom_vjp
def _log_eigenvalues(logs: Array, p: Array, roots: Roots) -> Array:
    return _log_of(roots)


def _log_eigenvalues_bwd(residuals, ct):
    square = jnp.where(residuals[-1].at_pole[:, None], 0, _left(*residuals) ** 2)
    return jnp.sum(ct[:, None] * (square + _tied(*residuals)), 0), None, None


_log_eigenvalues.defvjp(lambda *args: (_log_eigenvalues(*args), args), _log_eigenvalues_bwd)


@custom_vjp
def _couplings(log_values: Array, roots: Roots) -> tuple[Array, Array]:
    """h and f of (S3); 0 between equal eigenvalues, of whose vectors any basis does, and with the eigenvalue 0."""
    differences = lambda x: x[:, None] - x[None, :]
    gap, column, row = differences(roots.o) + differences(roots.x), roots.value[:, None], roots.value[None, :]
    gap = jnp.where((gap == 0) | (column == 0) | (row == 0), jnp.inf, gap)
    return jnp.sqrt(column) * jnp.sqrt(row) / gap, (column + row) / (2 * gap)


def _couplings_fwd(log_values, roots):
    out = _couplings(log_values, roots)
    return out, out


def _couplings_bwd(residuals, ct):
    h, f = residuals
    change = -h * (f * ct[0] + h * ct[1])
    return jnp.sum(change, 1) - jnp.sum(change, 0), None


_couplings.defvjp(_couplings_fwd, _couplings_bwd)


@custom_vjp
def _left(logs: Array, p: Array, roots: Roots) -> Array:
    """B of (S2): rows b for the roots; 0 for the eigenvalue 0."""
    rows = jnp.sqrt(p)[None, :] * jnp.sqrt(roots.value)[:, None] / _distances(p, roots)
    square = jnp.sum(rows**2, -1, keepdims=True)
    tied = jnp.where(roots.lower[:, None] == 0, 0, _contrasts(p))
    return jnp.where(roots.at_pole[:, None], tied, rows / jnp.sqrt(jnp.where(square == 0, 1, square)))


def _left_fwd(*args):
    b = _left(*args)
    return b, (args, b)


def _left_bwd(residuals, ct):
    (logs, p, roots), b = residuals
    f = _couplings(_log_eigenvalues(logs, p, roots), roots)[1]
    root = _moving(jnp.sqrt(p / jnp.sum(p)), logs / 2)
    return _along(b, f * _dot(ct, b.T)) - root * _dot(_dot(ct, root), b) / 2, None, None


_left.defvjp(_left_fwd, _left_bwd)


@custom_vjp
def _right(logs: Array, p: Array, roots: Roots) -> Array:
    """Rows: the unit eigenvectors u of (S2), of p sorted descending, for the K-1 roots."""
    vectors = _weight_correction(p, roots.o, roots.x)[None, :] * (p[None, :] / _distances(p, roots))
    square = jnp.sum(vectors**2, -1, keepdims=True)
    return jnp.where(roots.at_pole[:, None], _contrasts(p), vectors / jnp.sqrt(jnp.where(square == 0, 1, square)))


def _right_fwd(*args):
    u = _right(*args)
    return u, (args, u)


def _right_bwd(residuals, ct):
    (logs, p, roots), u = residuals
    h = _couplings(_log_eigenvalues(logs, p, roots), roots)[0]
    return _along(_left(logs, p, roots), h * _dot(ct, u.T)), None, None


_right.defvjp(_right_fwd, _right_bwd)


def _along(b: Array, c: Array) -> Array:
    """The cotangent of l from that of N."""
    return jnp.sum(b * _dot(c, b), 0)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _contrasts(p: Array) -> Array:
    """Rows: equal classes s, …, k, k+1 share their value as an eigenvalue: (1, …, 1, -n, 0, …) / √(n(n+1)), n ones."""
    row, column = jnp.arange(p.size)[:, None], jnp.arange(p.size)[None, :]
    tied = (p[1:] == p[:-1])[:, None]
    start = lax.cummax(jnp.where(jnp.concatenate([jnp.zeros_like(tied, shape=(1, 1)), tied]), 0, row), 0)[:-1]
    ones = row[1:] - start
    contrast = jnp.where((column >= start) & (column < row[1:]), 1, jnp.where(column == row[1:], -ones, 0))
    return contrast.astype(p.dtype) / jnp.sqrt((ones * (ones + 1)).astype(p.dtype))


def _eigenvectors(logs: Array, p: Array, roots: Roots) -> Array:
    """Rows: unit eigenvectors, of p sorted descending, for the K-1 roots and then for 0."""
    size, support = p.size, jnp.sum(p > 0)
    row = jnp.arange(size)[:, None]
    # The eigenvalue 0: 1 on the support, and every class that has no probability.
    constant = (p > 0).astype(p.dtype) / jnp.sqrt(jnp.maximum(support, 1).astype(p.dtype))
    vectors = jnp.concatenate([_right(logs, p, roots), constant[None, :]])
    vectors = jnp.where(row == support - 1, constant[None, :], vectors)
    return jnp.where(row >= support, jnp.eye(size, dtype=p.dtype), vectors)


def _weight_correction(p: Array, o: Array, x: Array) -> Array:
    """ẑ/p of (S6), where ẑ are the weights for which the computed roots are the exact ones.

    Every root goes with the pole below it: factors near 1 are summed as logarithms, the few others multiplied. Of n
    equal classes, each has the n-th part of what the formula gives for all of them.
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
