"""Krylov methods that orthogonalize in full: Lanczos, and the extreme singular values of a Jacobian."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import checks
from jaxsoftmax.curvature.vectors import ldexp, scale_of, scaled


def lanczos(A: Callable[[Array], Array], start: Array, key: Array, num_steps: int) -> tuple[Array, Array]:
    """(T, basis): basis @ A @ basis.T is the tridiagonal T, up to 0s where a block ends; each row is orthogonal to all
    before it, so that no eigenvalue is found again, and every eigenvalue as often as it is there."""

    def step(state, at):
        (basis, v), (i, key) = state, at
        basis, Av = basis.at[i].set(v), A(v)
        size, following = beyond(basis, Av, key)
        return (basis, following), (v @ Av, size)

    basis = jnp.zeros((num_steps, start.size), start.dtype)
    steps = jnp.arange(num_steps), jax.random.split(key, num_steps)
    (basis, _), (diagonal, beside) = lax.scan(step, (basis, unit(start)), steps)
    return jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1), basis


def extreme_singular_values(
    f: Callable[[Array], Array], x: Array, key: Array, num_steps: int | None = None
) -> tuple[Array, Array]:
    """Largest and smallest singular value of J = ∂f/∂x at x, by Golub-Kahan bidiagonalization.

    J V = U B, with B bidiagonal: no JᵀJ is formed, so small singular values keep their digits.

    Args:
      f: differentiable function of a vector (n,) to a vector (m,).
      x: the point, (n,).
      key: a PRNG key, for the first vector.
      num_steps: number of products with J and with Jᵀ, and of vectors kept; None for min(m, n), which is exact. With
        fewer, the largest singular value is bounded from below and the smallest from above.

    Returns:
      The largest and the min(m, n)-th singular value, two scalars.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.curvature.krylov import extreme_singular_values
      >>> largest, smallest = extreme_singular_values(lambda x: x**2, jnp.array([1.0, 2.0, 0.5]), jax.random.key(0))
      >>> print(largest.round(4), smallest.round(4))
      4.0 1.0

    Reference: Golub and Van Loan 2013, Matrix Computations, section 10.4.
    """
    checks.function("f", f)
    x, key = checks.as_float("x", x), checks.key("key", key)
    if x.ndim != 1:
        raise ValueError(f"x must be a vector (n,), got shape {x.shape}")
    if num_steps is not None:
        checks.at_least("num_steps", num_steps, 1)
    y, push = jax.linearize(f, x)
    if jnp.ndim(y) != 1:
        raise ValueError(f"f must map a vector to a vector, got shapes {x.shape} -> {jnp.shape(y)}")
    pull = lambda u: jax.linear_transpose(push, x)(u)[0]
    sides = (x.size, push), (y.size, pull)
    (n, A), (m, At) = sides if x.size <= y.size else sides[::-1]
    steps = n if num_steps is None else min(num_steps, n)

    def step(state, at):
        (U, V, v), (i, keys) = state, at
        V = V.at[i].set(v)
        size, u = beyond(U, A(v), keys[0])
        next_size, v = beyond(V, At(u), keys[1])
        return (U.at[i].set(u), V, v), (size, next_size)

    start_key, key = jax.random.split(key)
    start = unit(jax.random.normal(start_key, (n,), x.dtype))
    e = scale_of(A, start)
    A, At = scaled(A, e, x), scaled(At, e, x)
    state = jnp.zeros((steps, m), x.dtype), jnp.zeros((steps, n), x.dtype), start
    _, (diagonal, above) = lax.scan(step, state, (jnp.arange(steps), jax.random.split(key, (steps, 2))))
    values = jnp.linalg.svd(jnp.diag(diagonal) + jnp.diag(above[:-1], 1), compute_uv=False)
    return ldexp(values[0], e), ldexp(values[-1], e)


def beyond(basis: Array, v: Array, key: Array) -> tuple[Array, Array]:
    """Norm and direction of the part of v outside the span of the orthonormal rows of `basis`.

    Where none is left but rounding, 0 and a random direction outside: a Krylov method goes on in another block.
    """

    def orthogonal(v):
        for _ in range(2):  # once leaves the rounding of what it takes away
            v = v - (basis @ v) @ basis
        return v

    rest = orthogonal(v)
    size = jnp.linalg.norm(rest)
    exhausted = size <= 16 * jnp.finfo(v.dtype).eps * jnp.linalg.norm(v)
    rest = orthogonal(jnp.where(exhausted, jax.random.normal(key, v.shape, v.dtype), unit(rest)))
    return jnp.where(exhausted, 0.0, size), unit(rest)


def unit(v: Array) -> Array:
    size = jnp.linalg.norm(v)
    return v / jnp.where(size == 0, 1.0, size)
