"""Unusual rules: what jax.custom_vjp makes of them, in both modes, or an error that says why."""

import copy
import functools
from typing import Any

import cloudpickle
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from jaxsoftmax.autodiff import custom_vjp

X = np.float32(2.0)
ZEROS = jnp.zeros(2, jnp.float32)
needs_refs = pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no refs")


def tripled(bwd, decorator: Any = custom_vjp):
    f = decorator(lambda x: 3.0 * x)
    f.defvjp(lambda x: (f(x), x), bwd)
    return f


@pytest.mark.parametrize("arguments", [(0,), (0, 1)])
def test_a_tracer_among_the_values_that_are_not_differentiated(arguments):
    f = custom_vjp(lambda n, x: n[0] * x, nondiff_argnums=(0,))
    f.defvjp(lambda n, x: (f(n, x), None), lambda n, _, ct: (n[0] * ct,))
    g = lambda n, x: f([n], x)
    assert jax.grad(g, 1)(5.0, 3.0) == jax.jacfwd(g, 1)(5.0, 3.0) == 5.0
    for call in (jax.grad(g, arguments), jax.jit(g), lambda n, x: jax.jvp(g, (n, x), (n, x)), jax.jit(jax.grad(g, 1))):
        with pytest.raises(jax.errors.UnexpectedTracerError, match="nondiff_argnums"):
            call(2.0, 3.0)


NOT_LINEAR = {
    "constant": lambda x, ct: (jnp.float32(17.0),),
    "a number": lambda x, ct: (17.0,),
    "the residual": lambda x, ct: (x,),
    "affine": lambda x, ct: (ct + 1.0,),
    "affine in a call": lambda x, ct: (jax.jit(lambda c: c + x)(ct),),
    "affine in a branch": lambda x, ct: (jax.lax.cond(x > 0, lambda c: c, lambda c: c - 1.0, ct),),
    "affine where masked": lambda x, ct: (jnp.where(x > 5, ct, 1.0),),
    "affine in a loop": lambda x, ct: (jax.lax.scan(lambda c, _: (c + 1.0, None), ct, None, length=2)[0],),
    "affine under remat": lambda x, ct: (jax.checkpoint(lambda c: c + 1.0)(ct),),
    "affine in a function of zeros": lambda x, ct: (ct + jnp.cos(0 * x),),
    "affine in the larger": lambda x, ct: (ct + jnp.maximum(0 * x, x),),
    "quotient": lambda x, ct: (ct / (1e-3 + jnp.abs(ct)),),
    "square": lambda x, ct: (ct * ct,),
    "clipped": lambda x, ct: (jnp.clip(ct, -0.1, 0.1),),
}


@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_forward_mode_of_a_bwd_that_is_not_linear(kind):
    f, theirs = tripled(NOT_LINEAR[kind]), tripled(NOT_LINEAR[kind], jax.custom_vjp)
    assert jax.grad(f)(X) == jax.jit(jax.grad(f))(X) == jax.grad(theirs)(X)
    for forward in (lambda x: jax.jvp(f, (x,), (x,)), jax.jit(jax.jacfwd(f))):
        with pytest.raises(TypeError, match="needs the transpose of bwd, which has none"):
            forward(X)


CAUSES = {
    "square": (lambda x, ct: (ct * ct,), r"it is not linear in the cotangent\. Make"),
    "callback": (lambda x, ct: (io_callback(lambda c: c, ct, ct),), r"IO callbacks do not support transpose\. Make"),
    "affine loop": (
        lambda x, ct: (jax.lax.while_loop(lambda c: c < x, lambda c: 2 * c, ct) + x,),
        "Reverse-mode .* not work",
    ),
}


@pytest.mark.parametrize("kind", CAUSES)
def test_the_cause_is_told(kind):
    bwd, cause = CAUSES[kind]
    with pytest.raises(TypeError, match="has none: .*" + cause):
        jax.jvp(tripled(bwd), (X,), (X,))


