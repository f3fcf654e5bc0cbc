"""Quotients whose derivatives keep their digits and stay in range, among them those in the logarithm of a probability.

    dp = p dl,    d(v/p) = dv/p - (v/p) dl,    l = log p:

in l the derivatives of a reciprocal are no larger than itself. In p they grow with every order by a factor 1/p, which
leaves float32 long before p does: where p is 1e-20, the derivative of 1/p is 1e40. The logits z give dl without a
quotient, dl = dz - <p, dz>, so an operator that knows them hands them on.
"""

import functools

import jax.numpy as jnp
from jax import Array

from jaxsoftmax._core import classes
from jaxsoftmax._core.centring import about_centred, centred_transpose
from jaxsoftmax._core.mesh import aligned
from jaxsoftmax.autodiff import custom_vjp


def quotient(x: Array, y: Array) -> Array:
    """x / y. JAX's own derivative divides by y², which leaves the numbers of its dtype before the result does."""
    return _quotient(*_of_one_type(x, y))


def _of_one_type(x: Array, y: Array) -> tuple[Array, Array]:
    return aligned(*jnp.broadcast_arrays(x, y))


@custom_vjp
def _quotient(x: Array, y: Array) -> Array:
    return x / y


def _quotient_fwd(x, y):
    ratio = _quotient(x, y)
    return ratio, (y, ratio)


def _quotient_bwd(residuals, ct):
    y, ratio = residuals
    of_x = _quotient(ct, y)
    return of_x, -of_x * ratio


def _quotient_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    ratio = _quotient(x, y)
    return ratio, _quotient(dx, y) - ratio * _quotient(dy, y)


_quotient.defvjp(_quotient_fwd, _quotient_bwd, jvp=_quotient_jvp)  # of the transpose JAX's own derivative has 1/y²


def share(x: Array, y: Array) -> Array:
    """x / (x + y), with derivatives (y dx - x dy)/(x + y)² from the share of y: 1 - x/(x + y) would cancel."""
    return _share(*_of_one_type(x, y))


@custom_vjp
def _share(x: Array, y: Array) -> Array:
    return x / (x + y)


def _share_bwd(residuals, ct):
    x, y = residuals
    ct = _quotient(ct, x + y)
    return ct * _share(y, x), -ct * _share(x, y)


def _share_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, [_quotient(t, primals[0] + primals[1]) for t in tangents]
    return _share(x, y), dx * _share(y, x) - dy * _share(x, y)


_share.defvjp(None, _share_bwd, jvp=_share_jvp)


@custom_vjp
def log(x: Array) -> Array:
    """log x, where JAX's own second derivative has 1/x²."""
    return jnp.log(x)


log.defvjp(None, lambda x, ct: (_quotient(ct, *x),), jvp=lambda x, dx: (log(*x), _quotient(*dx, *x)))


def logarithm(p: Array, logits: Array | None, axis: classes.ClassAxis) -> Array:
    """l = log p, whose derivative is taken in the logits of p if they are given; 0, of derivative 0, where p = 0."""
    return log(_on_support(p)) if logits is None else _log_softmax(logits, p, axis)


def _on_support(p: Array) -> Array:
    return jnp.where(p > 0, p, 1)


@functools.partial(custom_vjp, nondiff_argnums=(2,))
def _log_softmax(z: Array, p: Array, axis: classes.ClassAxis) -> Array:
    return jnp.log(_on_support(p))


def _log_softmax_bwd(axis, p, ct):
    return centred_transpose(jnp.where(p > 0, ct, 0), p, axis), None


def _log_softmax_jvp(axis, primals, tangents):
    z, p = primals
    return _log_softmax(z, p, axis), jnp.where(p > 0, about_centred(tangents[0], p, axis), 0)


_log_softmax.defvjp(lambda z, p, axis: (_log_softmax(z, p, axis), p), _log_softmax_bwd, jvp=_log_softmax_jvp)


@custom_vjp
def over(v: Array, p: Array, logs: Array) -> Array:
    """v / p for p > 0 with logarithm `logs`, which carries the derivative."""
    return v / p


def _over_bwd(residuals, ct):
    p, logs, ratio = residuals
    return over(ct, p, logs), None, -ct * ratio


def _over_fwd(v, p, logs):
    ratio = over(v, p, logs)
    return ratio, (p, logs, ratio)


def _over_jvp(primals, tangents):
    ratio = over(*primals)
    return ratio, over(tangents[0], *primals[1:]) - tangents[2] * ratio


over.defvjp(_over_fwd, _over_bwd, jvp=_over_jvp)
