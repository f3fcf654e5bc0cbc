"""The decorator: jax.custom_vjp's interface, and forward mode too."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import SymbolicZero
from jax.experimental import io_callback
from jax.experimental.jet import jet
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxsoftmax._core.tracing import traced_once
from jaxsoftmax.autodiff import custom_vjp
from tests.helpers import one_in, shard_map
from tests.meshes import KINDS, mesh_of


def make_scaled_sin():
    """sin(x) w for a dict w, with a rule; and the list in which every run of bwd leaves a mark."""
    calls = []

    @custom_vjp
    def scaled_sin(x, params):
        return jnp.sin(x) * params["w"]

    def fwd(x, params):
        return scaled_sin(x, params), (x, params)

    def bwd(residuals, ct):
        calls.append("bwd")
        x, params = residuals
        return ct * jnp.cos(x) * params["w"], {"w": ct * jnp.sin(x)}

    scaled_sin.defvjp(fwd, bwd)
    return scaled_sin, calls


def plain(x, params):
    return jnp.sin(x) * params["w"]


ARGS = (np.linspace(-1.0, 2.0, 4), {"w": np.linspace(0.5, 3.0, 4)})


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_in_all_four_compositions(x64, outer, inner):
    f, _ = make_scaled_sin()
    got = jax.jit(outer(inner(f, argnums=(0, 1)), argnums=(0, 1)))(*ARGS)
    want = jax.jit(outer(inner(plain, argnums=(0, 1)), argnums=(0, 1)))(*ARGS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13), got, want)


def test_order_three_in_both_modes(x64):
    f, _ = make_scaled_sin()
    check_grads(jax.jit(f), jax.tree.map(jnp.asarray, ARGS), order=3, modes=("fwd", "rev"))


def test_the_rule_is_what_runs(x64):
    """A rule that is wrong on purpose shows up in both modes, so neither differentiates through the primal."""

    @custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (f(x), None), lambda _, ct: (7.0 * ct,))
    assert jax.grad(f)(1.0) == 7.0
    assert jax.jvp(f, (1.0,), (1.0,))[1] == 7.0


def test_keyword_arguments_and_defaults():
    @custom_vjp
    def f(x, scale=2.0):
        return x * scale

    f.defvjp(lambda x, scale: (f(x, scale), (x, scale)), lambda res, ct: (ct * res[1], ct * res[0]))
    assert f(3.0) == 6.0
    assert f(x=3.0, scale=4.0) == 12.0
    assert jax.grad(lambda x: f(scale=x, x=5.0))(1.0) == 5.0
    assert jax.jvp(lambda x: f(x), (3.0,), (1.0,))[1] == 2.0


def test_nondiff_argnums():
    @functools.partial(custom_vjp, nondiff_argnums=(0, 2))
    def apply(g, x, power):
        return g(x) ** power

    def bwd(g, power, x, ct):
        return (ct * jax.grad(lambda x: g(x) ** power)(x),)

    apply.defvjp(lambda g, x, power: (apply(g, x, power), x), bwd)
    value, tangent = jax.jvp(lambda x: apply(jnp.sin, x, 3), (0.5,), (1.0,))
    np.testing.assert_allclose(tangent, 3 * np.sin(0.5) ** 2 * np.cos(0.5), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: apply(jnp.sin, x, power=3))(0.5), tangent, rtol=1e-6)
    np.testing.assert_allclose(value, np.sin(0.5) ** 3, rtol=1e-6)


def make_pair():
    """Two outputs, one of them integer, of a float and an integer argument."""

    @custom_vjp
    def pair(x, k):
        return {"square": x * x, "count": k + 1}

    pair.defvjp(lambda x, k: (pair(x, k), x), lambda x, ct: (2 * x * ct["square"], None))
    return pair


def test_integer_arguments_and_outputs():
    pair = make_pair()
    out, tangent = jax.jvp(lambda x: pair(x, jnp.array(3)), (2.0,), (1.0,))
    assert out["count"] == 4 and tangent["square"] == 4.0 and tangent["count"].dtype == jax.dtypes.float0
    assert jax.grad(lambda x: pair(x, jnp.array(3))["square"])(2.0) == 4.0
    assert jax.hessian(lambda x: pair(x, jnp.array(3))["square"])(2.0) == 2.0
    floats = (np.zeros((), jax.dtypes.float0),)
    assert jax.jvp(pair, (2.0, 3), (1.0, *floats))[1]["square"] == 4.0


def test_frozen_arguments_are_not_perturbed():
    seen = []

    @custom_vjp
    def f(x, w):
        return x * w

    def fwd(x, w):
        seen.append((x.perturbed, w.perturbed))
        return f(x.value, w.value), (x.value, w.value)

    f.defvjp(fwd, lambda res, ct: (ct * res[1], ct * res[0]), symbolic_zeros=True)
    assert jax.grad(f)(2.0, 3.0) == 3.0 and seen[-1] == (True, False)
    assert jax.jvp(lambda w: f(2.0, w), (3.0,), (1.0,))[1] == 2.0 and seen[-1] == (False, True)


def test_vmap_scan_remat(x64):
    f, _ = make_scaled_sin()
    x, params = jax.tree.map(jnp.asarray, ARGS)
    want = jax.vmap(jax.grad(plain, argnums=1))(x, params)["w"]
    got = jax.vmap(jax.grad(f, argnums=1))(x, params)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-14)
    shared = jax.vmap(jax.grad(f), in_axes=(0, None))(x, {"w": jnp.asarray(2.0)})
    np.testing.assert_allclose(shared, 2 * jnp.cos(x), rtol=1e-14)

    def total(g, x):
        return jax.lax.scan(lambda carry, xw: (carry + g(xw[0], {"w": xw[1]}), None), 0.0, (x, params["w"]))[0]

    np.testing.assert_allclose(jax.grad(lambda x: total(jax.checkpoint(f), x))(x), jnp.cos(x) * params["w"], rtol=1e-14)
    np.testing.assert_allclose(jax.jacfwd(lambda x: total(f, x))(x), jnp.cos(x) * params["w"], rtol=1e-14)


def test_collectives_inside_the_rule():
    """A class axis sharded over the mesh: log-sum-exp with its pmax and psum, replication checks on."""
    mesh = mesh_of(KINDS[-1], k=8)

    @custom_vjp
    def lse(z):
        m = jax.lax.pmax(jax.lax.stop_gradient(z).max(), "k")
        return m + jnp.log(jax.lax.psum(jnp.exp(z - m).sum(), "k"))

    def fwd(z):
        out = lse(z)
        return out, (z, out)

    lse.defvjp(fwd, lambda res, ct: (ct * jnp.exp(res[0] - res[1]),))
    sharded = shard_map(lse, mesh=mesh, in_specs=P("k"), out_specs=P())
    z, v = jnp.linspace(-1.0, 2.0, 16), jnp.cos(jnp.arange(16.0))
    p = jax.nn.softmax(z)
    z, v = jax.device_put((z, v), NamedSharding(mesh, P("k")))
    np.testing.assert_allclose(jax.jit(jax.grad(sharded))(z), p, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda z: jax.jvp(sharded, (z,), (v,))[1])(z), np.dot(p, v), rtol=1e-5)


def test_an_argument_that_is_the_same_on_every_device():
    """Its cotangent is the sum of the devices'; a bwd of the wrong length is refused there too."""
    mesh = mesh_of(KINDS[-1], k=8)

    @custom_vjp
    def scaled(x, w):
        return x * w

    scaled.defvjp(lambda x, w: (scaled(x, w), (x, w)), lambda res, ct: (ct * res[1], jnp.sum(ct * res[0])))
    sharded = shard_map(scaled, mesh=mesh, in_specs=(P("k"), P()), out_specs=P("k"))
    x, w, v = jnp.arange(16.0), jnp.float32(3.0), jnp.cos(jnp.arange(16.0))
    x, v = jax.device_put((x, v), NamedSharding(mesh, P("k")))
    dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sum(sharded(x, w) * v), (0, 1)))(x, w)
    np.testing.assert_allclose(dx, 3 * v, rtol=1e-6)
    np.testing.assert_allclose(dw, np.dot(x, v), rtol=1e-5)
    pushed = jax.jit(lambda x, w: jax.jvp(sharded, (x, w), (v, jnp.ones_like(w)))[1])(x, w)
    np.testing.assert_allclose(pushed, 3 * v + x, rtol=1e-5, atol=1e-6)

    scaled.defvjp(lambda x, w: (scaled(x, w), w), lambda w, ct: (ct * w, ct.sum(), ct))
    with pytest.raises((TypeError, ValueError)):
        jax.jit(jax.grad(lambda x: jnp.sum(sharded(x, w))))(x)


