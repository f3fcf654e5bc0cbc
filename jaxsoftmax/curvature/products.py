"""Curvature of a network's loss as products with vectors: Hessian, Gauss-Newton, Fisher.

With z = f(θ, x), J = ∂z/∂θ, and l the loss of one example with gradient g and Hessian H in the logits z,

    Hessian  E[JᵀHJ + Σ_k g_k ∂²z_k/∂θ²],    Gauss-Newton  E[JᵀHJ],
    Fisher   E[c Jᵀ E_y[ggᵀ] J], y drawn from the model,    empirical Fisher  E[Jᵀ ggᵀ J], y the data's own.

E is the mean over the batch. J is applied by forward and reverse mode, H by forward over reverse, so that no matrix is
ever formed. These are plain functions of their arguments, linear in the last: wrap them in `jax.jit` with the model's
parameters and the data as arguments. Bind all but v for a function of v alone, which `damped_solve` and the estimators
take, and let `linearized` do once what does not depend on v.

The loss is any function (logits, labels) -> one value per example or per logit. x and labels may be any pytrees; where
`batch_size` is given, their arrays lead with the batch axis and are cut along it, and so are the options that
`functools.partial` binds to the loss and that have the axes of the logits (or are a `where` over examples).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax.curvature.batches import num_examples, options_per_example, sum_over_batches
from jaxsoftmax.curvature.logit_products import (
    fisher_product,
    hessian_product,
    sampled_fisher_product,
    squared_gradient_product,
)
from jaxsoftmax.curvature.vectors import Product, conformed

Model = Callable[[Any, Any], Array]
Loss = Callable[[Array, Any], Array]


def hvp(f: Model, loss: Loss, params: Any, x: Any, labels: Any, v: Any, *, batch_size: int | None = None) -> Any:
    """Product of the loss's Hessian in the parameters with v: ∂²/∂θ² mean(loss(f(θ, x), labels)) v.

    Args:
      f: the model, (params, x) -> logits (..., K).
      loss: any loss, (logits, labels) -> one value per example (...), or per logit (..., K).
      params: pytree of floating-point arrays.
      x: inputs, any pytree that f takes; its arrays lead with the batch axis where `batch_size` is given.
      labels: what the loss compares the logits with, likewise.
      v: pytree of the structure and shapes of params.
      batch_size: examples at a time, in a loop, so that memory does not grow with the data; None for all at once.

    Returns:
      The product, a pytree like params.

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
    call = _Call.of(f, loss, params, x, labels, v, batch_size)

    def of_batch(data):
        x, labels, options = data
        gradient = jax.grad(lambda params: jnp.sum(loss(f(params, x), labels, **options)) / call.count)
        return jax.jvp(gradient, (params,), (call.v,))[1]

    return call.sum(of_batch)


