"""What every symmetric operator here shares: shape, products, checked arguments; and the centring of a vector.

Pv = v - <p,v>,    P = I - 1pᵀ:    J = Pᵀ diag(p) P.
"""

from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core.centring import AXIS
from jaxsoftmax._core.plumbing import compiled


class SymmetricOperator:
    """What every operator here can do: products, shape, and what follows from them.

    A subclass is a frozen dataclass of arrays, registered as a pytree, and gives `diagonal`, `as_matrix`, `_batch` and
    the products `_mv`, `_quadratic_form`, `_solve`, `_logdet` for vectors whose batch axes are as many as its own.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, K)."""
        shape = self._reference.shape
        return (*shape, shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype computed in: at least float32."""
        return self._reference.dtype

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

    def quadratic_form(self, v: ArrayLike) -> Array:
        """vᵀ A v for v (..., K); O(K)."""
        operator, v = self._with("v", v)
        return operator._quadratic_form(v)

    @compiled
    def trace(self) -> Array:
        """Sum of the diagonal; O(K)."""
        return jnp.sum(self.diagonal(), AXIS)

    def solve(self, v: ArrayLike, damping: ArrayLike) -> Array:
        """(A + damping·I)⁻¹ v for v (..., K); O(K).

        Args:
          v: right-hand sides (..., K), batch axes broadcast.
          damping: a number, or an array that broadcasts to the batch axes of the operator. Positive; 0 is allowed
            where A itself is regular.

        Raises:
          TypeError: if `v` or `damping` is complex.
          ValueError: if `v` does not fit, or `damping` is negative, or 0 where A is singular.
        """
        operator, v = self._with("v", v)
        return operator._solve(v, self._damping(damping, "pinv_mv", v.ndim))

    def logdet(self, damping: ArrayLike) -> Array:
        """log det(A + damping·I), damping as in `solve`; O(K). NaN where the determinant is negative."""
        return self._logdet(self._damping(damping, "pseudo_logdet", self._reference.ndim))

    # Pieces that subclasses give.

    @property
    def singular(self) -> bool:
        """Whether A is singular whatever its arrays hold."""
        raise NotImplementedError

    @property
    def _reference(self) -> Array:
        """An array of shape (..., K) in the operator's dtype."""
        raise NotImplementedError

    def diagonal(self) -> Array:
        """A_ii, shape (..., K); O(K)."""
        raise NotImplementedError

    def _mv(self, v: Array) -> Array:
        raise NotImplementedError

    def _quadratic_form(self, v: Array) -> Array:
        raise NotImplementedError

    def _solve(self, v: Array, damping: Array) -> Array:
        raise NotImplementedError

    def _logdet(self, damping: Array) -> Array:
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
            np.broadcast_shapes(v.shape[:-1], batch)
        except ValueError:
            raise ValueError(f"{name} has batch axes {v.shape[:-1]}, the operator {batch}: not broadcastable") from None
        v, _ = dtypes.widen(v, self._reference)
        ndim = max(v.ndim, len(batch) + 1)
        operator = jax.tree.map(lambda x: lead(x, ndim - len(batch) - 1), self)
        return operator, lead(v, ndim - v.ndim)

    def _damping(self, damping: ArrayLike, instead: str, ndim: int) -> Array:
        """`damping` in the operator's dtype, with `ndim` axes, the last of length 1."""
        value = checks.as_float("damping", damping)
        if not isinstance(value, Tracer):
            if not np.all(np.asarray(value) >= 0):
                raise ValueError(f"damping must not be negative, got {damping}")
            if self.singular and not np.all(np.asarray(value) > 0):
                raise ValueError(f"damping must be positive, got {damping}: the operator is singular; see {instead}")
        batch = self._reference.shape[:-1]
        checks.broadcast("damping", value, batch)
        return lead(value.astype(self.dtype)[..., None], max(ndim, len(batch) + 1) - value.ndim - 1)


def lead(x: Array, axes: int) -> Array:
    """`x` with so many axes of length 1 in front."""
    return x.reshape((1,) * axes + x.shape)
