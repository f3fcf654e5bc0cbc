"""What can be learnt of a symmetric matrix from its products with vectors: trace, diagonal, eigenvalues, their density.

A matrix A is given as a function v -> A v over pytrees, for instance `linearized(functools.partial(ggn_vp, f, loss,
params, x, labels), params)`, and by `like`, a pytree of the structure, shapes and dtypes of v (its values are not
looked at). Each function is one loop over products, of a matrix of any scale: wrap it in `jax.jit` where it is called
more than once.

matfree has more of the kind. By hand stay, where it differs:
- Lanczos: matfree 0.6.3 loses the basis where the Krylov space is exhausted, and of the identity (24, 24) finds NaN or
  wrong eigenvalues from every start;
- Hutch++: matfree's XTrace is closer, but the error that it claims may be several times too small, as of a projection
  on 30 of 100 dimensions with 60 products;
- mean and standard error over the probes: matfree holds all of them at once, and calls the error of one probe 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core.mesh import sharded_like, whole
from jaxsoftmax.curvature.krylov import lanczos, unit
from jaxsoftmax.curvature.vectors import Product, ldexp, scale_of, scaled


class Estimate(NamedTuple):
    """An estimate from random probes.

    Args:
      mean: the estimate, an array or a pytree of arrays.
      standard_error: of the mean, likewise; infinite where there was one probe only.

    Example:
      >>> from jaxsoftmax.curvature import Estimate
      >>> Estimate(mean=2.0, standard_error=0.1).mean
      2.0
    """

    mean: Any
    standard_error: Any


def hutchinson_trace(product: Product, like: Any, key: Array, num_samples: int) -> Estimate:
    """Trace of A: the mean of <ε, Aε> over random signs ε; its variance is 2 Σ_{i≠j} A_ij² for each probe.

    Args:
      product: v -> A v, A symmetric.
      like: pytree of floating-point arrays, of v's structure, shapes and dtypes.
      key: a PRNG key.
      num_samples: number of probes, one product each.

    Returns:
      An `Estimate` with scalars.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.curvature import hutchinson_trace
      >>> print(hutchinson_trace(lambda v: jnp.array([1.0, 2.0]) * v, jnp.zeros(2), jax.random.key(0), 2))
      Estimate(mean=Array(3., dtype=float32), standard_error=Array(0., dtype=float32))

    Reference: Hutchinson (1989); Avron and Toledo, Randomized algorithms for the trace (2011).
    """
    A, key = _Flat.of(product, like), checks.key("key", key)
    keys = jax.random.split(key, checks.at_least("num_samples", num_samples, 1))

    def probe(key):
        v = A.signs(key)
        return jnp.vdot(v, A(v))

    return ldexp(_estimate(probe, keys), A.exponent)


def hutchinson_diagonal(product: Product, like: Any, key: Array, num_samples: int) -> Estimate:
    """Diagonal of A: the mean of ε∘Aε over random signs ε; its variance is Σ_{j≠i} A_ij² for each probe.

    Args:
      product, like, key, num_samples: as in `hutchinson_trace`.

    Returns:
      An `Estimate` with pytrees like `like`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.curvature import hutchinson_diagonal
      >>> print(hutchinson_diagonal(lambda v: jnp.array([1.0, 2.0]) * v, jnp.zeros(2), jax.random.key(0), 2).mean)
      [1. 2.]

    Reference: Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix (2007).
    """
    A, key = _Flat.of(product, like), checks.key("key", key)
    keys = jax.random.split(key, checks.at_least("num_samples", num_samples, 1))

    def probe(key):
        v = A.signs(key)
        return v * A(v)

    return Estimate(*map(A.unravel, ldexp(_estimate(probe, keys), A.exponent)))


def hutchpp_trace(product: Product, like: Any, key: Array, num_samples: int) -> Estimate:
    """Trace of A with variance reduction: exact on the span Q of A's action on random signs, estimated outside it.

    tr A = tr QᵀAQ + tr (I - QQᵀ)A(I - QQᵀ), a third of the products each for Q, the first term and the second.

    Args:
      product, like, key: as in `hutchinson_trace`.
      num_samples: number of products, at least 3; a third as many vectors are kept in memory.

    Returns:
      An `Estimate` with scalars. With n parameters and num_samples ≥ 3n it is exact.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.curvature import hutchpp_trace
      >>> estimate = hutchpp_trace(lambda v: jnp.full(4, v.sum()), jnp.zeros(4), jax.random.key(0), 6)
      >>> print(estimate.mean.round(4))  # a matrix of rank 1
      4.0

    Reference: Meyer et al., Hutch++: optimal stochastic trace estimation, arXiv:2010.09649.
    """
    A, key = _Flat.of(product, like), checks.key("key", key)
    num_samples = checks.at_least("num_samples", num_samples, 3)
    rank = min(num_samples // 3, A.size)
    sketch_key, probe_key = jax.random.split(key)
    sketch = lax.map(lambda key: A(A.signs(key)), jax.random.split(sketch_key, rank))
    Q, _ = jnp.linalg.qr(sketch.T)
    inside = jnp.sum(lax.map(lambda q: jnp.vdot(q, A(q)), Q.T))

    def probe(key):
        v = A.signs(key)
        v = v - Q @ (Q.T @ v)
        return jnp.vdot(v, A(v))

    outside = _estimate(probe, jax.random.split(probe_key, num_samples - 2 * (num_samples // 3)))
    return ldexp(Estimate(inside + outside.mean, outside.standard_error), A.exponent)


def top_eigenpairs(
    product: Product, like: Any, key: Array, num_pairs: int, num_steps: int | None = None
) -> tuple[Array, Any, Array]:
    """The eigenvalues of A of largest modulus, with eigenvectors, by the Lanczos method.

    Args:
      product, like, key: as in `hutchinson_trace`.
      num_pairs: number of eigenpairs.
      num_steps: number of products, and of vectors kept in memory; 4 num_pairs + 20 if it is not given. No more than
        the number of parameters are taken, and then every eigenvalue is exact.

    Returns:
      (eigenvalues, eigenvectors, residuals): eigenvalues (num_pairs,) by decreasing modulus; unit eigenvectors, a
      pytree like `like` with a leading axis of `num_pairs`; residuals ‖Av - λv‖ (num_pairs,), each a bound of the
      distance from λ to an eigenvalue of A, up to the rounding of the product: found by one more product for each.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.curvature import top_eigenpairs
      >>> diagonal = jnp.array([-5.0, 1.0, 3.0])
      >>> eigenvalues, _, _ = top_eigenpairs(lambda v: diagonal * v, diagonal, jax.random.key(0), 2)
      >>> print(eigenvalues.round(4))
      [-5.  3.]

    Reference: Lanczos (1950); Golub and Van Loan, Matrix Computations, section 10.1.
    """
    A, key = _Flat.of(product, like), checks.key("key", key)
    num_pairs = checks.at_least("num_pairs", num_pairs, 1)
    num_steps = 4 * num_pairs + 20 if num_steps is None else checks.at_least("num_steps", num_steps, num_pairs)
    if num_pairs > A.size:
        raise ValueError(f"num_pairs must be at most the number of parameters, {A.size}, got {num_pairs}")
    start_key, key = jax.random.split(key)
    start = jax.random.normal(start_key, (A.size,), A.dtype)
    tridiagonal, basis = lanczos(A, start, key, min(num_steps, A.size))
    eigenvalues, vectors = jnp.linalg.eigh(tridiagonal)
    order = jnp.argsort(-jnp.abs(eigenvalues))[:num_pairs]
    eigenvalues, vectors = eigenvalues[order], vectors[:, order].T @ basis
    residuals = lax.map(lambda pair: jnp.linalg.norm(A(pair[1]) - pair[0] * pair[1]), (eigenvalues, vectors))
    eigenvalues, residuals = ldexp((eigenvalues, residuals), A.exponent)
    return eigenvalues, jax.vmap(A.unravel)(vectors), residuals


class SpectralDensity(NamedTuple):
    """Eigenvalue density of a matrix, as quadrature rules: ∫ f dμ = tr f(A)/n ≈ Σ weights f(nodes), for each probe.

    Args:
      nodes: (num_probes, num_steps), Ritz values.
      weights: (num_probes, num_steps), nonnegative; each row sums to 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.curvature import SpectralDensity
      >>> two = SpectralDensity(jnp.array([[1.0, 3.0]]), jnp.array([[0.5, 0.5]]))
      >>> print(two.mean_of(jnp.square).mean)
      5.0

    Reference: Ghorbani, Krishnan and Xiao, arXiv:1901.10159.
    """

    nodes: Array
    weights: Array

    def mean_of(self, f: Callable[[Array], Array]) -> Estimate:
        """tr f(A) / n, for an element-wise f, with its standard error over the probes."""
        checks.function("f", f)
        return _estimate(lambda rule: jnp.sum(rule.weights * f(rule.nodes)), self)

    def density(self, grid: ArrayLike, width: ArrayLike) -> Array:
        """The density at the points of `grid` (m,), each node a Gaussian of standard deviation `width`."""
        grid = checks.as_float("grid", grid).astype(self.nodes.dtype)
        if grid.ndim != 1:
            raise ValueError(f"grid must be a vector (m,), got shape {grid.shape}")
        width = jnp.asarray(checks.positive("width", width), self.nodes.dtype)
        distance = (grid[:, None, None] - self.nodes[None]) / width
        bumps = jnp.exp(-(distance**2) / 2) / (width * math.sqrt(2 * math.pi))
        return jnp.mean(jnp.sum(self.weights[None] * bumps, -1), -1)


def spectral_density(
    product: Product, like: Any, key: Array, num_steps: int = 50, num_probes: int = 4
) -> SpectralDensity:
    """Density of A's eigenvalues by stochastic Lanczos quadrature.

    Args:
      product, like, key: as in `hutchinson_trace`.
      num_steps: Lanczos steps, one product and one vector in memory each; tr f(A) is exact in expectation over the
        probes for polynomials f of degree up to 2 num_steps - 1.
      num_probes: number of random starting vectors.

    Returns:
      A `SpectralDensity`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.curvature import spectral_density
      >>> diagonal = jnp.array([1.0, 1.0, 2.0, 4.0])
      >>> density = spectral_density(lambda v: diagonal * v, diagonal, jax.random.key(0))
      >>> print(density.mean_of(lambda x: x).mean.round(4))
      2.0

    Reference: Ubaru, Chen and Saad, Fast estimation of tr f(A) via stochastic Lanczos quadrature (2017).
    """
    A, key = _Flat.of(product, like), checks.key("key", key)
    num_steps = min(checks.at_least("num_steps", num_steps, 1), A.size)

    def probe(key):
        start_key, key = jax.random.split(key)
        tridiagonal, _ = lanczos(A, A.signs(start_key), key, num_steps)
        nodes, vectors = jnp.linalg.eigh(tridiagonal)
        return ldexp(nodes, A.exponent), vectors[0] ** 2

    return SpectralDensity(*lax.map(probe, jax.random.split(key, checks.at_least("num_probes", num_probes, 1))))


class _Flat(NamedTuple):
    """A product over pytrees as one over vectors (size,), in one dtype; of 2^-exponent A, whose scale is 1."""

    product: Product
    exponent: Array
    unravel: Callable[[Array], Any]
    size: int
    dtype: Any

    @classmethod
    def of(cls, product: Product, like: Any) -> _Flat:
        checks.function("product", product)
        like = jax.tree.map(lambda leaf: checks.as_loss_float("each array of like", leaf), like)
        checks.float_tree("like", like)
        if not sum(leaf.size for leaf in jax.tree.leaves(like)):
            raise ValueError("like must have at least one entry, got arrays of size 0 alone")
        dtype = dtypes.compute_dtype(dtypes.common_dtype(*jax.tree.leaves(like)))
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: whole(leaf.astype(dtype)), like))
        narrow = lambda v: jax.tree.map(lambda leaf, x: sharded_like(x, leaf).astype(x.dtype), unravel(v), like)

        def flat_product(v):
            v = narrow(v)
            Av = product(v)
            checks.same_tree("product(v)", Av, "v", v)
            return ravel_pytree(jax.tree.map(lambda leaf: whole(leaf.astype(dtype)), Av))[0]

        generic = unit(jax.random.normal(jax.random.key(0), flat.shape, dtype))
        exponent = scale_of(flat_product, generic) + jnp.frexp(jnp.sqrt(flat.size))[1]  # of A, not of its mean entry
        return cls(scaled(flat_product, exponent, flat), exponent, narrow, flat.size, dtype)

    def __call__(self, v: Array) -> Array:
        return self.product(v)

    def signs(self, key: Array) -> Array:
        return jax.random.rademacher(key, (self.size,), self.dtype)


def _estimate(probe: Callable[[Any], Array], inputs: Any) -> Estimate:
    """Mean and standard error of `probe` over the leading axis of `inputs`, by running sums: one value in memory."""

    def add(state, at):
        count, mean, squares = state
        value, count = probe(at), count + 1
        change = value - mean
        mean = mean + change / count
        return (count, mean, squares + change * (value - mean)), None

    count = len(jax.tree.leaves(inputs)[0])
    shape = jax.eval_shape(lambda inputs: probe(jax.tree.map(lambda leaf: leaf[0], inputs)), inputs)
    zero = jnp.zeros(shape.shape, shape.dtype)
    (_, mean, squares), _ = lax.scan(add, (jnp.zeros((), shape.dtype), zero, zero), inputs)
    return Estimate(mean, jnp.full_like(mean, jnp.inf) if count == 1 else jnp.sqrt(squares / (count * (count - 1))))
