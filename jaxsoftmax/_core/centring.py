"""Vectors measured from their mean under p, without cancellation where one p is near 1.

Pv = v - <p,v>,    P = I - 1pᵀ:    J = Pᵀ diag(p) P.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._core import classes, dtypes
from jaxsoftmax._core.mesh import typed_like
from jaxsoftmax._linear_map import linear_map

# By arithmetic, since a choice at each class would end a kernel of XLA's CPU backend.


def is_top(p: Array, above: float = 0.5) -> Array:
    """1 where p > above ≥ 1/2, else 0."""
    return jnp.ceil(p - above)


def below_half(p: Array, above: float = 0.5) -> Array:
    """p where p ≤ above, else 0."""
    return p * not_top(p, above)


def not_top(p: Array, above: float = 0.5) -> Array:
    """1 where p ≤ above, else 0."""
    return jnp.floor((1 + above) - p)


AXIS = classes.ClassAxis((-1,))  # the class axis where nothing else is said


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 4))
def about_centred(
    v: Array,
    p: Array,
    axis: classes.Axis = AXIS,
    total: Array | float = 1.0,
    above: float = 0.5,
) -> Array:
    """Pv = v - <p,v>, to a few eps of |P||v|, also where one p is near 1.

    With v measured from its value r at the top class, where p > 1/2, the mean <p, v - r> has no term of the size of v
    left to cancel. The top class's own v - r is said to be 0: XLA may round v here otherwise than in the sum. `above`
    moves the threshold, so that two products share no array.
    """
    in_two_passes, in_one_pass, in_one_kernel = (
        functools.partial(form, axis=axis, above=above) for form in (_in_two_passes, _in_one_pass, _in_one_kernel)
    )
    if classes.is_split(axis):
        w, mean = in_two_passes(v, p)
    else:
        on_gpu = in_one_kernel if classes.in_one_kernel(p, axis) else in_one_pass
        w, mean = lax.platform_dependent(v, p, cpu=in_two_passes, tpu=in_one_pass, default=on_gpu)
    return w - mean / total


def _in_one_kernel(v, p, axis, above):
    """v - r, 0 at the top class, and its mean: the plain lines.

    With the sums of the next one side by side a GPU's kernel ends in half precision (Brier's gradient 14 passes for 3),
    with a product in place of the choice in its HVP (26 for 4).
    """
    top = p > above
    w = jnp.where(top, 0.0, v - classes.sum(jnp.where(top, v, 0.0), axis))
    return w, classes.sum(p * w, axis)


def _in_one_pass(v, p, axis, above):
    """The same where each pass over the classes costs time: Σp(v - r) = Σ_{others} pv - r Σ_{others} p."""
    r, moment, rest = (classes.sum(x, axis) for x in (is_top(p) * v, below_half(p) * v, below_half(p)))
    return not_top(p, above) * (v - r), moment - r * rest


def _in_two_passes(v, p, axis, above):
    """The same in fewer sums: on a CPU each costs time, on a mesh it crosses."""
    r = classes.sum(is_top(p, above) * v, axis)
    return not_top(p, above) * (v - r), classes.sum(below_half(p, above) * (v - r), axis)


@functools.partial(about_centred.defjvp, symbolic_zeros=True)
def _about_centred_jvp(axis, above, primals, tangents):
    """Pv̇ - <ṗ, Pv>, for which nothing but Pv is kept: Σṗ is taken for the tangent of the total."""
    (v, p, total), (dv, dp, _) = primals, tangents
    out = about_centred(v, p, axis, total, above)
    again = functools.partial(about_centred, p=p, axis=axis, total=total, above=above)
    if isinstance(dp, SymbolicZero):
        return out, again(jnp.zeros_like(v) if isinstance(dv, SymbolicZero) else dv)
    along = -classes.sum(dp * out, axis) / total
    if isinstance(dv, SymbolicZero):
        return out, typed_like(out, jnp.broadcast_to(along, out.shape))
    return out, again(dv) + along


def jacobian_product(
    v: Array,
    p: Array,
    axis: classes.Axis,
    total: Array | float = 1.0,
    weights: Array | None = None,
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
    return own_transpose(forth, residuals, v, p, back)


def own_transpose(product: Callable, residuals: Any, v: Array, like: Array, back: Callable | None = None) -> Array:
    """product(residuals, v), a symmetric linear map of vectors typed as `like`; back is another form of the same."""
    v = v if jax.typeof(v) == jax.typeof(like) else typed_like(like, v)
    return linear_map(product, back or product, residuals, v, jax.typeof(v))


def gradient_product(
    ct: Array, gradient: Callable, along: Callable, axis: classes.Axis, z: Array, *known: Array
) -> Array:
    """ct ∇f, for one number f per slice, with a transpose of its own: t ↦ <∇f, t>.

    A chain of sums goes over the classes once more for <∇f, t>: `along(z, *known, t, axis)` finds it by sums that stand
    beside those of the value. Its derivatives are those of Σ ∇f t.
    """

    def forth(residuals, ct):
        return classes.shared_cotangent(ct, axis) * gradient(*residuals, axis)

    def plain(residuals, t):
        return classes.sum(gradient(*residuals, axis) * t, axis)

    back = _elsewhere(lambda residuals, t: along(*residuals, t, axis), plain, axis)
    (wide,) = dtypes.widen(z)
    return linear_map(forth, back, (z, *known), ct, jax.typeof(wide))


def _elsewhere(form: Callable, plain: Callable, axis: classes.Axis, on_gpu: Callable | None = None) -> Callable:
    """plain(residuals, v), on no CPU by `form`; its derivatives are those of the plain one."""

    @jax.custom_jvp
    def f(residuals, v):
        if classes.is_split(axis):
            return plain(residuals, v)
        return lax.platform_dependent(residuals, v, cpu=plain, tpu=form, default=on_gpu or form)

    @f.defjvp
    def _(primals, tangents):
        return f(*primals), jax.jvp(plain, primals, tangents)[1]

    return f


def product_beside(
    v: Array, plain: Callable, axis: classes.Axis, z: Array, m: Array, total: Array, label: Array | None = None
) -> Array:
    """plain(residuals, v) = Jv for p = exp(z - m) / total, 0 at `label`, by sums that stand beside the total's.

    Sums of p, in a program of several kernels, are a pass more. v is measured from its value r at the maximum of z.
    """

    def form(residuals, v):
        (z,), m, total, *label = dtypes.widen(residuals[0]), *residuals[1:]
        others = jnp.where(classes.index(z, axis) == label[0], -jnp.inf, z) if label else z
        top = classes.max(others, axis) if label else m
        at_top, e, e_top = others == top, jnp.exp(classes.shift(others, m)), jnp.exp(classes.shift(top, m))
        parts = jnp.where(at_top, v, 0.0), jnp.where(at_top, 0.0, e * v), jnp.where(at_top, 0.0, e)
        r, moment, rest = (classes.sum(x, axis) for x in parts)
        sure = total < 2 * e_top  # p > 1/2 at the top
        mean = (moment + jnp.where(sure, -r * rest, r * e_top)) / total
        return e / total * (jnp.where(at_top & sure, 0.0, v - jnp.where(sure, r, 0.0)) - mean)

    product = _elsewhere(form, plain, axis, plain if classes.in_one_kernel(z, axis) else None)
    residuals = (z, m, total) if label is None else (z, m, total, label)
    return own_transpose(product, residuals, v, z)


def rounded_one(p: Array, axis: classes.Axis) -> Array:
    """Σp as computed; 1 where all p are 0."""
    total = classes.sum(p, axis)
    return jnp.where(total == 0, 1.0, total)


def apart(p: Array, axis: classes.Axis, by_products: bool = False) -> tuple[Array, Array, Array]:
    """p_c > 1/2, 0 if there is none; the others' sum; p with 0 at c. By choices, or a GPU's one kernel ends."""
    if by_products:
        top, below = is_top(p) * p, below_half(p)
    else:
        top, below = jnp.where(p > 0.5, p, 0.0), jnp.where(p > 0.5, 0.0, p)
    return classes.sum(top, axis), classes.sum(below, axis), below


def complement(p: Array, axis: classes.Axis = AXIS) -> Array:
    """1 - p, where p > 1/2 as the sum of the others."""
    return jnp.where(p > 0.5, classes.sum(below_half(p), axis), 1 - p)


def centred(v: Array, p: Array, axis: classes.Axis = AXIS, total: Array | float = 1.0) -> Array:
    """Pv = v - <p,v>, measured again from what rounding left: to a few eps of |Pv|."""
    v = about_centred(v, p, axis, total)
    return v - classes.sum(p * v, axis) / total


def centred_transpose(y: Array, p: Array, axis: classes.Axis = AXIS, above: float = 0.5, kept: bool = False) -> Array:
    """Pᵀy = y - p Σy; at the top class y (1 - p) - p Σ_{others} y. `kept`: p is in a GPU's memory anyhow."""
    on_cpu, in_passes, plain = (
        functools.partial(form, axis=axis, above=above)
        for form in (_transpose_on_cpu, _transpose_in_passes, _transpose)
    )
    on_gpu = in_passes if classes.is_long(p, axis) and not kept else plain
    return lax.platform_dependent(y, p, cpu=on_cpu, tpu=in_passes, default=on_gpu)


