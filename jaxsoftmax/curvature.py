"""Curvature of a network's loss as products with vectors: Hessian, Gauss-Newton, Fisher; and systems solved with them.

With z = f(θ, x), J = ∂z/∂θ, and l the loss of one example with gradient g and Hessian H in the logits z,

    Hessian  E[JᵀHJ + Σ_k g_k ∂²z_k/∂θ²],    Gauss-Newton  E[JᵀHJ],
    Fisher   E[Jᵀ E_y[ggᵀ] J], y drawn from the model,    empirical Fisher  E[Jᵀ ggᵀ J], y the data's own.

E is the mean over the batch. J is applied by forward and reverse mode, H by its closed form, so that no matrix is ever
formed. Bind all but the last argument for a function of v alone, which `damped_solve` and `jaxsoftmax.estimators` take:
`functools.partial(ggn_vp, f, loss, params, x, labels)`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax import _heads as heads
from jaxsoftmax._core import checks, dtypes

__all__ = ["Solution", "damped_solve", "empirical_fisher_vp", "fisher_vp", "ggn_vp", "hvp"]

Model = Callable[[Any, Any], Array]
Loss = Callable[[Array, Any], Array]
Product = Callable[[Any], Any]


def hvp(f: Model, loss: Loss, params: Any, x: Any, labels: Any, v: Any, *, batch_size: int | None = None) -> Any:
    """Product of the loss's Hessian in the parameters with v: ∂²/∂θ² mean(loss(f(θ, x), labels)) v.

    Args:
      f: the model, (params, x) -> logits (..., K).
      loss: a loss head, (logits, labels) -> one value per example (...), or per logit (..., K).
      params: pytree of floating-point arrays.
      x: inputs, any pytree that f takes; its arrays lead with the batch axis where `batch_size` is given.
      labels: what the loss compares the logits with, likewise.
      v: pytree of the structure and shapes of params.
      batch_size: examples at a time, in a loop, so that memory does not grow with the data; None for all at once.

    Returns:
      The product, a pytree like params.

    Raises:
      TypeError: if f or loss is not callable, params has leaves that are not floating-point, or v's tree differs.
      ValueError: if shapes do not fit, or `batch_size` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import curvature, sum_squared_error
      >>> f = lambda w, x: x * w
      >>> x, y, w, v = jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)), jnp.ones(2), jnp.ones(2)
      >>> with jax.numpy_rank_promotion("allow"):
      ...     print(curvature.hvp(f, sum_squared_error, w, x, y, v))
      [2. 8.]

    Reference: Pearlmutter, Fast exact multiplication by the Hessian (1994); Martens, arXiv:1412.1193.
    """
    count, batch_size = _checked(f, loss, params, x, labels, batch_size)
    return _hvp(f, loss, count, batch_size, params, (x, labels), _like(params, v))


def ggn_vp(f: Model, loss: Loss, params: Any, x: Any, labels: Any, v: Any, *, batch_size: int | None = None) -> Any:
    """Product of the generalized Gauss-Newton matrix with v: mean(JᵀHJ) v, H the loss's Hessian in the logits.

    Args:
      f: the model, (params, x) -> logits (..., K).
      loss: a loss head of this library, one value per example (...) or per logit (..., K); options are bound with
        `functools.partial`.
      params: pytree of floating-point arrays.
      x: inputs, any pytree that f takes; its arrays lead with the batch axis where `batch_size` is given.
      labels: what the loss compares the logits with, likewise.
      v: pytree of the structure and shapes of params.
      batch_size: examples at a time, in a loop, so that memory does not grow with the data; None for all at once.

    Returns:
      The product, a pytree like params. Positive semidefinite where the loss is convex in the logits.

    Raises:
      TypeError: if f or loss is not callable or the head is unknown, params has leaves that are not floating-point, or
        v's tree differs.
      ValueError: if shapes do not fit, or `batch_size` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import curvature, network, softmax_cross_entropy_with_integer_labels
      >>> params = network.init(jax.random.key(0), (4, 3))
      >>> x, labels = jnp.eye(4), jnp.array([0, 1, 2, 0])
      >>> loss = softmax_cross_entropy_with_integer_labels
      >>> product = curvature.ggn_vp(network.forward, loss, params, x, labels, params)
      >>> [layer.W.shape for layer in product]
      [(3, 4)]

    Reference: Schraudolph, Fast curvature matrix-vector products (2002); docs/mathematics.md, section 4.
    """
    count, batch_size = _checked(f, loss, params, x, labels, batch_size)
    return _sandwich(f, (heads.hessian_product, loss), count, batch_size, params, (x, labels), _like(params, v))


def fisher_vp(
    f: Model,
    loss: Loss,
    params: Any,
    x: Any,
    labels: Any,
    v: Any,
    *,
    key: Array | None = None,
    num_samples: int = 1,
    batch_size: int | None = None,
) -> Any:
    """Product of the Fisher information with v: mean(Jᵀ E_y[ggᵀ] J) v, g = ∂/∂z of -log p(y|z), y drawn from p(·|z).

    The head says which distribution the logits are the parameters of: softmax cross-entropy the categorical one,
    sigmoid cross-entropy Bernoulli's, l2_loss N(z, 1), the squared errors N(z, 1/2). For these `loss_fisher` has E[ggᵀ]
    and its draws, and the Fisher information is the Gauss-Newton matrix of -log p.

    Args:
      f: the model, (params, x) -> logits (..., K).
      loss: one of the heads above.
      params: pytree of floating-point arrays.
      x: inputs, any pytree that f takes; its arrays lead with the batch axis where `batch_size` or `key` is given.
      labels: of these only the shapes matter, and the weight of soft labels: the Fisher information is the model's.
      v: pytree of the structure and shapes of params.
      key: None for the expectation over y; a PRNG key for the mean over `num_samples` draws for each example.
      num_samples: number of draws; with few, the product is that of an unbiased estimate.
      batch_size: examples at a time, in a loop, so that memory does not grow with the data; None for all at once. The
        draws do not depend on it.

    Returns:
      The product, a pytree like params.

    Raises:
      TypeError: if f or loss is not callable or the head is no likelihood, params has leaves that are not
        floating-point, or v's tree differs.
      ValueError: if shapes do not fit, or `batch_size` or `num_samples` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import curvature, network, softmax_cross_entropy_with_integer_labels
      >>> params = network.init(jax.random.key(0), (4, 3))
      >>> arguments = softmax_cross_entropy_with_integer_labels, params, jnp.eye(4), jnp.array([0, 1, 2, 0]), params
      >>> exact = curvature.fisher_vp(network.forward, *arguments)
      >>> sampled = curvature.fisher_vp(network.forward, *arguments, key=jax.random.key(1), num_samples=10_000)
      >>> bool(jnp.max(jnp.abs(exact[0].W - sampled[0].W)) < 0.01)
      True

    Reference: Amari, Natural gradient works efficiently in learning (1998); Martens, arXiv:1412.1193.
    """
    count, batch_size = _checked(f, loss, params, x, labels, batch_size)
    v = _like(params, v)
    if key is None:
        return _sandwich(f, (heads.fisher_product, loss), count, batch_size, params, (x, labels), v)
    checks.at_least("num_samples", num_samples, 1)
    key = checks.key("key", key)
    data = x, (jax.random.split(key, _num_examples((x, labels))), labels)
    return _sandwich(f, (heads.sampled_fisher_product, loss, num_samples), count, batch_size, params, data, v)


def empirical_fisher_vp(
    f: Model, loss: Loss, params: Any, x: Any, labels: Any, v: Any, *, batch_size: int | None = None
) -> Any:
    """Product of the empirical Fisher matrix with v: mean(∂l/∂θ ∂l/∂θᵀ) v, the second moment of the gradients.

    Args:
      f: the model, (params, x) -> logits (..., K).
      loss: any differentiable loss, (logits, labels) -> one value per example (...), or per logit (..., K).
      params: pytree of floating-point arrays.
      x: inputs, any pytree that f takes; its arrays lead with the batch axis where `batch_size` is given.
      labels: what the loss compares the logits with, likewise.
      v: pytree of the structure and shapes of params.
      batch_size: examples at a time, in a loop, so that memory does not grow with the data; None for all at once.

    Returns:
      The product, a pytree like params. Each value of the loss counts as one example.

    Raises:
      TypeError: if f or loss is not callable, params has leaves that are not floating-point, or v's tree differs.
      ValueError: if shapes do not fit, or `batch_size` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import curvature, l2_loss
      >>> f = lambda w, x: x * w
      >>> print(curvature.empirical_fisher_vp(f, l2_loss, jnp.array(2.0), jnp.ones(1), jnp.zeros(1), jnp.array(1.0)))
      4.0

    Reference: Kunstner et al., Limitations of the empirical Fisher approximation, arXiv:1905.12558.
    """
    count, batch_size = _checked(f, loss, params, x, labels, batch_size)
    return _sandwich(f, (heads.gradient_product, loss), count, batch_size, params, (x, labels), _like(params, v))


class Solution(NamedTuple):
    """What `damped_solve` returns.

    Args:
      x: the solution, a pytree.
      steps: number of steps taken, int32.
      residual: ‖b - (A + λI)x‖ / ‖b‖ as the recurrence carries it; 0 for b = 0.
      converged: whether the residual reached the tolerance.

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

    Stops when ‖b - (A + λI)x‖ ≤ tol ‖b‖, after `max_steps`, or at a direction of curvature ≤ 0 (A + λI is then not
    positive definite, and x is the last iterate before it).

    Args:
      product: v -> A v, symmetric, over pytrees of floating-point arrays.
      b: the right-hand side, a pytree.
      damping: λ ≥ 0.
      preconditioner: r -> M⁻¹ r, symmetric and positive definite, M near A + λI.
      start: first iterate; zero if it is not given.
      tol: relative tolerance of the residual.
      max_steps: largest number of steps, one product each.

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
    if preconditioner is not None:
        checks.function("preconditioner", preconditioner)
    precondition = lambda r: r if preconditioner is None else _like(b, preconditioner(r), "preconditioner(r)", "b")
    apply = lambda v: _axpy(damping, v, _like(b, product(v), "product(v)", "b"))
    x = jax.tree.map(jnp.zeros_like, b) if start is None else _like(b, start, "start", "b")
    r = b if start is None else _axpy(-1.0, apply(x), b)
    goal = tol * jnp.sqrt(_dot(b, b))

    def unfinished(state):
        *_, r, _, _, steps, indefinite = state
        return (jnp.sqrt(_dot(r, r)) > goal) & (steps < max_steps) & ~indefinite

    def step(state):
        x, r, p, rz, steps, _ = state
        Ap = apply(p)
        curvature = _dot(p, Ap)
        indefinite = ~(curvature > 0)
        alpha = jnp.where(indefinite, 0.0, rz / jnp.where(indefinite, 1.0, curvature))
        x, r = _axpy(alpha, p, x), _axpy(-alpha, Ap, r)
        z = precondition(r)
        rz, previous = _dot(r, z), rz
        p = _axpy(jnp.where(indefinite, 0.0, rz / jnp.where(previous == 0, 1.0, previous)), p, z)
        return x, r, p, rz, steps + 1, indefinite

    z = precondition(r)
    x, r, _, _, steps, _ = lax.while_loop(unfinished, step, (x, r, z, _dot(r, z), jnp.int32(0), jnp.array(False)))
    residual, size = jnp.sqrt(_dot(r, r)), jnp.sqrt(_dot(b, b))
    return Solution(x, steps, residual / jnp.where(size == 0, 1.0, size), residual <= goal)


