"""An operator at transformed logits x(z), seen from z: diag(t) A diag(t) + diag(extra), t = ∂x/∂z."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax.operators.base import SymmetricOperator, lead
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank
from jaxsoftmax.operators.fisher import Fisher


@functools.partial(jax.tree_util.register_dataclass, data_fields=["operator", "slope", "extra"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Transformed(SymmetricOperator):
    """diag(t) A diag(t) + diag(extra): the operator A at logits x(z), seen from z.

    Args:
      operator: A, at x.
      slope: t = ∂x/∂z, element by element, (..., K).
      extra: ∂L/∂x ∂²x/∂z², (..., K), or None for a Gauss-Newton or Fisher operator.
    """

    operator: DiagonalPlusLowRank
    slope: Array
    extra: Array | None = None

    @property
    def _reference(self) -> Array:
        return self.slope

    @property
    def singular(self) -> bool:
        return self.extra is None and self.operator.singular

    def diagonal(self) -> Array:
        """A_ii, shape (..., K); O(K)."""
        return self.slope**2 * self.operator.diagonal() + (0 if self.extra is None else self.extra)

    def as_matrix(self) -> Array:
        """The dense matrix, shape (..., K, K); O(K²)."""
        out = self.slope[..., :, None] * self.operator.as_matrix() * self.slope[..., None, :]
        if self.extra is None:
            return out
        eye = jnp.eye(self.shape[-1], dtype=self.dtype)
        return out + self.extra[..., None] * jnp.expand_dims(eye, tuple(range(out.ndim - 2)))

    def is_psd(self) -> Array:
        """Whether the sum is positive semidefinite, up to rounding; O(K)."""
        return self.operator.is_psd() if self.extra is None else _num_negative(self._expanded()) == 0

    def factor_mv(self, u: ArrayLike) -> Array:
        """L u, where L Lᵀ = diag(t) A diag(t); O(K). Without the extra diagonal, which `loss_ggn` leaves out."""
        self._only_congruent("factor_mv")
        out = self.operator.factor_mv(u)
        return lead(self.slope, out.ndim - self.slope.ndim) * out

    def factor_rmv(self, v: ArrayLike) -> Array:
        """Lᵀ v for the L of `factor_mv`; O(K)."""
        self._only_congruent("factor_rmv")
        operator, v = self._with("v", v)
        return operator.operator.factor_rmv(operator.slope * v)

    def sample_targets(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """As `Fisher.sample_targets`."""
        if not isinstance(self.operator, Fisher):
            raise TypeError("sample_targets needs a Fisher operator: see loss_fisher")
        return self.operator.sample_targets(key, shape)

    def _only_congruent(self, method: str) -> None:
        if self.extra is not None:
            raise TypeError(f"{method}: the Hessian of capped logits has no factor; that of loss_ggn has one")

    def _mv(self, v: Array) -> Array:
        out = self.slope * self.operator.mv(self.slope * v)
        return out if self.extra is None else out + self.extra * v

    def _quadratic_form(self, v: Array) -> Array:
        out = self.operator.quadratic_form(self.slope * v)
        return out if self.extra is None else out + jnp.sum(self.extra * v * v, -1)

    def _solve(self, v: Array, damping: Array) -> Array:
        return self._expanded().solve(v, damping[..., 0])

    def _logdet(self, damping: Array) -> Array:
        return self._expanded().logdet(damping[..., 0])

    def _expanded(self) -> DiagonalPlusLowRank:
        """With Pᵀ diag(d) P = diag(d) - dpᵀ - pdᵀ + (Σd) ppᵀ written out: solvers need the diagonal apart."""
        inner, t = self.operator, self.slope
        weights = t * t * inner.weights + (0 if self.extra is None else self.extra)
        if inner.centre is None:
            return DiagonalPlusLowRank(weights)
        total = jnp.sum(inner.weights, -1)[..., None, None]
        cross = jnp.expand_dims(jnp.array([[0, -1], [-1, 0]], t.dtype), tuple(range(t.ndim - 1)))
        columns, core = jnp.stack([inner.weights, inner.centre], -1), cross + _pad(total, 1, 0)
        if inner.factors is not None and inner.core is not None:
            rank = inner.factors.shape[-1]
            columns, core = jnp.concatenate([columns, inner.factors], -1), _pad(core, 0, rank) + _pad(inner.core, 2, 0)
        return DiagonalPlusLowRank(weights, t[..., None] * columns, core)


def _num_negative(a: DiagonalPlusLowRank) -> Array:
    """How many eigenvalues of D + U C Uᵀ are negative by more than rounding, D shifted by as much.

    Both [[D, U], [Uᵀ, -C⁻¹]] = D ⊕ -(C⁻¹ + UᵀD⁻¹U) and = (D + U C Uᵀ) ⊕ -C⁻¹ up to congruence: Sylvester counts.
    """
    tolerance = 16 * jnp.finfo(a.dtype).eps * jnp.max(jnp.abs(a.weights), -1, keepdims=True)
    d = a.weights + jnp.maximum(tolerance, jnp.finfo(a.dtype).tiny)
    count = jnp.sum(d < 0, -1)
    if a.factors is None or a.core is None:
        return count
    inverse = jnp.linalg.inv(a.core)
    schur = inverse + jnp.matmul(jnp.swapaxes(a.factors, -1, -2), a.factors / d[..., None], precision="highest")
    return count + _num_positive(schur) - _num_positive(inverse)


def _num_positive(matrix: Array) -> Array:
    return jnp.sum(jnp.linalg.eigvalsh(matrix) > 0, -1)


def _pad(matrix: Array, before: int, after: int) -> Array:
    """`matrix` with so many rows and columns of 0 around it."""
    return jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(before, after)] * 2)
