"""Attention by blocks against the equations on whole arrays: values, both modes, orders, masks, meshes, memory."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxsoftmax import SoftmaxJacobian, dot_product_attention
from jaxsoftmax.attention import blocks
from tests.helpers import enable_x64, one_in, shard_map
from tests.meshes import KINDS, around, mesh_of, placed

B, T, S, N, K, H = 2, 19, 17, 4, 2, 3  # three ragged blocks of eight queries
SEGMENTS = np.arange(T) // 5, np.arange(S) // 5
BIAS = np.random.default_rng(0).normal(size=(N, T, S))
MASK = np.random.default_rng(1).random((B, 1, T, S)) > 0.4
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 1)},
    "causal window": {"is_causal": True, "local_window_size": 4},
    "mask": {"mask": MASK},
    "mask of keys": {"mask": MASK[:, :, :1]},
    "lengths": {"query_seq_lengths": np.array([11, 19]), "key_value_seq_lengths": np.array([17, 5])},
    "segments": {"segment_ids": SEGMENTS},
    "softcap": {"logit_softcap": 1.5, "scale": 2.0},
    "bias": {"bias": BIAS},
    "bias of keys": {"bias": BIAS[:, :1]},
    "bias of queries": {"bias": BIAS[:1, :, :1]},
    "everything": {"bias": BIAS, "mask": MASK, "is_causal": True, "logit_softcap": 1.5},
}
SOME = ("plain", "causal", "everything")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of eight queries."""
    monkeypatch.setattr(blocks, "BUDGET", 1)
    monkeypatch.setattr(blocks, "LEAST", 8)


def seen(
    mask=None, is_causal=False, query_seq_lengths=None, key_value_seq_lengths=None, local_window_size=None, ids=None
):
    t, s = np.arange(T)[:, None], np.arange(S)[None]
    out = np.ones((B, 1, T, S), bool)
    out &= True if mask is None else mask
    out &= s <= t if is_causal else True
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        out &= (s >= t - left) & (s <= t + right)
    for position, lengths in ((t, query_seq_lengths), (s, key_value_seq_lengths)):
        out &= True if lengths is None else position < lengths[:, None, None, None]
    return out & (True if ids is None else ids[0][:, None] == ids[1])


