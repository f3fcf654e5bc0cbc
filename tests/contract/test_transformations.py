"""Every public differentiable function under every transformation: the registry's tests.

What a case is asked for is compiled once, in two programs; the tests look at their parts. By default every case is held
against difference quotients, and one in six meets every transformation.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.helpers import DERIVATIVE_RTOL, VALUE_RTOL, assert_close, enable_x64, only, shard_map
from tests.meshes import KINDS, mesh_of
from tests.registry import CASES, HEADS, case_id

DEFAULT = CASES[::6]  # the same in every test, since the tests of a case share `computed`


def over(cases: list):
    return pytest.mark.parametrize("case", only(DEFAULT, cases), ids=case_id)


BATCHED = [c for c in CASES if c.batched]

# One of each kind: all share the one decorator that knows of meshes.
ON_A_MESH = {"softmax", "logsumexp_b", "entmax", "softmax_vjp", "softmax_cross_entropy_with_integer_labels"}
ON_A_MESH |= {"jensen_shannon_divergence", "sigmoid_focal_loss", "sum_squared_error"}


STEP = 1e-3  # of difference quotients of order h⁴


def directions(arrays, seed=3):
    """A direction for each array; float0 for integers."""
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=a.shape), a.dtype) if a.dtype.kind == "f" else np.zeros(a.shape, jax.dtypes.float0)
        for a in arrays
    )


def floating(trees, case):
    return tuple(trees[i] for i in case.argnums)


def all_axes(args):
    """Each argument batched along axis 0, along axis 1, and not at all; all alike, and each differently."""
    turns = [itertools.islice(itertools.cycle((0, 1, None)), n, n + len(args)) for n in range(3)]
    choices = {
        tuple(0 if axis == 1 and a.ndim == 1 else axis for axis, a in zip(axes, args))
        for axes in ([0] * len(args), [1] * len(args), *turns)
    }
    return sorted((axes for axes in choices if any(axis is not None for axis in axes)), key=str)


def run(program, case) -> dict:
    """What `program(case)` returns for the case's arguments, in float64."""
    with enable_x64():
        args = case.cast("float64")
        value = jax.eval_shape(case.fn, *args)
        return jax.tree.map(np.asarray, program(case)(args, directions(args), directions([value], seed=4)[0]))


@functools.cache
def derived(case) -> dict:
    return run(derivatives, case)


@functools.cache
def computed(case) -> dict:
    return derived(case) | run(transformed, case)


def derivatives(case):
    f = case.fn

    def first_order(args, tangents, cotangent):
        along = lambda step: f(*(a + step * t if a.dtype == t.dtype else a for a, t in zip(args, tangents)))
        ahead, behind, far_ahead, far_behind = jax.vmap(along)(STEP * jnp.array([1.0, -1.0, 2.0, -2.0]))
        return {
            "difference": (8 * (ahead - behind) - (far_ahead - far_behind)) / (12 * STEP),
            "value": f(*args),
            "jvp": jax.jvp(f, args, tangents)[1],
            "vjp": floating(jax.vjp(f, *args)[1](cotangent), case),
        }

    return jax.jit(first_order)


def transformed(case):
    f, argnums = case.fn, case.argnums
    first = argnums[0]

    def scanned(*args):
        return jax.lax.scan(lambda carry, example: (carry, jax.checkpoint(f)(*example)), 0.0, args)[1]

    def mapped(args, axes):
        moved = [a[0] if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in zip(args, axes)]
        return jax.vmap(f, axes)(*moved)

    def everything(args, tangents, cotangent):
        out = {"jacfwd": jax.jacfwd(f, argnums)(*args), "jacrev": jax.jacrev(f, argnums)(*args)}
        if not case.batched:
            out |= {"remat": [mode(jax.checkpoint(f), first)(*args) for mode in (jax.jacfwd, jax.jacrev)]}
        else:
            out |= {
                "scan": scanned(*args),
                "scan and remat": [mode(scanned, first)(*args) for mode in (jax.jacfwd, jax.jacrev)],
                "vmap of jacrev": jax.vmap(jax.jacrev(f, first))(*args),
                "vmap": [mapped(args, axes) for axes in all_axes(args)],
            }
        return out

    return jax.jit(everything)


@over(CASES)
def test_jit(case, x64):
    assert_close(case.fn(*case.cast("float64")), computed(case)["value"], VALUE_RTOL["float64"])


