"""Symmetric K×K operators made of a diagonal and a few vectors: the algebra that J and the loss Hessians share.

    A = Pᵀ diag(d) P + U C Uᵀ,    P = I - 1pᵀ    (P = I where no centre p is given).

Pv = v - <p,v> measures v from its mean under p, so vᵀPᵀ diag(d) P v = Σ d (v - <p,v>)² is a weighted variance. That is
the form every head of softmax takes, because it cannot see a constant added to the logits, and it has no cancellation:

    J = Pᵀ diag(p) P,    f'J + f'' ggᵀ = Pᵀ diag(f'p + f'' u_c) P,    Brier: d = p∘(p + Pv) with v = p - y,
    KL(p‖y): d = p∘(1 + Pr),    and z-loss adds 2ζ ppᵀ as U C Uᵀ.

No K×K matrix is built except by `as_matrix`. Reference: MATHEMATICS.md sections 2, 4 and 5.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks
from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core.centring import (
    AXIS,
    about_centred,
    centred,
    centred_transpose,
    complement,
    is_top,
    jacobian_product,
    root,
)
from jaxsoftmax._core.plumbing import compiled
from jaxsoftmax.operators.base import SymmetricOperator, lead


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "factors", "core", "centre"],
    meta_fields=["proportional"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalPlusLowRank(SymmetricOperator):
    """A = Pᵀ diag(d) P + U C Uᵀ, with P = I - 1pᵀ for a centre p and P = I without.

    A frozen pytree, batched over leading axes, which all fields share. With r columns of U, every method costs
    O(K (r + 1)), except `as_matrix`.

    Args:
      weights: d, shape (..., K). Of any sign; `factor_mv` and `is_psd` say what they need.
      factors: U, shape (..., K, r), or None.
      core: C, symmetric, shape (..., r, r); None for I.
      centre: p, shape (..., K): non-negative with sum 1 (or all 0: then P = I); or None.
      proportional: whether d = s p in every slice, for some s: then Pᵀ diag(d) P = s J, whose products are cheaper.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank
      >>> p = jnp.array([0.7, 0.2, 0.1])
      >>> A = DiagonalPlusLowRank(2 * p, centre=p)  # twice the Jacobian of softmax
      >>> print(A.mv(jnp.array([1.0, 0.0, 0.0])).round(2))
      [ 0.42 -0.28 -0.14]
      >>> print(A.as_matrix().round(2)[0], A.trace().round(2))
      [ 0.42 -0.28 -0.14] 0.92

    Reference: MATHEMATICS.md section 4.
    """

    weights: Array
    factors: Array | None = None
    core: Array | None = None
    centre: Array | None = None
    proportional: bool = False

    @property
    def _reference(self) -> Array:
        return self.weights

    @property
    def singular(self) -> bool:
        return self.centre is not None and self.factors is None

    def scaled(self, weight: ArrayLike) -> "DiagonalPlusLowRank":
        """weight · A, for a number or an array that broadcasts to the batch axes."""
        weight = checks.broadcast("weight", checks.as_float("weight", weight), self.shape[:-2]).astype(self.dtype)
        core = None if self.factors is None else weight[..., None, None] * self._core
        return dataclasses.replace(self, weights=weight[..., None] * self.weights, core=core)

    @compiled
    def diagonal(self) -> Array:
        """A_ii, shape (..., K); O(K)."""
        out = self.weights
        if self.centre is not None:
            p, top = self.centre, is_top(self.centre)
            rest = num.class_sum((1 - top) * out, AXIS)
            others = jnp.where(p > 0.5, rest, num.class_sum(top * out, AXIS) + rest - out)  # Σ_{k≠i} d_k
            out = out * complement(p) ** 2 + p**2 * others
        return out if self.factors is None else out + jnp.sum(_dot(self.factors, self._core) * self.factors, -1)

    @compiled
    def frobenius_norm(self) -> Array:
        """√(Σ A_ij²): the diagonal, the row and column of the heaviest class, and the rest; O(K)."""
        w, m = self._low_rank()
        weight = jnp.sum(_dot(w, m) * w, -1)
        heaviest = jnp.argmax(jnp.abs(weight), -1, keepdims=True)
        row = jnp.take_along_axis(w, heaviest[..., None], -2)
        other = num.other_classes(weight, heaviest, weight.ndim - 1)
        w = w * other[..., None]
        gram = _dot(m, _dot(_t(w), w))
        rest = jnp.sum(gram * _t(gram), (-1, -2)) - jnp.sum((weight * other) ** 2, -1)
        cross = jnp.sum(_dot(_dot(row, m), _t(w)) ** 2, (-1, -2))
        return root(jnp.sum(self.diagonal() ** 2, -1) + 2 * cross + jnp.maximum(rest, 0))

    @compiled
    def as_matrix(self) -> Array:
        """The dense matrix, shape (..., K, K); O(K²)."""
        w, m = self._low_rank()
        out = _dot(_dot(w, m), _t(w))
        return jnp.where(_eye(self.shape[-1], out) > 0, self.diagonal()[..., None], out)

    def is_psd(self) -> Array:
        """Whether Pᵀ diag(d) P is positive semidefinite, shape (...): sufficient for A if C is; O(K).

        d may have one negative entry, d_c, if d_c Σ_{k≠c} p_k²/d_k + p_c² ≥ 0.
        """
        if self.centre is None:
            return jnp.all(self.weights >= 0, -1)
        return jnp.all(self.weights >= 0, -1) | (jnp.sum(self.weights < 0, -1) == 1) & (self._excess()[1] <= 1)[..., 0]

    def factor_mv(self, u: ArrayLike) -> Array:
        """L u for u (..., K + r), where L Lᵀ = A; O(K). NaN where `is_psd` does not hold or C is not definite."""
        operator, u = self._with("u", u, self._factor_width)
        return operator._factor_mv(u)

    def factor_rmv(self, v: ArrayLike) -> Array:
        """Lᵀ v for v (..., K), shape (..., K + r), where L Lᵀ = A; O(K). NaN as in `factor_mv`."""
        operator, v = self._with("v", v)
        return operator._factor_rmv(v)

    @property
    def _factor_width(self) -> int:
        return self.shape[-1] + (0 if self.factors is None else self.factors.shape[-1])

    @property
    def _core(self) -> Array:
        """C, also where it is not given."""
        if self.core is not None:
            return self.core
        assert self.factors is not None
        return _eye(self.factors.shape[-1], self.factors)

    def _project(self, v: Array) -> Array:
        return v if self.centre is None else centred(v, self.centre)

    def _project_transpose(self, y: Array) -> Array:
        return y if self.centre is None else centred_transpose(y, self.centre)

    @compiled
    def _mv(self, v: Array) -> Array:
        if self.proportional:
            assert self.centre is not None
            out = jacobian_product(v, self.centre, self.centre.ndim - 1, weights=self.weights)
        else:
            out = self.weights * (v if self.centre is None else about_centred(v, self.centre))
            out = self._project_transpose(out)
        if self.factors is None:
            return out
        return out + _dot(self.factors, _dot(self._core, _dot(_t(self.factors), v[..., None])))[..., 0]

    @compiled
    def _quadratic_form(self, v: Array) -> Array:
        out = jnp.sum(self.weights * self._project(v) ** 2, -1)
        if self.factors is None:
            return out
        u = _dot(_t(self.factors), v[..., None])
        return out + jnp.sum(u * _dot(self._core, u), (-1, -2))

    # With w = 1/(d + λ), m = <p,x> and n = Σ d∘(x - m), (λI + Pᵀ diag(d) P) x = v reads x = w∘(v + d m + p n). Its
    # mean under p and its sum over d, with Σp = 1, are two equations for m and n, without a difference of near-equals:
    #     a m - b n = <p∘w, v>,    c m + a n = <d∘w, v>,    a = λΣp∘w,    b = Σp²∘w,    c = λΣd∘w,
    # and det(λI + Pᵀ diag(d) P) = Π(d + λ) (a² + b c). Where d = s p, c = s a and a + s b = 1: m = r / a, n = 0, and
    # a² + b c = a.

    def _means(self, damping: Array) -> tuple[Array, Array, Array, Array]:
        """(w, a, b, c) of above; a = 1 in a slice that is masked throughout."""
        w = 1 / (self.weights + damping)
        if self.centre is None:
            return w, jnp.ones_like(damping), jnp.zeros_like(damping), jnp.zeros_like(damping)
        p = self.centre
        absent = jnp.where(num.class_sum(p, AXIS) == 0, 1, 0).astype(p.dtype)
        a = absent + damping * num.class_sum(p * w, AXIS)
        return w, a, num.class_sum(p * p * w, AXIS), damping * num.class_sum(self.weights * w, AXIS)

    def _solve_centred(self, v: Array, damping: Array) -> Array:
        w, a, b, c = self._means(damping)
        if self.centre is None:
            return w * v
        p, d = self.centre, self.weights
        r = num.class_sum(p * w * v, AXIS)
        if self.proportional:
            return w * (v + d * (r / a))
        s = num.class_sum(d * w * v, AXIS)
        det = a * a + b * c
        return w * (v + d * ((a * r + b * s) / det) + p * ((a * s - c * r) / det))

    def _woodbury(self, damping: Array) -> tuple[Array, Array]:
        """M⁻¹U and I + C UᵀM⁻¹U, for M = λI + Pᵀ diag(d) P."""
        assert self.factors is not None
        solved = jax.vmap(lambda u: self._solve_centred(u, damping), -1, -1)(self.factors)
        inner = _dot(self._core, _dot(_t(self.factors), solved))
        return solved, inner + _eye(inner.shape[-1], inner)

    @compiled
    def _solve(self, v: Array, damping: Array) -> Array:
        x = self._solve_centred(v, damping)
        if self.factors is None:
            return x
        solved, inner = self._woodbury(damping)
        right = _dot(self._core, _dot(_t(self.factors), x[..., None]))
        return x - _dot(solved, jnp.linalg.solve(inner, right))[..., 0]

    @compiled
    def _logdet(self, damping: Array) -> Array:
        _, a, b, c = self._means(damping)
        out = jnp.sum(jnp.log(self.weights + damping), -1) + jnp.log(a if self.proportional else a * a + b * c)[..., 0]
        if self.factors is None:
            return out
        return out + jnp.log(jnp.linalg.det(self._woodbury(damping)[1]))

    # With d = |d| - 2|d_c| u_c, A = L (I - bbᵀ) Lᵀ, where L = Pᵀ diag(√|d|) and Lb = √(2|d_c|) Pᵀu_c. The shortest such
    # b decides: A is positive semidefinite iff |b| ≤ 1, and then √(I - bbᵀ) = I - bbᵀ/(1 + √(1 - |b|²)).

    def _excess(self) -> tuple[Array, Array]:
        """b and |b|²; 0 where no weight is negative."""
        d = self.weights
        b = jnp.where(d < 0, math.sqrt(2), 0).astype(d.dtype)
        if self.centre is not None:
            null = self.centre / jnp.maximum(root(jnp.abs(d)), math.sqrt(jnp.finfo(d.dtype).tiny))  # L null = 0
            square = num.class_sum(null * null, AXIS)
            b = b - null * (num.class_sum(null * b, AXIS) / jnp.where(square == 0, 1, square))
        return b, num.class_sum(b * b, AXIS)

    def _contract(self, u: Array) -> Array:
        b, square = self._excess()
        return u - b * (num.class_sum(b * u, AXIS) / (1 + jnp.sqrt(1 - square)))

    @compiled
    def _factor_mv(self, u: Array) -> Array:
        size = self.shape[-1]
        out = self._project_transpose(root(jnp.abs(self.weights)) * self._contract(u[..., :size]))
        if self.factors is None:
            return out
        return out + _dot(self.factors, _dot(jnp.linalg.cholesky(self._core), u[..., size:, None]))[..., 0]

    @compiled
    def _factor_rmv(self, v: Array) -> Array:
        out = self._contract(root(jnp.abs(self.weights)) * self._project(v))
        if self.factors is None:
            return out
        tail = _dot(_t(jnp.linalg.cholesky(self._core)), _dot(_t(self.factors), v[..., None]))[..., 0]
        return jnp.concatenate([out, jnp.broadcast_to(tail, (*out.shape[:-1], tail.shape[-1]))], -1)

    def _low_rank(self) -> tuple[Array, Array]:
        """(W, M) for which W M Wᵀ is A off the diagonal, where the top class t = {p > 1/2} is kept apart:

        p_i p_j Σ_{k≠t} d_k + (p_i p_j d_t for i, j ≠ t) - f_i p_j - p_i f_j,    f_t = d_t (1 - p_t), else f = d.
        """
        batch = self.weights.shape[:-1]
        columns, blocks = [], []
        if self.factors is not None:
            columns, blocks = [self.factors], [self._core]
        if self.centre is not None:
            p, d, top = self.centre, self.weights, is_top(self.centre)
            f = jnp.where(p > 0.5, d * complement(p), d)
            rest, of_top = num.class_sum((1 - top) * d, AXIS)[..., None], num.class_sum(top * d, AXIS)[..., None]
            pair = lead(jnp.array([[0, -1], [-1, 0]], d.dtype), len(batch))
            pair = pair + rest * lead(jnp.array([[0, 0], [0, 1]], d.dtype), len(batch))
            columns += [((1 - top) * p)[..., None], f[..., None], p[..., None]]
            blocks += [of_top, pair]
        width = sum(c.shape[-1] for c in columns)
        w = jnp.concatenate([jnp.zeros((*batch, self.shape[-1], 0), self.dtype), *columns], -1)
        m, start = jnp.zeros((*batch, width, width), self.dtype), 0
        for block in blocks:
            end = start + block.shape[-1]
            m, start = m.at[..., start:end, start:end].set(block), end
        return w, m


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _eye(size: int, like: Array) -> Array:
    """The unit matrix, with as many axes as `like`."""
    return lead(jnp.eye(size, dtype=like.dtype), like.ndim - 2)
