"""The Jacobian of softmax and of α-entmax as an object: an operator of O(K) memory, batched, a pytree.

    J = s (diag(π) - ππᵀ),    q = p^(2-α) on the support,    s = Σq,    π = q/s;    softmax: α = 1, π = p, s = 1.

Every formula is one of softmax at π, times s or √s. A scale of 0 is the zero matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import (
    AXIS,
    apart,
    centred,
    centred_transpose,
    complement,
    is_top,
    jacobian_product,
    root,
    rounded_one,
)
from jaxsoftmax._core.mesh import in_auto_mode, split_axes_of
from jaxsoftmax._core.tracing import compiled
from jaxsoftmax.maps.derivatives import dense_jacobian
from jaxsoftmax.maps.entmax import as_order, escort, escort_map, order_of
from jaxsoftmax.maps.softmax import AxisName, softmax
from jaxsoftmax.operators import spectrum
from jaxsoftmax.operators.base import SymmetricOperator
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank
from jaxsoftmax.operators.log_derivatives import log, logarithm, over, quotient, share


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["probs", "scale", "likelihood", "logits"], meta_fields=["axis"]
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SoftmaxJacobian(SymmetricOperator):
    """J = s (diag(π) - ππᵀ), the Jacobian of softmax or α-entmax; build it with `from_logits` or `from_probs`.

    A frozen pytree, batched over leading axes, which passes through jit, vmap, scan and grad. Symmetric, positive
    semidefinite, J1 = 0. Computed in float32 at least; all results are differentiable in the logits or probabilities
    and in the vectors, to any order, unless the method says otherwise.

    A class of probability 0, a masked one included, is a row and column of zeros: it adds a null vector, and a factor
    `damping` to the damped determinant. Derivatives in a probability that is 0 are taken as 0 where they do not
    exist. At a one-hot p (and K = 1), J = 0. In float32, probabilities below 1.2e-38 count as 0. Of α-entmax,
    second derivatives in the `p` of `from_probs` lose as many digits as p^(1-α) has at the smallest p of the support.

    Args:
      probs: π, shape (..., K).
      scale: s, shape (..., 1).
      likelihood: the model whose Fisher matrix this is, or None.
      axis: the last; with mesh axes inside `jax.shard_map`, where every vector is this device's block.
      logits: (..., K) with π = softmax(logits), or None. Where they are known, what grows as π vanishes (the spectrum,
        `pinv_mv`, `pseudo_logdet`) has its derivative in them and not in π, whose own would leave float32.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> J = jaxsoftmax.SoftmaxJacobian.from_logits(jnp.array([2.0, 1.0, 0.5]))
      >>> print(J.mv(jnp.array([0.1, -0.3, 0.2])).round(4))
      [ 0.0493 -0.0743  0.025 ]
      >>> [round(value, 4) for value in J.eigvalsh().tolist()], int(J.rank())
      ([0.0, 0.1681, 0.3637], 2)
      >>> b = jnp.array([0.1, -0.3, 0.2])
      >>> [round(entry, 3) for entry in J.pinv_mv(b).tolist()]
      [0.063, -1.393, 1.33]

    Reference: docs/mathematics.md, sections 2, 3 and 5.
    """

    probs: Array
    scale: Array
    likelihood: Any = None
    axis: classes.ClassAxis = AXIS
    logits: Array | None = None

    @classmethod
    def from_logits(
        cls,
        x: ArrayLike,
        where: ArrayLike | None = None,
        alpha: ArrayLike = 1.0,
        *,
        temperature: ArrayLike = 1.0,
        axis_name: AxisName = None,
    ) -> SoftmaxJacobian:
        """J at the logits x; O(K).

        Args:
          x: real logits (..., K).
          where: boolean mask that broadcasts to `x`; False marks an absent class.
          alpha: 1 for softmax, else the α of `entmax`, as it takes it.
          temperature: T > 0, or one per slice (...), for the Jacobian of x ↦ softmax(x/T), which has the factor 1/T.
          axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.
        """
        x = checks.as_float("x", x)
        _check_classes("x", x)
        (z,) = dtypes.widen(x)
        scale, beside_classes = checks.inverse("temperature", temperature, z)
        z = z if checks.is_known_as(1, temperature) else z * beside_classes
        axis = classes.ClassAxis((-1,), checks.split_over(axis_name, "x", z))
        if _is_one(alpha):
            J = cls._of_softmax(softmax(z, where=where, axis_name=axis_name), axis, z)
        else:
            order, exact = as_order(alpha, z.shape, axis)
            J = cls(*escort_map(z, order, checks.as_mask("where", where, z.shape), exact, axis), axis=axis)
        return J if checks.is_known_as(1, temperature) else J.scaled(scale)

    @classmethod
    def from_probs(cls, p: ArrayLike, alpha: ArrayLike = 1.0, *, axis_name: AxisName = None) -> SoftmaxJacobian:
        """J where the map's output is p; O(K).

        Args:
          p: probabilities (..., K), floating, each slice with sum 1 (to the square root of its dtype's eps), or all 0.
          alpha: 1 if `p` comes from softmax, else the α of the entmax that it comes from.
          axis_name: as in `from_logits`.

        Raises:
          ValueError: if `p` is negative or does not sum to 1, as far as its values are known (not under jit).
        """
        p = checks.as_loss_float("p", p)
        _check_classes("p", p)
        _check_simplex(p)
        (p,) = dtypes.widen(p)
        p = jnp.where(p < jnp.finfo(p.dtype).tiny, 0, p)
        axis = classes.ClassAxis((-1,), checks.split_over(axis_name, "p", p))
        if _is_one(alpha):
            return cls._of_softmax(p, axis)
        return cls(*escort(p, order_of(p, *as_order(alpha, p.shape, axis), axis), axis), axis=axis)

    @classmethod
    def _of_softmax(cls, p: Array, axis: classes.ClassAxis, logits: Array | None = None) -> SoftmaxJacobian:
        return cls(p, jnp.ones_like(classes.max(lax.stop_gradient(p), axis)), axis=axis, logits=logits)

    @property
    def _reference(self) -> Array:
        return self.probs

    @property
    def singular(self) -> bool:
        return True

    def scaled(self, weight: ArrayLike) -> Self:
        weight = self._weight(weight)
        likelihood = self.likelihood and self.likelihood.scaled(weight)
        return dataclasses.replace(self, scale=weight * self.scale, likelihood=likelihood)

    def transformed(self, slope: Array, extra: Array | None = None) -> DiagonalPlusLowRank:
        return self._weighted().transformed(slope, extra)

    def _weighted(self) -> DiagonalPlusLowRank:
        """Pᵀ diag(sπ) P."""
        return DiagonalPlusLowRank(self.scale * self.probs, self.probs, likelihood=self.likelihood, axis=self.axis)

    def _plus_diagonal(self, e: Array) -> DiagonalPlusLowRank:
        return self._weighted()._plus_diagonal(e)

    def _times(self, factor: ArrayLike) -> SymmetricOperator:
        known = not isinstance(factor, Tracer)
        return self._weighted().scaled(factor) if known and np.any(np.asarray(factor) < 0) else self.scaled(factor)

    def is_psd(self) -> Array:
        return ((self.scale >= 0) | ~classes.any(self.probs * (1 - self.probs) != 0, self.axis))[..., 0]

    # The matrix.

    @compiled
    def as_matrix(self) -> Array:
        self._whole("as_matrix")
        return self.scale[..., None] * in_auto_mode(dense_jacobian, self.probs, (*split_axes_of(self.probs), None))

    @compiled
    def diagonal(self) -> Array:
        """J_ii = s π(1 - π), shape (..., K); O(K)."""
        return self.scale * self.probs * complement(self.probs, self.axis)

    @compiled
    def trace(self) -> Array:
        """s Σ π(1 - π), shape (...); O(K)."""
        top, rest, below = apart(self.probs, self.axis, by_products=classes.is_long(self.probs, self.axis))
        return (self.scale * (top * rest + classes.sum(below * (1 - below), self.axis)))[..., 0]

    @compiled
    def frobenius_norm(self) -> Array:
        """√(Σ J_ij²), shape (...); O(K)."""
        # (π_c r)² + Σ π_k² (1 - 2π_k + 2π_c²) + (Σ π_k²)², k ≠ c, r = Σ π_k: no cancellation; by r, or squares vanish
        top, rest, below = apart(self.probs, self.axis)
        unit = lax.stop_gradient(jnp.where(rest == 0, 1, rest))
        squares = (below / unit) ** 2
        size, own = classes.sum(squares, self.axis), classes.sum(squares * (1 - 2 * below), self.axis)
        total = (top * (rest / unit)) ** 2 + own + 2 * top**2 * size + (unit * size) ** 2
        return (self.scale * unit * root(total))[..., 0]

    @compiled
    def spectral_norm(self) -> Array:
        """The largest eigenvalue, shape (...), at most s/2; O(K), about 6 passes.

        Where the two largest probabilities differ by a small part δ of themselves, its second derivative loses as many
        digits as 1/δ has; that of `eigvalsh` does not. At δ = 0 both are right, unless a third is as large.
        """
        self._whole("spectral_norm")
        return self.scale[..., 0] * self._spectrum(spectrum.largest_eigenvalue, ())

    @compiled
    def eigvalsh(self) -> Array:
        """All eigenvalues, ascending, shape (..., K); O(K²), with O(K) memory.

        The derivative of an eigenvalue shared by n > 2 classes of equal probability is the mean over its eigenspace:
        symmetric functions of the eigenvalues have the right first derivative; one by one they have no second. Second
        derivatives take O(K³).
        """
        self._whole("eigvalsh")
        return self.scale * self._spectrum(spectrum.eigenvalues, (None,))

    @compiled
    def eigh(self) -> tuple[Array, Array]:
        """Eigenvalues, ascending, and orthonormal eigenvectors as columns, (..., K) and (..., K, K); O(K²).

        The eigenvectors of a multiple eigenvalue are one basis of many; their derivatives have no part in its
        eigenspace. Derivatives take O(K³), and grow with √(λ_k λ_j)/(λ_k - λ_j) between near eigenvalues.
        """
        self._whole("eigh")
        values, vectors = self._spectrum(spectrum.eigenpairs, (None,), (None, None))
        return self.scale * values, vectors

    @property
    def _logs(self) -> Array:
        """log π, which carries the derivative in π of what grows as π vanishes."""
        return logarithm(self.probs, self.logits, self.axis)

    def _spectrum(self, fun: Callable, *axes: tuple) -> Any:
        """fun(π, log π), the results of which have these axes behind the batch's."""
        batch = split_axes_of(self.probs)[:-1]
        return in_auto_mode(lambda x: fun(*x), (self.probs, self._logs), *((*batch, *more) for more in axes))

    @compiled
    def rank(self) -> Array:
        """Number of classes with positive probability, less one; int32, shape (...); O(K)."""
        support = jnp.where((self.probs > 0) & (self.scale != 0), 1, 0)
        return jnp.maximum(classes.sum(support, self.axis) - 1, 0)[..., 0].astype(jnp.int32)

    @compiled
    def null_space(self) -> DiagonalPlusLowRank:
        """The orthogonal projector onto {v : Jv = 0}, as an operator; O(K).

        The null space is spanned by 1 on the support and by every class of probability 0.
        """
        support, number = self._support
        return DiagonalPlusLowRank(jnp.zeros_like(support), support / number, number, None, 1 - support, axis=self.axis)

    # Products.

    @compiled
    def _mv(self, v: Array) -> Array:
        return self.scale * jacobian_product(v, self.probs, self.axis, rounded_one(self.probs, self.axis))

    @compiled
    def _quadratic_form(self, v: Array) -> Array:
        # s Var_π(v): a sum of positive terms
        return (self.scale * classes.sum(self.probs * centred(v, self.probs, self.axis) ** 2, self.axis))[..., 0]

    def pinv_mv(self, v: ArrayLike) -> Array:
        """J⁺v = C D⁻¹ C v on the support, C the centring there; 0 off it; v (..., K); O(K)."""
        operator, v = self._with("v", v)
        return operator._pinv_mv(v)

    @compiled
    def _pinv_mv(self, v: Array) -> Array:
        scale = jnp.where(self.scale == 0, 1, self.scale)
        return quotient(self._centre(over(self._centre(v), self._on_support, self._logs)), scale)

    @property
    def _support(self) -> tuple[Array, Array]:
        """1 on the support and 0 off it, and the number of classes there, at least 1."""
        support = jnp.where((self.probs > 0) & (self.scale != 0), 1, 0).astype(self.dtype)
        return support, jnp.maximum(classes.sum(support, self.axis), 1)

    @property
    def _on_support(self) -> Array:
        """π, with 1 off the support."""
        return jnp.where(self.probs > 0, self.probs, 1)

    def _centre(self, v: Array) -> Array:
        """C v: v less its mean over the support, 0 off it."""
        support, number = self._support
        return support * (v - classes.sum(support * v, self.axis) / number)

    @compiled
    def pseudo_logdet(self) -> Array:
        """Logarithm of the product of the nonzero eigenvalues, log(n Π_support π) + (n - 1) log s; O(K). 0 if J = 0."""
        support, number = self._support
        logs = jnp.log(number) + (number - 1) * log(jnp.where(self.scale == 0, 1, self.scale))
        return (logs + classes.sum(support * self._logs, self.axis))[..., 0]

    # With w = 1/(sπ + λ), a = sπ∘w and m = <a,v>/(λ Σa), (J + λI)⁻¹v = m + w∘(v - λm), where 1 - a = λw. At a constant
    # v nothing is left of the second term; so that no derivative sees more than is left of m, v is measured from its
    # common mean over the classes with sπ > λ, and the weighted mean of the rest is taken from -λw there.

    @compiled
    def _solve(self, v: Array, damping: Array) -> Array:
        d = self.scale * self.probs
        w, a, heavy = quotient(jnp.ones_like(d), d + damping), share(d, damping), d > damping
        head = jnp.where(heavy, 1, 0).astype(d.dtype)
        mean = classes.sum(head * v, self.axis) / jnp.maximum(classes.sum(head, self.axis), 1)
        total = classes.sum(a, self.axis)
        # not a/λ, of which XLA would make sπ/((sπ + λ)λ): λ² leaves float32
        terms = w * jnp.where(heavy, -1, quotient(jnp.where(heavy, 0, d), damping)) * (v - mean)
        rest = quotient(classes.sum(terms, self.axis), jnp.where(total == 0, 1, total))
        return quotient(mean, damping) + w * (v - mean) + a * rest

    @compiled
    def _logdet(self, damping: Array) -> Array:
        # log λ + Σ_{i≠m} log(sπ_i + λ) + log1p(Σ sπ_i (π_m - π_i)/(sπ_i + λ)), m the class of the largest π
        p, d = self.probs, self.scale * self.probs
        # (the same for every constant in the place of π_m, so that only a π_m > 1/2 needs a derivative)
        top, logs = is_top(p), _log_sum(d, damping)
        largest = classes.max(lax.stop_gradient(p), self.axis)
        largest = jnp.where(largest > 0.5, classes.sum(top * p, self.axis), largest)
        one = jnp.where(largest > 0.5, 0.0, _log_sum(self.scale * largest, damping))
        others = classes.sum((1 - top) * logs, self.axis) - one
        spread = classes.sum(quotient(d * (largest - p), d + damping), self.axis)
        return (log(damping) + others + jnp.log1p(spread))[..., 0]

    # Factor and samples: L = √s Pᵀ diag(√π), P = I - 1πᵀ, has L Lᵀ = J.

    @compiled
    def _factor_mv(self, u: Array) -> Array:
        return root(self.scale) * centred_transpose(root(self.probs) * u, self.probs, self.axis)

    @compiled
    def _factor_rmv(self, v: Array) -> Array:
        return root(self.scale) * root(self.probs) * centred(v, self.probs, self.axis)

    def sample_pinv(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws from N(0, J⁺), shape (*shape, ..., K), differentiable in p: C(ξ/√π)/√s; O(K) each."""
        operator, noise = self._with("noise", self._normal(key, shape))
        return operator._centre(noise / root(operator._on_support)) / root(operator.scale)

    def sample_inverse(self, key: Array, damping: ArrayLike, shape: tuple[int, ...] = ()) -> Array:
        """Draws from N(0, (J + damping·I)⁻¹), shape (*shape, ..., K): √w∘ξ + π∘w ξ₀ √(s/(λ Σπ∘w)); O(K) each.

        Differentiable in p and in `damping`, which is as in `solve`.
        """
        noise = self._normal(key, shape, 1)
        damping = self._damping(damping, "sample_pinv", noise.ndim)
        operator, noise = self._with("noise", noise, self.shape[-1] + 1)
        return operator._whiten(noise, damping)

    @compiled
    def _whiten(self, noise: Array, damping: Array) -> Array:
        p, w = self.probs, 1 / (self.scale * self.probs + damping)
        total = classes.sum(p * w, self.axis)
        common = p * w * noise[..., -1:] * root(self.scale / (damping * jnp.where(total == 0, 1, total)))
        return jnp.sqrt(w) * noise[..., :-1] + common


def _log_sum(x: Array, y: Array) -> Array:
    """log(x + y) of non-negative numbers, accurate also where one of the two is small."""
    larger = jnp.maximum(x, y)
    return log(larger) + jnp.log1p(quotient(jnp.minimum(x, y), larger))


def _is_one(alpha: ArrayLike) -> bool:
    return isinstance(alpha, (int, float)) and alpha == 1


def _check_classes(name: str, x: Array) -> None:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have a last axis with at least one class, got shape {x.shape}")


def _check_simplex(p: Array) -> None:
    """Raise unless every slice of p is a distribution or all 0, as far as the values are known."""
    if isinstance(p, Tracer):
        return
    if bool(jnp.any(p < 0)):
        raise ValueError(f"p must not be negative, got {jnp.min(p)}")
    total = np.asarray(jnp.sum(p, -1, dtype=dtypes.compute_dtype(p.dtype)))
    wrong = (np.abs(total - 1) > math.sqrt(jnp.finfo(p.dtype).eps)) & (total != 0)
    if np.any(wrong):
        raise ValueError(f"p must sum to 1 along its last axis, got a sum of {total[wrong].flat[0]}")