@pytest.mark.slow
@pytest.mark.parametrize("case, mode", [*((c, "rev") for c in CASES), *((c, "fwd") for c in CASES[::3])], ids=case_id)
def test_order_three(case, mode, x64):
    args = case.cast("float64")

    def f(*variable):
        every = list(args)
        for i, x in zip(case.argnums, variable):
            every[i] = x
        return case.fn(*every)

    check_grads(f, tuple(args[i] for i in case.argnums), order=3, modes=(mode,), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_derivatives_are_difference_quotients(case, x64):
    """In every argument at once, in forward mode; in reverse mode as its transpose."""
    got, args = derived(case), case.cast("float64")
    (cotangent,), tangents = directions([got["value"]], seed=4), floating(directions(args), case)
    assert_close(got["jvp"], got["difference"], 1e-8, scale=1 + np.max(np.abs(got["jvp"])))
    pulled = sum(np.vdot(g, t) for g, t in zip(got["vjp"], tangents))
    assert_close(pulled, np.vdot(cotangent, got["jvp"]), 1e-11, scale=1 + np.sum(np.abs(cotangent * got["jvp"])))


@over(CASES)
def test_jvp_vjp_jacfwd_jacrev_agree(case, x64):
    got, args = computed(case), case.cast("float64")
    forward, value = got["jacfwd"], got["value"]
    tangents, (cotangent,) = floating(directions(args), case), directions([value], seed=4)
    assert_close(got["jacrev"], forward)
    applied = sum(np.tensordot(j, t, t.ndim) for j, t in zip(forward, tangents))
    assert_close(got["jvp"], applied)
    assert_close(got["vjp"], tuple(np.tensordot(cotangent, j, value.ndim) for j in forward))


@pytest.mark.slow
@over(CASES)
def test_hessian_vector_products_in_all_four_compositions(case, x64):
    args = case.cast("float64")
    tangents, (weights,) = directions(args), directions([jax.eval_shape(case.fn, *args)], seed=5)

    def scalar(*args):
        return jnp.sum(case.fn(*args) * weights)

    def along(*args):
        return jax.jvp(scalar, args, tangents)[1]

    def dot(gradient):
        return sum(jnp.sum(g * t) for g, t in zip(gradient, floating(tangents, case)))

    gradient = jax.grad(scalar, case.argnums)
    products = [
        jax.jit(lambda *a: jax.jvp(gradient, a, tangents)[1]),
        jax.jit(jax.grad(along, case.argnums)),
        jax.jit(jax.grad(lambda *a: dot(gradient(*a)), case.argnums)),
    ]
    first = products[0](*args)
    for product in products[1:]:
        assert_close(product(*args), first)
    twice = jax.jit(lambda *a: jax.jvp(along, a, tangents)[1])(*args)
    assert_close(twice, dot(first), rtol=1e-9)


@over(BATCHED)
def test_vmap_with_all_in_axes(case, x64):
    args, one = case.cast("float64"), jax.jit(case.fn)
    for axes, got in zip(all_axes(args), computed(case)["vmap"]):
        rows = [[a[0] if axis is None else a[i] for a, axis in zip(args, axes)] for i in range(len(args[0]))]
        assert_close(got, np.stack([one(*row) for row in rows]), VALUE_RTOL["float64"])


@over(BATCHED)
def test_batch_is_a_vmap(case):
    """Nothing flows from one example to another."""
    got, first = computed(case), case.args[case.argnums[0]]
    joint = got["jacfwd"][0]
    value_ndim = joint.ndim - first.ndim
    blocks = np.stack([np.take(np.take(joint, i, 0), i, value_ndim - 1) for i in range(len(first))])
    assert_close(got["vmap of jacrev"], blocks)
    assert_close(joint.sum(value_ndim), blocks)


@over(BATCHED)
def test_scan_and_remat(case):
    got = computed(case)
    assert_close(got["scan"], got["value"], VALUE_RTOL["float64"])
    assert_close(got["scan and remat"], [got["jacfwd"][0]] * 2)


@over([c for c in CASES if not c.batched])
def test_remat(case):
    got = computed(case)
    assert_close(got["remat"], [got["jacfwd"][0]] * 2)


@over([c for c in CASES if c.name not in {h.name for h in HEADS}])
def test_dtypes(case):
    """Value and gradient in each dtype, against float64 at the same arguments; of heads in test_losses.py."""

    def value_and_gradient(args):
        value, pullback = jax.vjp(case.fn, *args)
        return value, floating(pullback(jnp.ones_like(value)), case)

    dtypes = ("float32", "float16", "bfloat16")
    every = [case.cast(dtype) for dtype in dtypes]
    results = jax.jit(lambda every: [value_and_gradient(args) for args in every])(every)
    value, jacobians = computed(case)["value"], computed(case)["jacfwd"]
    gradient = [j.sum(tuple(range(value.ndim))) for j in jacobians]
    scale = max(1.0, *(float(np.max(np.abs(g))) for g in gradient))
    for dtype, args, (out, got) in zip(dtypes, every, results):
        assert out.dtype == (jnp.float32 if case.is_loss else dtype)
        assert_close(out, value, VALUE_RTOL["float32" if case.is_loss else dtype])
        assert all(g.dtype == a.dtype for g, a in zip(got, floating(args, case)))
        assert_close(got, gradient, DERIVATIVE_RTOL[dtype], scale=scale)


@over([c for c in CASES if c.name in ON_A_MESH])
def test_batch_sharded_over_a_mesh(case):
    """shard_map with its replication checks on, over the batch, in value and in both modes."""
    size = len(case.args[0])
    mesh = mesh_of(KINDS[-1], batch=size)
    spec = jax.sharding.PartitionSpec("batch")
    plain = case.cast("float32")
    args = jax.device_put(plain, jax.sharding.NamedSharding(mesh, spec))

    def all_at_once(*args):
        def f(*variable):
            every = list(args)
            for i, x in zip(case.argnums, variable):
                every[i] = x
            return case.fn(*every)

        variable = floating(args, case)
        out, pullback = jax.vjp(f, *variable)
        return out, jax.jvp(f, variable, tuple(jnp.cos(a) for a in variable))[1], pullback(jnp.cos(out))

    value, *derivatives = jax.jit(shard_map(all_at_once, mesh=mesh, in_specs=spec, out_specs=spec))(*args)
    wanted, *right = jax.jit(all_at_once)(*plain)
    assert_close(value, wanted, VALUE_RTOL["float32"])
    assert_close(
        derivatives, right, DERIVATIVE_RTOL["float32"], scale=1.0
    )  # third derivatives nearly cancel in the sum