def test_methods_and_names():
    class Model:
        @custom_vjp
        def double(self, x):
            """Twice x."""
            return 2 * x

    assert Model.double.__name__ == "double" and Model.double.__doc__ == "Twice x."


def test_missing_rule():
    @custom_vjp
    def lonely(x):
        return x

    with pytest.raises(AttributeError, match="No VJP defined for custom_vjp function lonely using defvjp"):
        lonely(1.0)


def test_wrong_rules_say_what_is_wrong():
    with pytest.raises(TypeError, match="bwd must be a function, got int"):
        custom_vjp(jnp.sin).defvjp(jnp.sin, 3)

    @custom_vjp
    def f(x, y):
        return x * y

    f.defvjp(lambda x, y: f(x, y), lambda res, ct: (ct, ct))
    with pytest.raises(
        TypeError, match=r"fwd rule <lambda> for function f must produce a pair \(output, residuals\), got float"
    ):
        jax.grad(f)(1.0, 2.0)

    for bwd in (lambda res, ct: (ct,), lambda res, ct: (ct, {"w": ct}), lambda res, ct: ct):
        g = custom_vjp(lambda x, y: x * y)
        g.defvjp(lambda x, y, g=g: (g(x, y), (x, y)), bwd)
        for differentiate in (jax.grad(g), lambda x, y, g=g: jax.jvp(lambda x: g(x, y), (x,), (1.0,))):
            with pytest.raises((TypeError, ValueError), match="bwd"):
                differentiate(1.0, 2.0)

    wrong_shape = custom_vjp(lambda x: x.sum())
    wrong_shape.defvjp(lambda x: (wrong_shape(x), x), lambda x, ct: (ct * jnp.ones(3),))
    with pytest.raises((TypeError, ValueError), match="bwd|shape"):
        jax.grad(wrong_shape)(jnp.ones(2))


