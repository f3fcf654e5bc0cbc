"""Second derivatives of the heads in their logits, as operators: Hessian, Gauss-Newton and Fisher.

Every head with a closed form enters it beneath its rule: Pᵀ diag(d) P + U C Uᵀ with at most one
vector in U (`jaxsoftmax.operators`). Where the logits are capped first, x = x(z) with t = ∂x/∂z and g = ∂L/∂x,

    ∂²L/∂z² = diag(t) H diag(t) + diag(g ∘ ∂²x/∂z²),    which is diagonal plus low rank as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax.losses.softcap import cap_derivatives, capped
from jaxsoftmax.operators.base import SymmetricOperator


class Curvature(NamedTuple):
    """Second derivatives of a head, for logits whose last axis is the operators' K.

    Args:
      hessian: of the loss of each example; for a head that works element by element, of its sum over the last axis.
      gauss_newton: its Gauss-Newton part, as `logits_ggn` describes it.
      fisher: None where the head is no likelihood.

    Example:
      >>> from jaxsoftmax.losses import Curvature
      >>> Curvature._fields
      ('hessian', 'gauss_newton', 'fisher')
    """

    hessian: SymmetricOperator
    gauss_newton: SymmetricOperator
    fisher: SymmetricOperator | None = None

    def scaled(self, weight: ArrayLike) -> Curvature:
        """All of them times a number, or an array that broadcasts to the batch axes."""
        return Curvature(*(None if operator is None else operator.scaled(weight) for operator in self))  # pyright: ignore[reportArgumentType]


_CURVATURE: dict[Callable, Callable[..., Curvature]] = {}
_JITTED = type(jax.jit(lambda x: x))


def curvature_of(*losses: Callable) -> Callable:
    """Make `logits_hessian`, `logits_ggn`, `logits_fisher` and what stands on them know a head: a decorator.

    Args:
      *losses: the heads, (logits, …) -> one value per example, logits (..., K), jitted or not.

    Returns:
      A decorator of the function that returns their `Curvature`. It gets all arguments of the head by name, defaults
      too.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> from jaxsoftmax import logits_hessian, softmax_cross_entropy, softmax_entropy
      >>> from jaxsoftmax.losses import Curvature, curvature_of
      >>> def penalized(logits, labels, beta=0.1):
      ...     return softmax_cross_entropy(logits, labels) - beta * softmax_entropy(logits)
      >>> @curvature_of(penalized)
      ... def curvature(logits, labels, beta):
      ...     J = logits_hessian(softmax_cross_entropy, logits, labels)
      ...     return Curvature(J - beta * logits_hessian(softmax_entropy, logits), J)
      >>> logits, labels = jnp.array([2.0, 1.0, 0.5]), jnp.array([0.0, 0.5, 0.5])
      >>> H = logits_hessian(penalized, logits, labels, beta=0.5)
      >>> print(abs(H.as_matrix() - jax.hessian(penalized)(logits, labels, 0.5)).max() < 1e-7)
      True

    Reference: docs/mathematics.md, section 4.
    """

    def enter(rule: Callable[..., Curvature]) -> Callable[..., Curvature]:
        _CURVATURE.update({head: _bound(rule, inspect.signature(head)) for head in heads})
        return rule

    heads = [_plain(checks.function("each of losses", loss), {})[0] for loss in losses]  # also under their jitted names
    return enter


def _bound(rule: Callable[..., Curvature], signature: inspect.Signature) -> Callable[..., Curvature]:
    """`rule` called as the loss of this signature is, so that a default stands in the loss alone."""

    def call(*args: Any, **kwargs: Any) -> Curvature:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return rule(**given.arguments)

    return call


def logits_hessian(
    loss: Callable,
    logits: ArrayLike,
    *args: Any,
    logit_softcap: ArrayLike | None = None,
    logit_temperature: ArrayLike | None = None,
    **kwargs: Any,
) -> SymmetricOperator:
    """Hessian of a loss head in its logits, as an operator: O(K) memory, no K×K matrix but in `as_matrix`.

    Args:
      loss: a head of this package, such as `softmax_cross_entropy`, jitted or not, or a `functools.partial` of one with
        options.
      logits: floating-point logits (..., K), the class axis last. A head that works element by element gives a
        diagonal operator along the last axis.
      *args: what `loss` takes after the logits.
      logit_softcap: cap c, for the Hessian of loss(softcap_logits(logits, c), …).
      logit_temperature: T, or one per example (...), for that of loss(logits / T, …); with a cap, of
        loss(softcap_logits(logits, c) / T, …).
      **kwargs: the options of `loss`, `where` included; `axis`, if it is given, must be the last. With `axis_name`,
        inside `jax.shard_map`, every vector of the operator is this device's block of classes.

    Returns:
      Operator of shape (..., K, K): mv, @, quadratic_form, diagonal, trace, as_matrix, solve(v, damping),
      logdet(damping), is_psd, and, where that holds, factor_mv and factor_rmv (L Lᵀ = H).

    Raises:
      TypeError: if `loss` is no head with a closed form (it names those that are), and what `loss` itself raises.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> logits = jnp.array([2.0, 1.0, 0.5])
      >>> H = jaxsoftmax.logits_hessian(jaxsoftmax.focal_loss_with_integer_labels, logits, jnp.array(0), gamma=2.0)
      >>> [round(entry, 4) for entry in H.as_matrix()[0].tolist()], bool(H.is_psd())
      ([0.2324, -0.1447, -0.0877], True)

    Reference: docs/mathematics.md, section 4.
    """
    head, x = _at(loss, logits, args, kwargs, logit_softcap, logit_temperature)
    if x is None:
        return head.hessian
    _, scale = checks.inverse("logit_temperature", 1.0 if logit_temperature is None else logit_temperature, x)
    part = classes.part_of_one(head.hessian.axis)
    gradient = jax.grad(lambda x: part * jnp.sum(loss(x * scale, *args, **kwargs)))(x)
    slope, bend = cap_derivatives(*dtypes.widen(jnp.asarray(logits)), logit_softcap)
    return head.hessian.transformed(slope, gradient * bend)


def logits_ggn(
    loss: Callable,
    logits: ArrayLike,
    *args: Any,
    logit_softcap: ArrayLike | None = None,
    logit_temperature: ArrayLike | None = None,
    **kwargs: Any,
) -> SymmetricOperator:
    """Gauss-Newton part of a head's Hessian: positive semidefinite, but for the entropy, which is concave.

    For a convex head it is the Hessian. It is f'J for the focal loss, (Σy) J for the poly loss, J diag(φ″) J for
    Σ φ(p_k), which is J² for Brier (and -J for the entropy); z-loss adds 2ζ ppᵀ. A cap enters with
    its slope only.

    Args:
      loss: a head of this package, or a `functools.partial` of one with options.
      logits: floating-point logits (..., K), as in `logits_hessian`.
      *args: what `loss` takes after the logits.
      logit_softcap: cap c, for loss(softcap_logits(logits, c), …).
      logit_temperature: T, or one per example (...), for loss(logits / T, …).
      **kwargs: the options of `loss`.

    Returns:
      Operator of shape (..., K, K), as `logits_hessian` gives it, with factor_mv and factor_rmv: L Lᵀ = G.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> logits, labels = jnp.array([2.0, 1.0, 0.5]), jnp.array([0.0, 0.0, 1.0])
      >>> H = jaxsoftmax.logits_hessian(jaxsoftmax.brier_loss, logits, labels)
      >>> G = jaxsoftmax.logits_ggn(jaxsoftmax.brier_loss, logits, labels)
      >>> v = jnp.array([1.0, -1.0, 0.0])
      >>> print(H.is_psd(), G.is_psd(), jnp.allclose(G.mv(v), G.factor_mv(G.factor_rmv(v))))
      False True True

    Reference: Schraudolph 2002; Martens 2020, https://arxiv.org/abs/1412.1193; docs/mathematics.md, section 4.
    """
    head, _ = _at(loss, logits, args, kwargs, logit_softcap, logit_temperature)
    return _capped(head.gauss_newton, logits, logit_softcap)


def logits_fisher(
    loss: Callable,
    logits: ArrayLike,
    *args: Any,
    logit_softcap: ArrayLike | None = None,
    logit_temperature: ArrayLike | None = None,
    **kwargs: Any,
) -> SymmetricOperator:
    """Fisher matrix of a likelihood in its logits: F = c E[g gᵀ], g = ∂/∂z of -log p(y|z), y drawn from p(·|z).

    The head names the distribution p(·|z), and every option has a part in F in one of three ways only:
    - what changes the distribution changes p: classes that `where` leaves out, a temperature, a cap;
    - what weighs the example is c, the number of observations that the example with its own label counts for: its class
      weight, 0 where it is ignored or masked, the mass Σy of soft labels, ω y + 1 - y for a positive weight ω;
    - what is no likelihood is left out: z-loss. Label smoothing changes the target, and so c alone, by class weights.
    So F = c J for softmax cross-entropy, c diag(σ(x)σ(-x)) for the logistic loss, I for `l2_loss` (a normal
    distribution of variance 1), 2 I for the squared errors: the Gauss-Newton matrix of c (-log p). The gradient of the
    loss itself at drawn targets has another second moment: weights enter it squared, and with the weight of the draw.

    Args:
      loss: a head of this package that is a negative log-likelihood, or a `functools.partial` of one with options.
      logits: floating-point logits (..., K), as in `logits_hessian`.
      *args: what `loss` takes after the logits; of the targets only the weight matters.
      logit_softcap: cap c, for loss(softcap_logits(logits, c), …).
      logit_temperature: T, or one per example (...), for loss(logits / T, …).
      **kwargs: the options of `loss`.

    Returns:
      Operator of shape (..., K, K), as `logits_hessian` gives it, with factor_mv, factor_rmv (L Lᵀ = F) and
      sample_targets(key, shape=()) and sample_scores(key, shape=()), √c g for as many draws.

    Raises:
      TypeError: if `loss` is no likelihood with a closed form.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> loss, logits = jaxsoftmax.softmax_cross_entropy_with_integer_labels, jnp.array([2.0, 1.0, 0.5])
      >>> F = jaxsoftmax.logits_fisher(loss, logits, jnp.array(0), class_weights=jnp.array([2.0, 1.0, 1.0]))
      >>> g = F.sample_scores(jax.random.key(0), (10000,))
      >>> print(abs(g.T @ g / 10000 - F.as_matrix()).max() < 0.02)
      True

    Reference: Amari 1998; Martens 2020, https://arxiv.org/abs/1412.1193; docs/mathematics.md, section 4.
    """
    head, _ = _at(loss, logits, args, kwargs, logit_softcap, logit_temperature)
    if head.fisher is None:
        raise TypeError(f"loss must be a likelihood to have a Fisher matrix, got {_name(loss)}; see logits_ggn")
    return _capped(head.fisher, logits, logit_softcap)


def operators_of(loss: Callable, arguments: Callable[..., tuple], *static: str) -> Callable:
    """Enter a function as a head's curvature, jitted, of what `arguments` makes of the loss's own: a decorator.

    Class axes, if the head has any, are the last argument, which the function gets as -1 under the name `axis`.
    """

    def enter(operators: Callable[..., Curvature]) -> Callable[..., Curvature]:
        jitted = jax.jit(operators, static_argnames=static, inline=True)
        curvature_of(loss)(lambda **given: jitted(*_on_last_axis(*arguments(**given))))
        return operators

    return enter


def _on_last_axis(*arguments: Any) -> list:
    """The checked arguments of a head, logits first, class axes at the end, which must be the last axis, as -1."""
    *kept, axes = arguments
    if not isinstance(axes, classes.ClassAxis):
        return list(arguments)
    last = kept[0].ndim - 1
    if axes.positions != (last,):
        raise ValueError(f"axis must be the last, {last}, for an operator in the logits, got {axes.positions}; move it")
    return [*kept, classes.ClassAxis((-1,), axes.mesh_axes)]


def only_examples(mask: Array | None, x: Array, axis: classes.Axis) -> Array:
    """x (..., K) or (..., 1), and 0 where the mask leaves no class of the example."""
    return x if mask is None else jnp.where(classes.any(mask, axis), x, 0.0)


def _at(loss, logits, args, kwargs, softcap, temperature) -> tuple[Curvature, Array | None]:
    """The head's curvature in the capped logits, and these, None if there is no cap."""
    loss, options = _plain(loss, kwargs)
    head = _head(loss)
    if "axis_name" in options and "axis_name" not in inspect.signature(loss).parameters:
        raise TypeError(
            f"axis_name={options['axis_name']!r} splits the classes of a head, and {_name(loss)} works element by "
            "element: its operator on this device's block needs no axis_name"
        )
    logits = checks.as_loss_float("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have a last axis with at least one class, got shape {logits.shape}")
    x = None if softcap is None else capped(*dtypes.widen(logits), checks.positive("logit_softcap", softcap))
    logits = logits if x is None else x
    if temperature is None:
        return head(logits, *args, **options), x
    (wide,) = dtypes.widen(logits)
    scale, beside_classes = checks.inverse("logit_temperature", temperature, wide)
    return head(wide * beside_classes, *args, **options).scaled(scale * scale), x


def _capped(operator: SymmetricOperator, logits: ArrayLike, cap: ArrayLike | None) -> SymmetricOperator:
    """A Gauss-Newton operator in the logits, from the one in the capped logits."""
    return (
        operator if cap is None else operator.transformed(cap_derivatives(*dtypes.widen(jnp.asarray(logits)), cap)[0])
    )


def _head(loss: Callable) -> Callable[..., Curvature]:
    if not callable(loss) or loss not in _CURVATURE:
        known = ", ".join(sorted(head.__name__ for head in _CURVATURE))
        raise TypeError(f"loss must be a head with a closed form ({known}), or a partial of one, got {_name(loss)}")
    return _CURVATURE[loss]


def _plain(loss: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The head itself of a partial or jitted one, and its options: those of a partial, and `options` before them."""
    while isinstance(loss, _JITTED) or isinstance(loss, functools.partial) and not loss.args:
        if isinstance(loss, functools.partial):
            loss, options = loss.func, {**loss.keywords, **options}
        else:
            loss = cast(Any, loss).__wrapped__
    return loss, options


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", repr(loss))
