"""Damped Gauss-Newton (natural gradient) as an optax transformation.

Each step minimizes the quadratic model of the loss, with the curvature G of `ggn_vp` and damping λ,

    q(d) = <g, d> + ½ dᵀGd,    (G + λI) d = -g  by conjugate gradients,

and compares it with what the loss really did: λ falls where the model predicts well, and rises where it does not.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax.curvature.products import ggn_vp, linearized
from jaxsoftmax.curvature.solve import solved_and_applied
from jaxsoftmax.curvature.vectors import axpy, dot, exponent, ldexp, scale

__all__ = ["GaussNewtonState", "gauss_newton"]


class GaussNewtonState(NamedTuple):
    """What `gauss_newton` carries from step to step.

    Args:
      damping: λ of the next step.
      direction: the last solution, from which the next solve starts.
      cg_steps: number of products the last solve took.
      ratio: change of the loss over the change that the quadratic model predicted, at the last step.

    Example:
      >>> from jaxsoftmax.curvature import GaussNewtonState
      >>> GaussNewtonState._fields
      ('damping', 'direction', 'cg_steps', 'ratio')
    """

    damping: Array
    direction: Any
    cg_steps: Array
    ratio: Array


def gauss_newton(
    f: Callable[[Any, Any], Array],
    loss: Callable[[Array, Any], Array],
    *,
    learning_rate: float = 1.0,
    damping: float = 1.0,
    adapt: float = 1.5,
    tol: float = 1e-2,
    max_steps: int = 30,
    warm_start: float = 0.9,
    batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Damped Gauss-Newton steps, d = -(G + λI)⁻¹g, with adaptive damping λ; for cross-entropy, natural gradients.

    With ρ the change of the loss over the predicted one: λ ← λ / adapt where ρ > 3/4, λ ← λ · adapt where ρ < 1/4
    (Levenberg and Marquardt's rule). A step that would raise the loss is not taken, and λ grows by adapt⁴.

    Args:
      f: the model, (params, x) -> logits.
      loss: any loss, (logits, labels) -> one value per example.
      learning_rate: factor of the solution.
      damping: λ of the first step.
      adapt: factor of λ, more than 1; or 1 for constant damping, with every step taken.
      tol: relative tolerance of the solve.
      max_steps: largest number of products per solve.
      warm_start: the solve starts at this multiple of the last solution.
      batch_size: examples at a time in `ggn_vp`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its update needs the argument `batch`, the pair (x, labels) on which
      the gradient was taken, and, unless adapt is 1, `value` and `value_fn`: the loss there and as a function of
      params. A train step from `make_train_step` hands over all three.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, softmax_cross_entropy_with_integer_labels
      >>> from jaxsoftmax.curvature import gauss_newton
      >>> x, labels = jnp.eye(3), jnp.arange(3)
      >>> loss = softmax_cross_entropy_with_integer_labels
      >>> value_fn = lambda params: loss(network.forward(params, x), labels).mean()
      >>> params = network.init(jax.random.key(0), (3, 3))
      >>> optimizer = gauss_newton(network.forward, loss, damping=0.1)
      >>> value, grads = jax.value_and_grad(value_fn)(params)
      >>> extra = {"batch": (x, labels), "value": value, "value_fn": value_fn}
      >>> updates, state = optimizer.update(grads, optimizer.init(params), params, **extra)
      >>> bool(value_fn(jax.tree.map(jnp.add, params, updates)) < value / 2)
      True

    Reference: Martens, Deep learning via Hessian-free optimization (2010); Martens, arXiv:1412.1193, section 6.
    """
    checks.function("f", f)
    checks.function("loss", loss)
    for name, number in (("learning_rate", learning_rate), ("warm_start", warm_start)):
        checks.number(name, number)
    damping = checks.number("damping", damping, 0.0)
    for name, number, low in (("adapt", adapt, 1.0), ("tol", tol, 0.0)):
        checks.number(name, number, low)
    checks.at_least("max_steps", max_steps, 1)
    if batch_size is not None:
        checks.at_least("batch_size", batch_size, 1)

    def init(params: Any) -> GaussNewtonState:
        checks.float_tree("params", params)
        dtype = dtypes.compute_dtype(dtypes.common_dtype(*map(jnp.asarray, jax.tree.leaves(params))))
        zero = jnp.zeros((), dtype)
        direction = jax.tree.map(jnp.zeros_like, params)
        return GaussNewtonState(jnp.asarray(damping, dtype), direction, jnp.int32(0), zero)

    def update(updates, state, params=None, *, batch=None, value=None, value_fn: Any = None, **_):
        needed = {"params": params, "batch": batch}
        if adapt != 1:
            needed |= {"value": value, "value_fn": value_fn}
        missing = [name for name, given in needed.items() if given is None]
        if missing:
            raise ValueError(f"gauss_newton's update needs the arguments {', '.join(missing)}: see make_train_step")
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"batch must be the pair (x, labels), got {jax.tree.map(jnp.shape, batch)}")
        if adapt != 1:
            checks.function("value_fn", value_fn)
        product = functools.partial(ggn_vp, f, loss, params, *batch, batch_size=batch_size)
        product = product if batch_size is not None else linearized(product, params)  # which keeps all activations
        start, target = scale(warm_start, state.direction), scale(-1.0, updates)
        solution, applied = solved_and_applied(
            product, target, state.damping, start=start, tol=tol, max_steps=max_steps
        )
        step = scale(learning_rate, solution.x)
        if adapt == 1:
            return step, state._replace(direction=solution.x, cg_steps=solution.steps)
        # Changes of the loss, in units of 2^e: the square of a tiny gradient is 0.
        e = exponent(updates)
        product_of_step = scale(learning_rate, axpy(-state.damping, solution.x, applied))
        predicted = dot(ldexp(updates, -e), step) + dot(step, ldexp(product_of_step, -e)) / 2
        change = ldexp(value_fn(jax.tree.map(jnp.add, params, step)) - value, -e)
        ratio = jnp.where(predicted < 0, change / jnp.where(predicted < 0, predicted, 1.0), -jnp.inf)
        taken = change <= 0  # False for NaN
        factor = jnp.where(ratio > 0.75, 1 / adapt, jnp.where(ratio < 0.25, adapt, 1.0))
        factor = jnp.where(taken, factor, adapt**4)
        keep = lambda tree: jax.tree.map(lambda leaf: jnp.where(taken, leaf, jnp.zeros_like(leaf)), tree)
        dtype = state.damping.dtype
        new_damping = jnp.clip(state.damping * factor.astype(dtype), *DAMPING_RANGE)
        return keep(step), GaussNewtonState(new_damping, keep(solution.x), solution.steps, ratio.astype(dtype))

    return optax.GradientTransformationExtraArgs(init, update)


DAMPING_RANGE = 1e-8, 1e8  # adaptation stays inside: at 0 or inf it could not come back