# Linear, 3 ct each, though sums, selections and updates of constants are in it. (JAX 0.6.0 transposes no loop that
# begins with a constant.)
LINEAR = {
    "zeros": lambda x, ct: (jnp.zeros_like(x) + 3 * ct,),
    "where": lambda x, ct: (jnp.where(x > 0, 3 * ct, 0.0),),
    "pad": lambda x, ct: (jnp.pad(3 * ct[None], (1, 1)).sum(),),
    "concatenate": lambda x, ct: (jnp.concatenate([jnp.zeros(2, jnp.float32), 3 * ct[None]]).sum(),),
    "constant zeros": lambda x, ct: (jnp.concatenate([ZEROS, 3 * ct[None]]).sum(),),
    "constant zeros, reshaped": lambda x, ct: (jnp.concatenate([ZEROS.reshape(2, 1), 3 * ct[None, None]]).sum(),),
    "update": lambda x, ct: (jnp.zeros(3, jnp.float32).at[1].add(3 * ct)[1],),
    "scan": lambda x, ct: (
        jax.lax.scan(lambda c, a: (c + a * ct, None), jnp.zeros_like(ct), jnp.ones(3, jnp.float32))[0],
    ),
    "cond": lambda x, ct: (jax.lax.cond(x > 0, lambda c: 3 * c, jnp.zeros_like, ct),),
    "remat": lambda x, ct: (jax.checkpoint(lambda c: 3 * c)(ct),),
    "solve": lambda x, ct: (jnp.linalg.solve(jnp.eye(2, dtype=jnp.float32), jnp.stack([3 * ct, ct]))[0],),
    "print": lambda x, ct: (jax.debug.callback(lambda _: None, x) or 3 * ct,),
}


@pytest.mark.parametrize("kind", LINEAR if hasattr(jax, "shard_map") else [k for k in LINEAR if k != "scan"])
def test_forward_mode_of_a_bwd_that_is_linear(kind):
    f = tripled(LINEAR[kind])
    for derivative in (jax.grad(f), jax.jacfwd(f), jax.jit(jax.jacfwd(f))):
        np.testing.assert_allclose(derivative(X), 3.0, rtol=1e-6)


class Holder:
    def __init__(self, y):
        self.y = y

    def bwd(self, _, ct):
        return (2.0 * jnp.cos(self.y) * ct,)


CLOSURES = {
    "a cell": lambda y: lambda _, ct: (2.0 * jnp.cos(y) * ct,),
    "a function's cell": lambda y: (lambda scaled: lambda _, ct: (scaled(ct),))(lambda ct: 2.0 * jnp.cos(y) * ct),
    "a default": lambda y: lambda _, ct, y=y: (2.0 * jnp.cos(y) * ct,),
    "a partial": lambda y: functools.partial(lambda y, _, ct: (2.0 * jnp.cos(y) * ct,), y),
    "a method": lambda y: Holder(y).bwd,
    "a tree": lambda y: (lambda tree: lambda _, ct: (2.0 * jnp.cos(tree["y"][0]) * ct,))({"y": [y], 3: None}),
}


@pytest.mark.parametrize("kind", CLOSURES)
def test_bwd_that_closes_over_a_tracer(kind):
    def made(decorator, y):
        f = decorator(lambda x: 2.0 * jnp.sin(x))
        f.defvjp(lambda x: (f(x), ()), CLOSURES[kind](y))
        return f

    forward = lambda y: jax.jvp(made(custom_vjp, y), (1.0,), (1.0,))[1]
    reverse = lambda y: jax.grad(made(jax.custom_vjp, y))(1.0)
    ys = jnp.arange(3.0)
    for transformed in (
        lambda g: jax.jit(g)(X),
        lambda g: jax.vmap(jax.jit(g))(ys),
        lambda g: jax.jit(lambda x: jax.lax.scan(lambda c, y: (c + g(x * y), None), 0.0, ys)[0])(1.0),
        lambda g: jax.jit(lambda x: jax.lax.cond(x > 0, g, jnp.sin, x))(X),
        lambda g: jax.jit(jax.grad(g))(X),
        lambda g: jax.grad(jax.jit(g))(X),
    ):
        np.testing.assert_allclose(transformed(forward), transformed(reverse), rtol=1e-6)


def test_a_jvp_rule_that_closes_over_a_tracer():
    def tangent(y):
        f = tripled(lambda x, ct: (ct,))
        f.defvjp(f.fwd, f.bwd, jvp=lambda x, t: (f(*x), y * t[0]))
        return jax.jvp(f, (1.0,), (1.0,))[1]

    assert jax.jit(tangent)(5.0) == 5.0 and jax.jit(jax.grad(tangent))(5.0) == 1.0


def test_a_python_branch_on_residuals():
    f = tripled(lambda x, ct: (2 * ct if x.sum() > 0 else 5 * ct,))
    for x, want in ((jnp.ones(2), 2.0), (-jnp.ones(2), 5.0)):
        tangent = jax.jvp(f, (x,), (jnp.ones(2),))[1]
        np.testing.assert_array_equal(tangent, jax.grad(lambda x: f(x).sum())(x))
        np.testing.assert_array_equal(tangent, [want, want])


