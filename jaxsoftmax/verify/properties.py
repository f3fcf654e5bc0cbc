"""The properties of the Jacobian of softmax and α-entmax, measured on given logits and reported as a table.

docs/mathematics.md, sections 1 to 3, has the proofs.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax.maps.entmax import entmax
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian
from jaxsoftmax.verify.table import table

__all__ = ["JacobianReport", "Property", "largest_eigenvalue_bound", "verify_jacobian_properties"]


@dataclasses.dataclass(frozen=True)
class Property:
    """One line of the report: what should hold, what was measured, and within which bound it holds.

    Example:
      >>> from jaxsoftmax.verify import Property
      >>> Property("row sums", "J 1 = 0", measured=1e-8, bound=1e-6).holds
      True
    """

    name: str
    statement: str
    measured: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether what was measured is within the bound."""
        return bool(self.measured <= self.bound)


@dataclasses.dataclass(frozen=True)
class JacobianReport:
    """What `verify_jacobian_properties` found.

    Attributes:
      alpha: 1 for softmax, else the α of the entmax map.
      probs: the map's value, (..., K).
      eigenvalues: of the Jacobian, descending, (..., K).
      properties: one `Property` per line of the table; over a batch, the worst case.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> [p.name for p in jaxsoftmax.verify_jacobian_properties(jnp.zeros(2)).properties][:3]
      ['symmetry', 'row sums', 'column sums']
    """

    alpha: float
    probs: np.ndarray
    eigenvalues: np.ndarray
    properties: tuple[Property, ...]

    @property
    def ok(self) -> bool:
        """Whether every property holds."""
        return all(p.holds for p in self.properties)

    def __str__(self) -> str:
        name = "softmax" if self.alpha == 1 else f"{self.alpha:g}-entmax"
        rows = [
            (p.name, p.statement, f"{p.measured:.3g}", f"{p.bound:.3g}", "ok" if p.holds else "FAILS")
            for p in self.properties
        ]
        lines = table(("property", "statement", "measured", "at most", ""), rows)
        shown = np.array2string(np.asarray(self.eigenvalues, np.float64), precision=6, threshold=32)
        head = f"Jacobian of {name} at {self.probs.shape[-1]} classes"
        note = "1/4 bounds the diagonal entries of softmax's Jacobian, not its eigenvalues, which reach 1/2."
        return "\n".join([head, f"eigenvalues: {shown}", "", *lines, "", note])


def verify_jacobian_properties(x: ArrayLike, *, alpha: float = 1.0, step: float = 0.05) -> JacobianReport:
    """Measure the properties of J = ∂p/∂x at the logits x: symmetry, sums, spectrum, linear approximation, autodiff.

    The largest eigenvalue of softmax's J is at most 1/2, reached at p = (1/2, 1/2): λ₁ ≤ 2 max p(1-p) ≤ 1/2. The bound
    1/4 sometimes stated holds for the diagonal entries p(1-p), not for the eigenvalues. For α-entmax the bound is
    `largest_eigenvalue_bound`, infinite for α > 2, where λ₁ ≤ max q, q = p^(2-α), is what remains.

    Args:
      x: real, finite logits (..., K); over a batch the worst example counts.
      alpha: 1 for softmax, more for α-entmax.
      step: length of the displacement Δ in f(x+Δ) ≈ f(x) + JΔ; less where the support would change on the way.

    Returns:
      A `JacobianReport`: `.ok`, the figures in `.properties`, and a table as `str()`.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> report = jaxsoftmax.verify_jacobian_properties(jnp.array([2.0, 1.0, 0.5, -0.5]))
      >>> report.ok
      True

    Reference: docs/mathematics.md, sections 1 to 3.
    """
    x = checks.as_float("x", x)
    checks.axis_index(-1, x.ndim, "the class axis of x")
    if x.size == 0:
        raise ValueError(f"x must have at least one class and one example, got shape {x.shape}")
    checks.number("alpha", alpha, 1.0)
    checks.number("step", step, 0.0)
    return _report(dtypes.widen(x)[0], float(alpha), step)


def _report(x: jax.Array, alpha: float, step: float) -> JacobianReport:
    """With q = p^(2-α), which is p for softmax: J = diag(q) - qqᵀ/Σq."""
    f = lambda x: entmax(x, alpha)
    operator = SoftmaxJacobian.from_probs(f(x), alpha=alpha)
    probs, J, eigenvalues = map(_doubles, (f(x), operator.as_matrix(), operator.eigvalsh()))
    eigenvalues = np.sort(eigenvalues, -1)[..., ::-1]
    q = _power(probs, 2 - alpha)
    eps = float(jnp.finfo(x.dtype).eps)
    tolerance = 8 * eps * max(1.0, float(q.sum(-1).max()))
    step = min(step, _to_the_next_kink(_doubles(x), probs, alpha) / 4)
    properties = (
        *_algebra(operator, J, probs, q, tolerance, eps),
        *_spectrum(eigenvalues, J, q, largest_eigenvalue_bound(alpha, x.shape[-1]), tolerance, eps),
        *_linear_approximation(f, operator, x, step, abs(2 - alpha) * _power(probs, 3 - 2 * alpha)),
        Property("jacfwd", "J = jacfwd(f)(x)", _worst(J - _batched(jax.jacfwd(f), x)), tolerance),
        Property("jacrev", "J = jacrev(f)(x)", _worst(J - _batched(jax.jacrev(f), x)), tolerance),
    )
    return JacobianReport(alpha, probs, eigenvalues, properties)


