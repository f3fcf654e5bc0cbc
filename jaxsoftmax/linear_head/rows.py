"""What a chunk of logits (C, V) tells of its tokens: numbers per token, and their gradients in the logits.

With m = max u, v = u - m, s = Σ exp(v) over every class but the one that attains m, and gap = v_label

    -log p_label = log1p(s) - gap,    p_label - 1 = -(s - expm1(gap)) / (1 + s),    H = log1p(s) - Σ p v:

sums of terms of one sign, so nothing cancels when the model is sure, right or wrong. All of it is written plainly, and
higher derivatives are forward mode of it: with ṁ = u̇ at the top class, v̇ is 0 there, and nothing cancels either.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import classes, dtypes
from jaxsoftmax._core.scalar_functions import exp_remainder
from jaxsoftmax.linear_head.plan import Arrays, Head
from jaxsoftmax.losses.softcap import cap_derivatives, capped


class Facts(NamedTuple):
    """Of a chunk: numbers (C,), the gradient of each in the logits (C, V), and indices (C,) or None.

    `by_class` is the gradient of the first number in the class weights, (C, V), where there are any.
    """

    numbers: tuple[Array, ...]
    gradients: tuple[Array, ...]
    index: Array | None = None
    by_class: Array | None = None


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_and_rest(u: Array, axis: classes.Axis) -> tuple[Array, Array]:
    """m = max u and s = Σ exp(u - m) over every class but the one that attains m; -1 where all u are -inf."""
    m_here, s_here = _online_on(("cuda",), _top_and_rest_plainly, u)
    if not isinstance(axis, classes.ClassAxis):
        return m_here, s_here
    m = classes.max(m_here, axis)
    shares = s_here * jnp.exp(classes.shift(m_here, m))
    return m, classes.sum(shares, axis) + classes.leave_top_out(m_here, m, axis)


@top_and_rest.defjvp
def _top_and_rest_jvp(axis, primals, tangents):
    m, s, dm, ds = _top_and_rest_along(*primals, *tangents, axis)
    return (m, s), (dm, ds)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _top_and_rest_along(u: Array, du: Array, axis: classes.Axis) -> tuple[Array, ...]:
    """m and s, and along u̇ ṁ = u̇ at the top class and ṡ = Σ exp(u - m) (u̇ - ṁ)."""
    plainly = functools.partial(_along_plainly, axis)
    if isinstance(axis, classes.ClassAxis):
        return plainly(u, du)
    return _online_on(("cuda", "tpu"), plainly, u, du)


@_top_and_rest_along.defjvp
def _top_and_rest_along_jvp(axis, primals, tangents):
    return jax.jvp(functools.partial(_along_plainly, axis), primals, tangents)


def _top_and_rest_plainly(u: Array) -> tuple[Array, Array]:
    m = classes.max(u, 1)
    e = jnp.exp(classes.shift(u, m))
    tops = jnp.floor(e)
    return m, classes.sum(e - tops, 1) + (classes.sum(tops, 1) - 1)


def _along_plainly(axis, u: Array, du: Array) -> tuple[Array, ...]:
    m, s = top_and_rest(u, axis)
    if isinstance(axis, classes.ClassAxis):
        top = classes.argmax(u, m, axis)
    else:  # its argmax, inside a linear map, is one that shard_map of JAX 0.6.0 does not follow
        top = jnp.min(jnp.where(u == m, classes.index(u, axis), u.shape[1]), 1, keepdims=True)
    at_top = classes.take(du, top, axis)
    return m, s, at_top, classes.sum(jnp.exp(classes.shift(u, m)) * (du - at_top), axis)


def _online_on(platforms: tuple[str, ...], plainly: Callable, *args: Array) -> tuple[Array, ...]:
    """`_online` where it saves a pass: the TPU backend takes a maximum in the product that makes u."""
    if not hasattr(jax, "shard_map"):  # JAX 0.6.0: shard_map follows no such reduction
        return plainly(*args)
    return lax.platform_dependent(*args, **dict.fromkeys(platforms, _online), default=plainly)


def _online(u: Array, *du: Array) -> tuple[Array, ...]:
    """The same, reading u and u̇ once: of the plain lines XLA's GPU backend makes a kernel for each reduction."""

    def merged(a, b):
        high, low = ([jnp.where(a[0] >= b[0], *pair) for pair in zip(*pairs)] for pairs in ((a, b), (b, a)))
        share = jnp.where(a[0] == b[0], 1.0, jnp.exp(low[0] - jnp.maximum(high[0], low[0])))
        out = [jnp.maximum(a[0], b[0]), high[1] + (1 + low[1]) * share]
        if du:
            out += [high[2], high[3] + (low[3] + (1 + low[1]) * (low[2] - high[2])) * share]
        return tuple(out)

    none = jnp.zeros_like(u)
    operands = (u, none, *du, none) if du else (u, none)
    start = [jnp.asarray(value, u.dtype) for value in (-jnp.inf, -1.0, 0.0, 0.0)[: len(operands)]]
    m, s, *along = lax.reduce(operands, tuple(start), merged, (1,))
    return tuple(x[:, None] for x in (m, jnp.where(m == -jnp.inf, -1.0, s), *along))