# --- reverse mode is that of jax.custom_vjp, whatever bwd is made of ---

seen = []


def note(x):
    seen.append(np.asarray(x).copy())


def through_numpy(ct):
    shape = jax.ShapeDtypeStruct(ct.shape, ct.dtype)
    return jax.pure_callback(lambda c: np.asarray(2 * c, np.float32), shape, ct, vmap_method="expand_dims")


def noted(ct):
    jax.debug.callback(note, ct)
    return ct


def noted_in_order(ct):
    return io_callback(lambda c: (note(c), c)[1], jax.ShapeDtypeStruct(ct.shape, ct.dtype), ct, ordered=False)


def doubled_while(ct, steps):
    return jax.lax.while_loop(lambda c: c[1] < steps, lambda c: (2 * c[0], c[1] + 1), (ct, jnp.zeros_like(steps)))[0]


MIDDLE = np.array([0.0, 1.0, 0.0], np.float32)

# What bwd makes of the cotangent of x[1] · 2, on the way to the three entries of its cotangent for x.
AWKWARD = {
    "set": lambda ct, x: jnp.zeros_like(x).at[1].set(2 * ct),
    "while_loop": lambda ct, x: doubled_while(ct, jnp.int32(1)) * MIDDLE,
    "traced fori_loop": lambda ct, x: jax.lax.fori_loop(0, jnp.int32(x[0]), lambda _, c: 2 * c, ct) * MIDDLE,
    "pure_callback": lambda ct, x: through_numpy(ct) * MIDDLE,
    "debug.callback": lambda ct, x: 2 * noted(ct) * MIDDLE,
    "io_callback": lambda ct, x: 2 * noted_in_order(ct) * MIDDLE,
    "nonlinear": lambda ct, x: 2 * jnp.sqrt(ct * ct) * MIDDLE,
}