# The products. `data` is a pair of pytrees whose arrays lead with the batch axis; f sees the first, the head the other.
# `head` is a function with its static first arguments, (logits, second of the data, u) -> M u for every example.


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _hvp(f, loss, count, batch_size, params, data, v):
    def of_batch(data):
        gradient = jax.grad(lambda params: jnp.sum(loss(f(params, data[0]), data[1])) / count)
        return jax.jvp(gradient, (params,), (v,))[1]

    return _sum(of_batch, data, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _sandwich(f, head, count, batch_size, params, data, v):
    """The sum of Jᵀ M J v over the examples, divided by `count`: in the middle, where the arrays are smallest."""

    def of_batch(data):
        z, push = jax.linearize(lambda params: f(params, data[0]), params)
        product, *static = head
        middle = product(*static, *dtypes.widen(z), data[1], *dtypes.widen(push(v))) / count
        return jax.linear_transpose(push, params)(middle.astype(z.dtype))[0]

    return _sum(of_batch, data, batch_size)


def _sum(of_batch: Callable, data: Any, batch_size: int | None) -> Any:
    """`of_batch` of all the data, or the sum of it over slices, added up in at least float32."""
    if batch_size is None:
        return of_batch(data)
    whole = _num_examples(data) // batch_size
    split = lambda leaf: leaf[: whole * batch_size].reshape(whole, batch_size, *leaf.shape[1:])
    shapes = jax.eval_shape(of_batch, jax.tree.map(lambda leaf: leaf[:batch_size], data))
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtypes.compute_dtype(leaf.dtype)), shapes)
    add = lambda total, term: jax.tree.map(lambda t, s: t + s.astype(t.dtype), total, term)
    total, _ = lax.scan(lambda total, part: (add(total, of_batch(part)), None), total, jax.tree.map(split, data))
    if whole * batch_size < _num_examples(data):
        total = add(total, of_batch(jax.tree.map(lambda leaf: leaf[whole * batch_size :], data)))
    return jax.tree.map(lambda t, s: t.astype(s.dtype), total, shapes)


