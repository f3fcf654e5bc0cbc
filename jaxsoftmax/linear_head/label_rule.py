"""What a chunk of logits (C, V) tells of its tokens: losses (C,) and their derivatives.

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
    """By the plain head, with all options."""
    plain = {name: value for name, value in options.items() if name != "logit_softcap"}
    axes = head.axes.classes or None
    return softmax_cross_entropy_with_integer_labels(capped(z, options), constants[0], axis_name=axes, **plain)


class LabelSums(NamedTuple):
    """Per row, of shape (C, 1), but for `others` of shape (C, V)."""

    others: Array  # exp(z - m), 0 at the label
    at_label: Array  # exp(z_label - m)
    rest: Array  # Σ others
    total: Array
    gap: Array  # z_label - m
    weight: Array  # the label's class weight
    labels: Array  # counted among the classes that are here


# One array of a chunk's logits at a time: `others` takes the place of z. So m depends on both that is read of z before,
# and what stands at the label is selected, not scattered: XLA reuses no buffer for a scatter.


def token_sums(head: Head, z: Array, constants, options) -> LabelSums:
    axis, labels = head.class_axis, constants[0][:, None]
    found = num.take_class(z, jnp.maximum(labels, 0), axis)
    z_label = num.undefined(labels < 0, found)
    m = lax.stop_gradient(jnp.maximum(num.class_max(z, axis), found))
    gap = jnp.where(z_label == jnp.inf, 0.0, z_label - m)
    here = labels - num.first_class(z, axis)
    others = jnp.where(_is_label(z, 0, here), 0.0, jnp.exp(num.shift(z, m)))
    rest = num.class_sum(others, axis)
    weight = jnp.ones_like(m)
    if "class_weights" in options:
        weight = class_weight(head, options["class_weights"], constants[0])[:, None]
    total = num.one_infinity(rest + jnp.exp(gap), m)
    return LabelSums(others, jnp.exp(gap), rest, total, gap, weight, here)


def class_weight(head: Head, class_weights: Array, labels: Array) -> Array:
    """The class weight of each label (C,); NaN for one that is no class."""
    return num.take_class(class_weights[None, :], labels[None, :], head.class_axis)[0]


def label_rule(head: Head, z: Array, constants, options, a: Array) -> tuple[Array, Cotangents]:
    """Losses and a ∂l/∂z = s E, where E_k = exp(z_k - m) and E_label = -Σ of the others."""
    sums = token_sums(head, z, constants, options)
    gap, rest, total = sums.gap, sums.rest, sums.total
    losses = jnp.where(gap > -1, jnp.log1p(rest / sums.at_label), jnp.log(total) - gap)

    def make(parts, start):
        return (jnp.where(_is_label(parts[0], start, sums.labels), -rest, parts[0]),)

    return (losses * sums.weight)[:, 0], Cotangents((sums.others,), make, a * (sums.weight / total)[:, 0])


def label_rule_along(head: Head, z, dz, constants, options, a: Array, da: Array | None) -> tuple[Array, Cotangents]:
    """l̇ = <p, ż> - ż_label, Ġ = a p∘(ż - <p, ż>) + ȧ ∂l/∂z, and G as in `label_rule`.

    ż is measured from its value r at the class with p > 1/2, the label or another, so that nothing cancels there.
    """
    axis, sums = head.class_axis, token_sums(head, z, constants, options)
    losses, r, mean, moved_at_label = jnp.zeros(z.shape[0], z.dtype), *3 * [jnp.zeros_like(sums.rest)]
    if dz is not None:
        at_label = sums.at_label / sums.total
        dz_label = num.take_class(dz, constants[0][:, None], axis)
        label_on_top = lax.stop_gradient(is_top(at_label))
        at_top = num.class_sum(is_top(sums.others / sums.total) * dz, axis)
        r = label_on_top * dz_label + (1 - label_on_top) * at_top
        mean = num.class_sum(sums.others * (dz - r), axis) / sums.total + (1 - label_on_top) * at_label * (dz_label - r)
        losses = (sums.weight * (mean + (r - dz_label)))[:, 0]
        moved_at_label = sums.at_label * ((dz_label - r) - mean)
    scale, arrays = (sums.weight / sums.total)[:, 0], (sums.others,) if dz is None else (sums.others, dz)

    def make(parts, start):
        is_label = _is_label(parts[0], start, sums.labels)
        g, moved = jnp.where(is_label, -sums.rest, parts[0]), jnp.zeros_like(parts[0])
        if dz is not None:
            moved = jnp.where(is_label, moved_at_label, parts[0] * ((parts[1] - r) - mean))
        return (moved, g) if da is None else (a[:, None] * moved + da[:, None] * g, a[:, None] * g)

    return losses, Cotangents(arrays, make, a * scale if da is None else scale)


def _is_label(part: Array, start, labels: Array) -> Array:
    return num.class_index(part, 1) + start == labels