def twice_the_second(decorator, bwd):
    @decorator
    def f(x):
        return 2 * x[1]

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (bwd(ct, x).astype(x.dtype),))
    return f


@pytest.mark.parametrize("kind", one_in(2, AWKWARD))
def test_reverse_mode_runs_bwd_itself(kind):
    x = np.float32([[1.0, 2.0, 3.0], [1.0, 5.0, 6.0]])

    def reverses(f):
        total = lambda x: jax.lax.scan(lambda c, row: (c + f(row) ** 2, None), 0.0, x)[0]
        yield jax.grad(f)(x[0])
        yield jax.jit(jax.grad(f))(x[0])
        yield jax.jit(jax.vmap(jax.grad(f)))(x)
        yield jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(f)(x) * jnp.array([1.0, 3.0]))))(x)
        yield jax.jit(jax.grad(jax.checkpoint(f)))(x[0])
        yield jax.grad(jax.jit(f))(x[0])
        yield jax.jit(jax.grad(total))(x)

    for got, want in zip(
        reverses(twice_the_second(custom_vjp, AWKWARD[kind])),
        reverses(twice_the_second(jax.custom_vjp, AWKWARD[kind])),
    ):
        np.testing.assert_array_equal(got, want)
        assert np.any(want)


@pytest.mark.parametrize("kind", ["debug.callback", "io_callback"])
def test_a_callback_in_bwd_runs_once(kind):
    f = twice_the_second(custom_vjp, AWKWARD[kind])
    for gradient in (jax.grad(f), jax.jit(jax.grad(f))):
        seen.clear()
        gradient(jnp.ones(3))
        jax.effects_barrier()
        assert seen == [1.0]


def test_bwd_is_traced_once_in_reverse_mode_and_not_at_all_in_evaluation():
    f, calls = make_scaled_sin()
    jax.jit(f)(*ARGS)
    assert calls == []
    jax.jit(jax.grad(lambda x: f(x, ARGS[1]).sum()))(ARGS[0])
    assert calls == ["bwd"]


@pytest.mark.skipif(not hasattr(jax.sharding, "use_abstract_mesh"), reason="JAX 0.6 traces both in one context")
def test_sums_that_a_rule_shares_are_traced_once():
    """In the value and in the forward pass, which JAX traces in contexts of their own."""
    traced = []

    @traced_once
    def total(x, axis):
        traced.append(axis)
        return jnp.sum(x, axis)

    f = custom_vjp(lambda x: total(x, axis=0))
    f.defvjp(lambda x: (f(x), (x, total(x, axis=0))), lambda residuals, ct: (ct + 0 * residuals[0],))
    jax.jit(jax.grad(jax.jit(f))).trace(jnp.ones(3))
    assert traced == [0]


def test_the_program_of_reverse_mode_is_that_of_jax():
    """The same operations in the same order: nothing of forward mode is left in it."""

    def operations(decorator):
        f = twice_the_second(decorator, lambda ct, x: jnp.sin(ct) * x)
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.cos(f(x))))(jnp.ones(3))
        return [eqn.primitive.name for eqn in jaxpr.eqns if not eqn.primitive.name.startswith("custom_")]

    ours, theirs = operations(custom_vjp), operations(jax.custom_vjp)
    assert "sin" in theirs and ours[ours.index("sin") :] == theirs[theirs.index("sin") :]


@pytest.mark.parametrize("rounded", [True, False])
def test_mixed_dtypes(rounded):
    """bwd gets a float32 cotangent of a float32 output, and returns that of a bfloat16 argument rounded or to round."""

    def make(decorator, rounded=True):
        @decorator
        def f(x, w):
            return x.astype(jnp.float32) * w

        def bwd(res, ct):
            x, w = res
            assert ct.dtype == jnp.float32
            return (ct * w).astype(jnp.bfloat16 if rounded else jnp.float32), ct * x.astype(jnp.float32)

        f.defvjp(lambda x, w: (f(x, w), (x, w)), bwd)
        return f

    x, w = jnp.arange(3.0).astype(jnp.bfloat16), jnp.float32(3.0) + jnp.arange(3.0)
    f, g = make(custom_vjp, rounded), make(jax.custom_vjp)
    for got, want in zip(jax.vjp(f, x, w)[1](w), jax.vjp(g, x, w)[1](w)):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    tangent = jax.jvp(f, (x, w), (x, w))[1]
    assert tangent.dtype == jnp.float32
    np.testing.assert_array_equal(tangent, 2 * x.astype(jnp.float32) * w)


