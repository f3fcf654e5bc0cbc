"""Systems with a symmetric matrix that is given by its products.

The conjugate gradients are written here, on `jax.lax.custom_linear_solve`, which differentiates the solution. lineax
0.1.1 stops with NaN at a direction of curvature ≤ 0, where Newton's method takes the last iterate before it, and where
pᵀAp ≤ 200 n eps ‖r‖²: in float32, of well-conditioned matrices too once there are enough parameters n.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import checks
from jaxsoftmax._core.mesh import tied, varies_over, varying, zeros_like
from jaxsoftmax.curvature.vectors import Product, axpy, conformed, dot, exponent, ldexp, norm, scale, scale_of, scaled


class Solution(NamedTuple):
    """What `damped_solve` returns.

    Args:
      x: the solution, a pytree.
      steps: number of steps taken, int32.
      residual: ‖b - (A + λI)x‖ / ‖b‖, computed from x; 0 for b = 0.
      converged: whether the residual is within the tolerance.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.curvature import damped_solve
      >>> damped_solve(lambda v: 3 * v, jnp.ones(2), 1.0)._fields
      ('x', 'steps', 'residual', 'converged')
    """

    x: Any
    steps: Array
    residual: Array
    converged: Array


def damped_solve(
    product: Product,
    b: Any,
    damping: Any,
    *,
    preconditioner: Product | None = None,
    start: Any = None,
    tol: float = 1e-5,
    max_steps: int = 100,
) -> Solution:
    """Solve (A + λI) x = b by preconditioned conjugate gradients.

    Stops when ‖b - (A + λI)x‖ ≤ tol ‖b‖, after `max_steps`, at a direction of curvature ≤ 0 (A + λI is then not
    positive definite, and x is the last iterate before it), or where rounding lets the residual fall no further.
    b, the matrix and the preconditioner may be of any scale. x has derivatives of every order in both modes, in b, λ
    and whatever `product` closes over: those of the exact solution, each by a solve to the same tolerance.

    Args:
      product: v -> A v, symmetric, over pytrees of floating-point arrays; see `linearized`.
      b: the right-hand side, a pytree.
      damping: λ ≥ 0.
      preconditioner: r -> M⁻¹ r, symmetric and positive definite, M near A + λI.
      start: first iterate; zero if it is not given.
      tol: relative tolerance of the residual.
      max_steps: largest number of steps, one product each; one more finds the matrix's scale, and one the residual,
        with `start` two.

    Returns:
      A `Solution`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.curvature import damped_solve
      >>> solution = damped_solve(lambda v: jnp.array([1.0, 3.0]) * v, jnp.array([2.0, 4.0]), 1.0)
      >>> print(solution.x.round(4), solution.steps, solution.converged)
      [1. 1.] 2 True

    Reference: Hestenes and Stiefel (1952); Martens, Deep learning via Hessian-free optimization (2010).
    """
    return solved_and_applied(
        product, b, damping, preconditioner=preconditioner, start=start, tol=tol, max_steps=max_steps
    )[0]


def solved_and_applied(product, b, damping, *, preconditioner=None, start, tol, max_steps) -> tuple[Solution, Any]:
    """The solution x of `damped_solve`, and (A + λI) x, which is known from its residual."""
    checks.function("product", product)
    checks.float_tree("b", b)
    damping = checks.number("damping", damping, 0.0)
    checks.number("tol", tol, 0.0)
    checks.at_least("max_steps", max_steps, 1)
    A = lambda v: axpy(damping, v, conformed(b, product(v), "product(v)", "b"))
    M, start = None, None if start is None else conformed(b, start, "start", "b")
    if preconditioner is not None:
        checks.function("preconditioner", preconditioner)
        M = lambda r: conformed(b, preconditioner(r), "preconditioner(r)", "b")

    # The system is extended by s = 1, and starts at s · start: in those for derivatives of x, s is 0.
    def solve(extended, right):
        b, s = right
        first = None if start is None else scale(s, start)
        x, found = _solve(lambda v: extended((v, s))[0], M, b, first, tol, max_steps)
        return (x, s), found

    joined = lambda tree: tied(tree, tree)  # JAX transposes a linear solve only where all leaves have tangents
    extended = lambda xs: joined((A(xs[0]), xs[1]))
    xs, found = lax.custom_linear_solve(extended, joined((b, jnp.ones(()))), solve, symmetric=True, has_aux=True)
    x = jax.tree.map(lambda leaf: jnp.where(jnp.isnan(damping), jnp.nan, leaf), joined(xs)[0])
    *found, applied = found
    return Solution(x, *found), applied


def _solve(A, M, b, x, tol, max_steps):
    """(x, (steps, residual, converged, Ax)): conjugate gradients, in units in which A, M and b are about 1."""
    A, M, b, unit, of_b = _in_units(A, M, b)
    size = norm(b)
    unfinished = lambda at: (at.size > tol * size) & (at.steps < max_steps) & ~at.indefinite

    started, start = x is not None, jax.tree.map(zeros_like, b) if x is None else ldexp(x, -unit)

    # The recurrence for r drifts away from b - Ax. Where that is beyond the goal, and has halved, it starts once more.
    def restart(state):
        last, size_before, _ = state
        x = ldexp(ldexp(last.x, unit), -unit)  # what of x is in the range of its dtype
        residual = lambda: axpy(-1.0, A(x), b)
        r = residual() if started else lax.cond(last.steps == 0, lambda: b, residual)
        first = _iterate(M, x, r, last.steps, last.indefinite)
        goes_on = unfinished(first) & ~(first.size > size_before / 2)
        last = lax.while_loop(lambda at: goes_on & unfinished(at), lambda at: _step(A, M, at), first)
        return last, first.size, goes_on

    steps, no, yes, unknown = varying((jnp.int32(0), False, True, jnp.full_like(size, jnp.inf)), varies_over(size))
    state = _Iterate(start, b, b, size, size, steps, no), unknown, yes
    end, true_size, _ = lax.while_loop(lambda state: state[-1], restart, state)
    residual = true_size / jnp.where(size == 0, 1.0, size)
    return ldexp(end.x, unit), (end.steps, residual, residual <= tol, ldexp(axpy(-1.0, end.r, b), of_b))


def _in_units(A, M, b):
    """The system for y, x = 2^e y, with numbers about 1: (2^-a A, 2^-m M, 2^-c b, e = c - a, c)."""
    of_b = exponent(b)
    b = z = ldexp(b, -of_b)
    if M is not None:
        M = scaled(M, scale_of(M, b), b)
        z = M(b)
    of_A = scale_of(A, z)
    return scaled(A, of_A, b), M, b, of_b - of_A, of_b


class _Iterate(NamedTuple):
    x: Any
    r: Any  # b - Ax
    p: Any  # the direction
    rz: Array  # <r, Mr>
    size: Array  # ‖r‖
    steps: Array
    indefinite: Array  # the last direction had curvature ≤ 0


def _iterate(M, x, r, steps, indefinite) -> _Iterate:
    """A first iterate: its direction is that of the preconditioned residual."""
    z = r if M is None else M(r)
    return _Iterate(x, r, z, dot(r, z), norm(r), steps, indefinite)


def _step(A, M, at: _Iterate) -> _Iterate:
    """One step of conjugate gradients; none in a direction of curvature ≤ 0."""
    Ap = A(at.p)
    curvature = dot(at.p, Ap)
    indefinite = ~(curvature > 0)
    alpha = jnp.where(indefinite, 0.0, at.rz / jnp.where(indefinite, 1.0, curvature))
    new = _iterate(M, axpy(alpha, at.p, at.x), axpy(-alpha, Ap, at.r), at.steps + 1, indefinite)
    beta = new.rz / jnp.where(at.rz == 0, 1.0, at.rz)
    return new._replace(p=axpy(beta, at.p, new.p))
