"""Largest and smallest singular value of a Jacobian, from its products with vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import checks


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

    Raises:
      ValueError: if x or f(x) is not a vector, or `num_steps` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.network.singular_values import extreme_singular_values
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
    eps = jnp.finfo(x.dtype).eps

    def orthogonal(v, basis):
        for _ in range(2):  # once leaves the rounding of what it takes away
            v = v - (basis @ v) @ basis
        return v

    def extend(v, basis, key):
        """The part of v outside the basis: its norm and direction; where there is none, 0 and any direction."""
        rest = orthogonal(v, basis)
        size = jnp.linalg.norm(rest)
        exhausted = size <= 16 * eps * jnp.linalg.norm(v)
        rest = orthogonal(jnp.where(exhausted, jax.random.normal(key, v.shape, v.dtype), rest), basis)
        return jnp.where(exhausted, 0.0, size), rest / jnp.linalg.norm(rest)

    def step(i, state):
        U, V, diagonal, above, v = state
        left, right = jax.random.split(keys[i])
        V = V.at[i].set(v)
        size, u = extend(A(v), U, left)
        next_size, v = extend(At(u), V, right)
        return U.at[i].set(u), V, diagonal.at[i].set(size), above.at[i].set(next_size), v

    keys = jax.random.split(key, steps)
    start = jax.random.normal(key, (n,), x.dtype)
    zeros = lambda *shape: jnp.zeros(shape, x.dtype)
    state = zeros(steps, m), zeros(steps, n), zeros(steps), zeros(steps), start / jnp.linalg.norm(start)
    _, _, diagonal, above, _ = lax.fori_loop(0, steps, step, state)
    values = jnp.linalg.svd(jnp.diag(diagonal) + jnp.diag(above[:-1], 1), compute_uv=False)
    return values[0], values[-1]
