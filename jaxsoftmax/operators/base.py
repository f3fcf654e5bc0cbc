"""What every symmetric operator here shares: shape, products, algebra, checked arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from operator import add
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import AXIS
from jaxsoftmax._core.tracing import compiled


def names_and_types(record: Any) -> str:
    """The class of a dataclass and its fields, arrays by dtype and shape alone."""

    def short(value):
        shaped = hasattr(value, "shape") and hasattr(value, "dtype")
        return f"{value.dtype}{list(value.shape)}" if shaped else repr(value)

    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    told = {name: x for name, x in fields.items() if not (x is None or callable(x) or name == "axis" and x == AXIS)}
    return f"{type(record).__name__}({', '.join(f'{name}={short(x)}' for name, x in told.items())})"


class SymmetricOperator:
    """What every operator here can do: products, shape, and what follows from them.

    A subclass is a frozen dataclass of arrays, registered as a pytree; it gives the pieces that raise
    NotImplementedError below, for vectors whose batch axes are as many as its own.
    """

    __array_ufunc__ = None  # `numpy_array @ A` asks A, as `jax_array @ A` does

    likelihood: Any  # the model whose Fisher matrix this is (`jaxsoftmax.losses.likelihood`), or None
    axis: classes.ClassAxis

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, K)."""
        shape = self._reference.shape
        return (*shape, shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype computed in: at least float32."""
        return self._reference.dtype

    def __repr__(self) -> str:
        return names_and_types(self)

    def __getitem__(self, index: Any) -> Self:
        """The operators of a batch at an index of its batch axes: `A[40]`, `A[:, 2]`, `A[mask]`."""
        batch, index = self.shape[:-2], index if isinstance(index, tuple) else (index,)
        if not any(isinstance(i, Tracer) for i in jax.tree.leaves(index)):
            try:
                np.broadcast_to(0, batch)[tuple(np.asarray(i) if isinstance(i, Array) else i for i in index)]
            except IndexError as error:
                raise IndexError(f"index {index} of an operator with batch axes {batch}: {error}") from None
        jax.eval_shape(lambda x: x[index], jax.ShapeDtypeStruct(batch, self.dtype))  # names what is wrong
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, x.shape[-1]))[(*index, slice(None))], self)

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(*self.shape[:-2][:1])) if self.shape[:-2] else iter(())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The dense matrix as a NumPy array, made anew."""
        if copy is False:
            raise ValueError("copy=False cannot be had of an operator, whose matrix is made when it is asked for")
        return np.asarray(self.as_matrix(), dtype)

    @property
    def T(self) -> Self:
        """The transpose: the operator itself."""
        return self

    def mv(self, v: ArrayLike) -> Array:
        """A v for v (..., K), batch axes broadcast; O(K)."""
        operator, v = self._with("v", v)
        return operator._mv(v)

    def __call__(self, v: ArrayLike) -> Array:
        """A v, so that the operator is a linear map as it stands: `jax.scipy.sparse.linalg.cg(A, b)`."""
        return self.mv(v)

    def __matmul__(self, x: ArrayLike) -> Array:
        """A x for a vector x (K,) or matrices x (..., K, N); O(K) per column."""
        if isinstance(x, SymmetricOperator):
            raise TypeError("A @ B of two operators need not be symmetric: apply them in turn, A @ (B @ x)")
        x = checks.as_float("the right factor of @", x)
        if x.ndim < 2:
            return self.mv(x)
        if x.shape[-2] != self.shape[-1]:
            raise ValueError(f"the right factor of @ must have {self.shape[-1]} rows, got shape {x.shape}")
        return jax.vmap(self.mv, in_axes=-1, out_axes=-1)(x)

    def __rmatmul__(self, x: ArrayLike) -> Array:
        """x A for a vector x (K,) or matrices x (..., N, K); O(K) per row."""
        x = checks.as_float("the left factor of @", x)
        return self.mv(x) if x.ndim < 2 else jnp.swapaxes(self @ jnp.swapaxes(x, -1, -2), -1, -2)

    # Algebra.

    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        """A + B; with a closed form for `solve` and the rest where one of the two is diagonal."""
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        if self.shape != other.shape or self.axis != other.axis:
            raise ValueError(f"operators must have one shape to be added, got {self.shape} and {other.shape}")
        for one, diagonal in ((self, other._only_diagonal()), (other, self._only_diagonal())):
            total = None if diagonal is None else one._plus_diagonal(diagonal.astype(one.dtype))
            if total is not None:
                return total
        return SumOfOperators((self, other))

    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator:
        return self + -other if isinstance(other, SymmetricOperator) else NotImplemented

    def __mul__(self, factor: ArrayLike) -> SymmetricOperator:
        """c A for a number, or an array that broadcasts to the batch axes."""
        return NotImplemented if isinstance(factor, SymmetricOperator) else self._times(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: ArrayLike) -> SymmetricOperator:
        return NotImplemented if isinstance(divisor, SymmetricOperator) else self._times(1 / jnp.asarray(divisor))

    def __neg__(self) -> SymmetricOperator:
        return self._times(-1.0)

    def _times(self, factor: ArrayLike) -> SymmetricOperator:
        return self.scaled(factor)

    def _only_diagonal(self) -> Array | None:
        """The diagonal, of an operator that is nothing else."""
        return None

    def _plus_diagonal(self, e: Array) -> SymmetricOperator | None:
        """A + diag(e), where that has a closed form."""
        return None

    def quadratic_form(self, v: ArrayLike) -> Array:
        """vᵀ A v for v (..., K); O(K)."""
        operator, v = self._with("v", v)
        return operator._quadratic_form(v)

    @compiled
    def trace(self) -> Array:
        """Sum of the diagonal; O(K)."""
        return classes.sum(self.diagonal(), self.axis)[..., 0]

    def solve(self, v: ArrayLike, damping: ArrayLike) -> Array:
        """(A + damping·I)⁻¹ v for v (..., K); O(K).

        Args:
          v: right-hand sides (..., K), batch axes broadcast.
          damping: a number, or an array that broadcasts to the batch axes of the operator. Positive; 0 is allowed
            where A itself is regular.

        Raises:
          ValueError: if `damping` is 0 where A is singular.
        """
        operator, v = self._with("v", v)
        return operator._solve(v, self._damping(damping, "pinv_mv", v.ndim))

    def logdet(self, damping: ArrayLike) -> Array:
        """log det(A + damping·I), damping as in `solve`; O(K). NaN where the determinant is negative."""
        return self._logdet(self._damping(damping, "pseudo_logdet", self._reference.ndim))

    def factor_mv(self, u: ArrayLike) -> Array:
        """L u, where L Lᵀ = A, for u (..., n): n = K, or K + 1 for a z-loss; O(K). NaN where `is_psd` does not hold.

        Raises:
          TypeError: for the Hessian of capped logits, which has no factor in closed form.
        """
        operator, u = self._with("u", u, self._factor_width)
        return operator._factor_mv(u)

    def factor_rmv(self, v: ArrayLike) -> Array:
        """Lᵀ v for v (..., K), for the L of `factor_mv`; O(K)."""
        operator, v = self._with("v", v)
        operator._factor_width  # noqa: B018  (raises where there is no factor)
        return operator._factor_rmv(v)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws from N(0, A), shape (*shape, ..., K), differentiable in A: L ξ; O(K) each. Errors as in `factor_mv`."""
        return self.factor_mv(self._normal(key, shape, self._factor_width - self.shape[-1]))

    def sample_targets(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Targets drawn from the model, as the loss takes them, with `shape` in front of their shape.

        Raises:
          TypeError: if the operator is not the Fisher matrix of a likelihood, as from `logits_fisher`.
        """
        key, shape, model = checks.key("key", key), checks.sizes("shape", shape), self._model("sample_targets")
        return model.draw(key, model.logits, shape)

    def sample_scores(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Gradients g of -log p at targets drawn from the model, (*shape, ..., K), times √weight: E[g gᵀ] = A.

        Raises:
          TypeError: as `sample_targets`.
        """
        key, shape, model = checks.key("key", key), checks.sizes("shape", shape), self._model("sample_scores")
        logits = jnp.broadcast_to(model.logits, shape + model.logits.shape)
        return lead(jnp.sqrt(model.weight), len(shape)) * model.score(logits, model.draw(key, model.logits, shape))

    def _model(self, method: str) -> Any:
        if self.likelihood is None:
            raise TypeError(f"{method} needs the Fisher matrix of a likelihood: see logits_fisher")
        self._whole(method)
        return self.likelihood

    # Pieces that subclasses give.

    @property
    def singular(self) -> bool:
        """Whether A is singular whatever its arrays hold."""
        raise NotImplementedError

    @property
    def _reference(self) -> Array:
        """An array of shape (..., K) in the operator's dtype."""
        raise NotImplementedError

    @property
    def _factor_width(self) -> int:
        """Columns of L."""
        return self.shape[-1]

    def diagonal(self) -> Array:
        """A_ii, shape (..., K); O(K)."""
        raise NotImplementedError

    def as_matrix(self) -> Array:
        """The dense matrix, shape (..., K, K); O(K²)."""
        raise NotImplementedError

    def frobenius_norm(self) -> Array:
        """√(Σ A_ij²), shape (...); O(K)."""
        raise NotImplementedError

    def is_psd(self) -> Array:
        """Whether A is positive semidefinite, up to rounding, shape (...); O(K)."""
        raise NotImplementedError

    def scaled(self, weight: ArrayLike) -> Self:
        """weight · A, for a number or an array that broadcasts to the batch axes."""
        raise NotImplementedError

    def transformed(self, slope: Array, extra: Array | None = None) -> SymmetricOperator:
        """diag(slope) A diag(slope) + diag(extra): a Hessian at logits x(z), seen from z.

        Args:
          slope: ∂x/∂z, element by element, (..., K).
          extra: ∂L/∂x ∂²x/∂z², (..., K), or None for a Gauss-Newton or Fisher operator.
        """
        raise NotImplementedError

    def _mv(self, v: Array) -> Array:
        raise NotImplementedError

    def _quadratic_form(self, v: Array) -> Array:
        raise NotImplementedError

    def _solve(self, v: Array, damping: Array) -> Array:
        raise NotImplementedError

    def _logdet(self, damping: Array) -> Array:
        raise NotImplementedError

    def _factor_mv(self, u: Array) -> Array:
        raise NotImplementedError

    def _factor_rmv(self, v: Array) -> Array:
        raise NotImplementedError

    # Arguments.

    def _with(self, name: str, v: ArrayLike, size: int | None = None) -> tuple[Self, Array]:
        """The operator and the vector(s), widened, with equally many batch axes."""
        v = checks.as_float(name, v)
        size = self.shape[-1] if size is None else size
        if v.ndim == 0 or v.shape[-1] != size:
            raise ValueError(f"{name} must have {size} entries along its last axis, got shape {v.shape}")
        batch = self._reference.shape[:-1]
        try:
            jnp.broadcast_shapes(v.shape[:-1], batch)
        except ValueError:
            raise ValueError(f"{name} has batch axes {v.shape[:-1]}, the operator {batch}: not broadcastable") from None
        v, _ = dtypes.widen(v, self._reference)
        ndim = max(v.ndim, len(batch) + 1)
        operator = jax.tree.map(lambda x: lead(x, ndim - len(batch) - 1), self)
        return operator, lead(v, ndim - v.ndim)

    def _damping(self, damping: ArrayLike, instead: str, ndim: int) -> Array:
        """`damping` in the operator's dtype, with `ndim` axes, the last of length 1."""
        value = checks.within("damping", checks.as_float("damping", damping), 0.0)
        if self.singular and not isinstance(value, Tracer) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"damping must be positive, got {damping}: the operator is singular; see {instead}")
        batch = self._reference.shape[:-1]
        checks.broadcast("damping", value, batch)
        return lead(value.astype(self.dtype)[..., None], max(ndim, len(batch) + 1) - value.ndim - 1)

    def _weight(self, weight: ArrayLike) -> Array:
        """`weight` in the operator's dtype, with an axis of length 1 for the classes."""
        weight = checks.broadcast("weight", checks.as_float("weight", weight), self.shape[:-2])
        return weight.astype(self.dtype)[..., None]

    def _normal(self, key: Array, shape: tuple[int, ...], extra: int = 0) -> Array:
        """Standard normal numbers (*shape, ..., K + extra); the extra ones are the same on every device."""
        key, shape = checks.key("key", key), checks.sizes("shape", shape)
        batch, size = (*shape, *self.shape[:-2]), self.shape[-1]
        if not self.axis.mesh_axes:
            return jax.random.normal(key, (*batch, size + extra), self.dtype)
        own, shared = jax.random.split(key)
        own = jax.random.fold_in(own, lax.axis_index(self.axis.mesh_axes))
        draws = (jax.random.normal(k, (*batch, n), self.dtype) for k, n in ((own, size), (shared, extra)))
        return jnp.concatenate(list(draws), -1)

    def _whole(self, method: str) -> None:
        """Raise where the classes are split."""
        checks.all_classes(method, self.axis.mesh_axes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["terms"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SumOfOperators(SymmetricOperator):
    """A + B of operators of one shape: products, diagonal and dense form are sums; it has no inverse in closed form."""

    terms: tuple[SymmetricOperator, ...]

    likelihood = None

    @property
    def singular(self) -> bool:
        return False

    @property
    def axis(self) -> classes.ClassAxis:  # pyright: ignore[reportIncompatibleVariableOverride]  (read only, as all are)
        return self.terms[0].axis

    @property
    def _reference(self) -> Array:
        return self.terms[0]._reference

    def _total(self, of: Callable[[SymmetricOperator], Array]) -> Array:
        return functools.reduce(add, map(of, self.terms))

    def diagonal(self) -> Array:
        return self._total(lambda a: a.diagonal())

    def as_matrix(self) -> Array:
        return self._total(lambda a: a.as_matrix())

    def scaled(self, weight: ArrayLike) -> Self:
        return dataclasses.replace(self, terms=tuple(a._times(weight) for a in self.terms))

    def transformed(self, slope: Array, extra: Array | None = None) -> SumOfOperators:
        first, *others = self.terms
        return SumOfOperators((first.transformed(slope, extra), *(a.transformed(slope) for a in others)))

    def _plus_diagonal(self, e: Array) -> SymmetricOperator | None:
        first, *others = self.terms
        first = first._plus_diagonal(e)
        return first and SumOfOperators((first, *others))

    def _mv(self, v: Array) -> Array:
        return self._total(lambda a: a._mv(v))

    def _quadratic_form(self, v: Array) -> Array:
        return self._total(lambda a: a._quadratic_form(v))

    def _no_closed_form(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "the sum of two operators that are not diagonal has products only: no inverse, determinant, norm or factor "
            "in closed form; solve with jax.scipy.sparse.linalg.cg"
        )

    _solve = _logdet = frobenius_norm = is_psd = _no_closed_form
    _factor_width = property(_no_closed_form)


def lead(x: Array, axes: int) -> Array:
    """`x` with so many axes of length 1 in front."""
    return x.reshape((1,) * axes + x.shape)
