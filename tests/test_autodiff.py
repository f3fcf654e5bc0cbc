"""The decorator: jax.custom_vjp's interface, and forward mode too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxsoftmax.autodiff import custom_vjp
from tests.helpers import shard_map


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
    want = outer(inner(plain, argnums=(0, 1)), argnums=(0, 1))(*ARGS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13), got, want)


def test_order_three_in_both_modes(x64):
    f, _ = make_scaled_sin()
    check_grads(f, jax.tree.map(jnp.asarray, ARGS), order=3, modes=("fwd", "rev"))


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


def test_residuals_are_those_of_fwd():
    """bwd derives three more arrays from its residual; none of them is kept between the passes."""

    @custom_vjp
    def f(x):
        return jnp.tanh(x)

    def bwd(y, ct):
        mask, other = jnp.ceil(y), jnp.exp(y)
        return (ct * (1 - y * y) * jnp.where(y > 2, other, 1.0) + 0 * mask * ct,)

    f.defvjp(lambda x: (lambda y: (y, y))(f(x)), bwd)
    _, pullback = jax.vjp(f, jnp.ones((5, 3)))
    assert [leaf.shape for leaf in jax.tree.leaves(pullback)] == [(5, 3)]


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
    mesh = jax.make_mesh((8,), ("k",))

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
    mesh = jax.make_mesh((8,), ("k",))

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

    with pytest.raises(TypeError, match="lonely has no derivative rule.*defvjp"):
        lonely(1.0)


def test_wrong_rules_say_what_is_wrong():
    with pytest.raises(TypeError, match="bwd must be a function, got int"):
        custom_vjp(jnp.sin).defvjp(jnp.sin, 3)

    @custom_vjp
    def f(x, y):
        return x * y

    f.defvjp(lambda x, y: f(x, y), lambda res, ct: (ct, ct))
    with pytest.raises(TypeError, match="f: fwd must return the pair"):
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
