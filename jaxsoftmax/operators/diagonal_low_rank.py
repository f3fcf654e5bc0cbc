"""Symmetric K×K operators made of a diagonal and two vectors: the algebra of the loss Hessians.

    A = T (Pᵀ diag(d) P + κ ppᵀ) T + diag(e),    P = I - 1pᵀ,    T = diag(t).

Pv = v - <p,v> measures v from its mean under p, so vᵀPᵀ diag(d) P v = Σ d (v - <p,v>)² is a weighted variance. That is
the form every head of softmax takes, because it cannot see a constant added to the logits, and it has no cancellation:

    J = Pᵀ diag(p) P,    f'J + f'' ggᵀ = Pᵀ diag(f'p + f'' u_c) P,    Brier: d = p∘(p + Pv) with v = p - y,
    KL(p‖y): d = p∘(1 + Pr),    and z-loss adds 2ζ ppᵀ.

T and e come from logits that are transformed first. No K×K matrix is built except by `as_matrix`.

Reference: docs/mathematics.md, sections 2, 4 and 5.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax._core import classes
from jaxsoftmax._core.centring import (
    AXIS,
    about_centred,
    below_half,
    centred,
    centred_transpose,
    complement,
    is_top,
    root,
)
from jaxsoftmax._core.mesh import in_auto_mode, sharded_like, split_axes_of
from jaxsoftmax._core.tracing import compiled
from jaxsoftmax.operators.base import SymmetricOperator, lead
from jaxsoftmax.operators.log_derivatives import log, quotient, share


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "centre", "mean_weight", "slope", "extra", "likelihood"],
    meta_fields=["axis"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DiagonalPlusLowRank(SymmetricOperator):
    """A = T (Pᵀ diag(d) P + κ ppᵀ) T + diag(e), with P = I - 1pᵀ for a centre p and P = I without, T = diag(t).

    A frozen pytree, batched over leading axes, which all fields share. Every method but `as_matrix` costs O(K).
    In float32 the smallest entries of second derivatives of `frobenius_norm` and of lightly damped `solve` may keep
    four digits, of such a `logdet` fewer; those of first ones of the Jensen-Shannon Hessian, where both sides are sure
    of different classes, none beside the largest. Where an indefinite matrix is nearly singular without one class,
    `solve` and derivatives of `logdet` lose digits; where it is singular, `solve` is NaN. Reverse mode of
    `frobenius_norm` loses digits at a norm below 1e-36, at second order below 1e-25; a weight below 1.2e-38 counts as
    0.

    Args:
      weights: d, shape (..., K). Of any sign; `factor_mv` and `is_psd` say what they need.
      centre: p, shape (..., K): non-negative with sum 1 (or all 0: then P = I); or None.
      mean_weight: κ, shape (..., 1), or None for 0; needs a centre.
      slope: t, shape (..., K), or None for 1.
      extra: e, shape (..., K), or None for 0.
      likelihood: the model whose Fisher matrix A is, or None.
      axis: the last; with mesh axes inside `jax.shard_map`, where every vector is this device's block.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.operators import DiagonalPlusLowRank
      >>> p = jnp.array([0.7, 0.2, 0.1])
      >>> A = DiagonalPlusLowRank(2 * p, centre=p)  # twice the Jacobian of softmax
      >>> print(A.mv(jnp.array([1.0, 0.0, 0.0])).round(2))
      [ 0.42 -0.28 -0.14]
      >>> print(A.as_matrix().round(2)[0], A.trace().round(2))
      [ 0.42 -0.28 -0.14] 0.92

    Reference: docs/mathematics.md, section 4.
    """

    weights: Array
    centre: Array | None = None
    mean_weight: Array | None = None
    slope: Array | None = None
    extra: Array | None = None
    likelihood: Any = None
    axis: classes.ClassAxis = AXIS

    @property
    def _reference(self) -> Array:
        return self.weights

    @property
    def singular(self) -> bool:
        return self.centre is not None and self.mean_weight is None and self.extra is None

    def scaled(self, weight: ArrayLike) -> Self:
        weight = self._weight(weight)
        scaled = {name: getattr(self, name) for name in ("weights", "mean_weight", "extra")}
        scaled = {name: x if x is None else weight * x for name, x in scaled.items()}
        likelihood = self.likelihood and self.likelihood.scaled(weight)
        return dataclasses.replace(self, **scaled, likelihood=likelihood)

    def transformed(self, slope: Array, extra: Array | None = None) -> Self:
        squared = slope * slope
        both = [e for e in (None if self.extra is None else squared * self.extra, extra) if e is not None]
        likelihood = self.likelihood and self.likelihood.scaled(squared)
        slope, extra = slope if self.slope is None else slope * self.slope, sum(both[1:], both[0]) if both else None
        return dataclasses.replace(self, slope=slope, extra=extra, likelihood=likelihood)

    def _plus_diagonal(self, e: Array) -> Self:
        extra = e if self.extra is None else self.extra + e
        return dataclasses.replace(self, extra=jnp.broadcast_to(extra, self.weights.shape), likelihood=None)

    def _only_diagonal(self) -> Array | None:
        return self._t**2 * self.weights + self._e if self.centre is None else None

    @property
    def _t(self) -> Array:
        return jnp.ones_like(self.weights) if self.slope is None else self.slope

    @property
    def _e(self) -> Array:
        return jnp.zeros_like(self.weights) if self.extra is None else self.extra

    @property
    def _kappa(self) -> Array:
        return jnp.zeros_like(classes.sum(self.weights, self.axis)) if self.mean_weight is None else self.mean_weight

    @compiled
    def diagonal(self) -> Array:
        out = self.weights
        if self.centre is not None:
            p, top = self.centre, is_top(self.centre)
            rest = classes.sum((1 - top) * out, self.axis)
            others = jnp.where(p > 0.5, rest, classes.sum(top * out, self.axis) + rest - out)  # Σ_{k≠i} d_k
            missed = complement(p, self.axis)
            out = out * missed * missed + p * (p * (others + self._kappa))  # squares alone would underflow
        return self._t**2 * out + self._e

    @compiled
    def frobenius_norm(self) -> Array:
        # A off the diagonal is B = W M Wᵀ. With c the class of the largest |B_ii|, which would cancel in the last sums,
        #
        #     Σ A_ij² = Σ A_ii² + 2 Σ_{i≠c} B_ci² + Σ_{i,j≠c} B_ij² - Σ_{i≠c} B_ii²,    Σ B_ij² = tr (M WᵀW)².
        # In units of the largest |A_ii|, and of q, f and p in W: squares and cotangents would underflow. (With W's
        # columns apart this is one kernel on a GPU, not 43 passes over the logits; so is the gradient, which XLA then
        # takes two minutes to compile.)
        (w, m), diagonal = self._off_diagonal(), self.diagonal()
        unit = classes.max(lax.stop_gradient(jnp.abs(diagonal)), self.axis)
        unit = jnp.maximum(jnp.where(unit == 0, 1, unit), jnp.finfo(self.dtype).tiny)
        sizes, diagonal = self._column_sizes(unit), diagonal / unit
        w, m = w / sizes, m * (jnp.swapaxes(sizes, -1, -2) / unit[..., None]) * sizes
        b = jnp.sum(_dot(w, m) * w, -1)  # B_ii
        size = lax.stop_gradient(jnp.abs(b))
        other = classes.others(b, classes.argmax(size, classes.max(size, self.axis), self.axis), self.axis)
        w, w_c = w * other[..., None], self._row_sum((1 - other)[..., None] * w)
        gram = _dot(m, jnp.concatenate([self._row_sum(w[..., i, None] * w) for i in range(w.shape[-1])], -2))
        rest = jnp.sum(gram * jnp.swapaxes(gram, -1, -2), (-1, -2)) - classes.sum((b * other) ** 2, self.axis)[..., 0]
        b_c = jnp.sum(_dot(w_c, m) * w, -1)
        outer = classes.sum(diagonal**2 + 2 * b_c**2, self.axis)[..., 0]
        return unit[..., 0] * root(outer + jnp.maximum(rest, 0))

    def _column_sizes(self, unit: Array) -> Array:
        """The size of each column of W in `_off_diagonal`, (..., 1, columns), where `unit` is that of A."""
        slope = jnp.ones_like(unit)
        if self.slope is not None:
            slope = classes.max(lax.stop_gradient(jnp.abs(self.slope)), self.axis)
            slope = jnp.maximum(jnp.where(slope == 0, 1, slope), jnp.finfo(self.dtype).tiny)
        if self.centre is None:
            return slope[..., None]
        others = classes.sum(lax.stop_gradient(below_half(self.centre)), self.axis)
        return jnp.stack([jnp.where(others == 0, 1, others) * slope, unit / slope, slope], -1)

    def _row_sum(self, w: Array) -> Array:
        """Σ over the classes, the last axis but one, which stays with length 1."""
        return classes.sum(w, classes.ClassAxis((-2,), self.axis.mesh_axes))

    @compiled
    def as_matrix(self) -> Array:
        self._whole("as_matrix")
        return in_auto_mode(type(self)._dense, self, (*split_axes_of(self.weights), None))

    def _dense(self) -> Array:
        w, m = self._off_diagonal()
        out = _dot(_dot(w, m), jnp.swapaxes(w, -1, -2))
        eye = lead(jnp.eye(self.shape[-1], dtype=bool), out.ndim - 2)
        return jnp.where(eye, self.diagonal()[..., None], out)

    def _off_diagonal(self) -> tuple[Array, Array]:
        """(W, M) for which W M Wᵀ is A off the diagonal. Multiplied out, A_ij/(t_i t_j) is, for i ≠ j,

            p_i p_j (κ + Σ_k d_k) - d_i p_j - p_i d_j,

        where for the top class c, p_c > 1/2, p_i p_c d_c - p_i d_c is -p_i f_c. So it is, with q = p but for q_c = 0,

            d_c q_i q_j + (κ + Σ_{k≠c} d_k) p_i p_j - f_i p_j - p_i f_j,    f = d but for f_c = d_c (1 - p_c).
        """
        if self.centre is None:
            w = jnp.zeros_like(self.weights)[..., None]
            return w, self._row_sum(w)
        p, d, top = self.centre, self.weights, is_top(self.centre)
        f = jnp.where(p > 0.5, d * complement(p, self.axis), d)
        rest, of_top = classes.sum((1 - top) * d, self.axis) + self._kappa, classes.sum(top * d, self.axis)
        w = self._t[..., None] * jnp.stack([(1 - top) * p, f, p], -1)
        zero, minus = jnp.zeros_like(rest), -jnp.ones_like(rest)
        rows = [of_top, zero, zero], [zero, zero, minus], [zero, minus, rest]
        return w, jnp.stack([jnp.concatenate(row, -1) for row in rows], -2)

    # Products.

    def _centred_mv(self, u: Array) -> Array:
        """(Pᵀ diag(d) P + κ ppᵀ) u."""
        if self.centre is None:
            return self.weights * u
        out = centred_transpose(self.weights * about_centred(u, self.centre, self.axis), self.centre, self.axis)
        if self.mean_weight is None:
            return out
        return out + self.centre * (self.mean_weight * classes.sum(self.centre * u, self.axis))

    @compiled
    def _mv(self, v: Array) -> Array:
        out = self._centred_mv(v) if self.slope is None else self.slope * self._centred_mv(self.slope * v)
        return out if self.extra is None else out + self.extra * v

    @compiled
    def _quadratic_form(self, v: Array) -> Array:
        u = v if self.slope is None else self.slope * v
        deviation = u if self.centre is None else centred(u, self.centre, self.axis)
        out = classes.sum(self.weights * deviation * deviation, self.axis)[..., 0]
        if self.mean_weight is not None and self.centre is not None:
            out = out + (self.mean_weight * classes.sum(self.centre * u, self.axis) ** 2)[..., 0]
        return out if self.extra is None else out + classes.sum(self.extra * v**2, self.axis)[..., 0]

    # Solutions and determinant: docs/mathematics.md, section 2.5, (D1) to (D3) with their letters. The class c stays an
    # unknown; the others are eliminated.

    def _reduced(self, damping: Array) -> _Reduced:
        assert self.centre is not None
        total = functools.partial(classes.sum, axis=self.axis)
        e, square = self._e + damping, self._t**2
        top = self._apart(square, e)
        p, d, e_c = (1 - top) * self.centre, (1 - top) * self.weights, total(top * e)
        load, e = square * d, jnp.where(top > 0, 1, e)
        heavy, small, left = jnp.abs(load) > jnp.abs(e), share(load, e), share(e, load)
        w = (1 - top) * quotient(jnp.ones_like(load), load + e)
        dw = jnp.where(heavy, quotient(small, jnp.where(heavy, square, 1)), d * w)
        p_c, d_c, t_c = (total(top * x) for x in (self.centre, self.weights, self._t))
        h, a, b, c = total(p * small), total(p * left), self._kappa + total(e * dw), total((p * self._t) ** 2 * w)
        q = jnp.where(h < 0.5, 1 - h, p_c + a)
        det = q**2 + c * (b + d_c)
        pivot = e_c * det, t_c**2 * (p_c**2 * b + d_c * (c * b + a * a))
        return _Reduced(top, p, w, dw, load + e, left, heavy, p_c, d_c, t_c, a, b, c, q, det, *pivot)

    def _apart(self, square: Array, e: Array) -> Array:
        """1 at class c, else 0: whose pivot d + ε would cost most digits, where it cancels or 1 - p is small."""
        assert self.centre is not None
        p, load, square, e = lax.stop_gradient((self.centre, square * self.weights, square, e))
        size = jnp.maximum(jnp.abs(load + e) * jnp.where(p > 0.5, 1 - p, 1), jnp.finfo(p.dtype).tiny)
        cost = jnp.where(classes.max(p, self.axis) > 0.5, jnp.abs(load) + jnp.abs(e), square * p * p)
        cost = jnp.where(p == 0, 0, cost / size)
        return 1 - classes.others(p, classes.argmax(cost, classes.max(cost, self.axis), self.axis), self.axis)

    @compiled
    def _solve(self, v: Array, damping: Array) -> Array:
        if self.centre is None:
            return quotient(v, self._t**2 * self.weights + self._e + damping)
        r, t, total = self._reduced(damping), self._t, functools.partial(classes.sum, axis=self.axis)
        top = r.top
        # u = v/t where t²d > ε, which is where 1/ε would magnify rounding: dt²∘W = 1 - ε∘W, and the deviations of u
        # from their mean there sum to 0: what is left of them is -Σ ε∘W∘(u - mean).
        tied = 4 * jnp.abs(r.others) > jnp.abs(r.own)
        head = jnp.where(r.heavy | tied & (top > 0), 1, 0).astype(t.dtype)
        u = v / jnp.where(head > 0, t, 1)
        mean = total(head * u) / jnp.maximum(total(head), 1)
        common = 0
        if self.singular and self.slope is None:  # A has no part in what all classes share
            v, u, common, mean = v - mean, u - mean, quotient(mean, damping), 0 * mean
        terms = jnp.where(r.heavy, -r.left * (u - mean), t * r.dw * (v - t * mean))
        sum_d = mean * total(t * t * r.dw + head * top) + total(terms)  # with v_c/t_c where c is tied to the others
        f, v_c = total(r.p * t * r.w * v), total(top * v)
        g = sum_d - total(head * top * u)
        along = (r.a * r.d_c - r.b * r.p_c) * f
        x_c = jnp.where(
            tied,
            r.t_c * (r.det * sum_d - (r.a * r.q + r.c * r.b) * g + along),
            r.det * v_c + r.t_c * ((r.q * r.p_c + r.c * r.d_c) * g + along),
        )
        x_c = quotient(x_c, r.own + r.others)
        y = r.t_c * x_c
        f, g = f - r.a * y, g - r.b * y
        m = y + quotient(r.q * f + r.c * g, r.det)
        n = quotient(r.q * g - (r.b + r.d_c) * f, r.det)
        return common + jnp.where(top > 0, x_c, r.w * (v + t * r.p * n) + t * r.dw * m)

    @compiled
    def _logdet(self, damping: Array) -> Array:
        if self.centre is None:
            factors, last = self._t**2 * self.weights + self._e + damping, None
        else:
            r = self._reduced(damping)
            factors, last = r.factors, r.own + r.others
        logs = classes.sum(log(jnp.abs(factors)), self.axis)
        negative = classes.sum(jnp.where(factors < 0, 1, 0), self.axis)
        if last is not None:
            logs, negative = logs + log(jnp.abs(last)), negative + jnp.where(last < 0, 1, 0)
        return classes.undefined(negative % 2 == 1, logs)[..., 0]

    # Definiteness and factor: docs/mathematics.md, section 2.5, with its b.

    @compiled
    def is_psd(self) -> Array:
        if self.centre is None:
            return ~classes.any(~(self._t**2 * self.weights + self._e >= 0), self.axis)[..., 0]
        if self.extra is None:
            negative = classes.sum(jnp.where(self.weights < 0, 1, 0), self.axis)
            centred_psd = (negative == 0) | (negative == 1) & (self._excess()[1] <= 1)
            return (centred_psd & (self._kappa >= 0))[..., 0]
        # The signs of A without class c, and of det A, shifted by as much as rounding may have taken.
        diagonal = self._t**2 * self.weights + self._e
        slack = 16 * jnp.finfo(self.dtype).eps * classes.max(jnp.abs(diagonal), self.axis)
        r = self._reduced(jnp.maximum(slack, jnp.finfo(self.dtype).tiny))
        negative, last = classes.sum(jnp.where(r.factors < 0, 1, 0), self.axis), r.own + r.others
        minor = jnp.where(r.det >= 0, (negative == 0) & (last >= 0), (negative == 1) & (r.c < 0) & (last <= 0))
        return minor[..., 0]

    def _excess(self) -> tuple[Array, Array]:
        """b and |b|²; 0 where no weight is negative."""
        d = self.weights
        b = jnp.where(d < 0, math.sqrt(2), 0).astype(d.dtype)
        if self.centre is not None:
            roots = jnp.maximum(root(jnp.abs(d)), math.sqrt(jnp.finfo(d.dtype).tiny))
            null = quotient(self.centre, roots)  # L null = 0
            square = classes.sum(null * null, self.axis)
            b = b - null * (classes.sum(null * b, self.axis) / jnp.where(square == 0, 1, square))
        return b, classes.sum(b * b, self.axis)

    def _contract(self, u: Array) -> Array:
        b, square = self._excess()
        return u - b * (classes.sum(b * u, self.axis) / (1 + jnp.sqrt(1 - square)))

    @property
    def _factor_width(self) -> int:
        if self.extra is not None and self.centre is not None:
            raise TypeError("the Hessian of capped logits has no factor in closed form; logits_ggn's operator has one")
        return self.shape[-1] + (0 if self.mean_weight is None else 1)

    @compiled
    def _factor_mv(self, u: Array) -> Array:
        if self.centre is None:
            return jnp.sqrt(self._t**2 * self.weights + self._e) * u
        size = self.shape[-1]
        out = centred_transpose(root(jnp.abs(self.weights)) * self._contract(u[..., :size]), self.centre, self.axis)
        if self.mean_weight is not None:
            out = out + self.centre * (jnp.sqrt(self.mean_weight) * u[..., size:])
        return out if self.slope is None else self.slope * out

    @compiled
    def _factor_rmv(self, v: Array) -> Array:
        if self.centre is None:
            return jnp.sqrt(self._t**2 * self.weights + self._e) * v
        u = v if self.slope is None else self.slope * v
        out = self._contract(root(jnp.abs(self.weights)) * centred(u, self.centre, self.axis))
        if self.mean_weight is None:
            return out
        last = jnp.sqrt(self.mean_weight) * classes.sum(self.centre * u, self.axis)
        return jnp.concatenate([sharded_like(last, out), last], -1)  # K + 1 entries, which no mesh axis splits


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


class _Reduced(NamedTuple):
    """A + λI with class c (1 at `top`) kept apart, in the letters of docs/mathematics.md, section 2.5.

    Over the others p, W, d∘W (dw), t²d + ε (factors), ε∘W (left), and whether t²d > ε (heavy). Per example p_c, d_c,
    t_c, the sums of (D1) with c for B, det for Δ, and own + others, the factor of x_c in (D3).
    """

    top: Array
    p: Array
    w: Array
    dw: Array
    factors: Array
    left: Array
    heavy: Array
    p_c: Array
    d_c: Array
    t_c: Array
    a: Array
    b: Array
    c: Array
    q: Array
    det: Array
    own: Array
    others: Array