def plain(q, k, v, bias=None, scale=None, logit_softcap=None, segment_ids=None, **masks):
    """The equations as they stand."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    z = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    z = z if logit_softcap is None else logit_softcap * jnp.tanh(z / logit_softcap)
    z = z if bias is None else z + jnp.expand_dims(bias, tuple(range(z.ndim - bias.ndim)))
    where = seen(ids=segment_ids, **masks)
    e = jnp.where(where, jnp.exp(jnp.where(where, z, 0.0)), 0.0)
    total = e.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", e / jnp.where(total == 0, 1.0, total), v)


def arguments(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def with_options(f, options):
    """f of arrays alone, and the arrays: the bias is one of them."""
    *arrays, g = arguments()
    options = dict(options)
    if "bias" in options:
        arrays.append(jnp.asarray(options.pop("bias")))
    named = ("query", "key", "value", "bias")
    return lambda *x: f(*x[:3], **dict(zip(named[3:], x[3:])), **options), arrays, g


def derivatives(f, arrays, g, second: bool):
    moved = [jnp.cos(3 * x) for x in arrays]
    every = tuple(range(len(arrays)))

    def along(*x):
        return jax.jvp(f, x, tuple(moved))[1]

    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x)) * g), every)
    if not second:
        return f(*arrays), along(*arrays), gradient(*arrays)
    return {
        "gradient of a jvp": jax.grad(lambda *x: jnp.sum(jnp.sin(along(*x)) * g), every)(*arrays),
        "forward over forward": jax.jvp(along, tuple(arrays), tuple(moved))[1],
        "forward over reverse": jax.jvp(gradient, tuple(arrays), tuple(moved))[1],
        "reverse over reverse": jax.vjp(gradient, *arrays)[1](tuple(moved)),
    }


def assert_same(got, wanted, ulps=200):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=ulps * np.finfo(b.dtype).eps * max(1.0, abs(b).max())
        ),
        got,
        wanted,
    )


@pytest.mark.parametrize("name", one_in(3, CASES))
def test_first_derivatives(name):
    with enable_x64():
        for_both = [with_options(f, CASES[name]) for f in (dot_product_attention, plain)]
        got, wanted = (jax.jit(functools.partial(derivatives, f, second=False))(x, g) for f, x, g in for_both)
        assert_same(got, wanted)


@pytest.mark.parametrize("name", one_in(3, SOME))
def test_second_derivatives(name):
    with enable_x64():
        for_both = [with_options(f, CASES[name]) for f in (dot_product_attention, plain)]
        got, wanted = (jax.jit(functools.partial(derivatives, f, second=True))(x, g) for f, x, g in for_both)
        assert_same(got, wanted)


@pytest.mark.parametrize("gap", [1, 20, 60])
def test_derivatives_where_one_key_takes_nearly_everything(gap):
    """Neither derivative dies with 1 - p: both are as accurate as their terms."""
    z, v, g, moved = np.float32([0, -gap, -gap - 1]), np.float32([0.7, -0.3, 1.1]), np.float32(1.3), np.float32(0.4)
    k = jnp.asarray(z)[:, None, None]
    arrays = jnp.ones((1, 1, 1)), k, jnp.asarray(v)[:, None, None]
    out = functools.partial(dot_product_attention, scale=1.0)
    dq, dk, _ = jax.vjp(out, *arrays)[1](g * jnp.ones((1, 1, 1)))
    _, do = jax.jvp(lambda q: out(q, *arrays[1:]), arrays[:1], (moved * jnp.ones((1, 1, 1)),))
    with mpmath.workdps(60):
        e = [mpmath.exp(mpmath.mpf(float(x))) for x in z]
        p = [x / sum(e) for x in e]
        mean = sum(a * float(b) for a, b in zip(p, v))
        dz = [a * (float(b) - mean) for a, b in zip(p, v)]
        slope = sum(a * float(b) for a, b in zip(dz, z))
        for got, wanted in [(dk[:, 0, 0], [float(g) * x for x in dz]), (dq.ravel(), [float(g) * slope])]:
            np.testing.assert_allclose(got, np.float64(wanted), rtol=1e-5)
        np.testing.assert_allclose(do.ravel(), float(float(moved) * slope), rtol=1e-5)


@pytest.mark.parametrize("gap", [1, 20, 60])
def test_second_derivatives_where_one_key_takes_nearly_everything(gap):
    """In a factor of the query, one of the keys and one of the values, in all four compositions."""
    z, v = np.float32([0, -gap, -gap - 1]), np.float32([0.7, -0.3, 1.1])

    def scaled(*factors):
        arrays = (f * x[:, None, None] for f, x in zip(factors, (jnp.ones(1), jnp.asarray(z), jnp.asarray(v))))
        return dot_product_attention(*arrays, scale=1.0).ravel()[0]

    def exact(a, b, c):
        e = [mpmath.exp(a * b * float(x)) for x in z]
        return c * sum(x * float(y) for x, y in zip(e, v)) / sum(e)

    with mpmath.workdps(80):
        orders = [[[(i, j).count(n) for n in range(3)] for j in range(3)] for i in range(3)]
        wanted = np.array([[float(mpmath.diff(exact, (1, 1, 1), tuple(n))) for n in row] for row in orders])
    wanted[2, 2] = 0.0  # the output is linear in the values
    every = (0, 1, 2)
    for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2):
        got = jax.jit(outer(inner(scaled, every), every))(*jnp.ones(3))
        np.testing.assert_allclose(got, wanted, rtol=8 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_comes_from_behind_a_mask(bad):
    q, k, v, g = arguments(jnp.float32)
    hidden = (jnp.arange(S) >= 11)[None, :, None, None]
    unread = (jnp.arange(T) >= 15)[None, :, None, None]

    def f(q, k, v):
        lengths = jnp.full(B, 15), jnp.full(B, 11)
        return dot_product_attention(q, k, v, query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1])

    def everything(q, k, v, g):
        moved = jnp.sin(q), jnp.sin(k), jnp.sin(v)
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(g), jax.jvp(f, (q, k, v), moved)[1]

    clean = jax.jit(everything)(q, k, v, g)
    spoilt = [
        jnp.where(unread, bad, q),
        jnp.where(hidden, bad, k),
        jnp.where(hidden, bad, v),
        jnp.where(unread, bad, g),
    ]
    got = jax.jit(everything)(*spoilt)
    jax.tree.map(np.testing.assert_array_equal, got, clean)
    assert not np.any(got[0][:, 15:]) and not np.any(got[1][0][:, 15:]) and not np.any(got[1][1][:, 11:])
    assert np.isnan(f(q, k.at[:, 3].set(bad), v)[:, :15]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_as_jax_nn(dtype):
    q, k, v, g = arguments(dtype)
    options = {"is_causal": True, "key_value_seq_lengths": jnp.array([17, 5], jnp.int32), "return_residual": True}
    if "return_residual" not in inspect.signature(jax.nn.dot_product_attention).parameters:
        pytest.skip("jax.nn of JAX 0.6.0 returns no residual")
    got, wanted = (
        jax.jit(lambda q, k, v, f=f: every(functools.partial(f, **options), q, k, v, g))
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wanted = wanted(q, k, v)
    for a, b in zip(got(q, k, v), wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=16 * float(jnp.finfo(dtype).eps))


def every(f, q, k, v, g):
    """Value, logsumexp, gradient and tangent."""
    (out, pull), moved = jax.vjp(lambda *x: f(*x)[0], q, k, v), (jnp.sin(q), jnp.sin(k), jnp.sin(v))
    return out, f(q, k, v)[1], *pull(g), jax.jvp(lambda *x: f(*x)[0], (q, k, v), moved)[1]


def test_without_examples_and_under_vmap():
    q, k, v, _ = arguments(jnp.float32)
    f = functools.partial(dot_product_attention, return_residual=True, is_causal=True)
    wanted = f(q, k, v)
    for got in (jax.vmap(f)(q, k, v), jax.tree.map(lambda x: x[None], f(q[0], k[0], v[0]))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[: len(a)], atol=1e-6), got, wanted)


def test_export():
    (b,) = export.symbolic_shape("b")
    q, k, v = (x[:, :16] for x in arguments(jnp.float32)[:3])
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(dot_product_attention(q, k, v) ** 2)))
    kinds = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (q, k, v)]
    got = export.export(gradient)(*kinds).call(q, k, v)
    np.testing.assert_allclose(got, gradient(q, k, v), atol=1e-5)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="argmax does not lower in the shard_map of JAX 0.6.0")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"local_window_size": (3, 1)}])
def test_sequence_split_over_a_mesh(options):
    q, k, v, g = (x[:, :16] for x in arguments(jnp.float32))
    mesh = Mesh(np.array(jax.devices()[:4]), ("t",))
    split = functools.partial(shard_map, mesh=mesh, in_specs=(P(None, "t"),) * 3, out_specs=P(None, "t"))
    over = split(functools.partial(dot_product_attention, axis_name="t", **options))
    for_both = [
        jax.jit(lambda q, k, v, f=f: (f(q, k, v), jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x)) * g), (0, 1, 2))(q, k, v)))
        for f in (over, functools.partial(dot_product_attention, **options))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *(f(q, k, v) for f in for_both))


@pytest.mark.parametrize("shape", one_in(8, list(itertools.product((1, B), (1, N), (1, T), (1, S)))))
def test_gradient_in_a_bias_of_every_shape(shape):
    """It is that of the whole bias, summed over the axes that it is broadcast along."""
    with enable_x64():
        q, k, v, g = arguments()
        bias = jax.random.normal(jax.random.key(1), shape, jnp.float64)
        of = lambda f, bias: jax.grad(lambda bias: jnp.sum(f(q, k, v, bias, is_causal=True) * g))(bias)
        wanted = jax.jit(functools.partial(of, plain))(jnp.broadcast_to(bias, (B, N, T, S)))
        axes = tuple(i for i, n in enumerate(shape) if n == 1)
        assert_same(jax.jit(functools.partial(of, dot_product_attention))(bias), wanted.sum(axes, keepdims=True))


def test_under_scan_and_checkpoint_and_debug_nans():
    arrays = [x[:, :16, :1, :2] for x in arguments(jnp.float32)]

    def gradient(f, q, k, v, g):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x, is_causal=True)) * g), (0, 1, 2))(q, k, v)

    again = lambda *x, **options: jax.checkpoint(functools.partial(dot_product_attention, **options))(*x)
    wanted = jax.jit(functools.partial(gradient, dot_product_attention))(*arrays)
    step = lambda carry, x: (carry, gradient(again, *x))
    with jax.debug_nans(True):
        got = jax.jit(lambda *x: jax.lax.scan(step, None, x)[1])(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)


def test_without_jit():
    q, k, v = (x[0, :16, :1, :2] for x in arguments(jnp.float32)[:3])
    with jax.disable_jit():
        got = dot_product_attention(q, k, v)
    np.testing.assert_allclose(got, jax.jit(dot_product_attention)(q, k, v), atol=1e-6)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="argmax does not lower in the shard_map of JAX 0.6.0")
@pytest.mark.parametrize("kind", [*KINDS, "shard_map"])
def test_examples_and_heads_split_over_a_mesh_send_nothing(kind):
    arrays = [x[:, :16] for x in arguments(jnp.float32)]
    mesh = mesh_of("Auto" if kind == "shard_map" else kind, b=2, n=2)

    def f(q, k, v):
        return dot_product_attention(q, k, v, is_causal=True)

    def every(f, q, k, v, g):
        return jax.vjp(f, q, k, v)[1](g), jax.jvp(f, (q, k, v), (g, v, k))

    split = P("b", None, "n")
    over = shard_map(f, mesh=mesh, in_specs=(split,) * 3, out_specs=split) if kind == "shard_map" else f
    with around(mesh):
        program = jax.jit(functools.partial(every, over)).lower(*placed(mesh, arrays, [split] * 4)).compile()
        got = program(*placed(mesh, arrays, [split] * 4))
    assert not re.search("all-|reduce-scatter|collective", program.as_text())
    wanted = jax.jit(functools.partial(every, f))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.device_get(got), wanted)


def test_a_row_is_an_operator():
    """Each row of dz = P∘(g (v - o)ᵀ) is a product with the softmax Jacobian."""
    q, k, v, g = (x[0, :, :1] for x in arguments(jnp.float32))
    dk = jax.vjp(functools.partial(dot_product_attention, scale=1.0), q, k, v)[1](g)[1]
    J = SoftmaxJacobian.from_logits(q[:, 0] @ k[:, 0].T)
    dz = J.mv(g[:, 0] @ v[:, 0].T)
    np.testing.assert_allclose(dk[:, 0], dz.T @ q[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (TypeError, "dtype", {"value": jnp.zeros((5, 2, 3), jnp.bfloat16)}),
        (ValueError, "value", {"value": jnp.zeros((4, 2, 3))}),
        (ValueError, "heads", {"query": jnp.zeros((4, 3, 3))}),
        (ValueError, "query", {"query": jnp.zeros(3)}),
        (TypeError, "query", {"query": jnp.zeros((4, 4, 3), jnp.int32)}),
        (ValueError, "bias", {"bias": jnp.zeros((4, 4))}),
        (TypeError, "mask", {"mask": jnp.ones((4, 5))}),
        (ValueError, "query_seq_lengths", {"query_seq_lengths": jnp.ones(3, jnp.int32)}),
        (TypeError, "key_value_seq_lengths", {"key_value_seq_lengths": jnp.ones(1)}),
        (ValueError, "local_window_size", {"local_window_size": -1}),
        (TypeError, "local_window_size", {"local_window_size": 0.5}),
        (ValueError, "logit_softcap", {"logit_softcap": 0.0}),
        (ValueError, "segment_ids", {"segment_ids": jnp.zeros(7, jnp.int32)}),
        (ValueError, "axis_name", {"axis_name": "nowhere"}),
    ],
)
def test_wrong_calls(kind, name, options):
    arrays = {"query": jnp.zeros((4, 4, 3)), "key": jnp.zeros((5, 2, 3)), "value": jnp.zeros((5, 2, 3))}
    with pytest.raises(kind, match=name):
        dot_product_attention(**{**arrays, **options})


def test_half_precision_of_second_order():
    """Rounded once per block and product: as near to float32 as one rounding of its operands."""
    arrays = [x.astype(jnp.bfloat16) for x in arguments(jnp.float32)]

    def gradient_of_tangent(q, k, v, g):
        along = lambda *x: jax.jvp(dot_product_attention, x, (g, k, v))[1]
        return jax.grad(lambda *x: jnp.sum((along(*x) * g).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    got = jax.jit(gradient_of_tangent)(*arrays)
    wanted = jax.jit(gradient_of_tangent)(*(x.astype(jnp.float32) for x in arrays))
    for a, b in zip(got, wanted):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=float(jnp.finfo(a.dtype).eps) * float(abs(b).max()))


def test_memory_and_what_is_kept(monkeypatch):
    """Nothing of T × S, and between the passes the arguments, two rows of H per query, and two numbers."""
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "BUDGET", 1 << 20)
    x = jax.ShapeDtypeStruct((1, 2048, 1, 16), jnp.float32)
    whole = 4 * 2048**2

    def gradient(*x):
        return jax.grad(lambda *x: jnp.sum(dot_product_attention(*x) ** 2), (0, 1, 2))(*x)

    def hessian_product(*x):
        return jax.jvp(gradient, x, x)[1]

    for f, part in ((gradient, 2), (hessian_product, 2)):
        assert jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes < whole / part
    _, linear = jax.eval_shape(lambda *x: jax.linearize(dot_product_attention, *x), x, x, x)
    kept = sum(leaf.size for leaf in jax.tree.leaves(linear))
    assert kept <= 2048 * (4 * 16 + 2)