def _transpose(y, p, axis, above):
    at_top = p > above
    sums = jnp.where(at_top, y, 0.0), jnp.where(at_top, 0.0, y), jnp.where(at_top, 0.0, p)
    top, others, rest = (classes.sum(x, axis) for x in sums)
    return jnp.where(at_top, rest, 1.0) * y - p * (others + jnp.where(at_top, 0.0, top))


def _transpose_on_cpu(y, p, axis, above):
    at_top = is_top(p, above)
    other = 1 - at_top  # a product, not y - at_top y, whose transpose would add what it takes away again
    top, others, rest = (classes.sum(x, axis) for x in (at_top * y, other * y, other * p))
    return (other + at_top * rest) * y - p * (others + other * top)


def _transpose_in_passes(y, p, axis, above):
    """By products before the sums, by choices behind them: what the two share would be written between the passes.

    On a TPU v5e the entropy's HVP in half precision took 10 passes over (8192, 4096) for 6.
    """
    at_top, other = is_top(p, above), not_top(p, above)
    top, others, rest = (classes.sum(x, axis) for x in (at_top * y, other * y, other * p))
    return jnp.where(at_top > 0, rest, 1.0) * y - p * (others + jnp.where(at_top > 0, 0.0, top))


def less(y: Array, p: Array, rest: Array, mass: Array | float = 1.0) -> Array:
    """mass·p - y; where p > 1/2 as (mass - y) - mass·(1 - p), with rest = 1 - p there."""
    top = p > 0.5
    return (mass * jnp.where(top, 1.0, p) - y) - jnp.where(top, mass * rest, 0.0)  # y once, or a GPU's kernel ends


def root(x: Array) -> Array:
    """√x, with derivative 0 where x = 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
