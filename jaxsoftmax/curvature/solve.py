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
from jaxsoftmax._core.plumbing import tied, zeros_like
from jaxsoftmax.curvature import vectors
from jaxsoftmax.curvature.vectors import Product, axpy, dot, exponent, in_range, ldexp, like, norm


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
      max_steps: largest number of steps, one product each; one more finds the residual, and with `start` two.

    Returns:
      A `Solution`.

    Raises:
      TypeError: if `product` is not callable, b's leaves are not floating-point, or start's tree differs from b's.
      ValueError: if a number is out of range, or an array of `start` differs in shape from b's.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.curvature import damped_solve
      >>> solution = damped_solve(lambda v: jnp.array([1.0, 3.0]) * v, jnp.array([2.0, 4.0]), 1.0)
      >>> print(solution.x.round(4), solution.steps, solution.converged)
      [1. 1.] 2 True

    Reference: Hestenes and Stiefel (1952); Martens, Deep learning via Hessian-free optimization (2010).
    """
    checks.function("product", product)
    checks.float_tree("b", b)
    checks.number("damping", damping, 0.0)
    checks.number("tol", tol, 0.0)
    checks.at_least("max_steps", max_steps, 1)
    precondition = None
    if preconditioner is not None:
        checks.function("preconditioner", preconditioner)
        precondition = lambda r: like(b, preconditioner(r), "preconditioner(r)", "b")
    apply = lambda v: axpy(damping, v, like(b, product(v), "product(v)", "b"))
    # The system is extended by s = 1, and starts at s · start: in those for derivatives of x, s is 0.
    start = None if start is None else like(b, start, "start", "b")

    def solve(extended, right):
        b, s = right
        first = None if start is None else vectors.scale(s, start)
        x, found = _conjugate_gradients(lambda v: extended((v, s))[0], precondition, b, first, tol, max_steps)
        return (x, s), found

    joined = lambda tree: tied(tree, tree)  # JAX transposes a linear solve only where all leaves have tangents
    extended = lambda xs: joined((apply(xs[0]), xs[1]))
    xs, found = lax.custom_linear_solve(extended, joined((b, jnp.ones(()))), solve, symmetric=True, has_aux=True)
    return Solution(joined(xs)[0], *found)


class _Iterate(NamedTuple):
    x: Any
    r: Any
    p: Any
    rz: Array
    residual: Array  # ‖r‖ / ‖b‖
    steps: Array
    indefinite: Array


def _conjugate_gradients(apply, precondition, b, start, tol, max_steps):
    """(x, (steps, residual, converged)), computed for b of scale 1.

    x and p are kept times h, A being of scale 1/h²: then pᵀAp is of scale 1, and half of A's scale is taken away before
    its product and half after it, with no pass over a vector of its own.
    """
    of_b = exponent(b)
    b = z = ldexp(b, -of_b)
    if precondition is not None:
        shift, z = in_range(precondition, b)
        precondition, z = vectors.scaled(precondition, exponent(z) - shift), ldexp(z, -exponent(z))
    shift, Az = in_range(apply, z)
    half, size = (exponent(Az) - shift) // 2, norm(b)
    size, of_x = jnp.where(size == 0, 1.0, size), of_b - half
    h = jnp.ldexp(jnp.ones_like(size), -half)

    def iterate(x, r, steps, indefinite):
        z = r if precondition is None else precondition(r)
        return _Iterate(x, r, vectors.scale(h, z), dot(r, z), norm(r) / size, steps, indefinite)

    def unfinished(at):
        return (at.residual > tol) & (at.steps < max_steps) & ~at.indefinite

    def step(at, Ap):
        curvature = dot(at.p, Ap)
        indefinite = ~(curvature > 0)
        alpha = jnp.where(indefinite, 0.0, at.rz / jnp.where(indefinite, 1.0, curvature))
        new = iterate(axpy(alpha, at.p, at.x), axpy(-alpha * h, Ap, at.r), at.steps + 1, indefinite)
        beta = jnp.where(indefinite, 0.0, new.rz / jnp.where(at.rz == 0, 1.0, at.rz))
        return new._replace(p=axpy(beta, at.p, new.p))

    def restarted(x, steps, indefinite):
        return iterate(x, axpy(-h, apply(x), b), steps, indefinite)

    # The recurrence for r drifts away from b - Ax. Where that is beyond the goal, and has halved, it starts once more.
    def run(state):
        at, before, _ = state
        at = lax.while_loop(unfinished, lambda at: step(at, apply(at.p)), at)
        x = ldexp(ldexp(at.x, of_x), -of_x)  # what of x is in the range
        at = restarted(x, at.steps, at.indefinite)
        return at, at.residual, at.residual <= before / 2

    none = jnp.int32(0), jnp.array(False)
    if start is None:  # the product that found the scale is that of the first step
        at, Ap = iterate(jax.tree.map(zeros_like, b), b, *none), ldexp(Az, -shift - half)
        before, at = at.residual, lax.cond(unfinished(at), lambda at: step(at, Ap), lambda at: at, at)
    else:
        at = restarted(ldexp(start, -of_x), *none)
        before = at.residual
    worthwhile = lambda state: unfinished(state[0]) & state[2]
    at, _, _ = lax.while_loop(worthwhile, run, (at, before, jnp.array(True)))
    return ldexp(at.x, of_x), (at.steps, at.residual, at.residual <= tol)
