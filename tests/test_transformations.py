"""Every public differentiable function under every transformation: the registry's tests."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.conftest import enable_x64
from tests.helpers import CASES, DERIVATIVE_RTOL, VALUE_RTOL, assert_close, case_id, shard_map

over_cases = pytest.mark.parametrize("case", CASES, ids=case_id)
over_batched = pytest.mark.parametrize("case", [c for c in CASES if c.batched], ids=case_id)


def directions(args, seed=3):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in args)


@functools.cache
def reference(case):
    """Value and Jacobians in float64, by plain jacfwd: what the other transformations are held against."""
    with enable_x64():
        args = case.cast("float64")
        jacobians = jax.jit(jax.jacfwd(case.fn, tuple(range(len(args)))))(*args)
        return np.asarray(case.fn(*args)), tuple(np.asarray(j) for j in jacobians)


@over_cases
def test_jit(case, x64):
    args = case.cast("float64")
    assert_close(jax.jit(case.fn)(*args), reference(case)[0], VALUE_RTOL["float64"])


@pytest.mark.slow
@over_cases
@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_order_three(case, mode, x64):
    check_grads(case.fn, case.cast("float64"), order=3, modes=(mode,), atol=1e-4, rtol=1e-4)


@over_cases
def test_jvp_vjp_jacfwd_jacrev_agree(case, x64):
    args = case.cast("float64")
    argnums = tuple(range(len(args)))
    tangents = directions(args)
    value, forward = reference(case)
    (cotangent,) = directions((value,), seed=4)

    @jax.jit
    def all_at_once(args, tangents, cotangent):
        pushed = jax.jvp(case.fn, args, tangents)[1]
        return jax.jacrev(case.fn, argnums)(*args), pushed, jax.vjp(case.fn, *args)[1](cotangent)

    reverse, pushed, pulled = all_at_once(args, tangents, cotangent)
    assert_close(reverse, forward, DERIVATIVE_RTOL["float64"])
    applied = sum(np.tensordot(j, t, t.ndim) for j, t in zip(forward, tangents))
    assert_close(pushed, applied, DERIVATIVE_RTOL["float64"])
    assert_close(pulled, tuple(np.tensordot(cotangent, j, value.ndim) for j in forward), DERIVATIVE_RTOL["float64"])


@pytest.mark.slow
@over_cases
def test_hessian_vector_products_in_all_four_compositions(case, x64):
    args = case.cast("float64")
    tangents = directions(args)
    (weights,) = directions((jax.eval_shape(case.fn, *args),), seed=5)
    argnums = tuple(range(len(args)))

    def scalar(*args):
        return jnp.sum(case.fn(*args) * weights)

    def along(*args):
        return jax.jvp(scalar, args, tangents)[1]

    def dot(gradient):
        return sum(jnp.sum(g * t) for g, t in zip(gradient, tangents))

    gradient = jax.grad(scalar, argnums)
    products = [
        jax.jit(lambda *a: jax.jvp(gradient, a, tangents)[1]),
        jax.jit(jax.grad(along, argnums)),
        jax.jit(jax.grad(lambda *a: dot(gradient(*a)), argnums)),
    ]
    first = products[0](*args)
    for product in products[1:]:
        assert_close(product(*args), first, DERIVATIVE_RTOL["float64"])
    twice = jax.jit(lambda *a: jax.jvp(along, a, tangents)[1])(*args)
    np.testing.assert_allclose(twice, dot(first), rtol=1e-9, atol=1e-12)


@over_batched
def test_vmap_with_all_in_axes(case, x64):
    """Batched along axis 0, along axis 1, or not at all, each argument for itself; compiled as one program."""
    args = case.cast("float64")
    choices = [
        axes
        for axes in itertools.product(*((0, 1, None) if a.ndim > 1 else (0, None) for a in args))
        if any_batched(axes)
    ]

    def batched(args, axes):
        moved = [a[0] if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in zip(args, axes)]
        return jax.vmap(case.fn, axes)(*moved)

    outputs = jax.jit(lambda *args: [batched(args, axes) for axes in choices])(*args)
    one = jax.jit(case.fn)
    for axes, got in zip(choices, outputs):
        rows = [[a[0] if axis is None else a[i] for a, axis in zip(args, axes)] for i in range(len(args[0]))]
        assert_close(got, np.stack([one(*row) for row in rows]), VALUE_RTOL["float64"])


def any_batched(axes) -> bool:
    return any(axis is not None for axis in axes)


@over_batched
def test_batch_is_a_vmap(case, x64):
    args = case.cast("float64")
    values, jacobians = jax.jit(lambda *a: (jax.vmap(case.fn)(*a), jax.vmap(jax.jacrev(case.fn))(*a)))(*args)
    value, (joint, *_) = reference(case)
    assert_close(values, value, VALUE_RTOL["float64"])
    value_ndim = joint.ndim - args[0].ndim
    blocks = np.stack([np.take(np.take(joint, i, 0), i, value_ndim - 1) for i in range(len(args[0]))])
    assert_close(jacobians, blocks, DERIVATIVE_RTOL["float64"])


@over_batched
def test_scan_and_remat(case, x64):
    args = case.cast("float64")

    def scanned(*args):
        return jax.lax.scan(lambda carry, example: (carry, jax.checkpoint(case.fn)(*example)), 0.0, args)[1]

    value, jacobians = reference(case)
    got = jax.jit(lambda *a: (scanned(*a), jax.jacfwd(scanned)(*a), jax.jacrev(scanned)(*a)))(*args)
    assert_close(got[0], value, VALUE_RTOL["float64"])
    assert_close(got[1:], (jacobians[0], jacobians[0]), DERIVATIVE_RTOL["float64"])


@pytest.mark.parametrize("case", [c for c in CASES if not c.batched], ids=case_id)
def test_remat(case, x64):
    args, saved = case.cast("float64"), jax.checkpoint(case.fn)
    got = jax.jit(lambda *a: (jax.jacfwd(saved)(*a), jax.jacrev(saved)(*a)))(*args)
    assert_close(got, (reference(case)[1][0],) * 2, DERIVATIVE_RTOL["float64"])


@over_cases
def test_dtypes(case):
    """Value and gradient in each dtype, against float64 at the same (rounded) arguments."""

    @jax.jit
    def value_and_gradient(*args):
        def total(*args):
            value = case.fn(*args)
            return jnp.sum(value), value

        gradient, value = jax.grad(total, tuple(range(len(args))), has_aux=True)(*args)
        return value, gradient

    for dtype in ("float32", "float16", "bfloat16"):
        args = case.cast(dtype)
        with enable_x64():
            wide = tuple(jnp.asarray(np.asarray(a, np.float64)) for a in args)
            value, gradient = jax.tree.map(np.asarray, value_and_gradient(*wide))
        out, got = value_and_gradient(*args)
        assert out.dtype == (jnp.float32 if case.is_loss else dtype)
        assert_close(out, value, VALUE_RTOL["float32" if case.is_loss else dtype])
        assert all(g.dtype == a.dtype for g, a in zip(got, args))
        scale = max(1.0, *(float(np.max(np.abs(g))) for g in gradient))
        assert_close(got, gradient, DERIVATIVE_RTOL[dtype], scale=scale)


@pytest.mark.parametrize("case", [c for c in CASES if c.batched], ids=case_id)
def test_batch_sharded_over_a_mesh(case):
    """shard_map with its replication checks on, over the batch, in value and in both modes."""
    size = len(case.args[0])
    mesh = jax.make_mesh((size,), ("batch",), devices=jax.devices()[:size])
    spec = jax.sharding.PartitionSpec("batch")
    args = jax.device_put(case.cast("float32"), jax.sharding.NamedSharding(mesh, spec))
    sharded = functools.partial(shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    plain = case.cast("float32")

    def push(*args):
        return jax.jvp(case.fn, args, tuple(jnp.cos(a) for a in args))[1]

    def pull(*args):
        out, pullback = jax.vjp(case.fn, *args)
        return pullback(jnp.cos(out))

    def all_at_once(*args):
        return case.fn(*args), push(*args), pull(*args)

    value, *derivatives = jax.jit(sharded(all_at_once))(*args)
    wanted, *right = jax.jit(all_at_once)(*plain)
    assert_close(value, wanted, VALUE_RTOL["float32"])
    assert_close(
        derivatives, right, DERIVATIVE_RTOL["float32"], scale=1.0
    )  # third derivatives nearly cancel in the sum