def test_a_python_branch_on_residuals_beside_a_tracer():
    made = lambda decorator, y: tripled(lambda x, ct: (y * ct if jnp.sum(x) > 0 else 5 * ct,), decorator)
    theirs = lambda y: jax.grad(made(jax.custom_vjp, y))(X)
    reverse = lambda y: jax.grad(made(custom_vjp, y))(X)
    forward = lambda y: jax.jvp(made(custom_vjp, y), (X,), (X / X,))[1]
    for transformed in (lambda g: jax.grad(g)(2.0), lambda g: jax.vmap(g)(jnp.arange(3.0))):
        for ours in (reverse, forward):
            np.testing.assert_array_equal(transformed(ours), transformed(theirs))


def stored(x):
    ref = jax.new_ref(jnp.zeros_like(x))
    ref[...] = jnp.sin(x)
    return ref[...]


@needs_refs
def test_a_ref_inside_the_function():
    f = custom_vjp(stored)
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * jnp.cos(x),))
    x, v = jnp.arange(3.0), jnp.ones(3)
    scanned = lambda x: jax.lax.scan(lambda c, a: (c, f(a)), None, x)[1]
    for g in (f, jax.jit(f), jax.jit(jax.vmap(f)), scanned, jax.checkpoint(f)):
        np.testing.assert_allclose(g(x), np.sin(x), rtol=1e-6)
        np.testing.assert_allclose(jax.vjp(g, x)[1](v)[0], np.cos(x), rtol=1e-6)
        np.testing.assert_allclose(jax.jvp(g, (x,), (v,))[1], np.cos(x), rtol=1e-6)


@needs_refs
def test_a_ref_that_some_values_make():
    f = custom_vjp(lambda with_ref, x: stored(x) if with_ref else jnp.sin(x), nondiff_argnums=(0,))
    f.defvjp(lambda with_ref, x: (f(with_ref, x), x), lambda _, x, ct: (ct * jnp.cos(x),))
    for with_ref in (False, True):
        value, gradient = jax.jit(jax.value_and_grad(functools.partial(f, with_ref)))(X)
        np.testing.assert_allclose((value, gradient), (np.sin(X), np.cos(X)), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(f, static_argnums=0)(with_ref, X), np.sin(X), rtol=1e-6)


class Prints:
    """A value that prints as every other one of its kind does."""

    def __init__(self, with_ref):
        self.with_ref = with_ref

    def __repr__(self):
        return "Prints()"


class Unhashable(Prints):
    __hash__ = None

    def __repr__(self):
        return f"Unhashable({self.with_ref})"


@needs_refs
@pytest.mark.parametrize("kind", [Prints, Unhashable])
def test_a_ref_that_values_make_which_print_alike_or_have_no_hash(kind):
    f = custom_vjp(lambda at, x: stored(x) if at.with_ref else jnp.sin(x), nondiff_argnums=(0,))
    f.defvjp(lambda at, x: (f(at, x), x), lambda _, x, ct: (ct * jnp.cos(x),))
    for with_ref in (False, True):
        found = jax.jit(jax.value_and_grad(functools.partial(f, kind(with_ref))))(X)
        np.testing.assert_allclose(found, (np.sin(X), np.cos(X)), rtol=1e-6)


@needs_refs
def test_a_ref_that_arguments_of_some_types_make():
    f = custom_vjp(lambda x, y=None: stored(x) if x.ndim or y is not None else jnp.sin(x))
    f.defvjp(lambda x, y=None: (f(x, y), (x, y)), lambda kept, ct: (ct * jnp.cos(kept[0]), None))
    for x, *y in ((X,), (X, X), (jnp.ones(2),), (jnp.ones(3), X)):
        np.testing.assert_allclose(jax.jit(f)(x, *y), np.sin(x), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(jax.grad(lambda x, *y: f(x, *y).sum()))(x, *y), np.cos(x), rtol=1e-6)


@needs_refs
def test_a_ref_among_the_arguments():
    """It is written in the backward pass, as with jax.custom_vjp; forward mode raises what JAX raises."""

    def bwd(ref, ct):
        ref[...] = ct
        return None, ct

    f = custom_vjp(lambda ref, x: x)
    f.defvjp(lambda ref, x: (x, ref), bwd)
    ref = jax.new_ref(jnp.float32(0.0))
    jax.jit(lambda ref, x: jax.grad(lambda x: 3.0 * f(ref, x))(x))(ref, X)
    assert ref[...] == 3.0
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: f(ref, x), (X,), (X,))


def test_copies_and_pickles():
    f = custom_vjp(lambda n, x: n * jnp.sin(x), nondiff_argnums=(0,))
    f.defvjp(lambda n, x: (f(n, x), x), lambda n, x, ct: (n * ct * jnp.cos(x),))
    for g in (copy.copy(f), copy.deepcopy(f), cloudpickle.loads(cloudpickle.dumps(f)), jax.tree_util.Partial(f)):
        assert jax.grad(g, 1)(2, X) == jax.jacfwd(g, 1)(2, X) == jax.grad(f, 1)(2, X)