def test_symbolic_zeros_reach_bwd():
    """Of two outputs only one is used: the other's cotangent is a SymbolicZero, as with jax.custom_vjp."""
    kinds = []

    @custom_vjp
    def f(x):
        return jnp.sin(x), jnp.cos(x), 3

    def bwd(x, cts):
        kinds.append([isinstance(ct, SymbolicZero) for ct in cts[:2]])
        return (sum(jnp.ones_like(x) * (0.0 if isinstance(ct, SymbolicZero) else ct) for ct in cts[:2]),)

    f.defvjp(lambda x: (f(x.value), x.value), bwd, symbolic_zeros=True)
    assert jax.grad(lambda x: 5 * f(x)[1])(1.0) == 5.0 and kinds[-1] == [True, False]
    assert jax.grad(lambda x: f(x)[0] + f(x)[1])(1.0) == 2.0
    x = jnp.ones(2)
    np.testing.assert_array_equal(jax.grad(lambda x: jax.vmap(f)(x)[0].sum())(x), x)
    assert kinds[-1] == [False, True]
    assert jax.jvp(lambda x: f(x)[:2], (1.0,), (2.0,))[1] == (2.0, 2.0)


def test_derivatives_of_derivatives_where_bwd_is_differentiable(x64):
    """bwd with a set and a pure_callback of the residual alone: grad of grad, and forward over reverse, as with JAX."""

    def make(decorator):
        f = decorator(lambda x: jnp.sum(jnp.sin(x)))
        f.defvjp(lambda x: (f(x), x), lambda x, ct: (jnp.zeros_like(x).at[:].set(ct * jnp.cos(x)),))
        return f

    x, v = jnp.linspace(-1.0, 2.0, 3), jnp.arange(3.0)
    f = make(custom_vjp)
    for second in (
        lambda x: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
        lambda x: jax.jvp(jax.grad(f), (x,), (v,))[1],
        lambda x: jax.hessian(f)(x) @ v,
        lambda x: jax.jacrev(jax.jacrev(f))(x) @ v,
    ):
        np.testing.assert_allclose(jax.jit(second)(x), -np.sin(x) * v, rtol=1e-14)


# --- forward mode says what it needs ---


@pytest.mark.parametrize("kind", AWKWARD)
def test_forward_mode_of_a_bwd_without_a_transpose(kind):
    f = twice_the_second(custom_vjp, AWKWARD[kind])
    x = jnp.array([1.0, 2.0, 3.0])
    if kind in ("set", "debug.callback"):  # transposes where the index is known; leaves the callback out
        seen.clear()
        assert jax.jvp(f, (x,), (x,))[1] == 4.0 and not seen
        return
    for forward in (
        lambda: jax.jvp(f, (x,), (x,)),
        lambda: jax.jit(jax.jacfwd(f))(x),
        lambda: jax.vmap(lambda x: jax.jvp(f, (x,), (x,)))(x[None]),
    ):
        with pytest.raises(
            TypeError, match=r"^f: forward mode .* needs the transpose of bwd.*defvjp\(fwd, bwd, jvp=\.\.\.\)"
        ):
            forward()