class Distribution(NamedTuple):
    """Softmax of logits u (C, V): m, s, Σ exp v = 1 + s and its logarithm, (C, 1) each, and v = u - m."""

    m: Array
    s: Array
    total: Array
    log_total: Array
    v: Array

    @property
    def probs(self) -> Array:
        return jnp.exp(self.v) / self.total

    @property
    def log_probs(self) -> Array:
        return self.v - self.log_total


def distribution(u: Array, axis: classes.Axis) -> Distribution:
    m, s = top_and_rest(u, axis)
    # NaN where no word is left, and for several of +inf, whose tangents u does not carry.
    s = classes.undefined(lax.stop_gradient((m == -jnp.inf) | (m == jnp.inf) & (s > 0)), s)
    return Distribution(m, s, 1 + s, jnp.log1p(s), classes.shift(u, m))


def prepared(z: Array, options: Arrays, cap: str = "logit_softcap") -> tuple[Array, Array | float]:
    """The logits u of the softmax, capped and cooled, and ∂u/∂z."""
    u, slope = z, 1.0
    if cap in options:
        u, slope = capped(z, options[cap]), cap_derivatives(z, options[cap])[0]
    if "temperature" in options:
        u, slope = u / options["temperature"], slope / options["temperature"]
    return u, slope


def of_labels(head: Head, z: Array, constants: Any, options: Arrays) -> Facts:
    """The loss with its options; with more columns also log p of the label, logsumexp, entropy and log p of the top."""
    axis, labels = head.class_axis, constants[0][:, None]
    u, slope = prepared(z, options)
    d = distribution(u, axis)
    p, lse = d.probs, d.m + d.log_total
    at_label, _ = prepared(classes.take(z, jnp.maximum(labels, 0), axis), options)
    gap = jnp.where((d.m == jnp.inf) & (at_label < jnp.inf), -jnp.inf, classes.shift(at_label, d.m))
    one = classes.undefined(labels < 0, jnp.ones_like(gap))  # NaN for a label that is no class
    nll, is_label = one * (d.log_total - gap), classes.index(z, axis) == labels
    g = one * jnp.where(is_label, -(d.s - jnp.expm1(gap)) / d.total, p)
    loss, of_loss, by_class = _with_options(head, u, d, options, labels, nll, g)
    numbers, gradients, index = [loss], [of_loss], None
    if head.columns > 1:
        v = jnp.maximum(d.v, -dtypes.largest(z.dtype))
        mean, index = classes.sum(jnp.exp(d.v) * v, axis) / d.total, classes.argmax(u, d.m, axis)
        of_top = jnp.where(classes.index(z, axis) == index, d.s / d.total, -p)
        numbers += [-nll, lse, d.log_total - mean, -d.log_total]
        gradients += [-g, p, p * (mean - v), of_top]
    flat = tuple(number[:, 0] for number in numbers)
    return Facts(flat, tuple(slope * g for g in gradients), None if index is None else index[:, 0], by_class)


def _with_options(head: Head, u: Array, d: Distribution, options: Arrays, labels, nll, g):
    """The loss and its gradients in u and in the class weights, from those of the bare one."""
    axis, by_class = head.class_axis, None
    smooth, weights = options.get("label_smoothing"), options.get("class_weights")
    rest = 1.0 if smooth is None else 1 - smooth
    loss, of_u = rest * nll, rest * g
    if weights is not None:
        weights = weights[None, :]
        of_label = class_weight(head, options["class_weights"], labels[:, 0])[:, None]
        by_class = jnp.where(classes.index(u, axis) == labels, loss, 0.0)
        loss, of_u = of_label * loss, of_label * of_u
    if smooth is not None:
        exists, each = u > -jnp.inf, 1.0 if weights is None else weights
        below = jnp.where(exists, -d.v, 0.0)
        there = jnp.where(exists, each, 0.0).astype(u.dtype)
        mass, soft = (classes.sum(x, axis) for x in (there, there * below))
        count = jnp.maximum(mass if weights is None else classes.sum(exists.astype(u.dtype), axis), 1)
        mass, target, infinite = mass / count, there / count, jnp.where((d.m == jnp.inf) & (count > 1), jnp.inf, 0.0)
        loss = loss + smooth * (mass * d.log_total + soft / count + infinite)
        of_u = of_u + smooth * (mass * d.probs - target)
        if by_class is not None:
            by_class = by_class + smooth * jnp.where(exists, (d.log_total + below) / count, 0.0)
    if "z_loss" in options:
        lse = d.m + d.log_total
        loss, of_u = loss + options["z_loss"] * lse**2, of_u + 2 * options["z_loss"] * lse * d.probs
    return loss, of_u, by_class