def test_attributes():
    f = custom_vjp(nondiff_argnums=(0,))(fun := lambda n, x: n * x)
    fwd, bwd = (lambda n, x: (f(n, x), None)), (lambda n, _, ct: (n * ct,))
    f.defvjp(fwd, bwd)
    assert (f.fun, f.fwd, f.bwd, f.nondiff_argnums) == (fun, fwd, bwd, (0,))


@pytest.mark.parametrize("symbolic_zeros", [False, True])
def test_residuals_that_are_the_arguments(x64, symbolic_zeros):
    f = custom_vjp(lambda n, x, y: n * x * jnp.sin(y), nondiff_argnums=(0,))

    def bwd(n, arguments, ct):
        x, y = arguments
        return n * ct * jnp.sin(y), n * ct * x * jnp.cos(y)

    f.defvjp(None, bwd, symbolic_zeros=symbolic_zeros)
    g, plain = functools.partial(f, 3), lambda x, y: 3 * x * jnp.sin(y)
    for derivative in (jax.jacrev, jax.jacfwd, jax.hessian, lambda h, _: jax.grad(h), lambda h, _: jax.grad(h, 1)):
        got, want = (derivative(h, (0, 1))(2.0, 0.5) for h in (g, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-15), got, want)


def test_a_wide_cotangent_is_rounded():
    """JAX hands it on, and fails where the argument meets another operation on the way back, or a scan's carry."""
    rule = lambda _, ct: (3 * ct,)

    def made(decorator):
        f = decorator(lambda x: 3 * x.astype(jnp.float32))
        f.defvjp(lambda x: (f(x), None), rule)
        return lambda x: f(x) + x.astype(jnp.float32)

    x = jnp.bfloat16(2.0)
    assert jax.grad(made(custom_vjp))(x).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="same dtypes"):
        jax.grad(made(jax.custom_vjp))(x)


@pytest.mark.skipif(not hasattr(jax.custom_vjp, "defvjp_with_logs"), reason="this JAX has no logs")
def test_logs():
    f = custom_vjp(lambda x: 2 * x)
    f.defvjp_with_logs(lambda x: (f(x), None), lambda _, ct: ((2 * ct,), {"ct": ct}))
    pullback: Any = jax.vjp(f, X)[1]
    assert pullback.with_logs(X) == ((4.0,), {"ct": 2.0})


@pytest.mark.parametrize(
    "policy", ["nothing_saveable", "everything_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]
)
def test_remat_with_a_policy(policy):
    def total(decorator):
        f = decorator(lambda w, x: jnp.tanh(x @ w))

        def bwd(residuals, ct):
            w, x, y = residuals
            ct = ct * (1 - y * y)
            return x.T @ ct, ct @ w.T

        f.defvjp(lambda w, x: (lambda y: (y, (w, x, y)))(f(w, x)), bwd)
        g = jax.checkpoint(lambda w, x: f(w, f(w, x)), policy=getattr(jax.checkpoint_policies, policy))
        return lambda w, x: g(w, x).sum()

    w, x = jnp.cos(jnp.arange(9.0)).reshape(3, 3), jnp.sin(jnp.arange(6.0)).reshape(2, 3)
    got, want = (jax.jit(jax.grad(total(d), (0, 1)))(w, x) for d in (custom_vjp, jax.custom_vjp))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    tangent = jax.jvp(total(custom_vjp), (w, x), (w, x))[1]
    np.testing.assert_allclose(tangent, jnp.vdot(want[0], w) + jnp.vdot(want[1], x), rtol=1e-5)


def test_export_key_checks_and_no_jit():
    f = custom_vjp(jnp.sin)
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * jnp.cos(x),))
    pushed = lambda x: (jax.grad(f)(x), jax.jvp(f, (x,), (x,))[1])
    exported = jax.export.export(jax.jit(pushed))(jax.ShapeDtypeStruct((), jnp.float32))
    np.testing.assert_allclose(exported.call(X), pushed(X), rtol=1e-6)
    with jax.debug_key_reuse(True):
        noisy = lambda key: jax.jvp(f, (jax.random.normal(key),), (1.0,))[1]
        assert jnp.isfinite(jax.jit(noisy)(jax.random.key(0)))
    with jax.disable_jit(), jax.debug_nans(True):
        np.testing.assert_allclose(pushed(X), (np.cos(X), np.cos(X) * X), rtol=1e-6)
