"""Laplace approximation of a network's last layer: a posterior over its weights from the Gauss-Newton matrix.

With features φ (a 1 appended where there is a bias), logits z = Wφ, head Hessians H_i and prior N(0, I/δ) on W,

    posterior N(W, Σ),   Σ⁻¹ = G + δI,   G = Σ_i H_i ⊗ φ_i φ_iᵀ,   z | φ ~ N(Wφ, (I⊗φ)ᵀ Σ (I⊗φ)),
    log evidence = -Σ_i l_i - ½ δ‖W‖² + ½ n log δ - ½ logdet(G + δI).

One eigendecomposition of G serves every δ. What is predicted follows from the head: probabilities by softmax, or by the
sigmoid of each logit, or a normal distribution for the squared errors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax._core import checks
from jaxsoftmax._core.mesh import tensordot
from jaxsoftmax._core.scalar_functions import sigmoid
from jaxsoftmax.curvature.batches import options_per_example, sum_over_batches
from jaxsoftmax.curvature.logit_products import hessian_product
from jaxsoftmax.losses import (
    safe_softmax_cross_entropy,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from jaxsoftmax.losses.regression import VARIANCE
from jaxsoftmax.maps.softmax import softmax

Affine = tuple[Array, Array | None]  # W and b
CATEGORICAL = softmax_cross_entropy, safe_softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
MAPS = dict.fromkeys(CATEGORICAL, softmax) | {sigmoid_binary_cross_entropy: sigmoid} | dict.fromkeys(VARIANCE)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layer", "eigenvalues", "eigenvectors", "total_loss", "prior_precision"],
    meta_fields=["head"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class LastLayerLaplace:
    """The posterior over a last layer; made by `last_layer_laplace`. A pytree.

    Args:
      layer: the trained layer, the pair of W (K, D) and b (K,) or None: the mean.
      eigenvalues: of G, (n,), with n = K (D + 1), or K D without a bias.
      eigenvectors: of G, (K, D + 1, n) or (K, D, n).
      total_loss: Σ_i l_i at the mean.
      prior_precision: δ.
      head: the loss without its options.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import softmax_cross_entropy_with_integer_labels as loss
      >>> from jaxsoftmax.curvature import last_layer_laplace
      >>> posterior = last_layer_laplace((jnp.eye(2), None), jnp.eye(2), jnp.array([0, 1]), loss, prior_precision=1.0)
      >>> print([round(float(p), 2) for p in posterior.probabilities(jnp.array([3.0, 0.0]))])  # softmax says 0.95
      [0.82, 0.18]

    Reference: Daxberger et al., Laplace Redux, arXiv:2106.14806.
    """

    layer: Affine
    eigenvalues: Array
    eigenvectors: Array
    total_loss: Array
    prior_precision: Array
    head: Callable

    def logits(self, features: ArrayLike) -> tuple[Array, Array]:
        """Mean (..., K) and covariance (..., K, K) of the logits at features (..., D)."""
        features = _features(features, self.layer)
        phi = _with_one(features, self.layer)
        precisions = jnp.maximum(self.eigenvalues + self.prior_precision, jnp.finfo(self.eigenvalues.dtype).tiny)
        deviations = 1 / jnp.sqrt(precisions)
        roots = jnp.einsum("...d,kdn,n->...kn", phi, self.eigenvectors, deviations)
        return _affine(self.layer, features), jnp.einsum("...kn,...ln->...kl", roots, roots)

    def predictive(self, features: ArrayLike) -> tuple[Array, Array]:
        """Mean (..., K) and covariance (..., K, K) of new targets: for the heads that are squared errors."""
        if self.head not in VARIANCE:
            raise TypeError(f"predictive is for squared errors; {self.head.__name__} has probabilities")
        mean, covariance = self.logits(features)
        noise = VARIANCE[self.head] * jnp.eye(mean.shape[-1], dtype=mean.dtype)
        return mean, covariance + jnp.expand_dims(noise, tuple(range(mean.ndim - 1)))

    def probabilities(self, features: ArrayLike, key: Array | None = None, num_samples: int = 100) -> Array:
        """Predictive probabilities (..., K), of classes or of each bit, averaged over the posterior.

        Without a key, MacKay's approximation: softmax or sigmoid of z_k / √(1 + π/8 Var z_k); with one, the mean over
        draws of z. A TypeError for squared errors, which have `predictive`.
        """
        checks.at_least("num_samples", num_samples, 1)
        of_logits = MAPS[self.head]
        if of_logits is None:
            raise TypeError(f"probabilities are for classification; {self.head.__name__} has predictive(features)")
        mean, covariance = self.logits(features)
        if key is None:
            variance = jnp.diagonal(covariance, axis1=-2, axis2=-1)
            return of_logits(mean / jnp.sqrt(1 + math.pi / 8 * variance))
        # The covariance may be singular: a symmetric root, not Cholesky's.
        values, vectors = jnp.linalg.eigh(covariance)
        noise = jax.random.normal(checks.key("key", key), (num_samples, *mean.shape), mean.dtype)
        roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
        return jnp.mean(of_logits(mean[None] + jnp.einsum("...kl,s...l->s...k", roots, noise)), 0)

    def log_evidence(self, prior_precision: ArrayLike | None = None) -> Array:
        """Log marginal likelihood of the data, with -l for the log-likelihood, at this or another prior precision."""
        known = prior_precision is None
        precision = self.prior_precision if known else checks.positive("prior_precision", prior_precision)
        precision, size = jnp.asarray(precision, self.eigenvalues.dtype), _squared_norm(self.layer)
        fit = -self.total_loss - jnp.where(size == 0, 0.0, precision * size) / 2
        share = jnp.where(self.eigenvalues == 0, 0.0, self.eigenvalues / precision)
        return fit - jnp.sum(jnp.log1p(share)) / 2

    def with_best_prior(self, num_steps: int = 100) -> LastLayerLaplace:
        """The posterior with the prior precision that maximizes the evidence, W held fixed, by MacKay's iteration.

        It is inf where W = 0, and 0 where the data have no curvature: there the evidence only rises, or only falls.
        """
        size = _squared_norm(self.layer)

        def step(_, precision):
            some = self.eigenvalues > 0
            shares = self.eigenvalues / jnp.where(some, self.eigenvalues + precision, 1.0)
            effective = jnp.sum(jnp.where(some, shares, 0.0))  # parameters that the data fix
            return jnp.where(size == 0, jnp.inf, effective / size)

        best = lax.fori_loop(0, checks.at_least("num_steps", num_steps, 0), step, self.prior_precision)
        return dataclasses.replace(self, prior_precision=best)


def last_layer_laplace(
    layer: Affine,
    features: ArrayLike,
    labels: Any,
    loss: Callable[[Array, Any], Array],
    *,
    prior_precision: float = 1.0,
    batch_size: int = 256,
) -> LastLayerLaplace:
    """Posterior over the last layer of a trained network.

    Args:
      layer: the layer, the pair of W (K, D) and b (K,) or None, such as a `network.Layer`.
      features: what it receives for the training data, (N, D).
      labels: the data's labels, leading with N.
      loss: what it was trained with, -log p(label | logits): a softmax or sigmoid cross-entropy or a squared error of
        this library, or a `functools.partial` of one with options.
      prior_precision: δ > 0, as of a weight decay ½δ‖W‖² on the sum of the losses; `with_best_prior` fits it.
      batch_size: examples at a time; the memory is that of G, K² D² numbers.

    Returns:
      A `LastLayerLaplace`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, softmax_cross_entropy_with_integer_labels
      >>> from jaxsoftmax.curvature import last_layer_laplace
      >>> (layer,) = network.init(jax.random.key(0), (4, 3))
      >>> loss = softmax_cross_entropy_with_integer_labels
      >>> posterior = last_layer_laplace(layer, jnp.eye(4), jnp.array([0, 1, 2, 0]), loss)
      >>> mean, covariance = posterior.logits(jnp.ones((5, 4)))
      >>> mean.shape, covariance.shape
      ((5, 3), (5, 3, 3))

    Reference: MacKay, The evidence framework applied to classification networks (1992); arXiv:2106.14806.
    """
    if not isinstance(layer, tuple | list) or len(layer) != 2:
        raise TypeError(f"layer must be the pair (W, b), or (W, None), got {type(layer).__name__}")
    head: Any = checks.function("loss", loss)
    while isinstance(head, functools.partial) and not head.args:
        head = head.func
    if head not in MAPS:
        names = ", ".join(sorted(known.__name__ for known in MAPS))
        raise TypeError(f"loss must be one of {names}, got {getattr(head, '__name__', head)}")
    prior_precision = checks.positive("prior_precision", prior_precision)
    checks.at_least("batch_size", batch_size, 1)
    checks.float_tree("layer", layer)
    shapes = [checks.as_array("each part of layer", leaf).shape for leaf in layer if leaf is not None]
    if len(shapes[0]) != 2 or shapes[1:] not in ([], [shapes[0][:1]]):
        raise ValueError(f"layer must have W of shape (K, D) and b of shape (K,), got {shapes}")
    features = _features(features, layer)
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, {shapes[0][1]}), got {features.shape}")
    labels = jax.tree.map(lambda leaf: checks.as_array("labels", leaf), labels)
    if any(leaf.shape[:1] != features.shape[:1] for leaf in jax.tree.leaves(labels)):
        got = [leaf.shape for leaf in jax.tree.leaves(labels)]
        raise ValueError(f"labels must lead with the {len(features)} examples of features, got shapes {got}")
    G, total = _gauss_newton_matrix(loss, batch_size, layer, features, labels)
    eigenvalues, eigenvectors = jnp.linalg.eigh(G)
    eigenvectors = eigenvectors.reshape(len(layer[0]), -1, len(eigenvalues))
    precision = jnp.asarray(prior_precision, G.dtype)
    return LastLayerLaplace(layer, jnp.maximum(eigenvalues, 0), eigenvectors, total, precision, head)


def _gauss_newton_matrix(loss, batch_size, layer, features, labels):
    """G and the total loss, over slices of the data."""
    num_classes, width = len(layer[0]), _with_one(features[:1], layer).shape[1]
    classes = jnp.eye(num_classes, dtype=features.dtype)

    def of_batch(data):
        features, labels, options = data
        z, phi = _affine(layer, features), _with_one(features, layer)
        columns = lambda k: hessian_product(loss, z, labels, options, jnp.broadcast_to(k, z.shape))
        H = jax.vmap(columns, out_axes=1)(classes)  # (B, K, K)
        G = jnp.einsum("bkl,bi,bj->kilj", H, phi, phi)
        return G.reshape(2 * (num_classes * width,)), jnp.sum(loss(z, labels, **options))

    options = options_per_example(loss, (len(features), num_classes))
    like = jnp.zeros(2 * (num_classes * width,), features.dtype), jnp.zeros((), features.dtype)
    return sum_over_batches(of_batch, (features, labels, options), batch_size, like)


def _features(features: ArrayLike, layer: Affine) -> Array:
    features = checks.as_float("features", features)
    shape = jnp.shape(layer[0])
    if features.ndim == 0 or features.shape[-1] != shape[1]:
        raise ValueError(f"features must have shape (..., {shape[1]}) for W of {shape}, got {features.shape}")
    return features


def _affine(layer: Affine, features: Array) -> Array:
    W, b = layer
    z = tensordot(features, W, (-1, 1))
    return z if b is None else z + jnp.broadcast_to(b, z.shape)


def _with_one(features: Array, layer: Affine) -> Array:
    """The features, and a 1 that multiplies the bias."""
    return features if layer[1] is None else jnp.concatenate([features, jnp.ones_like(features[..., :1])], -1)


def _squared_norm(layer: Affine) -> Array:
    return sum((jnp.sum(leaf**2) for leaf in layer if leaf is not None), jnp.zeros((), layer[0].dtype))
