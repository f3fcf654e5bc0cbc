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
    forward = reference(case)[1]
    assert_close(jax.jit(jax.jacrev(case.fn, argnums))(*args), forward, DERIVATIVE_RTOL["float64"])
    out, pushed = jax.jvp(case.fn, args, tangents)
    applied = sum(jnp.tensordot(j, t, t.ndim) for j, t in zip(forward, tangents))
    assert_close(pushed, applied, DERIVATIVE_RTOL["float64"])
    (cotangent,) = directions((out,), seed=4)
    pulled = jax.vjp(case.fn, *args)[1](cotangent)
    assert_close(pulled, [jnp.tensordot(cotangent, j, out.ndim) for j in forward], DERIVATIVE_RTOL["float64"])


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
    args = case.cast("float64")
    for in_axes in itertools.product(*((0, 1, None) if a.ndim > 1 else (0, None) for a in args)):
        if all(axis is None for axis in in_axes):
            continue
        moved = [a[0] if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in zip(args, in_axes)]
        loop = [
            case.fn(*(a[0] if axis is None else a[i] for a, axis in zip(args, in_axes))) for i in range(len(args[0]))
        ]
        assert_close(jax.vmap(case.fn, in_axes)(*moved), jnp.stack(loop), VALUE_RTOL["float64"])


@over_batched
def test_batch_is_a_vmap(case, x64):
    args = case.cast("float64")
    assert_close(jax.vmap(case.fn)(*args), case.fn(*args), VALUE_RTOL["float64"])
    jacobians, joint = jax.vmap(jax.jacrev(case.fn))(*args), reference(case)[1][0]
    value_ndim = joint.ndim - args[0].ndim
    blocks = np.stack([np.take(np.take(joint, i, 0), i, value_ndim - 1) for i in range(len(args[0]))])
    assert_close(jacobians, blocks, DERIVATIVE_RTOL["float64"])


@over_batched
def test_scan(case, x64):
    args = case.cast("float64")

    def scanned(*args):
        return jax.lax.scan(lambda carry, example: (carry, case.fn(*example)), 0.0, args)[1]

    value, jacobians = reference(case)
    assert_close(scanned(*args), value, VALUE_RTOL["float64"])
    for differentiate in (jax.jacfwd, jax.jacrev):
        assert_close(jax.jit(differentiate(scanned))(*args), jacobians[0], DERIVATIVE_RTOL["float64"])


@over_cases
def test_remat(case, x64):
    args = case.cast("float64")
    for differentiate in (jax.jacfwd, jax.jacrev):
        got = jax.jit(differentiate(jax.checkpoint(case.fn)))(*args)
        assert_close(got, reference(case)[1][0], DERIVATIVE_RTOL["float64"])


@over_cases
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(case, dtype):
    """Value and gradient in each dtype, against float64 at the same (rounded) arguments."""
    args = case.cast(dtype)
    with enable_x64():
        wide = tuple(jnp.asarray(np.asarray(a, np.float64)) for a in args)
        value, gradient = case.fn(*wide), jax.grad(lambda *a: jnp.sum(case.fn(*a)), tuple(range(len(args))))(*wide)
        value, gradient = np.asarray(value), [np.asarray(g) for g in gradient]
    got = case.fn(*args)
    assert got.dtype == (jnp.float32 if case.is_loss else dtype)
    assert_close(got, value, VALUE_RTOL["float32" if case.is_loss else dtype])
    got = jax.grad(lambda *a: jnp.sum(case.fn(*a).astype(jnp.float32)), tuple(range(len(args))))(*args)
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
    assert_close(jax.jit(sharded(case.fn))(*args), case.fn(*plain), VALUE_RTOL["float32"])

    def push(*args):
        return jax.jvp(case.fn, args, tuple(jnp.cos(a) for a in args))[1]

    def pull(*args):
        out, pullback = jax.vjp(case.fn, *args)
        return pullback(jnp.cos(out))

    for derivative in (push, pull):
        got, want = jax.jit(sharded(derivative))(*args), derivative(*plain)
        assert_close(got, want, DERIVATIVE_RTOL["float32"], scale=1.0)  # third derivatives nearly cancel in the sum
