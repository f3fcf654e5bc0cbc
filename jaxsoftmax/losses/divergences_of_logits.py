"""Divergences between the distributions of two vectors of logits, x of the model and z of the target.

    p = softmax(x),    q = softmax(z),    ρ = log p - log q,
    KL(q‖p) = Σ q (exp(ρ) - 1 - ρ),                ∂/∂x = p - q,                       ∂²/∂x² = J(p),
    JS(p, q) = Σ (p + q)/2 (log 2 - H(σ(ρ))),      ∂/∂x = ½ J(p) log 2σ(ρ),

with H the entropy of a pair. No term is negative, and each is of second order in ρ, so that near-equal logits cost no
digits: ρ comes from x - z, never from two logarithms. (Σ q (exp(ρ) - 1) = 0, so the first sum is -Σ q ρ.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import jacobian_product
from jaxsoftmax._core.forms_of_two import apart, apart_plainly, divergence_terms, is_near, sums_on_cpu
from jaxsoftmax._core.forms_of_two import log_ratio as log_ratio_of
from jaxsoftmax._core.scalar_functions import log_double_sigmoid, missing_bits, sigmoid, softplus
from jaxsoftmax._core.tracing import traced_once
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.losses.cross_entropy import draw_one_hot, soft_label_score
from jaxsoftmax.losses.entropy_brier import of_probabilities
from jaxsoftmax.losses.head import checked_logits
from jaxsoftmax.losses.hessian import Curvature, only_examples, operators_of
from jaxsoftmax.losses.likelihood import Likelihood
from jaxsoftmax.losses.temperature import as_temperature, in_logits, tempered
from jaxsoftmax.maps.softmax import AxisLike, AxisName, log_softmax_of, probabilities, softmax_of
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian


def softmax_kl_divergence(
    logits: ArrayLike,
    target_logits: ArrayLike,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    *,
    axis_name: AxisName = None,
) -> Array:
    """KL(target‖model) between softmax(target_logits / T) and softmax(logits / T): the loss of distillation.

    It is never negative, and 0 where the logits differ by a constant. Its gradient in the logits is (p - q) / T;
    multiply by T² to keep its size while T varies (Hinton et al.).

    Args:
      logits: floating-point logits of the model; `axis` counts the classes.
      target_logits: floating-point logits of the target, of a shape that broadcasts to that of `logits`.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask of the shape of the result (False: the example is absent, with loss 0 and gradient 0), else
        one that broadcasts to `logits` (False: the class is absent from both).
      temperature: T > 0, which divides both; one number, or one per example.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Divergence per example, of the shape of `logits` without `axis`; float32 for half precision, else of the common
      dtype of both. +inf where the target has a class that the model excludes. Differentiable in all three.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> target = jnp.array([2.0, 1.0, 0.5])
      >>> logits = target + jnp.array([0.0, 2.0**-14, 0.0])
      >>> print(jaxsoftmax.softmax_kl_divergence(logits, target), jaxsoftmax.softmax_kl_divergence(target, target))
      3.31106e-10 0.0

    Reference: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; docs/mathematics.md, sections 4 and 5.
    """
    return _apply(kl, *_arguments(logits, target_logits, axis, where, temperature, axis_name))


def jensen_shannon_divergence(
    logits: ArrayLike,
    target_logits: ArrayLike,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    *,
    axis_name: AxisName = None,
) -> Array:
    """Jensen-Shannon divergence of p = softmax(logits / T), q = softmax(target_logits / T): ½KL(p‖m) + ½KL(q‖m).

    m = (p + q)/2. It is symmetric and lies in [0, log 2].

    Args:
      logits: floating-point logits of the model; `axis` counts the classes.
      target_logits: floating-point logits of the target, of a shape that broadcasts to that of `logits`.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask of the shape of the result (False: the example is absent, with loss 0 and gradient 0), else
        one that broadcasts to `logits` (False: the class is absent from both).
      temperature: T > 0, which divides both; one number, or one per example.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Divergence per example, of the shape of `logits` without `axis`; float32 for half precision, else of the common
      dtype of both. Differentiable in all three.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> logits = jnp.array([[2.0, 1.0, 0.5], [jnp.inf, 0.0, 0.0]])
      >>> print(jaxsoftmax.jensen_shannon_divergence(logits, jnp.array([0.0, 0.0, jnp.inf])).round(4))
      [0.4806 0.6931]

    Reference: Lin 1991, https://doi.org/10.1109/18.61115; `scipy.spatial.distance.jensenshannon` is its square root.
    """
    return _apply(jensen_shannon, *_arguments(logits, target_logits, axis, where, temperature, axis_name))


def _arguments(logits, target_logits, axis, where, temperature, axis_name) -> tuple:
    logits, mask, axes = checked_logits(logits, axis, axis_name, where)
    remedy = "class indices go to softmax_cross_entropy_with_integer_labels, other integers as .astype(float)"
    targets = checks.as_loss_float("target_logits", target_logits, remedy)
    targets = checks.broadcast("target_logits", targets, logits.shape)
    return logits, targets, mask, as_temperature(temperature, logits, axes), axes


@functools.partial(jax.jit, static_argnames=("divergence", "axes"), inline=True)
def _apply(divergence, logits, targets, mask, temperature, axes) -> Array:
    (x, z, mask), axis = classes.one_axis(axes, *dtypes.widen(logits, targets), mask)
    (x, z), axis = tempered(temperature, axis, *(classes.present(a, mask, axis) for a in (x, z)))
    return classes.absent_examples(divergence(x, z, axis), mask, axis)


# Rules. x and z are floating arrays of at least float32.


class Sums(NamedTuple):
    """What has to be known of two rows of logits to compare their distributions class by class; class axis 1."""

    top_x: Array  # max x
    total_x: Array  # Σ exp(x - max x)
    top_z: Array
    total_z: Array
    mean: Array  # δ̄ = Σ q δ, with δ = (x - max x) - (z - max z)
    excess: Array  # log Σ q exp(δ - δ̄), which is KL(q‖p), unless that is large

    @property
    def change(self) -> Array:
        """log Σ q exp δ but for cancellation."""
        return jnp.log(self.total_x) - jnp.log(self.total_z)

    @property
    def kl(self) -> Array:
        return jnp.where(is_near(self.change, self.mean), self.excess, self.change - self.mean)

    def ratio(self, gap: Array) -> Array:
        """ρ = log p - log q of δ."""
        return log_ratio_of(gap, self.change, self.mean, self.excess)


@traced_once
def compare(x: Array, z: Array, axis: classes.Axis) -> Sums:
    """The sums over the classes. Never differentiated.

    With δ̄ = Σ q δ and d = δ - δ̄, KL(q‖p) = log Σ q exp(d) = log1p(Σ q (exp(d) - 1 - d)), which keeps its digits for
    near-equal logits, and ρ = d - KL. Far from equal it is the difference of two logarithms.
    """
    return _compared(_sums, x, z, axis)


@traced_once
def compare_in_one_pass(x: Array, z: Array, axis: classes.Axis) -> Sums:
    """As `compare` but for the excess, which is off by eps |δ|: ρ at every class alike.

    The Jensen-Shannon divergence is stationary in a constant that is added to ρ, and J takes it to 0.
    """
    return _compared(_sums_in_one_pass, x, z, axis)


def _compared(sums: Callable, x: Array, z: Array, axis: classes.Axis) -> Sums:
    x, z = lax.stop_gradient((x, z))
    plain = functools.partial(sums, axis=axis)
    if classes.is_split(axis):
        return Sums(*plain(x, z))
    top = functools.partial(classes.top, axis=axis)
    on_cpu = functools.partial(sums_on_cpu, axis=classes.positions(axis)[0] % x.ndim, top=top)
    return Sums(*lax.platform_dependent(x, z, cpu=on_cpu, default=plain))


def _sums(x: Array, z: Array, axis: classes.Axis) -> tuple[Array, ...]:
    top_x, top_z = classes.top(x, axis), classes.top(z, axis)

    def exponentials(x, z):
        below_x, below_z, gap = apart_plainly(x, z, top_x, top_z)
        return jnp.exp(below_x), jnp.exp(below_z), gap

    of_x, of_z, gap = exponentials(x, z)
    total_x, total_z = classes.sum(of_x, axis), classes.sum(of_z, axis)
    mean = classes.sum(jnp.where(of_z > 0, of_z * gap, 0.0), axis) / total_z
    of_x, of_z, gap = exponentials(*classes.reread(axis, x, z))
    grown = of_x * (jnp.exp(jnp.minimum(-mean, 80)) / total_z)  # q exp(d)
    near = classes.sum(divergence_terms(of_z / total_z, gap - mean, grown), axis)
    return top_x, total_x, top_z, total_z, mean, jnp.log1p(near)


def _sums_in_one_pass(x: Array, z: Array, axis: classes.Axis) -> tuple[Array, ...]:
    """log Σ q exp(δ) = log1p(Σ q (exp(δ) - 1)), unless that is large."""
    top_x, top_z = classes.top(x, axis), classes.top(z, axis)
    below_x, below_z, gap = apart_plainly(x, z, top_x, top_z)
    of_x, of_z = jnp.exp(below_x), jnp.exp(below_z)
    grown = jnp.where(jnp.abs(gap) < 1, of_z * jnp.expm1(jnp.clip(gap, -1, 1)), of_x - of_z)
    terms = of_x, of_z, jnp.where(of_z > 0, of_z * gap, 0.0), grown
    total_x, total_z, moment, grown = (classes.sum(a, axis) for a in terms)
    mean, grown = moment / total_z, grown / total_z
    change = jnp.where(jnp.abs(grown) < 0.5, jnp.log1p(grown), jnp.log(total_x) - jnp.log(total_z))
    return top_x, total_x, top_z, total_z, mean, change - mean


def class_by_class(x: Array, z: Array, sums: Sums) -> tuple[Array, Array, Array]:
    """p, q and ρ = log p - log q, class by class; ρ is huge, but finite, where just one of the two excludes a class."""
    below_x, below_z, gap = apart(x, z, sums.top_x, sums.top_z)
    ratio = jnp.clip(sums.ratio(gap), -dtypes.largest(x.dtype) / 16, dtypes.largest(x.dtype) / 16)
    return jnp.exp(below_x) / sums.total_x, jnp.exp(below_z) / sums.total_z, ratio


def distributions(x: Array, z: Array, sums: Sums, axis: classes.Axis) -> tuple[Array, Array]:
    """p and q, differentiable in x and z, which fix the sums."""
    return probabilities(x, sums.top_x, sums.total_x, axis), probabilities(z, sums.top_z, sums.total_z, axis)


@custom_vjp(nondiff_argnums=(2,))
def kl(x: Array, z: Array, axis: classes.Axis) -> Array:
    """KL(q‖p), with the class axis kept."""
    return compare(x, z, axis).kl if x.size else classes.sum(x, axis)


def _kl_fwd(x, z, axis):
    return kl(x, z, axis), (x, z, compare(x, z, axis))


def _kl_bwd(axis, residuals, ct):
    ct, (x, z, sums) = classes.shared_cotangent(ct, axis), residuals
    sums, x, z = classes.afresh(compare, sums, axis, x, z)
    x, z = classes.reread(axis, x, z, second=True)
    ratio = jnp.where(z == -jnp.inf, 0.0, log_ratio(x, z, sums, axis))
    _, q = distributions(x, z, sums, axis)
    return ct * difference(x, z, sums, axis), -ct * jacobian_product(ratio, q, axis)


kl.defvjp(_kl_fwd, _kl_bwd)


@custom_vjp(nondiff_argnums=(2,))
def jensen_shannon(x: Array, z: Array, axis: classes.Axis) -> Array:
    """½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2, with the class axis kept."""
    p, q, ratio = class_by_class(*classes.reread(axis, x, z), compare_in_one_pass(x, z, axis))
    return classes.sum((p + q) / 2 * missing_bits(ratio), axis)


def _jensen_shannon_fwd(x, z, axis):
    return jensen_shannon(x, z, axis), (x, z, compare_in_one_pass(x, z, axis))


def _jensen_shannon_bwd(axis, residuals, ct):
    ct, (x, z, sums) = classes.shared_cotangent(ct, axis), residuals
    sums, x, z = classes.afresh(compare_in_one_pass, sums, axis, x, z)
    x, z = classes.reread(axis, x, z, second=True)
    ratio = jnp.clip(log_ratio(x, z, sums, axis), -1e3, 1e3)  # p or q is 0 beyond
    p, q = distributions(x, z, sums, axis)
    dx, dz = (jacobian_product(log_share(v, sums.kl), of, axis) for v, of in ((ratio, p), (-ratio, q)))
    return ct * dx / 2, ct * dz / 2


jensen_shannon.defvjp(_jensen_shannon_fwd, _jensen_shannon_bwd)


@custom_vjp
def log_share(ratio: Array, divergence: Array) -> Array:
    """log(2σ(ρ)) = log(p/m) but for a constant, which J takes to 0: log σ(ρ) where p and q are far from each other.

    Where p is there, the first is near 0 if the two are close, and the second if they are far.
    """
    return jnp.where(divergence > 1, -softplus(-ratio), log_double_sigmoid(ratio))


log_share.defvjp(None, lambda residuals, ct: (ct * sigmoid(-residuals[0]), None))


@custom_vjp(nondiff_argnums=(3,))
def difference(x: Array, z: Array, sums: Sums, axis: classes.Axis) -> Array:
    """p - q: q (exp(ρ) - 1) where the two are close; differentiable in x and z, which fix the sums."""
    p, q, ratio = class_by_class(x, z, sums)
    return jnp.where((jnp.abs(ratio) < 1) & (q > 0), q * jnp.expm1(ratio), p - q)


def _difference_bwd(axis, residuals, g):
    p, q = distributions(*residuals, axis)
    return jacobian_product(g, p, axis), -jacobian_product(g, q, axis), None


difference.defvjp(None, _difference_bwd)


@custom_vjp(nondiff_argnums=(3,))
def log_ratio(x: Array, z: Array, sums: Sums, axis: classes.Axis) -> Array:
    """ρ = log p - log q; differentiable in x and z, which fix the sums."""
    return class_by_class(x, z, sums)[2]


def _log_ratio_bwd(axis, residuals, g):
    pull_x, pull_z = (jax.vjp(lambda a: log_softmax_of(a, axis), a)[1] for a in residuals[:2])
    return *pull_x(g), *pull_z(-g), None


log_ratio.defvjp(None, _log_ratio_bwd)


# Hessians.


@operators_of(softmax_kl_divergence, _arguments, "axis")
def _kl_operators(logits, targets, mask, temperature, axis) -> Curvature:
    (x,) = dtypes.widen(logits)
    (x,), _ = tempered(temperature, axis, classes.present(x, mask, axis))
    p = softmax_of(x, axis)
    count = only_examples(mask, jnp.ones_like(classes.max(lax.stop_gradient(p), axis)), axis)
    model = Likelihood(x, count, _draw_target_logits, _target_score)
    hessian, fisher = (SoftmaxJacobian(p, count, kind, axis, x) for kind in (None, model))
    return in_logits(Curvature(hessian, hessian, fisher), temperature)


def _draw_target_logits(key: Array, x: Array, shape: tuple[int, ...]) -> Array:
    return jnp.log(draw_one_hot(key, x, shape))


def _target_score(x: Array, target_logits: Array) -> Array:
    return soft_label_score(x, jnp.exp(target_logits))


@operators_of(jensen_shannon_divergence, _arguments, "axis")
def _jensen_shannon_operators(logits, targets, mask, temperature, axis) -> Curvature:
    # φ″ = 1/(2p) - 1/(2(p + q)), so b = φ″ p² = ½ p σ(-ρ).
    x, z = (classes.present(a, mask, axis) for a in dtypes.widen(logits, targets))
    (x, z), _ = tempered(temperature, axis, x, z)
    sums = compare_in_one_pass(x, z, axis)
    ratio, p = jnp.clip(log_ratio(x, z, sums, axis), -1e3, 1e3), softmax_of(x, axis)
    gradient = jacobian_product(log_share(ratio, sums.kl), p, axis) / 2
    return in_logits(of_probabilities(p, p * sigmoid(-ratio) / 2, gradient, mask, axis), temperature)