def _algebra(operator, J, probs, q, tolerance, eps) -> list[Property]:
    """What can be seen of the entries of J."""
    total, diagonal = q.sum(-1, keepdims=True), np.diagonal(J, axis1=-2, axis2=-1)
    of_ones = operator.mv(jnp.ones(probs.shape, operator.dtype))
    rank, support = _doubles(operator.rank()), (probs > 0).sum(-1)
    return [
        Property("symmetry", "J = Jᵀ", _worst(J - np.swapaxes(J, -1, -2)), 0.0),
        Property("row sums", "J 1 = 0", _worst(J.sum(-1)), tolerance),
        Property("column sums", "1ᵀ J = 0", _worst(J.sum(-2)), tolerance),
        Property("null vector", "1 is mapped to 0", _worst(of_ones), tolerance),
        Property("rank", "rank J = |support| - 1", _worst(rank - (support - 1)), 0.0),
        Property("diagonal", "J_ii = q_i (1 - q_i / Σq)", _worst(diagonal - q * (1 - q / total)), tolerance),
        Property("diagonal bound", "J_ii ≤ Σq / 4", _worst(diagonal / total), 0.25 + eps),
    ]


def _spectrum(eigenvalues, J, q, bound, tolerance, eps) -> list[Property]:
    """What holds of the eigenvalues, λ₁ ≥ λ₂ ≥ …; `bound` holds of λ₁ for every p, max q for this one."""
    by_lapack = np.linalg.eigvalsh(J)[..., ::-1]
    high, low = np.sort(q, -1)[..., ::-1][..., :-1], np.sort(q, -1)[..., ::-1][..., 1:]
    of_pair, after = eigenvalues[..., :-1], eigenvalues[..., 1:]
    between = max(_excess(of_pair - high), _excess(low - of_pair), _excess(after - of_pair))
    largest = min(bound, float(q.max())) * (1 + 8 * eps)
    return [
        Property("positive semidefinite", "-min λ ≤ 0", -float(by_lapack.min(initial=0.0)), tolerance),
        Property("largest eigenvalue", "λ₁ ≤ Λ(α, K) and max q", float(eigenvalues.max()), largest),
        Property("spectrum", "λ as LAPACK finds them", _worst(eigenvalues - by_lapack), tolerance),
        Property("interlacing", "q₍ᵢ₎ ≥ λᵢ ≥ q₍ᵢ₊₁₎", between, tolerance),
    ]


def _linear_approximation(f, operator, x, step: float, bend: np.ndarray) -> list[Property]:
    """The error at |Δ| = step, of the size of D²p, and the order of error ∝ |Δ|^order, 2 where it is mere rounding."""
    direction = jnp.broadcast_to(jnp.cos(1.0 + jnp.arange(x.shape[-1], dtype=x.dtype)), x.shape)
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    errors = [_worst(f(x + h * direction) - f(x) - operator.mv(h * direction)) for h in (step, step / 2)]
    rounding = 32 * float(jnp.finfo(x.dtype).eps)
    order = 2.0 if errors[1] <= rounding else float(np.log2(errors[0] / errors[1]))
    statement, largest = f"f(x+Δ) ≈ f(x) + JΔ, |Δ| = {step:.2g}", step**2 * max(1.0, 4 * float(bend.max()))
    return [
        Property("linear approximation", statement, errors[0], largest),
        Property("its order", "|order - 2| of that error", abs(order - 2), 0.25),
    ]


def largest_eigenvalue_bound(alpha: float, num_classes: int) -> float:
    """Λ(α, K), the largest eigenvalue that the Jacobian of α-entmax can have: the Lipschitz constant of the map in ℓ₂.

    For 1 ≤ α ≤ 2: Λ = max(2^(α-2), K/(K-1) (1 + ρ)^-(3-α)), ρ = (K-1)^(-(α-1)/(3-α)). It is 1/2 for softmax and 1 for
    sparsemax, whatever K is, and reached.

    Args:
      alpha: at least 1.
      num_classes: K, at least 1.

    Returns:
      The bound; 0 for one class, inf for α > 2.

    Example:
      >>> from jaxsoftmax.verify import largest_eigenvalue_bound
      >>> largest_eigenvalue_bound(1.0, 10), largest_eigenvalue_bound(2.0, 10)
      (0.5, 1.0)

    Reference: docs/mathematics.md, section 3.3, has the proof.
    """
    checks.number("alpha", alpha, 1.0)
    checks.at_least("num_classes", num_classes, 1)
    if num_classes == 1:
        return 0.0
    if alpha > 2:
        return math.inf
    rest = num_classes - 1
    ratio = rest ** (-(alpha - 1) / (3 - alpha))
    return max(2.0 ** (alpha - 2), num_classes / rest * (1 + ratio) ** (alpha - 3))


def _doubles(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def _power(probs: np.ndarray, exponent: float) -> np.ndarray:
    """p^exponent on the support, 0 outside."""
    return np.where(probs > 0, np.where(probs > 0, probs, 1.0) ** exponent, 0.0)


def _worst(x) -> float:
    return float(np.max(np.abs(_doubles(x)), initial=0.0))


def _excess(x) -> float:
    return float(np.max(x, initial=0.0))


def _batched(jacobian, x) -> np.ndarray:
    for _ in range(x.ndim - 1):
        jacobian = jax.vmap(jacobian)
    return _doubles(jax.jit(jacobian)(x))


def _to_the_next_kink(x: np.ndarray, probs: np.ndarray, alpha: float) -> float:
    """The least |x_i - τ/(α-1)|: how far the nearest logit is from entering the support or leaving it."""
    if alpha == 1:
        return math.inf
    top = np.argmax(x, -1, keepdims=True)
    at_top = np.take_along_axis(probs, top, -1) ** (alpha - 1) / (alpha - 1)
    return float(np.min(abs(x - np.take_along_axis(x, top, -1) + at_top)))