def test_an_explicit_rule_for_forward_mode(x64):
    """It runs in forward mode, bwd in reverse mode; both at second order."""
    f = custom_vjp(lambda k, x, w, n: jnp.sin(k * x) * w, nondiff_argnums=(0,))

    def bwd(k, res, ct):
        x, w = res
        ct = doubled_while(ct, jnp.int32(0))
        return ct * k * jnp.cos(k * x) * w, jnp.sum(ct * jnp.sin(k * x)), None

    def jvp(k, primals, tangents):
        (x, w, n), (dx, dw, dn) = primals, tangents
        assert dn.dtype == jax.dtypes.float0
        return f(k, x, w, n), k * jnp.cos(k * x) * w * dx + jnp.sin(k * x) * dw

    f.defvjp(lambda k, x, w, n: (f(k, x, w, n), (x, w)), bwd, jvp=jvp)
    x, w, n = jnp.linspace(-1.0, 2.0, 3), jnp.asarray(3.0), jnp.arange(2)
    g, plain = (lambda x, w: f(2.0, x, w, n)), (lambda x, w: jnp.sin(2.0 * x) * w)
    close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-14))
    for derivative in (
        lambda f: jax.jacfwd(f, (0, 1)),
        lambda f: jax.jacrev(f, (0, 1)),
        lambda f: jax.hessian(lambda x, w: f(x, w).sum()),
        lambda f: jax.jacfwd(jax.jacfwd(f, 1)),
        lambda f: jax.vmap(jax.jacfwd(f), (0, None)),
    ):
        close(jax.jit(derivative(g))(x, w), jax.jit(derivative(plain))(x, w))


# --- the interface of jax.custom_vjp ---


@pytest.mark.parametrize(
    "how", [{"nondiff_argnames": ("power", "g")}, {"nondiff_argnums": (2,), "nondiff_argnames": ["g"]}]
)
def test_nondiff_argnames(how):
    apply = custom_vjp(**how)(lambda g, x, power: g(x) ** power)
    bwd = lambda g, power, x, ct: (ct * jax.grad(lambda x: g(x) ** power)(x),)
    apply.defvjp(lambda g, x, power: (apply(g, x, power), x), bwd)
    want = 3 * np.sin(0.5) ** 2 * np.cos(0.5)
    np.testing.assert_allclose(jax.grad(lambda x: apply(jnp.sin, x, power=3))(0.5), want, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(lambda x: apply(jnp.sin, x, 3), (0.5,), (1.0,))[1], want, rtol=1e-6)


def test_nondiff_argnames_that_do_not_exist():
    with pytest.raises(ValueError, match=r"nondiff_argnames has \['scale'\], .*\['x', 'power'\]"):
        custom_vjp(lambda x, power: x**power, nondiff_argnames=("scale",))


def test_optimize_remat():
    """Under jax.checkpoint the first pass runs the function, not fwd, whose residuals nobody keeps: as with JAX."""
    ran = []

    def sine(name):
        compute = lambda x: (ran.append(name), np.asarray(np.sin(x), np.float32))[1]
        return lambda x: jax.pure_callback(compute, jax.ShapeDtypeStruct((), jnp.float32), x)

    for optimize, want in ((False, ["fwd"]), (True, ["f"])):
        for decorator in (jax.custom_vjp, custom_vjp):
            g = decorator(sine("f"))
            fwd = lambda x: (sine("fwd")(x), x)
            g.defvjp(fwd, lambda x, ct: (ct * jnp.cos(x),), optimize_remat=optimize)
            ran.clear()
            gradient = jax.jit(jax.grad(lambda x: jnp.sin(jax.checkpoint(g)(x))))(1.0)
            np.testing.assert_allclose(gradient, np.cos(np.sin(1.0)) * np.cos(1.0), rtol=1e-6)
            assert ran == want


def test_the_signature_and_the_function_are_kept():
    def f(x: jax.Array, scale: float = 2.0) -> jax.Array:
        """Doc."""
        return x * scale

    g = custom_vjp(f)
    assert g.__wrapped__ is f and inspect.signature(g) == inspect.signature(f)
    assert (g.__name__, g.__doc__, g.__module__) == ("f", "Doc.", __name__)


def test_jet_carries_no_rules():
    """`jax.experimental.jet` fails at every function with a rule, JAX's own too; nested jvp is exact at every order."""
    f, _ = make_scaled_sin()
    for g in (jax.nn.relu, lambda x: f(x, {"w": 2.0})):
        with pytest.raises((jax.errors.UnexpectedTracerError, AttributeError)):
            jet(g, (0.3,), ((1.0, 0.0, 0.0),))
    along = lambda g: lambda x: jax.jvp(g, (x,), (1.0,))[1]
    third = along(along(along(lambda x: f(x, {"w": 2.0}))))
    np.testing.assert_allclose(third(0.3), -2 * np.cos(0.3), rtol=1e-6)
