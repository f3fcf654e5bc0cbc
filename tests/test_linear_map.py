"""A linear map with a transpose of its own: every transformation, and nothing traced before it is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.roofline import roofline
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxsoftmax._linear_map import linear_map
from tests.helpers import shard_map
from tests.meshes import KINDS, mesh_of

A = np.arange(6.0).reshape(2, 3) - 2.0
X = np.array([1.0, -2.0, 0.5])


def make():
    """x ↦ sin(A) x from trees to trees, and the list in which every trace of a direction leaves a mark."""
    traced = []

    def forth(residuals, x):
        traced.append("forth")
        return {"y": jnp.sin(residuals["a"]) @ x[0]}

    def back(residuals, c):
        traced.append("back")
        return (jnp.sin(residuals["a"]).T @ c["y"],)

    def f(a, x):
        out = {"y": jax.typeof(a[:, 0])}
        return linear_map(forth, back, {"a": a}, (x,), out)["y"]

    return f, traced


def plain(a, x):
    return jnp.sin(a) @ x


def args():
    return jnp.asarray(A), jnp.asarray(X)


def close(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-13, atol=1e-13), got, want)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_derivatives_in_the_map_and_its_argument(x64, outer, inner):
    f, _ = make()
    got = outer(inner(f, argnums=(0, 1)), argnums=(0, 1))
    want = jax.jit(outer(inner(plain, argnums=(0, 1)), argnums=(0, 1)))(*args())
    close(got(*args()), want)
    close(jax.jit(got)(*args()), want)


def test_order_three(x64):
    check_grads(jax.jit(make()[0]), args(), order=3, modes=("fwd", "rev"))


def test_the_two_directions_are_what_runs():
    """A transpose that is wrong on purpose is what reverse mode returns, and its transpose is the map again."""
    double = lambda x: linear_map(lambda _, x: 2 * x, lambda _, c: 3 * c, (), x, jax.typeof(x))
    assert double(1.0 + jnp.zeros(())) == 2.0
    assert jax.jvp(double, (jnp.ones(()),), (jnp.ones(()),))[1] == 2.0
    assert jax.grad(double)(1.0) == 3.0
    assert jax.linear_transpose(double, 1.0)(1.0)[0] == 3.0


def test_nothing_is_traced_before_it_is_needed():
    f, traced = make()
    a, x = args()
    pullback = jax.make_jaxpr(lambda x: f(a, x))
    pullback(x)
    assert traced == []
    jax.make_jaxpr(lambda x: jax.vjp(lambda x: f(a, x), x)[1](jnp.ones(2)))(x)
    assert traced == ["back"]
    traced.clear()
    jax.jit(lambda x: f(a, x)).lower(x)
    assert traced == ["forth"]


def test_vmap_over_either_or_both(x64):
    f, _ = make()
    a, x = jnp.stack([A, 2 * A]), jnp.stack([X, 3 * X])
    for axes in ((0, 0), (None, 0), (0, None), (2, 1)):
        moved = tuple(v[0] if k is None else jnp.moveaxis(v, 0, k) for v, k in zip((a, x), axes))
        squares = lambda g: lambda *at: jnp.sum(g(*at) ** 2)
        every = lambda g: lambda *at: (g(*at), jax.grad(squares(g), (0, 1))(*at), jax.jacfwd(g, (0, 1))(*at))
        got, want = (jax.jit(every(jax.vmap(g, axes)))(*moved) for g in (f, plain))
        close(got, want)
    close(jax.vmap(jax.vmap(f, (None, 0)), (0, None))(a, x), jax.vmap(jax.vmap(plain, (None, 0)), (0, None))(a, x))


def test_a_collective_over_a_named_axis_of_vmap(x64):
    def mean_free(x):
        centre = lambda _, x: x - jax.lax.pmean(x, "batch")
        return linear_map(centre, centre, (), x, jax.typeof(x))

    x = jnp.arange(4.0)
    batched = jax.vmap(mean_free, axis_name="batch")
    close(batched(x), x - 1.5)
    close(jax.jit(jax.grad(lambda x: batched(x)[0]))(x), np.eye(4)[0] - 0.25)


def test_scan_and_remat(x64):
    f, _ = make()
    a, x = args()
    total = lambda g: (
        lambda a: jax.lax.scan(lambda c, s: (c + jnp.sum(g(s * a, x) ** 2), None), 0.0, jnp.arange(3.0))[0]
    )
    want = jax.grad(total(plain))(a)
    close(jax.grad(total(f))(a), want)
    close(jax.jit(jax.grad(total(jax.checkpoint(f))))(a), want)
    close(jax.jacfwd(total(f))(a), want)


def test_what_is_kept_are_the_residuals():
    f, _ = make()
    _, pullback = jax.vjp(lambda x: f(jnp.asarray(A), x), jnp.asarray(X))
    assert [leaf.shape for leaf in jax.tree.leaves(pullback)] == [(2, 3)]


def test_outputs_that_nobody_asks_for_come_as_none():
    missing = []

    def pair(x):
        forth = lambda _, x: (2 * x, 3 * x)

        def back(_, c):
            missing.append([each is None for each in c])
            return sum(k * each for k, each in zip((2, 3), c) if each is not None)

        return linear_map(forth, back, (), x, (jax.typeof(x),) * 2)

    assert jax.grad(lambda x: pair(x)[1])(1.0) == 3.0 and missing[-1] == [True, False]
    assert jax.grad(lambda x: sum(pair(x)))(1.0) == 5.0
    np.testing.assert_array_equal(jax.grad(lambda x: jax.vmap(pair)(x)[0].sum())(jnp.ones(2)), [2.0, 2.0])
    assert missing[-1] == [False, True]


def test_under_shard_map():
    """A product whose inner dimension is split over the mesh: its result is the same on every device."""
    mesh = mesh_of(KINDS[-1], k=8)

    def product(a, x):
        forth = lambda a, x: jax.lax.psum(a @ x, "k")
        back = lambda a, c: jnp.ravel(c @ a)
        return linear_map(forth, back, a, x, jax.typeof(jax.lax.psum(a @ x, "k")))

    sharded = shard_map(product, mesh=mesh, in_specs=(P(None, "k"), P("k")), out_specs=P())
    whole, v = np.cos(np.arange(32.0, dtype=np.float32)).reshape(2, 16), np.linspace(-1.0, 2.0, 16, dtype=np.float32)
    a, x = jax.device_put((whole, v), (NamedSharding(mesh, P(None, "k")), NamedSharding(mesh, P("k"))))
    np.testing.assert_allclose(jax.jit(sharded)(a, x), whole @ v, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: sharded(a, x)[0]))(x), whole[0], rtol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda x: jax.jvp(lambda x: sharded(a, x), (x,), (x,))[1])(x), whole @ v, rtol=1e-5
    )


def test_roofline_counts_the_map():
    f, _ = make()
    a, x = np.float32(A), np.float32(X)
    got, want = (roofline(g)(a, x)[1] for g in (f, plain))
    assert want.flops > 0 and (got.flops, got.hbm_bytes) == (want.flops, want.hbm_bytes)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="no axes of type Explicit")
def test_vmap_over_an_axis_that_a_mesh_splits():
    """A vector that all examples share is broadcast as the residuals are split."""
    mesh = mesh_of("Explicit", data=2)
    a, times = jnp.arange(8.0).reshape(4, 2), lambda a, x: a * x
    shared = lambda a: linear_map(times, times, a, jnp.ones(2), jax.typeof(a))
    with jax.set_mesh(mesh):
        split = jax.device_put(a, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None)))
        got = jax.jit(jax.vmap(shared))(split)
    np.testing.assert_array_equal(got, a)