def ggn_vp(f: Model, loss: Loss, params: Any, x: Any, labels: Any, v: Any, *, batch_size: int | None = None) -> Any:
    """Product of the generalized Gauss-Newton matrix with v: mean(JᵀHJ) v, H the loss's Hessian in the logits.

    Args:
      f, params, x, labels, v, batch_size: as in `hvp`.
      loss: any loss; see `hvp`.

    Returns:
      The product, a pytree like params. Positive semidefinite where the loss is convex in the logits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import curvature, network, softmax_cross_entropy_with_integer_labels
      >>> params = network.init(jax.random.key(0), (4, 3))
      >>> x, labels = jnp.eye(4), jnp.array([0, 1, 2, 0])
      >>> loss = softmax_cross_entropy_with_integer_labels
      >>> product = curvature.ggn_vp(network.forward, loss, params, x, labels, params)
      >>> [layer.W.shape for layer in product]
      [(3, 4)]

    The whole matrix of a small model is `dense` of this: with JAX 0.10.2 on a CPU, `jax.vmap` over v can be wrong.

    Reference: Schraudolph, Fast curvature matrix-vector products (2002); Martens, arXiv:1412.1193.
    """
    return _Call.of(f, loss, params, x, labels, v, batch_size).sandwich(hessian_product)


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
    """Product of the Fisher information with v: mean(c Jᵀ E_y[ggᵀ] J) v, as `logits_fisher` defines it for each head.

    g = ∂/∂z of -log p(y|z), y drawn from p(·|z); c is the number of observations that an example counts for. It is the
    Gauss-Newton matrix of c (-log p).

    Args:
      f, params, x, labels, v, batch_size: as in `hvp`; of the labels only shapes and weights matter. With a key, x and
        labels lead with the batch axis.
      loss: a softmax, sigmoid or squared-error head, or a `functools.partial` of one.
      key: None for the expectation over y; a PRNG key for the mean over `num_samples` draws for each example.
      num_samples: number of draws; with few, the product is that of an unbiased estimate. It does not depend on
        `batch_size`.

    Returns:
      The product, a pytree like params.

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
    call = _Call.of(f, loss, params, x, labels, v, batch_size)
    if key is None:
        return call.sandwich(fisher_product)
    checks.at_least("num_samples", num_samples, 1)
    x, labels, options = call.data
    keys = jax.random.split(checks.key("key", key), num_examples((x, labels)))
    call = call._replace(data=(x, (jax.random.key_data(keys), labels), options))  # plain numbers are easier to cut
    sampled = functools.partial(sampled_fisher_product, impl=jax.random.key_impl(key), num_samples=num_samples)
    return call.sandwich(sampled)


def empirical_fisher_vp(
    f: Model, loss: Loss, params: Any, x: Any, labels: Any, v: Any, *, batch_size: int | None = None
) -> Any:
    """Product of the empirical Fisher matrix with v: mean(∂l/∂θ ∂l/∂θᵀ) v, the second moment of the gradients.

    Args:
      f, params, x, labels, v, batch_size: as in `hvp`.
      loss: any loss; see `hvp`.

    Returns:
      The product, a pytree like params. Each value of the loss counts as one example.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import curvature, l2_loss
      >>> f = lambda w, x: x * w
      >>> print(curvature.empirical_fisher_vp(f, l2_loss, jnp.array(2.0), jnp.ones(1), jnp.zeros(1), jnp.array(1.0)))
      4.0

    Reference: Kunstner et al., Limitations of the empirical Fisher approximation, arXiv:1905.12558.
    """
    return _Call.of(f, loss, params, x, labels, v, batch_size).sandwich(squared_gradient_product)


def linearized(product: Product, like: Any) -> Product:
    """A product that is linear in v, with all that does not depend on v done once: the same function, to be used often.

    Args:
      product: v -> A v, such as `functools.partial(ggn_vp, f, loss, params, x, labels)`.
      like: pytree of the structure, shapes and dtypes of v; its values are not looked at.

    Returns:
      v -> A v, a pytree whose arrays are the activations (of all the data, with `batch_size` as well): it goes into and
      comes out of compiled functions.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from jaxsoftmax import curvature, l2_loss
      >>> f = lambda w, x: jnp.tanh(x * w)
      >>> w, x, y = jnp.array(0.5), jnp.ones(1), jnp.zeros(1)
      >>> product = curvature.linearized(functools.partial(curvature.ggn_vp, f, l2_loss, w, x, y), w)
      >>> print(jax.jit(lambda product, v: product(v))(product, w).round(4))  # no tanh in here
      0.3092

    Reference: `jax.linearize`.
    """
    checks.function("product", product)
    checks.float_tree("like", like)
    return jax.linearize(product, jax.tree.map(jnp.zeros_like, like))[1]


def dense(product: Product, like: Any) -> Array:
    """The matrix of a product, column by column: for small models, to look at, factor or decompose.

    Args:
      product: v -> A v, such as `functools.partial(ggn_vp, f, loss, params, x, labels)`.
      like: pytree of the structure, shapes and dtypes of v, with P numbers in all.

    Returns:
      A, of shape (P, P), rows and columns in the order of `jax.flatten_util.ravel_pytree(like)`. The columns are taken
      one after another (`jax.lax.map`): memory for one product, and no `jax.vmap`, of which XLA's CPU backend in
      JAX 0.10.2 can make a wrong program.

    Example:
      >>> import functools, jax.numpy as jnp
      >>> from jaxsoftmax import curvature, l2_loss
      >>> f = lambda w, x: x @ w
      >>> product = functools.partial(curvature.ggn_vp, f, l2_loss, jnp.zeros(2), jnp.eye(2), jnp.zeros(2))
      >>> print(curvature.dense(product, jnp.zeros(2)))
      [[0.5 0. ]
       [0.  0.5]]

    Reference: https://github.com/jax-ml/jax/issues/39103 (what a batched product may become).
    """
    checks.function("product", product)
    checks.float_tree("like", like)
    flat, unravel = ravel_pytree(like)

    def column(unit):
        v = unravel(unit)
        Av = product(v)
        checks.same_tree("product(v)", Av, "v", v)
        return ravel_pytree(Av)[0]

    return lax.map(column, jnp.eye(flat.size, dtype=flat.dtype)).T


class _Call(NamedTuple):
    """The checked arguments of a product: data is (x, labels, options), to be cut; count the number of loss values."""

    f: Model
    loss: Callable[..., Array]
    params: Any
    data: Any
    v: Any
    batch_size: int | None
    count: int

    @classmethod
    def of(cls, f, loss, params, x, labels, v, batch_size) -> "_Call":
        checks.function("f", f)
        checks.function("loss", loss)
        checks.float_tree("params", params)
        logits = jax.eval_shape(f, params, x)
        if not isinstance(logits, jax.ShapeDtypeStruct) or not jnp.issubdtype(logits.dtype, jnp.floating):
            raise TypeError(f"f must return one floating-point array of logits, got {logits}")
        losses = jax.eval_shape(loss, logits, labels)
        if losses.shape not in (logits.shape[:-1], logits.shape):
            wanted = f"one value per example {logits.shape[:-1]} or per logit {logits.shape}"
            raise ValueError(f"loss must return {wanted}, got {losses.shape}")
        options = {}
        if batch_size is not None:
            checks.at_least("batch_size", batch_size, 1)
            num_examples((x, labels))
            options = options_per_example(loss, logits.shape)
        return cls(f, loss, params, (x, labels, options), conformed(params, v), batch_size, losses.size)

    def sum(self, of_batch: Callable) -> Any:
        return sum_over_batches(of_batch, self.data, self.batch_size, self.params)

    def sandwich(self, product: Callable) -> Any:
        """The mean of Jᵀ M J v, with M = product(loss, z, labels, options, ·): scaled where the arrays are smallest."""

        def of_batch(data):
            x, labels, options = data
            z, push = jax.linearize(lambda params: self.f(params, x), self.params)
            wide, u = dtypes.widen(z, push(self.v))
            Mu = product(self.loss, wide, labels, options, u) / self.count
            return jax.linear_transpose(push, self.params)(Mu.astype(z.dtype))[0]

        return self.sum(of_batch)
