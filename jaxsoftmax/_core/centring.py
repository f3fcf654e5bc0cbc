"""Vectors measured from their mean under p, without cancellation where one p is near 1.

Pv = v - <p,v>,    P = I - 1pᵀ:    J = Pᵀ diag(p) P.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core.plumbing import typed_like
from jaxsoftmax._linear_map import linear_map

# The class with p > 1/2 as an indicator, in forms that differ although they are equal: XLA's CPU backend materialises
# a value, even a constant broadcast, that feeds two reductions, so each reduction computes its own. Comparisons in
# their place end its kernels, and keep arrays of the size of p.


def is_top(p: Array, above: float = 0.5, scale: float = 1.0) -> Array:
    """1 where p > above ≥ 1/2, else 0; each power of two as a scale is another form, up to 1, since ⌈-1⌉ is not 0."""
    return jnp.ceil((p - above) * scale)


def below_half(p: Array) -> Array:
    """p where p ≤ 1/2, else 0."""
    return p * jnp.floor(1.5 - p)


AXIS = num.ClassAxis((-1,))  # the class axis where nothing else is said


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 4))
def about_centred(v: Array, p: Array, axis: num.Axis = AXIS, total: Array | float = 1.0, above: float = 0.5) -> Array:
    """Pv = v - <p,v>, to a few eps of |P||v|, also where one p is near 1.

    With v measured from its value r at the top class (p > above ≥ 1/2), w = v - r, the mean <p,w> has no term of the
    size of v left to cancel. Its own w is said to be 0: XLA may round v here otherwise than in the sum.
    """
    w = jnp.floor((1 + above) - p) * (v - num.class_sum(is_top(p, above) * v, axis))
    return w - num.class_sum(p * w, axis) / total


@functools.partial(about_centred.defjvp, symbolic_zeros=True)
def _about_centred_jvp(axis, above, primals, tangents):
    """Pv̇ - <ṗ, Pv>, for which nothing but Pv is kept: Σṗ is taken for the tangent of the total."""
    (v, p, total), (dv, dp, _) = primals, tangents
    out = about_centred(v, p, axis, total, above)
    if isinstance(dp, SymbolicZero):
        return out, about_centred(jnp.zeros_like(v) if isinstance(dv, SymbolicZero) else dv, p, axis, total, above)
    along = -num.class_sum(dp * out, axis) / total
    if isinstance(dv, SymbolicZero):
        return out, typed_like(out, jnp.broadcast_to(along, out.shape))
    return out, about_centred(dv, p, axis, total, above) + along


def jacobian_product(
    v: Array, p: Array, axis: num.Axis, total: Array | float = 1.0, weights: Array | None = None
) -> Array:
    """Jv = p∘(v - <p,v>), for J = diag(p) - ppᵀ, to a few eps of |J||v| also where one p is near 1.

    J is its own transpose, and said to be so: a transpose of this code would lose what it keeps. With total = Σp, which
    rounding keeps from being 1, that holds for any p, and J1 = 0 exactly. With weights d = s p, the product is s Jv.
    """

    def product(residuals, v, above):
        p, weights, total = residuals
        return weights * about_centred(v, p, axis, total, above)

    # The two meet in an HVP, where one array that says which class is the top one would be kept for both.
    forth, back = (functools.partial(product, above=above) for above in (0.5, 0.5625))

    residuals = p, p if weights is None else weights, jnp.asarray(total, p.dtype)
    v = v if jax.typeof(v) == jax.typeof(p) else typed_like(p, v)
    return linear_map(forth, back, residuals, v, jax.typeof(v))


def rounded_one(p: Array, axis: num.Axis) -> Array:
    """Σp as computed; 1 where all p are 0."""
    total = num.class_sum(p, axis)
    return jnp.where(total == 0, 1.0, total)


def complement(p: Array, axis: num.Axis = AXIS) -> Array:
    """1 - p, where p > 1/2 as the sum of the others."""
    return jnp.where(p > 0.5, num.class_sum(below_half(p), axis), 1 - p)


def centred(v: Array, p: Array, axis: num.Axis = AXIS, total: Array | float = 1.0) -> Array:
    """Pv = v - <p,v>, measured again from what rounding left: to a few eps of |Pv|."""
    v = about_centred(v, p, axis, total)
    return v - num.class_sum(p * v, axis) / total


def centred_transpose(y: Array, p: Array, axis: num.Axis = AXIS) -> Array:
    """Pᵀy = y - p Σy; at the top class y (1 - p) - p Σ_{others} y."""
    top = num.class_sum(is_top(p, scale=0.5) * y, axis)
    others = num.class_sum(y - is_top(p, scale=0.25) * y, axis)
    rest = num.class_sum(p - is_top(p, scale=0.125) * p, axis)
    not_top = 1 - is_top(p, scale=0.0625)
    return (not_top + (1 - not_top) * rest) * y - p * (others + not_top * top)


def root(x: Array) -> Array:
    """√x, with derivative 0 where x = 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
