"""Matrix differential calculus: the Frobenius product, layouts of derivatives, differentials, a table of identities.

    A:B = tr(AᵀB) = Σ_ij A_ij B_ij,    df = ∂f/∂X dX,    dl = G:dX  =>  ∂l/∂X = Gᵀ in numerator layout.

The differential of a scalar l, once brought to the form G:dX, shows its derivative: G is what `jax.grad` returns, of
the shape of X (denominator layout). `python -m jaxsoftmax.matrix_calculus` prints the identities of the table with
the error of each, measured in float64 at a random point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes


def frobenius(A: ArrayLike, B: ArrayLike) -> Array:
    """Frobenius product of matrices, the dot product of vectors: A:B = tr(AᵀB) = Σ_ij A_ij B_ij.

    A:B = B:A = Bᵀ:Aᵀ,    AB:C = A:CBᵀ = B:AᵀC,    a:b = aᵀb.

    Args:
      A: real matrices (..., m, n), a vector (n,), or a scalar. Integers are promoted as in `jax.nn`.
      B: the same; a matrix's leading axes broadcast against those of `A`, its last two are equal to them.

    Returns:
      The products, of the shape of the broadcast leading axes, in the common floating dtype; a scalar for vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.matrix_calculus import frobenius
      >>> A, B = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.ones((2, 3))
      >>> print(frobenius(A, B), jnp.trace(A.T @ B))
      21.0 21.0

    Reference: London 2024, Matrix differential calculus (for deep learning); docs/mathematics.md, section 7.
    """
    A, B = checks.as_float("A", A), checks.as_float("B", B)
    rank = min(max(A.ndim, B.ndim), 2)  # the axes of one matrix or vector
    if min(A.ndim, B.ndim) < rank or A.shape[A.ndim - rank :] != B.shape[B.ndim - rank :]:
        raise ValueError(f"A:B needs matrices, or vectors, of one shape: A has {A.shape}, B has {B.shape}")
    shape = checks.common_shape("A", A, "B", B)
    dtype = dtypes.common_dtype(A, B)
    A, B = (jnp.broadcast_to(x, shape) for x in dtypes.widen(A, B))
    return jnp.sum(A * B, range(len(shape) - rank, len(shape))).astype(dtype)


def numerator_layout(derivatives: Any, out_ndim: int = 0) -> Any:
    """Derivatives as JAX returns them, in numerator layout: (∂l/∂W)_ji = ∂l/∂W_ij, of the shape of Wᵀ.

    JAX puts the axes of Y before those of X: ∂Y/∂X has shape Y.shape + X.shape. Numerator layout transposes X,
    Y.shape + X.shape[::-1], so that dl = tr(∂l/∂W dW) and dy = ∂y/∂x dx; a vector's gradient, an array (n,), is the row
    of the text as it stands. Where X is a matrix the chain rule then reads as the text has it:
    ∂l/∂W_n = a_{n-1} ∂l/∂z_n.

    Args:
      derivatives: pytree of arrays, from `jax.grad` (or `network.backprop`), `jax.jacrev` or `jax.jacfwd`.
      out_ndim: number of leading axes that belong to Y: 0 for gradients of a scalar, 1 for Jacobians of a vector and
        for per-example gradients.

    Returns:
      The pytree with the axes after the first `out_ndim` of each leaf in reverse order. Doing it twice does nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.matrix_calculus import numerator_layout
      >>> params = {"W": jnp.ones((2, 3)), "b": jnp.ones(2)}
      >>> grads = jax.grad(lambda p: jnp.sum(p["W"] @ jnp.arange(3.0) + p["b"]))(params)
      >>> print(jax.tree.map(jnp.shape, numerator_layout(grads)))
      {'W': (3, 2), 'b': (2,)}

    Reference: docs/mathematics.md, section 7.2; https://en.wikipedia.org/wiki/Matrix_calculus#Layout_conventions
    """
    out_ndim = checks.at_least("out_ndim", out_ndim, 0)

    def convert(leaf):
        leaf = checks.as_array("derivatives", leaf)
        if leaf.ndim < out_ndim:
            raise ValueError(f"derivatives: with out_ndim={out_ndim} every leaf needs as many axes, got {leaf.shape}")
        return jnp.transpose(leaf, (*range(out_ndim), *range(out_ndim, leaf.ndim)[::-1]))

    return jax.tree.map(convert, derivatives)


def denominator_layout(derivatives: Any) -> Any:
    """Derivatives in numerator layout, in denominator layout: the transpose, every axis in reverse order.

    ∂Y/∂X goes from Y.shape + X.shape[::-1] to X.shape + Y.shape[::-1]; for a gradient that is X.shape, as in JAX.

    Args:
      derivatives: pytree of arrays in numerator layout, as from `numerator_layout`. (Jacobians of vectors by vectors
        are so when they come from `jax.jacrev` or `jax.jacfwd`.)

    Returns:
      The pytree with each leaf transposed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.matrix_calculus import denominator_layout, numerator_layout
      >>> gradient = jax.grad(lambda W: jnp.sum(W @ jnp.arange(3.0)))(jnp.ones((2, 3)))
      >>> print(gradient.shape, numerator_layout(gradient).shape, denominator_layout(numerator_layout(gradient)).shape)
      (2, 3) (3, 2) (2, 3)

    Reference: https://en.wikipedia.org/wiki/Matrix_calculus#Layout_conventions
    """
    return jax.tree.map(lambda leaf: jnp.transpose(checks.as_array("derivatives", leaf)), derivatives)


def differential(f: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """The differential of f: df(X; dX) = lim (f(X + t dX) - f(X))/t, the part of the change that is linear in dX.

    Args:
      f: differentiable function of one pytree of arrays. For several arguments let X be a tuple of them.

    Returns:
      The function df(X, dX), with dX shaped like X; its value is shaped like f(X). dX is converted to X's dtypes, and
      integer X as `jax.nn` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.matrix_calculus import differential, frobenius
      >>> A, dA = jnp.array([[2.0, 1.0], [0.0, 4.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> d_logdet = differential(lambda A: jnp.linalg.slogdet(A)[1])
      >>> print(d_logdet(A, dA), frobenius(jnp.linalg.inv(A).T, dA))
      1.125 1.125

    Reference: Magnus and Neudecker, Matrix Differential Calculus, chapter 5; `jax.jvp`.
    """
    checks.function("f", f)

    def df(X: Any, dX: Any) -> Any:
        X = jax.tree.map(lambda x: checks.as_float("X", x), X)
        if jax.tree.structure(X) != jax.tree.structure(dX):
            raise TypeError(f"dX must have X's structure {jax.tree.structure(X)}, got {jax.tree.structure(dX)}")
        return jax.jvp(f, (X,), (jax.tree.map(_direction, X, dX),))[1]

    return df


def _direction(x: Array, dx: ArrayLike) -> Array:
    dx = checks.as_float("dX", dx)
    checks.same_shape("dX", dx, "X", x.shape)
    return dx.astype(x.dtype)