def _checked(f: Model, loss: Loss, params: Any, x: Any, labels: Any, batch_size: int | None) -> tuple[int, int | None]:
    """The number of loss values, and the batch size where there is more than one batch; raises on every misfit."""
    checks.function("f", f)
    checks.function("loss", loss)
    checks.float_tree("params", params)
    if batch_size is not None:
        checks.at_least("batch_size", batch_size, 1)
    logits = jax.eval_shape(f, params, x)
    if not isinstance(logits, jax.ShapeDtypeStruct) or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"f must return one floating-point array of logits, got {logits}")
    losses = jax.eval_shape(loss, logits, labels)
    if losses.shape not in (logits.shape[:-1], logits.shape):
        wanted = f"one value per example {logits.shape[:-1]} or per logit {logits.shape}"
        raise ValueError(f"loss must return {wanted}, got {losses.shape}")
    if batch_size is not None and batch_size >= _num_examples((x, labels)):
        batch_size = None
    return losses.size, batch_size


def _num_examples(data: Any) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"the arrays of x and labels must lead with one batch axis, got lengths {sorted(sizes)}")
    return sizes.pop()[0]


def _like(tree: Any, v: Any, name: str = "v", other: str = "params") -> Any:
    """v in the dtypes of `tree`, whose structure and shapes it must have."""
    checks.same_tree(name, v, other, tree)
    return jax.tree.map(lambda leaf, target: checks.as_float(name, leaf).astype(target.dtype), v, tree)


# Vectors that are pytrees; scalars are kept in the computation dtype, and each leaf in its own.


def _dot(u: Any, v: Any) -> Array:
    products = jax.tree.map(lambda a, b: jnp.vdot(*dtypes.widen(a, b)), u, v)
    return functools.reduce(lambda a, b: jnp.add(*dtypes.widen(a, b)), jax.tree.leaves(products))


def _axpy(a: Any, x: Any, y: Any) -> Any:
    """a x + y."""
    return jax.tree.map(lambda x, y: jnp.asarray(a).astype(x.dtype) * x + y, x, y)