def class_weight(head: Head, class_weights: Array, labels: Array) -> Array:
    """The class weight of each label (C,); NaN for one that is no class."""
    return classes.take(class_weights[None, :], labels[None, :], head.class_axis)[0]


def of_divergence(beta: float, teacher_logits: Any, head: Head, z: Array, constants: Any, options: Arrays) -> Facts:
    u, slope = prepared(z, options)
    target, _ = prepared(teacher_logits(head, constants), {**options, **constants[1]}, "target_softcap")
    losses, g = _divergence(beta, u, target, head.class_axis)
    return Facts((losses,), (slope * g,))


def of_top_k(beta: float, head: Head, z: Array, constants: Any, options: Arrays) -> Facts:
    """The divergence of k + 1 classes: those whose log q is known, and all others as one, of logit log Σ exp u."""
    axis, (indices, target) = head.class_axis, constants[0]
    u, slope = prepared(z, options)
    local, size = indices - classes.first(z, axis), z.shape[1]
    at = jnp.arange(len(z))[:, None], jnp.where((local >= 0) & (local < size), local, size)
    known, _ = prepared(classes.take(z, indices, axis), options)
    listed = jnp.zeros(u.shape, bool).at[at].set(True, mode="drop")
    rest = jnp.where(listed, -jnp.inf, u)
    others = distribution(rest, axis)
    log_sum = jnp.where(others.m == -jnp.inf, -jnp.inf, others.m + others.log_total)
    shares = jnp.where(rest == -jnp.inf, 0.0, others.probs)
    losses, g = _divergence(beta, jnp.concatenate([known, log_sum], 1), target, 1)
    return Facts((losses,), (slope * (shares * g[:, -1:]).at[at].set(g[:, :-1], mode="drop"),))


def _divergence(beta: float, u: Array, target: Array, axis: classes.Axis) -> tuple[Array, Array]:
    """KL(q ‖ p) with β = 0, KL(p ‖ q) with β = 1, between them β KL(q ‖ M) + (1 - β) KL(p ‖ M), M = β q + (1 - β) p.

    Each is a sum over the classes of terms that are never negative, w log(w/r) - w + r, since both add up to 1.
    Returns it (C,), and its gradient in the logits u of p.
    """
    model, teacher = distribution(u, axis), distribution(target, axis)
    p, q = model.probs, teacher.probs
    in_p, in_q = model.v > -jnp.inf, teacher.v > -jnp.inf
    somewhere = in_p | in_q
    ratio = jnp.where(somewhere, model.log_probs - jnp.where(somewhere, teacher.log_probs, 0.0), 0.0)  # log p/q
    if beta == 0:
        # p and q once more, or the compiler for GPU would keep those that the gradient shares: two arrays of logits.
        losses = _relative(jnp.exp(teacher.log_probs), in_q, -ratio, jnp.exp(model.log_probs))
        g = jnp.where((jnp.abs(ratio) < 1) & in_q, q * jnp.expm1(jnp.clip(ratio, -1, 1)), p - q)
        return classes.sum(losses, axis)[:, 0], g
    if beta == 1:
        losses, of_p = _relative(p, in_p, ratio, q), ratio
    else:
        mixture, in_p, in_q = beta * q + (1 - beta) * p, p > 0, q > 0  # where a ratio is infinite, its weight is 0
        of_q = -jnp.log1p((1 - beta) * jnp.expm1(jnp.where(in_q, ratio, 0.0)))  # log q/M
        of_p = -jnp.log1p(beta * jnp.expm1(-jnp.where(in_p, ratio, 0.0)))
        losses = beta * _relative(q, in_q, of_q, mixture) + (1 - beta) * _relative(p, in_p, of_p, mixture)
        of_p = (1 - beta) * of_p
    of_p = jnp.where(in_p, of_p, 0.0)
    return classes.sum(losses, axis)[:, 0], p * (of_p - classes.sum(p * of_p, axis))


def _relative(w: Array, there: Array, log_ratio: Array, r: Array) -> Array:
    """w log(w/r) - w + r ≥ 0, given log(w/r) where w is there; r where it is not."""
    log_ratio = jnp.where(there, log_ratio, 0.0)
    near = w * exp_remainder(jnp.clip(-log_ratio, -1, 1))
    return jnp.where(there, jnp.where(jnp.abs(log_ratio) < 1, near, w * log_ratio - w + r), r)
