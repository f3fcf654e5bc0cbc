"""What a chunk of logits (C, V) tells of its tokens: losses (C,), their derivatives.

Constants are the labels and what the tokens share; options are arrays by name.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core.centring import is_top
from jaxsoftmax.linear_head.statistics import capped
from jaxsoftmax.linear_head.types import Cotangents, Head
from jaxsoftmax.losses.cross_entropy import softmax_cross_entropy_with_integer_labels


def token_losses(head: Head, z: Array, constants, options) -> Array:
    plain = {name: value for name, value in options.items() if name != "logit_softcap"}
    return softmax_cross_entropy_with_integer_labels(capped(z, options), constants[0], **plain)


class LabelSums(NamedTuple):
    """Per row, of shape (C, 1), but for `others` of shape (C, V); or all of them the other way round."""

    others: Array  # exp(z - m), 0 at the label
    at_label: Array  # exp(z_label - m)
    rest: Array  # Σ others
    total: Array
    gap: Array  # z_label - m
    weight: Array  # the label's class weight
    labels: Array


# One array of a chunk's logits at a time: `others` takes the place of z. So m depends on both that is read of z before,
# and what stands at the label is selected, not scattered: XLA reuses no buffer for a scatter.


def label_sums(z: Array, constants, options, axis: int = 1) -> LabelSums:
    labels = jnp.expand_dims(constants[0], axis)
    found = num.take_class(z, jnp.maximum(labels, 0), axis)
    z_label = jnp.where(labels < 0, jnp.nan, found)
    m = lax.stop_gradient(jnp.maximum(num.class_max(z, axis), found))
    gap = jnp.where(z_label == jnp.inf, 0.0, z_label - m)
    others = jnp.where(_is_label(z, 0, labels, axis), 0.0, jnp.exp(num.shift(z, m)))
    rest = num.class_sum(others, axis)
    weight = jnp.ones_like(m)
    if "class_weights" in options:
        weights = options["class_weights"][jnp.maximum(labels, 0)]
        weight = jnp.where(labels < 0, jnp.nan, weights)
    total = num.one_infinity(rest + jnp.exp(gap), m, 1)
    return LabelSums(others, jnp.exp(gap), rest, total, gap, weight, labels)


def label_rule(z: Array, constants, options, a: Array, axis: int) -> tuple[Array, Cotangents]:
    """Losses and a ∂l/∂z = s E, where E_k = exp(z_k - m) and E_label = -Σ of the others; the classes along `axis`."""
    sums = label_sums(z, constants, options, axis)
    gap, rest, total = sums.gap, sums.rest, sums.total
    losses = jnp.where(gap > -1, jnp.log1p(rest / sums.at_label), jnp.log(total) - gap)

    def make(parts, start):
        return (jnp.where(_is_label(parts[0], start, sums.labels, axis), -rest, parts[0]),)

    scale = a * jnp.squeeze(sums.weight / total, axis)
    return jnp.squeeze(losses * sums.weight, axis), Cotangents((sums.others,), make, scale)


def label_rule_along(z, dz, constants, options, a: Array, da: Array | None) -> tuple[Array, Cotangents]:
    """l̇ = <p, ż> - ż_label, Ġ = a p∘(ż - <p, ż>) + ȧ ∂l/∂z, and G as in `label_rule`.

    ż is measured from its value r at the class with p > 1/2, the label or another, so that nothing cancels there.
    """
    sums = label_sums(z, constants, options)
    losses, r, mean, moved_at_label = jnp.zeros(z.shape[0], z.dtype), *3 * [jnp.zeros_like(sums.rest)]
    if dz is not None:
        at_label = sums.at_label / sums.total
        dz_label = num.take_class(dz, sums.labels, 1)
        label_on_top = lax.stop_gradient(is_top(at_label))
        r = label_on_top * dz_label + (1 - label_on_top) * num.class_sum(is_top(sums.others / sums.total) * dz, 1)
        mean = num.class_sum(sums.others * (dz - r), 1) / sums.total + (1 - label_on_top) * at_label * (dz_label - r)
        losses = (sums.weight * (mean + (r - dz_label)))[:, 0]
        moved_at_label = sums.at_label * ((dz_label - r) - mean)
    scale, arrays = (sums.weight / sums.total)[:, 0], (sums.others,) if dz is None else (sums.others, dz)

    def make(parts, start):
        is_label = _is_label(parts[0], start, sums.labels, 1)
        g, moved = jnp.where(is_label, -sums.rest, parts[0]), jnp.zeros_like(parts[0])
        if dz is not None:
            moved = jnp.where(is_label, moved_at_label, parts[0] * ((parts[1] - r) - mean))
        return (moved, g) if da is None else (a[:, None] * moved + da[:, None] * g, a[:, None] * g)

    return losses, Cotangents(arrays, make, a * scale if da is None else scale)


def _is_label(part: Array, start, labels: Array, axis: int) -> Array:
    return num.class_index(part, axis) + start == labels
